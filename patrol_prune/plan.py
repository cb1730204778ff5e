"""Where to cut a model for a budget of edge MACs, and how hard to prune there.

Deeper splits give less away and cost more; pruning makes room for more depth. For every place to
cut, the plan says what the dense edge costs, which uniform share of its channels would have to go
to meet the budget, and what that does to the transmitted feature and to the cloud. Where asked, it
also measures how long the edge takes on this device, dense and pruned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from patrol_prune._block_pruning import check_structures
from patrol_prune.budget import spelled
from patrol_prune.choice import Limits
from patrol_prune.cost import as_single_tensor
from patrol_prune.errors import InputError, nearest
from patrol_prune.given import check_kind, check_number, is_number
from patrol_prune.group_table import GroupTable, build_graph
from patrol_prune.latency import LatencyConfig, measure_latency
from patrol_prune.plan_choice import fastest_enough, preferred, require_possible
from patrol_prune.plan_limits import PlanLimits
from patrol_prune.plan_rows import PlanRow, Wanted, is_tail, listed, make_row, short
from patrol_prune.pruned_edges import PrunedEdge, PrunedEdges
from patrol_prune.split import SplitPoint, split_at_each, split_points

__all__ = ["Plan", "PlanLimits", "PlanRow", "parse_budget", "plan", "short"]

BOUNDARIES = ("keep", "prune")
_MOST_ROWS = 24


@dataclass(frozen=True)
class Plan:
    """Every place to cut, shallow to deep, and the recommended one.

    `plan[name]` is the row of one place. A row has `name`, `feature_shape`, `feature_bytes`,
    `edge_macs` and `edge_params` of the dense edge there, as a `SplitPoint` has; `fits`, whether
    budget and limits can be met there, latency aside, and `reason`, why, in a sentence;
    `channel_ratio`, the share of channels that has to go (None where it does not fit), and
    `prune_to`, the budget to give `PatrolPruner`; `smallest_edge_macs`, what can be reached;
    `pruned`, what is left then (`edge_macs`, `edge_params`, `feature_bytes`); `effect`, what that
    does to feature and cloud; `left_whole`, edge layers that cannot be pruned -> why; `blocks`,
    the residual blocks that may go; and `latency`, where it was measured.

    Attributes:
        rows: the places.
        recommended: the deepest place that fits with moderate pruning, or the one asked for.
        budget_edge_macs: the budget as a count.
        boundary: what happens to groups that cross the split.
        limits: what the edge had to keep to besides.
        pruned: the recommended edge pruned to the budget and measured, one for each rounding, with
            `round_to`, `cost` (multiply-adds, parameters, bytes), `latency`, and `reason` where it
            cannot be had; empty unless latency was measured and channels have to go.
        structures: what may go: "channels", "blocks" or "both".
    """

    rows: tuple[PlanRow, ...]
    recommended: str
    budget_edge_macs: int
    boundary: str
    limits: PlanLimits = field(default_factory=PlanLimits)
    pruned: tuple[PrunedEdge, ...] = ()
    structures: str = "channels"

    def __getitem__(self, name: str) -> PlanRow:
        """The row of a split point; an unknown name is an `InputError`."""
        for row in self.rows:
            if row.name == name:
                return row
        names = [row.name for row in self.rows]
        raise InputError(f"The plan has no row {name!r}. {nearest(name, names)}")

    @property
    def text(self) -> str:
        """The recommendation in a few sentences."""
        row = self[self.recommended]
        lines = [
            f"Budget: {short(self.budget_edge_macs)} MACs on the edge. Cut after {row.name}.",
            f"The dense edge there takes {short(row.edge_macs)} MACs. {row.reason}",
            row.effect,
        ]
        if row.prune_to < min(self.budget_edge_macs, row.edge_macs):
            lines.append(
                f"For the other limits, prune to {short(row.prune_to)} MACs there, and look again "
                "at what is left: which channels the scores take decides over parameters and bytes."
            )
        if row.left_whole:
            first = next(iter(row.left_whole))
            lines.append(f"Left whole: {listed(tuple(row.left_whole))}. {first!r} because "
                         f"{row.left_whole[first]}.")
        return "\n".join([*lines, *self._measured(row)])

    def _measured(self, row: PlanRow) -> list[str]:
        """What was measured, as sentences; `pruned` has every rounding."""
        if row.latency is None:
            return []
        dense = row.latency
        lines = [f"Measured on this device ({dense.circumstances}): the dense edge takes {dense}."]
        for edge in self.pruned[:1]:
            if edge.cost is None or edge.latency is None:
                lines.append(f"Pruned, {edge.name} of channels: {edge.reason}.")
                continue
            share = edge.cost.edge_macs / max(1, row.edge_macs)
            of_time = edge.latency.median_ms / dense.median_ms
            lines.append(f"Pruned to {share:.0%} of its MACs, it takes {of_time:.0%} of the time: "
                         f"{edge.latency}.")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "budget_edge_macs": self.budget_edge_macs,
            "boundary": self.boundary,
            "structures": self.structures,
            "recommended": self.recommended,
            "limits": asdict(self.limits),
            "pruned": [asdict(edge) for edge in self.pruned],
            "rows": [{**asdict(row), "feature_shape": list(row.feature_shape),
                      "cloud_layers": list(row.cloud_layers),
                      "blocks": list(row.blocks)} for row in self.rows],
        }


def plan(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    edge_macs: int | float | str,
    at: str | None = None,
    boundary: str = "keep",
    max_channel_ratio: float = 0.6,
    max_pruning_ratio: float = 0.95,
    min_channels: int = 1,
    round_to: int | None = None,
    every: bool = False,
    limits: PlanLimits | None = None,
    measure_latency: bool | LatencyConfig = False,
    structures: str = "channels",
) -> Plan:
    """Every split under the budget, and the one to take.

    Recommended is the deepest split that keeps to the budget and to every limit, needs at most
    `max_channel_ratio` of the channels removed, and still transmits more than a vector (the last
    layers before the classifier give least away, but hardly anything is left for the cloud to do),
    unless nothing else keeps to the limits.

    Parameters and bytes are those left when the same share of every group is gone; scores that
    spread the removal otherwise meet the same MACs with other numbers of parameters. A latency is
    kept to if a copy, pruned by magnitude to the row's `prune_to`, was measured within it.

    Args:
        model: left as found.
        example_inputs: a batch, or a tuple with one.
        edge_macs: the budget: a count (`9_900_000`, "9.9M"), a fraction in (0, 1] of the dense
            edge at `at`, or the name of a split, whose dense edge's MACs are meant.
        at: take this split instead of recommending one.
        boundary: "keep" leaves groups that cross the split whole, "prune" prunes them too.
        max_channel_ratio: the largest share of channels that may have to go at the recommended
            split, in (0, 1).
        max_pruning_ratio: the largest share of any group's channels that may go, in (0, 1]; it
            sets the rows' `smallest_edge_macs`.
        min_channels: the fewest channels a group keeps.
        round_to: kept numbers are multiples of this, or whole groups.
        every: show places inside blocks as well.
        limits: parameters, uploaded bytes and milliseconds; a limit of latency measures it.
        measure_latency: time the dense edge of every place shown, and the pruned one of the
            recommended place with its channels rounded in several ways. It takes some seconds for
            each place. A `LatencyConfig` says batch, threads and roundings.
        structures: what may go: "channels", residual "blocks" or "both".

    Raises:
        InputError: a budget that is none, a fraction without `at`, a split that does not exist, a
            setting out of its range; without limits, a budget above the dense edge at `at`, or
            above every dense edge.
        BudgetError: nothing that can be reached is within budget and limits; it tells the smallest.
        UnsupportedModelError: the model cannot be traced or pruned.
    """
    if boundary not in BOUNDARIES:
        raise InputError(f'Expected boundary "keep" or "prune", came {boundary!r}.')
    check_structures(structures)
    check_number(max_channel_ratio, "max_channel_ratio")
    if not 0.0 < max_channel_ratio < 1.0:
        raise InputError(f"Expected max_channel_ratio in (0, 1), came {max_channel_ratio}.")
    floors = Limits(min_channels=min_channels, max_pruning_ratio=max_pruning_ratio,
                    round_to=round_to)
    limits = limits or PlanLimits()
    check_kind(limits, "limits", PlanLimits, "Make one: PlanLimits(feature_bytes=20_000).")
    if structures == "blocks" and limits.latency_ms is not None:
        raise InputError(
            "Expected no limit of latency where blocks alone may go: the copies that are timed "
            "lose channels. Leave it out, or let both go."
        )
    if not isinstance(measure_latency, bool | LatencyConfig):
        raise InputError("Expected measure_latency as True, False or a LatencyConfig, came "
                         f"{measure_latency!r}.")
    if at is not None:
        check_kind(at, "at", str, "Give the name of a split point, as in at='layer2'.")
    points = split_points(model, example_inputs)
    asked = None if at is None else _point(points, at)
    budget = parse_budget(edge_macs, points, asked)
    if asked is not None and budget > asked.edge_macs and limits.is_none:
        raise InputError(
            f"The budget of {budget:,} MACs is above the dense edge at {asked.name}, which takes "
            f"{asked.edge_macs:,}: there is nothing to prune. Give a smaller budget, or cut "
            "deeper."
        )
    config = measure_latency if isinstance(measure_latency, LatencyConfig) else None
    if config is None and (measure_latency or limits.latency_ms is not None):
        config = LatencyConfig()
    wanted = Wanted(budget, limits, boundary, floors, structures)
    rows = _rows(model, example_inputs, _shown(points, asked, every), wanted, config)
    able = rows if asked is None else [row for row in rows if row.name == asked.name]
    require_possible(able, wanted)
    order = preferred(able, max_channel_ratio)
    if config is None:
        return Plan(tuple(rows), order[0].name, budget, boundary, limits, structures=structures)
    edges = PrunedEdges(model, as_single_tensor(example_inputs), wanted, config)
    chosen = order[0].name
    if limits.latency_ms is not None:
        chosen = fastest_enough(order, wanted, edges.of)
    row = next(r for r in rows if r.name == chosen)
    is_timed = row.channel_ratio != 0 and structures != "blocks"
    pruned = tuple(edges.of(row)) if is_timed else ()
    return Plan(tuple(rows), chosen, budget, boundary, limits, pruned, structures)


def _rows(
    model: nn.Module, example_inputs: Tensor | Sequence[Tensor], points: Sequence[SplitPoint],
    wanted: Wanted, config: LatencyConfig | None,
) -> list[PlanRow]:
    graph = build_graph(model, example_inputs)
    rows = []
    splits = split_at_each(model, example_inputs, [point.name for point in points])
    for point, split in zip(points, splits, strict=True):
        table = GroupTable.build(model, example_inputs, split=split, graph=graph)
        latency = None
        if config is not None:
            latency = measure_latency(split.edge, example_inputs, config)
        rows.append(make_row(point, split, table, wanted, latency))
    return rows


def parse_budget(
    edge_macs: int | float | str, points: Sequence[SplitPoint], at: SplitPoint | None
) -> int:
    """The budget as a count of multiply-adds; see `plan` for the spellings.

    Raises:
        InputError: none of them, or a fraction without a split.
    """
    value: int | float | str = edge_macs
    if isinstance(value, str):
        named = {name: p.edge_macs for p in points for name in (p.name, *p.aliases)}
        number = named.get(value, spelled(value))
        if number is not None:
            value = number
        else:
            raise InputError(
                f"Expected edge MACs as a count (9900000, 9,900,000 or 9.9M, with a decimal "
                f"point), a fraction in (0, 1], or the name of a split, came {value!r}. "
                f"{nearest(value, named)}"
            )
    if not is_number(value) or not 0 < value < float("inf"):
        raise InputError(f"Expected a positive number of edge MACs, came {edge_macs!r}.")
    if isinstance(value, float) and value <= 1.0:
        if at is None:
            raise InputError(
                f"The budget {edge_macs!r} is a fraction of a dense edge, but no split is given to "
                "say of which. Give --at (at=...), or the budget as a count, as in 9.9M."
            )
        value = int(value * at.edge_macs)
    return int(value)


def _point(points: Sequence[SplitPoint], at: str) -> SplitPoint:
    named = {name: p for p in points for name in (p.name, *p.aliases)}
    if at not in named:
        raise InputError(
            f"There is no split point {at!r} in this model. {nearest(at, named)} The plan lists "
            "every one."
        )
    return named[at]


def _shown(points: list[SplitPoint], wanted: SplitPoint | None, every: bool) -> list[SplitPoint]:
    """One point per edge cost, the last; whole modules first, as long as the table stays short."""
    last = list({(p.edge_macs, is_tail(p.feature_shape)): p for p in points}.values())
    shown = last
    if not every:
        for depth in range(max(p.name.count(".") for p in last) + 1):
            level = [p for p in last if p.name.count(".") <= depth]
            if depth and len(level) > _MOST_ROWS:
                break
            shown = level
    if wanted is not None and wanted not in shown:
        shown = [p for p in points if p in shown or p == wanted]
    return shown
