"""What every attack offers, and what it reports about its own training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class FitRecord:
    """How an attack's training went.

    Attributes:
        history: the loss on the attacker's held-out images after each epoch.
        train_history: the mean training loss of each epoch.
        initial_loss: the held-out loss before the first step.
        mean_image_loss: the held-out loss of the attacker's mean image, in the same unit.
        best_epoch: index into `history` of the weights that were kept.
        plateau: whether the held-out loss had stopped improving (see the attack for the rule).
        extensions: how many times the schedule was extended to get there.
        seconds: wall-clock time of the fit.
    """

    history: tuple[float, ...]
    train_history: tuple[float, ...]
    initial_loss: float
    mean_image_loss: float
    best_epoch: int
    plateau: bool
    extensions: int
    seconds: float

    @property
    def best_loss(self) -> float:
        """The held-out loss of the weights that were kept."""
        return self.history[self.best_epoch]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON-safe plain data."""
        return asdict(self)


@runtime_checkable
class Attack(Protocol):
    """An attack that learns from pairs and then reconstructs; bring your own with these two.

    `fit` may return a `FitRecord`, or None where there is nothing to record.
    """

    def fit(self, z: Tensor, pixels: Tensor) -> FitRecord | None:
        """Learn from features `[N, ...]` and their images `[N, C, H, W]` on [0, 1]."""

    def reconstruct(self, z: Tensor) -> Tensor:
        """Features `[N, ...]` to pixels `[N, C, H, W]` on [0, 1]."""
