"""The best linear decoder from a neighbourhood of features to the pixels behind it, in closed form.

A black-box attack that takes seconds and has no training that could fail. At a shallow cut it is
hard to beat: the features of one convolution determine the pixels below them linearly, and least
squares finds that map to the last bit, where a trained decoder stops at 30 to 40 dB.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from patrol_prune.attacks.base import FitRecord, Knowledge, check_uploads_like
from patrol_prune.attacks.feature_layout import Layout
from patrol_prune.errors import InputError
from patrol_prune.metrics import check_pixels, mse
from patrol_prune.ridge import ridge_solutions

_CHUNK = 128
_CHUNK_BYTES = 256 << 20
_BASIS_BYTES = 2 << 30
_MOST_INPUTS = 4096
_MOST_WHOLE, _MOST_WEIGHTS = 2048, 1 << 24
_CLEARLY, _EXACT = 0.95, 1e-6


@dataclass(frozen=True)
class LinearInverseConfig:
    """Settings of `LinearInverse`.

    Args:
        kernel: odd side of the neighbourhood of features that a block of pixels is predicted from;
            reduced to 1 where it would give more than 2,304 inputs.
        decades: the ridge weights that are tried, powers of ten relative to the variance of a
            standardised input.
        holdout: share of the attacker's images that only chooses the weight.
        largest_rows: positions that enter the normal equations at most; images beyond that are
            left out.
        whole: also try a small feature whole (see `LinearInverse`).
        seed: of the held-out choice.

    Raises:
        InputError: a value out of its range.
    """

    kernel: int = 3
    decades: tuple[float, ...] = (-12.0, -9.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0)
    holdout: float = 0.1
    largest_rows: int = 300_000
    whole: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0 or not self.decades or self.largest_rows < 1:
            raise InputError(
                "Expected an odd kernel, at least one decade and positive largest_rows, came "
                f"kernel={self.kernel}, decades={self.decades}, largest_rows={self.largest_rows}."
            )
        if not 0.0 < self.holdout < 1.0:
            raise InputError(f"Expected 0 < holdout < 1, came {self.holdout}.")


@dataclass
class _Projection:
    """Standardised inputs in an orthonormal basis, `(inputs - mean) @ basis`."""

    mean: Tensor
    basis: Tensor = field(repr=False)

    def __call__(self, inputs: Tensor) -> Tensor:
        return (inputs - self.mean) @ self.basis


@dataclass
class _Solution:
    """`pixels = (x - mean_in) @ weight + mean_out`, with `x` the inputs, or their projection."""

    layout: Layout
    projection: _Projection | None
    mean_in: Tensor
    mean_out: Tensor
    weight: Tensor = field(repr=False)

    def __call__(self, z: Tensor) -> Tensor:
        inputs = self.layout.inputs(z)
        if self.projection is not None:
            inputs = self.projection(inputs)
        rows = (inputs - self.mean_in) @ self.weight + self.mean_out
        return self.layout.images(rows, len(z)).clamp(0.0, 1.0).float()


@dataclass
class _Sums:
    """Normal equations of shifted inputs and targets, summed over examples."""

    gram: Tensor
    cross: Tensor
    inputs: Tensor
    targets: Tensor
    count: int

    @classmethod
    def none(cls, inputs: Tensor, targets: Tensor) -> _Sums:
        """Of no example yet; `[M]` and `[K]` say how wide and where they are."""
        gram = inputs.new_zeros(len(inputs), len(inputs))
        cross = inputs.new_zeros(len(inputs), len(targets))
        return cls(gram, cross, inputs * 0.0, targets * 0.0, 0)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Take in examples `[R, M]` and `[R, K]`."""
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(inputs.T, targets)
        self.inputs += inputs.sum(0)
        self.targets += targets.sum(0)
        self.count += len(inputs)

    def plus(self, other: _Sums) -> _Sums:
        """Over the examples of both."""
        return _Sums(self.gram + other.gram, self.cross + other.cross, self.inputs + other.inputs,
                     self.targets + other.targets, self.count + other.count)

    def of(self, outputs: Tensor) -> _Sums:
        """Of these outputs alone."""
        return replace(self, cross=self.cross[:, outputs], targets=self.targets[outputs])

    def system(self, shift_in: Tensor, shift_out: Tensor, *, standardise: bool) -> _System:
        """What is to be solved; the shifts are those of the examples.

        Inputs that never change (dead channels, what lies outside of a small map) stay out.
        """
        mean_in, mean_out = self.inputs / self.count, self.targets / self.count
        gram = self.gram / self.count - torch.outer(mean_in, mean_in)
        cross = self.cross / self.count - torch.outer(mean_in, mean_out)
        mean_in, mean_out = mean_in + shift_in, mean_out + shift_out
        _check_finite(gram)
        gain = _gain(gram.diagonal(), mean_in) if standardise else torch.ones_like(mean_in)
        alive = gain > 0
        gram = gram[alive][:, alive] * torch.outer(gain[alive], gain[alive])
        cross = cross[alive] * gain[alive].unsqueeze(1)
        return _System(mean_in, mean_out, gain, gram, cross)


@dataclass
class _System:
    """Normal equations of the inputs that change, standardised; `gain` is 0 for the others."""

    mean_in: Tensor
    mean_out: Tensor
    gain: Tensor
    gram: Tensor
    cross: Tensor

    def weights(self, ridges: Sequence[float]) -> Iterator[Tensor]:
        """One for each ridge weight, of inputs as they come."""
        alive = self.gain > 0
        for part in ridge_solutions(self.gram, self.cross, ridges):
            weight = part.new_zeros(len(alive), part.shape[1])
            weight[alive] = part * self.gain[alive].unsqueeze(1)
            yield weight


class LinearInverse:
    """Ridge regression `min_W mean ||W patch(z) - block(x)||^2 + lambda ||W||^2`.

    `patch(z)` is the `kernel x kernel` neighbourhood of features at a position, `block(x)` the
    pixels behind that position. Tokens on a grid are read as a map; features that are no map are
    taken whole. So are, in a second try, those of at most 2,048 values (and 2^24 weights), which
    finds pixels wherever they went; held-out images decide. A map that falls short of the image, as
    behind convolutions without padding, is stretched over it, and in another try left where it is,
    its border positions standing for what is beyond them too. Every input is standardised, so that
    rescaling a channel changes nothing. The weight `lambda` is the one with the smallest error on
    held-out images. Where the edge is random, every image enters with a fresh draw.

    Where there are more inputs than examples, only directions that the examples span get a weight:
    the solution is the same in a basis of these, which is far smaller. Of more examples than 4,096,
    or than fit into 2 GiB, a seeded choice gives the basis, and all are learnt from.

    Args:
        config: its settings.
        device: where it computes.

    Attributes:
        held_out: after `fit`, indices of the attacker's images that no weight was learnt from.
    """

    def __init__(self, config: LinearInverseConfig | None = None, *, device: str = "cpu") -> None:
        self.config = config or LinearInverseConfig()
        self.device = torch.device(device)
        self.held_out: Tensor | None = None
        self._solution: _Solution | None = None
        self._shape: tuple[int, ...] = ()

    def fit(self, known: Knowledge) -> FitRecord:
        """Solve for every ridge weight and keep the best on held-out images.

        The record's `history` is the mean squared error on these with each of them, and the
        plateau is always reached.

        Raises:
            InputError: neither features nor an edge to query, fewer than 20 images, pixels that
                are no floating-point ones on [0, 1], or features that are not finite.
        """
        start = time.perf_counter()
        check_pixels(known.pixels, "pixels")
        if known.z is None and known.edge is None:
            known.pairs()
        if len(known.pixels) < 20:
            raise InputError(
                f"An attack learns from at least 20 images, came {len(known.pixels)}. "
                "Give the attacker more data."
            )
        generator = torch.Generator().manual_seed(self.config.seed)
        order = torch.randperm(len(known.pixels), generator=generator)
        held = max(2, round(self.config.holdout * len(order)))
        self.held_out = order[:held]
        held_out, train = order[: min(held, 500)], order[held:]
        shapes = tuple(self._features(known, order[:1]).shape[1:]), tuple(known.pixels.shape[1:])
        layouts = [Layout.of(*shapes, self.config.kernel)]
        short = Layout.of(*shapes, self.config.kernel, stretch=False)
        if any(short.margin) and short.outputs <= short.width:
            layouts.append(short)
        if self.config.whole and layouts[0].is_map and math.prod(shapes[0]) <= _MOST_WHOLE and (
                math.prod(shapes[0]) * math.prod(shapes[1]) <= _MOST_WEIGHTS):
            layouts.append(Layout.whole(*shapes))
        z, x = self._features(known, held_out), known.pixels[held_out]
        mean = known.pixels[train].mean(0)
        floor = float(mse(x, mean.expand_as(x)).mean())
        history: list[float] = []
        best: tuple[float, _Solution] | None = None
        for layout in layouts:
            # A later one has to be clearly better on what may be few held-out images.
            below = math.inf if best is None else _CLEARLY * best[0]
            if below < _EXACT * floor:
                break
            own = train[: max(20, self.config.largest_rows // layout.positions)]
            for solution in self._solve(known, layout, own):
                guess = torch.cat([solution(part.to(self.device)).cpu()
                                   for part in z.split(_chunk(layout))])
                history.append(float(mse(x, guess).mean()))
                if history[-1] < below:
                    below = history[-1]
                    best = (below, solution)
        assert best is not None
        self._solution, self._shape = best[1], shapes[0]
        choice = history.index(best[0])
        return FitRecord(
            history=tuple(history), train_history=(), initial_loss=floor, mean_image_loss=floor,
            best_epoch=choice, plateau=True, extensions=0, seconds=time.perf_counter() - start,
            chosen={"ridge_decade": self.config.decades[choice % len(self.config.decades)],
                    "kernel": best[1].layout.kernel, "inputs": "a neighbourhood"
                    if best[1].layout.is_map else "the whole feature"},
        )

    @torch.no_grad()
    def reconstruct(self, z: Tensor) -> Tensor:
        """Features `[N, ...]` to float32 pixels `[N, C, H, W]` on [0, 1], on z's device.

        Raises InputError before `fit`, and on features of another shape.
        """
        if self._solution is None:
            raise InputError("This attack has not been trained. Call fit(known) first.")
        check_uploads_like(z, self._shape)
        return torch.cat([self._solution(part.to(self.device).float()).to(z.device)
                          for part in z.split(_chunk(self._solution.layout))])

    @torch.no_grad()
    def _features(self, known: Knowledge, index: Tensor) -> Tensor:
        if known.z is not None and not (known.random_edge and known.edge is not None):
            return known.z[index].float()
        assert known.edge is not None
        return torch.cat([known.edge(known.pixels[part]).float() for part in index.split(_CHUNK)])

    def _rows(self, known: Knowledge, layout: Layout, index: Tensor
              ) -> Iterator[tuple[Tensor, Tensor]]:
        for part in index.split(_chunk(layout)):
            z = self._features(known, part).to(self.device)
            yield layout.inputs(z), layout.targets(known.pixels[part].float().to(self.device))

    @torch.no_grad()
    def _solve(self, known: Knowledge, layout: Layout, train: Tensor) -> Iterator[_Solution]:
        """One solution for each ridge weight, relative to the variance of a standardised input.

        Outputs that hang out of the image at some positions are learnt from the others.
        """
        projection = None
        if layout.width > min(len(train) * layout.positions, _MOST_INPUTS):
            projection = self._projection(known, layout, train)
        parts = layout.parts()
        systems = self._systems(known, layout, train, projection, parts)
        mean_in, mean_out = systems[0].mean_in, systems[0].mean_out
        ridges = [10.0**decade for decade in self.config.decades]
        for weights in zip(*(system.weights(ridges) for system in systems), strict=True):
            weight = weights[0]
            if len(parts) > 1:
                weight = weight.new_zeros(len(mean_in), layout.outputs)
                mean_out = weight.new_zeros(layout.outputs)
                for (_, outputs), system, own in zip(parts, systems, weights, strict=True):
                    weight[:, outputs] = own
                    mean_out[outputs] = system.mean_out - (system.mean_in - mean_in) @ own
            yield _Solution(layout, projection, mean_in, mean_out, weight)

    def _systems(
        self, known: Knowledge, layout: Layout, train: Tensor, projection: _Projection | None,
        parts: list[tuple[Tensor, Tensor]],
    ) -> list[_System]:
        """The normal equations of each part's outputs, over the positions that know them."""
        shift_in, shift_out = self._first_means(known, layout, train, projection)
        known_by, group = torch.stack([at for at, _ in parts]).unique(dim=1, return_inverse=True)
        sums = [_Sums.none(shift_in, shift_out) for _ in known_by.T]
        for inputs, targets in self._rows(known, layout, train):
            inputs = inputs if projection is None else projection(inputs)
            inputs, targets = inputs - shift_in, targets - shift_out
            if len(sums) == 1:
                sums[0].add(inputs, targets)
                continue
            of = group.repeat(len(inputs) // layout.positions).to(inputs.device)
            for number, own in enumerate(sums):
                own.add(inputs[of == number], targets[of == number])
        if len(sums) == 1:
            return [sums[0].system(shift_in, shift_out, standardise=projection is None)]
        return [
            functools.reduce(_Sums.plus, itertools.compress(sums, groups)).of(outputs).system(
                shift_in, shift_out[outputs], standardise=projection is None)
            for (_, outputs), groups in zip(parts, known_by.tolist(), strict=True)
        ]

    def _first_means(
        self, known: Knowledge, layout: Layout, train: Tensor, projection: _Projection | None
    ) -> tuple[Tensor, Tensor]:
        """Means of inputs and targets over a first part, against cancellation in the squares."""
        inputs, targets = next(self._rows(known, layout, train))
        inputs = inputs if projection is None else projection(inputs)
        return inputs.mean(0), targets.mean(0)

    def _projection(self, known: Knowledge, layout: Layout, train: Tensor) -> _Projection:
        """An orthonormal basis of what the examples' standardised inputs span.

        A weight outside of it would change no answer on an example and only cost, so ridge
        regression has none there.
        """
        total = len(train) * layout.positions
        affordable = _BASIS_BYTES // (8 * (layout.width + layout.outputs))
        most = max(1, min(total, _MOST_INPUTS, affordable))
        generator = torch.Generator().manual_seed(self.config.seed)
        chosen = torch.zeros(total, dtype=torch.bool)
        chosen[torch.randperm(total, generator=generator)[:most]] = True
        shift, _ = self._first_means(known, layout, train, None)
        sums, squares, seen, picked = shift * 0.0, shift * 0.0, 0, []
        for inputs, _ in self._rows(known, layout, train):
            picked.append(inputs[chosen[seen : seen + len(inputs)].to(inputs.device)])
            sums += (inputs - shift).sum(0)
            squares += (inputs - shift).square().sum(0)
            seen += len(inputs)
        mean = sums / seen
        variance = squares / seen - mean**2
        _check_finite(variance)
        mean = mean + shift
        gain = _gain(variance, mean)
        rows = (torch.cat(picked) - mean) * gain
        return _Projection(mean, torch.linalg.qr(rows.T).Q * gain.unsqueeze(1))


def _chunk(layout: Layout) -> int:
    """How many images at once, by the bytes of their inputs and targets."""
    image = 8 * layout.positions * (layout.width + layout.outputs)
    return max(1, min(_CHUNK, _CHUNK_BYTES // image))


def _gain(variance: Tensor, mean: Tensor) -> Tensor:
    """`1 / std` of each input; 0 of one that varies by no more than rounding makes it."""
    noise = (torch.finfo(torch.float32).eps * mean) ** 2
    return torch.where(variance > noise, variance.clamp_min(0.0).rsqrt(), 0.0)


def _check_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise InputError(
            "Expected finite features of the attacker's images, came NaN or infinity. Look at "
            "the edge's weights and at the normalisation of its input."
        )

