"""Several defences of one upload at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from patrol_prune.defences.base import Defence
from patrol_prune.errors import InputError
from patrol_prune.objective import PatrolObjective, TaskLoss
from patrol_prune.pixels import Normalization
from patrol_prune.split import Split


@dataclass(frozen=True)
class Combined(Defence):
    """Defences one behind the other, in the order in which the feature meets them.

        Combined((FeatureDropout(0.5), Patrol(beta=10.0)))

    trains PATROL's edge against attackers who see the feature with its dropout. What draws or
    rounds is put behind the edge in that order, each calibrated on what the ones before it send;
    the one that trains in its own way, if there is one, gives the objective and sees the upload as
    all of them leave it.

    Attributes:
        parts: at least one defence; at most one of them has an objective of its own. One that
            counts its bytes in its own way (quantisation, DISCO) stands last behind the edge.
    """

    name: ClassVar[str] = "combined"

    parts: tuple[Defence, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts or not all(isinstance(part, Defence) for part in self.parts):
            raise InputError(f"Combined: expected a tuple of defences, came {self.parts!r}.")
        training = [part.name for part in self.parts if _trains(part)]
        if len(training) > 1:
            raise InputError(
                f"Combined: expected at most one defence with an objective of its own, came "
                f"{' and '.join(training)}. Keep one of them; its settings hold the others' terms."
            )
        behind = [part for part in self.parts if _is_behind(part)]
        for part in behind[:-1]:
            if type(part).upload_bytes is not Defence.upload_bytes:
                raise InputError(
                    f"Combined: expected {part.name} behind {behind[-1].name}, which would "
                    "change what it sends: its bytes are not those of the upload then. Put it last."
                )

    def apply(self, split: Split, *, calibration: Tensor | None = None) -> Split:
        """See `Defence.apply`."""
        for part in self.parts:
            split = part.apply(split, calibration=calibration)
        return split

    def objective(
        self,
        split: Split,
        *,
        normalization: Normalization | None = None,
        seed: int = 0,
        task_loss: TaskLoss = F.cross_entropy,
    ) -> PatrolObjective | None:
        """See `Defence.objective`."""
        for part in self.parts:
            found = part.objective(split, normalization=normalization, seed=seed,
                                   task_loss=task_loss)
            if found is not None:
                return found
        return None

    def upload_bytes(self, feature_shape: Sequence[int]) -> int:
        """Those of the last defence behind the edge."""
        behind = [part for part in self.parts if _is_behind(part)]
        return (behind[-1] if behind else self.parts[-1]).upload_bytes(feature_shape)


def _trains(part: Defence) -> bool:
    return type(part).objective is not Defence.objective


def _is_behind(part: Defence) -> bool:
    return type(part).apply is not Defence.apply
