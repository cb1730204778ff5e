"""How long it takes from scores to a pruned model, and how near the budget it lands.

    python benchmarks/budget.py [--only [resnet50,densenet121]] [--loop_steps 400]

`PatrolPruner` and Torch-Pruning's own way to a budget, a loop of small global steps that counts
after each, take turns in one process on the same model, with the same `GroupTaylorImportance` and
the same gradients; one `DependencyGraph().build_dependency` is the unit beside seconds. Seconds are
medians over the turns, ratios are medians of the ratios within a turn. Processor seconds stand
beside the wall clock's, since a busy machine distorts the latter.

Each row has a process of its own with a time limit; rows that exist are kept, delete one to measure
it again. Where Torch-Pruning fails, the row says how.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch_pruning as tp
import torchvision
from jsonargparse import auto_cli
from processes import told, within
from record import ROOT, commit, write
from torch import Tensor, nn

import patrol_prune as pp

RESULTS = ROOT / "results" / "budget.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """The whole experiment.

    Attributes:
        models: torchvision's names and split points, as `name:split`.
        only: of these models only those; all without it.
        image_size: side of the input.
        edge_macs: the budget as a fraction of the dense edge.
        repeats: turns per model.
        loop_steps: Torch-Pruning's steps from the dense to the empty network; its own script,
            `reproduce/main.py`, takes 400.
        batch: images for the gradients.
        limit: seconds per row; the turns that ended by then count.
        threads: of torch.
    """

    models: tuple[str, ...] = (
        "resnet50:layer3", "mobilenet_v2:features.13", "mobilenet_v3_large:features.12",
        "densenet121:features.denseblock3", "convnext_tiny:features.5",
        "vit_b_16:encoder.layers.encoder_layer_7", "efficientnet_b7:features.5",
    )
    only: tuple[str, ...] = ()
    image_size: int = 224
    edge_macs: float = 0.5
    repeats: int = 3
    loop_steps: int = 50
    batch: int = 4
    limit: float = 900.0
    threads: int = 1


@dataclass(frozen=True)
class Seconds:
    """Wall and processor seconds of one call."""

    wall: float
    cpu: float


def clocked(function: Callable[[], Any]) -> tuple[Seconds, Any]:
    """Run and time it."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), result


def fresh(config: Budget, name: str, at: str) -> tuple[nn.Module, pp.Split, Tensor]:
    """The model anew, cut, with the gradients of one batch; and an example input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        for layer in model.modules():  # ViT's head begins at 0, and then no gradient flows
            if isinstance(layer, nn.Linear) and not layer.weight.any():
                nn.init.normal_(layer.weight, std=0.02)
        images = torch.randn(config.batch, 3, config.image_size, config.image_size)
        labels = torch.randint(0, 1000, (config.batch,))
    split = pp.Split(model, images[:1], at=at)
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    return model, split, images[:1]


def ours(config: Budget, name: str, at: str) -> Row:
    """Make a `PatrolPruner` and take its step."""
    model, split, x = fresh(config, name, at)
    graph, _ = clocked(lambda: tp.DependencyGraph().build_dependency(model, x))
    scores = tp.importance.GroupTaylorImportance()
    make, pruner = clocked(
        lambda: pp.PatrolPruner(model, x, scores, split=split, edge_macs=config.edge_macs)
    )
    step, result = clocked(pruner.step)
    counted = pp.edge_macs(split)
    if counted != result.edge_macs:
        raise RuntimeError(f"{name}: closed form {result.edge_macs}, fvcore {counted}")
    return {
        "graph": asdict(graph), "make": asdict(make), "step": asdict(step), "edge_macs": counted,
        "budget": result.budget, "dense": result.edge_macs_before,
    }  # fmt: skip


def torch_prunings(config: Budget, name: str, at: str) -> Row:
    """Make a `BasePruner` and loop until the edge costs at most the budget."""
    model, split, x = fresh(config, name, at)
    budget = int(config.edge_macs * pp.edge_macs(split))
    reads_parameters = any(node.op == "get_attr" for node in split.edge.graph.nodes)
    spent: list[Seconds] = []
    steps, status, macs = 0, "", None

    def timed(function: Callable[[], Any]) -> Any:
        seconds, result = clocked(function)
        spent.append(seconds)
        return result

    try:
        pruner = timed(lambda: tp.pruner.BasePruner(
            model, x, importance=tp.importance.GroupTaylorImportance(), global_pruning=True,
            pruning_ratio=1.0, iterative_steps=config.loop_steps,
            ignored_layers=split.protected_layers(),
            in_channel_groups={}, out_channel_groups={}, num_heads={}, channel_groups={},
        ))  # fmt: skip
        over = True
        while over and steps < config.loop_steps:
            timed(pruner.step)
            steps += 1
            if reads_parameters:  # its counter copies the edge; a copy follows no model
                with torch.no_grad():
                    model(x)
                split.refresh()
            over = timed(lambda: tp.utils.count_ops_and_params(split.edge, x)[0]) > budget
        with torch.no_grad():
            model(x)
        split.refresh()
        macs = pp.edge_macs(split)
        if over:
            status = f"still at {macs / budget:.2f} of the budget after {steps} steps"
    except Exception as error:  # a benchmark over strangers' models
        status = f"{told(error)} (step {steps})"
    make, loop = (Seconds(sum(s.wall for s in part), sum(s.cpu for s in part))
                  for part in (spent[:1], spent[1:]))
    return {"loop_make": asdict(make), "loop": asdict(loop), "loop_edge_macs": macs,
            "loop_steps_taken": steps, "loop_status": status}  # fmt: skip


def turns(config: Budget, name: str, at: str) -> Iterator[Row]:
    """Both ways, each time from a new model; who begins alternates."""
    ours(config, name, at)  # warm-up
    for repeat in range(config.repeats):
        order = (ours, torch_prunings) if repeat % 2 == 0 else (torch_prunings, ours)
        found: Row = {}
        for way in order:
            found |= way(config, name, at)
        yield found


def row(config: Budget, name: str, at: str, done: list[Row], status: str) -> Row:
    """One model's medians."""
    made: Row = {
        "model": name, "split": at, "image_size": config.image_size,
        "budget_fraction": config.edge_macs, "loop_steps": config.loop_steps,
        "repeats": len(done), "threads": config.threads, "status": status or "ok",
    }  # fmt: skip
    if not done:
        return made

    def seconds(*parts: str, kind: str = "cpu") -> float:
        return round(statistics.median(sum(t[p][kind] for p in parts) for t in done), 3)

    def ratio(over: tuple[str, ...], under: tuple[str, ...], kind: str) -> float:
        pairs = ((sum(t[p][kind] for p in over), sum(t[p][kind] for p in under)) for t in done)
        return round(statistics.median(a / b for a, b in pairs), 2)

    last = done[-1]
    made |= {
        "edge_macs_dense": last["dense"], "edge_macs_budget": last["budget"],
        "edge_macs": last["edge_macs"], "of_budget": round(last["edge_macs"] / last["budget"], 5),
        "graph_cpu_seconds": seconds("graph"), "make_cpu_seconds": seconds("make"),
        "step_cpu_seconds": seconds("step"), "total_seconds": seconds("make", "step", kind="wall"),
        "step_over_graph_cpu": ratio(("step",), ("graph",), "cpu"),
        "make_and_step_over_graph_cpu": ratio(("make", "step"), ("graph",), "cpu"),
        "loop_status": last["loop_status"] or "ok", "loop_steps_taken": last["loop_steps_taken"],
    }  # fmt: skip
    if last["loop_edge_macs"] is not None:
        made |= {
            "loop_edge_macs": last["loop_edge_macs"],
            "loop_of_budget": round(last["loop_edge_macs"] / last["budget"], 5),
            "loop_make_cpu_seconds": seconds("loop_make"), "loop_cpu_seconds": seconds("loop"),
            "loop_total_seconds": seconds("loop_make", "loop", kind="wall"),
            "times_faster_cpu": ratio(("loop_make", "loop"), ("make", "step"), "cpu"),
            "times_faster_wall": ratio(("loop_make", "loop"), ("make", "step"), "wall"),
            "step_times_faster_cpu": ratio(("loop",), ("step",), "cpu"),
        }  # fmt: skip
    return made


def key(row: Row) -> tuple[Any, ...]:
    """What makes two rows the same measurement."""
    return tuple(row[n] for n in ("model", "split", "image_size", "budget_fraction", "loop_steps"))


def wanted(config: Budget, rows: list[Row]) -> list[tuple[str, str]]:
    """(model, split) of the rows that are asked for and not there yet."""
    pairs = [tuple(entry.split(":")) for entry in config.models]
    unknown = set(config.only) - {name for name, _ in pairs}
    if unknown:
        raise SystemExit(f"--only {sorted(unknown)} is in none of --models {[*config.models]}")
    known = {key(row) for row in rows}
    return [(name, at) for name, at in pairs if not config.only or name in config.only
            if key(row(config, name, at, [], "")) not in known]


def main(config: Budget) -> None:
    """Measure what is missing; write `results/budget.json` after every row."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(config.threads)
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for name, at in wanted(config, rows):
        done, status = within(config.limit, lambda name=name, at=at: turns(config, name, at))
        made = row(config, name, at, done, status)
        rows.append({**made, "commit": commit()})
        print(rows[-1], flush=True)
        write("budget", rows)


if __name__ == "__main__":
    main(auto_cli(Budget, as_positional=False))
