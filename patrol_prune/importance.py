"""PATROL's score of a channel: what its removal does to the whole objective.

    I_s = dL_task + lip_weight * dL_lip - adv_weight * dL_adv,      higher = keep,

where `dL_t = L_t(m_s = 0) - L_t(m_s = 1)`, predicted from the gradient `g = dL_t/dm_s` at the
present mask `m`, and every term is divided by its mean absolute value over all structures first
(docs/method.md, choice 2). The privacy terms are predicted to first order, `-g m`, and keep their
sign: a channel whose removal raises `L_adv`, because it helps the attacker, loses score; one whose
removal would help him gains. A trained model sits near a minimum of its task loss, where `g` says
little; the task term therefore takes the curvature as well, from every image's own gradient `g_i`:

    dL_task = -g m + mean_i (g_i m)^2 / 2

with the empirical Fisher information in the place of the second derivative.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from patrol_prune._tp import Importance
from patrol_prune.errors import InputError, nearest, warn_caller
from patrol_prune.given import (
    check_full_precision,
    check_number,
    check_objective,
    input_and_target,
    warn_if_unfitted,
)
from patrol_prune.masks import SoftMasks
from patrol_prune.predicted_change import (
    IGNORED,
    are_classes,
    counted_labels,
    first_order_change,
    second_order_change,
)
from patrol_prune.prunable import check_prunable, in_mode
from patrol_prune.survivors import SurvivorTracker

if TYPE_CHECKING:
    from patrol_prune.objective import ObjectiveTerms, PatrolObjective

logger = logging.getLogger(__name__)

TERMS = ("task", "lipschitz", "adversarial")
TaskChange = Literal["second_order", "absolute"]


def combine_terms(
    task: Tensor, lipschitz: Tensor, adversarial: Tensor, *,
    task_weight: float = 1.0, lip_weight: float = 1.0, adv_weight: float = 1.0,
) -> Tensor:
    """`task_weight * dL_task + lip_weight * dL_lip - adv_weight * dL_adv`, elementwise."""
    return task_weight * task + lip_weight * lipschitz - adv_weight * adversarial


class PatrolImportance(Importance):  # type: ignore[misc]
    """Scores channels for any Torch-Pruning pruner, from calibration batches.

    `I_s = task_weight dL_task + lip_weight dL_lip - adv_weight dL_adv`, higher is to be kept, with
    `dL_t` the change of a term on removal of the channel as its gradients predict it, scaled as
    `normalizer` says. `GroupPatrolImportance` is another name of this class.

    A `penalty` among the terms of an objective of one's own is not scored; a warning says so.

    Args:
        objective: gives the terms; its split says what is edge. Its surrogates should have been
            fitted to the model before (`objective.fit_surrogates`).
        task_weight: weight of the task term.
        lip_weight: weight of the Lipschitz term.
        adv_weight: weight of the adversarial term.
        task_change: how the task term is predicted: "second_order"; or "absolute", `|g m|`, which
            ranks channels worse (docs/method.md).
        normalizer: how a term is scaled over all structures of the edge before it is weighted:
            "mean", "sum" or "max" of its absolute values, or None for raw values. Torch-Pruning's
            names; its per-group normalisation would make groups incomparable. "objective" scales
            as the objective itself weighs: the adversarial term times `beta`, no other.
        training: run the model in training mode (running statistics are put back).
        blocks: score the edge's removable residual blocks too, see `block_scores`.

    Raises:
        InputError: an unknown `task_change` or `normalizer`, a negative weight.
        UnsupportedModelError: the model cannot be pruned, see `PatrolPruner`.

    Example::

        importance = PatrolImportance(objective)
        for x, y in calibration:
            importance.accumulate(x, y)
        tp.pruner.BasePruner(model, example_inputs, importance, ...).step()
    """

    def __init__(
        self,
        objective: PatrolObjective,
        *,
        task_weight: float = 1.0, lip_weight: float = 1.0, adv_weight: float = 1.0,
        task_change: TaskChange = "second_order",
        normalizer: str | None = "mean",
        training: bool = False,
        blocks: bool = False,
    ) -> None:
        check_objective(objective)
        check_prunable(objective.split.model)
        for name, weight in (("task_weight", task_weight), ("lip_weight", lip_weight),
                             ("adv_weight", adv_weight)):
            check_number(weight, name)
        if normalizer not in (*_NORMALIZERS, "objective"):
            names = [*(n for n in _NORMALIZERS if n), "objective"]
            raise InputError(
                f"Expected normalizer to be one of {', '.join(names)} or None, came "
                f"{normalizer!r}. {nearest(str(normalizer), names)}"
            )
        if task_change not in get_args(TaskChange):
            raise InputError(
                f"Expected task_change out of {', '.join(get_args(TaskChange))}, came "
                f"{task_change!r}."
            )
        self.objective = objective
        self.task_weight, self.lip_weight = task_weight, lip_weight
        self.adv_weight, self.normalizer, self.training = adv_weight, normalizer, training
        self.task_change = task_change
        self.blocks = blocks
        self._told = False
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget all calibration batches and the masks."""
        self._masks: SoftMasks | None = None
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._block_sums: dict[str, dict[str, Tensor]] = {}
        self._batches = 0
        self._weight = 0.0  # of all batches, that of the first being 1
        self._first_size = 1
        self._stale: str | None = None
        self._scores: dict[str, Tensor] | None = None
        self._tracker: SurvivorTracker | None = None
        self._classes: int | None = None

    def mark_stale(self, reason: str) -> None:
        """Refuse to score from here on, until new batches are accumulated."""
        self._stale = reason

    @property
    def masks(self) -> SoftMasks:
        """The masks the gradients are taken at, over the whole model; made when first needed."""
        if self._masks is None:
            split = self.objective.split
            split.refresh()  # another pruner may have been at work
            self._masks = SoftMasks(
                split.model, split.example_inputs, split=split, boundary="prune", scope="model",
                blocks=self.blocks,
            )
            self._tracker = SurvivorTracker(self._masks.table)
        return self._masks

    def accumulate(self, x: Tensor, y: Tensor) -> ObjectiveTerms:
        """Add one calibration batch; the parameters' `.grad` and the model's mode stay.

        Args:
            x: model input `[B, ...]`.
            y: labels, as the task loss takes them; it is taken to be a mean over images.

        Returns:
            the objective's terms for this batch, as `PatrolObjective.terms` does.

        Raises:
            InputError: an empty batch, labels outside the model's classes, or a term that is NaN
                or infinite.
            UnsupportedModelError: the model is float16, or bfloat16 with a Lipschitz term.
        """
        x, y = input_and_target((x, y))
        exact = getattr(self.objective, "uses_lipschitz", False)  # takes small differences
        split = self.objective.split
        check_full_precision(split.model, split.example_inputs,
                             but=() if exact else (torch.bfloat16,))
        if not isinstance(y, Tensor) or min(x.dim(), y.dim()) < 1:
            raise InputError(
                "Expected x and y as tensors [B, ...], came targets of type "
                f"{type(y).__name__}. Give torch.as_tensor(y), or where they are several tensors "
                "pack these into one that the task loss takes apart."
            )
        if len(x) == 0 or len(x) != len(y):
            raise InputError(
                f"Expected one label per input and at least one, came {len(x)} inputs and "
                f"{len(y)} labels."
            )
        if self._stale is not None or (self._masks and not self._masks.table.is_current()):
            logger.info("The model was pruned since the last calibration batch; starting over.")
            self.zero_grad()
        device = next(self.objective.split.model.parameters()).device
        x, y = x.to(device), y.to(device)
        masks = self.masks
        self._check_labels(y)
        if self.adv_weight > 0:
            warn_if_unfitted(self.objective)
        mode = in_mode(self.objective.split.model, self.training, self._batches)
        with mode, torch.enable_grad():
            with masks.per_image(len(x)) as copies:
                terms = self.objective.terms(x, y, masks=masks)
                shares = self._gradients(terms, copies)
        if getattr(terms, "penalty", None) is not None and not self._told:
            self._told = True
            warn_caller("The objective's penalty is left out of the scores, which know the terms "
                        f"{', '.join(TERMS)}. Add it to the terms' task too where it should count.")
        if self._batches == 0:
            self._first_size = len(x)
        weight, counted = len(x) / self._first_size, counted_labels(y)
        for term, values in shares.items():
            changes = [self._change(term, g, m.detach(), counted) * weight
                       for g, m in zip(values, masks.parameters(), strict=True)]
            _add(self._sums.setdefault(term, {}), masks.channels, changes)
            _add(self._block_sums.setdefault(term, {}), masks.blocks,
                 changes[len(masks.channels):])
        self._batches += 1
        self._weight += weight
        self._scores = None
        return terms

    def __call__(self, group: Any) -> Tensor | None:
        """Torch-Pruning's contract: one score per channel of the group's root, higher = keep.

        Works on the graph of any pruner of this model, also between the steps of an iterative
        one: the surviving channels keep the scores they were given.

        Returns:
            `[len(group[0].idxs)]`, or None for a group that has no score.

        Raises:
            InputError: nothing was accumulated, or the model was changed by something else.
        """
        scores = self.scores
        if self._stale is not None:
            raise InputError(
                f"The scores are stale: {self._stale}. Call accumulate() on new batches first."
            )
        assert self._tracker is not None
        located = self._tracker.locate(group)
        if located is None or located[0] not in scores:
            return None
        name, roots = located
        return scores[name][roots.to(scores[name].device)]

    @property
    def scores(self) -> dict[str, Tensor]:
        """Group name -> `[C]` scores at the widths of the calibration.

        Raises:
            InputError: nothing was accumulated.
        """
        if self._scores is None:
            self._scores = self._combined(self.terms)
        return self._scores

    @property
    def block_scores(self) -> dict[str, float]:
        """Block name -> score, by the same formula and over the same scales as the channels'.

        Raises:
            InputError: nothing was accumulated, or not with `blocks=True`, or the scores are stale.
        """
        if not self.blocks:
            raise InputError("Expected an importance that scores blocks: make it with "
                             "PatrolImportance(objective, blocks=True) and accumulate again.")
        if self._stale is not None:
            raise InputError(
                f"The scores are stale: {self._stale}. Call accumulate() on new batches first."
            )
        raw, over, terms = self.raw, self._edge_groups(), {}
        blocks = self.masks.blocks
        for term, values in raw.items():
            scale = self._scale(term, values, over)
            sums = self._block_sums.get(term, {})
            terms[term] = {n: sums.get(n, torch.zeros(())) / self._weight / scale for n in blocks}
        return {name: float(score) for name, score in self._combined(terms).items()}

    def _combined(self, terms: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            name: combine_terms(
                terms["task"][name],
                terms["lipschitz"][name],
                terms["adversarial"][name],
                task_weight=self.task_weight,
                lip_weight=self.lip_weight,
                adv_weight=self.adv_weight,
            )
            for name in terms["task"]
        }

    @property
    def terms(self) -> dict[str, dict[str, Tensor]]:
        """Term -> group name -> `[C]` scaled changes; zeros where a term was not computed.

        Terms are "task", "lipschitz" and "adversarial"; an InputError if nothing was accumulated.
        """
        over, scaled = self._edge_groups(), {}
        for term, values in self.raw.items():
            scale = self._scale(term, values, over)
            scaled[term] = {name: v / scale for name, v in values.items()}
        return scaled

    @property
    def raw(self) -> dict[str, dict[str, Tensor]]:
        """As `terms`, not scaled, the predicted changes on removal as means over images."""
        if self._batches == 0:
            raise InputError(
                "Expected calibration data, came none: call accumulate(x, y) on at least one "
                "batch before the importance is used."
            )
        zero = {n: torch.zeros_like(m.detach()) for n, m in self.masks.channels.items()}
        return {
            term: {n: v / self._weight for n, v in self._sums.get(term, zero).items()}
            for term in TERMS
        }

    def _check_labels(self, y: Tensor) -> None:
        """Class numbers lie inside the model's outputs, before a device-side assert finds out."""
        if not are_classes(y):
            return
        if self._classes is None:
            split = self.objective.split
            with in_mode(split.model, training=False), torch.no_grad():
                logits = split.cloud(split.edge(split.example_inputs[:1]))
            is_vector = isinstance(logits, Tensor) and logits.dim() == 2
            self._classes = logits.shape[1] if is_vector else 0
        valid = y[y != IGNORED]
        low, high = (int(valid.min()), int(valid.max())) if len(valid) else (0, 0)
        if self._classes and (low < 0 or high >= self._classes):
            raise InputError(
                f"Expected labels from 0 to {self._classes - 1}, came {low} to {high}. Give the "
                "model as many outputs as there are classes."
            )

    def _scale(self, term: str, values: Mapping[str, Tensor], over: set[str]) -> float:
        """What a term is divided by; 1 for a term that is 0 on all the groups `over`."""
        if self.normalizer == "objective":
            return 1 / (self.objective.beta or 1.0) if term == "adversarial" else 1.0
        reference = [v for n, v in values.items() if n in over] or list(values.values())
        return float(_NORMALIZERS[self.normalizer](torch.cat(reference))) or 1.0

    def _change(self, term: str, shares: Tensor, mask: Tensor, counted: int) -> Tensor:
        if term != "task":
            return first_order_change(shares.sum(0), mask)
        if self.task_change == "absolute":
            return first_order_change(shares.sum(0), mask).abs()
        return second_order_change(shares, mask, counted)

    def _edge_groups(self) -> set[str]:
        groups = self.masks.table.groups
        return {n for n in self.masks.channels if groups[n].location == "edge"}

    def _gradients(
        self, terms: ObjectiveTerms, masks: list[Tensor]
    ) -> dict[str, list[Tensor]]:
        """Each term's gradient in every image's masks, from the shared forward pass."""
        values = {t: getattr(terms, t) for t in TERMS}
        if self.task_weight and not terms.task.requires_grad:
            raise InputError("Expected a task loss with a gradient, came one without: every score "
                             "would be 0. Leave out detach() and no_grad() in task_loss.")
        present = {t: v for t, v in values.items() if v is not None and v.requires_grad}
        for term, value in values.items():
            if value is not None and not torch.isfinite(value).all():
                raise InputError(
                    f"The {term} term is {float(value.detach())} on this calibration batch. "
                    "Check the batch and the model's weights."
                )
        gradients = {}
        for i, (term, value) in enumerate(present.items()):
            found = torch.autograd.grad(
                value, masks, retain_graph=i + 1 < len(present), allow_unused=True
            )
            gradients[term] = [
                torch.zeros_like(m) if g is None else g.detach()
                for m, g in zip(masks, found, strict=True)
            ]
        return gradients


GroupPatrolImportance = PatrolImportance

_NORMALIZERS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda values: torch.ones(()),
    "mean": lambda values: values.abs().mean(),
    "sum": lambda values: values.abs().sum(),
    "max": lambda values: values.abs().max(),
}


def _add(sums: dict[str, Tensor], names: Iterable[str], changes: Sequence[Tensor]) -> None:
    """Add one batch's predicted changes, as many as there are names."""
    for name, change in zip(names, changes, strict=False):
        sums[name] = sums[name] + change if name in sums else change
