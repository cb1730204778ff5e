"""The state of one training stage and its steps; `finetune` and `learn_masks` drive it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.state import is_initialized as accelerate_is_initialized
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from patrol_prune.distillation import Distiller
from patrol_prune.errors import InputError, TrainingError
from patrol_prune.finetune_config import FinetuneConfig, learning_rate
from patrol_prune.given import check_loss_value, check_targets, input_and_target
from patrol_prune.image_pool import ImagePool, TrainBatches, start_epoch
from patrol_prune.lipschitz import frozen_statistics
from patrol_prune.objective import ObjectiveTerms, PatrolObjective
from patrol_prune.precision import (
    autocast,
    channels_last_is_safe,
    channels_last_names,
    restore_layout,
)
from patrol_prune.split import Split

_PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are."""
_NOT_OF_CLASSES = frozenset((
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "multilabel_soft_margin_loss", "MSELoss", "L1Loss",
    "SmoothL1Loss", "HuberLoss", "BCELoss", "BCEWithLogitsLoss", "MultiLabelSoftMarginLoss",
))
"""torch's losses whose answers are no logits of classes that exclude each other."""


class _Step(nn.Module):
    """One forward of everything trainable, as a module, so that DDP can wrap it."""

    def __init__(self, model: nn.Module, forward: Callable[..., ObjectiveTerms]) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, x: Tensor, y: Tensor, beta_scale: float) -> ObjectiveTerms:
        return self._forward(x, y, beta_scale)


class Trainer:
    """State of a training stage; `drive` runs it. A subclass may do more after every step."""

    def __init__(
        self,
        split: Split | nn.Module,
        objective: PatrolObjective | None,
        config: FinetuneConfig,
        teacher: nn.Module | None,
        device: torch.device,
        batches: int,
    ) -> None:
        model = split.model if isinstance(split, Split) else split
        cut = objective.split if objective is not None else split
        self.halves = (cut.edge, cut.cloud) if isinstance(cut, Split) else ()
        self.accelerator = _together(device)
        self.is_main = self.accelerator is None or self.accelerator.is_main_process
        self.model, self.objective, self.config, self.teacher = model, objective, config, teacher
        self.device = device if self.accelerator is None else self.accelerator.device
        self.precision = _agreed(config, objective)
        self._objective_precision = objective.precision if objective is not None else "auto"
        self.distiller: Distiller | None = None
        if teacher is not None and max(config.distill_weight, config.feature_weight) > 0:
            self.distiller = Distiller(
                model, teacher, config.distill_temperature, features=config.feature_weight > 0,
                cloud=None if objective is None else objective.split.cloud,
                answers=config.distill_weight > 0,
            )
            if config.distill_weight > 0 and objective is not None:
                _warn_of_other_answers(objective.task_loss)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        if not self.trainable:
            raise InputError("Expected parameters to train, but every one has requires_grad=False.")
        self.channels_last = channels_last_names(model)
        model.to(self.device)
        if self.device.type == "cpu" and channels_last_is_safe(model):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if teacher is not None:
            teacher.to(self.device)
        self.optimizer = torch.optim.SGD(
            self.trainable, lr=config.lr, momentum=config.momentum,
            weight_decay=config.weight_decay, nesterov=config.momentum > 0,
        )
        self.step_module = _Step(model, self._terms)
        if self.accelerator is not None:
            self.step_module = self.accelerator.prepare(self.step_module)
        self.batches = batches
        self.replay: tuple[Tensor, Tensor] | None = None
        self.pool: ImagePool | None = None

    def open(self) -> None:
        """Put on the models what the steps need; the teacher answers in evaluation mode."""
        if self.teacher is not None:
            self.teacher.eval()
        if self.distiller is not None:
            self.distiller.attach()
        if self.objective is not None:
            self.objective.precision = self.precision

    def close(self) -> None:
        """Take what it put on the models off again, and lay the trained one out as it came."""
        restore_layout(self.model, self.channels_last)
        if self.distiller is not None:
            self.distiller.close()
        if self.objective is not None:
            self.objective.precision = self._objective_precision

    def warm_up_surrogates(self, batches: TrainBatches) -> None:
        """Let the attackers inside catch up with the edge as it is, on the pool if there is one."""
        batches = batches if self.pool is None else self.pool.batches
        if self.objective is not None and self.objective.beta > 0:
            steps = self.config.surrogate_warmup_steps
            if steps:
                start_epoch(batches, 0)
                self.objective.fit_surrogates(batches, steps)

    def train_epoch(self, epoch: int, batches: TrainBatches, progress: bool) -> dict[str, float]:
        """One pass; returns the mean of every term."""
        start_epoch(batches, epoch)
        self.model.train()
        for layer in _settled_norms(self.model, self.halves):
            layer.training = False
        sums: dict[str, float] = {}
        count = 0
        hidden = not progress or not self.is_main
        bar = tqdm(batches, desc=f"epoch {epoch + 1}/{self.config.epochs}", disable=hidden,
                   leave=False)
        for index, batch in enumerate(bar):
            x, y = input_and_target(batch)
            values = self._train_step(epoch * self.batches + index, x.to(self.device),
                                      _moved(y, self.device))
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value * len(x)
            count += len(x)
            bar.set_postfix({k: f"{v / count:.4f}" for k, v in sums.items()}, refresh=False)
        return {"epoch": epoch + 1, **{name: total / count for name, total in sums.items()}}

    def _train_step(self, step: int, x: Tensor, y: Any) -> dict[str, float]:
        total_steps = self.batches * self.config.epochs
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, total_steps, self.config)
        scale = min(1.0, (step + 1) / max(1.0, self.config.beta_warmup * total_steps))
        terms = self.step_module(x, y, scale)
        loss = terms.total
        values = {"task": terms.task, "lipschitz": terms.lipschitz,
                  "adversarial": terms.adversarial, "penalty": getattr(terms, "penalty", None)}
        if self.distiller is not None:
            with autocast(self.device, self.precision):
                distilled, distance = self.distiller(x, terms.logits)
            if distilled is not None:
                loss = loss + self.config.distill_weight * (distilled - terms.task)
                values["distillation"] = distilled
            if distance is not None:
                loss = loss + self.config.feature_weight * distance
                values["features"] = distance
        self._refuse_nonfinite(step, {**values, "total": loss})
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # averaged over processes by what `prepare` put around the step
        clip_gradients(self.trainable, self.config.clip_norm, step, "gradient")
        self.optimizer.step()
        self.after_step(step)
        if self.objective is not None and self.objective.beta > 0:
            self._inner_steps(terms.z.detach(), x)
            every = self.config.renew_every
            if every and (step + 1) % every == 0:
                self.objective.surrogates.renew_weakest()
        return {k: float(v.detach()) for k, v in values.items() if v is not None}

    def after_step(self, step: int) -> None:
        """What a subclass does behind the optimiser's step."""

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a subclass puts into the checkpoint besides: tensors, and JSON."""
        return {}, {}

    def load_extra(self, tensors: dict[str, Tensor], meta: dict[str, Any], path: str) -> None:
        """Put back what `extra_state` gave."""

    def _inner_steps(self, z: Tensor, x: Tensor) -> None:
        """Steps of the surrogates: on the pool's images where there is one.

        Without one, the first step is on this batch and the others on the one before.
        """
        assert self.objective is not None
        self.objective.surrogates.observe(z, self.objective.pixels(x))
        if self.pool is not None:
            edge = self.objective.split.edge
            for _ in range(self.config.inner_steps):
                other = self.pool.next_images().to(self.device)
                with torch.no_grad(), frozen_statistics(edge):
                    with autocast(self.device, self.precision):
                        seen = edge(other).float()
                self.objective.update_surrogates(seen, other)
            return
        for number in range(self.config.inner_steps):
            use = (z, x) if number == 0 or self.replay is None else self.replay
            self.objective.update_surrogates(*use)
        self.replay = (z, x)

    def _terms(self, x: Tensor, y: Tensor, beta_scale: float) -> ObjectiveTerms:
        if self.objective is not None:
            return self.objective.terms(x, y, beta_scale=beta_scale)
        with autocast(self.device, self.precision):
            logits = self.model(x)
        if not isinstance(logits, Tensor):
            raise InputError(
                f"Expected a model that returns logits, came a {type(logits).__name__}. Give an "
                "objective whose task_loss takes that, PatrolObjective(split, task_loss)."
            )
        logits = logits.float()
        check_targets(logits, y)
        task = F.cross_entropy(logits, y)
        return ObjectiveTerms(task, None, None, task, None, logits, logits)

    def _refuse_nonfinite(self, step: int, values: dict[str, Tensor | None]) -> None:
        for name, value in values.items():
            if value is None:
                continue
            check_loss_value(value, f"the objective's {name}")
            if not math.isfinite(float(value.detach())):
                raise TrainingError(
                    f"The {name} term became {float(value.detach())} at step {step}. The last "
                    "checkpoint is kept. Lower the learning rate, beta or alpha, or check the data "
                    "for NaN, then resume.",
                    step=step,
                    term=name,
                )


def _moved(y: Any, device: torch.device) -> Any:
    """Targets on the device: a tensor or what else can be moved, or such in tuples and dicts."""
    return tree_map(lambda part: part.to(device) if hasattr(part, "to") else part, y)


def _warn_of_other_answers(task_loss: Any) -> None:
    """Distillation takes answers for logits of classes, one of which is right."""
    name = getattr(task_loss, "__name__", type(task_loss).__name__)
    if name in _NOT_OF_CLASSES:
        warnings.warn(
            f"The teacher is followed by a softmax over classes, which does not fit {name}. Set "
            "FinetuneConfig(distill_weight=0), and put a distance of your own to the teacher's "
            "answers into the task loss.", stacklevel=3)


def _settled_norms(model: nn.Module, halves: Sequence[nn.Module]) -> list[nn.Module]:
    """Norms with running statistics that stay as they are, as everything that they learn is frozen.

    One without parameters of its own goes by those of the halves that it stands in.
    """
    inside = [(set(half.modules()), list(half.parameters())) for half in halves]
    settled: list[nn.Module] = []
    for layer in model.modules():
        if isinstance(layer, _NormBase) and layer.track_running_stats:
            around = [p for layers, learnt in inside if layer in layers for p in learnt]
            learnt = list(layer.parameters()) or around
            if learnt and not any(p.requires_grad for p in learnt):
                settled.append(layer)
    return settled


def clip_gradients(parameters: Iterable[Tensor], most: float, step: int, term: str) -> None:
    """Shorten the gradients together to a norm of `most`.

    Raises:
        TrainingError: one is NaN or infinite, which would make every parameter NaN. Finite ones
            whose norm alone overflows become 0.
    """
    learnt = list(parameters)
    norm = float(nn.utils.clip_grad_norm_(learnt, most))
    if math.isfinite(norm) or all(p.grad is None or bool(p.grad.isfinite().all()) for p in learnt):
        return
    raise TrainingError(
        f"The {term} became {norm} at step {step}, though the loss is finite; no step was taken "
        "with it. The last checkpoint is kept. Look for a root, a logarithm, a norm or a division "
        "at 0 in the model or the loss, or lower the learning rate, beta or alpha, then resume.",
        step=step,
        term=term,
    )


def _together(device: torch.device) -> Accelerator | None:
    """Accelerate's view of several processes that train together; None of one alone.

    One alone needs nothing of it, and an `Accelerator` that the caller has made or will make keeps
    its own settings: they are the same for all of a process. Every step here is a whole one, so
    that losses are never divided by a number of steps to accumulate.

    Raises:
        InputError: the caller's `Accelerator` scales losses or casts by itself.
    """
    made: dict[str, Any] = {}
    if accelerate_is_initialized():
        if AcceleratorState().num_processes == 1:
            return None
    elif any(int(os.environ.get(name, 1)) > 1 for name in _PROCESSES):
        made = {"cpu": device.type == "cpu", "mixed_precision": "no"}
    else:
        return None
    gradients = GradientState()
    before = dict(gradients.plugin_kwargs)
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1), **made)
    gradients.plugin_kwargs = before
    if accelerator.num_processes == 1:
        return None
    if accelerator.mixed_precision != "no":
        raise InputError(
            "Expected an Accelerator without mixed precision, came one with "
            f"{accelerator.mixed_precision!r}. Give FinetuneConfig(precision=...) instead."
        )
    return accelerator


def _agreed(config: FinetuneConfig, objective: PatrolObjective | None) -> str:
    """The one precision of both; "auto" leaves it to the other."""
    said = {p for p in (config.precision, objective.precision if objective else "auto")
            if p != "auto"}
    if len(said) > 1:
        raise InputError(
            f"Expected one precision, came {config.precision!r} in the config and "
            f"{objective.precision if objective else None!r} in the objective. Leave one at 'auto'."
        )
    return said.pop() if said else "auto"
