"""The command `plan`: where to cut, what it takes there, and how long."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from rich.text import Text

from patrol_prune import figures
from patrol_prune.errors import InputError
from patrol_prune.latency import LatencyConfig
from patrol_prune.models import build_model
from patrol_prune.open_attention import open_attention
from patrol_prune.plan import Plan, PlanLimits, PlanRow, plan, short
from patrol_prune.settings import ScoreConfig

_AS_IN_A_RUN = ScoreConfig()
"""How far a run prunes: what is recommended here has to be reached there."""
_OTHERS = 68
"""Columns of the console that the plan's table takes beside the names."""


def _plan_options(
    edge_macs: str,
    model: str = "resnet18",
    image_size: int = 128,
    at: str | None = None,
    boundary: Literal["keep", "prune"] = "keep",
    classes: int = 10,
    every: bool = False,
    max_edge_params: int | None = None,
    max_feature_bytes: int | None = None,
    max_latency_ms: float | None = None,
    batch: int = 1,
    threads: int | None = None,
    plot: str | None = None,
    structures: Literal["channels", "blocks", "both"] = "channels",
    heads: bool = True,
    head_unit: Literal["heads", "dimensions"] = "heads",
    max_pruning_ratio: float = _AS_IN_A_RUN.max_pruning_ratio,
    min_channels: int = _AS_IN_A_RUN.min_channels,
    round_to: int | None = _AS_IN_A_RUN.round_to,
) -> None:
    """Options of `plan`.

    Args:
        edge_macs: the budget of the device: 9.9M, 0.5 (of the dense edge at --at), or layer1.
        model: a torchvision classifier, small_resnet, or module:function of your own.
        image_size: side of the square images, in pixels.
        at: ask about this split only, instead of having one recommended.
        boundary: whether channels that cross the split are kept or pruned.
        classes: outputs of the classifier.
        every: show places inside blocks as well.
        max_edge_params: the most parameters on the device.
        max_feature_bytes: the most that may be uploaded per image, as float32.
        max_latency_ms: the longest the edge may take on this device; it is then measured.
        batch: images per pass, for latency.
        threads: of torch, for latency; those it has been given without it.
        plot: a PNG file to draw the table into.
        structures: whether channels, residual blocks or both may go.
        heads: whether attention may lose heads.
        head_unit: whole ones, or dimensions of all heads of a layer.
        max_pruning_ratio: the largest share of any group's channels that may go.
        min_channels: the fewest channels a group keeps.
        round_to: kept numbers are multiples of this.
    """


def add_options(parser: ArgumentParser) -> None:
    """The options of `patrol-prune plan`."""
    parser.add_function_arguments(_plan_options)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--latency", action="store_true",
                        help="measure how long the edge takes on this device, dense and pruned")


def show(options: dict[str, Any], out: Callable[[str], None]) -> None:
    """Carry the command out.

    Args:
        options: as the command line gave them.
        out: prints one string, for JSON.

    Raises:
        PatrolError: whatever is wrong, or that nothing keeps to budget and limits.
    """
    classes, size = options["classes"], options["image_size"]
    if classes < 2 or size < 1:
        raise InputError(
            f"Expected at least 2 classes and a positive image size, came {classes} and {size}."
        )
    file = None if options["plot"] is None else Path(options["plot"]).expanduser()
    if file is not None and (file.suffix != ".png" or file.is_dir()
                             or not file.absolute().parent.is_dir()):
        raise InputError(f"Expected --plot as a .png file in a folder that exists, came {file}.")
    limits = PlanLimits(
        options["max_edge_params"], options["max_feature_bytes"], options["max_latency_ms"]
    )
    config = LatencyConfig(batch=options["batch"], threads=options["threads"])
    timed = options["latency"] or limits.latency_ms is not None
    if not timed and (options["batch"] != 1 or options["threads"] is not None):
        raise InputError("Came --batch or --threads, which say how to time the edge, without "
                         "--latency or --max-latency-ms. Add one of them.")
    model = build_model(options["model"], classes, image_size=size)
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    if options["heads"]:
        open_attention(model, image, unit=options["head_unit"])
    made = plan(
        model, image, edge_macs=options["edge_macs"], at=options["at"],
        boundary=options["boundary"], every=options["every"], limits=limits,
        measure_latency=config if timed else False, structures=options["structures"],
        max_pruning_ratio=options["max_pruning_ratio"], min_channels=options["min_channels"],
        round_to=options["round_to"],
    )
    if file is not None:
        file.write_bytes(plan_figure(made))
    if options["json"]:
        out(json.dumps(made.to_json(), indent=1))
        return
    console = Console()
    console.print(plan_table(made, console.width))
    console.print(made.text, highlight=False, soft_wrap=True)
    if made.pruned:
        console.print(pruned_table(made))
    if file is not None:
        console.print(Text(f"Plot: {file.resolve()}"), soft_wrap=True)


def plan_table(made: Plan, width: int = 120) -> Table:
    """One line for each place to cut; an arrow at the one to take.

    Args:
        made: the plan.
        width: of the console; where it is narrow, names lose their beginnings, which are alike.
    """
    timed = made.rows[0].latency
    room = max(12, width - _OTHERS - 14 * (timed is not None))
    title = f"Places to cut, for {_allowed(made)} on the device"
    table = Table(title=title if timed is None else f"{title} ({timed.circumstances})")
    headings = ["", "cut after", "feature", "upload", "params", "dense MACs", "prune", "smallest"]
    if timed is not None:
        headings.append("ms (IQR)")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("", "cut after") else "right")
    for row in made.rows:
        cells = [
            "→" if row.name == made.recommended else "",
            row.name if len(row.name) <= room else f"…{row.name[1 - room:]}",
            "×".join(str(n) for n in row.feature_shape),
            short(row.feature_bytes) + "B",
            short(row.edge_params),
            short(row.edge_macs),
            _share(row),
            short(row.smallest_edge_macs),
        ]
        if row.latency is not None:
            cells.append(f"{row.latency.median_ms:.3g} ({row.latency.iqr_ms:.2g})")
        table.add_row(*cells, style=None if row.fits else "dim")
    return table


def pruned_table(made: Plan) -> Table:
    """Whether half the multiply-adds is half the time: a line for each rounding."""
    row = made[made.recommended]
    table = Table(title=f"The edge up to {row.name}, pruned to {short(row.prune_to)} MACs")
    table.add_column("channels")
    for heading in ("MACs", "of dense", "params", "ms (IQR)", "of dense"):
        table.add_column(heading, justify="right")
    dense = row.latency
    assert dense is not None
    table.add_row("dense", short(row.edge_macs), "100%", short(row.edge_params),
                  f"{dense.median_ms:.3g} ({dense.iqr_ms:.2g})", "100%")
    for edge in made.pruned:
        if edge.cost is None or edge.latency is None:
            table.add_row(edge.name, edge.reason, *4 * ["–"], style="dim")
            continue
        took = edge.latency
        table.add_row(
            edge.name, short(edge.cost.edge_macs), f"{edge.cost.edge_macs / row.edge_macs:.0%}",
            short(edge.cost.edge_params), f"{took.median_ms:.3g} ({took.iqr_ms:.2g})",
            f"{took.median_ms / dense.median_ms:.0%}",
        )
    return table


def plan_figure(made: Plan) -> bytes:
    """The table as a PNG file."""
    places = [
        figures.Place(
            name=row.name, chosen=row.name == made.recommended, fits=row.fits,
            edge_macs=row.edge_macs, smallest=row.smallest_edge_macs,
            ms=None if row.latency is None else (row.latency.median_ms, row.latency.iqr_ms),
        )
        for row in made.rows
    ]
    pruned = [(edge.name, edge.latency.median_ms, edge.latency.iqr_ms)
              for edge in made.pruned if edge.latency is not None]
    return figures.places(places, budget=made.budget_edge_macs, pruned=pruned,
                          limit_ms=made.limits.latency_ms)


def _allowed(made: Plan) -> str:
    limits = made.limits
    parts = [f"{short(made.budget_edge_macs)} MACs"]
    if limits.edge_params is not None:
        parts.append(f"{short(limits.edge_params)} parameters")
    if limits.feature_bytes is not None:
        parts.append(f"{short(limits.feature_bytes)}B to upload")
    if limits.latency_ms is not None:
        parts.append(f"{limits.latency_ms:g} ms")
    return ", ".join(parts)


def _share(row: PlanRow) -> str:
    if not row.fits:
        return "cannot fit"
    if row.channel_ratio is None:
        return "blocks" if row.blocks else "to the floor"
    return "fits" if row.channel_ratio == 0 else f"{row.channel_ratio:.0%}"
