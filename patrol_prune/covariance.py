"""The covariance of features, through whichever side is smaller, images or dimensions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from patrol_prune.symmetric import positive_eigenvalues

_CHUNK_VALUES = 1 << 24
_FEWEST_IMAGES = 10
"""For an estimate of how much the entries of their covariance vary."""


def gaussian_information(z: Tensor, sigma: float, shrinkage: float) -> float:
    """`1/2 log det(I + C / sigma^2)` in nats, with `C = (1 - r) S + r diag(S)`.

    `S` is the sample covariance (over N - 1) of `z [N, k]` and `r` the shrinkage. With
    `M = I + r diag(S) / sigma^2` and `Z` the centred `z / (sigma sqrt(N - 1))`:

        log det = log det M + log det(I + (1 - r) Z M^-1 Z^T)

    and the last determinant is the same for the `N x N` and the `k x k` matrix. It never falls
    as `r` grows: log det is concave, and largest at the diagonal (Hadamard). In float64; good
    as long as the largest variance is below about `1e14 sigma^2`.
    """
    variances = _variances(z) / sigma**2
    target = shrinkage * variances
    information = 0.5 * float(torch.log1p(target).sum())
    if shrinkage < 1.0:
        weights = ((1.0 - shrinkage) / ((len(z) - 1) * sigma**2 * (1.0 + target))).sqrt()
        eigenvalues = positive_eigenvalues(gram(z, weights))
        information += 0.5 * float(torch.log1p(eigenvalues).sum())
    return information


def gram(z: Tensor, weights: Tensor) -> Tensor:
    """The smaller of `Y Y^T [N, N]` and `Y^T Y [k, k]`, `Y` the centred `z [N, k]` times `weights`.

    Args:
        z: any floating point type; summed in float64, a chunk at a time.
        weights: `[k]`, float64, one factor per column.
    """
    n, k = z.shape
    small = min(n, k)
    total = torch.zeros(small, small, dtype=torch.float64, device=z.device)
    if k <= n:
        mean = torch.cat([c.double().mean(0) for c in _column_chunks(z)])
        for rows in torch.split(z, max(1, _CHUNK_VALUES // k)):
            y = (rows.double() - mean) * weights
            total += y.T @ y
        return total
    for columns, factor in zip(_column_chunks(z), _column_chunks(weights[None], n), strict=True):
        y = _centred(columns) * factor
        total += y @ y.T
    return total


def shrinkage_intensity(z: Tensor) -> float:
    """Share of the diagonal, on [0, 1], with the least expected squared error of the covariance.

    `sum_{i!=j} Var(s_ij) / sum_{i!=j} s_ij^2` over the entries of the sample covariance of
    `z [N, k]` (Schafer and Strimmer 2005, target D). An estimate: the Gram matrix of the smaller
    side is all it needs. All of the diagonal for fewer than 10 images.
    """
    n = len(z)
    if n < _FEWEST_IMAGES or z.shape[1] < 2:  # the variance of s_ij cannot be told; 0 for n = 2
        return 1.0
    ones = torch.ones(z.shape[1], dtype=torch.float64, device=z.device)
    whole = float(gram(z, ones).square().sum()) / n**2
    diagonal = fourth = 0.0
    norms = torch.zeros(n, dtype=torch.float64, device=z.device)
    for columns in _column_chunks(z):
        squares = _centred(columns).square()
        norms += squares.sum(1)
        diagonal += float(squares.mean(0).square().sum())
        fourth += float(squares.square().sum())
    products = float(norms.square().sum())
    off_diagonal = (n / (n - 1)) ** 2 * (whole - diagonal)
    variance = n / (n - 1) ** 3 * (products - fourth - n * (whole - diagonal))
    if off_diagonal <= 0:
        return 1.0
    return min(1.0, max(0.0, variance / off_diagonal))


def _variances(z: Tensor) -> Tensor:
    """Sample variance of each column, float64 `[k]`."""
    return torch.cat([c.double().var(0) for c in _column_chunks(z)])


def _centred(columns: Tensor) -> Tensor:
    columns = columns.double()
    return columns - columns.mean(0)


def _column_chunks(z: Tensor, rows: int | None = None) -> Iterator[Tensor]:
    yield from torch.split(z, max(1, _CHUNK_VALUES // (rows or len(z))), dim=1)
