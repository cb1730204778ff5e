"""The table of answers beside uploads: only the same attack on the same model is held against."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

KEY = "with-patrol@half-longest-whole-60-avgpool"


@pytest.fixture(scope="module")
def figures(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("answer_figures")


def upload(ssim: float, **more: Any) -> dict[str, Any]:
    return {
        "method": "with-patrol", "defence": "patrol", "recipe": "half-longest-whole",
        "strength": 60.0, "split": "avgpool", "train_seed": 1, "attack": "inverse_network_ssim",
        "times_as_long": 1, "attacker_images": 10_000, "victim_images": 1_000, "plateau": True,
        "ssim": ssim, "ssim_worst5": 0.5, "mse": 0.05, "silenced": False, **more,
    }


def test_answers_stand_beside_the_upload_under_the_same_attack(figures: ModuleType) -> None:
    answer = {"model": KEY, "train_seed": 1, "attack": "inverse_network_ssim", "ssim": 0.2,
              "ssim_worst5": 0.4, "mse": 0.06, "plateau": False, "attacker_images": 10_000}
    others = [upload(0.9, times_as_long=3), upload(0.8, silenced=True), upload(0.7, train_seed=0),
              upload(0.6, attack="linear_inverse"), upload(0.5, strength=30.0),
              upload(0.4, victim_images=256)]
    told = figures.answers({"rows": [answer]}, {"rows": [*others, upload(0.3)]}, "Measured.")
    assert "| 0.200 * | 0.300 | 0.400 / 0.500 | 0.0600 / 0.0500 |" in told
    assert figures.upload_of(answer, others) is None
    assert "0.200" not in figures.answers({"rows": [answer]}, {"rows": others}, "Measured.")
