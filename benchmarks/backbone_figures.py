"""The table of `docs/backbones.md`, from `results/backbones.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from patrol_prune.report import render_table

Row = dict[str, Any]
ALL = 80
LIMIT = 60.0
"""Seconds that a model's whole path at one split should stay under."""
SECONDS = "cpu_seconds"
"""By processor time: other work on the machine stretches the wall clock's."""
PLACES = ("first third", "middle", "last third")
COLUMNS = {
    "model": "model", "image_size": "input", **{place: place for place in PLACES},
    "of_dense": "of the dense edge", "mask_error": "mask against removal",
    "heads": "heads gone", "left": "left whole", "seconds": "seconds", "peak_mb": "MB",
    "status": "status",
}  # fmt: skip


def backbones(record: dict[str, Any], source: str) -> str:
    """Summary, one table per kind, and what stays whole for which reason."""
    parts = [summary(record)]
    for kind in dict.fromkeys(row["kind"] for row in record["rows"]):
        models = by_model(row for row in record["rows"] if row["kind"] == kind)
        table = render_table([line(rows) for rows in models.values()], COLUMNS).strip()
        parts.append(f"### {kind[0].upper()}{kind[1:]}\n\n{table}")
    commits = ", ".join(dict.fromkeys(row["commit"] for row in record["rows"]))
    devices = Counter(row["device"] for row in record["rows"] if "device" in row)
    others = "".join(f" {count} rows on {device}." for device, count in devices.items())
    return "\n\n".join([*parts, unfollowed(record["rows"]), f"{source} Rows at {commits}.{others}"])


def by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each model, by name, shallow to deep."""
    models: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: (r["model"], PLACES.index(r["place"]))):
        models.setdefault(row["model"], []).append(row)
    return models


def summary(record: dict[str, Any]) -> str:
    """How many of torchvision's classifiers, which not and why, and the slowest."""
    rows = [row for row in record["rows"] if row["kind"] == "classification"]
    models = by_model(rows)
    good = [name for name, of in models.items()
            if len(of) == len(PLACES) and all(r["status"] == "ok" for r in of)]  # fmt: skip
    each = ", ".join(f"{sum(r['status'] == 'ok' for r in rows if r['place'] == place)} at the "
                     f"{place}" for place in PLACES)  # fmt: skip
    text = [f"**{len(good)} of {ALL}** classification models keep every invariant at the budget at "
            f"all three splits: {each}."]  # fmt: skip
    failed = [f"{r['model']} at the {r['place']} ({r['status']})" for r in rows
              if r["status"] != "ok"]  # fmt: skip
    if failed:
        text.append(f"Not: {'; '.join(failed)}.")
    missing = [name for name, of in models.items() if len(of) < len(PLACES)]
    if missing or len(models) < ALL:
        text.append(f"{ALL - len(models) + len(missing)} are not measured at all of them.")
    slow = sorted((r for r in rows if r.get(SECONDS, 0.0) > LIMIT),
                  key=lambda r: -r[SECONDS])  # fmt: skip
    over = "; ".join(f"{r['model']} at the {r['place']} {r[SECONDS]:.0f} s" for r in slow)
    text.append(
        f"The whole path of a model at a split took {median(rows):.0f} s of processor time "
        f"(median), and more than {LIMIT:.0f} s {'nowhere' if not slow else 'here: ' + over}."
    )
    return " ".join(text)


def median(rows: list[Row]) -> float:
    """Middle of the rows' seconds."""
    values = sorted(row[SECONDS] for row in rows if SECONDS in row)
    return float(values[len(values) // 2])


def line(rows: list[Row]) -> Row:
    """One model: its splits, and the worst of its rows."""
    done = [row for row in rows if "edge_macs" in row]
    shares = [100 * row["edge_macs"] / row["edge_macs_dense"] for row in done]
    errors = [row["max_error_mask_zeros"] for row in done if "max_error_mask_zeros" in row]
    inexact = sum(len(row.get("inexact", [])) for row in done)
    bad = [f"{row['place']}: {row['status']}" for row in rows if row["status"] != "ok"]
    return {
        "model": rows[0]["model"], "image_size": rows[0]["image_size"],
        **{row["place"]: f"`{row['split']}`" if row["split"] else "" for row in rows},
        "of_dense": f"{min(shares):.2f}% to {max(shares):.2f}%" if shares else "",
        "mask_error": (f"{max(errors):.0e}" if errors else "") + f" ({inexact} inexact)"
        * bool(inexact),
        "heads": max((row["removed_heads"] for row in done if row.get("opened_attention")),
                     default=""),
        "left": max((row["left_whole"] for row in done), default=""),
        "seconds": max((row[SECONDS] for row in rows if SECONDS in row), default=""),
        "peak_mb": max((row["peak_mb"] for row in rows if "peak_mb" in row), default=""),
        "status": "; ".join(bad) or "ok",
    }  # fmt: skip


def unfollowed(rows: list[Row]) -> str:
    """Per model, the layers that no graph can follow, by example."""
    lines = {}
    for row in rows:
        names = {
            name: why
            for why, found in row.get("left_whole_names", {}).items()
            for name in found
            if "cannot be followed" in why
        }
        if names and row["model"] not in lines:
            first = next(iter(names))
            lines[row["model"]] = (
                f"- {row['model']} (split after {row['split']}): {len(names)} layers, "
                f"{', '.join(list(names)[:4])}{', ...' if len(names) > 4 else ''}. "
                f"The first because {names[first]}."
            )
    if not lines:
        return "Every layer of these models can be followed."
    return "### Left whole because nothing can follow it\n\n" + "\n".join(lines.values())


HEADS = {
    "model": "model", "layers": "layers", "heads": "heads", "infer": "inference, opened",
    "train": "training step, opened", "left": "half of the heads", "macs": "MACs then",
    "infer_halved": "inference then", "macs_narrow": "half of the dimensions: MACs",
    "infer_narrow": "inference then",
}


def heads(record: dict[str, Any], source: str) -> str:
    """Times of opened attention over those of the layers before."""
    table = [{**row, "left": row["heads_left"],
              "macs": f"{100 * row['macs_halved'] / row['macs']:.0f}%",
              "macs_narrow": f"{100 * row['macs_narrow'] / row['macs']:.0f}%",
              **{k: f"{row[k]:.2f}"
                 for k in ("infer", "train", "infer_halved", "infer_narrow")}}
             for row in record["rows"]]
    alike = all(row["macs"] == row["macs_opened"] for row in record["rows"])
    return "\n\n".join([
        "Processor time of the whole model over that of the unchanged one, "
        f"{record['image_size']}x{record['image_size']}, batch {record['batch']}, "
        f"{record['threads']} thread, medians of {record['turns']} turns; opened, then with "
        "half of the heads of every layer gone, or half of the dimensions of every head. The "
        "multiply-adds of the opened models are "
        f"{'those of the unchanged ones' if alike else 'others, which is an error'}.",
        render_table(table, HEADS).strip(), source,
    ])
