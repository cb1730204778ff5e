"""Where the values of an upload stand: which dimension holds the channels, which place lies where.

Attacks that look at places rely on both, and an edge that sends its map in another order, which
costs it nothing, blinds them. Which part of the picture a place depends on shows in a regression.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.access import edge_function
from patrol_prune.attacks import EdgeFunction, Flag
from patrol_prune.decoders import channel_dim, either_layout
from patrol_prune.pixels import Normalization
from patrol_prune.received import FEWEST, HELPS, PROXY, helps, linear_loss, sample
from patrol_prune.upload_reader import as_map

_FEWEST_IMAGES, _MOST_IMAGES, _FEWEST_PLACES = 64, 400, 9
_DIRECTIONS, _NUMBERS = 16, 1 << 14
_SIDE, _LOOKED, _MOST_PLACES, _AT_ONCE = 8, 64, 1024, 32
_ODD, _CLEAR = 0.05, 0.3
_MOVED, _FAR = 0.2, 2
_RIDGE = 0.05
_OUT_OF_STEP = 0.5

LAYOUT_GUESSED = Flag(
    "layout_guessed",
    "The feature's shape does not tell whether its channels come first or last, and a linear "
    "decoder sees about as much either way. It was read with the channels first.",
    "If they come last, audit an edge that sends them first.",
)
SCRAMBLED_LAYOUT = Flag(
    "scrambled_layout",
    "The places of the feature do not lie as those of the picture do that they depend on. The "
    "attacks got them put in order, as any attacker would do.",
    "Nothing, if that is meant. It hides nothing.",
)
NOT_PUT_IN_ORDER = replace(
    SCRAMBLED_LAYOUT,
    meaning="The places of the feature do not lie as those of the picture do that they depend on, "
    "and no order was found that helps. Attacks that look at places see less than there is.",
    advice="Audit an edge that sends its map as it is; an order hides nothing from who finds it.",
)


class ChannelsFirst:
    """`[N, H, W, C]` to `[N, C, H, W]`."""

    def __call__(self, z: Tensor) -> Tensor:
        return z.movedim(3, 1)

    def undone(self, z: Tensor) -> Tensor:
        """What was sent."""
        return z.movedim(1, 3)


@dataclass(frozen=True)
class Order:
    """Place `i` of the upload becomes what place `index[i]` was.

    Attributes:
        index: a permutation of all places.
        dim: which dimension of the upload `[N, ...]` holds the channels; all others are places.
    """

    index: Tensor
    dim: int

    def __call__(self, z: Tensor) -> Tensor:
        return self._moved(z, self.index)

    def undone(self, z: Tensor) -> Tensor:
        """What was sent."""
        return self._moved(z, self.index.argsort())

    def _moved(self, z: Tensor, index: Tensor) -> Tensor:
        first, last = (2, z.dim() - 1) if self.dim == 1 else (1, z.dim() - 2)
        return z.flatten(first, last).index_select(first, index.to(z.device)).reshape(z.shape)


@torch.no_grad()
def channels_last(edge: nn.Module, pixels: Tensor, normalization: Normalization) -> bool | None:
    """Whether a map holds its channels last though its shape allows both; None if nothing tells.

    A linear decoder from each place to the pixels behind it sees clearly more in the right reading.

    Args:
        edge: as it is attacked.
        pixels: the attacker's images.
        normalization: of the edge's inputs.
    """
    query = edge_function(edge, normalization)
    if not either_layout(tuple(query(pixels[:2]).shape[1:]), tuple(pixels.shape[1:])):
        return False
    z, some = sample(query, pixels)
    if len(some) < FEWEST:
        return None
    first, last = (linear_loss(read, some, kernel=1) for read in (z, z.movedim(3, 1)))
    if min(first, last) >= HELPS * max(first, last):
        return None
    return last < first


@torch.no_grad()
def arranged(
    edge: nn.Module, pixels: Tensor, normalization: Normalization
) -> tuple[Order | None, Flag | None]:
    """The order in which a map's places lie as the picture's do, if they do not; and a flag.

    Of some places it is looked whether each depends, in one half of the images, on another part of
    the picture than its own, and how much better that explains it in the other half. Where that is
    so, each place is assigned the part that it explains best; of maps over 1,024 places, all are
    mirrored and turned as fits best. The order counts only if it moves many of them far and a
    linear decoder sees more for it: deep features, whose places see much of the picture, stay.

    Args:
        edge: as it is attacked.
        pixels: the attacker's images.
        normalization: of the edge's inputs.
    """
    query = edge_function(edge, normalization)
    image = tuple(pixels.shape[1:])
    z = query(pixels[:2])
    grid = as_map(z, image)
    if grid is None or grid.shape[2:].numel() < _FEWEST_PLACES or len(pixels) < _FEWEST_IMAGES:
        return None, None
    size = int(grid.shape[2]), int(grid.shape[3])
    some = pixels[torch.linspace(0, len(pixels) - 1, min(_MOST_IMAGES, len(pixels))).long()]
    kept = torch.arange(size[0] * size[1])
    if len(kept) > _MOST_PLACES:
        kept = _some_of(len(kept))
    places = _directions(_maps(query, some, kept))
    some = some.cpu()
    chosen = _some_of(len(kept))
    odd, scores = _look(places[chosen], kept[chosen], some, size)
    if odd < _ODD:
        return None, None
    if len(kept) == size[0] * size[1]:
        to = _assigned(torch.stack(_explained(places, _cells(some, size))).sum(0))
    else:
        to = _mirrored(scores, kept[chosen], size)
    if _far(to, size) >= _MOVED:
        leading = z.shape[1] - len(to) if z.dim() == 3 else 0
        index = torch.cat([torch.arange(leading), leading + to.argsort()])
        order = Order(index, channel_dim(tuple(z.shape[1:]), image))
        z, some = sample(query, pixels, PROXY)
        if helps(z, order(z), some):
            return order, SCRAMBLED_LAYOUT
    odd_for_certain = odd > _CLEAR and not _in_step(scores, kept[chosen], size)
    return None, NOT_PUT_IN_ORDER if odd_for_certain else None


def _in_step(scores: Tensor, numbers: Tensor, size: tuple[int, int]) -> bool:
    """Whether places prefer cells nearer to the middle, but in their own order: so do those of
    convolutions without padding, of which a picture's border is seen from the middle alone."""
    width, preferred, own = min(size[1], _SIDE), scores.argmax(1), _coarse(size)[numbers]
    for a, b in ((preferred // width, own // width), (preferred % width, own % width)):
        a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
        slope = (a * b).sum() / b.square().sum().clamp_min(1e-12)
        if slope <= 0 or (a - slope * b).abs().mean() > _OUT_OF_STEP:
            return False
    return True


def _some_of(count: int) -> Tensor:
    """Up to 64 of so many numbers, seeded."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:_LOOKED]


def _far(to: Tensor, size: tuple[int, int]) -> float:
    """The share of places whose cell is two or more rows or columns away."""
    cell, place = ((v // size[1], v % size[1]) for v in (to, torch.arange(len(to))))
    away = [(a - b).abs() for a, b in zip(cell, place, strict=True)]
    return float((torch.maximum(*away) >= _FAR).double().mean())


def _maps(query: EdgeFunction, pixels: Tensor, kept: Tensor) -> Tensor:
    """What is sent for these images at these places, `[N, C, P]`; of many channels, some."""
    parts: list[Tensor] = []
    for part in pixels.split(32):
        found = as_map(query(part), tuple(pixels.shape[1:]))
        assert found is not None
        most = min(found.shape[1], max(_DIRECTIONS, _NUMBERS // len(kept)))
        channels = torch.linspace(0, found.shape[1] - 1, most).long()
        parts.append(found.flatten(2).cpu()[:, channels][:, :, kept])
    return torch.cat(parts)


def _directions(z: Tensor) -> Tensor:
    """Maps `[N, C, P]` to `[P, N, K]`, float64: what varies most in each place's channels."""
    z = z.double()
    z = z - z.mean(0)
    size = z.square().mean((0, 2)).sqrt().view(1, -1, 1)
    z = torch.where(size > 0, z / size.clamp_min(1e-300), 0.0)
    if z.shape[1] > _DIRECTIONS:
        flat = z.transpose(0, 1).flatten(1)
        basis = torch.linalg.eigh(flat @ flat.T / flat.shape[1]).eigenvectors[:, -_DIRECTIONS:]
        z = torch.einsum("ncp,ck->nkp", z, basis)
    return z.permute(2, 0, 1)


def _cells(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Images as so many mean colours, `[N, c, Q]`, float64."""
    if size[0] > pixels.shape[2] or size[1] > pixels.shape[3]:
        return functional.interpolate(pixels.double(), size=size, mode="bilinear").flatten(2)
    return functional.adaptive_avg_pool2d(pixels.double(), size).flatten(2)


def _explained(places: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each cell `[N, c, Q]` each place `[P, N, K]` explains, twice `[P, Q]`.

    1 less the squared error of a ridge regression over the cell's variance, at least 0; learnt in
    one half of the images and measured in the other, and the other way round.
    """
    even = torch.arange(len(cells)) % 2 == 0
    first, second = (torch.cat([_learnt(part[:, own], part[:, ~own], cells[own], cells[~own])
                                for part in places.split(_AT_ONCE)]) for own in (even, ~even))
    return first, second


def _learnt(known: Tensor, places: Tensor, known_cells: Tensor, cells: Tensor) -> Tensor:
    """One of them: learnt from the places and cells that are known, measured by the others."""
    shift, mean = known.mean(1, keepdim=True), known_cells.flatten(1).mean(0)
    x = known - shift
    gram = x.transpose(1, 2) @ x
    ridge = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)
    gram = gram + ridge[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype)
    weight = torch.linalg.solve(gram, x.transpose(1, 2) @ (known_cells.flatten(1) - mean))
    rest = cells.flatten(1) - mean
    error = (rest - (places - shift) @ weight).square().mean(1)
    left, whole = (v.view(-1, *cells.shape[1:]).sum(1) for v in (error, rest.square().mean(0)))
    return (1 - left / whole.clamp_min(1e-300)).clamp_min(0.0)


def _look(
    places: Tensor, numbers: Tensor, pixels: Tensor, size: tuple[int, int]
) -> tuple[float, Tensor]:
    """How much better than their own the cells explain that places prefer, in the mean.

    Args:
        places: `[P, N, K]`.
        numbers: which of the map's they are, `[P]`.
        pixels: the images.
        size: of the map.

    Returns:
        That gain, and all scores, `[P, 8 * 8]` at most.
    """
    coarse = min(size[0], _SIDE), min(size[1], _SIDE)
    first, second = _explained(places, _cells(pixels, coarse))
    own, rows = _coarse(size)[numbers], torch.arange(len(numbers))
    gains = [(test[rows, learnt.argmax(1)] - test[rows, own]).mean()
             for learnt, test in ((first, second), (second, first))]
    return float(gains[0] + gains[1]) / 2, first + second


def _coarse(size: tuple[int, int]) -> Tensor:
    """Of every place, the cell of a grid of at most 8x8 that it lies in."""
    rows, columns = min(size[0], _SIDE), min(size[1], _SIDE)
    down = torch.arange(size[0]) * rows // size[0]
    return (down[:, None] * columns + torch.arange(size[1]) * columns // size[1]).flatten()


def _assigned(scores: Tensor) -> Tensor:
    """A cell for every place, `[P]`, each once: always the pair next whose score is highest."""
    scores, to = scores.clone(), torch.zeros(len(scores), dtype=torch.long)
    for _ in range(len(to)):
        place, cell = divmod(int(scores.argmax()), len(to))
        to[place] = cell
        scores[place], scores[:, cell] = -torch.inf, -torch.inf
    return to


def _mirrored(scores: Tensor, numbers: Tensor, size: tuple[int, int]) -> Tensor:
    """The cell of every place after the mirroring and turning that fits best."""
    plain = torch.arange(size[0] * size[1]).view(size)
    turned = [plain, plain.T] if size[0] == size[1] else [plain]
    every = [t.flip(axes).flatten() for t in turned for axes in ((), (0,), (1,), (0, 1))]
    rows, coarse = torch.arange(len(numbers)), _coarse(size)
    return max(every, key=lambda to: float(scores[rows, coarse[to[numbers]]].mean()))
