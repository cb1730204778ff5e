"""Records of whole runs: whose rows replace whose, and what they say of how they were measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run that was made on another day and another machine."""
    numbers = {"edge_macs": 8, "edge_params": 4, "feature_bytes": 2, "accuracy": 0.4}
    score = {"attack": "inverse_network", "attack_seed": 0, "attacker_images": 9,
             "victim_images": 3, "ssim": 0.2, "ssim_worst5": 0.3, "psnr": 14.0, "mse": 0.04,
             "plateau": True, "trivial": False}
    summary = {
        "model": "small_resnet", "split": "layer2", "seed": 0, "dense": numbers,
        "pruned": numbers, "device": "cuda:7", "versions": {"torch": "1.0", "python": "3.9"},
        "config": {"data": "/photos", "runs": "/runs", "model": "small_resnet",
                   "privacy": {"alpha": 0.0}, "score": {"lip_weight": 0.0}},
    }
    audit = {
        "version": 1, "flags": [], "per_image": {}, "example_indices": [], "examples": {},
        "records": [{"subject": s, **score} for s in ("edge", "undefended", "floor")],
    }
    events = [{"time": 1_000_000_000.0, "event": "a"}, {"time": 1_000_000_120.0, "event": "b"}]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return tmp_path


def test_a_copied_record_tells_of_the_run_and_not_of_who_copies_it(
    import_benchmark: Callable[[str], ModuleType], finished: Path
) -> None:
    found = import_benchmark("grocery").content(finished)
    assert found["date"].startswith("2001-09-0") and found["minutes"] == 2.0
    assert (found["device"], found["versions"]) == ("cuda:7", {"torch": "1.0", "python": "3.9"})
    assert not {"commit", "threads"} & found.keys()
    assert not {"data", "runs"} & found["settings"].keys()
    assert [r["method"] for r in found["rows"]] == ["dense", "patrol-adversarial"]
    told = import_benchmark("figures").circumstances({**found, "command": "python x --run r"})
    assert told == f"Measured {found['date']} on cuda:7, torch 1.0; `python x`."

    summary = json.loads((finished / "summary.json").read_text())
    del summary["device"], summary["versions"]
    (finished / "summary.json").write_text(json.dumps(summary))
    found = import_benchmark("grocery").content(finished)
    assert not {"commit", "device", "versions"} & found.keys()
    told = import_benchmark("figures").circumstances({**found, "command": "python x --run r"})
    assert told == f"Measured {found['date']}; `python x`."
