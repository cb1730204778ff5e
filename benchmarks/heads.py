"""What attention with heads that can go costs in time, against the layers that it replaces.

    python benchmarks/heads.py

The same model with and without `open_attention` takes turns in one process, in evaluation mode
without gradients and in a training step; processor time, medians of the ratios within a turn. Then
with half of the heads of every layer gone, and with half of the dimensions of every head.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from jsonargparse import auto_cli
from record import write
from torch import Tensor, nn

import patrol_prune as pp
from patrol_prune.attention_heads import HeadLinear
from patrol_prune.group_table import GroupTable, remove_channels


@dataclass(frozen=True)
class Heads:
    """The whole experiment.

    Attributes:
        models: torchvision's names.
        image_size: side of the input.
        batch: images.
        turns: of each comparison.
        threads: of torch.
    """

    models: tuple[str, ...] = ("vit_b_16", "swin_t", "swin_v2_t", "maxvit_t")
    image_size: int = 224
    batch: int = 2
    turns: int = 7
    threads: int = 1


def infer(model: nn.Module, x: Tensor) -> None:
    """A forward pass."""
    with torch.no_grad():
        model.eval()(x)


def train(model: nn.Module, x: Tensor) -> None:
    """Forward and backward."""
    model.train()(x).square().sum().backward()
    model.zero_grad()


def ratio(config: Heads, work: Callable[[nn.Module, Tensor], None], plain: nn.Module,
          other: nn.Module) -> float:
    """Processor time of `other` over that of `plain`, alternating."""
    x = torch.randn(config.batch, 3, config.image_size, config.image_size)
    ratios = []
    for turn in range(config.turns + 1):
        took = []
        for model in (plain, other):
            start = time.process_time()
            work(model, x)
            took.append(time.process_time() - start)
        if turn:  # the first warms up
            ratios.append(took[1] / took[0])
    return round(statistics.median(ratios), 3)


def halved(model: nn.Module, x: Tensor) -> nn.Module:
    """The model without half of the heads of every layer, or of the dimensions."""
    table = GroupTable.build(model, x)
    groups = [g for g in table.groups.values() if isinstance(g.members[0].module, HeadLinear)]
    remove_channels(table, {g.name: g.units(torch.arange(g.channels // g.tie // 2))
                            for g in groups})
    return model.eval()


def measure(config: Heads, name: str) -> dict[str, Any]:
    """One model."""
    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, weights=None)
    x = torch.randn(1, 3, config.image_size, config.image_size)
    opened, by_dimensions = copy.deepcopy(plain), copy.deepcopy(plain)
    layers = pp.open_attention(opened, x).opened
    pp.open_attention(by_dimensions, x, unit="dimensions")

    def heads(model: nn.Module) -> int:
        return sum(model.get_submodule(n).num_heads for n in layers)

    row: dict[str, Any] = {
        "model": name, "layers": len(layers), "heads": heads(opened),
        "macs": pp.count_macs(plain.eval(), x).total,
        "macs_opened": pp.count_macs(opened.eval(), x).total,
        "infer": ratio(config, infer, plain, opened), "train": ratio(config, train, plain, opened),
    }
    row["macs_halved"] = pp.count_macs(halved(opened, x), x).total
    row["heads_left"] = heads(opened)
    row["infer_halved"] = ratio(config, infer, plain, opened)
    row["macs_narrow"] = pp.count_macs(halved(by_dimensions, x), x).total
    row["infer_narrow"] = ratio(config, infer, plain, by_dimensions)
    return row


def main(config: Heads) -> None:
    """Measure every model; write `results/heads.json`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(config.threads)
    rows = []
    for name in config.models:
        rows.append(measure(config, name))
        print(rows[-1], flush=True)
    print(write("heads", rows, image_size=config.image_size, batch=config.batch,
                turns=config.turns))


if __name__ == "__main__":
    main(auto_cli(Heads, as_positional=False))
