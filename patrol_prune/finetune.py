"""Training with the privacy terms kept on: before pruning, after it, and resumed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from patrol_prune.errors import CheckpointError, InputError, TrainingError
from patrol_prune.evaluation import accuracy, recalibrate_batchnorm
from patrol_prune.objective import ObjectiveTerms, PatrolObjective
from patrol_prune.precision import PRECISIONS, autocast
from patrol_prune.split import Split
from patrol_prune.storage import load_state, newest_whole, save_state
from patrol_prune.training_state import pack_state, unpack_state

__all__ = [
    "FinetuneConfig",
    "FinetuneResult",
    "accuracy",
    "finetune",
    "learning_rate",
    "recalibrate_batchnorm",
]

log = logging.getLogger(__name__)


class TrainBatches(Protocol):
    """Anything with a length that yields `(x, y)`; `set_epoch` is called where it exists."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of one training stage.

    Attributes:
        epochs: passes over the data.
        lr: peak learning rate of SGD with momentum; rises linearly, then falls as a cosine.
        momentum: of SGD.
        weight_decay: of SGD.
        warmup: share of all steps over which the learning rate rises.
        beta_warmup: share of all steps over which the adversarial weight rises from 0.
        clip_norm: largest gradient norm.
        distill_weight: share of the task loss that is distillation from the teacher, in [0, 1].
        distill_temperature: of the distillation.
        inner_steps: surrogate steps for each step of the model.
        surrogate_warmup_steps: steps of the surrogates alone before the first epoch.
        precision: "auto", "fp32" or "bf16".
        seed: recorded with the run; the batches carry their own.
    """

    epochs: int = 10
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    beta_warmup: float = 0.1
    clip_norm: float = 5.0
    distill_weight: float = 0.7
    distill_temperature: float = 4.0
    inner_steps: int = 2
    surrogate_warmup_steps: int = 100
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        positive = {"lr": self.lr, "clip_norm": self.clip_norm,
                    "distill_temperature": self.distill_temperature}
        bad = [name for name, value in positive.items() if not value > 0]
        shares = {"warmup": self.warmup, "beta_warmup": self.beta_warmup,
                  "distill_weight": self.distill_weight, "momentum": self.momentum}
        bad += [name for name, value in shares.items() if not 0 <= value <= 1]
        counts = {"epochs": self.epochs, "inner_steps": self.inner_steps,
                  "surrogate_warmup_steps": self.surrogate_warmup_steps,
                  "weight_decay": self.weight_decay}
        bad += [name for name, value in counts.items() if not value >= 0]
        bad += [] if self.precision in PRECISIONS else ["precision"]
        if bad:
            raise InputError(
                f"FinetuneConfig: out of range: {', '.join(bad)}. Rates are positive, shares lie "
                f"in [0, 1], counts are at least 0, precision is one of {PRECISIONS}."
            )


@dataclass
class FinetuneResult:
    """What training did: one flat record per epoch, and the epoch it resumed from, if it did."""

    history: list[dict[str, float]] = field(default_factory=list)
    resumed_from: int = 0
    optimizer: torch.optim.Optimizer | None = None


class _Step(nn.Module):
    """One forward of everything trainable, as a module, so that DDP can wrap it."""

    def __init__(self, model: nn.Module, forward: Callable[..., ObjectiveTerms]) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, x: Tensor, y: Tensor, beta_scale: float) -> ObjectiveTerms:
        return self._forward(x, y, beta_scale)


def finetune(
    split: Split | nn.Module,
    train_batches: TrainBatches,
    *,
    objective: PatrolObjective | None = None,
    config: FinetuneConfig | None = None,
    val_batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    teacher: nn.Module | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    device: str | torch.device = "cpu",
) -> FinetuneResult:
    """Train the whole model, with the objective's privacy terms where one is given.

    Without an objective the loss is cross-entropy. With a teacher,
    `(1 - w) * task + w * T^2 * KL(teacher || model)` at temperature `T` takes the task's place.
    The model is trained in place and left in the mode it came in.

    Under `accelerate launch` every process trains on its own batches, gradients are averaged, and
    each process keeps its own surrogates.

    Args:
        split: the cut model, or, without an objective, any model.
        train_batches: batches `(x, y)` in model-input space.
        objective: task, Lipschitz and adversarial terms; terms of a subclass may carry one more,
            `penalty`, which is recorded with them.
        config: see `FinetuneConfig`.
        val_batches: accuracy is measured on them after each epoch.
        teacher: the dense model, never trained here.
        checkpoint_dir: one checkpoint per epoch is written there, whole or not at all.
        resume: go on from the newest whole checkpoint in `checkpoint_dir`.
        progress: show a bar.
        device: where to train.

    Raises:
        TrainingError: a loss that is NaN or infinite, with the step and the term.
        InputError: no batch, labels outside the classes, a privacy objective without its split.
    """
    config = config or FinetuneConfig()
    model = split.model if isinstance(split, Split) else split
    if len(train_batches) == 0:
        raise InputError("Expected at least one batch to train on, came none.")
    if objective is not None and objective.split.model is not model:
        raise InputError("The objective watches another model than the one to train; build it "
                         "on the same Split.")
    trainer = _Trainer(model, objective, config, teacher, torch.device(device), len(train_batches))
    directory = None if checkpoint_dir is None else Path(checkpoint_dir)
    result = FinetuneResult(optimizer=trainer.optimizer)
    modes = [(module, module.training) for module in model.modules()]
    try:
        if resume and directory is not None:
            _resume(trainer, result, directory)
        if result.resumed_from == 0:
            trainer.warm_up_surrogates(train_batches)
        for epoch in range(result.resumed_from, config.epochs):
            record = trainer.train_epoch(epoch, train_batches, progress)
            if val_batches is not None:
                record["accuracy"] = accuracy(model, val_batches, device=device)
            result.history.append(record)
            log.info("epoch %d: %s", epoch + 1, record)
            if directory is not None and trainer.accelerator.is_main_process:
                _save(trainer, result, directory, epoch + 1)
    finally:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for module, mode in modes:
            module.training = mode
    return result


class _Trainer:
    """State of a training stage; `finetune` drives it."""

    def __init__(
        self,
        model: nn.Module,
        objective: PatrolObjective | None,
        config: FinetuneConfig,
        teacher: nn.Module | None,
        device: torch.device,
        batches: int,
    ) -> None:
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        self.model, self.objective, self.config, self.teacher = model, objective, config, teacher
        self.device = device if self.accelerator.num_processes == 1 else self.accelerator.device
        model.to(self.device)
        if self.device.type == "cpu":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if teacher is not None:
            teacher.to(self.device).eval()
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise InputError("Expected parameters to train, but every one has requires_grad=False.")
        self.optimizer = torch.optim.SGD(
            trainable, lr=config.lr, momentum=config.momentum,
            weight_decay=config.weight_decay, nesterov=config.momentum > 0,
        )
        self.step_module = _Step(model, self._terms)
        if self.accelerator.num_processes > 1:
            self.step_module = self.accelerator.prepare(self.step_module)
        self.batches = batches
        self.replay: tuple[Tensor, Tensor] | None = None

    def warm_up_surrogates(self, batches: TrainBatches) -> None:
        """Let the attackers inside catch up with the edge as it is."""
        if self.objective is not None and self.objective.beta > 0:
            steps = self.config.surrogate_warmup_steps
            if steps:
                self.objective.fit_surrogates(batches, steps)

    def train_epoch(self, epoch: int, batches: TrainBatches, progress: bool) -> dict[str, float]:
        """One pass; returns the mean of every term."""
        set_epoch = getattr(batches, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        self.model.train()
        sums: dict[str, float] = {}
        count = 0
        hidden = not progress or not self.accelerator.is_main_process
        bar = tqdm(batches, desc=f"epoch {epoch + 1}/{self.config.epochs}", disable=hidden,
                   leave=False)
        for index, (x, y) in enumerate(bar):
            values = self._train_step(epoch * self.batches + index, x.to(self.device),
                                      y.to(self.device))
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value * len(x)
            count += len(x)
            bar.set_postfix({k: f"{v / count:.4f}" for k, v in sums.items()}, refresh=False)
        return {"epoch": epoch + 1, **{name: total / count for name, total in sums.items()}}

    def _train_step(self, step: int, x: Tensor, y: Tensor) -> dict[str, float]:
        total_steps = self.batches * self.config.epochs
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, total_steps, self.config)
        scale = min(1.0, (step + 1) / max(1.0, self.config.beta_warmup * total_steps))
        terms = self.step_module(x, y, scale)
        loss = terms.total
        values = {"task": terms.task, "lipschitz": terms.lipschitz,
                  "adversarial": terms.adversarial, "penalty": getattr(terms, "penalty", None)}
        if self.teacher is not None and self.config.distill_weight > 0:
            distilled = self._distillation(x, terms.logits)
            weight = self.config.distill_weight
            loss = loss + weight * (distilled - terms.task)
            values["distillation"] = distilled
        self._refuse_nonfinite(step, {**values, "total": loss})
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        if self.objective is not None and self.objective.beta > 0:
            self._inner_steps(terms.z.detach(), x)
        return {k: float(v.detach()) for k, v in values.items() if v is not None}

    def _inner_steps(self, z: Tensor, x: Tensor) -> None:
        """The first inner step is on this batch, the others on the one before."""
        assert self.objective is not None
        pixels = self.objective.normalization.to_pixels(x)
        self.objective.surrogates.observe(z, pixels)
        for number in range(self.config.inner_steps):
            use = (z, x) if number == 0 or self.replay is None else self.replay
            self.objective.update_surrogates(*use)
        self.replay = (z, x)

    def _terms(self, x: Tensor, y: Tensor, beta_scale: float) -> ObjectiveTerms:
        if self.objective is not None:
            return self.objective.terms(x, y, beta_scale=beta_scale)
        with autocast(self.device, self.config.precision):
            logits = self.model(x)
        logits = logits.float()
        _check_targets(logits, y)
        task = F.cross_entropy(logits, y)
        return ObjectiveTerms(task, None, None, task, None, logits, logits)

    def _distillation(self, x: Tensor, logits: Tensor) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad(), autocast(self.device, self.config.precision):
            target = self.teacher(x).float()
        temperature = self.config.distill_temperature
        return temperature**2 * F.kl_div(
            F.log_softmax(logits / temperature, 1),
            F.log_softmax(target / temperature, 1),
            log_target=True,
            reduction="batchmean",
        )

    def _refuse_nonfinite(self, step: int, values: dict[str, Tensor | None]) -> None:
        for name, value in values.items():
            if value is not None and not math.isfinite(float(value.detach())):
                raise TrainingError(
                    f"The {name} term became {float(value.detach())} at step {step}. The last "
                    "checkpoint is kept. Lower the learning rate, beta or alpha, or check the data "
                    "for NaN, then resume.",
                    step=step,
                    term=name,
                )


def learning_rate(step: int, total_steps: int, config: FinetuneConfig) -> float:
    """Linear rise over `warmup`, then a cosine to zero; a function of the step alone."""
    rise = config.warmup * total_steps
    if step < rise:
        return config.lr * (step + 1) / (rise + 1)
    progress = (step - rise) / max(1.0, total_steps - rise)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def _check_targets(logits: Tensor, y: Tensor) -> None:
    if logits.dim() == 2 and not y.is_floating_point() and int(y.max()) >= logits.shape[1]:
        raise InputError(
            f"Labels must lie in 0..{logits.shape[1] - 1}, as the model has {logits.shape[1]} "
            f"outputs; came {int(y.max())}. Give the model as many outputs as there are classes."
        )


def _save(trainer: _Trainer, result: FinetuneResult, directory: Path, epoch: int) -> None:
    surrogates = None
    if trainer.objective is not None and trainer.objective.beta > 0:
        surrogates = trainer.objective.surrogates
    tensors, meta = pack_state(trainer.model, trainer.optimizer, surrogates)
    if trainer.objective is not None:
        tensors.update(trainer.objective.state())
    if trainer.replay is not None:
        tensors["replay.z"], tensors["replay.x"] = trainer.replay
    meta.update(epoch=epoch, history=result.history, config=asdict(trainer.config))
    directory.mkdir(parents=True, exist_ok=True)
    save_state(directory / f"epoch-{epoch:04d}", tensors, meta)


def _resume(trainer: _Trainer, result: FinetuneResult, directory: Path) -> None:
    newest = newest_whole(directory) if directory.is_dir() else None
    if newest is None:
        return
    tensors, meta = load_state(newest)
    theirs: dict[str, Any] = meta["config"]
    mine = asdict(trainer.config)
    changed = [k for k in mine if mine[k] != theirs.get(k)]
    if changed:
        raise CheckpointError(
            f"The checkpoint {newest} was written with other settings ({', '.join(changed)}). "
            "Resume with the same settings, or start in another directory.",
            path=str(newest),
        )
    surrogates = None
    if trainer.objective is not None and trainer.objective.beta > 0:
        surrogates = trainer.objective.surrogates
    unpack_state(tensors, meta, trainer.model, trainer.optimizer, surrogates, str(newest))
    if trainer.objective is not None:
        trainer.objective.load_state(tensors, str(newest))
    if "replay.z" in tensors:
        trainer.replay = (tensors["replay.z"].to(trainer.device),
                          tensors["replay.x"].to(trainer.device))
    result.history = list(meta["history"])
    result.resumed_from = int(meta["epoch"])
    log.info("resumed from %s", newest)
