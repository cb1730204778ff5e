"""Ridge regression for every weight at once, and with it answers that lie in straight lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

MOST_ROWS = 4_096
DECADES = (-5, -4, -3, -2, -1, 0, 1, 2)
"""Exponents of the ridge weights that are tried, relative to the variance of an input."""


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


class Standardised(nn.Module):
    """Subtract and multiply by constants: inputs on one scale, `[N, D]` to the same."""

    mean: Tensor
    gain: Tensor

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", inputs.mean(0))
        std = inputs.std(0)
        usual = std[std > 0].median() if bool((std > 0).any()) else std.new_zeros(())
        self.register_buffer("gain", 1 / (std + 1e-3 * usual + 1e-12))

    def forward(self, x: Tensor) -> Tensor:
        """`(x - mean) * gain`."""
        scaled: Tensor = (x - self.mean) * self.gain
        return scaled


class LinearScores(nn.Module):
    """`standardised(x) @ weight + offset`, `[N, D]` to `[N, K]`."""

    weight: Tensor
    offset: Tensor

    def __init__(self, standardised: Standardised, weight: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.standardised = standardised
        self.register_buffer("weight", weight)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every answer."""
        scores: Tensor = self.standardised(x) @ self.weight + self.offset
        return scores


def linear_scores(
    inputs: Tensor, targets: Tensor, decades: Sequence[int] = DECADES, *, seed: int = 0,
    most_rows: int = MOST_ROWS,
) -> Iterator[LinearScores]:
    """Ridge regression of the targets on standardised inputs, one for each weight `10^decade`.

    The smaller of the two systems is solved, of as many unknowns as inputs or as examples; where
    both are over `most_rows`, so many examples are drawn by the seed.

    Args:
        inputs: `[N, D]`.
        targets: `[N, K]`, a row of zeros and ones for classes.
        decades: exponents of the ridge weights.
        seed: of that draw.
        most_rows: of the system.
    """
    if min(inputs.shape) > most_rows:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(inputs), generator=generator)[:most_rows].to(inputs.device)
        inputs, targets = inputs[chosen], targets[chosen]
    standardised = Standardised(inputs)
    x, y = standardised(inputs).double(), targets.double()
    offset = y.mean(0)
    y = y - offset
    ridges = [10.0**decade for decade in decades]
    wide = x.shape[1] > len(x)
    gram, cross = (x @ x.T, y) if wide else (x.T @ x, x.T @ y)
    for solution in ridge_solutions(gram / len(x), cross / len(x), ridges):
        weight = x.T @ solution if wide else solution
        yield LinearScores(standardised, weight.to(inputs.dtype), offset.to(inputs.dtype))
