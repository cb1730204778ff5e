"""One place to cut: what the dense edge takes, and what pruning to the budget would leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patrol_prune._block_pruning import prunable_blocks
from patrol_prune.budget import MacModel
from patrol_prune.choice import Limits, allowed, smallest
from patrol_prune.edge_sizes import EdgeSizes
from patrol_prune.group_table import GroupTable
from patrol_prune.groups import ChannelGroup
from patrol_prune.latency import Latency
from patrol_prune.plan_limits import EdgeCost, PlanLimits
from patrol_prune.split import Split, SplitPoint

_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


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
        channel_ratio: share of channels to remove, the same in every group, to meet the budget
            and the limits; 0 without pruning, None if they cannot be met.
        smallest_edge_macs: what the edge costs when every group is at its floor.
        fits: whether the budget and the limits can be met here, latency aside.
        reason: why, in a sentence.
        crossing: group that crosses the split -> "consumed" (the cloud only reads its channels)
            or "coupled" (cloud layers produce them too).
        cloud_layers: layers of the cloud that hold channels of those groups.
        effect: what pruning here does to the feature and to the cloud, in a sentence.
        left_whole: edge layers whose channels cannot be followed, and so stay -> why.
        smallest: what is left when every group is at its floor and the blocks that may go are
            gone; parameters count the channels alone.
        pruned: what is left once that share is gone; None if it does not fit, or if blocks have
            to go for it.
        prune_to: the budget to give a pruner here: less than that of the plan where another limit
            asks for more to go.
        latency: of the dense edge on this device, where it was measured.
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
    left_whole: dict[str, str]
    smallest: EdgeCost
    pruned: EdgeCost | None
    prune_to: int
    latency: Latency | None = None
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
        return is_tail(self.feature_shape)


@dataclass(frozen=True)
class Wanted:
    """What every row is held against."""

    edge_macs: int
    limits: PlanLimits
    boundary: str
    floors: Limits
    structures: str = "channels"


def make_row(
    point: SplitPoint, split: Split, table: GroupTable, wanted: Wanted, latency: Latency | None
) -> PlanRow:
    """Everything about one place; see `PlanRow`."""
    on_edge = [g for g in table.groups.values() if g.location == "edge" and g.blocked is None]
    groups = [g for g in on_edge if wanted.structures != "blocks"
              and (wanted.boundary == "prune" or g.crossing is None)]
    blocks = prunable_blocks(split, wanted.structures, ())
    crossing = {g.name: g.crossing for g in table.groups.values() if g.crossing is not None}
    cloud = {id(m): n for n, m in split.cloud_layers.items()}
    touched = {cloud[id(m.module)]: None for n in crossing for m in table.groups[n].members
               if id(m.module) in cloud}
    costs = MacModel(split, table)
    narrows = any(g.crossing is not None for g in groups)
    sizes = EdgeSizes(split, costs, narrows=narrows)

    def cost(percent: int) -> EdgeCost:
        kept = _uniform(groups, percent, wanted.floors)
        return EdgeCost(costs.macs(kept), sizes.params(kept), sizes.feature_bytes(kept))

    dense = EdgeCost(point.edge_macs, point.edge_params, point.feature_bytes)
    floor = cost(100)
    if groups or blocks:
        costly = MacModel(split, table, blocks=blocks) if blocks else costs
        least = smallest(costly, [g.name for g in groups], limits=wanted.floors, blocks=blocks)
        floor = replace(floor, edge_macs=least)
    fits = floor.within(wanted.edge_macs, wanted.limits)
    ratio = None
    if fits:
        ratio = _least_percent(lambda share: cost(share).within(wanted.edge_macs, wanted.limits))
    pruned = floor if ratio is None else cost(ratio)
    is_known = fits and not (ratio is None and blocks)
    return PlanRow(
        name=point.name,
        feature_shape=point.feature_shape,
        feature_bytes=point.feature_bytes,
        edge_macs=point.edge_macs,
        edge_params=point.edge_params,
        budget_fraction=wanted.edge_macs / max(1, point.edge_macs),
        channel_ratio=None if ratio is None else ratio / 100,
        smallest_edge_macs=floor.edge_macs,
        fits=fits,
        reason=_reason(fits, ratio, floor, wanted, has_blocks=bool(blocks)),
        crossing=crossing,
        cloud_layers=tuple(touched),
        effect=_effect(crossing, tuple(touched), wanted.boundary),
        left_whole={n: why for n, why in table.left_out.items() if n in split.edge_layers},
        smallest=floor,
        pruned=pruned if is_known else None,
        prune_to=_prune_to(dense, pruned, wanted),
        latency=latency,
        structures=wanted.structures,
        blocks=tuple(blocks),
    )


def is_tail(shape: tuple[int, ...]) -> bool:
    """Whether a feature is a vector, or a map of one pixel."""
    return len(shape) == 1 or (len(shape) == 3 and shape[1:] == (1, 1))


def short(count: float) -> str:
    """A count with a unit: 9.9M, 4.09G."""
    for unit in ("T", "G", "M", "K"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.3g}{unit}"
    return f"{count:.0f}"


def listed(names: tuple[str, ...], most: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _uniform(
    groups: list[ChannelGroup], percent: int, floors: Limits
) -> dict[str, int | Tensor]:
    """What is kept when this share of every group goes, spread evenly, or as much of it as the
    floors and the rounding allow.
    """
    kept: dict[str, int | Tensor] = {}
    for group in groups:
        units = group.channels // group.tie
        wanted = units - units * percent // 100
        can_stay = allowed(group, 0, floors, group.channels)
        count = min((u for u in can_stay if u >= wanted), default=units)
        kept[group.name] = group.units(torch.arange(count) * units // count)
    return kept


def _least_percent(holds: Callable[[int], bool]) -> int | None:
    """The smallest whole percentage of channels that, removed from every group, is enough."""
    low, high = 0, 100
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _prune_to(dense: EdgeCost, pruned: EdgeCost, wanted: Wanted) -> int:
    """The budget itself, unless the edge is too large in another way."""
    if dense.within(dense.edge_macs, wanted.limits):
        return min(wanted.edge_macs, dense.edge_macs)
    return pruned.edge_macs


def _reason(
    fits: bool, ratio: int | None, floor: EdgeCost, wanted: Wanted, *, has_blocks: bool
) -> str:
    if ratio == 0:
        return "It fits as it is."
    if ratio is not None:
        return f"To fit, {ratio}% of its channels have to go."
    if fits and has_blocks:
        more = "" if wanted.structures == "blocks" else " besides channels"
        return f"To fit, residual blocks have to go{more}."
    if fits:
        return "To fit, some groups have to be pruned to their floor."
    limits = wanted.limits
    missed = [
        f"{short(value)} {unit}"
        for value, most, unit in (
            (floor.edge_macs, wanted.edge_macs, "MACs"),
            (floor.edge_params, limits.edge_params, "parameters"),
            (floor.feature_bytes, limits.feature_bytes, "bytes to upload"),
        )
        if most is not None and value > most
    ]
    return f"It cannot fit: the smallest that can be reached is {' and '.join(missed)}."


def _effect(crossing: dict[str, str], touched: tuple[str, ...], boundary: str) -> str:
    if not crossing:
        return "No channel crosses the split in a way that pruning could change."
    if boundary == "keep":
        return (
            f"The transmitted feature keeps its width and the cloud stays as it is: "
            f"{listed(tuple(crossing))} {'is' if len(crossing) == 1 else 'are'} not pruned."
        )
    if "coupled" in crossing.values():
        return (
            "A residual stream runs on behind the split: pruning it narrows the transmitted "
            f"feature and also {listed(touched)} in the cloud."
        )
    return (
        "The transmitted feature narrows with the edge; in the cloud, "
        f"{listed(touched)} {'takes' if len(touched) == 1 else 'take'} fewer input channels."
    )
