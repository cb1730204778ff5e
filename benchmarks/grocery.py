"""The record of one `patrol-prune run` on the Grocery Store photographs.

    patrol-prune run --data grocery128 --model mobilenet_v3_small ... --name grocery
    python benchmarks/grocery.py --run runs/grocery

Reads what the run left (`summary.json`, `audit.json`, `events.jsonl`) and writes
`results/grocery.json`; nothing is measured here. Date, device and versions are the run's; what it
did not write down, as the commit, is left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from record import ROOT, command, save

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


def first_and_last(run: Path) -> tuple[datetime, datetime]:
    """When the run's first event was, and its last one."""
    lines = (run / "events.jsonl").read_text().splitlines()
    times = [json.loads(line)["time"] for line in lines]
    first, last = (datetime.fromisoformat(t) if isinstance(t, str) else datetime.fromtimestamp(t)
                   for t in (times[0], times[-1]))
    return first, last


def content(run: Path) -> dict[str, Any]:
    """The record: circumstances as the run wrote them down, rows last."""
    summary = json.loads((run / "summary.json").read_text())
    first, last = first_and_last(run)
    return {
        "benchmark": "grocery", "command": command(), "date": last.date().isoformat(),
        **{key: summary[key] for key in ("device", "versions") if key in summary},
        "settings": {k: v for k, v in summary["config"].items() if k not in ("data", "runs")},
        "minutes": round((last - first).total_seconds() / 60, 1),
        "rows": rows(run),
    }


def main(args: Grocery) -> None:
    print(save(content(args.run), ROOT / "results" / "grocery.json"))


if __name__ == "__main__":
    main(auto_cli(Grocery, as_positional=False))
