"""A few rendered vehicles, in the settings of the vehicles' script."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def few_vehicles(script: dict[str, Any], runs: Path, **more: Any) -> Any:
    """The settings, with those of `more`; `script` holds the script's module `run`."""
    return script["run"].build(script["run"].ReidRun, {
        "runs": str(runs), "rendered": {"identities": 32, "cameras": 3, "images_per_camera": 2},
        "batch": {"identities": 4, "images_each": 3},
        "attackers": {"victims": 8, "reader_share": 0.4}, **more,
    }, "the test")
