"""Dropout on the uploaded feature, at inference as in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patrol_prune.defences.base import Defence, check_share, wrapped
from patrol_prune.defences.randomness import RandomUpload
from patrol_prune.split import Split


class Dropper(RandomUpload):
    """`z' = z * b / (1 - p)`, with `b` 0 with probability `p`, else 1, drawn per value."""

    def __init__(self, p: float, seed: int) -> None:
        super().__init__(seed)
        self.p = p

    def forward(self, z: Tensor) -> Tensor:
        """Features `[N, ...]` to thinned ones, float32."""
        z = z.float()
        if self.silent:
            return z
        draw = torch.rand(z.shape, generator=self.generator(z.device), device=z.device)
        return z * (draw >= self.p) / (1.0 - self.p)


@dataclass(frozen=True)
class FeatureDropout(Defence):
    """A share of the uploaded values is zeroed at random, anew for every image.

    Uploads are counted as dense. Source: the dropout defence of He, Zhang and Lee (IEEE IoT-J
    2020), who keep it on at inference.

    Attributes:
        p: probability of a value to be dropped, in [0, 1); more is stronger.
        seed: of the draws.
    """

    name: ClassVar[str] = "feature_dropout"
    swept: ClassVar[str] = "p"

    p: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.p, "p", "FeatureDropout")

    def apply(self, split: Split, *, calibration: Tensor | None = None) -> Split:
        """See `Defence.apply`; nothing is calibrated."""
        return wrapped(split, Dropper(self.p, self.seed))
