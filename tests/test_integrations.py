"""The scripts in `integrations/` run as their README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--image_size", "32", "--batches", "1", "--batch_size", "4", "--surrogate_steps", "1"]


def output_of(script: str, *flags: str) -> str:
    """What a script prints; it must end well."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "integrations" / script), *flags],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def edge_macs(told: str) -> list[tuple[float, float, float]]:
    """(before, after, budget) in millions of every model a script pruned."""
    found = re.findall(r"edge MACs ([\d.]+) M -> ([\d.]+) M, budget ([\d.]+) M", told)
    return [tuple(map(float, one)) for one in found]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    [],
    ["--global_pruning"],
    ["--global_pruning", "--isomorphic", "--round_to", "8"],
    ["--global_pruning", "--iterative_steps", "3"],
], ids=" ".join)
def test_torch_prunings_script_runs_with_patrols_importance(flags: list[str]) -> None:
    script = ROOT / "integrations" / "torch_pruning" / "prune.py"
    done = subprocess.run(
        [sys.executable, str(script), "--image_size", "32", *flags],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    before, after = map(float, re.findall(r"([\d.]+) M", done.stdout)[:2])
    assert 0.2 * before < after < 0.8 * before


@pytest.mark.slow
@pytest.mark.parametrize(("model", "at"), [
    ("resnet50", "layer2"), ("mobilenet_v3_small", "features.4"),
    ("densenet121", "features.transition1"),
])
def test_torchvisions_script_from_split_to_load(model: str, at: str, tmp_path: Path) -> None:
    told = output_of("torchvision/prune.py", "--model", model, "--at", at, "--out",
                     str(tmp_path), *SMALL)
    (before, after, budget), = edge_macs(told)
    assert 0.9 * budget <= after <= budget and abs(budget - before / 2) <= 0.1
    assert "same answers bit for bit" in told and "equals model(x)" in told
    assert {f.suffix for f in (tmp_path / "edge.patrol").iterdir()} >= {".safetensors", ".json"}


@pytest.mark.slow
def test_torchvisions_script_reads_a_folder_of_images(
    tmp_path: Path, write_folder: Callable[..., Path]
) -> None:
    folder = write_folder(tmp_path / "images", count=12)
    told = output_of("torchvision/prune.py", "--model", "resnet18", "--at", "layer2",
                     "--data", str(folder / "train"), "--boundary", "prune", *SMALL)
    features = re.search(r"uploaded feature \((\d+), .*\) -> \((\d+), ", told)
    assert features is not None and int(features[2]) < int(features[1])


@pytest.mark.slow
def test_timms_script_from_split_to_load() -> None:
    pytest.importorskip("timm")
    told = output_of("timm/prune.py", *SMALL)
    assert len(edge_macs(told)) == 3 and told.count("file checked") == 3
    for before, after, budget in edge_macs(told):
        assert 0.8 * budget <= after <= budget and abs(budget - before / 2) <= 0.1
