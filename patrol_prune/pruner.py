"""A Torch-Pruning pruner that stops at a budget of edge MACs."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patrol_prune._tp import BasePruner, bounded_enumeration, pruning_group
from patrol_prune.budget import MacModel, budget_as_count, check_budget
from patrol_prune.choice import Limits, choose, require_reachable, smallest
from patrol_prune.cost import count_macs
from patrol_prune.errors import InputError
from patrol_prune.group_table import GroupTable, followed
from patrol_prune.groups import ChannelGroup
from patrol_prune.origins import recording
from patrol_prune.prunable import check_prunable, preserved
from patrol_prune.regularizer import ChannelDecay

if TYPE_CHECKING:
    from patrol_prune.split import Split

logger = logging.getLogger(__name__)

_DECIDED_BY_THE_BUDGET = ("pruning_ratio", "ch_sparsity", "isomorphic", "global_pruning")
_NOT_SUPPORTED = (
    "pruning_ratio_dict",
    "ch_sparsity_dict",
    "prune_num_heads",
    "head_pruning_ratio",
    "head_pruning_ratio_dict",
)


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
    """

    edge_macs_before: int
    edge_macs: int
    budget: int
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)
    feature_shape_before: tuple[int, ...] = ()
    feature_shape: tuple[int, ...] = ()
    cloud_changed: tuple[str, ...] = ()
    left_whole: dict[str, str] = field(default_factory=dict)

    @property
    def removed_channels(self) -> int:
        """Channels removed over all groups."""
        return sum(total - kept for kept, total in self.kept.values())


class PatrolPruner(BasePruner):  # type: ignore[misc]
    """Prunes the edge of a split model to a budget of multiply-adds.

    Differs from `torch_pruning.pruner.BasePruner` in this: the budget decides how much goes; only
    groups with a layer on the edge shrink; a group is never emptied, and floors hold in one step;
    training mode, `requires_grad` and the caller's dictionaries come back as they were.

    Args:
        model: the model, which is `split.model`.
        example_inputs: what it takes.
        importance: a `PatrolImportance`, or any Torch-Pruning importance.
        split: where edge and cloud are; refreshed after every step.
        edge_macs: a fraction in (0, 1] of the dense edge, or a count.
        boundary: "keep" leaves every group that crosses the split whole, so that the feature and
            the cloud stay as they are; "prune" lets them shrink: the feature narrows and the
            cloud's consumers (and, on a residual stream, its producers) follow.
        max_pruning_ratio: largest removed fraction of a group, over all steps.
        min_channels: channels every group keeps at least.
        round_to: kept numbers are multiples of this, or the full width.
        iterative_steps: steps to the budget, equal ones in MACs; scores may be refreshed between.
        ignored_layers: layers whose groups stay whole.
        reg: decay of `regularize`.
        **kwargs: `BasePruner`'s other arguments.

    Raises:
        InputError: a budget that is no budget or above the dense edge, a split of another model,
            an argument that contradicts the budget.
        BudgetError: no choice of channels meets the budget; it says what can be reached.
        UnsupportedModelError: see `GroupTable.build`.

    Example::

        pruner = PatrolPruner(model, x, importance, split=split, edge_macs=0.5)
        result = pruner.step()
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Any,
        *,
        split: Split,
        edge_macs: float,
        boundary: str = "keep",
        max_pruning_ratio: float = 1.0,
        min_channels: int = 1,
        round_to: int | None = None,
        iterative_steps: int = 1,
        ignored_layers: Sequence[nn.Module | nn.Parameter] | None = None,
        reg: float = 1e-4,
        **kwargs: Any,
    ) -> None:
        if split.model is not model:
            raise InputError("Expected a split of this model, came one of another model.")
        if boundary not in ("keep", "prune"):
            raise InputError(f"Expected boundary to be 'keep' or 'prune', came {boundary!r}.")
        if iterative_steps < 1:
            raise InputError(f"Expected iterative_steps of at least 1, came {iterative_steps}.")
        self.limits = Limits(min_channels, max_pruning_ratio, round_to)
        check_budget(edge_macs)
        check_prunable(model)
        self.split, self.boundary, self.reg = split, boundary, reg
        options = _host_options(kwargs)

        def make(forward_fn: Callable[..., Any]) -> Any:
            with preserved(model, trainable=True), torch.enable_grad(), bounded_enumeration(model):
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Unwrapped parameters")
                    BasePruner.__init__(
                        self,
                        model,
                        example_inputs,
                        importance,
                        global_pruning=True,
                        max_pruning_ratio=max_pruning_ratio,
                        iterative_steps=iterative_steps,
                        ignored_layers=list(ignored_layers or []),
                        round_to=round_to,
                        **{**options, "forward_fn": forward_fn},
                    )
            return self.DG

        followed(model, example_inputs, options["forward_fn"], make)
        self._example_inputs = example_inputs
        self._table = GroupTable.build(model, example_inputs, split=split, graph=self.DG)
        self._tied()
        self._costs = MacModel(split, self._table)
        self.initial = {name: g.channels for name, g in self._table.groups.items()}
        self.dense_edge_macs = self._costs.dense
        self.budget = budget_as_count(edge_macs, self.dense_edge_macs)
        require_reachable(self.budget, self.smallest_edge_macs(), self.dense_edge_macs)
        self.pruning_ratio = 1.0 - self.budget / self.dense_edge_macs
        self.per_step_pruning_ratio = self.iterative_pruning_ratio_scheduler(
            self.pruning_ratio, iterative_steps
        )
        self._decay: ChannelDecay | None = None
        self._earlier = list(split.pruning_history)

    @property
    def table(self) -> GroupTable:
        """The model's groups at its present widths."""
        if not self._table.is_current():
            self._table = GroupTable.build(
                self.model, self._example_inputs, split=self.split, graph=self.DG
            )
            self._tied()
            self._costs = MacModel(self.split, self._table, previous=self._costs)
            self._decay = None
        return self._table

    @property
    def costs(self) -> MacModel:
        """The edge's MACs in closed form, at the present widths."""
        _ = self.table
        return self._costs

    def scores(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(group name -> `[C]` score, edge group or layer in none -> why it stays whole)."""
        scores, whole, table = {}, {}, self.table
        for name, group in table.groups.items():
            if group.location != "edge":
                continue
            reason = self._reason_to_keep(group)
            if reason is None:
                with torch.no_grad():
                    score = self.estimate_importance(table.raw[name])
                if score is not None:
                    scores[name] = score
                    continue
                reason = "the importance gives it no score"
            whole[name] = reason
        on_edge = self.split.edge_layers
        whole.update({n: why for n, why in table.left_out.items() if n in on_edge})
        return scores, whole

    def smallest_edge_macs(self) -> int:
        """Edge MACs when every group that may shrink is at its floor."""
        groups = [
            name
            for name, group in self.table.groups.items()
            if group.location == "edge" and self._reason_to_keep(group) is None
        ]
        return smallest(self.costs, groups, limits=self.limits, initial=self.initial)

    def choose(self, budget: int | None = None) -> dict[str, Tensor]:
        """The channels each group would keep for a budget; the final one by default.

        Raises:
            BudgetError: no choice of channels meets the budget.
        """
        return self._choose(self.scores()[0], self.budget if budget is None else budget)

    def step(self, interactive: bool = False) -> Any:
        """Prune to this step's share of the way down.

        Args:
            interactive: yield Torch-Pruning's groups instead; `group.prune()` on each before
                asking for the next. Groups that are skipped leave the edge above the budget.

        Returns:
            a `PruneResult`; with `interactive` an iterator of groups, the result is then
            `last_result` after the loop.

        Raises:
            BudgetError: the channels with a score cannot meet the budget; nothing is pruned.
            InputError: the importance has no scores.
        """
        if self.current_step >= self.iterative_steps:
            warnings.warn(
                f"All {self.iterative_steps} steps are done; nothing is pruned. Make a new pruner "
                "to go on.",
                stacklevel=2,
            )
            macs = self.costs.dense
            shape = tuple(self.split.feature_shape)
            self.last_result = PruneResult(macs, macs, self.budget, {}, shape, shape)
            return iter(()) if interactive else self.last_result
        ratio = self.per_step_pruning_ratio[self.current_step + 1]
        budget = min(round(self.dense_edge_macs * (1.0 - ratio)), self.costs.dense)
        if self.current_step + 1 == self.iterative_steps:
            budget = min(self.budget, self.costs.dense)
        scores, whole = self.scores()
        kept = self._choose(scores, budget)
        self.current_step += 1
        expected = None if interactive else self._costs.macs(kept)
        groups = self._groups_to_prune(kept, budget, whole, expected)
        if interactive:
            return groups
        with torch.no_grad():
            for group in groups:
                group.prune()
        return self.last_result

    def update_regularizer(self) -> None:
        """Score the channels anew: those the budget would remove are what `regularize` decays."""
        kept = self.choose()
        strengths = {}
        for name, idxs in kept.items():
            strengths[name] = torch.full((self.table.groups[name].channels,), self.reg)
            strengths[name][idxs] = 0.0
        self._decay = ChannelDecay(self.table, strengths)

    def regularize(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Add `reg * weight` to the gradients of the low-score channels.

        Call between `loss.backward()` and `optimizer.step()`; further arguments, such as
        Torch-Pruning's `loss`, are accepted and not used.

        Raises:
            InputError: `update_regularizer` was not called since the last pruning.
        """
        if self._decay is None or not self._table.is_current():
            raise InputError(
                "Expected scores for the regularizer, came none for the present model: call "
                "update_regularizer() first, and again after each pruning step."
            )
        self._decay()

    def _choose(self, scores: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
        return choose(self.costs, scores, budget, limits=self.limits, initial=self.initial)

    def _groups_to_prune(
        self, kept: dict[str, Tensor], budget: int, whole: dict[str, str], after: int | None
    ) -> Iterator[Any]:
        """Prune or yield group by group, then put everything in order."""
        table, before = self.table, self._costs.dense
        cloud = _weight_shapes(self.split.cloud_layers)
        shape = tuple(self.split.feature_shape)
        totals = {n: table.groups[n].channels for n in kept}
        removed = {}
        for name, idxs in kept.items():
            keep = torch.zeros(totals[name], dtype=torch.bool)
            keep[idxs] = True
            removed[name] = (~keep).nonzero().flatten()
        with preserved(self.model), recording(table, removed):
            for name, gone in removed.items():
                if len(gone):
                    root = table.groups[name].members[0].module
                    yield pruning_group(self.DG, root, gone.tolist())
        self.split.refresh()
        self.split.pruning_history = [*self._earlier, *self.DG.pruning_history()]
        self._decay = None
        if after is None or self._costs.constant:
            after = count_macs(self.split.edge, self.split.example_inputs).total
        now = _weight_shapes(self.split.cloud_layers)
        self.last_result = PruneResult(
            edge_macs_before=before,
            edge_macs=after,
            budget=budget,
            kept={n: (len(idxs), totals[n]) for n, idxs in kept.items()},
            feature_shape_before=shape,
            feature_shape=tuple(self.split.feature_shape),
            cloud_changed=tuple(n for n in cloud if now.get(n) != cloud[n]),
            left_whole=whole,
        )
        if self.current_step >= self.iterative_steps and hasattr(self.importance, "mark_stale"):
            self.importance.mark_stale("the model was pruned with them")
        logger.info("edge MACs %d -> %d (budget %d)", before, after, budget)

    def _reason_to_keep(self, group: ChannelGroup) -> str | None:
        if group.blocked is not None:
            return group.blocked
        if group.crossing is not None and self.boundary == "keep":
            return f"it crosses the split ({group.crossing}) and boundary='keep'"
        ignored = {id(m) for m in self.ignored_layers}
        for member in group.members:
            if member.direction != "in" and id(member.module) in ignored:
                return f"{member.layer_name!r} is in ignored_layers"
            if member.module in self.num_heads:
                return f"{member.layer_name!r} has attention heads"
        return None

    def _tied(self) -> None:
        """Channel groups the caller names tie channels like those of grouped convolutions."""
        for name, group in self._table.groups.items():
            tie = group.tie
            for m in group.members:
                named = self.in_channel_groups if m.direction == "in" else self.out_channel_groups
                if isinstance(m.module, nn.Module):
                    tie = math.lcm(tie, int(named.get(m.module, 1)))
            if tie == group.tie:
                continue
            blocked = group.blocked
            if group.channels % tie or group.channels // tie < 2:
                blocked = f"its {group.channels} channels cannot be divided by {tie}"
                tie = group.tie
            self._table.groups[name] = dataclasses.replace(group, tie=tie, blocked=blocked)


def _host_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`BasePruner`'s arguments, with copies of the dictionaries it would write into."""
    for name in _NOT_SUPPORTED:
        if kwargs.get(name):
            raise InputError(
                f"{name} has no meaning beside a budget of edge MACs. Leave it out, or name layers "
                "to keep in ignored_layers."
            )
    for name in _DECIDED_BY_THE_BUDGET:
        if kwargs.get(name) and name != "global_pruning":
            warnings.warn(f"{name} is not used: edge_macs decides.", stacklevel=3)
    dropped = (*_DECIDED_BY_THE_BUDGET, *_NOT_SUPPORTED)
    options = {k: v for k, v in kwargs.items() if k not in dropped}
    for name in ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups"):
        options[name] = dict(options.get(name) or {})
    return {"forward_fn": None, **options}


def _weight_shapes(layers: Mapping[str, nn.Module]) -> dict[str, tuple[torch.Size, ...]]:
    return {n: tuple(p.shape for p in m.parameters()) for n, m in layers.items()}
