"""The table of `docs/backbones.md`, from `results/backbones.json`."""

from __future__ import annotations

from typing import Any

from patrol_prune.report import render_table

Row = dict[str, Any]
ALL = 80
COLUMNS = {
    "model": "model", "place": "where", "split": "split after", "image_size": "input",
    "macs": "edge MACs", "of_dense": "of the dense edge", "mask_error": "mask against removal",
    "left": "left whole", "seconds": "seconds", "peak_mb": "MB", "status": "status",
}  # fmt: skip


def backbones(record: dict[str, Any], source: str) -> str:
    """Summary, one table per kind, and what stays whole for which reason."""
    parts = [summary(record)]
    for kind in dict.fromkeys(row["kind"] for row in record["rows"]):
        rows = [line(r) for r in sorted(record["rows"], key=by_name) if r["kind"] == kind]
        parts.append(f"### {kind.capitalize()}\n\n" + render_table(rows, COLUMNS).strip())
    return "\n\n".join([*parts, unfollowed(record["rows"]), source])


def summary(record: dict[str, Any]) -> str:
    """How many of torchvision's classifiers, which not and why, and the slowest."""
    rows = [row for row in record["rows"] if row["kind"] == "classification"]
    tried = {row["model"] for row in rows}
    good = {row["model"] for row in rows if row["status"] == "ok"}
    text = [f"**{len(good)} of {ALL}** classification models keep every invariant at a split."]
    failed = [f"{r['model']} at the {r['place']} ({r['status']})" for r in rows
              if r["status"] != "ok"]  # fmt: skip
    if failed:
        text.append(f"Not: {'; '.join(failed)}.")
    if len(tried) < ALL:
        text.append(f"{ALL - len(tried)} are not measured yet.")
    slowest = max(rows, key=lambda row: row.get("cpu_seconds", 0.0))
    text.append(
        f"The slowest is {slowest['model']}, {slowest['cpu_seconds']:.0f} seconds of processor "
        f"time for everything; the median is {median(rows):.0f}. Seconds in the table are the "
        "wall clock's on a machine with much else to do."
    )
    return " ".join(text)


def by_name(row: Row) -> tuple[str, str]:
    """Order of the rows in the table."""
    return row["model"], row["place"]


def median(rows: list[Row]) -> float:
    """Middle processor time of the rows that have one."""
    values = sorted(row["cpu_seconds"] for row in rows if "cpu_seconds" in row)
    return float(values[len(values) // 2])


def line(row: Row) -> Row:
    """One row of the table."""
    done = "edge_macs" in row
    error = f"{row['max_error_mask_zeros']:.0e}" if "max_error_mask_zeros" in row else ""
    if row.get("exact") is False:
        error += f" ({len(row['inexact'])} inexact)"
    return {
        **row,
        "macs": f"{row['edge_macs'] / 1e6:.1f} M" if done else "",
        "of_dense": f"{100 * row['edge_macs'] / row['edge_macs_dense']:.2f}%" if done else "",
        "mask_error": error, "left": row.get("left_whole", ""), "seconds": row.get("seconds", ""),
        "peak_mb": row.get("peak_mb", ""),
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
