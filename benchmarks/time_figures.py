"""The tables of what a training step costs, and of how fast white-box attacks are."""

from __future__ import annotations

from typing import Any

from patrol_prune.report import render_table

PARTS = {"edge": "edge", "lipschitz": "edge on the images of the Lipschitz term, in float32",
         "cloud": "cloud", "teacher": "teacher", "surrogates": "surrogates",
         "surrogates, loss": "surrogates with their loss"}


def step_cost(record: dict[str, Any], measured: str) -> str:
    """Fine-tuning steps with privacy terms, as multiples of one without."""
    macs, batch = record["macs"], record["batch"]
    text = (
        f"{record['model']} at {record['image_size']}x{record['image_size']}, batch {batch}, split "
        f"after {record['split']}, pruned; per image and forward, in millions of multiply-adds: "
        f"edge {macs['edge'] / 1e6:.1f}, cloud {macs['cloud'] / 1e6:.1f}, teacher "
        f"{macs['teacher'] / 1e6:.1f}, surrogates {macs['surrogates'] / 1e6:.1f}. Medians of the "
        "ratios within a turn, by the wall clock and by processor time."
    )
    blocks = [text]
    tables: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        tables.setdefault((row["threads"], row["precision"]), []).append(row)
    for (threads, precision), rows in tables.items():
        table = [{
            "terms": row["terms"].replace("adversarial", "adversarial term").replace("+", ", ")
            .replace("scale_free", "scale-free"),
            "inner": row["inner_steps"] or "", "images": row["adversarial_images"] or "",
            "measured": row["measured"],
            "cpu": row["measured_cpu"], "predicted": row["predicted"],
            "quotient": row["measured_over_predicted"],
        } for row in rows]
        columns = {"terms": "privacy terms", "inner": "inner steps", "images": "surrogates' images",
                   "measured": "times a plain step",
                   "cpu": "by processor time", "predicted": "predicted",
                   "quotient": "measured / predicted"}
        over = sum(row["measured_over_predicted"] > 1.15 for row in rows)
        blocks += [
            f"{threads} thread{'s' * (threads > 1)}, {arithmetic(record, precision)}, "
            f"{rows[0]['turns']} turns; "
            f"{len(rows) - over} of {len(rows)} rows within 1.15 times the prediction:",
            render_table(table, columns).strip(),
        ]
    for precision, pace in record["pace"].items():
        told = ", ".join(f"{PARTS[part]} {pace[part]:.1f}" for part in PARTS)
        blocks.append("Time of one multiply-add, each part alone, as a multiple of one of the "
                      f"plain step, in {arithmetic(record, precision)}: {told}.")
    return "\n\n".join([*blocks, measured])


def arithmetic(record: dict[str, Any], precision: str) -> str:
    """What a setting of the precision came to on the record's machine."""
    return "bfloat16" if precision != "fp32" and record["bf16"] else "float32"


def throughput(record: dict[str, Any], measured: str) -> str:
    """Milliseconds per image of rMLE, together and one at a time."""
    columns = {"edge": "edge", "precision": "precision", "images": "together",
               "ms_per_image_together_wall": "ms per image",
               "ms_per_image_alone_wall": "one at a time, ms", "times_faster_wall": "times faster",
               "times_faster_cpu": "in CPU time", "mse_together": "MSE together",
               "mse_alone": "MSE one at a time"}
    steps, threads = record["rows"][0]["steps"], record["threads"]
    met = [row for row in record["rows"] if row["times_faster_wall"] >= 5.0]
    return "\n\n".join([
        f"rMLE, {steps} steps, {threads} threads, both ways in turns within one process; medians. "
        "The MSE is over the images that ran both ways. The goal of 5 times is met in "
        f"{len(met)} of {len(record['rows'])} rows.",
        render_table(record["rows"], columns).strip(), measured,
    ])
