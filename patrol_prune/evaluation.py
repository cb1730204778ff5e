"""Accuracy, and BatchNorm statistics measured anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from patrol_prune.cost import draws_restored, evaluating, home_of
from patrol_prune.errors import InputError
from patrol_prune.given import input_and_target
from patrol_prune.training_state import pack_draws, unpack_draws


@torch.no_grad()
def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: str | torch.device | None = None,
) -> float:
    """Share of the labels that are the largest logit's class, in [0, 1], in full precision.

    Logits `[B, K, ...]` and labels `[B, ...]`: of images, or of their pixels. `device` is where the
    model is, by default asked of it.

    Raises:
        InputError: no batch, or answers and targets of another kind.
    """
    device = home_of(model, device)
    with evaluating(model):
        right, count = 0, 0
        for batch in batches:
            x, y = _pair(batch)
            logits = model(x.to(device))
            _check_classes(logits, y)
            right += int((logits.argmax(1) == y.to(device)).sum())
            count += y.numel()
    if count == 0:
        raise InputError("Expected at least one batch to measure the accuracy on, came none.")
    return right / count


def try_out(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]] | None,
            device: torch.device) -> None:
    """See that an accuracy can be measured, on the first batch that is not empty, before any work
    starts. Without batches there is nothing to see.

    Torch's generators, those of the loader and the model, and the batches' `epoch` stand afterwards
    where they stood; what else a dataset draws from does not.

    Raises:
        InputError: as `accuracy`.
    """
    if batches is None:
        return
    loaders = {"batches": batches}
    draws, epoch = pack_draws(device, loaders), getattr(batches, "epoch", None)
    some = (batch for batch in batches if not isinstance(y := _pair(batch)[1], Tensor) or y.numel())
    try:
        with draws_restored(model):
            accuracy(model, itertools.islice(some, 1), device=device)
    finally:
        unpack_draws(draws, device, loaders)
        if isinstance(epoch, int) and callable(back := getattr(batches, "set_epoch", None)):
            back(epoch)


def check_validation(batches: object) -> None:
    """An InputError unless these can be read anew after every epoch, or are None."""
    able = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__") or batches is None
    if isinstance(batches, Iterator) or not able:
        raise InputError("Expected val_batches that can be read again after every epoch (a "
                         f"DataLoader, a list), came {type(batches).__name__}.")


def _pair(batch: Any) -> tuple[Tensor, Any]:
    """The two parts of a batch `(x, y)`; an InputError says what else it is."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Tensor):
        return batch[0], batch[1]
    return input_and_target(batch)


def _check_classes(logits: Any, y: Any) -> None:
    """An InputError unless these are logits of classes, and a label for each."""
    came = [str(tuple(v.shape)) if isinstance(v, Tensor) else f"a {type(v).__name__}"
            for v in (logits, y)]
    tensors = isinstance(logits, Tensor) and isinstance(y, Tensor)
    if (not tensors or logits.dim() < 2 or logits.shape[1] < 2 or y.is_floating_point()
            or y.shape != logits[:, 0].shape):
        raise InputError(
            "Expected logits [B, K, ...] of two classes or more and whole labels [B, ...], to "
            f"measure an accuracy, came {came[0]} and {came[1]}. Measure what counts for the task "
            "yourself; in training, leave val_batches out."
        )


@torch.no_grad()
def recalibrate_batchnorm(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    max_batches: int = 50,
    device: str | torch.device | None = None,
) -> None:
    """Replace BatchNorm's running statistics by the plain average over up to `max_batches`.

    Removal changes what every later layer sees; the stored statistics are of the wider model.
    Where the pass fails, the statistics stay as they were.

    Args:
        model: changed in place; its weights are not, and its mode comes back.
        batches: `(x, y)` as in training; `y` is not looked at.
        max_batches: the most that are read.
        device: where the model is, by default asked of it.

    Raises:
        InputError: no batch.
    """
    device = home_of(model, device)
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)}
              for layer in layers]
    count = 0
    with evaluating(model):
        for layer in layers:
            if layer.track_running_stats:
                layer.reset_running_stats()
                layer.momentum = None  # cumulative average
                layer.train()
        try:
            for x, _ in itertools.islice(batches, max_batches):
                model(x.to(device))
                count += 1
            if count == 0:
                raise InputError(
                    "Expected at least one batch to measure BatchNorm's statistics on, came none. "
                    "Give batches that have not been used up, and max_batches of at least 1."
                )
        except BaseException:
            for layer, buffers in zip(layers, before, strict=True):
                for name, buffer in buffers.items():
                    getattr(layer, name).copy_(buffer)
            raise
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
