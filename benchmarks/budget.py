"""How long it takes from scores to a pruned model, and how near the budget it lands.

    python benchmarks/budget.py

`PatrolPruner.step()` with ready scores, one `DependencyGraph().build_dependency`, and
Torch-Pruning's own way to a budget, a loop of small steps that counts after each, take turns in
one process. Seconds are medians; ratios are medians of the ratios within a turn. CPU seconds are
beside the wall clock's, since a busy machine distorts the latter.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
import torchvision
from jsonargparse import auto_cli
from record import write
from torch import Tensor, nn

import patrol_prune as pp


@dataclass(frozen=True)
class Budget:
    """The whole experiment.

    Attributes:
        models: torchvision's names and split points, as `name:split`.
        image_size: side of the input.
        edge_macs: the budget as a fraction of the dense edge.
        repeats: turns per model.
        loop_steps: Torch-Pruning's steps from the dense to the empty network.
        threads: of torch.
    """

    models: tuple[str, ...] = ("resnet50:layer3", "mobilenet_v2:features.13")
    image_size: int = 224
    edge_macs: float = 0.5
    repeats: int = 5
    loop_steps: int = 50
    threads: int = 1


class FixedScores:
    """Scores that are there already: drawn once per channel, by the group's root."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.known: dict[int, Tensor] = {}

    def __call__(self, group: Any) -> Tensor:
        root = id(group[0].dep.target.module)
        if root not in self.known:
            self.known[root] = torch.rand(len(group[0].idxs), generator=self.generator)
        return self.known[root]


@dataclass
class Clock:
    """Wall and CPU seconds of one call."""

    wall: float
    cpu: float
    result: Any


def clocked(function: Callable[[], Any]) -> Clock:
    """Run and time it."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return Clock(time.perf_counter() - wall, time.process_time() - cpu, result)


def torch_prunings_loop(split: pp.Split, x: Tensor, budget: int, steps: int) -> int:
    """Small global steps by magnitude until the edge costs at most the budget."""
    pruner = tp.pruner.BasePruner(
        split.model, x, importance=tp.importance.GroupMagnitudeImportance(), global_pruning=True,
        pruning_ratio=1.0, iterative_steps=steps, ignored_layers=split.protected_layers(),
        in_channel_groups={}, out_channel_groups={}, num_heads={}, channel_groups={},
    )  # fmt: skip
    macs = budget + 1
    for _ in range(steps):
        pruner.step()
        macs = int(tp.utils.count_ops_and_params(split.edge, x)[0])
        if macs <= budget:
            break
    split.refresh()
    return pp.edge_macs(split)


def fresh(name: str, at: str, x: Tensor) -> tuple[nn.Module, pp.Split]:
    """A new model, cut."""
    model = torchvision.models.get_model(name, weights=None).eval()
    return model, pp.Split(model, x, at=at)


def turn(config: Budget, name: str, at: str, x: Tensor) -> dict[str, Any]:
    """Everything once; every part starts from a new model."""
    model, split = fresh(name, at, x)
    graph = clocked(lambda: tp.DependencyGraph().build_dependency(model, x))
    make = clocked(
        lambda: pp.PatrolPruner(model, x, FixedScores(), split=split, edge_macs=config.edge_macs)
    )
    step = clocked(make.result.step)
    counted = pp.edge_macs(split)
    if counted != step.result.edge_macs:
        raise RuntimeError(f"{name}: closed form {step.result.edge_macs}, fvcore {counted}")
    _, other = fresh(name, at, x)
    budget = make.result.budget
    loop = clocked(lambda: torch_prunings_loop(other, x, budget, config.loop_steps))
    return {
        "graph": graph, "make": make, "step": step, "loop": loop, "budget": budget,
        "edge_macs": counted, "loop_edge_macs": loop.result,
    }  # fmt: skip


def row(config: Budget, name: str, at: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """One model's medians."""

    def seconds(part: str, kind: str) -> float:
        return round(statistics.median(getattr(t[part], kind) for t in turns), 3)

    def ratio(parts: tuple[str, ...], kind: str) -> float:
        ours = [sum(getattr(t[p], kind) for p in parts) for t in turns]
        graphs = [getattr(t["graph"], kind) for t in turns]
        return round(statistics.median(o / g for o, g in zip(ours, graphs, strict=True)), 2)

    last = turns[-1]
    return {
        "model": name, "split": at, "image_size": config.image_size, "repeats": len(turns),
        "budget_fraction": config.edge_macs, "edge_macs_budget": last["budget"],
        "edge_macs": last["edge_macs"], "of_budget": round(last["edge_macs"] / last["budget"], 5),
        "graph_seconds": seconds("graph", "wall"), "make_seconds": seconds("make", "wall"),
        "step_seconds": seconds("step", "wall"), "step_over_graph": ratio(("step",), "wall"),
        "graph_cpu_seconds": seconds("graph", "cpu"), "step_cpu_seconds": seconds("step", "cpu"),
        "step_over_graph_cpu": ratio(("step",), "cpu"),
        "make_and_step_over_graph_cpu": ratio(("make", "step"), "cpu"),
        "loop_steps": config.loop_steps, "loop_seconds": seconds("loop", "wall"),
        "loop_over_graph_cpu": ratio(("loop",), "cpu"),
        "loop_of_budget": round(last["loop_edge_macs"] / last["budget"], 5),
    }  # fmt: skip


def main(config: Budget) -> None:
    """Measure every model and write `results/budget.json`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(config.threads)
    rows = []
    for entry in config.models:
        name, at = entry.split(":")
        x = torch.randn(1, 3, config.image_size, config.image_size)
        turn(config, name, at, x)  # warm-up
        turns = [turn(config, name, at, x) for _ in range(config.repeats)]
        rows.append(row(config, name, at, turns))
        print(rows[-1])
    print(write("budget", rows))


if __name__ == "__main__":
    main(auto_cli(Budget, as_positional=False))
