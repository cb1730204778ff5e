"""Which channels to keep for a budget of edge MACs.

Every group of channels is a ladder: its tied units in the order of their scores, a rung per
removal that the limits allow. All decisions are taken on the closed form of `budget.py`.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patrol_prune.budget import Ints, MacModel
from patrol_prune.errors import BudgetError, InputError
from patrol_prune.groups import ChannelGroup

Floats = NDArray[np.float64]

_ENOUGH = 0.99
_MAX_TRIES = 1500
_FEW = 50_000


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
        if self.min_channels < 1 or not 0.0 < self.max_pruning_ratio <= 1.0:
            raise InputError(
                "Expected min_channels of at least 1 and max_pruning_ratio in (0, 1], came "
                f"{self.min_channels} and {self.max_pruning_ratio}."
            )
        if self.round_to is not None and self.round_to < 1:
            raise InputError(f"Expected round_to of at least 1 or None, came {self.round_to}.")

    def floor(self, channels: int) -> int:
        """The fewest channels a group that started with `channels` may keep."""
        ratio_floor = int(np.ceil(channels * (1.0 - self.max_pruning_ratio) - 1e-9))
        return min(channels, max(self.min_channels, self.round_to or 1, ratio_floor, 1))


@dataclass(frozen=True, eq=False)
class _Ladder:
    """One group's removals in order.

    `channels[:offsets[t]]` are gone after t rungs, at a loss of `scores[:t].sum()`; the cost
    variables `segments` have then lost `gone[t]`.
    """

    name: str
    channels: Ints
    offsets: Ints
    scores: Floats
    segments: Ints
    gone: Ints

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(eq=False)
class _State:
    """How many rungs of each ladder are taken, and the cost variables that leaves."""

    taken: list[int]
    sizes: Ints = field(repr=False)

    def move(self, k: int, ladder: _Ladder, step: int) -> None:
        """Take (+1) or give back (-1) one rung of ladder k."""
        t = self.taken[k]
        self.sizes[ladder.segments] -= ladder.gone[t + step] - ladder.gone[t]
        self.taken[k] = t + step

    def with_gone(self, ladder: _Ladder, t: int) -> Ints:
        """The cost variables after `t` rungs of a ladder that has none taken."""
        sizes = self.sizes.copy()
        sizes[ladder.segments] -= ladder.gone[t]
        return sizes


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
    limits = limits or Limits()
    if budget > model.dense:
        raise InputError(
            f"Expected a budget of at most the dense edge's {model.dense} MACs, came {budget}: "
            "nothing needs to be pruned. Give a fraction in (0, 1], a smaller count, or choose a "
            "deeper split."
        )
    ladders = [_ladder(model, n, s, limits, (initial or {}).get(n)) for n, s in scores.items()]
    require_reachable(budget, _floor_macs(model, ladders), model.dense)
    search = _Search(model, ladders, budget)
    state = search.run()
    kept = {}
    for ladder, taken in zip(ladders, state.taken, strict=True):
        keep = np.ones(len(model.segments(ladder.name)), bool)
        keep[ladder.channels[: ladder.offsets[taken]]] = False
        kept[ladder.name] = torch.from_numpy(np.flatnonzero(keep))
    return kept


def smallest(
    model: MacModel,
    groups: Iterable[str],
    *,
    limits: Limits | None = None,
    initial: Mapping[str, int] | None = None,
) -> int:
    """Edge MACs when each of these groups is at its floor."""
    limits, start = limits or Limits(), initial or {}
    flat = {n: torch.zeros(len(model.segments(n))) for n in groups}
    ladders = [_ladder(model, n, s, limits, start.get(n)) for n, s in flat.items()]
    return _floor_macs(model, ladders)


def must_stay(group: ChannelGroup, scores: Tensor, limits: Limits) -> Tensor:
    """`[C]` bool: the channels that no budget takes, the best ones down to the group's floor."""
    units = group.channels // group.tie
    unit_scores = scores.detach().double().cpu().numpy().reshape(group.tie, units).sum(axis=0)
    protected = _protected_units(group, unit_scores, limits)
    fewest = _allowed(units, group.tie, int(protected.sum()), limits, group.channels)[-1]
    stay = np.zeros(units, bool)
    stay[np.lexsort((-unit_scores, ~protected))[:fewest]] = True
    return torch.from_numpy(np.tile(stay, group.tie))


def require_reachable(budget: int, floor: int, dense: int) -> None:
    """Refuse a budget below the smallest edge there is, and say how small that is.

    Raises:
        BudgetError: `floor > budget`.
    """
    if floor > budget:
        raise BudgetError(
            f"No choice of channels brings the edge to {budget} MACs: the smallest reachable is "
            f"{floor} MACs, {floor / dense:.3f} of the present edge. Raise edge_macs, lower "
            "min_channels or round_to, raise max_pruning_ratio, allow boundary='prune', or choose "
            "a shallower split.",
            smallest_edge_macs=floor,
        )


def _floor_macs(model: MacModel, ladders: list[_Ladder]) -> int:
    sizes = model.sizes.copy()
    for ladder in ladders:
        sizes[ladder.segments] -= ladder.gone[-1]
    return int(model.macs_of_sizes(sizes))


def _ladder(
    model: MacModel, name: str, scores: Tensor, limits: Limits, initial: int | None
) -> _Ladder:
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
    allowed = _allowed(units, group.tie, int(protected.sum()), limits, initial or group.channels)
    removed = units - np.array(allowed, np.int64)
    channels = (order[:, None] + np.arange(group.tie) * units).reshape(-1)
    local, where = np.unique(model.segments(name)[channels], return_inverse=True)
    lost = np.zeros((len(channels) + 1, len(local)), np.int64)
    lost[np.arange(len(channels)) + 1, where.reshape(-1)] = 1
    loss = np.concatenate([[0.0], np.cumsum(unit_scores[order])])
    offsets = removed * group.tie
    return _Ladder(
        name, channels, offsets, np.diff(loss[removed]), local, lost.cumsum(axis=0)[offsets]
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


def _allowed(units: int, tie: int, protected: int, limits: Limits, initial: int) -> list[int]:
    """Numbers of units a group may keep, from all of them downwards.

    A grouped convolution with one channel left per group would be read as a depthwise one.
    """
    step = limits.round_to or 1
    fewest = max(limits.floor(initial), protected * tie, 2 * tie if tie > 1 else 1)
    down = [u for u in range(units - 1, 0, -1) if u * tie >= fewest and (u * tie) % step == 0]
    return [units, *down]


class _Search:
    """Prefix of removals by score density, then refill, then exchanges."""

    def __init__(self, model: MacModel, ladders: list[_Ladder], budget: int) -> None:
        self.model, self.ladders, self.budget = model, ladders, budget

    def run(self) -> _State:
        order = self._by_density()
        count = bisect.bisect_left(
            range(len(order) + 1),
            -self.budget,
            key=lambda n: -self.model.macs_of_sizes(self._after(order[:n]).sizes),
        )
        state = self._after(order[:count])
        self._refill(state)
        if self.model.macs_of_sizes(state.sizes) >= _ENOUGH * self.budget or self._is_free(state):
            return state
        few = math.prod(len(ladder) + 1 for ladder in self.ladders) <= _FEW
        return self._best_of_all() if few else self._exchange(state)

    def _is_free(self, state: _State) -> bool:
        """Whether all that went scores exactly 0: no exchange for something of worth is wanted."""
        pairs = zip(self.ladders, state.taken, strict=True)
        return all(not ladder.scores[:t].any() for ladder, t in pairs)

    def _by_density(self) -> Ints:
        """Ladder numbers, one entry per rung, in the order of removal."""
        densities, owners, rungs = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for k, ladder in enumerate(self.ladders):
            steps, kind = np.unique(np.diff(ladder.gone, axis=0), axis=0, return_inverse=True)
            saved = np.empty(len(steps))
            for i, step in enumerate(steps):
                sizes = self.model.sizes.copy()
                sizes[ladder.segments] -= step
                saved[i] = self.model.dense - self.model.macs_of_sizes(sizes)
            with np.errstate(divide="ignore", invalid="ignore"):
                each = saved[kind.reshape(-1)]
                densities.append(np.where(each > 0, ladder.scores / each, np.inf))
            owners.append(np.full(len(ladder), k))
            rungs.append(np.arange(len(ladder)))
        owner = np.concatenate(owners)
        order = np.lexsort((np.concatenate(rungs), owner, np.concatenate(densities)))
        return np.asarray(owner[order], np.int64)

    def _after(self, removals: Ints) -> _State:
        taken = np.bincount(removals, minlength=len(self.ladders)).tolist()
        sizes = self.model.sizes.copy()
        for ladder, t in zip(self.ladders, taken, strict=True):
            sizes[ladder.segments] -= ladder.gone[t]
        return _State(taken, sizes)

    def _refill(self, state: _State) -> None:
        """Give back rungs, best score first, as long as one fits."""
        closed: set[int] = set()
        while True:
            ready = [k for k, t in enumerate(state.taken) if t > 0 and k not in closed]
            if not ready:
                return
            k = max(ready, key=lambda j: self.ladders[j].scores[state.taken[j] - 1])
            state.move(k, self.ladders[k], -1)
            if self.model.macs_of_sizes(state.sizes) > self.budget:
                state.move(k, self.ladders[k], +1)
                closed.add(k)

    def _best_of_all(self) -> _State:
        """Every combination of a small network: close enough at the least loss, or the closest."""
        shape = [len(ladder) + 1 for ladder in self.ladders]
        taken = np.indices(shape).reshape(len(shape), -1)
        sizes = np.tile(self.model.sizes, (taken.shape[1], 1))
        loss = np.zeros(taken.shape[1])
        for ladder, t in zip(self.ladders, taken, strict=True):
            sizes[:, ladder.segments] -= ladder.gone[t]
            loss += np.concatenate([[0.0], ladder.scores.cumsum()])[t]
        macs = self.model.macs_of_sizes(sizes)
        fits = macs <= self.budget
        close = fits & (macs >= _ENOUGH * self.budget)
        best = np.argmin(np.where(close, loss, np.inf)) if close.any() else np.argmax(macs * fits)
        return _State(taken[:, best].tolist(), sizes[best])

    def _exchange(self, state: _State) -> _State:
        """Shift rungs between two ladders, as long as that comes closer to the budget.

        Among the shifts that come close enough, the one that loses the least score is taken.
        """
        macs, tries = self.model.macs_of_sizes(state.sizes), _MAX_TRIES
        while macs < _ENOUGH * self.budget and tries > 0:
            best, best_macs, best_loss = state, macs, np.inf
            for trial in self._shifts(state):
                tries -= 1
                if tries <= 0:
                    break
                trial_macs = self.model.macs_of_sizes(trial.sizes)
                loss = self._loss(trial) if trial_macs >= _ENOUGH * self.budget else np.inf
                if loss < best_loss or (loss == best_loss and trial_macs > best_macs):
                    best, best_macs, best_loss = trial, trial_macs, loss
            if best is state:
                break
            state, macs = best, best_macs
        return state

    def _shifts(self, state: _State, reach: int = 6) -> Iterator[_State]:
        """Ladder k moves by up to `reach` rungs, another one as little as then fits."""
        pairs = itertools.permutations(range(len(self.ladders)), 2)
        for (k, j), step in itertools.product(pairs, [*range(-reach, 0), *range(1, reach + 1)]):
            ladder, other = self.ladders[k], self.ladders[j]
            if not 0 <= state.taken[k] + step <= len(ladder):
                continue
            trial = _State(list(state.taken), state.sizes.copy())
            trial.move(k, ladder, step)
            trial.move(j, other, -trial.taken[j])
            fits = self._first_fit(trial, other)
            if fits <= len(other):
                trial.move(j, other, fits)
                yield trial

    def _first_fit(self, state: _State, ladder: _Ladder) -> int:
        """The fewest rungs of a ladder that meet the budget; one more than it has if none do."""
        return bisect.bisect_left(
            range(len(ladder) + 1),
            -self.budget,
            key=lambda t: -self.model.macs_of_sizes(state.with_gone(ladder, t)),
        )

    def _loss(self, state: _State) -> float:
        pairs = zip(self.ladders, state.taken, strict=True)
        return float(sum(ladder.scores[:t].sum() for ladder, t in pairs))
