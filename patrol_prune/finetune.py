"""Training with the privacy terms kept on: before pruning, after it, and resumed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

from patrol_prune.cost import home_of
from patrol_prune.errors import CheckpointError, InputError, warn_caller
from patrol_prune.evaluation import accuracy, check_validation, recalibrate_batchnorm, try_out
from patrol_prune.finetune_config import FinetuneConfig, learning_rate
from patrol_prune.given import (
    check_full_precision,
    check_kind,
    check_model,
    check_objective,
    check_rereadable,
)
from patrol_prune.image_pool import ImagePool, TrainBatches
from patrol_prune.objective import PatrolObjective
from patrol_prune.split import Split
from patrol_prune.storage import load_state, newest_whole, save_state
from patrol_prune.trainer import Trainer
from patrol_prune.training_state import pack_draws, pack_state, unpack_draws, unpack_state

__all__ = [
    "FinetuneConfig",
    "FinetuneResult",
    "accuracy",
    "finetune",
    "learning_rate",
    "recalibrate_batchnorm",
]

log = logging.getLogger(__name__)

Drawing = dict[str, dict[str, float]]
"""Of the model's random modules, the numbers on which they depend."""


@dataclass
class FinetuneResult:
    """What training did: one flat record per epoch, and the epoch it resumed from, if it did."""

    history: list[dict[str, float]] = field(default_factory=list)
    resumed_from: int = 0
    optimizer: torch.optim.Optimizer | None = field(default=None, repr=False)


def finetune(
    split: Split | nn.Module,
    train_batches: TrainBatches,
    *,
    objective: PatrolObjective | None = None,
    surrogate_batches: TrainBatches | None = None,
    config: FinetuneConfig | None = None,
    val_batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    teacher: nn.Module | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    device: str | torch.device | None = None,
) -> FinetuneResult:
    """Train the whole model, with the objective's privacy terms where one is given.

    Without an objective the loss is cross-entropy. With a teacher,
    `(1 - w) * task + w * T^2 * KL(teacher || model)` at temperature `T` takes the task's place,
    and the distance of the last features may be added (`FinetuneConfig`). The model
    is trained in place; it and the teacher are left in the mode and the memory layout they came in.

    What has `requires_grad=False` stays as it is. So do the running statistics of norms whose own
    parameters are all frozen, which run in evaluation mode meanwhile, and of norms without any in
    a half, edge or cloud, that is all frozen: a cloud that is deployed already answers as before.

    Under `accelerate launch` every process trains on its own batches, gradients are averaged, and
    each process keeps its own surrogates.

    Args:
        split: the cut model, or, without an objective, any model.
        train_batches: batches `(x, y)` in model-input space, with a length, that can be read again
            for every epoch (a DataLoader, a list, `Batches`); `set_epoch` is called if it exists.
        objective: task, Lipschitz and adversarial terms; terms of a subclass may carry one more,
            `penalty`, a scalar tensor that is recorded with them; `total` alone is trained and
            has to hold it too, weighted. A network of the subclass's own is frozen or in
            evaluation mode, or trained by the subclass with an optimiser that is an attribute
            beside it; a warning tells of one that seems to be trained by nobody.
        surrogate_batches: other images for the surrogates' inner steps, so that they cannot
            memorise those on which they are asked; the edge runs once more for each. Without
            them they learn from the model's own batch and the one before.
        config: see `FinetuneConfig`.
        val_batches: accuracy is measured on them after each epoch, so they can be read again too.
        teacher: the dense model, never trained here; it shares no parameter with the model.
        checkpoint_dir: one checkpoint per epoch is written there, whole or not at all.
        resume: go on from the newest whole checkpoint in `checkpoint_dir`, from the start where
            there is none; without it, the folder must hold no checkpoint of an earlier training.
        progress: show a bar.
        device: where to train, and where the model then stays; where it is by default.

    Returns:
        `history`, one record per epoch with the means of the loss's terms, and `accuracy` with
        `val_batches`; `resumed_from`, the epochs that were done before (0 from the start); and the
        `optimizer`.

    Raises:
        TrainingError: a loss or a gradient that is NaN or infinite, with the step and the term.
        InputError: no batch, labels outside the classes, a privacy objective without its split, a
            teacher that would be trained along, a task loss with parameters of its own, a
            `penalty` that is no scalar tensor, nothing to train, another precision in `config`
            than in the objective.
        UnsupportedModelError: the model is float16 or bfloat16.
        CheckpointError: `checkpoint_dir` holds an earlier training, and `resume` is not given; or
            what is to be resumed has other settings.
    """
    config = config or FinetuneConfig()
    check_kind(config, "config", FinetuneConfig, "Make one: FinetuneConfig(epochs=10).")
    model = split.model if isinstance(split, Split) else split
    check_training(split, train_batches, objective, teacher)
    trainer = Trainer(split, objective, config, teacher, home_of(model, device), len(train_batches))
    if surrogate_batches is not None:
        trainer.pool = ImagePool(surrogate_batches)
    return drive(trainer, train_batches, val_batches, checkpoint_dir, resume, progress)


def check_training(
    split: Split | nn.Module,
    train_batches: TrainBatches,
    objective: PatrolObjective | None,
    teacher: nn.Module | None,
) -> None:
    """Refuse what cannot be trained together, warn of what nobody trains, read a split again: it
    may have been pruned.

    Raises:
        InputError, UnsupportedModelError: see `finetune`.
    """
    model = split.model if isinstance(split, Split) else split
    check_model(model, "split")
    check_full_precision(model, split.example_inputs if isinstance(split, Split) else None)
    check_rereadable(train_batches, "train_batches")
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise InputError(f"Expected buffers without NaN, came {name} with some. A defence has "
                             "to be applied with calibration=, or a saved state loaded.")
    if teacher is not None:
        check_model(teacher, "teacher")
        own = {id(p) for p in model.parameters()}
        shared = [name for name, p in teacher.named_parameters() if id(p) in own]
        if shared:
            raise InputError(
                f"Expected a teacher of its own, came one that shares {len(shared)} parameters "
                f"with the model to train ({shared[0]} is the first) and would change with it. "
                "Give a copy: teacher=copy.deepcopy(model)."
            )
    if objective is not None:
        check_objective(objective)
    if objective is not None and objective.split.model is not model:
        raise InputError("The objective watches another model than the one to train; build it "
                         "on the same Split.")
    if objective is not None and isinstance(split, Split) and objective.split.at != split.at:
        raise InputError(
            f"The objective watches the upload after {objective.split.at!r}, but the split is cut "
            f"after {split.at!r}. Build it on the same Split."
        )
    if objective is not None:
        _refuse_unlearnt_loss(model, objective)
        _warn_of_unlearnt_nets(model, objective, teacher)
    for cut in {id(s): s for s in (split, objective and objective.split)}.values():
        if isinstance(cut, Split):
            cut.refresh()


def _refuse_unlearnt_loss(model: nn.Module, objective: PatrolObjective) -> None:
    """Refuse a task loss with something to learn of its own: the model alone is trained."""
    loss = getattr(objective, "task_loss", None)
    if not isinstance(loss, nn.Module):
        return
    known = {id(p) for p in model.parameters()}
    own = [n for n, p in loss.named_parameters() if p.requires_grad and id(p) not in known]
    if own:
        raise InputError(
            "Expected a task_loss that learns nothing beside the model, came "
            f"{type(loss).__name__} with {len(own)} parameters of its own ({own[0]} is the "
            "first), which would stay as they are. Put that layer into the model, which is "
            "trained and saved, or set requires_grad=False on those alone."
        )


def _warn_of_unlearnt_nets(
    model: nn.Module, objective: PatrolObjective, teacher: nn.Module | None
) -> None:
    """Warn of what else an objective holds with something to learn, and no optimiser beside it.

    Networks in evaluation mode and running averages are not meant to learn.
    """
    held = [(name, part) for name, value in vars(objective).items() if name != "task_loss"
            for part in tree_leaves(value)]
    known = {id(p) for net in (model, teacher) if net is not None for p in net.parameters()}
    known |= {id(p) for o in _optimizers([part for _, part in held])
              for group in o.param_groups for p in group["params"]}
    own: dict[int, str] = {}
    for name, part in held:
        if isinstance(part, nn.Parameter) and part.requires_grad:
            own[id(part)] = name
        elif isinstance(part, nn.Module) and not isinstance(part, AveragedModel):
            own.update({id(p): f"{name}.{path}.{n}".replace("..", ".")
                        for path, inner in part.named_modules() if inner.training
                        for n, p in inner.named_parameters(recurse=False) if p.requires_grad})
    unlearnt = [name for key, name in own.items() if key not in known]
    if unlearnt:
        warn_caller(
            f"{type(objective).__name__} holds {len(unlearnt)} parameters of its own "
            f"({unlearnt[0]} is the first) and no optimiser of them: unless terms() trains them "
            "all the same, they stay as they are. Set requires_grad=False or eval() on those that "
            "are to stay; train the others in terms(), by an optimiser of their own that is an "
            "attribute of the objective too."
        )


def _optimizers(parts: list[Any]) -> list[torch.optim.Optimizer]:
    """Those among an objective's attributes, and among what these hold, in lists or as they are."""
    inner = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
    helpers = [part for part in parts if hasattr(part, "__dict__") and not isinstance(part, type)]
    beside = [leaf for holder in (*inner, *helpers) for leaf in tree_leaves(vars(holder))]
    return [part for part in (*parts, *beside) if isinstance(part, torch.optim.Optimizer)]


def drive(
    trainer: Trainer,
    train_batches: TrainBatches,
    val_batches: Iterable[tuple[Tensor, Tensor]] | None,
    checkpoint_dir: str | Path | None,
    resume: bool,
    progress: bool,
) -> FinetuneResult:
    """Run a trainer's epochs with its checkpoints; arguments and result as in `finetune`."""
    check_validation(val_batches)
    model = trainer.model
    drawing = _drawing(model)  # as it came: a module may count what it sends
    directory = None if checkpoint_dir is None else Path(checkpoint_dir)
    if directory is not None and not resume:
        _refuse_earlier(directory)
    result = FinetuneResult(optimizer=trainer.optimizer)
    loaders = _loaders(trainer, train_batches)
    nets = [model] if trainer.teacher is None else [model, trainer.teacher]
    modes = [(module, module.training) for net in nets for module in net.modules()]
    try:
        trainer.open()
        if resume and directory is not None:
            _resume(trainer, result, directory, drawing, loaders)
        if result.resumed_from < trainer.config.epochs:
            try_out(model, val_batches, trainer.device)
        if result.resumed_from == 0:
            trainer.warm_up_surrogates(train_batches)
        for epoch in range(result.resumed_from, trainer.config.epochs):
            if trainer.pool is not None:
                trainer.pool.restart(epoch)
            record = trainer.train_epoch(epoch, train_batches, progress)
            if val_batches is not None:
                record["accuracy"] = accuracy(model, val_batches, device=trainer.device)
            result.history.append(record)
            log.info("epoch %d: %s", epoch + 1, record)
            if directory is not None and trainer.is_main:
                _save(trainer, result, directory, epoch + 1, drawing, loaders)
    finally:
        trainer.close()
        for module, mode in modes:
            module.training = mode
        trainer.optimizer.zero_grad(set_to_none=True)  # a pruner may score by what it finds there
    return result


def _loaders(trainer: Trainer, train_batches: TrainBatches) -> dict[str, TrainBatches]:
    """The batches whose generators a checkpoint keeps: of one process, as several would have to
    agree on theirs."""
    if trainer.accelerator is not None:
        return {}
    pool = {} if trainer.pool is None else {"surrogate_batches": trainer.pool.batches}
    return {"train_batches": train_batches, **pool}


def _save(trainer: Trainer, result: FinetuneResult, directory: Path, epoch: int,
          drawing: Drawing, loaders: dict[str, TrainBatches]) -> None:
    surrogates = None
    if trainer.objective is not None and trainer.objective.beta > 0:
        surrogates = trainer.objective.surrogates
    more, about = trainer.extra_state()
    tensors, meta = pack_state(trainer.model, trainer.optimizer, surrogates)
    if trainer.objective is not None:
        tensors.update(trainer.objective.state())
    if trainer.replay is not None:
        tensors["replay.z"], tensors["replay.x"] = trainer.replay
    tensors.update(more)
    tensors.update(pack_draws(trainer.device, loaders))
    meta.update(about, epoch=epoch, history=result.history, config=asdict(trainer.config),
                **_circumstances(trainer, _steady(drawing, trainer.model)))
    directory.mkdir(parents=True, exist_ok=True)
    save_state(directory / f"epoch-{epoch:04d}", tensors, meta)


def _circumstances(trainer: Trainer, drawing: Drawing) -> dict[str, Any]:
    """What else has to be the same for a training to go on, as JSON."""
    objective = trainer.objective
    return {
        "batches": trainer.batches, "teacher": trainer.distiller is not None,
        "surrogate_batches": trainer.pool is not None, "precision": trainer.precision,
        "drawing": drawing, "trained": _trained(trainer),
        "objective": None if objective is None else objective.settings(),
    }


def _trained(trainer: Trainer) -> dict[str, bool]:
    """Of every parameter, in order, whether it learns."""
    learns = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    return {name: id(p) in learns for name, p in trainer.model.named_parameters()}


def _steady(drawing: Drawing, model: nn.Module) -> Drawing:
    """Those of the numbers that training has left as they were: others count what happens."""
    now = _drawing(model)
    return {name: {k: v for k, v in values.items() if now.get(name, {}).get(k) == v}
            for name, values in drawing.items()}


_TOLD = {"batches": "batches in an epoch", "teacher": "a teacher or none",
         "surrogate_batches": "surrogate_batches or none", "precision": "precision"}
"""What a refusal calls each of `_circumstances`; what a checkpoint lacks is not compared."""


def _drawing(model: nn.Module) -> Drawing:
    """The numbers on which the model's random modules depend: dropout's `p`, a noise's scale."""
    return {name: {k: float(v) for k, v in vars(module).items()
                   if isinstance(v, int | float) and not k.startswith("_") and k != "training"}
            for name, module in model.named_modules() if isinstance(module, _DropoutNd)
            or any(isinstance(v, torch.Generator) for v in vars(module).values())}


def _refuse_earlier(directory: Path) -> None:
    """Refuse a folder with an earlier training: a resume would take its epochs for this one's."""
    epochs = sorted(entry.name for entry in directory.glob("epoch-*"))
    if epochs:
        raise CheckpointError(
            f"Expected a checkpoint_dir without an earlier training, came {directory} with "
            f"{epochs[-1]}. Give resume=True to go on from there, or another directory; remove "
            "the folder if that training is no longer wanted.", path=str(directory),
        )


def _resume(trainer: Trainer, result: FinetuneResult, directory: Path, drawing: Drawing,
            loaders: dict[str, TrainBatches]) -> None:
    newest = newest_whole(directory) if directory.is_dir() else None
    if newest is None:
        return
    tensors, meta = load_state(newest)
    theirs: dict[str, Any] = meta["config"]
    mine = asdict(trainer.config)
    changed = [k for k in mine if mine[k] != theirs.get(k)]
    if "batches" in meta:  # written by this release
        now = _circumstances(trainer, drawing)
        changed += [told for name, told in _TOLD.items() if now[name] != meta.get(name, now[name])]
        changed += ["dropout or noise in the model"] * any(
            now["drawing"].get(name, {}).get(k, v) != v
            for name, values in meta.get("drawing", {}).items() for k, v in values.items())
        here, there = now["trained"], meta.get("trained", {})  # other names: another model
        changed += ["the parameters that are trained"] * (
            [item for item in here.items() if item[0] in there]
            != [item for item in there.items() if item[0] in here])
        old, new = (about["objective"] or {} for about in (meta, now))
        changed += ["objective"] * (bool(old) != bool(new))
        changed += [f"the objective's {k}" for k in old if k in new and old[k] != new[k]]
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
    trainer.load_extra(tensors, meta, str(newest))
    if trainer.is_main:  # the checkpoint is of the main process; others draw on
        unpack_draws(tensors, trainer.device, loaders)
    result.history = list(meta["history"])
    result.resumed_from = int(meta["epoch"])
    log.info("resumed from %s", newest)
