"""The tables about scores: how they rank, and what they keep of the accuracy."""

from __future__ import annotations

import statistics
from typing import Any

from patrol_prune.report import render_table

Row = dict[str, Any]

SCORES = {
    "patrol": "`PatrolImportance`, as it is",
    "patrol_j_weights": "the same, terms weighed as in `J`",
    "patrol_absolute": '`task_change="absolute"`',
    "patrol_absolute_j_weights": "the same, terms weighed as in `J`",
    "learned_masks": "learned masks, `|m|`",
    "taylor": "Torch-Pruning's `GroupTaylorImportance`",
    "magnitude": "Torch-Pruning's `GroupMagnitudeImportance`",
    "second_order_task": "task term with its curvature",
    "absolute_task": "first-order task term, absolute",
    "first_order_lipschitz": "first-order Lipschitz term",
    "first_order_adversarial": "first-order adversarial term",
}


def fidelity(record: dict[str, Any], measured: str) -> str:
    """Rank correlations; `measured` is the circumstances' sentence."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in record["rows"]:
        kind = "all" if row["group"] == "all" else "groups"
        of_score = found.setdefault((row["score"], row["of"]), {})
        of_score.setdefault(f"{row['model']}-{kind}", []).append(row)
    models = list(dict.fromkeys(row["model"] for row in record["rows"]))
    table, columns = [], {"score": "score", "of": "held against the real change of"}
    for (score, of), kinds in found.items():
        line = {"score": SCORES[score], "of": "`J`" if of == "J" else of}
        for model in models:
            line[f"{model}-all"] = rank(kinds[f"{model}-all"][0]["spearman"])
            line[f"{model}-groups"] = middle(kinds[f"{model}-groups"])
        table.append(line)
    about = []
    for model in models:
        first = next(r for r in record["rows"] if r["model"] == model and r["group"] == "all")
        columns[f"{model}-all"] = f"{model}, all channels"
        columns[f"{model}-groups"] = f"{model}, within groups"
        about.append(f"{model} cut after {first['split']} ({first['structures']} channels, "
                     f"accuracy {100 * first['accuracy']:.0f}%)")
    settings = record["settings"]
    text = (
        f"Spearman's rank correlation with the change when a channel is really zeroed, on "
        f"{settings['calibration_images']} calibration images of CIFAR-10: {'; '.join(about)}. "
        "Within groups: the median over the channel groups, then the lowest and the highest."
    )
    return "\n\n".join([text, render_table(table, columns).strip(), measured])


def scores(record: dict[str, Any], measured: str) -> str:
    """Accuracy under each score and limit: after pruning, and after one epoch more."""
    settings, found = record["settings"], {}
    usual = [row for row in record["rows"] if row["budget"] == settings["edge_macs"]]
    for row in usual:
        key = (row["score"], row["max_pruning_ratio"])
        found[key] = f"{100 * row['accuracy_before']:.1f}% / {100 * row['accuracy']:.1f}%"
    limits = sorted({limit for _, limit in found})
    names = {"second_order": "patrol", "absolute": "patrol_absolute"}
    kinds = dict.fromkeys(score for score, _ in found)
    table = [{"score": SCORES[names.get(score, score)],
              **{f"{limit}": found.get((score, limit), "") for limit in limits}}
             for score in kinds]
    columns = {"score": "score", **{f"{limit}": f"at most {limit:.0%} of a group"
                                    for limit in limits}}
    text = (
        f"The same trained model ({100 * settings['dense_accuracy']:.1f}%) cut after "
        f"{settings['split']} and pruned at once to {settings['edge_macs']:.0%} of its edge's "
        f"MACs, scored on {settings['calibration_images']:,} images, without privacy terms. "
        "Accuracy right after pruning / after one epoch of "
        f"{settings['train_images']:,} images; one seed, 10,000 test images of CIFAR-10. Columns: "
        "the largest share of a group that may go."
    )
    others = [row for row in record["rows"] if row["budget"] != settings["edge_macs"]]
    return "\n\n".join(filter(None, [text, render_table(table, columns).strip(),
                                     structures(others), measured]))


def structures(rows: list[Row]) -> str:
    """Channels, blocks or both at one budget."""
    if not rows:
        return ""
    table = [{
        "what": row["structures"], "before": f"{100 * row['accuracy_before']:.1f}%",
        "after": f"{100 * row['accuracy']:.1f}%", "macs": f"{row['edge_macs'] / 1e6:.2f} M",
        "blocks": ", ".join(row["removed_blocks"]),
    } for row in rows]
    columns = {"what": "what may go", "before": "right after pruning", "after": "after one epoch",
               "macs": "edge MACs", "blocks": "blocks that went"}
    first = rows[0]
    return (f"The same model at {first['budget']:.0%} of its edge's MACs, by `PatrolImportance`, "
            f"at most {first['max_pruning_ratio']:.0%} of a group:\n\n"
            + render_table(table, columns).strip())


def rank(value: float | None) -> str:
    return "constant" if value is None else f"{value:.2f}"


def middle(rows: list[Row]) -> str:
    """Median, lowest and highest over the groups where there is a correlation."""
    values = [row["spearman"] for row in rows if row["spearman"] is not None]
    if not values:
        return "constant"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
