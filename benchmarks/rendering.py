"""Pictures per second of the rendered sets, on one thread, by picture size.

`wall` is what a user waits for; on a machine that does other work it says little, so that the
process's own time is beside it. `render` draws; `write` draws, encodes and writes the files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write

from patrol_prune.vehicle_identities import (
    render_identity,
    sample_identity,
    sample_shot,
    write_vehicle_reid,
)
from patrol_prune.vehicles import render, sample_vehicle


def timed(what: str, size: int, work: Callable[[], int]) -> dict[str, Any]:
    """One row: pictures, and pictures per second of the wall's time and of the process's own."""
    wall, own = time.perf_counter(), time.process_time()
    count = work()
    wall, own = time.perf_counter() - wall, time.process_time() - own
    row = {"what": what, "size": size, "pictures": count,
           "per_second_wall": round(count / wall, 1), "per_second_process": round(count / own, 1)}
    print(row, flush=True)
    return row


def identities(size: int, count: int) -> int:
    """Draw vehicles with identities, 24 pictures each, over six cameras; nothing is written."""
    rng = random.Random(0)
    for i in range(count):
        if i % 24 == 0:
            identity = sample_identity(rng, "7H2")
        render_identity(identity, sample_shot(rng, i % 6), size)
    return count


def singles(size: int, count: int) -> int:
    """Draw vehicles of the demo."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        render(sample_vehicle(rng), size)
    return count


def written(size: int, count: int) -> int:
    """Write a whole set, 24 pictures of each vehicle."""
    with tempfile.TemporaryDirectory() as folder:
        root = write_vehicle_reid(Path(folder) / "set", identities=count // 24, size=size)
        return len(json.loads((root / "attributes.json").read_text())["files"])


def main() -> None:
    """Measure every size and write the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=960)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in options.sizes:
        count = options.pictures * 64 // size
        identities(size, 24)  # scenes are painted once per camera
        rows.append(timed("render identities", size, lambda: identities(size, count)))  # noqa: B023
        rows.append(timed("render vehicles", size, lambda: singles(size, count)))  # noqa: B023
        rows.append(timed("write vehicle re-id", size, lambda: written(size, count)))  # noqa: B023
    write("rendering", rows, load=[round(value, 1) for value in os.getloadavg()])


if __name__ == "__main__":
    main()
