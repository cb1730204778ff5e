"""Which places to cut a search tries, and what the edge may cost at each."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.errors import BudgetError, InputError, PatrolError, nearest
from patrol_prune.importance import PatrolImportance
from patrol_prune.objective import PatrolObjective
from patrol_prune.open_attention import open_attention
from patrol_prune.plan import Plan, PlanRow, parse_budget, plan, short
from patrol_prune.pruner import PatrolPruner
from patrol_prune.split import Split, SplitPoint, split_points
from patrol_prune.tune_settings import AUTO, TuneConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A place to cut.

    Attributes:
        name: of the split point.
        least_edge_macs: the smallest edge that pruning can reach there.
        most_edge_macs: the budget, or the dense edge's cost where that is less.
    """

    name: str
    least_edge_macs: int
    most_edge_macs: int

    def edge_macs(self, share: float) -> int:
        """So large a share of what the edge may take, and no less than can be reached."""
        return max(self.least_edge_macs, int(share * self.most_edge_macs))


@dataclass(frozen=True)
class Space:
    """The candidates, shallow to deep, and the device's budget in multiply-adds.

    `narrowed` has the smallest edge of a candidate that sends so many channels, by both.
    """

    candidates: tuple[Candidate, ...]
    budget_edge_macs: int
    narrowed: Mapping[tuple[str, int], int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Candidate:
        return next(c for c in self.candidates if c.name == name)

    def edge_macs(self, name: str, share: float, channels: int | None = None) -> int:
        """What the pruner is asked for, where the edge sends so many channels."""
        asked = self[name].edge_macs(share)
        return asked if channels is None else max(self.narrowed[name, channels], asked)


def search_space(config: TuneConfig, model: nn.Module, example: Tensor) -> Space:
    """The places to cut that are worth a trial.

    "auto" takes `most_splits` of the plan's, whole modules before their parts and then the deepest,
    that fit, need no more than `max_channel_ratio` of their channels removed, still transmit more
    than a vector, and upload at most `max_feature_bytes` (as they are; `boundary="prune"` may still
    shrink a larger one), and can send each of the numbers of channels that are tried. Attention
    heads of `model` are opened first, where a run would.

    Raises:
        InputError: a split that does not exist, a budget that is none or needs no pruning, or
            channels that cannot go at a place that was asked for, or at any.
        BudgetError: no place, or one of those asked for, can be brought under the budget.
    """
    if config.score.heads:
        open_attention(model, example, unit=config.score.head_unit)
    points = split_points(model, example)
    named = {name: p for p in points for name in (p.name, *p.aliases)}
    if config.at is not None and config.at not in named:
        raise InputError(f"There is no split point {config.at!r}. {nearest(config.at, named)}")
    budget = parse_budget(config.edge_macs, points, named.get(config.at or ""))
    auto = config.splits == (AUTO,) and config.at is None
    rows = (_fitting(config, _plan(config, model, example, budget, None)) if auto
            else _asked_for(config, model, example, budget, points))
    chosen: dict[str, Candidate] = {}
    narrowed: dict[tuple[str, int], int] = {}
    refused: dict[str, PatrolError] = {}
    for row in rows:
        if auto and len(chosen) == config.most_splits:
            break
        place = Candidate(row.name, min(row.smallest_edge_macs, budget, row.edge_macs),
                          min(budget, row.edge_macs))
        try:
            narrowed |= _widths(config, model, example, place)
            chosen[row.name] = place
        except PatrolError as error:
            refused[row.name] = error
    if refused:
        _tell_refused(config, refused, some=auto and bool(chosen))
    deeper = chosen if not auto else [p.name for p in points if p.name in chosen]
    return Space(tuple(chosen[name] for name in deeper), budget, narrowed)


def _tell_refused(config: TuneConfig, refused: Mapping[str, PatrolError], *, some: bool) -> None:
    """Warn of the places that cannot send what is tried, where `some` others can; else refuse."""
    tried = ", ".join(str(n) for n in config.tried_channels if n is not None)
    if some:
        for name, error in refused.items():
            logger.warning("No trial is cut after %s, which cannot send each of %s channels: %s",
                           name, tried, error)
        return
    name, why = next(iter(refused.items()))
    raise InputError(f"Where the model is cut after {name}, it cannot send each of {tried} "
                     f"channels: {why} Give other numbers, or name --splits that can.") from why


def _widths(
    config: TuneConfig, model: nn.Module, example: Tensor, place: Candidate
) -> dict[tuple[str, int], int]:
    """Place and channels -> multiply-adds of the smallest edge that sends so many there, for each
    number that is tried.

    Raises:
        PatrolError: one is more than there are, cannot be kept, or leaves no edge within the
            budget; or the least upload of all is above the limit.
    """
    tried = [channels for channels in config.tried_channels if channels is not None]
    if not tried:
        return {}
    score, split = config.score, Split(model, example, at=place.name)
    scores = PatrolImportance(PatrolObjective(split, functional.cross_entropy),
                              blocks=score.structures != "channels")  # nothing is scored here
    known: dict[tuple[str, int], int] = {}
    for channels in tried:
        pruner = PatrolPruner(
            model, example, scores, split=split, edge_macs=place.most_edge_macs,
            boundary=config.boundary, feature_channels=channels,
            max_pruning_ratio=score.max_pruning_ratio, min_channels=score.min_channels,
            round_to=score.round_to, structures=score.structures)
        known[place.name, channels] = pruner.smallest_edge_macs()
        there = [g.channels for g in pruner.table.groups.values() if g.crossing is not None]
        if channels > max(there):
            raise InputError(f"Expected at most the {max(there)} channels that cross there, came "
                             f"{channels}.")
        if channels == min(tried) and None not in config.tried_channels:
            _check_least(config, split, there, channels)
    return known


def _check_least(config: TuneConfig, split: Split, there: Sequence[int], channels: int) -> None:
    """Refuse a limit of bytes below the narrowest upload with the fewest bits."""
    shape, most = split.feature_shape, config.max_feature_bytes
    if most is None or sum(there) not in shape:
        return
    sent = sum(min(channels, width) for width in there)
    bits = _least_bits(config)
    least = math.ceil(math.prod(shape) // sum(there) * sent * bits / 8)
    if least > most:
        raise InputError(f"Expected max_feature_bytes of at least {least:,}, which {channels} "
                         f"channels take with {bits} bits a value, came {most:,}.")


def _least_bytes(config: TuneConfig, row: PlanRow) -> int:
    """What a place uploads with the fewest bits that are tried, its channels as they are."""
    return math.ceil(row.feature_bytes * _least_bits(config) / 32)


def _least_bits(config: TuneConfig) -> int:
    return min(bits or 32 for bits in config.tried_bits)


def _plan(
    config: TuneConfig, model: nn.Module, example: Tensor, budget: int, at: str | None
) -> Plan:
    return plan(
        model, example, edge_macs=budget, at=at, boundary=config.boundary,
        max_channel_ratio=config.max_channel_ratio, min_channels=config.score.min_channels,
        max_pruning_ratio=config.score.max_pruning_ratio, round_to=config.score.round_to,
        structures=config.score.structures,
    )


def _fitting(config: TuneConfig, made: Plan) -> list[PlanRow]:
    """The plan's places for "auto", the best first."""
    able = [row for row in made.rows
            if row.fits and not row.is_tail and row.strength is not None
            and row.strength <= config.max_channel_ratio]
    most = config.max_feature_bytes
    small = [row for row in able
             if most is None or _least_bytes(config, row) <= most or config.boundary == "prune"]
    if able and not small:
        least = min(able, key=lambda row: _least_bytes(config, row))
        raise BudgetError(
            f"No place to cut within {short(made.budget_edge_macs)} MACs uploads at most {most:,} "
            f"bytes; the least is {_least_bytes(config, least):,}, after {least.name}. Raise "
            "--max-feature-bytes or --edge-macs, or allow --boundary prune."
        )
    if not small:
        raise BudgetError(
            f"At no place to cut is {short(made.budget_edge_macs)} MACs reached by removing at "
            f"most {config.max_channel_ratio:.0%} of the channels. Raise --edge-macs or "
            "--max-channel-ratio, or name --splits. See: patrol-prune plan"
        )
    whole = sorted(range(len(small)), key=lambda i: (small[i].name.count("."), -i))
    return [small[i] for i in whole]


def _asked_for(
    config: TuneConfig, model: nn.Module, example: Tensor, budget: int, points: list[SplitPoint]
) -> list[PlanRow]:
    """The rows of `config.splits`; one plan shows most of them."""
    named = {name: p for p in points for name in (p.name, *p.aliases)}
    rows: dict[str, PlanRow] = {}
    chosen: dict[str, PlanRow] = {}
    for asked in config.splits if AUTO not in config.splits else (config.at or "",):
        point = named.get(asked)
        row = None if point is None else rows.get(point.name)
        if row is None or row.smallest_edge_macs > budget:
            dense = budget if point is None else point.edge_macs
            made = _plan(config, model, example, min(budget, dense), asked)
            rows |= {row.name: row for row in made.rows}
            row = made[made.recommended]
        most = config.max_feature_bytes
        least = _least_bytes(config, row)
        if most is not None and least > most and config.boundary == "keep":
            raise InputError(
                f"After {asked}, {least:,} bytes are uploaded, more than the {most:,} "
                "of --max-feature-bytes. Leave this split out, or allow --boundary prune."
            )
        chosen[row.name] = row
    return list(chosen.values())
