"""The table of the surrogate gap, from rows that can be read off."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def figures(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("gap_figures")


def row(believed: float, mse: float, *, split: str = "layer4", **more: Any) -> dict[str, Any]:
    return {
        "method": "with-patrol", "defence": "patrol", "recipe": "longer-whole", "strength": 10.0,
        "split": split, "train_seed": 0, "attack": "inverse_network_ssim", "times_as_long": 1,
        "attacker_images": 10_000, "victim_images": 1_000, "plateau": True, "ssim": 0.3,
        "surrogate_mse": believed, "surrogate_ssim": 0.25, "mse": mse, **more,
    }


def table(figures: ModuleType, **records: list[dict[str, Any]]) -> str:
    return str(figures.surrogate_gap([({"rows": rows}, f"measured in {name}")
                                      for name, rows in records.items()]))


def test_a_model_counts_once_under_the_attack_that_gets_closest(figures: ModuleType) -> None:
    text = table(figures,
                 strongest=[row(0.04, 0.05), row(0.04, 0.03, times_as_long=3, plateau=False)],
                 seeds=[row(0.04, 0.05), row(0.05, 0.05, train_seed=3)])
    lines = [line for line in text.splitlines() if line.startswith("| PATROL")]
    assert [line.split(" | ")[6] for line in lines] == ["1.33", "1.00"]
    assert "3 times as long *" in lines[0] and figures.STILL in text
    assert "in 1 of 2 rows; of those deeper than layer3 in 1 of 2." in text
    assert text.endswith("measured in strongest measured in seeds")


def test_only_the_same_uploads_of_all_images_are_compared(figures: ModuleType) -> None:
    text = table(figures, seeds=[
        row(0.04, 0.04), row(0.04, 0.01, silenced=True), row(0.04, 0.01, victim_images=256),
        row(0.04, 0.01, surrogate_ssim=None),
        row(0.05, 0.025, split="layer3", method="patrol", defence=None, recipe=None),
    ])
    lines = [line for line in text.splitlines() if line.startswith("| PATROL")]
    assert [line.split(" | ")[6] for line in lines] == ["2.00", "1.00"], "the shallow cut first"
    assert "in 1 of 2 rows; of those deeper than layer3 in 1 of 1." in text
    assert figures.STILL not in text


def test_without_rows_it_says_so(figures: ModuleType) -> None:
    assert table(figures, seeds=[]) == "Not measured yet."
