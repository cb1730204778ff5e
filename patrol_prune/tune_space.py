"""Which places to cut a search tries, and what the edge may cost at each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from patrol_prune.errors import BudgetError, InputError, nearest
from patrol_prune.open_attention import open_attention
from patrol_prune.plan import Plan, PlanRow, parse_budget, plan, short
from patrol_prune.split import SplitPoint, split_points
from patrol_prune.tune_settings import AUTO, TuneConfig


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
    """The candidates, shallow to deep, and the device's budget in multiply-adds."""

    candidates: tuple[Candidate, ...]
    budget_edge_macs: int

    def __getitem__(self, name: str) -> Candidate:
        return next(c for c in self.candidates if c.name == name)


def search_space(config: TuneConfig, model: nn.Module, example: Tensor) -> Space:
    """The places to cut that are worth a trial.

    "auto" takes `most_splits` of the plan's, whole modules before their parts and then the deepest,
    that fit, need no more than `max_channel_ratio` of their channels removed, still transmit more
    than a vector, and upload at most `max_feature_bytes` (as they are; `boundary="prune"` may still
    shrink a larger one). Attention heads of `model` are opened first, where a run would.

    Raises:
        InputError: a split that does not exist, or a budget that is none or needs no pruning.
        BudgetError: no place, or one of those asked for, can be brought under the budget.
    """
    if config.score.heads:
        open_attention(model, example, unit=config.score.head_unit)
    points = split_points(model, example)
    named = {name: p for p in points for name in (p.name, *p.aliases)}
    if config.at is not None and config.at not in named:
        raise InputError(f"There is no split point {config.at!r}. {nearest(config.at, named)}")
    budget = parse_budget(config.edge_macs, points, named.get(config.at or ""))
    if config.splits == (AUTO,) and config.at is None:
        rows = _fitting(config, _plan(config, model, example, budget, None))
    else:
        rows = _asked_for(config, model, example, budget, points)
    chosen = tuple(
        Candidate(row.name, min(row.smallest_edge_macs, budget, row.edge_macs),
                  min(budget, row.edge_macs))
        for row in rows
    )
    return Space(chosen, budget)


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
    able = [row for row in made.rows
            if row.fits and not row.is_tail and row.strength is not None
            and row.strength <= config.max_channel_ratio]
    most = config.max_feature_bytes
    small = [row for row in able
             if most is None or row.feature_bytes <= most or config.boundary == "prune"]
    if able and not small:
        least = min(able, key=lambda row: row.feature_bytes)
        raise BudgetError(
            f"No place to cut within {short(made.budget_edge_macs)} MACs uploads at most {most:,} "
            f"bytes; the least is {least.feature_bytes:,}, after {least.name}. Raise "
            "--max-feature-bytes or --edge-macs, or allow --boundary prune."
        )
    if not small:
        raise BudgetError(
            f"At no place to cut is {short(made.budget_edge_macs)} MACs reached by removing at "
            f"most {config.max_channel_ratio:.0%} of the channels. Raise --edge-macs or "
            "--max-channel-ratio, or name --splits. See: patrol-prune plan"
        )
    whole = sorted(range(len(small)), key=lambda i: (small[i].name.count("."), -i))
    return [small[i] for i in sorted(whole[: config.most_splits])]


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
        if most is not None and row.feature_bytes > most and config.boundary == "keep":
            raise InputError(
                f"After {asked}, {row.feature_bytes:,} bytes are uploaded, more than the {most:,} "
                "of --max-feature-bytes. Leave this split out, or allow --boundary prune."
            )
        chosen[row.name] = row
    return list(chosen.values())
