"""The search for what to remove: by score per saved MAC, then what still fits comes back.

Every structure is a ladder of removals in the order of their scores; a residual block is a ladder
of one rung.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from patrol_prune.budget import Ints, MacModel

Floats = NDArray[np.float64]

_ENOUGH = 0.99
_MAX_TRIES = 1500
_FEW = 50_000


@dataclass(frozen=True, eq=False)
class Ladder:
    """One group's removals in order.

    `channels[:offsets[t]]` are gone after t rungs, at a loss of `scores[:t].sum()`; the cost
    variables `segments` have then lost `gone[t]`. Without a rung `offsets[0]` are, more than
    none where the group's width is fixed.
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
class State:
    """How many rungs of each ladder are taken, and the cost variables that leaves."""

    taken: list[int]
    sizes: Ints = field(repr=False)

    def move(self, k: int, ladder: Ladder, step: int) -> None:
        """Take (+1) or give back (-1) one rung of ladder k."""
        t = self.taken[k]
        self.sizes[ladder.segments] -= ladder.gone[t + step] - ladder.gone[t]
        self.taken[k] = t + step

    def with_gone(self, ladder: Ladder, t: int) -> Ints:
        """The cost variables after `t` rungs of a ladder that has none taken."""
        sizes = self.sizes.copy()
        sizes[ladder.segments] -= ladder.gone[t] - ladder.gone[0]
        return sizes


class Search:
    """Prefix of removals by score density, then refill, then exchanges."""

    def __init__(self, model: MacModel, ladders: list[Ladder], budget: int) -> None:
        self.model, self.ladders, self.budget = model, ladders, budget

    def run(self, *, exchange: bool = True) -> State:
        """The removals to take; without exchanges where every ladder is one coarse rung."""
        order = self._by_density()
        count = bisect.bisect_left(
            range(len(order) + 1),
            -self.budget,
            key=lambda n: -self.model.macs_of_sizes(self._after(order[:n]).sizes),
        )
        state = self._after(order[:count])
        self._refill(state)
        close = self.model.macs_of_sizes(state.sizes) >= _ENOUGH * self.budget
        if close or not exchange or self._is_free(state):
            return state
        few = math.prod(len(ladder) + 1 for ladder in self.ladders) <= _FEW
        return self._best_of_all() if few else self._exchange(state)

    def _is_free(self, state: State) -> bool:
        """Whether all that went scores exactly 0: no exchange for something of worth is wanted."""
        pairs = zip(self.ladders, state.taken, strict=True)
        return all(not ladder.scores[:t].any() for ladder, t in pairs)

    def _by_density(self) -> Ints:
        """Ladder numbers, one entry per rung, in the order of removal."""
        densities, owners, rungs = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        start = self._after(np.zeros(0, np.int64)).sizes
        whole = self.model.macs_of_sizes(start)
        for k, ladder in enumerate(self.ladders):
            steps, kind = np.unique(np.diff(ladder.gone, axis=0), axis=0, return_inverse=True)
            saved = np.empty(len(steps))
            for i, step in enumerate(steps):
                sizes = start.copy()
                sizes[ladder.segments] -= step
                saved[i] = whole - self.model.macs_of_sizes(sizes)
            with np.errstate(divide="ignore", invalid="ignore"):
                each = saved[kind.reshape(-1)]
                densities.append(np.where(each > 0, ladder.scores / each, np.inf))
            owners.append(np.full(len(ladder), k))
            rungs.append(np.arange(len(ladder)))
        owner = np.concatenate(owners)
        order = np.lexsort((np.concatenate(rungs), owner, np.concatenate(densities)))
        return np.asarray(owner[order], np.int64)

    def _after(self, removals: Ints) -> State:
        taken = np.bincount(removals, minlength=len(self.ladders)).tolist()
        sizes = self.model.sizes.copy()
        for ladder, t in zip(self.ladders, taken, strict=True):
            sizes[ladder.segments] -= ladder.gone[t]
        return State(taken, sizes)

    def _refill(self, state: State) -> None:
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

    def _best_of_all(self) -> State:
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
        return State(taken[:, best].tolist(), sizes[best])

    def _exchange(self, state: State) -> State:
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

    def _shifts(self, state: State, reach: int = 6) -> Iterator[State]:
        """Ladder k moves by up to `reach` rungs, another one as little as then fits."""
        pairs = itertools.permutations(range(len(self.ladders)), 2)
        for (k, j), step in itertools.product(pairs, [*range(-reach, 0), *range(1, reach + 1)]):
            ladder, other = self.ladders[k], self.ladders[j]
            if not 0 <= state.taken[k] + step <= len(ladder):
                continue
            trial = State(list(state.taken), state.sizes.copy())
            trial.move(k, ladder, step)
            trial.move(j, other, -trial.taken[j])
            fits = self._first_fit(trial, other)
            if fits <= len(other):
                trial.move(j, other, fits)
                yield trial

    def _first_fit(self, state: State, ladder: Ladder) -> int:
        """The fewest rungs of a ladder that meet the budget; one more than it has if none do."""
        return bisect.bisect_left(
            range(len(ladder) + 1),
            -self.budget,
            key=lambda t: -self.model.macs_of_sizes(state.with_gone(ladder, t)),
        )

    def _loss(self, state: State) -> float:
        pairs = zip(self.ladders, state.taken, strict=True)
        return float(sum(ladder.scores[:t].sum() for ladder, t in pairs))
