"""How learned masks get to zero: the proximal step, its costs, and the controller of its force.

The masks carry `gamma * sum_s c_s |m_s| / sum_s c_s`, where `c_s` is the number of edge MACs that
the removal of structure s saves. Its proximal step after a gradient step of rate eta is

    m_s <- max(m_s - eta * gamma * c_s / sum_s c_s, 0)

and reaches exact zeros. Tied channels move as one. The channels that hold a group's floor, the
largest masks, pay nothing (a trimmed L1 norm): no budget takes them. Without that all masks of a
group go down side by side, because the weights and BatchNorm behind it undo any common factor of
them, and cross zero in no useful order.

The mask of a residual block is one more structure, whose cost is all that the block's layers do.
It may be hundreds of times a channel's, and the threshold with it; then the mask would be at zero
long before its own gradient says anything. A block's mask therefore moves at the rate eta / r,
where r is the block's cost over that of an average structure of the dense edge: its gradient and
its threshold are divided alike, which changes the pace and no fixed point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from patrol_prune.budget import Ints, MacModel
from patrol_prune.choice import Limits, choose_structures, must_stay, require_reachable, smallest
from patrol_prune.errors import BudgetError
from patrol_prune.groups import ChannelGroup

Values = dict[str, Tensor]
"""Group name -> `[C]` masks, and `block_key(block name)` -> `[1]`."""

BLOCK = "block:"
_ALIVE = 1e-2
_LARGEST_CHANGE = 0.7
_HALVINGS = 12
_NEAR = 0.97
"""Of the budget: a projection that uses so much of it is taken as it comes."""


def block_key(name: str) -> str:
    """The key of a block's mask among `Values`; a block may bear the name of a layer."""
    return BLOCK + name


def soft_threshold(m: Tensor, threshold: Tensor) -> Tensor:
    """`max(m - threshold, 0)`, the proximal map of `threshold * |m|` on masks `m >= 0`."""
    return (m - threshold).clamp_min(0.0)


def scheduled_macs(step: int, steps: int, dense: int, budget: int) -> int:
    """Edge MACs wanted after `step` of `steps`: a straight line from `dense` to `budget`."""
    return round(dense - (dense - budget) * min(1.0, max(0.0, step / max(1, steps))))


def adapted(gamma: float, error: float, gain: float, steps: int) -> float:
    """`gamma * exp(gain * error / steps)`, at most a factor of two per step.

    Args:
        gamma: the present force.
        error: edge MACs above the schedule (below it: negative), over those that have to go.
        gain: e-folds of gamma over the whole schedule for an error of 1.
        steps: of the schedule.
    """
    change = gain * error / max(1, steps)
    return gamma * math.exp(min(_LARGEST_CHANGE, max(-_LARGEST_CHANGE, change)))


@dataclass(frozen=True)
class Shrunk:
    """What one proximal step did.

    Attributes:
        values: group name -> `[C]` masks after it.
        macs: edge MACs of the channels whose mask is not zero.
        unlimited: what they would be, had the schedule not cut the step short.
    """

    values: Values
    macs: int
    unlimited: int


class Shrinker:
    """Shrinks the masks of an edge's channel groups and residual blocks.

    Args:
        costs: the edge's MACs in closed form, at the widths of the masks; made with these blocks.
        names: the masked groups.
        limits: floors per group.
        budget: edge MACs to come down to.

    Attributes:
        pace: block key -> r, the block's cost over that of an average structure, at least 1.

    Raises:
        BudgetError: the groups at their floors cost more than the budget.
    """

    def __init__(
        self,
        costs: MacModel,
        names: tuple[str, ...],
        limits: Limits,
        budget: int,
    ) -> None:
        self.costs, self.names, self.limits, self.budget = costs, names, limits, budget
        floor = smallest(costs, names, limits=limits, blocks=costs.blocks)
        require_reachable(budget, floor, costs.dense)
        self._units = {name: _unit_patterns(costs, self._group(name)) for name in names}
        self._one_block_stays = bool(costs.blocks) and not costs.macs({}, without=costs.blocks)
        self.pace: dict[str, float] = {}
        dense = {n: torch.ones(len(costs.segments(n))) for n in names}
        dense |= {block_key(n): torch.ones(1) for n in costs.blocks}
        shares = self.shares(dense)
        self.structures = sum(len(s) for s in shares.values())
        self.pace = {key: max(1.0, self.structures * float(shares[key]))
                     for key in map(block_key, costs.blocks)}

    def macs(self, values: Mapping[str, Tensor]) -> int:
        """Edge MACs of the channels and blocks whose mask is not zero."""
        channels, blocks = _parted(values)
        gone = [n for n, v in blocks.items() if not v.any()]
        kept = {n: v.nonzero().flatten() for n, v in channels.items()}
        return self.costs.macs(kept, without=gone)

    def shares(self, values: Mapping[str, Tensor]) -> Values:
        """Key of `values` -> `c_s / sum_s c_s` at the present sizes; tied channels share `c`."""
        sizes = self.costs.sizes.copy()
        channels, blocks = _parted(values)
        for name, value in channels.items():
            np.subtract.at(sizes, self.costs.segments(name)[(value == 0).numpy()], 1)
        for name, value in blocks.items():
            sizes[self.costs.variable(name)] = int(bool(value.any()))
        now = self.costs.macs_of_sizes(sizes)
        saved = {}
        for name in self.names:
            patterns, which = self._units[name]
            fewer = np.maximum(sizes - patterns, 0)
            tie = self._group(name).tie
            per_unit = (now - self.costs.macs_of_sizes(fewer))[which] / tie
            saved[name] = torch.from_numpy(np.tile(per_unit, tie)).float()
        for name in blocks:
            without = sizes.copy()
            without[self.costs.variable(name)] = 0
            saved[block_key(name)] = torch.tensor([now - self.costs.macs_of_sizes(without)]).float()
        total = max(1.0, sum(float(s.sum()) for s in saved.values()))
        return {name: s / total for name, s in saved.items()}

    def step(
        self, values: Mapping[str, Tensor], force: float, shares: Mapping[str, Tensor],
        target: int, *, now: Mapping[str, Tensor] | None = None,
    ) -> Shrunk:
        """One proximal step, cut short where it would bring the edge below `target` MACs: first its
        threshold, then the gradient step itself where that alone takes too many masks below zero.

        Args:
            values: masks behind the gradient step, of any sign.
            force: eta * gamma.
            shares: as `shares` gave them.
            target: the schedule's edge MACs.
            now: the masks before the gradient step; without them that is never cut short.
        """
        channels, blocks = _parted(values)
        tied = {n: _tied(v, self._group(n).tie) for n, v in channels.items()}
        stay = {n: must_stay(self._group(n), v, self.limits) for n, v in tied.items()}
        best = max(blocks, key=lambda n: float(blocks[n]), default="")
        for name, value in blocks.items():
            tied[block_key(name)] = value
            stay[block_key(name)] = torch.tensor([self._one_block_stays and name == best])

        def shrunk(part: float) -> Values:
            return {n: _trimmed(v, part * force * shares[n] / self.pace.get(n, 1.0), stay[n])
                    for n, v in tied.items()}

        whole = shrunk(1.0)
        unlimited = self.macs(whole)
        if unlimited >= target:
            return Shrunk(whole, unlimited, unlimited)
        part = _largest(lambda p: self.macs(shrunk(p)) >= target) if force else 0.0
        found = shrunk(part)
        if now is not None and self.macs(found) < target:
            return replace(self._between(now, values, shares, target), unlimited=unlimited)
        return Shrunk(found, self.macs(found), unlimited)

    def _between(
        self, now: Mapping[str, Tensor], values: Mapping[str, Tensor],
        shares: Mapping[str, Tensor], target: int,
    ) -> Shrunk:
        """As much of the way from `now` to `values` as keeps the edge at `target` MACs."""
        def at(part: float) -> Shrunk:
            return self.step({n: m + part * (values[n] - m) for n, m in now.items()}, 0.0,
                             shares, target)

        return at(_largest(lambda p: at(p).macs >= target))

    def project(self, values: Mapping[str, Tensor]) -> Values:
        """The masks at the budget: of the smallest per MAC as many are zeroed as are too many.

        A block's mask counts r-fold, as it took r times as long to come down. The channels inside
        a block that goes keep theirs.
        """
        blocks = _parted(values)[1]
        worth = {n: self.pace[block_key(n)] * float(v) for n, v in blocks.items()}
        found = self._projected(values, worth)
        if self.macs(found) >= _NEAR * self.budget:
            return found
        # A whole block went for a small excess, and what came back in its room were zeros.
        try:
            other = self._projected(values, {n: w for n, w in worth.items() if w == 0})
        except BudgetError:
            return found
        return max(found, other, key=self.macs)

    def _projected(self, values: Mapping[str, Tensor], worth: Mapping[str, float]) -> Values:
        """`project`, with these blocks alone to go."""
        channels = _parted(values)[0]
        kept, gone = choose_structures(
            self.costs, channels, worth, self.budget, limits=self.limits
        )
        result = {n: v.clone() for n, v in values.items()}
        for name, idxs in kept.items():
            result[name] = torch.zeros_like(channels[name])
            result[name][idxs] = channels[name][idxs]
        for name in gone:
            result[block_key(name)].zero_()
        return result

    def _group(self, name: str) -> ChannelGroup:
        return self.costs.table.groups[name]


def _parted(values: Mapping[str, Tensor]) -> tuple[Values, Values]:
    """Group name -> its masks, and block name -> its mask."""
    channels = {n: v for n, v in values.items() if not n.startswith(BLOCK)}
    blocks = {n[len(BLOCK):]: v for n, v in values.items() if n.startswith(BLOCK)}
    return channels, blocks


def _trimmed(value: Tensor, threshold: Tensor, stay: Tensor) -> Tensor:
    """The soft threshold of all but those that stay, which stay above zero."""
    return torch.where(stay, value.clamp_min(_ALIVE), soft_threshold(value, threshold))


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest part in [0, 1) found by bisection for which `holds`; 0 if it never does."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _tied(value: Tensor, tie: int) -> Tensor:
    """Tied channels take their mean."""
    if tie == 1:
        return value
    mean = value.view(tie, -1).mean(0)
    return mean.repeat(tie)


def _unit_patterns(costs: MacModel, group: ChannelGroup) -> tuple[Ints, Ints]:
    """Kinds of tied unit of a group: `[K, S]` cost variables each takes away; `[U]` each's kind."""
    segments = costs.segments(group.name).reshape(group.tie, -1)
    patterns = np.zeros((segments.shape[1], len(costs.sizes)), np.int64)
    for row in segments:
        patterns[np.arange(len(row)), row] += 1
    kinds, which = np.unique(patterns, axis=0, return_inverse=True)
    return kinds, which.reshape(-1)
