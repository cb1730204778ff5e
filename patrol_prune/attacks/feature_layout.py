"""How a feature lies over the image: which features stand for which pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from patrol_prune.decoders import channel_dim, token_grid

_LARGEST_PATCH = 2304


@dataclass
class Layout:
    """How a feature and an image are laid over each other.

    Attributes:
        image_shape: `(channels, height, width)`.
        grid: positions, `(rows, columns)`; `(1, 1)` where the feature is taken whole.
        block: the pixels behind a position, `(height, width)`.
        kernel: side of the neighbourhood of features at a position.
        is_map: whether positions are told apart.
        dim: which dimension of `[N, *feature_shape]` holds the channels.
        tokens: the grid that tokens lie on, `(rows, columns)`; None for other features.
        leading: class and register tokens before these.
        width: inputs of one position.
        margin: pixels around the blocks of all positions, `(height, width)`; a position predicts
            its block and as many pixels around it, of which those at the border count.
    """

    image_shape: tuple[int, int, int]
    grid: tuple[int, int]
    block: tuple[int, int]
    kernel: int
    is_map: bool
    dim: int
    tokens: tuple[int, int] | None
    leading: int
    width: int
    margin: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, feature: tuple[int, ...], image: tuple[int, ...], kernel: int, *,
           stretch: bool = True) -> Layout:
        """The layout of a feature and an image, both without the batch.

        Channels-last maps are read as maps. Tokens on a grid of the image's aspect ratio, or a
        square one, become a map; class and register tokens before them stand beside every position.

        Args:
            feature: `(C, H, W)`, `(H, W, C)`, `(T, D)` or anything else, which is taken whole.
            image: `(channels, height, width)`.
            kernel: 1 is taken instead where it would give more than 2,304 inputs.
            stretch: whether a map that falls short of the image, as behind convolutions without
                padding, is interpolated to cover it, or keeps its positions and has a margin.
        """
        channels, height, width = image
        dim = channel_dim(feature, image) if len(feature) in (2, 3) else 1
        leading, tokens, wide, size = 0, None, feature[dim - 1], feature[-2:]
        if len(feature) == 3 and dim == 3:
            size = feature[:2]
        elif len(feature) == 2:
            leading, tokens = token_grid(feature[0], image)
            size = tokens or ()
        if len(size) != 2 or len(feature) not in (2, 3):
            return cls.whole(feature, image)
        block = (max(1, round(height / size[0])), max(1, round(width / size[1])))
        grid = (math.ceil(height / block[0]), math.ceil(width / block[1]))
        if not stretch:
            grid = (min(grid[0], size[0]), min(grid[1], size[1]))
        margin = (max(0, height - grid[0] * block[0]), max(0, width - grid[1] * block[1]))
        inputs = wide * math.ceil(size[0] / grid[0]) * math.ceil(size[1] / grid[1])
        kernel = kernel if inputs * kernel**2 <= _LARGEST_PATCH else 1
        width = inputs * kernel**2 + leading * wide
        return cls((channels, height, image[2]), grid, block, kernel, True, dim, tokens, leading,
                   width, margin)

    @classmethod
    def whole(cls, feature: tuple[int, ...], image: tuple[int, ...]) -> Layout:
        """The layout in which every pixel is predicted from the whole feature, whatever lies where.
        """
        channels, height, width = image
        return cls((channels, height, width), (1, 1), (1, 1), 1, False, 1, None, 0,
                   math.prod(feature))

    @property
    def positions(self) -> int:
        """Positions of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def patch(self) -> tuple[int, int]:
        """The pixels that one position predicts, `(height, width)`."""
        if not self.is_map:
            return self.image_shape[1:]
        return self.block[0] + self.margin[0], self.block[1] + self.margin[1]

    @property
    def outputs(self) -> int:
        """Pixel values that one position predicts."""
        return self.image_shape[0] * math.prod(self.patch)

    @property
    def overhang(self) -> tuple[int, int]:
        """How far the last positions reach out of the image, `(below, to the right)`."""
        if not self.is_map:
            return 0, 0
        below, right = (g * b + m for g, b, m in zip(self.grid, self.block, self.margin,
                                                     strict=True))
        return below - self.image_shape[1], right - self.image_shape[2]

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """Which positions know which outputs: `[positions]` and `[outputs]`, booleans, for each
        set of outputs that is inside of the image at the same positions.
        """
        lines = []
        for cells, size, out in zip(self.grid, self.patch, self.overhang, strict=True):
            last = torch.arange(cells) == cells - 1
            beyond = torch.arange(size) >= size - out
            lines.append([(torch.ones_like(last), ~beyond), (~last, beyond)][: 1 + (out > 0)])
        return [((rows[:, None] & columns).flatten(),
                 (high[:, None] & wide).expand(self.image_shape[0], -1, -1).flatten())
                for rows, high in lines[0] for columns, wide in lines[1]]

    def inputs(self, z: Tensor) -> Tensor:
        """Features `[N, ...]` to one row per position, `[N * positions, inputs]`, float64."""
        if not self.is_map:
            return z.flatten(1).double()
        z = z.movedim(self.dim, 1)
        beside = z[:, :, : self.leading] if self.leading else None
        if self.tokens is not None:
            z = z[:, :, self.leading :].reshape(len(z), -1, *self.tokens)
        height, width = z.shape[2:]
        rows, columns = self.grid
        if height > rows or width > columns:
            z = functional.interpolate(z, size=(rows * math.ceil(height / rows),
                                                columns * math.ceil(width / columns)))
            z = _unshuffle(z, z.shape[2] // rows, z.shape[3] // columns)
        elif (height, width) != self.grid:
            z = functional.interpolate(z, size=self.grid, mode="bilinear", align_corners=False)
        patches = functional.unfold(z, self.kernel, padding=self.kernel // 2)
        if beside is not None:
            beside = beside.transpose(1, 2).flatten(1)[:, :, None]
            patches = torch.cat([patches, beside.expand(-1, -1, self.positions)], dim=1)
        return patches.transpose(1, 2).reshape(-1, patches.shape[1]).double()

    def targets(self, pixels: Tensor) -> Tensor:
        """Images `[N, C, H, W]` to `[N * positions, C * patch]`, float64.

        What hangs out of the image repeats its border (`parts` tells it from the image).
        """
        if not self.is_map:
            return pixels.flatten(1).double()
        below, right = self.overhang
        padded = functional.pad(pixels, (0, right, 0, below), mode="replicate")
        if any(self.margin):
            patches = functional.unfold(padded, self.patch, stride=self.block)
            return patches.transpose(1, 2).reshape(-1, self.outputs).double()
        blocks = _unshuffle(padded, *self.block)
        return blocks.flatten(2).transpose(1, 2).reshape(-1, blocks.shape[1]).double()

    def images(self, rows: Tensor, count: int) -> Tensor:
        """The inverse of `targets`, without what hangs out; each pixel from the block it is in, or
        that is nearest.
        """
        channels, height, width = self.image_shape
        if not self.is_map:
            return rows.reshape(count, channels, height, width)
        if any(self.margin):
            patches = rows.reshape(count, *self.grid, channels, *self.patch)
            row, y = self._nearest(0)
            column, x = self._nearest(1)
            image = patches[:, row[:, None], column, :, y[:, None], x]
            return image.permute(2, 3, 0, 1).contiguous()
        high, wide = self.block
        blocks = rows.reshape(count, *self.grid, channels, high, wide)
        image = blocks.permute(0, 3, 1, 4, 2, 5).reshape(
            count, channels, self.grid[0] * high, self.grid[1] * wide
        )
        return image[:, :, :height, :width]

    def _nearest(self, side: int) -> tuple[Tensor, Tensor]:
        """The position that predicts each row (or column) of the image, and where in its patch."""
        pixel = torch.arange(self.image_shape[1 + side])
        place = (pixel - self.margin[side] // 2).div(self.block[side], rounding_mode="floor")
        place = place.clamp(0, self.grid[side] - 1)
        return place, pixel - place * self.block[side]


def _unshuffle(images: Tensor, high: int, wide: int) -> Tensor:
    """`[N, C, H, W]` to `[N, C * high * wide, H / high, W / wide]`, channels first."""
    count, channels, height, width = images.shape
    blocks = images.reshape(count, channels, height // high, high, width // wide, wide)
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(
        count, channels * high * wide, height // high, width // wide
    )
