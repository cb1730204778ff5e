"""Records as text tables: Markdown, and for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from patrol_prune._report_facts import (
    EDGE,
    FLOOR,
    UNDEFENDED,
    Audit,
    RunSummary,
    attack_rows,
    comparison,
    number,
    short,
)
from patrol_prune.errors import InputError

HEADINGS = {UNDEFENDED: "Undefended, same cut", EDGE: "PATROL", FLOOR: "Average picture"}
SUBJECTS = {UNDEFENDED: "Undefended", EDGE: "Edge", FLOOR: "Floor"}
ATTACK_COLUMNS = {
    "attack": "Attack", "box": "Box", "attacker": "Attacker's pictures", "seeds": "Seeds",
    "ssim": "SSIM", "ssim_worst5": "worst 5%", "psnr": "PSNR", "mse": "MSE", "gmsd": "GMSD",
    "rank1": "Rank 1", "chance1": "by chance",
}
TRIAL_COLUMNS = {
    "number": "Trial", "split": "Cut after", "edge_macs": "Edge MACs",
    "feature_bytes": "Upload", "beta": "beta", "alpha": "alpha", "accuracy": "Accuracy",
    "ssim": "SSIM",
}
UPLOAD_COLUMNS = {"feature_channels": "Channels", "bits": "Bits"}
"""Of a search that tries them, beside those."""
REGION_COLUMNS = {"private_ssim": "private"}
"""SSIM there, of an audit that was told where pictures are private; in a terminal instead of PSNR.
"""
_IN_A_TERMINAL = ("attack", "attacker", "ssim", "ssim_worst5", "psnr", "mse", "rank1")


def render_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str]
) -> str:
    """Flat rows as a Markdown table.

    Args:
        rows: one dictionary per line; a key that is missing shows as a dash.
        columns: the keys to show, or a mapping from key to heading.

    Example:
        >>> print(render_table([{"method": "dense", "ssim": 0.71}], ["method", "ssim"]))
        | method | ssim |
        | --- | ---: |
        | dense | 0.710 |
        <BLANKLINE>
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
    if not headings:
        raise InputError("Expected at least one column to show, came none. Name the keys.")

    def cell(text: str) -> str:
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")

    def numeric(key: str) -> bool:
        values = [row[key] for row in rows if row.get(key) is not None]
        return bool(values) and all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in values
        )

    lines = [
        "| " + " | ".join(cell(heading) for heading in headings.values()) + " |",
        "| " + " | ".join("---:" if numeric(key) else "---" for key in headings) + " |",
    ]
    for row in rows:
        cells = (cell(number(key, row.get(key))) for key in headings)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def console_table(summary: RunSummary, audit: Audit) -> Table:
    """The page's main table for a terminal."""
    table = Table(title=Text(f"{summary.name}: {summary.model} cut after {summary.split}"))
    table.add_column("")
    for heading in HEADINGS.values():
        table.add_column(heading, justify="right")
    for row in comparison(summary, audit):
        values = (number(row["key"], row[subject]) for subject in HEADINGS)
        table.add_row(row["label"], *values)
    return table


def attack_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Keys of rows of attacks and their headings, with private regions where those were asked for.
    """
    asked = any(row["private_ssim"] is not None for row in rows)
    return {**ATTACK_COLUMNS, **(REGION_COLUMNS if asked else {})}


def attack_table(audit: Audit) -> Table:
    """One line for each subject, attack and attacker, the strongest of a subject first."""
    table = Table(title="What each attack rebuilds")
    table.add_column("")
    rows = attack_rows(audit.records)
    headings = attack_columns(rows)
    columns = ["private_ssim" if key == "psnr" and "private_ssim" in headings else key
               for key in _IN_A_TERMINAL]
    for key in columns:
        left = key == "attack"
        table.add_column(headings[key], justify="left" if left else "right", no_wrap=left)
    for row in rows:
        cells = (number(key, row[key]) for key in columns)
        table.add_row(SUBJECTS.get(row["subject"], row["subject"]), *cells,
                      style="bold" if row["strongest"] else None)
    return table


def front_table(
    rows: Sequence[Mapping[str, Any]], *, title: str, caption: str
) -> Table:
    """Trials of a search, one line each.

    Args:
        rows: of `TuneTrial`s as dictionaries.
        title: above.
        caption: below.
    """
    table = Table(title=title, caption=caption, caption_justify="left")
    more = {key: heading for key, heading in UPLOAD_COLUMNS.items()
            if any(row[key] is not None for row in rows)}
    columns = [*TRIAL_COLUMNS.items()]
    columns[4:4] = more.items()  # before beta
    for key, heading in columns:
        left = key == "split"
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    for row in rows:
        shown = {
            **row, "beta": f"{row['beta']:.3g}", "alpha": f"{row['alpha']:g}",
            "edge_macs": short(row["edge_macs"]), "feature_bytes": short(row["feature_bytes"], "B"),
        }
        table.add_row(*(number(key, shown[key]) for key, _ in columns))
    return table


def flag_lines(flags: Sequence[Mapping[str, Any]], *, edge: str = "PATROL") -> list[str]:
    """One line for each kind of flag: what it means, what to do, and where it was raised.

    `edge` is what the audited half is called; a model from elsewhere is not PATROL's.
    """
    return [
        f"{flag['name']} ({flag['where']}): {flag['meaning']} {flag['advice']}"
        for flag in merged_flags(flags, edge=edge)
    ]


def merged_flags(
    flags: Sequence[Mapping[str, Any]], *, edge: str = "PATROL"
) -> list[dict[str, str]]:
    """One entry for each flag that says something else, with everywhere it was raised."""
    merged: dict[tuple[str, str], dict[str, str]] = {}
    for flag in flags:
        subject = str(flag.get("subject", ""))
        where = {EDGE: edge, UNDEFENDED: "undefended"}.get(subject, subject)
        if flag.get("attack") is not None:
            where += f", {flag['attack']}"
        if flag.get("attack_seed") is not None:
            where += f", seed {flag['attack_seed']}"
        entry = merged.setdefault(
            (str(flag["name"]), str(flag["meaning"])),
            {key: str(flag[key]) for key in ("name", "meaning", "advice")} | {"where": ""},
        )
        entry["where"] += ("; " if entry["where"] else "") + where
    return list(merged.values())
