"""What an SSIM means, from `results/yardsticks.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patrol_prune.audit_scores import thumbnail_side
from patrol_prune.report import render_table

Row = dict[str, Any]
RECORD = Path(__file__).resolve().parent / "results" / "yardsticks.json"
COLUMNS = {"what": "the attacker has", "ssim": "SSIM", "worst": "worst 5%", "mse": "MSE",
           "plateau": "plateau"}
ATTACKS = {"inverse_network_ssim": "a residual decoder (MSE + SSIM)",
           "linear_inverse": "the best linear decoder"}
SHOWN = 8
"""The largest thumbnail in the table, in pixels."""


def rows_of(what: str) -> list[Row]:
    """The record's rows of a kind; none where it was not measured."""
    if not RECORD.exists():
        return []
    return [row for row in json.loads(RECORD.read_text())["rows"] if row["what"] == what]


def as_thumbnail(ssim: float) -> str:
    """`"3.2"` pixels a side, or nothing."""
    side = thumbnail_side(rows_of("thumbnail"), ssim)
    return "" if side is None else f"{side:.1f}"


def yardsticks(record: dict[str, Any], source: str) -> str:
    """What an attacker has without a feature, and what thumbnails show."""
    table = [line(row) for row in record["rows"]
             if row["what"] != "thumbnail" or row["side"] <= SHOWN]
    return "\n\n".join([
        f"Over the {record['victim_images']:,} test images that every attack here meets.",
        render_table(table, COLUMNS).strip(), source,
    ])


def line(row: Row) -> Row:
    """One yardstick."""
    what = row["what"]
    if what == "thumbnail":
        what = f"the image as a thumbnail of {row['side']}x{row['side']} pixels, enlarged"
    elif what == "answers":
        what = (f"the dense model's answers (10 numbers, {100 * row['accuracy']:.1f}% accurate) "
                f"and {ATTACKS[row['attack']]}")
    elif what == "mean image":
        what = "nothing: the mean image of his own"
    else:
        what = "the image's class: the mean image of it"
    return {"what": what, "ssim": f"{row['ssim']:.3f}", "worst": f"{row['ssim_worst5']:.3f}",
            "mse": f"{row['mse']:.4f}",
            "plateau": {True: "yes", False: "no"}.get(row.get("plateau"), "")}


def below_the_floor(goal: float, key: str = "ssim") -> str:
    """`; it lies below the 0.185 of the mean image, ...`, or nothing."""
    floor = next(iter(rows_of("mean image")), None)
    if floor is None or goal >= floor[key]:
        return ""
    return (f"; it lies below the {floor[key]:.3f} of the mean image, so that no defence can "
            "reach it")


def worst_of_the_floor() -> str:
    """`, worst 5% 0.469`, or nothing."""
    floor = next(iter(rows_of("mean image")), None)
    return "" if floor is None else f", worst 5% {floor['ssim_worst5']:.3f}"


def of_the_answers() -> str:
    """What the service's answers alone give away, in a sentence; or nothing."""
    rows = rows_of("answers")
    if not rows:
        return ""
    best = max(rows, key=lambda row: row["ssim"])
    return (f"The dense model's answers alone, without any feature, give the same kind of attacker "
            f"SSIM {best['ssim']:.3f} and {best['ssim_worst5']:.3f} on the worst 5%"
            + ", before it had reached its plateau" * (not best["plateau"]) + ".")
