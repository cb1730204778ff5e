"""A narrow layer at the split: fewer channels are uploaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patrol_prune.decoders import channel_dim
from patrol_prune.defences.base import (
    Adversary,
    Defence,
    calibration_features,
    check_at_least,
    wrapped,
)
from patrol_prune.errors import InputError
from patrol_prune.given import image_shape
from patrol_prune.objective import PatrolObjective, TaskLoss
from patrol_prune.pixels import Normalization
from patrol_prune.split import Split
from patrol_prune.symmetric import positive_eigh


@dataclass(frozen=True)
class Bottleneck(Defence):
    """`z' = V^T (z - mu)` on the device, `V z' + mu` in the cloud, both trained from there on.

    `V [C, channels]` holds the first principal directions of the calibration features' channels,
    which is the linear bottleneck that loses least; without calibration it is random and
    orthonormal. Maps take 1x1 convolutions, tokens and vectors linear layers.

    Differs from ResSFL (Li et al., CVPR 2022), where the bottleneck is trained from scratch
    together with the rest and an attacker: here it starts from principal components, so that a
    short fine-tuning is enough; the adversarial term is `beta`.

    Attributes:
        channels: uploaded channels; fewer are stronger.
        beta: weight of the adversarial error; 0 trains the task alone.
        adversary: the attackers inside.
        seed: of the directions where there is no calibration.
    """

    name: ClassVar[str] = "bottleneck"
    swept: ClassVar[str] = "channels"

    channels: int = 8
    beta: float = 0.0
    adversary: Adversary = field(default_factory=Adversary)
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.channels, int) or self.channels < 1:
            raise InputError(
                f"Bottleneck: expected a whole number of channels from 1, came {self.channels}."
            )
        check_at_least(self.beta, 0.0, "beta", "Bottleneck")

    def apply(self, split: Split, *, calibration: Tensor | None = None) -> Split:
        """See `Defence.apply`; an InputError where the feature has fewer channels."""
        shape = tuple(split.feature_shape)
        dim = channel_dim(shape, image_shape(split.example_inputs))
        wide = shape[dim - 1]
        if self.channels > wide:
            raise InputError(
                f"Expected a bottleneck of at most the feature's {wide} channels, came "
                f"{self.channels}."
            )
        if calibration is None:
            generator = torch.Generator().manual_seed(self.seed)
            directions = torch.linalg.qr(torch.randn(wide, self.channels, generator=generator))[0]
            mean = torch.zeros(wide)
        else:
            values = calibration_features(split, calibration).movedim(dim, -1).flatten(0, -2)
            directions, mean = principal_directions(values, self.channels)
        narrow = directions.T
        is_map = len(shape) == 3 and dim == 1
        down = _pointwise(narrow, -narrow @ mean, is_map=is_map)
        up = _pointwise(directions, mean, is_map=is_map)
        kind = next((p.dtype for p in split.edge.parameters() if p.is_floating_point()),
                    torch.float32)
        return wrapped(split, down.to(kind), up.to(kind), by=self)

    def objective(
        self,
        split: Split,
        *,
        normalization: Normalization | None = None,
        seed: int = 0,
        task_loss: TaskLoss = F.cross_entropy,
    ) -> PatrolObjective | None:
        """See `Defence.objective`; None at `beta` 0."""
        if self.beta == 0:
            return None
        return self.adversary.objective(split, task_loss, beta=self.beta,
                                        normalization=normalization, seed=seed)


def principal_directions(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`(V [C, count], mu [C])`: the first principal directions of `values [M, C]`, and their mean.

    The sign of each direction makes its largest entry positive.
    """
    values = values.double()
    mean = values.mean(0)
    _, vectors = positive_eigh((values - mean).T @ (values - mean))
    directions = vectors.flip(1)[:, :count]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return (directions * largest.sign()).float(), mean.float()


def _pointwise(weight: Tensor, bias: Tensor, *, is_map: bool) -> nn.Module:
    """A 1x1 convolution or a linear layer with this weight `[out, in]` and bias `[out]`."""
    out, wide = weight.shape
    layer: nn.Conv2d | nn.Linear
    if is_map:
        layer = nn.utils.skip_init(nn.Conv2d, wide, out, 1)
    else:
        layer = nn.utils.skip_init(nn.Linear, wide, out)
    with torch.no_grad():
        layer.weight.copy_(weight.view(layer.weight.shape))
        assert layer.bias is not None
        layer.bias.copy_(bias)
    return layer
