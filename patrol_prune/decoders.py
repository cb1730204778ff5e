"""Decoders from a transmitted feature to an image, for every feature and image shape.

Surrogates (the attackers inside training) and attacks (the attackers that judge) both draw on
this file, and never on each other. A decoder eats *standardised* features (`FeatureStandardizer`),
because a defence that only rescales a channel must not look private.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.errors import InputError, nearest

FAMILIES: tuple[str, ...] = ("residual", "transposed")
"""The names `make_decoder` takes."""

_SMALLEST_WIDTH = 16
_LINEAR_WEIGHTS = 32_000_000


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

    Both halve the width at every doubling (never under 16), resize bilinearly where the image is
    no power of two times the feature, and end in a 3x3 convolution and a sigmoid.

    The trunk stands at the feature's own resolution, at most half the image's (rounded up): a
    larger feature map is pixel-unshuffled there first, which loses nothing. The trunk costs
    `18 * depth * width^2` multiply-adds per trunk pixel: 38 M per image at width 64, depth 8 and
    8x8, but 7.4 G at 112x112, so give fewer or narrower blocks to shallow features of large images.

    Args:
        family: one of `FAMILIES`.
        feature_shape: a map `(C, H, W)` (or `(H, W, C)`, recognised by the image's aspect ratio),
            tokens `(T, D)` or a vector `(D,)`, without the batch. Tokens on a grid, with or
            without one leading class token, become a map; all else goes through a linear layer.
        image_shape: `(channels, height, width)`.
        width: channels of the trunk.
        depth: residual blocks in the trunk.
        seed: of the initial weights; the global generators are left untouched.

    Raises:
        InputError: an unknown family, or a size that is not positive.
    """
    if family not in FAMILIES:
        raise InputError(
            f"Expected a decoder family out of {FAMILIES}, came {family!r}. "
            f"{nearest(family, FAMILIES)}"
        )
    _check_shape("feature_shape", feature_shape, lengths=(1, 2, 3))
    _check_shape("image_shape", image_shape, lengths=(3,))
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
        self.to_map = _ToMap(feature_shape, image_shape, width)
        self.fold = _Fold(self.to_map.map_shape, image_shape)
        channels, height, map_width = self.fold.folded_shape
        self.trunk_size = (height, map_width)
        ratio = max(image_shape[1] / height, image_shape[2] / map_width)
        self.doublings = max(0, round(math.log2(ratio)))
        stem = nn.Conv2d(channels, width, 3, padding=1)
        if family == "residual":
            self.trunk = nn.Sequential(stem, *(ResidualBlock(width) for _ in range(depth)))
        else:
            self.trunk = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU())
        steps: list[nn.Module] = []
        for _ in range(self.doublings):
            narrower = min(width, max(_SMALLEST_WIDTH, width // 2))
            steps.append(_doubling(family, width, narrower))
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


class ResidualBlock(nn.Module):
    """`x + BN(conv3(ReLU(BN(conv3(x)))))`; the last BN's gain starts at 0, so it starts as `x`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.BatchNorm2d(width)
        nn.init.zeros_(last.weight)
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, width, h, w]` to maps of the same shape."""
        branch: Tensor = self.branch(x)
        return x + branch


def channel_dim(feature_shape: tuple[int, ...], image_shape: tuple[int, ...]) -> int:
    """Which dimension of a batched feature `[N, *feature_shape]` holds its channels.

    1 for maps `(C, H, W)`; the last for tokens `(T, D)`, vectors `(D,)` and for maps `(H, W, C)`,
    which are those whose first two sizes have the image's aspect ratio where the last two do not.
    """
    if len(feature_shape) < 3:
        return len(feature_shape)
    aspect = image_shape[1] / image_shape[2]
    first = abs(math.log(feature_shape[0] / feature_shape[1] / aspect))
    last = abs(math.log(feature_shape[1] / feature_shape[2] / aspect))
    return 3 if first < 1e-6 and last > math.log(1.5) else 1


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

    def __init__(
        self, feature_shape: tuple[int, ...], *, dim: int | None = None, eps: float = 1e-8
    ) -> None:
        super().__init__()
        _check_shape("feature_shape", feature_shape, lengths=(1, 2, 3))
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

    @torch.no_grad()
    def fit(self, z: Tensor) -> FeatureStandardizer:
        """Take the exact statistics of `z [N, *feature_shape]`; returns itself."""
        self._set(*self._statistics(z))
        return self

    @torch.no_grad()
    def update(self, z: Tensor, momentum: float = 0.1) -> FeatureStandardizer:
        """Move the statistics towards those of the batch `z`; the first batch sets them."""
        mean, var = self._statistics(z)
        if bool(self.fitted):
            mean = torch.lerp(self.mean, mean, momentum)
            var = torch.lerp(self.var, var, momentum)
        self._set(mean, var)
        return self

    def forward(self, z: Tensor) -> Tensor:
        """`z [N, *feature_shape]` standardised; gradients flow to `z`, not to the statistics."""
        gain = torch.rsqrt(self.var + self.eps * self.var.mean())
        noise = (torch.finfo(torch.float32).eps * self.mean) ** 2
        gain = torch.where(self.var > noise, gain, torch.zeros_like(gain))
        shape = [1] * z.dim()
        shape[self.dim] = -1
        return (z - self.mean.view(shape)) * gain.view(shape)

    def _set(self, mean: Tensor, var: Tensor) -> None:
        self.mean.copy_(mean)
        self.var.copy_(var)
        self.fitted.fill_(True)

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if tuple(z.shape[1:]) != self.feature_shape or len(z) == 0:
            raise InputError(
                f"Expected features [N, {', '.join(map(str, self.feature_shape))}] with N >= 1, "
                f"came {tuple(z.shape)}. Build the standardiser for the shape that the edge sends."
            )
        others = [d for d in range(z.dim()) if d != self.dim]
        count = z.numel() // z.shape[self.dim]
        chunks = torch.split(z.detach(), 512)
        mean = torch.stack([c.double().sum(others) for c in chunks]).sum(0) / count
        shape = [1] * z.dim()
        shape[self.dim] = -1
        centre = mean.view(shape)
        squares = [((c.double() - centre) ** 2).sum(others) for c in chunks]
        var = torch.stack(squares).sum(0) / count
        return mean.to(self.mean.dtype), var.to(self.var.dtype)


def _check_shape(name: str, shape: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    if len(shape) not in lengths or any(int(s) != s or s < 1 for s in shape):
        raise InputError(
            f"Expected {name} of {' or '.join(map(str, lengths))} positive sizes without the "
            f"batch, came {tuple(shape)}."
        )


def _doubling(family: str, width: int, narrower: int) -> nn.Module:
    if family == "residual":
        return nn.Sequential(
            nn.Conv2d(width, 4 * narrower, 3, padding=1), nn.PixelShuffle(2), nn.ReLU()
        )
    return nn.Sequential(
        nn.ConvTranspose2d(width, narrower, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(narrower),
        nn.ReLU(),
    )


def _token_grid(tokens: int, image_shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The `(h, w)` with `h * w == tokens` of the image's aspect ratio or square, or None."""
    for aspect in (image_shape[1] / image_shape[2], 1.0):
        height = round(math.sqrt(tokens * aspect))
        if height >= 2 and tokens % height == 0:
            width = tokens // height
            if width >= 2 and abs(math.log(height / width / aspect)) < 1e-6:
                return height, width
    return None


class _ToMap(nn.Module):
    """A feature of any shape to a map `[N, *map_shape]`."""

    def __init__(
        self, feature_shape: tuple[int, ...], image_shape: tuple[int, ...], width: int
    ) -> None:
        super().__init__()
        self.kind = "map"
        self.linear: nn.Linear | None = None
        if len(feature_shape) == 3:
            self.map_shape = tuple(feature_shape)
            if channel_dim(feature_shape, image_shape) == 3:
                self.kind, self.map_shape = "last", (feature_shape[2], *feature_shape[:2])
            return
        if len(feature_shape) == 2:
            tokens, channels = feature_shape
            grid = _token_grid(tokens, image_shape)
            if grid is not None:
                self.kind, self.map_shape = "tokens", (channels, *grid)
                return
            grid = _token_grid(tokens - 1, image_shape)
            if grid is not None:
                self.kind, self.map_shape = "class+tokens", (2 * channels, *grid)
                return
        self.kind = "linear"
        size = math.prod(feature_shape)
        self.map_shape = _linear_map(size, image_shape, width)
        self.linear = nn.Linear(size, math.prod(self.map_shape))

    def forward(self, z: Tensor) -> Tensor:
        if self.kind == "map":
            return z
        if self.kind == "last":
            return z.permute(0, 3, 1, 2)
        if self.linear is not None:
            flat: Tensor = self.linear(z.flatten(1))
            return flat.view(-1, *self.map_shape)
        height, width = self.map_shape[1:]
        if self.kind == "tokens":
            return z.transpose(1, 2).reshape(len(z), -1, height, width)
        patches = z[:, 1:].transpose(1, 2).reshape(len(z), -1, height, width)
        return torch.cat([patches, z[:, 0, :, None, None].expand_as(patches)], dim=1)


def _linear_map(
    size: int, image_shape: tuple[int, ...], width: int
) -> tuple[int, int, int]:
    """A map of 4 to 8 pixels a side (never over half the image), its linear layer kept bounded."""

    def side(pixels: int) -> int:
        while pixels > 8:
            pixels = math.ceil(pixels / 2)
        return max(1, pixels)

    height, map_width = (side(math.ceil(s / 2)) for s in image_shape[1:])
    if size * width * height * map_width > _LINEAR_WEIGHTS:
        height, map_width = math.ceil(height / 2), math.ceil(map_width / 2)
    while width > 1 and size * width * height * map_width > _LINEAR_WEIGHTS:
        width //= 2
    return width, height, map_width


class _Fold(nn.Module):
    """Pixel-unshuffle of a map larger than half the image; `crop` undoes its padding later."""

    def __init__(self, map_shape: tuple[int, ...], image_shape: tuple[int, ...]) -> None:
        super().__init__()
        channels, *size = map_shape
        halves = [math.ceil(s / 2) for s in image_shape[1:]]
        self.size = tuple(size)
        self.factor = max(math.ceil(s / half) for s, half in zip(size, halves, strict=True))
        self.padding = tuple(-s % self.factor for s in size)
        height, width = (s + p for s, p in zip(size, self.padding, strict=True))
        self.padded = (height, width)
        f = self.factor
        self.folded_shape = (channels * f * f, height // f, width // f)

    def forward(self, z: Tensor) -> Tensor:
        if self.factor == 1:
            return z
        if any(self.padding):
            mode = "replicate"
            z = functional.pad(z, (0, self.padding[1], 0, self.padding[0]), mode=mode)
        return functional.pixel_unshuffle(z, self.factor)

    def crop(self, h: Tensor) -> Tensor:
        """Cut off the part of an upsampled map that stands for the padding."""
        if not any(self.padding):
            return h
        height, width = (
            max(1, round(have * size / padded))
            for have, size, padded in zip(h.shape[2:], self.size, self.padded, strict=True)
        )
        return h[:, :, :height, :width]
