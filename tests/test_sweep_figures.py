"""The table of every defence over its strength, from two records that overlap."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

SETTINGS = {"sweep_epochs": 2, "sweep_images": 100, "finetune_epochs": 5, "train_images": 200,
            "alpha": 0.01}


def row(defence: str, strength: float, ssim: float, **more: Any) -> dict[str, Any]:
    return {"method": f"with-{defence}", "defence": defence, "strength": strength, "recipe": None,
            "split": "layer3", "attack": "inverse_network_ssim", "accuracy": 0.8, "ssim": ssim,
            "ssim_worst5": 0.9, "mse": 0.01, "edge_macs": 10**7, "feature_bytes": 2**14,
            "plateau": True, "base": "new", **more}


@pytest.fixture
def figures(import_benchmark: Callable[[str], ModuleType],
            monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = import_benchmark("sweep_figures")
    records = {
        "strongest": [
            row("patrol", 10.0, 0.5), row("patrol", 10.0, 0.55, times_as_long=3, plateau=False),
            row("patrol", 10.0, 0.45, recipe="longer"), row("none", 0.0, 0.7),
            row("patrol", 10.0, 0.1, split="layer4"), row("patrol", 10.0, 0.2, attack="rmle"),
        ],
        "frontier": [row("patrol", 10.0, 0.6), row("patrol", 40.0, 0.65),
                     row("nopeek", 1.0, 0.75, base="earlier")],
    }
    missing = {"strongest": ["with-a", "with-b", "with-c"], "frontier": ["with-b", "with-c"]}
    monkeypatch.setattr(module, "load", lambda name: {
        "rows": records[name], "settings": SETTINGS, "missing": missing[name]})
    return module


def test_what_was_measured_again_stands_once_and_the_rest_is_marked(figures: ModuleType) -> None:
    told = figures.sweep("measured here")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in told.splitlines() if line.startswith("|")][2:]
    name = "PATROL's fine-tuning"
    assert [(line[0], line[2], line[4], line[-1]) for line in lines] == [
        ("none (trained on)", "0", "0.700", "–"), (name, "2", "0.500", "0.550 *"),
        (f"{name} ¤", "2", "0.650", "–"), (f"{name}, three times as long", "6", "0.450", "–"),
        ("NoPeek †", "2", "0.750", "–"),
    ]
    assert told.endswith("measured here") and "2 points that" in told
