"""What an upload gives away without a picture: attributes inferred from the feature itself.

A decoder is trained to rebuild all of a picture, and what it leaves grey may be in the upload all
the same. So the attacker also learns answers straight from the features of his own pictures
(attribute inference). A rate is a lower bound on the leak, as that of any reader.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patrol_prune.decoders import channel_dim, token_grid
from patrol_prune.errors import InputError
from patrol_prune.given import real
from patrol_prune.leaks import Leak, ReaderConfig, guess_rate, map_square, minimise
from patrol_prune.ridge import DECADES, MOST_ROWS, Standardised, linear_scores

_ACROSS, _DOWN = 3, 4
"""Points of the feature map across each character of a plate, and down the plate."""
_MARGIN = 0.15
_POOL = 4
_VECTOR = 4
_HIDDEN = 256
_CHUNK = 512
_FEWEST, _HELD = 40, 5
"""Of at least so many features a fifth decides between the readers."""
READS = ("pooled", "texture", "whole")
_WHOLE_VALUES = 1 << 27
"""Values of all features together up to which they are kept to be read whole."""
_WHOLE_ROWS = 2_048
"""Examples that regression on whole features takes, where these have more values."""

Features = Tensor | Iterable[Tensor]
"""Features of pictures, whole or in parts."""


class UploadReader:
    """Answers questions about a picture from its upload: a small network, or ridge regression.

    All learn from most of the attacker's features, the one that reads the others best learns from
    all: an answer that hardly shows beside scene and light is found by regression where a network
    overlooks it. Three things are read of a feature, and those held-out ones decide which:

    - `"pooled"`: its means over at most 4x4 cells (and a class token), and, where the corners of a
      quadrangle are given (a number plate), the map around there;
    - `"texture"`: these, and of every channel in each cell the standard deviation and the mean
      absolute difference to the next position, across and down: what has no mean there;
    - `"whole"`: every value, by regression alone (on at most 2,048 pictures where features have
      more values; not where all features together have over 2^27).

    Maps of up to 4x4 positions lose nothing by the first. Those of up to 2x2, vectors and tokens
    without a grid are read as they are.

    Args:
        image_shape: `(channels, height, width)` of the pictures; corners are in their pixels.
        config: how it is trained; by default 40 epochs at 2e-3, with a hidden layer of 256.

    Attributes:
        chosen: after `fit`, "network" or "linear".
        reads: after `fit`, what of the feature, "pooled", "texture" or "whole".
    """

    chosen: str | None = None
    reads: str | None = None

    def __init__(
        self, image_shape: tuple[int, int, int], config: ReaderConfig | None = None
    ) -> None:
        self.image_shape = tuple(image_shape)
        self.config = config or ReaderConfig(epochs=40, lr=2e-3, width=_HIDDEN)
        self._answers: tuple[Counter[str], ...] = ()
        self._cornered = False
        self._network: nn.Module | None = None

    def fit(
        self, z: Features, truth: Sequence[Sequence[str]], corners: Tensor | None = None
    ) -> UploadReader:
        """Train from scratch.

        Args:
            z: features `[N, *feature_shape]` of the attacker's pictures; or an iterable of such
                parts, of which only what is read of them is kept.
            truth: the answers for each picture, all of one number: the characters of a plate (a
                string will do), or one label.
            corners: `[N, 4, 2]`, as in `PlateReader.fit`; where given here, then in `read` and
                `accuracy` too.

        Returns:
            itself.

        Raises:
            InputError: lengths that do not fit, features that are not finite, or no question that
                has two answers.
        """
        _check(truth, corners)
        self._answers = tuple(Counter(column) for column in zip(*truth, strict=True))
        self._cornered = corners is not None
        if all(len(counts) < 2 for counts in self._answers):
            raise InputError(
                "Expected at least two different answers to a question, came one: there is nothing "
                "to learn. Give pictures that differ."
            )
        inputs = self._inputs(z, corners, len(truth))
        names = [sorted(counts) for counts in self._answers]
        labels = torch.tensor([[n.index(a) for n, a in zip(names, row, strict=True)]
                               for row in truth])
        self.reads, self.chosen, self._network = _fit(inputs, labels, [len(n) for n in names],
                                                      self.config)
        return self

    def read(self, z: Features, corners: Tensor | None = None) -> list[list[str]]:
        """The likeliest answers for each picture; arguments as in `fit`.

        Raises:
            InputError: the reader is not fitted, or corners came in one of the two alone.
        """
        if self._network is None:
            raise InputError("This UploadReader is not fitted. Call fit on features with known "
                             "truth first.")
        if (corners is not None) != self._cornered:
            raise InputError("Expected corners in fit and in reading, or in neither; came them in "
                             "one of the two.")
        names = [sorted(counts) for counts in self._answers]
        scores = torch.cat([
            _scores(self._network, self._read_off(part, own, str(self.reads)), self.config)
            for part, own in self._parts(z, corners)])
        best = [part.argmax(1).tolist() for part in scores.split([len(n) for n in names], 1)]
        return [[n[i] for n, i in zip(names, row, strict=True)]
                for row in zip(*best, strict=True)]

    def accuracy(
        self, z: Features, truth: Sequence[Sequence[str]], corners: Tensor | None = None
    ) -> tuple[Leak, Leak]:
        """Share of single answers, and of pictures of which all are right; arguments as in `fit`.

        The chance of the second is that of every answer being guessed, as if they were independent.

        Raises:
            InputError: as `read`, or lengths that do not fit.
        """
        _check(truth, corners)
        read = self.read(z, corners)
        _check_count(len(read), len(truth))
        if len(truth[0]) != len(self._answers):
            raise InputError(
                f"Expected {len(self._answers)} answers for each picture as in fit, came "
                f"{len(truth[0])}."
            )
        right = [[a == b for a, b in zip(row, true, strict=True)]
                 for row, true in zip(read, truth, strict=True)]
        columns = zip(*truth, strict=True)
        guesses = [guess_rate(n, list(c)) for n, c in zip(self._answers, columns, strict=True)]
        single = sum(map(sum, right)) / (len(right) * len(guesses))
        return (Leak(single, sum(guesses) / len(guesses), len(right) * len(guesses)),
                Leak(sum(map(all, right)) / len(right), math.prod(guesses), len(right)))

    def _inputs(self, z: Features, corners: Tensor | None, expected: int) -> dict[str, Tensor]:
        """Each of what is read of all features, `[N, D]`, float32; "pooled" first."""
        found: dict[str, list[Tensor]] = {name: [] for name in READS}
        done = 0
        for part, own in self._parts(z, corners):
            done += len(part)
            count = len(READS) if self._has_more(part) else 1
            if part[0].numel() * expected > _WHOLE_VALUES:
                count = min(count, 2)
            for name in READS[:count]:
                found[name].append(self._read_off(part, own, name))
        _check_count(done, expected)
        return {name: torch.cat(parts) for name, parts in found.items() if parts}

    def _parts(self, z: Features, corners: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The features part by part, checked, float32, each with its corners."""
        done = 0
        for sent in z.split(_CHUNK) if isinstance(z, Tensor) else z:
            part = real(sent.detach())
            if not bool(torch.isfinite(part).all()):
                raise InputError("Expected finite features, came NaN or infinite values.")
            own = None if corners is None else corners[done : done + len(part)]
            done += len(part)
            if own is not None and len(own) != len(part):
                raise InputError(
                    "Expected corners of each picture, came "
                    f"{0 if corners is None else len(corners)} for {done} features or more.")
            yield part.float(), own

    def _has_more(self, z: Tensor) -> bool:
        """Whether cells of the map hold more than one position."""
        grid = as_map(z, self.image_shape)
        return grid is not None and max(grid.shape[2:]) > _POOL

    def _read_off(self, z: Tensor, corners: Tensor | None, name: str) -> Tensor:
        """What is read of some features, `[N, D]`."""
        grid = as_map(z, self.image_shape)
        if name == "whole" or grid is None or math.prod(grid.shape[2:]) <= _VECTOR:
            return z.flatten(1)
        sides = (min(_POOL, grid.shape[2]), min(_POOL, grid.shape[3]))
        parts = [F.adaptive_avg_pool2d(grid, sides).flatten(1)]
        if z.dim() == 3:
            parts.append(z[:, : z.shape[1] - math.prod(grid.shape[2:])].flatten(1))
        if corners is not None:
            parts.append(self._around(grid, corners))
        if name == "texture":
            parts.append(torch.cat([texture(some, sides) for some in grid.split(16)]))
        return torch.cat(parts, 1)

    def _around(self, grid: Tensor, corners: Tensor) -> Tensor:
        """The map at points inside and around the quadrangles, flattened."""
        across = _ACROSS * max(1, len(self._answers))
        u, v = (torch.linspace(-_MARGIN, 1 + _MARGIN, n, dtype=torch.float64)
                for n in (across, _DOWN))
        plane = torch.stack(torch.broadcast_tensors(u[None, :], v[:, None]), -1).reshape(-1, 2)
        points = map_square(corners.double().cpu(), plane)
        height, width = self.image_shape[1:]
        places = (2 * points / points.new_tensor([width, height]) - 1).to(grid)
        found = F.grid_sample(grid, places[:, :, None], padding_mode="border", align_corners=False)
        return found.flatten(1)


def as_map(z: Tensor, image_shape: Sequence[int]) -> Tensor | None:
    """`z` as maps `[N, C, h, w]`: channels-last ones turned, tokens on their grid; else None.

    Class and register tokens are left out.
    """
    shape = tuple(z.shape[1:])
    if len(shape) == 3:
        return z.permute(0, 3, 1, 2) if channel_dim(shape, tuple(image_shape)) == 3 else z
    if len(shape) == 2:
        leading, grid = token_grid(shape[0], tuple(image_shape))
        if grid is not None:
            return z[:, leading:].transpose(1, 2).reshape(len(z), shape[1], *grid)
    return None


def texture(grid: Tensor, sides: tuple[int, int]) -> Tensor:
    """What means over cells leave out, `[N, 3 C a b]` of maps `[N, C, h, w]` in `a` by `b` cells.

    The standard deviation of each channel in each cell, and its mean absolute difference between
    neighbours down and across.
    """
    values = grid.double()
    squares = F.adaptive_avg_pool2d(values**2, sides) - F.adaptive_avg_pool2d(values, sides) ** 2
    steps = [values.diff(dim=dim, append=values.narrow(dim, -1, 1)).abs() for dim in (2, 3)]
    return torch.cat([squares.clamp_min(0.0).sqrt(),
                      *(F.adaptive_avg_pool2d(step, sides) for step in steps)], 1
                     ).flatten(1).to(grid.dtype)


def _fit(
    inputs: dict[str, Tensor], labels: Tensor, counts: list[int], config: ReaderConfig
) -> tuple[str, str, nn.Module]:
    """What is read, how, and the reader that does best on what it has not learnt from, fitted on
    everything. Where several do as well it is the first of them, the network on pooled features.
    """
    if len(labels) < _FEWEST:
        return "pooled", "network", _train(inputs["pooled"], labels, counts, config)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(config.seed))
    held, own = order[: len(order) // _HELD], order[len(order) // _HELD :]

    def rate(reader: nn.Module, x: Tensor) -> float:
        return _rate(_scores(reader, x[held], config), labels[held], counts)

    best, chosen = -1.0, ("pooled", "network", 0)
    straight: dict[str, float] = {}
    for name, x in inputs.items():
        rates = [rate(reader, x)
                 for reader in _linear(x[own], labels[own], counts, config, DECADES, name)]
        straight[name] = max(rates)
        found = [(straight[name], (name, "linear", DECADES[rates.index(straight[name])]))]
        # A network takes longest: it reads textures only where they tell more in a straight line.
        if name == "pooled" or (name == "texture" and straight["pooled"] < straight[name] < 1.0):
            found.insert(0, (rate(_train(x[own], labels[own], counts, config), x),
                             (name, "network", 0)))
        for reached, candidate in found:
            if reached > best:
                best, chosen = reached, candidate
        if best == 1.0:
            break
    name, kind, decade = chosen
    if kind == "linear":
        return name, kind, next(_linear(inputs[name], labels, counts, config, [decade], name))
    return name, kind, _train(inputs[name], labels, counts, config)


def _linear(
    inputs: Tensor, labels: Tensor, counts: list[int], config: ReaderConfig,
    decades: Sequence[int], name: str,
) -> Iterator[nn.Module]:
    """Ridge regression of every answer's zeros and ones, one reader for each weight."""
    targets = torch.cat([F.one_hot(labels[:, i], n) for i, n in enumerate(counts)], 1)
    for reader in linear_scores(inputs.to(config.device), targets.to(config.device), decades,
                                seed=config.seed,
                                most_rows=_WHOLE_ROWS if name == "whole" else MOST_ROWS):
        yield reader.eval()


@torch.no_grad()
def _scores(reader: nn.Module, inputs: Tensor, config: ReaderConfig) -> Tensor:
    """Of every answer to every question, `[N, sum of counts]`, on the CPU."""
    return torch.cat([reader(part.to(config.device)).cpu() for part in inputs.split(_CHUNK)])


def _rate(scores: Tensor, labels: Tensor, counts: list[int]) -> float:
    """Share of single answers that are right."""
    best = torch.stack([part.argmax(1) for part in scores.split(counts, 1)], 1)
    return float((best == labels).double().mean())


def _train(inputs: Tensor, labels: Tensor, counts: list[int], config: ReaderConfig) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        network = nn.Sequential(
            Standardised(inputs), nn.Dropout(0.2),
            nn.Linear(inputs.shape[1], config.width), nn.BatchNorm1d(config.width), nn.ReLU(),
            nn.Dropout(0.3), nn.Linear(config.width, sum(counts)),
        ).to(config.device)
        minimise(lambda scores, y: _mean_loss(scores.split(counts, 1), y), network, inputs, labels,
                 config, weight_decay=1e-2)
    return network.eval()


def _mean_loss(scores: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy, the mean over the questions."""
    return torch.stack([F.cross_entropy(s, labels[:, i]) for i, s in enumerate(scores)]).mean()


def _check(truth: Sequence[Sequence[str]], corners: Tensor | None) -> None:
    if len(truth) < 2:
        raise InputError(f"Expected answers for at least two features, came {len(truth)}.")
    odd = [row for row in truth if len(row) != len(truth[0]) or not len(row)]
    if odd:
        raise InputError(
            f"Expected {len(truth[0])} answers for each picture as for the first, came {odd[0]!r}."
        )
    if corners is not None and tuple(corners.shape) != (len(truth), 4, 2):
        raise InputError(
            f"Expected corners [{len(truth)}, 4, 2], came {tuple(corners.shape)}. Give x and y of "
            "four corners for each picture."
        )


def _check_count(features: int, answers: int) -> None:
    if features != answers:
        raise InputError(
            f"Expected answers for each of the features, came {answers} for {features}. "
            "Give both in the same order."
        )
