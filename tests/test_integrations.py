"""The scripts in `integrations/` run as their README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
