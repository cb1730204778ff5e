"""What the frontier's best rows give when everything is trained anew with other seeds.

    python benchmarks/frontier.py --data ~/data/cifar10 --work ~/frontier-1 --seed 1 \\
        --only '["with-none@longer-0-layer4", "with-patrol@longer-10-layer4"]'
    python benchmarks/seeds.py --works '["~/frontier", "~/frontier-1", "~/frontier-2"]'
    python benchmarks/seeds.py --works '["~/frontier-3"]' --earlier true

A training seed parts the images anew and trains another dense model, another pruned one and other
defences; each has a working directory of `frontier.py` of its own. This gathers their rows, and
those of other defences on the same pruned model where a seed has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from frontier_methods import ATTACKED_LONGER, CONTROL, DEEPER_BEST, MET_BY_OTHERS
from jsonargparse import auto_cli
from record import ROOT, commit, write

CONTROLS = (f"{CONTROL}-ssim-0", "with-none@half-longer-0-avgpool-ssim-0")
"""The pruned models trained on without attackers; a working directory has one of them at least."""
BEHIND_THE_POOLING = (
    "with-none@longer-0-avgpool", "with-patrol@longer-10-avgpool",
    "with-feature_dropout@longer-0.5-avgpool", "with-gaussian_noise@longer-1-avgpool",
    "with-none@half-longer-0-avgpool", "with-patrol@half-longer-10-avgpool",
)
WHERE_THERE = tuple(
    f"{key}-{attack}-0" for key in (DEEPER_BEST, *ATTACKED_LONGER, *BEHIND_THE_POOLING)
    for attack in ("ssim", "long", "silenced")
) + tuple(f"{key}-{attack}-0" for key in MET_BY_OTHERS
          for attack in ("white_strong", "linear_inverse", "unet_ssim", "transposed_ssim",
                         "whitened_ssim"))
RESULTS = ROOT / "results" / "seeds.json"


def gathered(works: tuple[Path, ...]) -> list[dict[str, Any]]:
    """The rows of every working directory, its control among them, and no training seed twice."""
    rows: list[dict[str, Any]] = []
    seeds: set[int] = set()
    for work in works:
        rows_there = work.expanduser() / "rows"
        if not any((rows_there / f"{step}.json").exists() for step in CONTROLS):
            raise SystemExit(f"Expected the row {' or '.join(CONTROLS)} in {work.name}, came "
                             "none: run frontier.py there first.")
        found: list[dict[str, Any]] = []
        for step in dict.fromkeys((*CONTROLS, *WHERE_THERE)):
            path = rows_there / f"{step}.json"
            found += json.loads(path.read_text()) if path.exists() else []
        seed = found[0]["train_seed"]
        if any(row["train_seed"] != seed for row in found) or seed in seeds:
            raise SystemExit(f"Expected one training seed in each directory, and each once; came "
                             f"{sorted({row['train_seed'] for row in found})} in {work.name}.")
        seeds.add(seed)
        rows += found
    return rows


def with_earlier(rows: list[dict[str, Any]], earlier: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, and the earlier record's of other training seeds or cuts, with its device."""
    now = {(row["train_seed"], row["split"]) for row in rows}
    kept = [{"device": earlier["device"], **row} for row in earlier["rows"]
            if (row["train_seed"], row["split"]) not in now]
    return [*kept, *rows]


def main(works: tuple[Path, ...], earlier: bool = False) -> None:
    """Write `results/seeds.json`.

    Args:
        works: working directories of `frontier.py`, one for each training seed.
        earlier: keep the record's rows of other training seeds or cuts.
    """
    rows = gathered(works)
    if earlier:
        rows = with_earlier(rows, json.loads(RESULTS.read_text()))
    commits = dict.fromkeys(row["made_with"]["commit"] for row in rows)
    print(write("seeds", rows, commit=", ".join(commits) or commit()))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
