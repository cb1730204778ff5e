"""Masks and weights trained together on the whole objective, down to a budget of edge MACs.

    min_{theta, m}  L + sum_i alpha_i k_i - beta * L_adv + gamma * sum_s c_s |m_s| / sum_s c_s

The surrogates take their inner steps as in `finetune`. After every step of the weights the masks
take a proximal gradient step (`shrinkage.py`), which reaches exact zeros. A controller moves gamma
so that the edge MACs of the channels with a mask above zero follow a straight line from the dense
edge to the budget. They are counted, not expected: a smooth expectation such as the MACs at
`sum_s m_s` channels falls also while all masks shrink together and none is near zero, and meeting
the budget with it says nothing of the edge that will run. Residual blocks may carry masks as well
(`structures`), priced by all the MACs they take along. At the end of the schedule the last few
masks above the budget are zeroed, and the weights train on with the masks as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patrol_prune._block_pruning import STRUCTURES, check_structures, prunable_blocks
from patrol_prune.budget import MacModel, budget_as_count, check_budget
from patrol_prune.choice import Limits
from patrol_prune.cost import home_of
from patrol_prune.errors import CheckpointError, InputError, UnsupportedModelError
from patrol_prune.finetune import check_training, drive
from patrol_prune.finetune_config import FinetuneConfig
from patrol_prune.folding import cannot_fold, fold_masks
from patrol_prune.given import (
    check_count,
    check_kind,
    check_number,
    check_objective,
    check_split,
)
from patrol_prune.image_pool import TrainBatches
from patrol_prune.mask_importance import MaskImportance
from patrol_prune.masks import SoftMasks
from patrol_prune.objective import ObjectiveTerms, PatrolObjective
from patrol_prune.pruner import PatrolPruner, PruneResult
from patrol_prune.shrinkage import BLOCK, Shrinker, adapted, block_key, scheduled_macs
from patrol_prune.split import Split
from patrol_prune.trainer import Trainer, clip_gradients

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskConfig(FinetuneConfig):
    """Settings of learning masks; those of the weights and the surrogates are `FinetuneConfig`'s.

    Attributes:
        mask_lr: eta, the rate of the masks' gradient step; plain, without momentum.
        gamma: the penalty's weight at the start, over the one that brings a mask of 1 at average
            cost to 0 in the time of the schedule; the controller takes it from there.
        gain: of the controller, in e-folds of gamma over the whole schedule for an error as large
            as all that has to go.
        schedule_share: share of all steps after which the edge MACs are at the budget; they come
            down once the `warmup`, in which the masks follow their gradients alone, is over.
            Afterwards the masks stay as they are and the weights train on.
        refresh: steps between two computations of the structures' costs `c_s`.
        max_pruning_ratio: largest share of a group's channels whose mask may be zero; the others,
            those with the largest masks, pay no penalty.
        min_channels: channels of every group whose mask stays above zero, likewise.
    """

    mask_lr: float = 1.0
    gamma: float = 1.0
    gain: float = 30.0
    schedule_share: float = 0.6
    refresh: int = 10
    max_pruning_ratio: float = 0.5
    min_channels: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = {"mask_lr": self.mask_lr, "gamma": self.gamma, "gain": self.gain}
        for name in (*positive, "schedule_share"):
            check_number(getattr(self, name), f"MaskConfig.{name}")
        bad = [name for name, value in positive.items() if not value > 0]
        bad += [] if 0 < self.schedule_share <= 1 else ["schedule_share"]
        check_count(self.refresh, "MaskConfig.refresh", 1)
        if bad:
            raise InputError(
                f"MaskConfig: out of range: {', '.join(bad)}. mask_lr, gamma and gain are "
                "positive, schedule_share lies in (0, 1]."
            )
        Limits(self.min_channels, self.max_pruning_ratio)

    @property
    def limits(self) -> Limits:
        """The floors per group, `min_channels` and `max_pruning_ratio`, as one object."""
        return Limits(self.min_channels, self.max_pruning_ratio)


@dataclass
class LearnedMasks:
    """Masks that meet a budget, and how they came to.

    Attributes:
        masks: the masks; the model's weights belong to them and not without them.
        budget: edge MACs allowed.
        dense_edge_macs: edge MACs without masks.
        edge_macs: edge MACs of the channels and blocks whose mask is not zero, at most `budget`.
        projected: channels and blocks that were zeroed at the end of the schedule to meet the
            budget, which the penalty had not brought to zero.
        gamma_history: gamma behind every step of the schedule.
        edge_macs_history: edge MACs behind every step of the schedule.
        records: one flat record per epoch: means of the terms, and gamma, edge_macs,
            zero_channels and zero_blocks at its end.
        resumed_from: the epochs that were done when training went on; 0 from the start.
        structures: what could go: "channels", "blocks" or "both".
        left_out: removable block -> why it had no mask.
    """

    masks: SoftMasks
    budget: int
    dense_edge_macs: int
    edge_macs: int
    projected: int = 0
    gamma_history: list[float] = field(default_factory=list)
    edge_macs_history: list[int] = field(default_factory=list)
    records: list[dict[str, float]] = field(default_factory=list)
    resumed_from: int = 0
    structures: str = "channels"
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def blocks(self) -> dict[str, float]:
        """Block name -> mask, of the blocks that were learned; 0 means that it goes."""
        return {n: float(m.detach()) for n, m in self.masks.blocks.items()
                if n not in self.left_out}

    @property
    def channels(self) -> dict[str, Tensor]:
        """Group name -> `[C]` mask, copies on the CPU, of the groups that were learned."""
        return {} if self.structures == "blocks" else _channels(self.masks)

    def harden(self) -> PruneResult:
        """Fold the masks into the weights and remove the channels and blocks whose mask is zero.

        `split.model` then computes alone what the masked model computed, to rounding. The masks
        are used up, as they are of the wider model. Gives what `PatrolPruner.step` does.

        Raises:
            InputError: the model was pruned since, as by an earlier call.
        """
        masks, split = self.masks, self.masks.split
        assert split is not None
        importance = MaskImportance(masks)
        fold_masks(masks)
        pruner = PatrolPruner(split.model, split.example_inputs, importance, split=split,
                              edge_macs=self.edge_macs, boundary=masks.boundary,
                              structures=self.structures)
        return pruner.step()


def learn_masks(
    split: Split,
    train_batches: TrainBatches,
    objective: PatrolObjective,
    *,
    edge_macs: float | str,
    config: MaskConfig | None = None,
    boundary: str = "keep",
    structures: str = "channels",
    teacher: nn.Module | None = None,
    val_batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    device: str | torch.device | None = None,
) -> LearnedMasks:
    """Train the weights and the masks of the edge's channels and blocks down to a budget.

    Masks sit on the groups that `PatrolPruner` could prune at this `boundary`, but for those with
    a layer that normalises over channels: such a mask cannot become part of the weights. The model
    is trained in place; call `harden()` on the result to get the small one.

    Args:
        split: the cut model.
        train_batches: batches `(x, y)` in model-input space.
        objective: of this split; alpha and beta of 0 leave the task and the penalty.
        edge_macs: a fraction in (0, 1] of the dense edge, or a count (also as "9.9M").
        config: see `MaskConfig`.
        boundary: "keep" leaves the groups that cross the split without a mask, "prune" does not.
        structures: "channels", residual "blocks", or "both" carry masks. Blocks whose branch ends
            in a layer that cannot take a factor have none; `left_out` names them.
        teacher: the dense model, for distillation; never trained here.
        val_batches: accuracy of the masked model is measured on them after each epoch.
        checkpoint_dir: one checkpoint per epoch is written there, whole or not at all.
        resume: go on from the newest whole checkpoint in `checkpoint_dir`, from the start where
            there is none; without it, the folder must hold no checkpoint of an earlier training.
        progress: show a bar.
        device: where to train; where the model is by default.

    Raises:
        BudgetError: the groups at their floors cost more than the budget.
        InputError: no batch, an objective of another model, a task loss with parameters to learn
            of its own, a budget that is none, more than one process.
        UnsupportedModelError: nothing on the edge can carry a mask, or the model is of half
            precision.
        TrainingError: a loss or a gradient that is NaN or infinite, with the step and the term.
        CheckpointError: the checkpoint to resume from is of another budget, boundary or choice of
            structures; or there is an earlier training, and `resume` is not given.
    """
    config = config or MaskConfig()
    edge_macs = check_budget(edge_macs)
    check_structures(structures)
    check_split(split)
    check_objective(objective)
    check_kind(config, "config", MaskConfig, "Make one: MaskConfig(epochs=10).")
    check_training(split, train_batches, objective, teacher)
    masks = SoftMasks(split.model, split.example_inputs, split=split, boundary=boundary,
                      blocks=structures != "channels")
    unfoldable = cannot_fold(masks)
    left_out = {**masks.unmaskable, **unfoldable}
    found = prunable_blocks(split, structures, ())
    learned = {n: b for n, b in found.items() if n in masks.blocks and n not in left_out}
    costs = MacModel(split, masks.table, blocks=learned)
    budget = budget_as_count(edge_macs, costs.dense)
    groups = () if structures == "blocks" else tuple(_channels(masks))
    if not groups and not learned:
        raise UnsupportedModelError(
            f"None of the edge's {STRUCTURES[structures]} can carry a learned mask"
            f"{_why_none(masks, left_out)}. Choose a deeper split point"
            f"{', boundary=' + repr('prune') if boundary == 'keep' else ''} or prune by scores."
        )
    if left_out:
        logger.warning("%d removable blocks have no mask and stay: %s", len(left_out),
                       "; ".join(f"{name}, as {why}" for name, why in left_out.items()))
    shrinker = Shrinker(costs, groups, config.limits, budget)
    trainer = _MaskTrainer(masks, shrinker, objective, config, teacher,
                           home_of(split.model, device), len(train_batches))
    with masks.attached():
        trained = drive(trainer, train_batches, val_batches, checkpoint_dir, resume, progress)
    trainer.freeze()
    return LearnedMasks(
        masks, budget, costs.dense, shrinker.macs(trainer.values()), trainer.projected,
        trainer.gammas, trainer.macs, trained.history, trained.resumed_from, structures, left_out,
    )  # fmt: skip


class _MaskTrainer(Trainer):
    """A training stage whose masks take a proximal step behind every step of the weights."""

    config: MaskConfig

    def __init__(
        self,
        masks: SoftMasks,
        shrinker: Shrinker,
        objective: PatrolObjective,
        config: MaskConfig,
        teacher: nn.Module | None,
        device: torch.device,
        batches: int,
    ) -> None:
        super().__init__(objective.split, objective, config, teacher, device, batches)
        if self.accelerator is not None:
            raise InputError("Expected one process: the masks' gradients are not averaged.")
        self.masks, self.shrinker = masks, shrinker
        total = config.epochs * batches
        self.end = max(1, round(config.schedule_share * total))
        self.start = min(round(config.warmup * total), self.end - 1)
        duration = self.end - self.start
        self.gamma = config.gamma * shrinker.structures / (config.mask_lr * duration)
        self.frozen, self.projected = False, 0
        self.gammas: list[float] = []
        self.macs: list[int] = []
        self.shares: dict[str, Tensor] = {}

    def train_epoch(self, epoch: int, batches: TrainBatches, progress: bool) -> dict[str, float]:
        """One pass; the means of the terms, and where the masks stand."""
        record = super().train_epoch(epoch, batches, progress)
        values = self.values()
        zeros = {n: int((v == 0).sum()) for n, v in values.items()}
        blocks = sum(count for n, count in zeros.items() if n.startswith(BLOCK))
        return {**record, "gamma": self.gamma, "edge_macs": self.shrinker.macs(values),
                "zero_channels": sum(zeros.values()) - blocks, "zero_blocks": blocks}

    def values(self) -> dict[str, Tensor]:
        """The masks that are learned, copies on the CPU, as `Shrinker` takes them."""
        names, blocks = set(self.shrinker.names), self.masks.blocks
        values = {n: v for n, v in _channels(self.masks).items() if n in names}
        for name in self.shrinker.costs.blocks:
            values[block_key(name)] = blocks[name].detach().cpu().reshape(1).clone()
        return values

    def after_step(self, step: int) -> None:
        """The masks' proximal gradient step, and gamma's."""
        if self.frozen:
            return
        now, moved = self.values(), self._gradient_step(step)
        if step % self.config.refresh == 0 or not self.shares:
            self.shares = self.shrinker.shares(self.values())
        dense, budget = self.shrinker.costs.dense, self.shrinker.budget
        steps, passed = self.end - self.start, step + 1 - self.start
        target = scheduled_macs(passed, steps, dense, budget)
        force = self.config.mask_lr * self.gamma if passed > 0 else 0.0
        done = self.shrinker.step(moved, force, self.shares, target, now=now)
        if passed > 0:
            error = (done.unlimited - target) / max(1, dense - budget)
            self.gamma = adapted(self.gamma, error, self.config.gain, steps)
        self._write(done.values)
        self.gammas.append(self.gamma)
        self.macs.append(done.macs)
        if step + 1 >= self.end:
            self.freeze()

    def freeze(self) -> None:
        """Meet the budget by the smallest masks per MAC, and leave the masks alone from here on."""
        if not self.frozen:
            before = self.values()
            after = self.shrinker.project(before)
            self.projected = sum(int(((before[n] != 0) & (after[n] == 0)).sum()) for n in before)
            self._write(after)
            self.frozen = True
            logger.info("edge MACs %d (budget %d), %d structures projected",
                        self.shrinker.macs(after), self.shrinker.budget, self.projected)
        for mask in self.masks.parameters():
            mask.requires_grad_(False)

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The masks, their costs and the controller."""
        tensors = {f"masks.{n}": v for n, v in self.values().items()}
        tensors.update({f"shares.{n}": v for n, v in self.shares.items()})
        about = {"budget": self.shrinker.budget, "gamma": self.gamma, "frozen": self.frozen,
                 "projected": self.projected, "gammas": self.gammas, "macs": self.macs}
        return tensors, {"learned_masks": about}

    def load_extra(self, tensors: dict[str, Tensor], meta: dict[str, Any], path: str) -> None:
        """Put back what `extra_state` gave."""
        about = meta.get("learned_masks", {})
        theirs = {k[6:]: v for k, v in tensors.items() if k.startswith("masks.")}
        mine = self.values()
        if about.get("budget") != self.shrinker.budget or theirs.keys() != mine.keys():
            raise CheckpointError(
                f"The checkpoint {path} is of other masks: {len(theirs)} groups and blocks and a "
                f"budget of {about.get('budget')} MACs, here {len(mine)} and "
                f"{self.shrinker.budget}. Resume with the same split, boundary, structures and "
                "budget, or start in another directory.",
                path=path,
            )
        self._write(theirs)
        self.shares = {k[7:]: v for k, v in tensors.items() if k.startswith("shares.")}
        self.gamma, self.projected = float(about["gamma"]), int(about["projected"])
        self.gammas, self.macs = list(about["gammas"]), list(about["macs"])
        self.frozen = bool(about["frozen"])
        if self.frozen:
            self.freeze()

    def _terms(self, x: Tensor, y: Tensor, beta_scale: float) -> ObjectiveTerms:
        assert self.objective is not None
        return self.objective.terms(x, y, masks=self.masks, beta_scale=beta_scale)

    def _gradient_step(self, step: int) -> dict[str, Tensor]:
        """`m - eta * dJ/dm` behind the clipped gradient, on the CPU; the gradients are used up."""
        masks = {n: self.masks.channels[n] for n in self.shrinker.names}
        masks |= {block_key(n): self.masks.blocks[n] for n in self.shrinker.costs.blocks}
        for name, pace in self.shrinker.pace.items():
            gradient = masks[name].grad
            if gradient is not None:
                gradient.div_(pace)
        clip_gradients(masks.values(), self.config.clip_norm, step, "masks' gradient")
        moved = {}
        for name, mask in masks.items():
            change = 0.0 if mask.grad is None else self.config.mask_lr * mask.grad
            moved[name] = (mask.detach() - change).cpu().reshape(-1)
        for mask in self.masks.parameters():
            mask.grad = None
        return moved

    def _write(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            if name.startswith(BLOCK):
                self.masks.blocks[name[len(BLOCK):]].data.copy_(value.reshape(()))
            else:
                self.masks.set(name, value)


def _channels(masks: SoftMasks) -> dict[str, Tensor]:
    """Group name -> `[C]` mask on the CPU, of the groups whose masks can be folded."""
    return {n: m.detach().cpu().clone() for n, m in masks.channels.items()
            if n not in masks.normalised}


def _why_none(masks: SoftMasks, left_out: dict[str, str]) -> str:
    """What keeps groups and blocks from carrying a mask, where it is known."""
    told = [f"a layer normalises over the channels of {name}" for name in masks.normalised]
    told += [f"of block {name}, {why}" for name, why in left_out.items()]
    return f" ({'; '.join(told[:2])})" if told else ""
