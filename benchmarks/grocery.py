"""The record of one `patrol-prune run` on the Grocery Store photographs.

    patrol-prune run --data grocery128 --model mobilenet_v3_small ... --name grocery
    python benchmarks/grocery.py --run runs/grocery

Reads what the run left (`summary.json`, `audit.json`, `events.jsonl`) and writes
`results/grocery.json`; nothing is measured here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from record import write

from patrol_prune.audit_report import AuditReport


@dataclass(frozen=True)
class Grocery:
    """Where the finished run lies.

    Attributes:
        run: the run's folder.
    """

    run: Path


def rows(run: Path) -> list[dict[str, Any]]:
    summary = json.loads((run / "summary.json").read_text())
    audit = AuditReport.from_json(run / "audit.json")
    config = summary["config"]
    lipschitz = config["privacy"]["alpha"] or config["score"]["lip_weight"]
    patrol = "patrol" if lipschitz else "patrol-adversarial"
    found = []
    for subject, numbers in (("undefended", summary["dense"]), ("edge", summary["pruned"])):
        record = audit.strongest(subject)
        found.append({
            "dataset": "Grocery Store photographs, 128x128, 81 products",
            "model": summary["model"], "method": patrol if subject == "edge" else "dense",
            "split": summary["split"], "train_seed": summary["seed"],
            **{k: numbers[k] for k in ("edge_macs", "edge_params", "feature_bytes", "accuracy")},
            **{k: record[k] for k in ("attack", "attack_seed", "attacker_images", "victim_images",
                                      "ssim", "ssim_worst5", "psnr", "mse", "plateau")},
            "floor_ssim": audit.strongest("floor")["ssim"],
            "floor_mse": audit.strongest("floor")["mse"],
        })
    return found


def minutes(run: Path) -> float:
    """From the first event of the run to the last, wall-clock."""
    lines = (run / "events.jsonl").read_text().splitlines()
    times = [json.loads(line)["time"] for line in lines]
    first, last = (datetime.fromisoformat(t) if isinstance(t, str) else datetime.fromtimestamp(t)
                   for t in (times[0], times[-1]))
    return (last - first).total_seconds() / 60


def main(args: Grocery) -> None:
    summary = json.loads((args.run / "summary.json").read_text())
    settings = {k: v for k, v in summary["config"].items() if k not in ("data", "runs")}
    print(write("grocery", rows(args.run), settings=settings,
                minutes=round(minutes(args.run), 1)))


if __name__ == "__main__":
    main(auto_cli(Grocery, as_positional=False))
