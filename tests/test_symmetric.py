"""Eigenvalues where LAPACK's first routine does not converge."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from patrol_prune.covariance import gaussian_information
from patrol_prune.defences.bottleneck import principal_directions
from patrol_prune.symmetric import positive_eigenvalues, positive_eigh


@pytest.fixture(params=[False, True], ids=["converges", "does not"])
def converges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrix: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    if request.param:
        monkeypatch.setattr(torch.linalg, "eigh", fail)
        monkeypatch.setattr(torch.linalg, "eigvalsh", fail)


def rows(count: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, columns, generator=generator, dtype=torch.float64)


@pytest.mark.usefixtures("converges")
class TestPositiveEigh:
    @pytest.mark.parametrize("rank", [8, 3, 0])
    def test_gives_the_matrix_back_in_ascending_order(self, rank: int) -> None:
        y = rows(rank, 8)
        matrix = y.T @ y
        values, vectors = positive_eigh(matrix)
        assert (values >= 0).all() and (values.diff() >= -1e-9).all()
        assert int((values > 1e-9).sum()) == rank
        assert_close(vectors @ vectors.T, torch.eye(8, dtype=torch.float64))
        assert_close((vectors * values) @ vectors.T, matrix)
        assert_close(positive_eigenvalues(matrix), values, atol=1e-12, rtol=1e-9)

    def test_principal_directions_are_the_same(self) -> None:
        scales = torch.tensor([1.0, 5.0, 0.0, 2.0])
        directions, _ = principal_directions(rows(400, 4).float() * scales, 2)
        assert directions.abs().argmax(0).tolist() == [1, 3]

    def test_information_is_the_same(self) -> None:
        z = rows(50, 3)
        expected = 0.5 * torch.logdet(torch.eye(3, dtype=torch.float64) + torch.cov(z.T) / 0.04)
        assert gaussian_information(z, 0.2, 0.0) == pytest.approx(float(expected), rel=1e-9)
