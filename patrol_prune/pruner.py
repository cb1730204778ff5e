"""A Torch-Pruning pruner that stops at a budget of edge MACs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patrol_prune._block_pruning import (
    check_scored,
    initial_widths,
    prunable_blocks,
    tie_named,
)
from patrol_prune._host_options import (
    check_pruner,
    check_schedule,
    checked_score,
    host_options,
    layers_to_keep,
    with_owners,
)
from patrol_prune._tp import BasePruner, bounded_enumeration, pruning_group, width_of
from patrol_prune.budget import MacModel, budget_as_count, check_budget
from patrol_prune.choice import Limits, choose_structures, require_reachable, smallest
from patrol_prune.cost import count_macs
from patrol_prune.errors import InputError
from patrol_prune.following import followed
from patrol_prune.group_table import GroupTable, rebuilt_graph
from patrol_prune.groups import ChannelGroup
from patrol_prune.kept_whole import check_feature_channels, fixed_widths, reason_to_keep
from patrol_prune.origins import recording
from patrol_prune.prunable import check_prunable, follow_widths, preserved, whole_or_not_at_all
from patrol_prune.prune_result import PruneResult, warn_if_off, weight_shapes
from patrol_prune.regularizer import ChannelDecay
from patrol_prune.removal import remove_blocks

if TYPE_CHECKING:
    from patrol_prune.split import Split

logger = logging.getLogger(__name__)

_NO_SCORE = "the importance gives it no score"
_GRAPH_OPTIONS = ("forward_fn", "output_transform", "unwrapped_parameters", "customized_pruners")

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
        edge_macs: a fraction in (0, 1] of the edge as it is now, or a count (also as "9.9M");
            `budget` has it as a count, `dense_edge_macs` what the edge takes now.
        boundary: "keep" leaves every group that crosses the split whole, so that the feature and
            the cloud stay as they are; "prune" lets them shrink: the feature narrows and the
            cloud's consumers (and, on a residual stream, its producers) follow.
        feature_channels: with "prune", the channels that every group which crosses keeps (or all
            of fewer) from the first step on, the best by score; with None the budget decides.
        max_pruning_ratio: largest removed fraction of a group, in (0, 1], over all steps.
        min_channels: channels every group keeps at least.
        round_to: kept numbers are multiples of this, or the full width.
        iterative_steps: steps to the budget, equal ones in MACs; scores may be refreshed between.
        ignored_layers: layers, or parameters of layers, whose groups stay whole.
        structures: what may go, "channels", "blocks" or "both"; blocks need their scores.
        reg: decay of `regularize`.
        **kwargs: `BasePruner`'s other arguments; single ratios are not used, with a warning, and
            dictionaries of ratios and pruning of heads are refused.

    Raises:
        InputError: no budget or one above the dense edge, another model's split, a contradiction.
        BudgetError: no choice of channels meets the budget; it says what can be reached.
        UnsupportedModelError: a layer is parametrised, quantised or frozen into buffers, a weight
            is not finite, or the model's channels cannot be followed.

    Example::

        pruner = PatrolPruner(model, x, importance, split=split, edge_macs=0.5)
        result = pruner.step()
    """

    DG: Any

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Any,
        *,
        split: Split,
        edge_macs: float | str,
        boundary: str = "keep",
        feature_channels: int | None = None,
        structures: str = "channels",
        max_pruning_ratio: float = 1.0,
        min_channels: int = 1,
        round_to: int | None = None,
        iterative_steps: int = 1,
        ignored_layers: Sequence[nn.Module | nn.Parameter] | None = None,
        reg: float = 1e-4,
        **kwargs: Any,
    ) -> None:
        check_pruner(model, split, importance, boundary, iterative_steps, reg)
        check_feature_channels(feature_channels, boundary, structures)
        check_scored(structures, importance)
        ignored = layers_to_keep(ignored_layers)
        self.limits = Limits(min_channels, max_pruning_ratio, round_to)
        edge_macs = check_budget(edge_macs)
        check_prunable(model)
        self.split, self.boundary, self.reg = split, boundary, reg
        self.structures, self.feature_channels = structures, feature_channels
        options = host_options(kwargs)

        def make(forward_fn: Callable[..., Any]) -> Any:
            with preserved(model, trainable=True), torch.enable_grad(), bounded_enumeration(model):
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Unwrapped parameters")
                    BasePruner.__init__(
                        self, model, example_inputs, importance, global_pruning=True,
                        max_pruning_ratio=max_pruning_ratio, iterative_steps=iterative_steps,
                        ignored_layers=list(ignored), round_to=round_to,
                        **{**options, "forward_fn": forward_fn},
                    )
            return self.DG

        followed(model, example_inputs, options["forward_fn"], make)
        self._example_inputs, self._ignored = example_inputs, with_owners(ignored, model)
        self._graph_options = {n: options.get(n) for n in _GRAPH_OPTIONS}
        self._table = GroupTable.build(
            model, example_inputs, split=split, graph=self.DG, forward_fn=options["forward_fn"]
        )
        tie_named(self._table, self.in_channel_groups, self.out_channel_groups)
        self._costs = MacModel(
            split, self._table, blocks=prunable_blocks(split, structures, self._to_keep())
        )
        self.initial = {name: g.channels for name, g in self._table.groups.items()}
        self.dense_edge_macs = self._costs.dense
        self.budget = budget_as_count(edge_macs, self.dense_edge_macs)
        require_reachable(self.budget, self.smallest_edge_macs(), self.dense_edge_macs,
                          limits=self.limits, boundary=boundary, whole=self._kept_whole(),
                          fixed=feature_channels is not None)
        self.pruning_ratio = 1.0 - self.budget / self.dense_edge_macs
        self.per_step_pruning_ratio = check_schedule(self.iterative_pruning_ratio_scheduler(
            self.pruning_ratio, iterative_steps), iterative_steps, self.pruning_ratio)
        self._decay: ChannelDecay | None = None
        self._earlier = list(split.pruning_history)

    @property
    def table(self) -> GroupTable:
        """The model's channel groups at its present widths; `table.groups` has them by name."""
        if not self._table.is_current():
            before = self._table
            self._table = GroupTable.build(
                self.model, self._example_inputs, split=self.split, graph=self.DG,
                forward_fn=self._graph_options["forward_fn"],
            )
            tie_named(self._table, self.in_channel_groups, self.out_channel_groups)
            self.initial = {**initial_widths(before, self._table, self.initial), **self.initial}
            previous = None if self._costs.blocks else self._costs
            blocks = prunable_blocks(self.split, self.structures, self._to_keep())
            self._costs = MacModel(self.split, self._table, previous=previous, blocks=blocks)
            self._decay = None
        return self._table

    @property
    def costs(self) -> MacModel:
        """The edge's MACs in closed form, at the present widths; `costs.macs(kept)` of a choice."""
        _ = self.table
        return self._costs

    def scores(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(group name -> `[C]` score, edge group or layer in none -> why it stays whole)."""
        scores, whole, table = {}, {}, self.table
        for name, group in table.groups.items():
            if group.location != "edge":
                continue
            reason = self._reason_to_keep(group)
            if self.structures == "blocks":
                reason = "structures='blocks'"
            if reason is None:
                score = self._score_of(table.raw[name])
                if score is not None:
                    scores[name] = score
                    continue
                reason = _NO_SCORE
            whole[name] = reason
        on_edge = self.split.edge_layers
        whole.update({n: why for n, why in table.left_out.items() if n in on_edge})
        if not scores and _NO_SCORE in whole.values():
            raise InputError(
                f"The importance {type(self.importance).__name__} gives none of the edge's groups "
                "a score. One that reads gradients needs loss.backward() before the step."
            )
        return scores, whole

    def _score_of(self, group: Any) -> Tensor | None:
        with torch.no_grad():
            return checked_score(self.importance, lambda: self.estimate_importance(group))

    def smallest_edge_macs(self) -> int:
        """Edge MACs when every group that may shrink is at its floor."""
        groups = [name for name, group in self.table.groups.items()
                  if group.location == "edge" and self._reason_to_keep(group) is None]
        if self.structures == "blocks":
            groups = []
        costs = self.costs
        sent = fixed_widths(self.table.groups, self.feature_channels, self._kept_whole())
        return smallest(costs, groups, limits=self.limits, initial=self.initial,
                        blocks=costs.blocks, fixed=sent)

    def _kept_whole(self) -> dict[str, str]:
        """Edge group -> why it stays whole, the widest first."""
        groups = sorted(self.table.groups.values(), key=lambda g: -g.channels)
        return {g.name: reason for g in groups if g.location == "edge"
                and (reason := self._reason_to_keep(g)) is not None}

    def choose(self, budget: int | None = None) -> dict[str, Tensor]:
        """Group name -> the channels it would keep for a budget; for the final one by default.

        Raises:
            BudgetError: no choice of channels meets the budget.
        """
        final = min(self.budget, self.costs.dense)
        return self._choose(self.scores()[0], final if budget is None else budget)[0]

    def step(self, interactive: bool = False) -> Any:
        """Prune to this step's share of the way down.

        Args:
            interactive: yield Torch-Pruning's groups instead; `group.prune()` on each before
                asking for the next. Groups that are skipped leave the edge above the budget.

        Returns:
            `edge_macs_before` and `edge_macs`, at most this step's `budget`; `kept`, group name ->
            (channels now, before); `feature_shape_before` and `feature_shape`; `cloud_changed`,
            cloud layers whose width followed; `left_whole`, what was not considered -> why;
            `removed_blocks` and `removed_channels`. With `interactive` an iterator of groups; the
            result is then `last_result` after the loop.

        Raises:
            BudgetError: the channels with a score cannot meet the budget; nothing is pruned.
            InputError: the importance has no scores, or stale ones.
            UnsupportedModelError: the model does not run pruned; it is then as it was.
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
        kept, gone = self._choose(scores, budget)
        self.current_step += 1
        expected = None if interactive else self._costs.macs(kept, without=gone)
        groups = self._groups_to_prune(kept, gone, budget, whole, expected)
        if interactive:
            return groups
        with torch.no_grad():
            for group in groups:
                group.prune()
        return self.last_result

    def update_regularizer(self) -> None:
        """Score the channels anew: those the budget would remove are what `regularize` decays;
        none once all steps are done."""
        strengths = {}
        if self.current_step < self.iterative_steps:
            scores = self.scores()[0]
            kept = self._choose(scores, min(self.budget, self.costs.dense))[0]
            for name, score in scores.items():
                strengths[name] = torch.full((len(score),), self.reg)
                strengths[name][kept.get(name, [])] = 0.0  # all of a block that goes decays
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

    def block_scores(self) -> dict[str, float]:
        """Block name -> score, of the edge's blocks that may go."""
        if self.structures == "channels":
            return {}
        scores = self.importance.block_scores
        return {name: float(scores[name]) for name in self.costs.blocks if name in scores}

    def _choose(
        self, scores: Mapping[str, Tensor], budget: int
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        whole = {name: _NO_SCORE for name in self.table.groups if name not in scores}
        sent = fixed_widths(self.table.groups, self.feature_channels, whole)
        return choose_structures(
            self.costs, scores, self.block_scores(), budget, limits=self.limits,
            initial=self.initial, fixed=sent,
        )  # fmt: skip

    def _remove_blocks(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Take blocks out, and start a graph that goes on with the history so far."""
        gone = remove_blocks(self.split, names)
        if gone:
            self.DG = rebuilt_graph(
                self.model, self._example_inputs, list(self.DG.pruning_history()),
                ignored_params=self.ignored_params, **self._graph_options,
            )  # fmt: skip
        return gone

    def _groups_to_prune(
        self,
        kept: dict[str, Tensor],
        gone: tuple[str, ...],
        budget: int,
        whole: dict[str, str],
        after: int | None,
    ) -> Iterator[Any]:
        """Prune or yield group by group, then put everything in order."""
        table, before = self.table, self._costs.dense
        cloud = weight_shapes(self.split.cloud_layers)
        shape = tuple(self.split.feature_shape)
        totals = {n: table.groups[n].channels for n in kept}
        removed = {}
        for name, idxs in kept.items():
            keep = torch.zeros(totals[name], dtype=torch.bool)
            keep[idxs] = True
            removed[name] = (~keep).nonzero().flatten()
        with whole_or_not_at_all(self.split):
            try:
                with preserved(self.model), recording(table, removed):
                    for name, idxs in removed.items():
                        if len(idxs):
                            root = table.groups[name].members[0].module
                            yield pruning_group(self.DG, root, idxs.tolist())
            finally:  # also where the caller leaves the loop
                follow_widths(self.model)
                self.split.refresh()
                self.split.pruning_history = [*self._earlier, *self.DG.pruning_history()]
            removed_blocks = self._remove_blocks(gone)
        self._decay = None
        expected, counted = after, self._costs.constant or self.split.positions is None
        if after is None or counted or self._costs.has_other_positions(self.split):
            after = count_macs(self.split.edge, self.split.example_inputs).total
        now = weight_shapes(self.split.cloud_layers)
        self.last_result = PruneResult(
            edge_macs_before=before, edge_macs=after, budget=budget,
            kept={n: (width_of(table.groups[n].members[0].module, "out", self.DG), totals[n])
                  for n in kept},
            feature_shape_before=shape,
            feature_shape=tuple(self.split.feature_shape),
            cloud_changed=tuple(n for n in cloud if now.get(n) != cloud[n]),
            left_whole=whole,
            removed_blocks=removed_blocks,
        )
        if self.current_step >= self.iterative_steps and hasattr(self.importance, "mark_stale"):
            self.importance.mark_stale("the model was pruned with them")
        warn_if_off(self.last_result, expected)
        logger.info("edge MACs %d -> %d (budget %d)", before, after, budget)

    def _reason_to_keep(self, group: ChannelGroup) -> str | None:
        return reason_to_keep(self, group)

    def _to_keep(self) -> list[nn.Module]:
        """Layers that, or parameters of which, the caller keeps."""
        kept = {*self._ignored, *(id(m) for m in self.ignored_layers)}
        return [m for m in self.model.modules() if id(m) in kept]
