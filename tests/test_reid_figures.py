"""The goals of the vehicle tables, told from rows whose verdict can be seen by eye."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def figures(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("reid_figures")


def row(method: str, **more: Any) -> dict[str, Any]:
    return {"method": method, "map": 0.8, "ssim": 0.6, "floor_ssim": 0.2, "plates_rate": 0.1,
            "characters_rate": 0.5, "characters_chance": 0.05, **more}


def test_each_goal_is_told_by_its_own_number(figures: ModuleType) -> None:
    rows = [row("dense"), row("taylor"), row("patrol", map=0.781, ssim=0.3, characters_rate=0.1)]
    assert figures.verdict(rows).count(": met") == 3
    for worse, name in (({"map": 0.779}, "mAP within"), ({"ssim": 0.31}, "SSIM at most"),
                        ({"characters_rate": 0.11}, "characters read")):
        rows[2] = row("patrol", **{"map": 0.781, "ssim": 0.3, "characters_rate": 0.1, **worse})
        goals = figures.verdict(rows).split("Goals: ")[1].split("; ")
        assert [name in goal for goal in goals] == [": not met" in goal for goal in goals]


def test_a_goal_below_the_floor_is_called_so(figures: ModuleType) -> None:
    rows = [row("dense"), row("taylor", ssim=0.3), row("patrol", ssim=0.25)]
    assert "0.150, which lies below the floor" in figures.verdict(rows)
    rows = [row("dense"), row("taylor"), row("patrol")]
    assert "below the floor" not in figures.verdict(rows)


def test_sets_without_plates_have_no_goals(figures: ModuleType) -> None:
    rows = [row(m, plates_rate=None, characters_rate=None) for m in ("dense", "taylor", "patrol")]
    assert "Goals" not in figures.verdict(rows)
