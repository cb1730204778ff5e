"""Dropout on the uploaded feature, at inference as in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patrol_prune.defences.base import Defence, check_share, sent_dtype, wrapped
from patrol_prune.defences.randomness import RandomUpload
from patrol_prune.split import Split


class Dropper(RandomUpload):
    """`z' = z * b / (1 - p)`, with `b` 0 with probability `p`, else 1, drawn per value.

    In training mode the `spared` share of a batch, evenly spread over it, passes whole: the first
    of it among its first `1 / (2 spared)` images.
    """

    def __init__(self, p: float, seed: int, spared: float = 0.0) -> None:
        super().__init__(seed)
        self.p, self.spared = p, spared

    def forward(self, z: Tensor) -> Tensor:
        """Features `[N, ...]` to thinned ones, of their type (`sent_dtype`)."""
        kind = sent_dtype(z)
        return self._thinned(z.float()).to(kind)

    def _thinned(self, z: Tensor) -> Tensor:
        if self.silent:
            return z
        draw = torch.rand(z.shape, generator=self.generator(z.device), device=z.device)
        thinned = z * (draw >= self.p) / (1.0 - self.p)
        if not (self.training and self.spared):
            return thinned
        places = torch.arange(len(z) + 1, device=z.device, dtype=torch.float64)
        whole = (places * self.spared + 0.5).floor().diff() > 0
        return torch.where(whole.view(-1, *[1] * (z.dim() - 1)), z, thinned)


@dataclass(frozen=True)
class FeatureDropout(Defence):
    """A share of the uploaded values is zeroed at random, anew for every image.

    Uploads are counted as dense. Source: the dropout defence of He, Zhang and Lee (IEEE IoT-J
    2020), who keep it on at inference.

    Attributes:
        p: probability of a value to be dropped, in [0, 1); more is stronger.
        seed: of the draws.
        spared: share of each training batch, in [0, 1), that passes whole, so that an edge trained
            against attackers meets the one who has many uploads of a picture too: their mean is
            the whole feature. Under evaluation nothing is spared.
    """

    name: ClassVar[str] = "feature_dropout"
    swept: ClassVar[str] = "p"

    p: float = 0.5
    seed: int = 0
    spared: float = 0.0

    def __post_init__(self) -> None:
        check_share(self.p, "p", "FeatureDropout")
        check_share(self.spared, "spared", "FeatureDropout")

    def apply(self, split: Split, *, calibration: Tensor | None = None) -> Split:
        """See `Defence.apply`; nothing is calibrated."""
        return wrapped(split, Dropper(self.p, self.seed, self.spared), by=self)
