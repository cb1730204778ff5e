"""What one pruning step did."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

_SHORT = 0.03  # of the expected MACs, from which less is told


@dataclass(frozen=True)
class PruneResult:
    """What one step did.

    Attributes:
        edge_macs_before: edge MACs before this step, at batch 1.
        edge_macs: edge MACs after it, at most `budget`.
        budget: this step's budget.
        kept: group name -> (channels kept, channels before this step), of every group that could
            shrink.
        feature_shape_before: the transmitted feature, without the batch dimension.
        feature_shape: the same after the step.
        cloud_changed: cloud layers whose width followed.
        left_whole: edge groups that were not considered, and layers in no group -> why.
        removed_blocks: residual blocks that were replaced by their shortcuts.
    """

    edge_macs_before: int
    edge_macs: int
    budget: int
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)
    feature_shape_before: tuple[int, ...] = ()
    feature_shape: tuple[int, ...] = ()
    cloud_changed: tuple[str, ...] = ()
    left_whole: dict[str, str] = field(default_factory=dict)
    removed_blocks: tuple[str, ...] = ()

    @property
    def removed_channels(self) -> int:
        """Channels removed over all groups."""
        return sum(total - kept for kept, total in self.kept.values())


def warn_if_off(result: PruneResult, expected: int | None) -> None:
    """Say so where groups were skipped, or taken before they were pruned; and where far more went
    than the closed form had told."""
    if expected is not None and result.edge_macs < (1 - _SHORT) * expected:
        warnings.warn(
            f"The edge has {result.edge_macs:,} MACs, of which {expected:,} were to stay: what its "
            "forward multiplies by itself shrank too, which nothing but a count tells. Prune the "
            "model as it was with a larger edge_macs, or keep layers in ignored_layers.",
            stacklevel=3,
        )
    if result.edge_macs > result.budget:
        warnings.warn(
            f"The edge has {result.edge_macs:,} MACs, the budget is {result.budget:,}: of the "
            "groups that step(interactive=True) gave, some were skipped. Call group.prune() on "
            "each inside the loop, before the next one is asked for.", stacklevel=3,
        )


def weight_shapes(layers: Mapping[str, nn.Module]) -> dict[str, tuple[torch.Size, ...]]:
    """Layer -> the shapes of its parameters."""
    return {n: tuple(p.shape for p in m.parameters()) for n, m in layers.items()}
