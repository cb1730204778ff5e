"""Which channels to keep for a budget of edge MACs.

Every group of channels is a ladder: its tied units in the order of their scores, a rung per
removal that the limits allow; a residual block is a ladder of one rung. All decisions are taken on
the closed form of `budget.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patrol_prune._search import Floats, Ladder, Search
from patrol_prune.budget import MacModel
from patrol_prune.errors import BudgetError, InputError
from patrol_prune.given import check_count, check_number
from patrol_prune.groups import ChannelGroup

_NAMED = 3


@dataclass(frozen=True)
class Limits:
    """How far a group may shrink.

    Args:
        min_channels: channels every group keeps at least.
        max_pruning_ratio: largest removed fraction of a group's channels at the start.
        round_to: kept numbers are multiples of this, or the full width.
    """

    min_channels: int = 1
    max_pruning_ratio: float = 1.0
    round_to: int | None = None

    def __post_init__(self) -> None:
        check_count(self.min_channels, "min_channels", 1)
        check_count(self.round_to, "round_to", 1, optional=True)
        check_number(self.max_pruning_ratio, "max_pruning_ratio")
        if not 0.0 < self.max_pruning_ratio <= 1.0:
            raise InputError(
                f"Expected max_pruning_ratio in (0, 1], came {self.max_pruning_ratio}."
            )

    def set_ones(self) -> list[str]:
        """The names of those that hold a group back."""
        return [*["min_channels"] * (self.min_channels > 1),
                *["round_to"] * ((self.round_to or 1) > 1),
                *["max_pruning_ratio"] * (self.max_pruning_ratio < 1.0)]

    def floor(self, channels: int) -> int:
        """The fewest channels a group that started with `channels` may keep."""
        ratio_floor = int(np.ceil(channels * (1.0 - self.max_pruning_ratio) - 1e-9))
        return min(channels, max(self.min_channels, self.round_to or 1, ratio_floor, 1))


def choose(
    model: MacModel,
    scores: Mapping[str, Tensor],
    budget: int,
    *,
    limits: Limits | None = None,
    initial: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """The channels to keep: the best scores that fit, at most `budget` and close below it.

    Structures are removed in the order of score per saved MAC, the cut is found by bisection on
    the closed form, then what still fits is put back, best score first, and small exchanges close
    the gap to the budget, unless all that went scores 0. A group is never emptied.

    Args:
        model: the edge's cost.
        scores: group name -> `[C]`, higher = keep. Groups that are not named stay whole.
        budget: edge MACs, at batch 1.
        limits: floors per group.
        initial: group name -> channels before any pruning, for `max_pruning_ratio` over several
            steps; the present widths without it.

    Returns:
        group name -> kept channels, sorted, for every group in `scores`.

    Raises:
        InputError: scores of the wrong length or not finite, or a budget above the dense edge.
        BudgetError: even the smallest allowed edge costs more; it says how much.
    """
    return choose_structures(model, scores, {}, budget, limits=limits, initial=initial)[0]


def choose_structures(
    model: MacModel,
    scores: Mapping[str, Tensor],
    block_scores: Mapping[str, float],
    budget: int,
    *,
    limits: Limits | None = None,
    initial: Mapping[str, int] | None = None,
    fixed: Mapping[str, int] | None = None,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """`choose` among channels and residual blocks, which compete by score per saved MAC.

    A removed block takes the MACs of its inner groups along; these groups are not in the result.
    Where nothing but blocks does work on the edge, the one with the best score stays. Blocks alone
    are too coarse for exchanges: the edge may then be well below the budget.

    Args:
        model: the edge's cost, made with these blocks.
        scores: group name -> `[C]`, higher = keep.
        block_scores: block name -> score, on the same scale.
        budget: edge MACs, at batch 1.
        limits: floors per group.
        initial: group name -> channels before any pruning.
        fixed: group name -> channels that it keeps, whatever the budget.

    Returns:
        (group name -> kept channels, names of the blocks to remove).

    Raises:
        InputError, BudgetError: as `choose`; InputError where a group may not keep so many.
    """
    limits = limits or Limits()
    if budget > model.dense:
        raise InputError(
            f"Expected a budget of at most the dense edge's {model.dense} MACs, came {budget}: "
            "nothing needs to be pruned. Give a fraction in (0, 1], a smaller count, or choose a "
            "deeper split."
        )
    start, width = initial or {}, fixed or {}
    ladders = [_ladder(model, n, s, limits, start.get(n), width.get(n))
               for n, s in scores.items()]
    blocks = [_block_ladder(model, n, s) for n, s in block_scores.items()]
    if blocks and not _floor_macs(model, [*ladders, *blocks]):
        blocks.remove(max(blocks, key=lambda ladder: ladder.scores[0]))
    require_reachable(budget, _floor_macs(model, [*ladders, *blocks]), model.dense,
                      fixed=bool(fixed))
    search = Search(model, [*ladders, *blocks], budget)
    taken = search.run(exchange=bool(ladders) or not blocks).taken
    gone = tuple(b.name for b, t in zip(blocks, taken[len(ladders):], strict=True) if t)
    kept = {}
    for ladder, t in zip(ladders, taken[: len(ladders)], strict=True):
        if _is_inside(model, ladder.name, gone):
            continue
        keep = np.ones(len(model.segments(ladder.name)), bool)
        keep[ladder.channels[: ladder.offsets[t]]] = False
        kept[ladder.name] = torch.from_numpy(np.flatnonzero(keep))
    return kept, gone


def _block_ladder(model: MacModel, name: str, score: float) -> Ladder:
    if not np.isfinite(score):
        raise InputError(f"Expected finite scores, came {score} for block {name!r}.")
    return Ladder(
        name, np.zeros(0, np.int64), np.zeros(2, np.int64), np.array([score]),
        np.array([model.variable(name)]), np.array([[0], [1]]),
    )  # fmt: skip


def _is_inside(model: MacModel, group: str, blocks: Iterable[str]) -> bool:
    """Whether a group lives in these blocks alone."""
    layers = {layer for name in blocks for layer in model.blocks[name].layers}
    members = model.table.groups[group].members
    return all(m.layer_name in layers for m in members if m.direction != "parameter")


def smallest(
    model: MacModel,
    groups: Iterable[str],
    *,
    limits: Limits | None = None,
    initial: Mapping[str, int] | None = None,
    blocks: Iterable[str] = (),
    fixed: Mapping[str, int] | None = None,
) -> int:
    """Edge MACs when each of these groups is at its floor and these blocks are gone; groups that
    are `fixed` keep so many channels."""
    limits, start, width = limits or Limits(), initial or {}, fixed or {}
    flat = {n: torch.zeros(len(model.segments(n))) for n in groups}
    ladders = [_ladder(model, n, s, limits, start.get(n), width.get(n)) for n, s in flat.items()]
    more = [_block_ladder(model, n, 0.0) for n in blocks]
    floor = _floor_macs(model, [*ladders, *more])
    if floor or not more:
        return floor
    others = ([*ladders, *(b for b in more if b is not one)] for one in more)
    return min(_floor_macs(model, kept) for kept in others)


def must_stay(group: ChannelGroup, scores: Tensor, limits: Limits) -> Tensor:
    """`[C]` bool: the channels that no budget takes, the best ones down to the group's floor."""
    units = group.channels // group.tie
    unit_scores = scores.detach().double().cpu().numpy().reshape(group.tie, units).sum(axis=0)
    protected = _protected_units(group, unit_scores, limits)
    fewest = allowed(group, int(protected.sum()), limits, group.channels)[-1]
    stay = np.zeros(units, bool)
    stay[np.lexsort((-unit_scores, ~protected))[:fewest]] = True
    return torch.from_numpy(np.tile(stay, group.tie))


def require_reachable(
    budget: int, floor: int, dense: int, *, limits: Limits | None = None,
    boundary: str = "keep", whole: Mapping[str, str] | None = None, fixed: bool = False,
) -> None:
    """Refuse a budget below the smallest edge there is, and say how small that is and what helps.

    Args:
        budget, floor, dense: edge MACs: asked for, the smallest there is, at present.
        limits: those that hold; without, all may.
        boundary: as the pruner has it.
        whole: group -> why it stays whole, the first few of which are named.
        fixed: whether the width of the upload is, which fewer channels there would lower.

    Raises:
        BudgetError: `floor > budget`.
    """
    if floor <= budget:
        return
    helps = ["Raise edge_macs", "choose a shallower split",
             *["allow boundary='prune'"] * (boundary == "keep" and not fixed),
             *["give fewer feature_channels"] * fixed]
    loose = (limits or Limits(2, 0.5, 2)).set_ones()
    if loose:
        helps.append(f"loosen {' or '.join(loose)}" + " where they are set" * (limits is None))
    named = "; ".join(f"{name}: {why}" for name, why in list((whole or {}).items())[:_NAMED])
    more = f" and {len(whole or {}) - _NAMED} more" * (len(whole or {}) > _NAMED)
    raise BudgetError(
        f"No choice of channels brings the edge to {budget} MACs: the smallest reachable is "
        f"{floor} MACs, {floor / dense:.3f} of the present edge. {', '.join(helps[:-1])}, or "
        f"{helps[-1]}." + f" What stays whole: {named}{more}." * bool(named),
        smallest_edge_macs=floor,
    )


def _floor_macs(model: MacModel, ladders: list[Ladder]) -> int:
    sizes = model.sizes.copy()
    for ladder in ladders:
        sizes[ladder.segments] -= ladder.gone[-1]
    return int(model.macs_of_sizes(sizes))


def _ladder(
    model: MacModel, name: str, scores: Tensor, limits: Limits, initial: int | None,
    fixed: int | None = None,
) -> Ladder:
    group = model.table.groups.get(name)
    if group is None:
        raise InputError(f"Expected one of the model's channel groups, came {name!r}.")
    if scores.shape != (group.channels,):
        raise InputError(
            f"Expected {group.channels} scores for group {name!r}, one per channel, came shape "
            f"{tuple(scores.shape)}. The importance has to score full groups."
        )
    values = scores.detach().double().cpu().numpy()
    if not np.isfinite(values).all():
        raise InputError(
            f"Expected finite scores, came NaN or infinity for group {name!r}. Check the "
            "calibration batches and the model's weights."
        )
    units = group.channels // group.tie
    unit_scores = values.reshape(group.tie, units).sum(axis=0)
    protected = _protected_units(group, unit_scores, limits)
    order = np.lexsort((np.arange(units), unit_scores, protected))
    can_stay = allowed(group, int(protected.sum()), limits, initial or group.channels)
    if fixed is not None:
        can_stay = [_of_allowed(group, min(fixed, group.channels), can_stay, limits)]
    removed = units - np.array(can_stay, np.int64)
    channels = (order[:, None] + np.arange(group.tie) * units).reshape(-1)
    local, where = np.unique(model.segments(name)[channels], return_inverse=True)
    lost = np.zeros((len(channels) + 1, len(local)), np.int64)
    lost[np.arange(len(channels)) + 1, where.reshape(-1)] = 1
    loss = np.concatenate([[0.0], np.cumsum(unit_scores[order])])
    offsets = removed * group.tie
    return Ladder(
        name, channels, offsets, np.diff(loss[removed]), local, lost.cumsum(axis=0)[offsets]
    )


def _of_allowed(group: ChannelGroup, channels: int, can_stay: list[int], limits: Limits) -> int:
    """The units that so many channels are, if the group may keep them."""
    tie = group.tie
    if channels % tie == 0 and channels // tie in can_stay:
        return channels // tie
    near = sorted((u * tie for u in can_stay), key=lambda n: abs(n - channels))[:2]
    loose = limits.set_ones()
    raise InputError(
        f"Expected feature_channels that group {group.name!r} may keep, came {channels}; the "
        f"nearest numbers are {' and '.join(map(str, sorted(near)))}."
        + f" Its channels go {tie} at a time." * (tie > 1)
        + f" Give one of those{', or loosen ' * bool(loose)}{' or '.join(loose)}."
    )


def _protected_units(
    group: ChannelGroup, unit_scores: Floats, limits: Limits
) -> NDArray[np.bool_]:
    """Units that must stay so that no layer holding only a part of the group is emptied."""
    units = len(unit_scores)
    protected = np.zeros(units, bool)
    for member in group.members:
        roots = np.unique(member.root_idxs.numpy())
        if len(member.idxs) == member.width and len(roots) < group.channels:
            own = np.unique(roots % units)
            best = own[np.argsort(-unit_scores[own], kind="stable")]
            share = -(-limits.floor(len(roots)) * len(own) // len(roots))
            protected[best[:share]] = True
    return protected


def allowed(group: ChannelGroup, protected: int, limits: Limits, initial: int) -> list[int]:
    """Numbers of units a group may keep, from all of them downwards."""
    units, tie, step = group.channels // group.tie, group.tie, limits.round_to or 1
    fewest = max(limits.floor(initial), protected * tie, group.fewest_units * tie)
    down = [u for u in range(units - 1, 0, -1) if u * tie >= fewest and (u * tie) % step == 0]
    return [units, *down]
