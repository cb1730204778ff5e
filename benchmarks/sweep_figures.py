"""The table and the plot of every defence over its own strength."""

from __future__ import annotations

import itertools
from typing import Any

from audit_figures import ROOT, UNFINISHED, USUAL_SPLIT, improving, load, not_measured
from frontier_recipes import RECIPES
from row_names import DEFENCES, INSIDE, STRENGTHS, Row, key_of, seen_once
from yardstick_figures import rows_of

from patrol_prune.report import render_table


def defence_name(row: Row) -> str:
    """The defence, the attackers inside where they are not the usual ones, and its base."""
    inside = f", {INSIDE[row['recipe']]}" if row.get("recipe") else ""
    inside += f", after {row['split']}" if row["split"] != USUAL_SPLIT else ""
    return DEFENCES[row["method"]] + inside + BASES.get(row.get("base"), "")


BASES = {"earlier": " †", "before": " ¤"}
"""Marks of rows that stand on another training of the same models than the others."""


def swept_rows() -> list[Row]:
    """Every defended model under one attack: of the shallower cut those on the published model, and
    from the older record what was not measured again, each marked as such.
    """
    newest = [row for row in under_one_attack(load("strongest")) if row["split"] == USUAL_SPLIT]
    known = {key_of(row) for row in newest}
    return newest + [
        row if row["split"] != USUAL_SPLIT or row.get("base") == "earlier" else
        {**row, "base": "before"} for row in under_one_attack(load("frontier"))
        if key_of(row) not in known
    ]


def under_one_attack(record: dict[str, Any]) -> list[Row]:
    """The defended models under the decoder that every one of them met."""
    return [row for row in record["rows"] if row.get("defence")
            and row["attack"] == "inverse_network_ssim" and row.get("times_as_long", 1) == 1
            and seen_once(row)
            and row.get("victim_images", 1_000) >= 1_000]


def epochs_with(row: Row, settings: dict[str, Any]) -> str:
    """How long a defence of the shallower cut was trained with."""
    if row["method"] == "patrol-more":
        return f"{settings['finetune_epochs']} + {settings['sweep_epochs']}"
    times = RECIPES[row.get("recipe") or ""].epochs
    return "0" if row["defence"] == "none" else str(times * settings["sweep_epochs"])


def told_longer(row: Row | None) -> str:
    return "–" if row is None else f"{row['ssim']:.3f}" + UNFINISHED * improving(row)


def sweep(circumstances: str) -> str:
    """Every defence at each strength: accuracy against the attacker's SSIM."""
    newest, before = load("strongest"), load("frontier")
    rows = [r for r in swept_rows() if r["split"] == USUAL_SPLIT]
    settings, others = newest["settings"], set(before.get("missing", []))
    missing = [m for m in newest.get("missing", [])
               if m in others and m.startswith(("with-", "patrol-more-"))]
    longer = {key_of(r): r for r in newest["rows"]
              if r.get("times_as_long", 1) == 3 and r["attack"] == "inverse_network_ssim"}
    table = []
    for row in sorted(rows, key=lambda r: (list(DEFENCES).index(r["method"]),
                                           r.get("recipe") or "", r["strength"])):
        strength = STRENGTHS.get(row["defence"], "").format(row["strength"])
        table.append({
            "defence": defence_name(row), "strength": strength,
            "accuracy": f"{100 * row['accuracy']:.1f}%", "ssim": f"{row['ssim']:.3f}",
            "worst": f"{row['ssim_worst5']:.3f}", "mse": f"{row['mse']:.4f}",
            "macs": f"{row['edge_macs'] / 1e6:.2f} M",
            "bytes": f"{row['feature_bytes'] / 1024:.3g} KiB",
            "plateau": "yes" if row["plateau"] else "no",
            "longer": told_longer(longer.get(key_of(row))),
            "epochs": epochs_with(row, settings),
        })
    columns = {"defence": "defence", "strength": "strength", "epochs": "epochs with it",
               "accuracy": "accuracy", "ssim": "attacker's SSIM", "worst": "worst 5%",
               "mse": "attacker's MSE",
               "macs": "edge MACs", "bytes": "uploaded", "plateau": "plateau",
               "longer": "SSIM, attacked 3 times as long"}
    return "\n\n".join([
        "Each defence on the same Taylor-pruned and fine-tuned model, trained "
        f"{settings['sweep_epochs']} more epochs of {settings['sweep_images']:,} images, where the "
        "table does not say otherwise, with the same distillation, then attacked by a fresh "
        "residual decoder that knows the defence; 1,000 test images. The last PATROL row goes on "
        f"with PATROL's own pruned model, which had {settings['finetune_epochs']} epochs of "
        f"{settings['train_images']:,} images with it before. PATROL's fine-tuning at β 40 has the "
        f"scale-free Lipschitz term too, at {settings['alpha']:g}; at other weights it has none. "
        "Edge MACs are equal but where the table says otherwise; quantisation and a bottleneck "
        "upload less. Rows with ¤ and with † stand on other trainings of the same models, with the "
        "same seed, whose weights were not kept: compare rows of one mark with each other first.",
        render_table(table, columns).strip(), not_measured(missing), circumstances,
    ])


MARKERS = {None: "o", "longer": "s", "longest": "D", "long": "*"}
"""How long, and against whom, a point of the plot was trained."""
COLOURS = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9", "teal", "gold", "slateblue", "olive")


def plot_sweep() -> None:
    """Accuracy against SSIM, one line for each defence: its colour; hollow what has a mark."""
    from matplotlib import pyplot

    rows = swept_rows()
    figure, axes = pyplot.subplots(figsize=(11.5, 8), layout="constrained")
    markers = itertools.cycle("v^<>PpXh")
    colours = dict(zip(DEFENCES, COLOURS, strict=True))
    names = dict.fromkeys(defence_name(r) for m in DEFENCES for r in rows if r["method"] == m)
    for name in names:
        same = sorted((r for r in rows if defence_name(r) == name), key=lambda r: r["ssim"])
        bold: dict[str, Any] = {"color": colours[same[0]["method"]]}
        if name.startswith("PATROL"):
            bold = {"linewidth": 2.2, "color": "crimson" if ", after " in name else "black"}
        plain = same[0]["split"] == USUAL_SPLIT and same[0].get("recipe") in MARKERS
        axes.plot([r["ssim"] for r in same], [100 * r["accuracy"] for r in same],
                  marker=MARKERS[same[0].get("recipe")] if plain else next(markers), markersize=7,
                  fillstyle="none" if same[0].get("base") in BASES else "full",
                  label=name, alpha=0.85, **bold)
    axes.axvline(rows[0]["floor_ssim"], color="green", linestyle=":", label="floor: mean image")
    if answers := rows_of("answers"):
        axes.axvline(max(r["ssim"] for r in answers), color="green", linestyle="--",
                     label="floor: the dense model's answers")
    axes.set(xlabel="fresh attacker's SSIM (lower is more private)", ylabel="accuracy in %",
             title="Defences over their own strength (edge MACs and uploads: see the table)")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3, columnspacing=1.0)
    figure.savefig(ROOT / "docs" / "defences.png", dpi=110)
    pyplot.close(figure)
