"""Which of the places to cut to take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from patrol_prune._block_pruning import STRUCTURES
from patrol_prune.errors import BudgetError, InputError
from patrol_prune.plan_limits import PlanLimits
from patrol_prune.plan_rows import PlanRow, Wanted
from patrol_prune.pruned_edges import PrunedEdge

_ADVICE = {
    "edge_macs": "Raise the budget.",
    "edge_params": "Raise limits.edge_params (--max-edge-params).",
    "feature_bytes": "Raise limits.feature_bytes (--max-feature-bytes), or allow boundary='prune'.",
}
_UNIT = {"edge_macs": "MACs", "edge_params": "parameters", "feature_bytes": "bytes uploaded"}


def preferred(rows: Sequence[PlanRow], max_channel_ratio: float) -> list[PlanRow]:
    """The rows that fit, best first.

    The deepest that needs at most `max_channel_ratio` of its channels removed and transmits more
    than a vector; then the deepest that transmits one; then what needs more, shallow to deep.
    """
    able = [r for r in rows if r.fits]
    moderate = [r for r in able
                if r.strength is not None and r.strength <= max_channel_ratio]
    inner = [r for r in moderate if not r.is_tail]
    tails = [r for r in moderate if r.is_tail]
    rest = [r for r in able if r not in moderate]
    return inner[::-1] + tails[::-1] + rest


def require_possible(rows: Sequence[PlanRow], wanted: Wanted) -> None:
    """Refuse budget and limits that none of these rows can meet, and say the smallest there is.

    Raises:
        InputError: nothing needs to be pruned anywhere.
        BudgetError: nothing that can be reached keeps to all of them.
    """
    where = f"at {rows[0].name}" if len(rows) == 1 else "at any split"
    if wanted.limits.is_none and all(row.edge_macs <= wanted.edge_macs for row in rows):
        if len(rows) == 1:
            return
        raise InputError(
            f"The budget of {wanted.edge_macs:,} MACs is above every dense edge; the deepest, "
            f"{rows[-1].name}, takes {rows[-1].edge_macs:,}: there is nothing to prune. Give a "
            "smaller budget."
        )
    if any(row.fits for row in rows):
        return
    smallest = {name: min(getattr(r.smallest, name) for r in rows) for name in _UNIT}
    for name, most in _limits(wanted).items():
        if most is None or smallest[name] <= most:
            continue
        least = min(rows, key=lambda r: int(getattr(r.smallest, name)))
        raise BudgetError(
            f"No choice of {STRUCTURES[wanted.structures]} brings the edge {where} to {most:,} "
            f"{_UNIT[name]}; the smallest reachable is {smallest[name]:,}, after "
            f"{least.name}. {_ADVICE[name]}",
            smallest_edge_macs=smallest["edge_macs"], smallest=smallest,
        )
    asked = ", ".join(f"{most:,} {_UNIT[n]}" for n, most in _limits(wanted).items() if most)
    raise BudgetError(
        f"Each of {asked} can be met by itself, but no place to cut meets all at once: where the "
        "one is small, another is not. Raise one of them.",
        smallest_edge_macs=smallest["edge_macs"], smallest=smallest,
    )


def fastest_enough(
    rows: Iterable[PlanRow],
    wanted: Wanted,
    measured: Callable[[PlanRow], Iterable[PrunedEdge]],
) -> str:
    """The first row of which a pruned edge was measured within every limit.

    Args:
        rows: best first.
        wanted: budget and limits, with a latency.
        measured: the pruned edges of a row; no more are asked for than are needed.

    Raises:
        BudgetError: there is none; it tells the fastest that was measured.
    """
    limit = wanted.limits.latency_ms
    assert limit is not None
    fastest: tuple[float, str] | None = None
    for row in rows:
        for edge in measured(row):
            if edge.latency is None or edge.cost is None:
                continue
            if not edge.cost.within(wanted.edge_macs, wanted.limits):
                continue
            if edge.latency.median_ms <= limit:
                return row.name
            fastest = min(fastest or (edge.latency.median_ms, row.name),
                          (edge.latency.median_ms, row.name))
    told = "none could be measured" if fastest is None else (
        f"the fastest took {fastest[0]:.3g} ms, after {fastest[1]}"
    )
    raise BudgetError(
        f"No edge within the other limits ran in {limit:g} ms on this device: {told}. Raise "
        "limits.latency_ms (--max-latency-ms), lower the budget of MACs, or give more threads.",
        smallest={} if fastest is None else {"latency_ms": fastest[0]},
    )


def _limits(wanted: Wanted) -> dict[str, int | None]:
    limits: PlanLimits = wanted.limits
    return {"edge_macs": wanted.edge_macs, "edge_params": limits.edge_params,
            "feature_bytes": limits.feature_bytes}
