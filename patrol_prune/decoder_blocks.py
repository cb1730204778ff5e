"""What decoders are built from: a feature laid out as a map, trunks and doublings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.errors import InputError

_LINEAR_WEIGHTS = 32_000_000
_VECTOR = 4
"""Maps of so few positions are read as vectors: convolutions have nothing to slide over there, and
would press all channels into the trunk's few at each position."""
_SPREAD_SIDE = 8
_LEADING, _FEWEST_PATCHES = 8, 16
_LEVELS = 2


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


class UTrunk(nn.Module):
    """An encoder and a decoder around the map with skip connections that add (an hourglass).

    Each level halves the map and doubles its width, as long as a side of 4 is left and at most
    twice; a residual block costs the same on every level. What lies far apart in the map meets at
    the bottom, which a few 3x3 convolutions at one resolution do not reach. After Ronneberger et
    al. (2015) and Newell et al. (2016); the skip is added, not concatenated, which learnt faster.

    Args:
        width: channels at the map's own resolution.
        depth: residual blocks in all, spread evenly; what is left over goes to the bottom first.
        size: `(height, width)` of the map.
    """

    def __init__(self, width: int, depth: int, size: tuple[int, int]) -> None:
        super().__init__()
        levels, side = 0, min(size)
        while levels < _LEVELS and side >= 4:
            levels, side = levels + 1, math.ceil(side / 2)
        stages = 2 * levels + 1
        # The order in which stages get a block: bottom, then outwards on the decoder's side first.
        order = sorted(range(stages), key=lambda s: (abs(s - levels), s < levels))
        counts = [0] * stages
        for block in range(depth):
            counts[order[block % stages]] += 1
        widths = [width << min(s, stages - 1 - s) for s in range(stages)]
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(w) for _ in range(count)))
            for w, count in zip(widths, counts, strict=True)
        )
        self.down = nn.ModuleList(
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1) for w in widths[:levels]
        )
        self.up = nn.ModuleList(nn.Conv2d(2 * w, w, 1) for w in widths[levels + 1 :])

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, width, h, w]` to maps of the same shape."""
        skips: list[Tensor] = []
        levels = len(self.down)
        for stage, down in zip(self.stages, self.down, strict=False):
            x = stage(x)
            skips.append(x)
            x = down(x)
        x = self.stages[levels](x)
        for stage, up in zip(self.stages[levels + 1 :], self.up, strict=True):
            skip = skips.pop()
            x = stage(skip + functional.interpolate(up(x), size=skip.shape[2:], mode="nearest"))
        return x


def channel_dim(feature_shape: tuple[int, ...], image_shape: tuple[int, ...]) -> int:
    """Which dimension of a batched feature `[N, *feature_shape]` holds its channels.

    1 for maps `(C, H, W)`; the last for tokens `(T, D)`, vectors `(D,)` and for maps `(H, W, C)`,
    which are those whose first two sizes have the image's aspect ratio where the last two do not.
    """
    if len(feature_shape) < 3:
        return len(feature_shape)
    first, last = _off_aspect(feature_shape, image_shape)
    return 3 if first < 1e-6 and last > math.log(1.5) else 1


def either_layout(feature_shape: tuple[int, ...], image_shape: tuple[int, ...]) -> bool:
    """Whether a map that `channel_dim` reads as `(C, H, W)` could as well be `(H, W, C)`."""
    return (len(feature_shape) == 3 and channel_dim(feature_shape, image_shape) == 1
            and _off_aspect(feature_shape, image_shape)[0] < 1e-6)


def _off_aspect(feature_shape: tuple[int, ...], image_shape: tuple[int, ...]
                ) -> tuple[float, float]:
    """How far the first two sizes and the last two are from the image's aspect ratio."""
    aspect = image_shape[1] / image_shape[2]
    first, second, third = feature_shape
    return abs(math.log(first / second / aspect)), abs(math.log(second / third / aspect))


def check_shape(name: str, shape: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    if len(shape) not in lengths or any(int(s) != s or s < 1 for s in shape):
        raise InputError(
            f"Expected {name} of {' or '.join(map(str, lengths))} positive sizes without the "
            f"batch, came {tuple(shape)}."
        )


def doubling(family: str, width: int, narrower: int) -> nn.Module:
    """Maps `[N, width, h, w]` to `[N, narrower, 2h, 2w]`, in the manner of `family`."""
    if family in ("residual", "unet"):
        steps = [nn.Conv2d(width, 4 * narrower, 3, padding=1), nn.PixelShuffle(2), nn.ReLU()]
        return nn.Sequential(*steps, *([ResidualBlock(narrower)] if family == "unet" else []))
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


def token_grid(tokens: int, image_shape: tuple[int, ...]) -> tuple[int, tuple[int, int] | None]:
    """`(leading, grid)`: the grid that so many tokens lie on, or None, and how many precede it.

    Up to one class token, or else up to 8 with registers, before a grid of at least 16 whose tokens
    stand for square patches that fill the image: one out of many numbers would do otherwise.
    """
    for leading in range(_LEADING + 1):
        grid = _token_grid(tokens - leading, image_shape) if tokens > leading else None
        if grid is not None and (leading <= 1 or _fills(grid, image_shape)):
            return leading, grid
    return 0, None


def _fills(grid: tuple[int, int], image_shape: tuple[int, ...]) -> bool:
    """Whether square patches of whole pixels on the grid fill the image, at least 16 of them."""
    patch, left = divmod(image_shape[1], grid[0])
    return not left and patch * grid[1] == image_shape[2] and math.prod(grid) >= _FEWEST_PATCHES


class ToMap(nn.Module):
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
            if math.prod(self.map_shape[1:]) > _VECTOR:
                return
        if len(feature_shape) == 2:
            tokens, channels = feature_shape
            leading, grid = token_grid(tokens, image_shape)
            self.leading = leading
            if grid is not None:
                self.kind = "tokens"
                self.map_shape = ((1 + leading) * channels, *grid)
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
        patches = z[:, self.leading :].transpose(1, 2).reshape(len(z), -1, height, width)
        beside = z[:, : self.leading].flatten(1)[:, :, None, None]
        return torch.cat([patches, beside.expand(-1, -1, height, width)], dim=1)


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


def spreading(map_shape: tuple[int, ...], image_shape: tuple[int, ...], width: int) -> int:
    """By how much a small map is enlarged, so that a trunk of `width` channels holds more of it.

    The smallest power of two `f` with which the trunk's `width * f^2 * h * w` values are as many as
    the map's, as long as no side gets longer than half the image's or than 8, and for images of 64
    pixels and more than 16, where a trunk costs about as much as the doublings behind it. By 192
    mixed channels of 8x8 out of 64x64 photographs a trunk of 16x16 had SSIM 0.88 where one of 8x8
    had 0.78, for 1.15 times the time of the whole attack.
    """
    size = map_shape[1:]
    values = math.prod(map_shape)
    longest = [min(math.ceil(s / 2), max(_SPREAD_SIDE, min(s // 4, 2 * _SPREAD_SIDE)))
               for s in image_shape[1:]]
    factor = 1
    while width * factor**2 * math.prod(size) < values and all(
        2 * factor * s <= most for s, most in zip(size, longest, strict=True)
    ):
        factor *= 2
    return factor


class Fold(nn.Module):
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
