"""Shadow edges: what stands in for an edge that the attacker cannot query.

A shadow is any network from the model's input to the shape of `z`. It is pulled towards the real
edge by what the attacker has: the frozen cloud must classify its features (He, Zhang and Lee,
ACSAC 2019), and its features must be distributed like the uploads that were overheard.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.decoders import channel_dim
from patrol_prune.errors import InputError
from patrol_prune.symmetric import positive_eigh

SHIFTS: tuple[tuple[int, int], ...] = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Between which positions, `(rows, columns)` apart, channels are correlated."""

_MOST_CHANNELS = 512
_STD_FLOOR = 0.05
_CHUNK = 128
_TILE = 16
_RIDGE = 0.3


class FeatureMoments:
    """How far features are, as a distribution, from uploads that were overheard.

    With `v` the features standardised by the channels' mean and standard deviation over the
    observed uploads, and `u = (R + 0.3 I)^(-1/2) v` with their correlation matrix `R`, four kinds
    of moments are compared: the mean map `E[u]` at each position, `E[|v| v]` of each channel (which
    tells a feature from its negative), and the raw second moments `E[u_i(p) u_j(p + d)]` over
    positions `p`, for the `SHIFTS` `d`. These fix what plain channel moments leave open: a
    convolution followed by a rotation of its channels has the same covariance, though seldom the
    same covariance between neighbours. Without `R` the images' brightness, which all channels
    share, would outweigh everything else.

    Second moments of large maps are those within tiles of at most 16x16 positions, and each loss
    draws one tile. More than 512 channels are first projected onto 512 random directions.

    Args:
        observed: uploads `[M, *feature_shape]`, M >= 2.
        image_shape: `(channels, height, width)`, which tells maps with channels last.
        seed: of the projection and of the tiles.
    """

    def __init__(self, observed: Tensor, image_shape: tuple[int, ...], *, seed: int = 0) -> None:
        if observed.dim() < 2 or len(observed) < 2:
            raise InputError(
                f"Expected at least 2 observed uploads [M, ...], came {tuple(observed.shape)}. "
                "Give more of them, or Knowledge(observed=None)."
            )
        self.feature_shape = tuple(observed.shape[1:])
        self.dim = channel_dim(self.feature_shape, tuple(image_shape))
        self.generator = torch.Generator().manual_seed(seed)
        channels = self.feature_shape[self.dim - 1]
        self.projection: Tensor | None = None
        if channels > _MOST_CHANNELS:
            random = torch.randn(channels, _MOST_CHANNELS, generator=self.generator)
            self.projection = (random / math.sqrt(channels)).to(observed.device)
        with torch.no_grad():
            self._observe(observed)

    def loss(self, z: Tensor) -> Tensor:
        """Squared distance of the moments of `z [N, *feature_shape]` from the observed ones.

        `sum_k mean((m_k(z_a) - t_k) (m_k(z_b) - t_k))`, where `a` and `b` are the two halves of the
        batch: an unbiased estimate of the squared distance, which the moments of a small batch
        compared with themselves would not be (it may be negative). Matrices are summed over their
        columns.
        """
        half = len(z) // 2
        if half == 0:
            raise InputError("Expected at least 2 features to compare with the observed ones.")
        tile = int(torch.randint(len(self.tiles), (1,), generator=self.generator))
        v = self._standard(z)
        a, b = self._moments(v[:half], [tile]), self._moments(v[half:], [tile])
        total = z.new_zeros((), dtype=torch.float32)
        for number, target in enumerate(self.targets):
            scale = 1.0 if number < 2 else float(target.shape[-1])
            total = total + scale * ((a[number] - target) * (b[number] - target)).mean()
        return total

    def _moments(self, v: Tensor, tiles: list[int]) -> list[Tensor]:
        """Mean map, `E[|v| v]` and one matrix per shift, of standardised maps `[N, H, W, C]`."""
        moments = [v.mean(0) @ self.whitening, (v * v.abs()).mean((0, 1, 2))]
        height, width = self.tile_size
        for down, right in SHIFTS:
            if down >= height or right >= width:
                continue
            total = v.new_zeros(())
            for tile in tiles:
                top, left = self.tiles[tile]
                part = v[:, top : top + height, left : left + width]
                here = part[:, : height - down, : width - right].flatten(0, 2)
                there = part[:, down:, right:].flatten(0, 2)
                total = total + here.T @ there / (len(here) * len(tiles))
            moments.append(self.whitening @ total @ self.whitening)
        return moments

    def _maps(self, z: Tensor) -> Tensor:
        """`z` as float32 maps `[N, H, W, C]`; tokens become a column, vectors a point."""
        z = z.float().movedim(self.dim, -1)
        z = z.reshape(len(z), *(z.shape[1:3] if z.dim() == 4 else (-1, 1)), z.shape[-1])
        return z if self.projection is None else z @ self.projection

    def _standard(self, z: Tensor) -> Tensor:
        return (self._maps(z) - self.mean) / self.std

    def _observe(self, observed: Tensor) -> None:
        """Each channel's mean and deviation (one without spread is near zero), and the targets."""
        parts = torch.split(observed, _CHUNK)
        shape = self._maps(parts[0]).shape
        count = len(observed) * shape[1] * shape[2]
        sums = [self._maps(part).sum((0, 1, 2)) for part in parts]
        self.mean = torch.stack(sums).sum(0) / count
        squares = [((self._maps(part) - self.mean) ** 2).sum((0, 1, 2)) for part in parts]
        std = (torch.stack(squares).sum(0) / count).sqrt()
        self.std = std.clamp_min(_STD_FLOOR * float(std.mean()) + 1e-12)
        products = [v.T @ v for v in (self._standard(part).flatten(0, 2) for part in parts)]
        self.whitening = _inverse_root(torch.stack(products).sum(0) / count)
        (height, tops), (width, lefts) = _tiling(shape[1]), _tiling(shape[2])
        self.tile_size = (height, width)
        self.tiles = [(top, left) for top in tops for left in lefts]
        every = list(range(len(self.tiles)))
        of_parts = [self._moments(self._standard(part), every) for part in parts]
        weights = [len(part) / len(observed) for part in parts]
        self.targets = [
            torch.stack([w * m for w, m in zip(weights, moments, strict=True)]).sum(0)
            for moments in zip(*of_parts, strict=True)
        ]


def _inverse_root(matrix: Tensor) -> Tensor:
    """`(R + 0.3 I)^(-1/2)` of a correlation matrix."""
    values, vectors = positive_eigh(matrix.double())
    root = (vectors * (values + _RIDGE).rsqrt()) @ vectors.T
    return root.to(matrix.dtype)


def _tiling(length: int) -> tuple[int, list[int]]:
    """Size and starts of the fewest equal parts of at most 16 that cover `length`."""
    parts = math.ceil(length / _TILE)
    size = math.ceil(length / parts)
    return size, [min(part * size, length - size) for part in range(parts)]


class OtherEdge(nn.Module):
    """A small convolutional network from images to features of any shape, random at first.

    3x3 convolutions with BatchNorm and ReLU, halving the image down to about the size of the
    feature map; two more there, pooled to its size, and a 1x1 convolution to its channels. Tokens
    `(T, D)` are read as a map of `D` channels, as near to a square as `T` allows; where `T - 1` is
    a square and `T` is not, the first token is the mean of the others. A vector comes from a
    linear layer on a 4x4 map.

    Args:
        image_shape: `(channels, height, width)` of the model input.
        feature_shape: of `z`, without the batch.
        width: channels of the first convolution; doubled at every halving, up to four times.
        positive: whether features end in a ReLU, as overheard ones without a negative suggest.
        seed: of the weights; the global generators are left untouched.
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        feature_shape: tuple[int, ...],
        *,
        width: int = 32,
        positive: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.feature_shape = tuple(feature_shape)
        self.positive = positive
        self.dim = channel_dim(self.feature_shape, tuple(image_shape))
        channels = self.feature_shape[self.dim - 1]
        others = [size for d, size in enumerate(self.feature_shape) if d != self.dim - 1]
        self.leading = len(others) == 1 and _is_square(others[0] - 1) and not _is_square(others[0])
        if len(others) == 2:
            self.size = (others[0], others[1])
        else:
            self.size = _near_square(others[0] - self.leading) if others else (4, 4)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            layers, inside = _trunk(tuple(image_shape), self.size, width)
            self.trunk = nn.Sequential(*layers)
            self.head: nn.Module
            if others:
                self.head = nn.Conv2d(inside, channels, 1)
            else:
                self.head = nn.Linear(inside * math.prod(self.size), channels)

    def forward(self, x: Tensor) -> Tensor:
        """Model input `[N, *image_shape]` to features `[N, *feature_shape]`."""
        h: Tensor = functional.adaptive_avg_pool2d(self.trunk(x), self.size)
        z: Tensor = self.head(h.flatten(1) if isinstance(self.head, nn.Linear) else h)
        if len(self.feature_shape) == 2:
            z = z.flatten(2)
            z = torch.cat([z.mean(2, keepdim=True), z], dim=2) if self.leading else z
        z = z.relu() if self.positive else z
        return z.movedim(1, self.dim)


def _trunk(
    image_shape: tuple[int, ...], size: tuple[int, int], width: int
) -> tuple[list[nn.Module], int]:
    """Convolutions from the image to about `size`, and how many channels they end in."""
    have, height, image_width = image_shape
    ratio = max(1.0, min(height / size[0], image_width / size[1]))
    layers: list[nn.Module] = []
    most = 4 * width
    for stride in (1, *[2] * round(math.log2(ratio)), 1, 1):
        width = min(most, width * stride)
        conv = nn.Conv2d(have, width, 3, stride=stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        have = width
    return layers, width


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _near_square(count: int) -> tuple[int, int]:
    """The two factors of `count` that are nearest to each other, the smaller first."""
    rows = max(r for r in range(1, math.isqrt(count) + 1) if count % r == 0)
    return rows, count // rows
