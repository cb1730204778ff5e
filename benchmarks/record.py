"""What every benchmark writes: rows, and under which circumstances they were measured."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import patrol_prune

PACKAGES = ("torch", "torchvision", "torch-pruning", "fvcore", "torchmetrics", "accelerate")
ROOT = Path(__file__).resolve().parent
if Path(patrol_prune.__file__).resolve().parent != ROOT.parent / "patrol_prune":
    raise SystemExit("The package that would be measured is of another checkout than this script, "
                     f"and so the commit that is written down: set PYTHONPATH={ROOT.parent}.")


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that was measured, with `+changes` where the tree differs from it.

    `BENCHMARK_COMMIT` names it where the tree has moved on since the measurement began.
    """
    if named := os.environ.get("BENCHMARK_COMMIT"):
        return named
    here = dict(cwd=ROOT, capture_output=True, text=True, check=False)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **here).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], **here).stdout.strip()
    return (head or "unknown") + ("+changes" if dirty else "")


def command() -> str:
    """What was typed, without the folders of this machine."""
    given = (re.sub(r"""(?<![^\s"'=\[,])[/~](?:[^\s"',\]]*/)?""", "", a) for a in sys.argv[1:])
    return " ".join(["python", os.path.relpath(sys.argv[0], ROOT.parent), *given])


def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def record(benchmark: str, rows: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
    """The benchmark's object: circumstances first, rows last."""
    cores = os.cpu_count()
    return {
        "benchmark": benchmark,
        "command": command(),
        "commit": commit(),
        "date": date.today().isoformat(),
        "device": f"{cpu_name()}, {cores} cores",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **extra,
        "rows": rows,
    }


def write(benchmark: str, rows: list[dict[str, Any]], path: Path | None = None,
          **extra: Any) -> Path:
    """Write `results/<benchmark>.json` whole or not at all; returns where."""
    target = path or ROOT / "results" / f"{benchmark}.json"
    return save(record(benchmark, rows, **extra), target)


def save(content: dict[str, Any], target: Path) -> Path:
    """Write a record whole or not at all; returns where."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(target)
    return target
