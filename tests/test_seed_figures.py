"""The table of training seeds: means that can be done by hand, and directories that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def modules(import_benchmark: Callable[[str], ModuleType]) -> tuple[ModuleType, ModuleType]:
    return import_benchmark("seeds"), import_benchmark("seed_figures")


def row(defence: str, seed: int, ssim: float, accuracy: float, times: int = 1) -> dict[str, Any]:
    return {
        "method": f"with-{defence}", "defence": defence, "strength": 10.0, "train_seed": seed,
        "dense_accuracy": 0.9, "accuracy": accuracy, "ssim": ssim, "ssim_worst5": 0.6,
        "floor_ssim": 0.2, "edge_macs": 10_000_000, "feature_bytes": 1024, "split": "layer4",
        "victim_images": 10, "attack": "inverse_network_ssim", "times_as_long": times,
        "plateau": times > 1,
        "made_with": {"commit": "abc"},
    }


def test_means_spreads_and_pairs(modules: tuple[ModuleType, ModuleType]) -> None:
    rows = [row("none", 0, 0.40, 0.88), row("none", 1, 0.50, 0.86),
            row("patrol", 0, 0.20, 0.87), row("patrol", 1, 0.30, 0.84),
            row("patrol", 1, 0.34, 0.84, times=3)]
    page = modules[1].seeds({"rows": rows}, "measured here")
    lines = [line for line in page.splitlines() if line.startswith("| mean")]
    assert len(lines) == 2
    assert "0.450 ± 0.071" in lines[0] and "3.00 ± 1.41" in lines[0]
    assert "0.250 ± 0.071" in lines[1] and "| 0.340 |" in lines[1]
    assert "0.50 to 0.60 times the SSIM, for 1.00 to 2.00 points" in page
    assert "0.68 times" in page  # 0.34 / 0.50, of the one seed that was attacked for longer
    assert page.count("| no |") == 4 and page.count("| yes |") == 1
    assert page.endswith("measured here")


def test_a_directory_without_its_rows_or_with_a_seed_twice_is_refused(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    seeds = modules[0]
    for name in ("first", "again"):
        (tmp_path / name / "rows").mkdir(parents=True)
        for step in seeds.STEPS:
            made = json.dumps([row("none", 0, 0.4, 0.8)])
            (tmp_path / name / "rows" / f"{step}.json").write_text(made)
    assert len(seeds.gathered((tmp_path / "first",))) == len(seeds.STEPS)
    with pytest.raises(SystemExit, match="each once"):
        seeds.gathered((tmp_path / "first", tmp_path / "again"))
    with pytest.raises(SystemExit, match="came none"):
        seeds.gathered((tmp_path / "missing",))
