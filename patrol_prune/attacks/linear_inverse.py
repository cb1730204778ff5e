"""The best linear decoder from a neighbourhood of features to the pixels behind it, in closed form.

A black-box attack that takes seconds and has no training that could fail. At a shallow cut it is
hard to beat: the features of one convolution determine the pixels below them linearly, and least
squares finds that map to the last bit, where a trained decoder stops at 30 to 40 dB.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patrol_prune.attacks.base import FitRecord, Knowledge
from patrol_prune.attacks.feature_layout import Layout
from patrol_prune.errors import InputError
from patrol_prune.metrics import check_pixels, mse

_CHUNK = 128
_CHUNK_BYTES = 256 << 20
_BASIS_BYTES = 2 << 30
_MOST_INPUTS = 4096


@dataclass(frozen=True)
class LinearInverseConfig:
    """Settings of `LinearInverse`.

    Args:
        kernel: side of the neighbourhood of features that a block of pixels is predicted from;
            reduced to 1 where it would give more than 2,304 inputs.
        decades: the ridge weights that are tried, powers of ten relative to the mean variance of
            the inputs.
        holdout: share of the attacker's images that only chooses the weight.
        largest_rows: positions that enter the normal equations at most; images beyond that are
            left out.
        seed: of the held-out choice.
    """

    kernel: int = 3
    decades: tuple[float, ...] = (-12.0, -9.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0)
    holdout: float = 0.1
    largest_rows: int = 300_000
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
class _Solution:
    """`pixels = (inputs - mean_in) @ weight + mean_out`."""

    layout: Layout
    mean_in: Tensor
    mean_out: Tensor
    weight: Tensor = field(repr=False)

    def __call__(self, z: Tensor) -> Tensor:
        rows = (self.layout.inputs(z) - self.mean_in) @ self.weight + self.mean_out
        return self.layout.images(rows, len(z)).clamp(0.0, 1.0).float()


class LinearInverse:
    """Ridge regression `min_W mean ||W patch(z) - block(x)||^2 + lambda ||W||^2`.

    `patch(z)` is the `kernel x kernel` neighbourhood of features at a position, `block(x)` the
    pixels behind that position. Features that are no map (tokens, vectors) are taken whole. The
    weight `lambda` is the one with the smallest error on held-out images. Where the edge is random,
    every image enters with a fresh draw.
    """

    def __init__(self, config: LinearInverseConfig | None = None, *, device: str = "cpu") -> None:
        self.config = config or LinearInverseConfig()
        self.device = torch.device(device)
        self.held_out: Tensor | None = None
        self._solution: _Solution | None = None

    def fit(self, known: Knowledge) -> FitRecord:
        """Solve for every ridge weight and keep the best on held-out images.

        Raises:
            InputError: neither features nor an edge to query, fewer than 20 images, or pixels
                outside [0, 1].
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
        layout = self._layout(tuple(self._features(known, order[:1]).shape[1:]),
                              tuple(known.pixels.shape[1:]))
        positions = layout.grid[0] * layout.grid[1]
        train = train[: max(20, self.config.largest_rows // positions)]
        candidates = self._solve(known, layout, train)
        z, x = self._features(known, held_out), known.pixels[held_out]
        history = []
        best: tuple[float, _Solution] | None = None
        for solution in candidates:
            guess = torch.cat([solution(part.to(self.device)).cpu() for part in z.split(_CHUNK)])
            history.append(float(mse(x, guess).mean()))
            if best is None or history[-1] < best[0]:
                best = (history[-1], solution)
        assert best is not None
        self._solution = best[1]
        mean = known.pixels[train].mean(0)
        floor = float(mse(x, mean.expand_as(x)).mean())
        choice = history.index(best[0])
        return FitRecord(
            history=tuple(history), train_history=(), initial_loss=floor, mean_image_loss=floor,
            best_epoch=choice, plateau=True, extensions=0, seconds=time.perf_counter() - start,
            chosen={"ridge_decade": self.config.decades[choice], "kernel": layout.kernel},
        )

    @torch.no_grad()
    def reconstruct(self, z: Tensor) -> Tensor:
        """Features `[N, ...]` to float32 pixels `[N, C, H, W]` on [0, 1], on z's device."""
        if self._solution is None:
            raise InputError("This attack has not been trained. Call fit(known) first.")
        return torch.cat([self._solution(part.to(self.device).float()).to(z.device)
                          for part in z.split(_CHUNK)])

    @torch.no_grad()
    def _features(self, known: Knowledge, index: Tensor) -> Tensor:
        if known.z is not None and not (known.random_edge and known.edge is not None):
            return known.z[index].float()
        assert known.edge is not None
        return torch.cat([known.edge(known.pixels[part]).float() for part in index.split(_CHUNK)])

    def _rows(self, known: Knowledge, layout: Layout, index: Tensor
              ) -> Iterator[tuple[Tensor, Tensor]]:
        for part in index.split(_CHUNK):
            z = self._features(known, part).to(self.device)
            yield layout.inputs(z), layout.targets(known.pixels[part].float().to(self.device))

    @torch.no_grad()
    def _solve(self, known: Knowledge, layout: Layout, train: Tensor) -> Iterator[_Solution]:
        """One solution for each ridge weight, relative to the mean variance of the inputs.

        Inputs that never change (dead channels, what lies outside of a small map) stay out.
        """
        first_in, first_out = next(self._rows(known, layout, train[:_CHUNK]))
        shift_in, shift_out = first_in.mean(0), first_out.mean(0)
        gram = first_in.new_zeros(first_in.shape[1], first_in.shape[1])
        cross = first_in.new_zeros(first_in.shape[1], first_out.shape[1])
        sum_in, sum_out, count = shift_in * 0.0, shift_out * 0.0, 0
        for inputs, targets in self._rows(known, layout, train):
            inputs, targets = inputs - shift_in, targets - shift_out
            gram.addmm_(inputs.T, inputs)
            cross.addmm_(inputs.T, targets)
            sum_in += inputs.sum(0)
            sum_out += targets.sum(0)
            count += len(inputs)
        mean_in, mean_out = sum_in / count, sum_out / count
        gram = gram / count - torch.outer(mean_in, mean_in)
        cross = cross / count - torch.outer(mean_in, mean_out)
        if not bool(gram.isfinite().all()):
            raise InputError(
                "Expected finite features of the attacker's images, came NaN or infinity. Look at "
                "the edge's weights and at the normalisation of its input."
            )
        alive = gram.diagonal() > 0
        gram, cross = gram[alive][:, alive], cross[alive]
        scale = gram.diagonal().mean() if len(gram) else gram.new_zeros(())
        ridges = [float(10.0**decade * scale) for decade in self.config.decades]
        for part in ridge_solutions(gram, cross, ridges):
            weight = part.new_zeros(len(alive), part.shape[1])
            weight[alive] = part
            yield _Solution(layout, mean_in + shift_in, mean_out + shift_out, weight)


def ridge_solutions(gram: Tensor, cross: Tensor, ridges: Sequence[float]) -> Iterator[Tensor]:
    """`(gram + ridge I)^-1 cross` for each ridge; the matrix is factorised once if that succeeds.

    Args:
        gram: symmetric and positive semidefinite `[M, M]`, float64.
        cross: `[M, K]`.
        ridges: of at least 0.
    """
    tiny = torch.finfo(torch.float64).tiny
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # LAPACK's routine may fail where many eigenvalues are alike
        for ridge in ridges:
            eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            yield torch.linalg.solve(gram + (ridge + tiny) * eye, cross)
        return
    values = values.clamp_min(0.0)
    projected = vectors.T @ cross
    for ridge in ridges:
        yield vectors @ (projected / (values + ridge + tiny).unsqueeze(1))

