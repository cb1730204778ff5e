"""Decoders from a transmitted feature to an image, for every feature and image shape.

Surrogates (the attackers inside training) and attacks (the attackers that judge) both draw on
this file, and never on each other. A decoder eats *standardised* features (`FeatureStandardizer`),
because a defence that only rescales a channel must not look private.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.decoder_blocks import (
    Fold,
    ResidualBlock,
    ToMap,
    UTrunk,
    channel_dim,
    check_shape,
    doubling,
    either_layout,
    spreading,
    token_grid,
)
from patrol_prune.errors import InputError, nearest

__all__ = [
    "FAMILIES",
    "Decoder",
    "FeatureStandardizer",
    "channel_dim",
    "either_layout",
    "make_decoder",
    "token_grid",
]

FAMILIES: tuple[str, ...] = ("residual", "transposed", "unet")
"""The names `make_decoder` takes."""

_SMALLEST_WIDTH = 16


def make_decoder(
    family: str,
    feature_shape: tuple[int, ...],
    image_shape: tuple[int, int, int],
    *,
    width: int = 64,
    depth: int = 8,
    seed: int = 0,
) -> nn.Module:
    """A fresh decoder `z [N, *feature_shape] -> pixels [N, *image_shape]` on (0, 1).

    - `"residual"`: a 3x3 convolution, `depth` residual blocks (conv3-BN-ReLU-conv3-BN) at the
      trunk's resolution, then doublings by conv3 + PixelShuffle.
    - `"transposed"`: a 3x3 convolution, then doublings by 4x4 transposed convolutions of stride 2
      with BN and ReLU (He, Zhang, Lee, ACSAC 2019). `depth` does not apply to it.
    - `"unet"`: a 3x3 convolution, an encoder and a decoder around the map with skip connections
      that add, then the doublings of `"residual"` with a residual block behind each. `depth`
      counts these blocks too; the trunk gets what they leave.

    All halve the width at every doubling (never under 16), resize bilinearly where the image is
    no power of two times the feature, and end in a 3x3 convolution and a sigmoid.

    The trunk stands at the feature's own resolution, at most half the image's (rounded up): a
    larger feature map is pixel-unshuffled there first, which loses nothing. A small map of more
    values than the trunk has is spread by the first convolution, over up to 8 a side, or 16 for
    images of 64 pixels and more, so that the trunk holds more of it;
    one of at most 2x2 is read as a vector. Larger maps of many channels need a larger `width`.
    Residual blocks cost `18 * depth * width^2` multiply-adds per trunk pixel, in the U too: 38 M
    per image at width 64, depth 8 and 8x8 (50 M and 53 M with all the rest), but 7.4 G at 112x112,
    so give fewer or narrower blocks to shallow features of large images.

    Args:
        family: "residual", "transposed" or "unet".
        feature_shape: a map `(C, H, W)` (or `(H, W, C)`, recognised by the image's aspect ratio),
            tokens `(T, D)` or a vector `(D,)`, without the batch. Tokens on a grid, with or
            without class or register tokens before it, become a map; all else goes through a
            linear layer.
        image_shape: `(channels, height, width)`.
        width: channels of the trunk.
        depth: residual blocks in the trunk (see `"unet"` for its own).
        seed: of the initial weights; the global generators are left untouched.

    Returns:
        an untrained module on the CPU. It expects standardised features (mean 0 and variance 1 of
        each channel), and refuses those of another shape with an `InputError`.

    Raises:
        InputError: an unknown family, or a size that is not positive.
    """
    if family not in FAMILIES:
        raise InputError(
            f"Expected a decoder family out of {FAMILIES}, came {family!r}. "
            f"{nearest(family, FAMILIES)}"
        )
    check_shape("feature_shape", feature_shape, lengths=(1, 2, 3))
    check_shape("image_shape", image_shape, lengths=(3,))
    if width < 1 or depth < 0:
        raise InputError(f"Expected width >= 1 and depth >= 0, came width={width}, depth={depth}.")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that one would also reseed every accelerator.
        torch.default_generator.manual_seed(seed)
        return Decoder(family, tuple(feature_shape), tuple(image_shape), width, depth)


class Decoder(nn.Module):
    """What `make_decoder` returns: feature -> map -> trunk -> doublings -> image.

    Attributes:
        trunk_size: the `(height, width)` at which the trunk works.
        doublings: how often the resolution is doubled behind the trunk.
    """

    def __init__(
        self,
        family: str,
        feature_shape: tuple[int, ...],
        image_shape: tuple[int, ...],
        width: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.feature_shape = feature_shape
        self.image_shape = image_shape
        self.to_map = ToMap(feature_shape, image_shape, width)
        self.fold = Fold(self.to_map.map_shape, image_shape)
        channels, height, map_width = self.fold.folded_shape
        factor = spreading(self.fold.folded_shape, image_shape, width)
        height, map_width = factor * height, factor * map_width
        self.trunk_size = (height, map_width)
        ratio = max(image_shape[1] / height, image_shape[2] / map_width)
        self.doublings = max(0, round(math.log2(ratio)))
        stem: nn.Module = nn.Conv2d(channels, width * factor**2, 3, padding=1)
        if factor > 1:
            stem = nn.Sequential(stem, nn.PixelShuffle(factor))
        if family == "residual":
            self.trunk = nn.Sequential(stem, *(ResidualBlock(width) for _ in range(depth)))
        elif family == "unet":
            left = max(0, depth - self.doublings)
            self.trunk = nn.Sequential(stem, UTrunk(width, left, self.trunk_size))
        else:
            self.trunk = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU())
        steps: list[nn.Module] = []
        for _ in range(self.doublings):
            narrower = min(width, max(_SMALLEST_WIDTH, width // 2))
            steps.append(doubling(family, width, narrower))
            width = narrower
        self.upsample = nn.Sequential(*steps)
        self.head = nn.Conv2d(width, image_shape[0], 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Standardised features `[N, *feature_shape]` to pixels `[N, *image_shape]` on (0, 1)."""
        if tuple(z.shape[1:]) != self.feature_shape:
            raise InputError(
                f"This decoder eats features [N, {', '.join(map(str, self.feature_shape))}], came "
                f"{tuple(z.shape)}. Make a decoder for the shape that the edge transmits."
            )
        h: Tensor = self.upsample(self.trunk(self.fold(self.to_map(z))))
        h = self.fold.crop(h)
        size = self.image_shape[1:]
        if tuple(h.shape[2:]) != tuple(size):
            h = functional.interpolate(h, size=list(size), mode="bilinear", align_corners=False)
        return torch.sigmoid(self.head(h))


class FeatureStandardizer(nn.Module):
    """Per-channel standardisation of features, `(z - mean) / std`, with the statistics as buffers.

    `fit` takes the exact statistics of the data at hand (attacks); `update` keeps running ones
    (surrogates, whose edge moves under them). Scaling the whole feature changes nothing. A channel
    that is constant maps to 0; one whose spread is far under the others' is divided by
    `sqrt(var + eps * mean(var))`, which bounds its gain.

    Args:
        feature_shape: the feature's shape without the batch.
        dim: which dimension of `[N, *feature_shape]` holds the channels; by default 1 for maps and
            the last for tokens and vectors. `channel_dim` recognises channels-last maps.
        eps: the floor of a channel's variance, relative to the mean variance of all channels.
    """

    mean: Tensor
    var: Tensor
    fitted: Tensor
    largest: Tensor

    def __init__(
        self, feature_shape: tuple[int, ...], *, dim: int | None = None, eps: float = 1e-8
    ) -> None:
        super().__init__()
        check_shape("feature_shape", feature_shape, lengths=(1, 2, 3))
        self.feature_shape = tuple(feature_shape)
        default = 1 if len(feature_shape) == 3 else len(feature_shape)
        self.dim = default if dim is None else dim
        if not 1 <= self.dim <= len(feature_shape):
            raise InputError(f"Expected dim in 1..{len(feature_shape)}, came {self.dim}.")
        self.eps = eps
        channels = feature_shape[self.dim - 1]
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("largest", torch.tensor(0))

    @torch.no_grad()
    def fit(self, z: Tensor | Iterable[Tensor]) -> FeatureStandardizer:
        """Take the exact statistics of `z [N, *feature_shape]`, or of such parts; returns itself.

        Parts are read once, one at a time, so that they need not all be in memory.
        """
        self._set(*self._statistics([z] if isinstance(z, Tensor) else z))
        return self

    @torch.no_grad()
    def update(self, z: Tensor, momentum: float = 0.1) -> FeatureStandardizer:
        """Move the statistics towards those of the batch `z`; the first batch sets them.

        A batch of fewer images than the largest so far counts less, in proportion.
        """
        mean, var = self._statistics([z])
        self.largest.clamp_(min=len(z))
        if bool(self.fitted):
            weight = momentum * (len(z) / int(self.largest))
            mean = torch.lerp(self.mean, mean, weight)
            var = torch.lerp(self.var, var, weight)
        self._set(mean, var)
        return self

    def forward(self, z: Tensor) -> Tensor:
        """`z [N, *feature_shape]` standardised; gradients flow to `z`, not to the statistics."""
        shape = [1] * z.dim()
        shape[self.dim] = -1
        return (z - self.mean.view(shape)) * self.gain().view(shape)

    def gain(self) -> Tensor:
        """What each channel is multiplied by, `[C]`; 0 for one that is constant."""
        gain = torch.rsqrt(self.var + self.eps * self.var.mean())
        noise = (torch.finfo(torch.float32).eps * self.mean) ** 2
        return torch.where(self.var > noise, gain, torch.zeros_like(gain))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # States of before do not tell; the next batch will.
        state_dict.setdefault(prefix + "largest", torch.tensor(0))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _set(self, mean: Tensor, var: Tensor) -> None:
        self.mean.copy_(mean)
        self.var.copy_(var)
        self.fitted.fill_(True)

    def _statistics(self, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and variance of every channel."""
        count, mean, squares = self._moments(parts)
        return mean.to(self.mean), (squares / count).to(self.var)

    def _within(self, values: Tensor, centre: Tensor) -> Tensor:
        """Of one part, the sum of each channel's squared distances from its mean, `[C]`."""
        shape, others = self._axes()
        return ((values - centre.view(shape)) ** 2).sum(others)

    def _square(self, step: Tensor) -> Tensor:
        """As `_within`, of one sample at `step [C]` from the mean."""
        return step**2

    def _axes(self) -> tuple[list[int], list[int]]:
        """The shape in which a vector lies along the channels, and all other dimensions."""
        shape = [1] * (len(self.feature_shape) + 1)
        shape[self.dim] = -1
        return shape, [d for d in range(len(shape)) if d != self.dim]

    def _moments(self, parts: Iterable[Tensor]) -> tuple[int, Tensor, Tensor]:
        """Samples, their mean and the sum of squares about it, in double precision, merged as Chan
        et al. (1979)."""
        _, others = self._axes()
        count, mean, squares = 0, torch.zeros((), dtype=torch.double), torch.zeros(())
        for chunk in (c for part in parts for c in torch.split(self._checked(part).detach(), 512)):
            values = chunk.double()
            more = values.numel() // values.shape[self.dim]
            centre = values.mean(others)
            count += more
            step, share = centre - mean.to(centre.device), more / count
            mean = centre if more == count else mean + share * step
            within = self._within(values, centre)
            squares = squares.to(within) + within + share * (count - more) * self._square(step)
        if count == 0:
            raise InputError("Expected at least one part of features, came none. Give some.")
        return count, mean, squares

    def _checked(self, z: Tensor) -> Tensor:
        if tuple(z.shape[1:]) != self.feature_shape or len(z) == 0:
            raise InputError(
                f"Expected features [N, {', '.join(map(str, self.feature_shape))}] with N >= 1, "
                f"came {tuple(z.shape)}. Build the standardiser for the shape that the edge sends."
            )
        return z
