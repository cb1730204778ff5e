"""The table about depth: more layers on the device at the same budget, and defences on top."""

from __future__ import annotations

from typing import Any

from audit_figures import USUAL_SPLIT
from frontier_methods import DEEPER_EPOCHS, DEEPEST
from row_names import (
    DEFENCES,
    INSIDE,
    PRESSED_MARK,
    PRESSED_TEXT,
    STRENGTHS,
    Row,
    attack_name,
    draws,
    has_key,
    pressed,
    seen_once,
)
from yardstick_figures import (
    as_thumbnail,
    below_the_floor,
    of_the_answers,
    worst_of_the_floor,
)

from patrol_prune.report import render_table

STRONG = "inverse_network_ssim"
DEPTHS = ("layer3", "layer4.0", "layer4", "avgpool")
WORST = 0.35
"""The goal for the mean SSIM of the 5% of images that are seen best."""
BASES = {
    "taylor-layer3": "Taylor's score", "taylor-layer4.0": "Taylor's score",
    "patrol-score-only-layer4.0": "second-order score",
    "patrol-score-only-layer4": "second-order score",
}
COLUMNS = {
    "split": "split after", "base": "pruned by", "defence": "trained on with",
    "strength": "strength", "accuracy": "accuracy", "ssim": "attacker's SSIM",
    "side": "as a thumbnail of",
    "worst": "worst 5%", "mse": "attacker's MSE", "believed": "surrogates believed",
    "macs": "edge MACs", "bytes": "uploaded", "plateau": "plateau",
}


def depth(record: dict[str, Any], measured: str) -> str:
    """One line for each defended model, the usual split's first."""
    rows = [row for row in record["rows"] if row.get("start") in BASES
            and row["attack"] == STRONG and row.get("times_as_long", 1) == 1 and seen_once(row)
            and row.get("victim_images", 0) >= 1_000]
    # Rows after layer3 are older than the name of their start, and stand on Taylor pruning.
    rows += [row for row in record["rows"] if row.get("base") != "earlier"
             and row.get("start") is None and row.get("defence") in ("none", "patrol", "disco")
             and row.get("recipe") is None]
    if not any(row["split"] != USUAL_SPLIT for row in rows):
        return "Not measured yet."
    dense = next(row["dense_accuracy"] for row in rows if row.get("dense_accuracy"))
    rows.sort(key=lambda row: (DEPTHS.index(row["split"]), list(DEFENCES).index(row["method"]),
                               row["strength"]))
    settings = record["settings"]
    return "\n\n".join([
        "The same budget at several depths. Each base is pruned for accuracy alone and fine-tuned "
        f"(after {USUAL_SPLIT} {settings['finetune_epochs']} epochs of "
        f"{settings['train_images']:,} images, deeper {DEEPER_EPOCHS}), then trained "
        "with a defence for "
        f"{settings['sweep_epochs']} epochs of {settings['sweep_images']:,} images more, and "
        "attacked by a fresh residual decoder (MSE + SSIM); 1,000 test images, one training seed. "
        f"The dense model has {100 * dense:.1f}%. Floor, the mean image: "
        f"SSIM {rows[-1]['floor_ssim']:.3f}{worst_of_the_floor()}. "
        "`as a thumbnail of`: the side, in pixels, of the thumbnail with the same SSIM.",
        render_table([line(row) for row in rows], COLUMNS).strip(),
        " ".join(filter(None, (within(rows, dense), deepest(record)))),
        *[PRESSED_TEXT] * any(map(pressed, rows)), measured,
    ])


def deepest(record: dict[str, Any]) -> str:
    """Every attack on the row behind the pooling, in a sentence."""
    rows = [row for row in record["rows"] if has_key(row, DEEPEST)
            and (row["attack"] != STRONG or row["victim_images"] >= 1_000)]
    if len(rows) < 2:
        return ""
    rows.sort(key=lambda row: -row["ssim"])
    each = "; ".join(f"{row['ssim']:.3f} by the {attack_name(row)}"
                     + f" ({row['victim_images']} images)" * (row["victim_images"] < 1_000)
                     for row in rows)
    return f"PATROL's row after {rows[0]['split']} under every attack on it: {each}."


def trained_with(row: Row) -> str:
    """The defence as the tables about pruned models call it."""
    return DEFENCES[row["method"]].replace("none (trained on)", "nothing")


def line(row: Row) -> dict[str, str]:
    believed = row.get("surrogate_mse")
    return {
        "split": row["split"] + PRESSED_MARK * pressed(row),
        "base": BASES.get(row.get("start") or "taylor-layer3", ""),
        "defence": trained_with(row)
        + (f", {INSIDE[row['recipe']]}" if row.get("recipe") not in (None, "taylor") else ""),
        "strength": STRENGTHS.get(row["defence"], "").format(row["strength"]),
        "accuracy": f"{100 * row['accuracy']:.1f}%", "ssim": f"{row['ssim']:.3f}",
        "side": as_thumbnail(row["ssim"]),
        "worst": f"{row['ssim_worst5']:.3f}", "mse": f"{row['mse']:.4f}",
        "believed": "" if believed is None else f"{believed:.4f}",
        "macs": f"{row['edge_macs'] / 1e6:.2f} M",
        "bytes": f"{row['feature_bytes'] / 1024:.3g} KiB",
        "plateau": "yes" if row["plateau"] else "no",
    }


def once(row: Row) -> str:
    """What has to be said of a row whose edge draws at random."""
    return "each picture uploaded once; " * draws(row)


def within(rows: list[Row], dense: float) -> str:
    """The most private row within one and three points of the dense model."""
    found = []
    for points, goal in ((1, 0.22), (3, 0.17)):
        near = [row for row in rows if row["accuracy"] >= dense - points / 100]
        if not near:
            found.append(f"No row is within {points} point{'s' * (points > 1)} of the dense model.")
            continue
        best = min(near, key=lambda row: row["ssim"])
        met = "met" if best["ssim"] <= goal else "not met"
        found.append(
            f"Within {points} point{'s' * (points > 1)} of the dense model the most private row "
            f"is trained with {line(best)['defence']} after {best['split']} "
            f"({once(best)}SSIM {best['ssim']:.3f}; the goal of {goal} is "
            f"{met}{below_the_floor(goal)})."
        )
    least = min(rows, key=lambda row: row["ssim_worst5"])
    found.append(f"The lowest worst 5% is {least['ssim_worst5']:.3f}; its goal is {WORST}"
                 f"{below_the_floor(WORST, 'ssim_worst5')}.")
    found.append(of_the_answers())
    return " ".join(found)
