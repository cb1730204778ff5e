"""Eigenvalues of symmetric matrices without negative ones, also where LAPACK's first routine fails.

The divide-and-conquer routine behind `torch.linalg.eigh` may not converge where many eigenvalues
are alike, as with the covariance of features that hold constant channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def positive_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors as columns of a positive semidefinite matrix.

    What rounding made negative among the values is 0. The singular value decomposition, which is
    the same for such a matrix, stands in where `eigh` does not converge.

    Args:
        matrix: `[M, M]`, symmetric and finite.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        vectors, values, _ = torch.linalg.svd(matrix)
        values, vectors = values.flip(-1), vectors.flip(-1)
    return values.clamp_min(0.0), vectors


def positive_eigenvalues(matrix: Tensor) -> Tensor:
    """The values of `positive_eigh` alone, which takes a fraction of the time."""
    try:
        values = torch.linalg.eigvalsh(matrix)
    except torch.linalg.LinAlgError:
        values = torch.linalg.svdvals(matrix).flip(-1)
    return values.clamp_min(0.0)
