"""Accuracy, and BatchNorm statistics measured anew."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from patrol_prune.cost import evaluating, home_of
from patrol_prune.errors import InputError


@torch.no_grad()
def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: str | torch.device | None = None,
) -> float:
    """Share of the images whose largest logit is the label's, in [0, 1], in full precision.

    `device` is where the model is, by default asked of it.
    """
    device = home_of(model, device)
    with evaluating(model):
        right, count = 0, 0
        for x, y in batches:
            logits = model(x.to(device))
            right += int((logits.argmax(1) == y.to(device)).sum())
            count += len(y)
    if count == 0:
        raise InputError("Expected at least one batch to measure the accuracy on, came none.")
    return right / count


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
    `device` is where the model is, by default asked of it.
    """
    device = home_of(model, device)
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    with evaluating(model):
        for layer in layers:
            if layer.track_running_stats:
                layer.reset_running_stats()
                layer.momentum = None  # cumulative average
                layer.train()
        try:
            for number, (x, _) in enumerate(batches):
                if number == max_batches:
                    break
                model(x.to(device))
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
