"""The "PATROL" that published comparisons run, for what the faithful method adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patrol_prune.defences.base import check_share
from patrol_prune.defences.trained import AdversarialOnly
from patrol_prune.group_table import remove_channels
from patrol_prune.groups import ChannelGroup
from patrol_prune.importance import PatrolImportance
from patrol_prune.objective import PatrolObjective
from patrol_prune.split import Split


@dataclass(frozen=True)
class CemPatrol(AdversarialOnly):
    """One-shot Taylor pruning of the edge, scored on random noise; then `L_task - beta L_adv`.

    Of each channel group of the edge that stays clear of the split, the `C - int(C (1 - ratio))`
    channels with the least `|dS/dm_c m_c|` go, with `S` the sum of the logits of one input of
    standard normal noise: neither data, labels nor privacy have a say in what is removed.

    Source: the baseline of that name in the comparisons of Xia et al., Theoretical Insights in
    Model Inversion Robustness and Conditional Entropy Maximization, CVPR 2025, as far as it is
    described. Differs: the uploaded feature keeps its width; the attackers inside are those of
    this package.

    Attributes:
        beta: weight of the adversarial error; more is stronger.
        adversary: the attackers inside.
        ratio: share of each group's channels that is removed, in [0, 1).
        seed: of the noise.
    """

    name: ClassVar[str] = "cem_patrol"

    ratio: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.ratio, "ratio", "CemPatrol")

    def apply(self, split: Split, *, calibration: Tensor | None = None) -> Split:
        """The same split, its model pruned in place; nothing is calibrated."""
        example = split.example_inputs
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(1, *example.shape[1:], generator=generator).to(example)
        objective = PatrolObjective(split, _sum_of_logits, precision="fp32", seed=self.seed)
        importance = PatrolImportance(objective, task_change="absolute", normalizer=None)
        importance.accumulate(noise, torch.zeros(1))
        table = importance.masks.table
        gone = {}
        for name, score in importance.scores.items():
            group = table.groups[name]
            if group.location == "edge" and group.blocked is None and group.crossing is None:
                gone[name] = lowest(group, score.cpu(), self.ratio)
        remove_channels(table, gone)
        split.refresh()
        split.pruning_history = [*split.pruning_history, *table.graph.pruning_history()]
        return split


def lowest(group: ChannelGroup, score: Tensor, ratio: float) -> Tensor:
    """The channels of the lowest score, `C - int(C (1 - ratio))` of them; tied ones together, as
    many of which stay as have to."""
    units = score.view(group.tie, -1).sum(0)
    most = max(0, len(units) - group.fewest_units)
    count = min(most, len(units) - int(len(units) * (1.0 - ratio)))
    return group.units(units.argsort()[:count])


def _sum_of_logits(logits: Tensor, _: Tensor) -> Tensor:
    return logits.sum()
