"""Few bits per uploaded value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from patrol_prune.decoders import channel_dim
from patrol_prune.defences.base import (
    Defence,
    calibration_features,
    sent_dtype,
    wrapped,
)
from patrol_prune.errors import InputError
from patrol_prune.given import image_shape
from patrol_prune.split import Split


class Quantiser(nn.Module):
    """Affine quantisation per channel, and back to float as the cloud reads it.

        q = clamp(round(z / scale) + zero_point, 0, 2^bits - 1),   z' = (q - zero_point) * scale

    The gradient is passed straight through the rounding and is zero where `z` is clamped.

    Args:
        channels: number of channels.
        bits: per value.
        dim: which dimension of `[N, ...]` holds the channels.

    Attributes:
        scale: `[channels]`, a buffer; NaN until `calibrate`.
        zero_point: `[channels]`, int32, a buffer.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, channels: int, bits: int, dim: int) -> None:
        super().__init__()
        self.levels, self.dim = 2**bits - 1, dim
        self.register_buffer("scale", torch.full((channels,), float("nan")))
        self.register_buffer("zero_point", torch.zeros(channels, dtype=torch.int32))

    def calibrate(self, z: Tensor) -> None:
        """Take each channel's range from features `[N, ...]`; zero is always inside it.

        A channel that is zero throughout takes the widest range of all. One bit says zero or not:
        of a channel with both signs it keeps the side that reaches further.
        """
        values = z.movedim(self.dim, 0).flatten(1)
        low, high = values.amin(1).clamp(max=0.0), values.amax(1).clamp(min=0.0)
        if self.levels == 1:
            low, high = low.where(-low > high, 0.0), high.where(high >= -low, 0.0)
        span = high - low
        widest = span.max().clamp(min=torch.finfo(span.dtype).tiny ** 0.5)
        self.scale.copy_(torch.where(span > 0, span, widest) / self.levels)
        zero = (-low / self.scale.to(low.device)).round().clamp(0, self.levels)
        self.zero_point.copy_(zero)

    def forward(self, z: Tensor) -> Tensor:
        """Features `[N, ...]` to those that the cloud reads, of their type (`sent_dtype`)."""
        if torch.compiler.is_exporting():  # ONNX has the operator for 7 and 8 bits alone
            return self._in_steps(z.float()).to(sent_dtype(z))
        return torch.fake_quantize_per_channel_affine(
            z.float(), self.scale.float(), self.zero_point, self.dim, 0, self.levels
        ).to(sent_dtype(z))

    def _in_steps(self, z: Tensor) -> Tensor:
        """The same numbers, bit for bit, by operators that every format has."""
        shape = [-1 if i == self.dim else 1 for i in range(z.dim())]
        scale, zero = self.scale.float().view(shape), self.zero_point.float().view(shape)
        kept = ((z * (1.0 / scale)).round() + zero).clamp(0, self.levels)
        return (kept - zero) * scale


@dataclass(frozen=True)
class Quantisation(Defence):
    """The feature is uploaded as integers of a few bits, one range per channel.

    The ranges are those of the calibration inputs, fixed at `apply`; the cloud knows them.
    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, CVPR 2018.

    Attributes:
        bits: per value, 1 to 16; fewer are stronger.
    """

    name: ClassVar[str] = "quantisation"
    swept: ClassVar[str] = "bits"

    bits: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 16:
            raise InputError(
                f"Quantisation: expected a whole number of bits from 1 to 16, came {self.bits}."
            )

    def apply(self, split: Split, *, calibration: Tensor | None = None) -> Split:
        """See `Defence.apply`."""
        dim = channel_dim(tuple(split.feature_shape), image_shape(split.example_inputs))
        quantiser = Quantiser(split.feature_shape[dim - 1], self.bits, dim)
        if calibration is not None:
            quantiser.calibrate(calibration_features(split, calibration))
        return wrapped(split, quantiser, by=self)

    def upload_bytes(self, feature_shape: Sequence[int]) -> int:
        """`bits` per value, packed, in whole bytes."""
        return math.ceil(math.prod(feature_shape) * self.bits / 8)
