"""The six-layer CIFAR-10 CNN that He, Zhang and Lee attacked (ACSAC 2019, IEEE IoT-J 2020)."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patrol_prune.data import Batches
from patrol_prune.precision import autocast

SPLITS = ("conv11", "ReLU22", "ReLU32")
"""Where the published attacks cut it: behind the first convolution, the fourth ReLU, the last."""


def six_layer_cnn(classes: int = 10) -> nn.Sequential:
    """Six 3x3 convolutions with ReLU, a pool behind every second one, two linear layers.

    Input `[N, 3, 32, 32]`; no BatchNorm; a sigmoid between the linear layers, as published.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for stage, width in ((1, 64), (2, 128), (3, 128)):
        for number in (1, 2):
            layers[f"conv{stage}{number}"] = nn.Conv2d(channels, width, 3, padding=1)
            layers[f"ReLU{stage}{number}"] = nn.ReLU()
            channels = width
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(4 * 4 * 128, 512)
    layers["fc1act"] = nn.Sigmoid()
    layers["fc2"] = nn.Linear(512, classes)
    return nn.Sequential(layers)


def train(
    model: nn.Module, batches: Batches, *, epochs: int, lr: float = 1e-3, log: bool = True
) -> None:
    """Adam with a linear rise and a cosine; in place, cross-entropy, bfloat16 where native."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    total, step = epochs * len(batches), 0
    model.train()
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        start, losses = time.perf_counter(), []
        for x, y in batches:
            progress = step / total
            rise = min(1.0, progress / 0.05 + 1e-2)
            optimizer.param_groups[0]["lr"] = lr * rise * 0.5 * (1 + math.cos(math.pi * progress))
            losses.append(train_step(model, optimizer, x, y))
            step += 1
        if log:
            print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f} in "
                  f"{time.perf_counter() - start:.0f} s", flush=True)
    model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> float:
    x = x.contiguous(memory_format=torch.channels_last)
    with autocast(x.device):
        logits = model(x)
    loss = F.cross_entropy(logits.float(), y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


def halves(model: nn.Sequential, at: str) -> tuple[nn.Sequential, nn.Sequential]:
    """`(edge, cloud)`: everything up to and with the layer `at`, and the rest; shared weights."""
    names = [name for name, _ in model.named_children()]
    cut = names.index(at) + 1
    return model[:cut], model[cut:]


def accuracy_of(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of images whose largest logit is the label's."""
    right = count = 0
    model.eval()
    with torch.no_grad():
        for x, y in batches:
            with autocast(x.device):
                right += int((model(x).argmax(1) == y).sum())
            count += len(y)
    return right / count
