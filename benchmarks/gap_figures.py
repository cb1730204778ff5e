"""The table of the surrogate gap, from every record in which surrogates say what they believe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from audit_figures import STILL, UNFINISHED, USUAL_SPLIT, improving, name_in_the_table
from depth_figures import trained_with
from row_names import (
    INSIDE,
    METHODS,
    PRESSED_MARK,
    PRESSED_TEXT,
    STRENGTHS,
    Row,
    attack_name,
    pressed,
    seen_once,
)

from patrol_prune.report import render_table

RECORDS = ("strongest", "seeds", "frontier")
GOAL = 1.25
"""As much smaller than believed may the strongest attacker's error be."""
COLUMNS = {"model": "trained against", "split": "split after", "seed": "training seed",
           "believed": "MSE the surrogates get", "mse": "smallest MSE of a fresh attacker",
           "attack": "which attack", "gap": "ratio", "ssim": "SSIM, surrogates / that attacker"}


def surrogate_gap(told: Sequence[tuple[dict[str, Any], str]]) -> str:
    """What the attackers inside believed against the fresh attacker that gets closest, in MSE.

    Args:
        told: records, and under which circumstances each was made; a model that is in several
            counts once, with all its attacks.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for record, _ in told:
        for row in filter(is_told, record["rows"]):
            groups.setdefault(model_of(row), []).append(row)
    if not groups:
        return "Not measured yet."
    rows = [min(each, key=lambda row: float(row["mse"])) for each in groups.values()]
    rows.sort(key=lambda row: (pressed(row), row["split"] != USUAL_SPLIT, row["split"]))
    near = sum(gap_of(row) <= GOAL for row in rows)
    elsewhere = [row for row in rows if row["split"] != USUAL_SPLIT]
    deeper = sum(gap_of(row) <= GOAL for row in elsewhere)
    return "\n\n".join([
        "The best surrogate of each image against the fresh attacker, out of all that met the "
        "whole of the 1,000 test images, with the smallest MSE. Within the goal of 25% in "
        f"{near} of {len(rows)} rows; of those deeper than {USUAL_SPLIT} in {deeper} of "
        f"{len(elsewhere)}.",
        render_table([line(row) for row in rows], COLUMNS).strip(),
        *[STILL] * any(map(improving, rows)), *[PRESSED_TEXT] * any(map(pressed, rows)),
        " ".join(measured for _, measured in told),
    ])


def is_told(row: Row) -> bool:
    """Whether surrogates said of the same uploads what the attacker tried on all images."""
    return (row.get("surrogate_ssim") is not None and seen_once(row)
            and row.get("victim_images", 1_000) >= 1_000)


def model_of(row: Row) -> tuple[Any, ...]:
    """Two rows with one of these are attacks on one model."""
    return (row["method"], row.get("recipe"), row.get("strength"), row["split"],
            row.get("train_seed", 0), pressed(row), row["surrogate_mse"])


def gap_of(row: Row) -> float:
    return float(row["surrogate_mse"] / row["mse"])


def line(row: Row) -> dict[str, str]:
    strength = STRENGTHS.get(row.get("defence") or "", "").format(row.get("strength"))
    if row.get("defence"):
        recipe = f", {INSIDE[row['recipe']]}" if row.get("recipe") else ""
        name = f"{trained_with(row)}, {strength}{recipe}"
    else:
        name = METHODS[name_in_the_table(row) or row["method"]].strip("*")
    return {
        "model": name, "split": row["split"] + PRESSED_MARK * pressed(row),
        "seed": str(row.get("train_seed", 0)), "believed": f"{row['surrogate_mse']:.4f}",
        "mse": f"{row['mse']:.4f}", "attack": attack_name(row) + UNFINISHED * improving(row),
        "gap": f"{gap_of(row):.2f}", "ssim": f"{row['surrogate_ssim']:.3f} / {row['ssim']:.3f}",
    }
