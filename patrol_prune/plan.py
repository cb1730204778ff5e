"""Where to cut a model for a budget of edge MACs, and how hard to prune there.

Deeper splits give less away and cost more; pruning makes room for more depth. For every place to
cut, the plan says what the dense edge costs, which uniform share of its channels would have to go,
and what that does to the transmitted feature and to the cloud.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from patrol_prune._block_pruning import STRUCTURES, check_structures, prunable_blocks
from patrol_prune.budget import MacModel
from patrol_prune.choice import Limits, smallest
from patrol_prune.errors import BudgetError, InputError, nearest
from patrol_prune.group_table import GroupTable, build_graph
from patrol_prune.groups import ChannelGroup
from patrol_prune.split import Split, SplitPoint, split_points

BOUNDARIES = ("keep", "prune")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MOST_ROWS = 24


@dataclass(frozen=True)
class PlanRow:
    """One place to cut.

    Attributes:
        name: of the split point.
        feature_shape: transmitted feature of the dense edge, without the batch.
        feature_bytes: its size as float32.
        edge_macs: multiply-adds of the dense edge at batch 1.
        edge_params: parameters of the dense edge.
        budget_fraction: budget over `edge_macs`; 1 or more needs no pruning.
        channel_ratio: share of channels to remove, the same in every group, to meet the budget;
            0 without pruning, None if it cannot be met.
        smallest_edge_macs: what the edge costs when every group is at its floor.
        fits: whether the budget can be met here.
        reason: why, in a sentence.
        crossing: group that crosses the split -> "consumed" (the cloud only reads its channels)
            or "coupled" (cloud layers produce them too).
        cloud_layers: layers of the cloud that hold channels of those groups.
        effect: what pruning here does to the feature and to the cloud, in a sentence.
        left_whole: edge layers whose channels cannot be followed, and so stay -> why.
        structures: what may go: "channels", "blocks" or "both".
        blocks: the residual blocks that may go; empty unless asked for.
    """

    name: str
    feature_shape: tuple[int, ...]
    feature_bytes: int
    edge_macs: int
    edge_params: int
    budget_fraction: float
    channel_ratio: float | None
    smallest_edge_macs: int
    fits: bool
    reason: str
    crossing: dict[str, str]
    cloud_layers: tuple[str, ...]
    effect: str
    left_whole: dict[str, str] = field(default_factory=dict)
    structures: str = "channels"
    blocks: tuple[str, ...] = ()

    @property
    def strength(self) -> float | None:
        """How hard the edge is pruned to fit, on [0, 1]; None if it cannot fit that way.

        The `channel_ratio`; where blocks alone may go, the share of the MACs that has to.
        """
        if self.structures != "blocks":
            return self.channel_ratio
        return max(0.0, 1.0 - self.budget_fraction) if self.fits else None

    @property
    def is_tail(self) -> bool:
        """Whether nothing spatial is left: a vector, or a map of one pixel."""
        return _is_tail(self.feature_shape)


@dataclass(frozen=True)
class Plan:
    """Every place to cut, shallow to deep, and the recommended one.

    Attributes:
        rows: the places.
        recommended: the deepest place that fits with moderate pruning, or the one asked for.
        budget_edge_macs: the budget as a count.
        boundary: what happens to groups that cross the split.
        structures: what may go: "channels", "blocks" or "both".
    """

    rows: tuple[PlanRow, ...]
    recommended: str
    budget_edge_macs: int
    boundary: str
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
        for first in tuple(row.left_whole)[:1]:
            lines.append(f"Left whole: {_listed(tuple(row.left_whole))}. {first!r} because "
                         f"{row.left_whole[first]}.")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "budget_edge_macs": self.budget_edge_macs,
            "boundary": self.boundary,
            "structures": self.structures,
            "recommended": self.recommended,
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
    every: bool = False,
    structures: str = "channels",
) -> Plan:
    """Every split under the budget, and the one to take.

    Recommended is the deepest split that fits, needs at most `max_channel_ratio` of the channels
    removed, and still transmits more than a vector (the last layers before the classifier give
    least away, but hardly anything is left for the cloud to do).

    Args:
        model: left as found.
        example_inputs: a batch, or a tuple with one.
        edge_macs: the budget: a count (`9_900_000`, "9.9M"), a fraction in (0, 1] of the dense
            edge at `at`, or the name of a split, whose dense edge's MACs are meant.
        at: take this split instead of recommending one.
        boundary: "keep" leaves groups that cross the split whole, "prune" prunes them too.
        max_channel_ratio: how hard the recommended split may be pruned.
        max_pruning_ratio: how hard any group may be pruned; it sets `smallest_edge_macs`.
        min_channels: the fewest channels a group keeps.
        every: show places inside blocks as well.
        structures: whether channels, residual blocks or both may go.

    Raises:
        InputError: a budget that is none, a fraction without `at`, a split that does not exist,
            or a budget above every dense edge.
        BudgetError: nothing that can be reached is within the budget; it tells the smallest.
        UnsupportedModelError: the model cannot be traced or pruned.
    """
    if boundary not in BOUNDARIES:
        raise InputError(f'Expected boundary "keep" or "prune", came {boundary!r}.')
    check_structures(structures)
    if not 0.0 < max_channel_ratio < 1.0:
        raise InputError(f"Expected max_channel_ratio in (0, 1), came {max_channel_ratio}.")
    limits = Limits(min_channels=min_channels, max_pruning_ratio=max_pruning_ratio)
    points = split_points(model, example_inputs)
    wanted = None if at is None else _point(points, at)
    budget = parse_budget(edge_macs, points, wanted)
    if wanted is not None and budget > wanted.edge_macs:
        raise InputError(
            f"The budget of {budget:,} MACs is above the dense edge at {wanted.name}, which takes "
            f"{wanted.edge_macs:,}: there is nothing to prune. Give a smaller budget, or cut "
            "deeper."
        )
    graph = build_graph(model, example_inputs)
    rows = []
    for point in _shown(points, wanted, every):
        split = Split(model, example_inputs, at=point.name)
        table = GroupTable.build(model, example_inputs, split=split, graph=graph)
        rows.append(_row(point, split, table, budget, boundary, limits, structures))
    chosen = _recommend(rows, budget, max_channel_ratio) if wanted is None else wanted.name
    result = Plan(tuple(rows), chosen, budget, boundary, structures)
    least = result[chosen].smallest_edge_macs
    if not result[chosen].fits:
        raise BudgetError(
            f"No choice of {STRUCTURES[structures]} brings the edge at {chosen} to {budget:,} "
            f"MACs; the smallest reachable is {least:,}. Raise the budget, cut at a shallower "
            "split, or allow boundary='prune'.", smallest_edge_macs=least)
    return result


def parse_budget(
    edge_macs: int | float | str, points: Sequence[SplitPoint], at: SplitPoint | None
) -> int:
    """The budget as a count of multiply-adds; see `plan` for the spellings.

    Raises:
        InputError: none of them, or a fraction without a split.
    """
    value: int | float | str = edge_macs
    if isinstance(value, str):
        text = value.strip().replace("_", "").replace(",", "")
        match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kKMGT]?)(?:MACs)?", text)
        named = {name: p.edge_macs for p in points for name in (p.name, *p.aliases)}
        if value in named:
            value = named[value]
        elif match is not None and match.group(1).count(".") <= 1 and match.group(1) != ".":
            number = float(match.group(1)) * _UNITS[match.group(2).upper()]
            fraction = match.group(2) == "" and not text.isdigit() and number <= 1.0
            value = number if fraction else round(number)
        else:
            raise InputError(
                f"Expected edge MACs as a count (9900000 or 9.9M), a fraction in (0, 1], or the "
                f"name of a split, came {value!r}. {nearest(value, named)}"
            )
    if isinstance(value, bool) or not value > 0 or value == float("inf"):
        raise InputError(f"Expected a positive number of edge MACs, came {edge_macs!r}.")
    if isinstance(value, float) and value <= 1.0:
        if at is None:
            raise InputError(
                f"The budget {edge_macs!r} is a fraction of a dense edge, but no split is given to "
                "say of which. Give --at (at=...), or the budget as a count, as in 9.9M."
            )
        value = int(value * at.edge_macs)
    return int(value)


def short(count: float) -> str:
    """A count with a unit: 9.9M, 4.09G."""
    for unit in ("T", "G", "M", "K"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.3g}{unit}"
    return f"{count:.0f}"


def _is_tail(shape: tuple[int, ...]) -> bool:
    return len(shape) == 1 or (len(shape) == 3 and shape[1:] == (1, 1))


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
    last = list({(p.edge_macs, _is_tail(p.feature_shape)): p for p in points}.values())
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


def _row(
    point: SplitPoint, split: Split, table: GroupTable, budget: int, boundary: str,
    limits: Limits, structures: str,
) -> PlanRow:
    on_edge = [g for g in table.groups.values() if g.location == "edge" and g.blocked is None]
    groups = [g for g in on_edge if structures != "blocks"
              and (boundary == "prune" or g.crossing is None)]
    blocks = prunable_blocks(split, structures, ())
    crossing = {g.name: g.crossing for g in table.groups.values() if g.crossing is not None}
    cloud = {id(m): n for n, m in split.cloud_layers.items()}
    touched = {cloud[id(m.module)]: None for n in crossing for m in table.groups[n].members
               if id(m.module) in cloud}
    costs = MacModel(split, table, blocks=blocks)
    floor = point.edge_macs
    if groups or blocks:
        floor = smallest(costs, [g.name for g in groups], limits=limits, blocks=blocks)
    fits = floor <= budget
    ratio = _uniform_ratio(costs, groups, budget, limits) if fits else None
    if point.edge_macs <= budget:
        reason = "It fits as it is."
    elif ratio is not None:
        reason = f"To fit, {100 * ratio:.0f}% of its channels have to go."
    elif fits and blocks:
        more = "" if structures == "blocks" else " besides channels"
        reason = f"To fit, residual blocks have to go{more}."
    elif fits:
        reason = "To fit, some groups have to be pruned to their floor."
    else:
        reason = f"It cannot fit: the smallest that can be reached is {short(floor)} MACs."
    return PlanRow(
        name=point.name,
        feature_shape=point.feature_shape,
        feature_bytes=point.feature_bytes,
        edge_macs=point.edge_macs,
        edge_params=point.edge_params,
        budget_fraction=budget / max(1, point.edge_macs),
        channel_ratio=ratio,
        smallest_edge_macs=floor,
        fits=fits,
        reason=reason,
        crossing=crossing,
        cloud_layers=tuple(touched),
        effect=_effect(crossing, tuple(touched), boundary),
        left_whole={n: why for n, why in table.left_out.items() if n in split.edge_layers},
        structures=structures,
        blocks=tuple(blocks),
    )


def _uniform_ratio(
    costs: MacModel, groups: list[ChannelGroup], budget: int, limits: Limits
) -> float | None:
    """The smallest whole percentage that, removed from every group, meets the budget."""

    def macs(percent: int) -> int:
        kept: dict[str, int | Tensor] = {}
        for group in groups:
            units = group.channels // group.tie
            most = units - -(-limits.floor(group.channels) // group.tie)
            count = units - min(most, units * percent // 100)
            kept[group.name] = group.units(torch.arange(count) * units // count)
        return costs.macs(kept)

    low, high = 0, 100
    if macs(high) > budget:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if macs(middle) <= budget else (middle + 1, high)
    return low / 100


def _effect(crossing: dict[str, str], touched: tuple[str, ...], boundary: str) -> str:
    if not crossing:
        return "No channel crosses the split in a way that pruning could change."
    if boundary == "keep":
        return (
            f"The transmitted feature keeps its width and the cloud stays as it is: "
            f"{_listed(tuple(crossing))} {'is' if len(crossing) == 1 else 'are'} not pruned."
        )
    if "coupled" in crossing.values():
        return (
            "A residual stream runs on behind the split: pruning it narrows the transmitted "
            f"feature and also {_listed(touched)} in the cloud."
        )
    return (
        "The transmitted feature narrows with the edge; in the cloud, "
        f"{_listed(touched)} {'takes' if len(touched) == 1 else 'take'} fewer input channels."
    )


def _listed(names: tuple[str, ...], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _recommend(rows: list[PlanRow], budget: int, max_channel_ratio: float) -> str:
    if all(row.edge_macs <= budget for row in rows):
        deepest = rows[-1]
        raise InputError(
            f"The budget of {budget:,} MACs is above every dense edge; the deepest, "
            f"{deepest.name}, takes {deepest.edge_macs:,}: there is nothing to prune. Give a "
            "smaller budget."
        )
    able = [r for r in rows if r.fits]
    if not able:
        least = min(rows, key=lambda r: r.smallest_edge_macs)
        raise BudgetError(
            f"No choice of {STRUCTURES[rows[0].structures]} meets {budget:,} MACs at any split: "
            f"the smallest reachable is {least.smallest_edge_macs:,}, at {least.name}. Raise it.",
            smallest_edge_macs=least.smallest_edge_macs)
    moderate = [r for r in able
                if r.strength is not None and r.strength <= max_channel_ratio]
    inner = [r for r in moderate if not r.is_tail]
    return (inner or moderate or able[:1])[-1].name
