"""What a copy of a split model takes once it is pruned to a budget, measured."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from patrol_prune._tp import GroupMagnitudeImportance
from patrol_prune.choice import Limits
from patrol_prune.cost import count_params, feature_bytes
from patrol_prune.errors import BudgetError
from patrol_prune.latency import Latency, LatencyConfig, measure_latency
from patrol_prune.plan_limits import EdgeCost
from patrol_prune.plan_rows import PlanRow, Wanted
from patrol_prune.pruner import PatrolPruner
from patrol_prune.split import Split


@dataclass(frozen=True)
class PrunedEdge:
    """A pruned edge; `cost` and `latency` are None where the budget cannot be met.

    Attributes:
        round_to: kept channels are multiples of this, or whole groups.
        cost: counted on the pruned copy.
        latency: of the pruned edge on this device.
        reason: why it cannot be had, or "".
    """

    round_to: int | None
    cost: EdgeCost | None
    latency: Latency | None
    reason: str = ""

    @property
    def name(self) -> str:
        """`any number`, or `multiples of 8`."""
        return "any number" if self.round_to is None else f"multiples of {self.round_to}"


def pruned_edge(
    model: nn.Module,
    example_inputs: Tensor,
    at: str,
    edge_macs: int,
    round_to: int | None,
    config: LatencyConfig,
    *,
    boundary: str = "keep",
    floors: Limits | None = None,
) -> PrunedEdge:
    """Prune a copy to a budget by magnitude, since only shapes matter, and time its edge.

    Args:
        model: left as found.
        example_inputs: a batch `[N, ...]`.
        at: the split.
        edge_macs: the budget as a count, at most the dense edge's.
        round_to: kept channels are multiples of this, or whole groups.
        config: how latency is measured.
        boundary: whether groups that cross the split shrink.
        floors: how far a group may shrink; its `round_to` is not used.
    """
    floors = floors or Limits()
    split = Split(copy.deepcopy(model), example_inputs, at=at)
    try:
        pruner = PatrolPruner(
            split.model, example_inputs, GroupMagnitudeImportance(), split=split,
            edge_macs=edge_macs, boundary=boundary, round_to=round_to,
            max_pruning_ratio=floors.max_pruning_ratio, min_channels=floors.min_channels,
        )  # fmt: skip
    except BudgetError as error:
        least = error.smallest_edge_macs
        return PrunedEdge(round_to, None, None, f"the smallest edge takes {least:,} MACs")
    macs = pruner.step().edge_macs
    cost = EdgeCost(macs, count_params(split.edge), feature_bytes(split.feature_shape))
    return PrunedEdge(round_to, cost, measure_latency(split.edge, example_inputs, config))


class PrunedEdges:
    """The pruned edges of a model's places to cut, each measured when it is first asked for.

    Args:
        model: left as found.
        example_inputs: a batch.
        wanted: budget, boundary and floors.
        config: how latency is measured, and which roundings are compared.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Tensor, wanted: Wanted, config: LatencyConfig
    ) -> None:
        self.model, self.example_inputs = model, example_inputs
        self.wanted, self.config = wanted, config
        self._known: dict[tuple[str, int | None], PrunedEdge] = {}

    def of(self, row: PlanRow) -> Iterator[PrunedEdge]:
        """One for each rounding that `floors` allow; the dense edge where it fits as it is."""
        if row.channel_ratio == 0:
            dense = EdgeCost(row.edge_macs, row.edge_params, row.feature_bytes)
            yield PrunedEdge(None, dense, row.latency)
            return
        own = self.wanted.floors.round_to
        for round_to in _multiples(self.config.roundings, own):
            key = (row.name, round_to)
            if key not in self._known:
                self._known[key] = pruned_edge(
                    self.model, self.example_inputs, row.name, row.prune_to, round_to,
                    self.config, boundary=self.wanted.boundary, floors=self.wanted.floors,
                )  # fmt: skip
            yield self._known[key]


def _multiples(roundings: Sequence[int | None], of: int | None) -> list[int | None]:
    """The roundings that are multiples of one that is asked for, and that one itself."""
    if of is None or of == 1:
        return list(roundings)
    return [of, *(r for r in roundings if r is not None and r != of and r % of == 0)]
