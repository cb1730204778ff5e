"""The tables of the Lipschitz term's forms."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def figures(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("lipschitz_figures")


def row(ssim: float, form: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "form": form, "alpha": 0.2 if form else 0.0, "beta": 0.0, "accuracy": 0.8, "ssim": ssim,
        "ssim_worst5": 0.9, "mse": 0.01, "attack": "inverse_network_ssim", "plateau": True,
        "victim_images": 1_000, "attacker_images": 10_000, "edge_macs": 10_000_000,
        "split": "layer3", "feature_bytes": 16_384, "floor_ssim": 0.185, "floor_ssim_worst5": 0.47,
        "constant_paper": 1.0, "constant_scale_free": 0.5, "constant_spectral": 20.0,
        "made_with": {"test_images": 1_000}, **more,
    }


def test_points_and_attacks_stand_in_tables_of_their_own(figures: ModuleType) -> None:
    rows = [row(0.7), row(0.8, "scale_free"), row(0.6, "scale_free", beta=10.0),
            row(0.5, attack="linear_inverse"), row(0.4, "scale_free", attack="linear_inverse"),
            row(0.3, attack="rmle", victim_images=256, plateau=False)]
    settings = {"sweep_epochs": 2, "sweep_images": 20_000}
    told = figures.lipschitz({"rows": rows, "settings": settings}, "Measured.")
    assert "| scale-free | 0.2 | 10 | 80.0% | 0.600 |" in told
    points, attacks = told.split("SSIM under more attacks:")
    assert "linear" not in points and "0.600" not in attacks
    assert "| 1,000 | 0.700 | 0.800 |" in attacks and "| 1,000 | 0.500 | 0.400 |" in attacks
    assert "| 256 | 0.300 * |" in attacks


def test_without_other_attacks_there_is_one_table(figures: ModuleType) -> None:
    settings = {"sweep_epochs": 2, "sweep_images": 20_000}
    assert "more attacks" not in figures.lipschitz(
        {"rows": [row(0.7), row(0.8, "paper")], "settings": settings}, "Measured.")
