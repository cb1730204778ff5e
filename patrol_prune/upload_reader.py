"""What an upload gives away without a picture: attributes inferred from the feature itself.

A decoder is trained to rebuild all of a picture, and what it leaves grey may be in the upload all
the same. So the attacker also learns answers straight from the features of his own pictures
(attribute inference). A rate is a lower bound on the leak, as that of any reader.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patrol_prune.decoders import channel_dim, token_grid
from patrol_prune.errors import InputError
from patrol_prune.leaks import Leak, ReaderConfig, guess_rate, map_square, minimise

_ACROSS, _DOWN = 3, 4
"""Points of the feature map across each character of a plate, and down the plate."""
_MARGIN = 0.15
_POOL = 4
_VECTOR = 4
_HIDDEN = 256


class UploadReader:
    """Answers questions about a picture from its upload: a small network on the feature.

    It reads the feature pooled to at most 4x4 positions (and a class token), and, where the corners
    of a quadrangle are given (a number plate), the map around there too. Features of up to 2x2
    positions, vectors and tokens without a grid are read as they are.

    Args:
        image_shape: `(channels, height, width)` of the pictures; corners are in their pixels.
        config: how it is trained.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], config: ReaderConfig | None = None
    ) -> None:
        self.image_shape = tuple(image_shape)
        self.config = config or ReaderConfig(epochs=40, lr=2e-3, width=_HIDDEN)
        self._answers: tuple[Counter[str], ...] = ()
        self._network: nn.Module | None = None

    def fit(
        self, z: Tensor, truth: Sequence[Sequence[str]], corners: Tensor | None = None
    ) -> UploadReader:
        """Train from scratch.

        Args:
            z: features `[N, *feature_shape]` of the attacker's pictures.
            truth: the answers for each picture, all of one number: the characters of a plate (a
                string will do), or one label.
            corners: `[N, 4, 2]`, as in `PlateReader.fit`; where given here, then in `accuracy` too.

        Raises:
            InputError: lengths that do not fit, or a question with one answer only.
        """
        _check(z, truth, corners)
        self._answers = tuple(Counter(column) for column in zip(*truth, strict=True))
        if all(len(counts) < 2 for counts in self._answers):
            raise InputError(
                "Expected at least two different answers to a question, came one: there is nothing "
                "to learn. Give pictures that differ."
            )
        inputs = self._inputs(z, corners)
        names = [sorted(counts) for counts in self._answers]
        labels = torch.tensor([[n.index(a) for n, a in zip(names, row, strict=True)]
                               for row in truth])
        self._network = _train(inputs, labels, [len(n) for n in names], self.config)
        return self

    def read(self, z: Tensor, corners: Tensor | None = None) -> list[list[str]]:
        """The likeliest answers for each picture."""
        if self._network is None:
            raise InputError("This UploadReader is not fitted. Call fit on features with known "
                             "truth first.")
        names = [sorted(counts) for counts in self._answers]
        with torch.no_grad():
            scores = torch.cat([self._network(part.to(self.config.device)).cpu()
                                for part in self._inputs(z, corners).split(512)])
        best = [part.argmax(1).tolist() for part in scores.split([len(n) for n in names], 1)]
        return [[n[i] for n, i in zip(names, row, strict=True)]
                for row in zip(*best, strict=True)]

    def accuracy(
        self, z: Tensor, truth: Sequence[Sequence[str]], corners: Tensor | None = None
    ) -> tuple[Leak, Leak]:
        """Share of single answers, and of pictures of which all are right; arguments as in `fit`.

        The chance of the second is that of every answer being guessed, as if they were independent.
        """
        _check(z, truth, corners)
        read = self.read(z, corners)
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

    def _inputs(self, z: Tensor, corners: Tensor | None) -> Tensor:
        """`[N, D]`, float32."""
        grid = as_map(z.float(), self.image_shape)
        if grid is None or math.prod(grid.shape[2:]) <= _VECTOR:
            return z.float().flatten(1)
        sides = (min(_POOL, grid.shape[2]), min(_POOL, grid.shape[3]))
        parts = [F.adaptive_avg_pool2d(grid, sides).flatten(1)]
        if z.dim() == 3:
            parts.append(z[:, : z.shape[1] - math.prod(grid.shape[2:])].float().flatten(1))
        if corners is not None:
            parts.append(self._around(grid, corners))
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

    A class token is left out.
    """
    shape = tuple(z.shape[1:])
    if len(shape) == 3:
        return z.permute(0, 3, 1, 2) if channel_dim(shape, tuple(image_shape)) == 3 else z
    if len(shape) == 2:
        leading, grid = token_grid(shape[0], tuple(image_shape))
        if grid is not None:
            return z[:, leading:].transpose(1, 2).reshape(len(z), shape[1], *grid)
    return None


class _Scaled(nn.Module):
    """Subtract and multiply by constants: inputs on one scale."""

    mean: Tensor
    gain: Tensor

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", inputs.mean(0))
        self.register_buffer("gain", 1 / (inputs.std(0) + 1e-3 * inputs.std() + 1e-12))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, D]` to the same."""
        scaled: Tensor = (x - self.mean) * self.gain
        return scaled


def _train(inputs: Tensor, labels: Tensor, counts: list[int], config: ReaderConfig) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        network = nn.Sequential(
            _Scaled(inputs), nn.Dropout(0.2),
            nn.Linear(inputs.shape[1], config.width), nn.BatchNorm1d(config.width), nn.ReLU(),
            nn.Dropout(0.3), nn.Linear(config.width, sum(counts)),
        ).to(config.device)
        minimise(lambda scores, y: _mean_loss(scores.split(counts, 1), y), network, inputs, labels,
                 config, weight_decay=1e-2)
    return network.eval()


def _mean_loss(scores: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy, the mean over the questions."""
    return torch.stack([F.cross_entropy(s, labels[:, i]) for i, s in enumerate(scores)]).mean()


def _check(z: Tensor, truth: Sequence[Sequence[str]], corners: Tensor | None) -> None:
    if len(z) != len(truth) or len(z) < 2:
        raise InputError(
            f"Expected answers for each of at least two features, came {len(truth)} for {len(z)}. "
            "Give both in the same order."
        )
    if not bool(torch.isfinite(z).all()):
        raise InputError("Expected finite features, came NaN or infinite values.")
    odd = [row for row in truth if len(row) != len(truth[0]) or not len(row)]
    if odd:
        raise InputError(
            f"Expected {len(truth[0])} answers for each picture as for the first, came {odd[0]!r}."
        )
    if corners is not None and tuple(corners.shape) != (len(z), 4, 2):
        raise InputError(
            f"Expected corners [{len(z)}, 4, 2], came {tuple(corners.shape)}. Give x and y of four "
            "corners for each picture."
        )
