"""Several defences of one upload at once."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from patrol_prune.cost import generators_of
from patrol_prune.defences.base import Defence
from patrol_prune.defences.bottleneck import Bottleneck
from patrol_prune.defences.cem_patrol import CemPatrol
from patrol_prune.defences.dropout import FeatureDropout
from patrol_prune.defences.noise import GaussianNoise
from patrol_prune.defences.randomness import filled
from patrol_prune.errors import InputError
from patrol_prune.objective import PatrolObjective, TaskLoss
from patrol_prune.pixels import Normalization
from patrol_prune.split import Split

_SEEDS_APART = 1_000_003
_OURS = "patrol_prune."


@dataclass(frozen=True)
class Combined(Defence):
    """Defences one behind the other, in the order in which the feature meets them.

        Combined((FeatureDropout(0.5), Patrol(beta=10.0)))

    trains PATROL's edge against attackers who see the feature with its dropout. What draws or
    rounds is put behind the edge in that order, each calibrated on what the ones before it send,
    each with draws of its own; the one that trains in its own way, if there is one, gives the
    objective and sees the upload as all of them leave it.

    Attributes:
        parts: at least one defence; at most one of them has an objective of its own. One that
            counts its bytes in its own way (quantisation, DISCO) stands last behind the edge, one
            that prunes (CEM's baseline) first of all.
    """

    name: ClassVar[str] = "combined"

    parts: tuple[Defence, ...] = ()

    def __post_init__(self) -> None:
        given = self.parts
        if not isinstance(given, (tuple, list)) or not given or not all(
            isinstance(part, Defence) for part in given
        ):
            raise InputError(f"Combined: expected one or more defences as a tuple, came {given!r}.")
        parts = tuple(inner for part in given
                      for inner in (part.parts if isinstance(part, Combined) else (part,)))
        for part in parts:
            _check_methods(part)
        object.__setattr__(self, "parts", parts)
        training = [part for part in parts if _trains(part)]
        if len(training) > 1:
            raise InputError(
                "Combined: expected at most one defence with an objective of its own, came "
                f"{' and '.join(part.name for part in training)}. Keep one of them."
            )
        if any(isinstance(part, CemPatrol) for part in parts[1:]):
            raise InputError("Combined: expected cem_patrol first, which prunes the edge that the "
                             f"others stand behind, came {' + '.join(p.name for p in parts)}.")
        behind = [part for part in parts if _is_behind(part)]
        for part in behind[:-1]:
            if type(part).upload_bytes is not Defence.upload_bytes:
                raise InputError(
                    f"Combined: expected {part.name} behind {behind[-1].name}, which would "
                    "change what it sends: its bytes are not those of the upload then. Put it last."
                )

    def apply(self, split: Split, *, calibration: Tensor | None = None) -> Split:
        """See `Defence.apply`."""
        for place, part in enumerate(self.parts):
            if place and isinstance(part, (FeatureDropout, GaussianNoise)):
                # One stream for two defences would let the one tell of the other.
                part = replace(part, seed=part.seed + place * _SEEDS_APART)
            there = set(generators_of(split.edge))
            split = part.apply(split, calibration=calibration)
            if place and not type(part).__module__.startswith(_OURS):
                _set_apart([g for g in generators_of(split.edge) if g not in there], place)
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
            if _trains(part):
                return part.objective(split, normalization=normalization, seed=seed,
                                      task_loss=task_loss)
        return None

    def upload_bytes(self, feature_shape: Sequence[int]) -> int:
        """Those of the last defence behind the edge."""
        behind = [part for part in self.parts if _is_behind(part)]
        return (behind[-1] if behind else self.parts[-1]).upload_bytes(feature_shape)


def _set_apart(generators: Sequence[torch.Generator], place: int) -> None:
    """Let what a caller's own defence put behind the edge draw by where it stands: its seed may be
    that of another part.
    """
    for number, generator in enumerate(generators):
        key = generator.get_state().numpy().tobytes() + repr((place, number)).encode()
        if generator.device.type == "cpu":
            generator.set_state(filled(key).get_state())
        else:
            generator.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))


def _check_methods(part: Defence) -> None:
    """Refuse a defence whose methods cannot be called as those of `Defence` are."""
    expected: dict[str, tuple[str, dict[str, Any]]] = {
        "apply": ("(self, split, *, calibration=None) that returns a Split",
                  {"calibration": None}),
        "objective": ("(self, split, *, normalization=None, seed=0, task_loss=F.cross_entropy) "
                      "that returns a PatrolObjective or None",
                      {"normalization": None, "seed": 0, "task_loss": F.cross_entropy}),
    }
    for name, (call, given) in expected.items():
        found = inspect.signature(getattr(part, name))
        try:
            found.bind(None, **given)
        except TypeError as error:
            raise InputError(
                f"Combined: expected of {type(part).__name__} a method {name}{call}, came "
                f"{name}{found}: {error}. Take just these, also where they are of no "
                "use; anything further needs a default."
            ) from error


def _trains(part: Defence) -> bool:
    """Whether it has an objective of its own; a bottleneck has one with an adversary alone."""
    if isinstance(part, Bottleneck):
        return part.beta > 0
    return type(part).objective is not Defence.objective


def _is_behind(part: Defence) -> bool:
    """Whether it puts something behind the edge."""
    return type(part).apply is not Defence.apply and not isinstance(part, CemPatrol)
