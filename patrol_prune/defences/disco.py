"""DISCO: which channels are withheld depends on the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patrol_prune.decoders import channel_dim
from patrol_prune.defences.base import (
    Adversary,
    Defence,
    check_at_least,
    check_share,
    sent_dtype,
    wrapped,
)
from patrol_prune.given import check_count, image_shape
from patrol_prune.objective import PatrolObjective, TaskLoss
from patrol_prune.pixels import Normalization
from patrol_prune.split import Split


def kept_channels(channels: int, ratio: float) -> int:
    """How many of `channels` are uploaded at a dropping `ratio`: `C - floor(ratio C)`, at least 1.
    """
    return max(1, channels - math.floor(ratio * channels + 1e-9))


class ChannelDropper(nn.Module):
    """A small network scores the channels of each feature; those with the lowest are zeroed.

        z'_c = z_c * 1[s_c is among the `kept` largest scores],   s = scorer(z)

    The gradient of the hard choice is that of `sigmoid((s - t) / temperature)`, with `t` half-way
    between the last kept score and the first dropped one. The scorer sees each channel's mean and
    root mean square over the positions.

    Args:
        channels: of the feature.
        kept: how many remain for each image.
        dim: which dimension of `[N, ...]` holds them.
        width: hidden units of the scorer.
        temperature: of the gradient.
        seed: of the scorer's initial weights.
    """

    def __init__(
        self, channels: int, kept: int, dim: int, *, width: int, temperature: float, seed: int
    ) -> None:
        super().__init__()
        self.kept, self.dim, self.temperature = kept, dim, temperature
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.scorer = nn.Sequential(
                nn.Linear(2 * channels, width), nn.ReLU(), nn.Linear(width, channels)
            )

    def mask(self, z: Tensor) -> Tensor:
        """`[N, C]`, 1 for a kept channel and 0 for a dropped one, with the soft gradient."""
        values = z.movedim(self.dim, 1).flatten(2) if z.dim() > 2 else z[:, :, None]
        spread = (values.square().mean(2) + 1e-12).sqrt()
        read = torch.cat([values.mean(2), spread], 1).to(next(self.scorer.parameters()).dtype)
        scores = self.scorer(read).float()
        ranked = scores.detach().sort(1, descending=True)
        hard = torch.zeros_like(scores).scatter(1, ranked.indices[:, : self.kept], 1.0)
        if self.kept == scores.shape[1]:
            return hard
        threshold = ranked.values[:, self.kept - 1 : self.kept + 1].mean(1, keepdim=True)
        soft = torch.sigmoid((scores - threshold) / self.temperature)
        return hard + soft - soft.detach()

    def forward(self, z: Tensor) -> Tensor:
        """Features `[N, ...]` to those with whole channels zeroed, of their type (`sent_dtype`)."""
        kind, z = sent_dtype(z), z.float()
        shape = [1] * z.dim()
        shape[0], shape[self.dim] = z.shape[0], z.shape[self.dim]
        return (z * self.mask(z).view(shape)).to(kind)


@dataclass(frozen=True)
class Disco(Defence):
    """A share of the channels is withheld, chosen for each image by a network trained to that end.

    Differs from Singh et al. (DISCO, CVPR 2021): the scorer reads pooled statistics instead of the
    whole feature, the adversarial gradient also reaches the edge rather than the scorer alone, and
    the attackers inside are those of this package.

    Attributes:
        ratio: share of the channels that is withheld, in [0, 1); more is stronger.
        beta: weight of the adversarial error.
        adversary: the attackers inside.
        width: hidden units of the scorer.
        temperature: of the gradient of the choice.
        seed: of the scorer's initial weights.
    """

    name: ClassVar[str] = "disco"
    swept: ClassVar[str] = "ratio"

    ratio: float = 0.5
    beta: float = 10.0
    adversary: Adversary = field(default_factory=Adversary)
    width: int = 64
    temperature: float = 1.0 / 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.ratio, "ratio", "Disco")
        check_at_least(self.beta, 0.0, "beta", "Disco")
        check_count(self.width, "width", 1)
        check_at_least(self.temperature, 1e-6, "temperature", "Disco")

    def apply(self, split: Split, *, calibration: Tensor | None = None) -> Split:
        """See `Defence.apply`; nothing is calibrated."""
        dim = channel_dim(tuple(split.feature_shape), image_shape(split.example_inputs))
        channels = split.feature_shape[dim - 1]
        kept = kept_channels(channels, self.ratio)
        dropper = ChannelDropper(channels, kept, dim, width=self.width,
                                 temperature=self.temperature, seed=self.seed)
        return wrapped(split, dropper, by=self)

    def objective(
        self,
        split: Split,
        *,
        normalization: Normalization | None = None,
        seed: int = 0,
        task_loss: TaskLoss = F.cross_entropy,
    ) -> PatrolObjective:
        """See `Defence.objective`."""
        return self.adversary.objective(split, task_loss, beta=self.beta,
                                        normalization=normalization, seed=seed)

    def upload_bytes(self, feature_shape: Sequence[int]) -> int:
        """The kept channels as float32, and one bit per channel that says which they are.

        Channels are where `channel_dim` finds them for square images.
        """
        shape = tuple(feature_shape)
        channels = shape[channel_dim(shape, (1, 1, 1)) - 1]
        values = math.prod(feature_shape) // channels * kept_channels(channels, self.ratio)
        return 4 * values + math.ceil(channels / 8)
