"""The answers of the best models beside their uploads."""

from __future__ import annotations

from typing import Any

from audit_figures import STILL, UNFINISHED, improving
from row_names import Row, attack_name, has_key, seen_once
from seed_figures import name_of

from patrol_prune.report import render_table

COLUMNS = {"model": "trained on with", "seed": "training seed", "attack": "attack",
           "answers": "SSIM from its answers", "upload": "SSIM from its upload",
           "worst": "worst 5% of each", "mse": "MSE of each"}


def answers(record: dict[str, Any], uploads: dict[str, Any], measured: str) -> str:
    """A row for each attack that met both."""
    pairs = [(row, other) for row in record["rows"]
             if (other := upload_of(row, uploads["rows"])) is not None]
    table = [{
        "model": name_of(other), "seed": str(row["train_seed"]), "attack": attack_name(other),
        **{kind: f"{one['ssim']:.3f}" + UNFINISHED * improving(one)
           for kind, one in (("answers", row), ("upload", other))},
        "worst": f"{row['ssim_worst5']:.3f} / {other['ssim_worst5']:.3f}",
        "mse": f"{row['mse']:.4f} / {other['mse']:.4f}",
    } for row, other in pairs]
    return "\n\n".join([
        render_table(table, COLUMNS).strip(),
        *[STILL] * any(improving(one) for pair in pairs for one in pair), measured,
    ])


def upload_of(row: Row, rows: list[Row]) -> Row | None:
    """The same attack, as long, on the same model's upload, each picture sent once."""
    return next((other for other in rows
                 if has_key(other, row["model"]) and other["train_seed"] == row["train_seed"]
                 and other["attack"] == row["attack"] and other.get("times_as_long", 1) == 1
                 and seen_once(other) and other["victim_images"] >= 1_000), None)
