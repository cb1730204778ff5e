"""The tables of the Lipschitz term's forms."""

from __future__ import annotations

from typing import Any

from audit_figures import STILL, UNFINISHED, improving
from row_names import Row, attack_name

from patrol_prune.report import render_table

FORMS = {"paper": "the paper's form", "scale_free": "scale-free", "spectral": "spectral bound",
         None: "none (trained on)"}
POINTS = {"term": "Lipschitz term", "alpha": "`α`", "beta": "`β`", "accuracy": "accuracy",
          "ssim": "attacker's SSIM", "worst": "worst 5%", "mse": "attacker's MSE",
          "paper": "constant, paper's", "scale_free": "scale-free", "spectral": "spectral bound"}


def lipschitz(record: dict[str, Any], measured: str) -> str:
    """Every point under one decoder, then the chosen ones under every attack."""
    rows = record["rows"]
    first = [row for row in rows if is_first(row)]
    row = first[0]
    more = by_attack(rows)
    text = (
        f"The Taylor-pruned model ({row['edge_macs'] / 1e6:.2f} M of edge MACs, "
        f"{row['feature_bytes'] // 1024} KiB uploaded after {row['split']}) trained on for "
        f"{record['settings']['sweep_epochs']} epochs of {record['settings']['sweep_images']:,} "
        "images, with distillation, and attacked by a fresh residual decoder (MSE + SSIM); "
        f"{row['victim_images']:,} test images, one training seed. Constants: of the edge's blocks "
        "on test images, geometric means. Floor, the mean image: SSIM "
        f"{row['floor_ssim']:.3f}, worst 5% {row['floor_ssim_worst5']:.3f}."
    )
    return "\n\n".join([
        text, render_table([line(row) for row in first], POINTS).strip(), *more,
        *[STILL] * any(map(improving, rows)), measured,
    ])


def is_first(row: Row) -> bool:
    """Whether the row is of the decoder that every point meets, on all images."""
    return (row["attack"] == "inverse_network_ssim"
            and row["victim_images"] == row["made_with"]["test_images"])


def line(row: Row) -> dict[str, str]:
    constants = {form: f"{row[f'constant_{form}']:.2f}" for form in FORMS if form}
    return {"term": FORMS[row["form"]], "alpha": f"{row['alpha']:g}" if row["alpha"] else "",
            "beta": f"{row['beta']:g}" if row["beta"] else "",
            "accuracy": f"{100 * row['accuracy']:.1f}%",
            "ssim": f"{row['ssim']:.3f}" + UNFINISHED * improving(row),
            "worst": f"{row['ssim_worst5']:.3f}", "mse": f"{row['mse']:.4f}", **constants}


def by_attack(rows: list[Row]) -> list[str]:
    """A row for each attack that more than the usual decoder, a column for each chosen point."""
    cells: dict[str, dict[str, str]] = {}
    columns = {"attack": "attack", "images": "test images"}
    for row in rows:
        if row["beta"]:
            continue
        point = FORMS[row["form"]] + (f", `α` {row['alpha']:g}" if row["alpha"] else "")
        attack = f"{attack_name(row)} on {row['victim_images']}"
        cells.setdefault(attack, {"attack": attack_name(row),
                                  "images": f"{row['victim_images']:,}"})[point] = (
            f"{row['ssim']:.3f}" + UNFINISHED * improving(row))
        if not is_first(row):
            columns[point] = point
    if len(columns) == 2:
        return []
    return ["SSIM under more attacks:", render_table(list(cells.values()), columns).strip()]
