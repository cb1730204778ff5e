"""Every torchvision classifier: cut it, mask it, prune its edge to half, save it, train it.

    python benchmarks/backbones.py [--only [resnet50,swin_t]] [--at [first third,middle]]

Each model runs in a process of its own with a time limit; one that fails stops nothing. Rows that
exist are kept; delete a row to measure it again. Magnitude scores, random weights, batch 1.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from backbone_models import (
    DETECTION,
    SEGMENTATION,
    WITHOUT_HEADS,
    build,
    classifiers,
    image_size,
    kind_of,
)
from jsonargparse import auto_cli
from processes import told, within
from record import ROOT, commit, write
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import patrol_prune as pp
from patrol_prune.attention_heads import HeadProduct
from patrol_prune.group_table import GroupTable, remove_channels

RESULTS = ROOT / "results" / "backbones.json"
PLACES = {"first third": 1 / 3, "middle": 1 / 2, "last third": 2 / 3}
Row = dict[str, Any]


@dataclass(frozen=True)
class Backbones:
    """The whole experiment.

    Attributes:
        only: these models; all classifiers, then segmentation and detection backbones without it.
        at: where among the split points of each model.
        edge_macs: the budget as a fraction of the dense edge.
        image_size: side of the input; the smallest that keeps the model whole without it.
        limit: seconds per model and split.
        threads: of torch.
    """

    only: tuple[str, ...] = ()
    at: tuple[str, ...] = ("middle",)
    edge_macs: float = 0.5
    image_size: int | None = None
    limit: float = 180.0
    threads: int = 1


@dataclass
class Clock:
    """Seconds per stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[f"seconds_{name}"] = round(time.perf_counter() - start, 2)


def difference(a: Any, b: Any) -> float:
    """Largest deviation of two outputs, over the largest magnitude in `a`."""
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    scale = max(float(x.abs().max()) for x, _ in pairs)
    return max(float((x - y).abs().max()) for x, y in pairs) / scale


def equal(a: Any, b: Any) -> bool:
    """Whether two outputs agree bit for bit."""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def measure(config: Backbones, name: str, place: str) -> Row:
    """One model at one split. What is known when something fails stays in the row."""
    size = config.image_size or image_size(name)
    clock = Clock()
    row: Row = {"model": name, "kind": kind_of(name), "place": place, "image_size": size,
                "split": "", "status": "ok"}  # fmt: skip
    started, cpu = time.perf_counter(), time.process_time()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _measure(config, row, clock)
    except Exception as error:  # a benchmark over strangers' models
        row["status"] = told(error)
    row |= clock.seconds
    row["seconds"] = round(time.perf_counter() - started, 1)
    row["cpu_seconds"] = round(time.process_time() - cpu, 1)
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def _measure(config: Backbones, row: Row, clock: Clock) -> None:
    name, size = row["model"], row["image_size"]
    x = torch.randn(1, 3, size, size)
    with clock.stage("build"):
        model = build(name, size)
    with clock.stage("heads"):
        row["opened_attention"] = len(pp.open_attention(model, x).opened)
    with clock.stage("split_points"):
        points = pp.split_points(model, x)
    row["split_points"] = len(points)
    row["split"] = points[int(len(points) * PLACES[row["place"]])].name
    with clock.stage("split"), torch.no_grad():
        split = pp.Split(model, x, at=row["split"])
        dense = model(x)
        row["max_error_split"] = difference(dense, split.cloud(split.edge(x)))
    with clock.stage("pruner"):
        scores = tp.importance.GroupMagnitudeImportance()
        pruner = pp.PatrolPruner(model, x, scores, split=split, edge_macs=config.edge_macs)
    row["left_whole"] = 0
    with clock.stage("masks"), torch.no_grad():
        masks, removed = zeroed(model, x, split, pruner)
        masks_of_ones = pp.SoftMasks(model, x, split=split, table=pruner.table)
        with masks_of_ones.attached():
            row["max_error_mask_ones"] = difference(dense, model(x))
        with masks.attached():
            masked = model(x)
    inexact = sorted(set(masks.inexact) & {n for n, gone in removed.items() if len(gone)})
    row["inexact"] = [*inexact]
    row["exact"] = not inexact
    heads = heads_of(split.edge)
    with clock.stage("step"):
        result = pruner.step()
    row["removed_heads"] = heads - heads_of(split.edge)
    row |= {"removed_channels": result.removed_channels,
            "edge_macs_dense": result.edge_macs_before, "edge_macs_budget": result.budget,
            "edge_macs": pp.edge_macs(split), "left_whole": len(result.left_whole),
            "left_whole_names": reasons(result.left_whole)}  # fmt: skip
    with torch.no_grad():
        pruned = model(x)
        row["max_error_pruned_split"] = difference(pruned, split.cloud(split.edge(x)))
        row["max_error_mask_zeros"] = difference(masked, pruned)
    if inexact:
        row["max_error_mask_zeros_inexact"] = row["max_error_mask_zeros"]
        row["max_error_mask_zeros"] = exact_groups_only(name, size, x, row["split"])
    del model, pruner, masks, masks_of_ones
    with clock.stage("save_load"), tempfile.TemporaryDirectory() as folder:
        pp.save(split, f"{folder}/edge")
        del split
        loaded = pp.load(f"{folder}/edge", lambda: build(name, size)).model
        with torch.no_grad():
            row["save_load_equal"] = equal(pruned, loaded(x))
    with clock.stage("train_step"):
        row["train_step"] = train_step(loaded, torch.randn(2, 3, size, size))
    row["status"] = verdict(row)


def heads_of(edge: nn.Module) -> int:
    """The attention heads on the edge that may go, or could."""
    return sum(m.heads for m in edge.modules() if isinstance(m, HeadProduct))


def zeroed(
    model: nn.Module, x: Tensor, split: pp.Split, pruner: pp.PatrolPruner
) -> tuple[pp.SoftMasks, dict[str, Tensor]]:
    """Masks that are 0 where the pruner is about to remove, and these channels by group."""
    masks = pp.SoftMasks(model, x, split=split, table=pruner.table)
    removed = {}
    for group, kept in pruner.choose().items():
        gone = torch.ones(pruner.table.groups[group].channels, dtype=torch.bool)
        gone[kept] = False
        removed[group] = gone.nonzero().flatten()
    masks.zero(removed)
    return masks, removed


def exact_groups_only(name: str, size: int, x: Tensor, at: str) -> float:
    """Zero mask against removal for half of every edge group that nothing normalises over."""
    model = build(name, size)
    pp.open_attention(model, x)
    split = pp.Split(model, x, at=at)
    table = GroupTable.build(model, x, split=split)
    masks = pp.SoftMasks(model, x, split=split, table=table)
    removed = {}
    for group in (table.groups[n] for n in masks.channels if table.groups[n].exact):
        units = torch.randperm(group.channels // group.tie)
        removed[group.name] = group.units(units[: len(units) // 2])
    masks.zero(removed)
    with torch.no_grad():
        with masks.attached():
            masked = model(x)
        remove_channels(table, removed)
        return difference(masked, model(x))


def train_step(model: nn.Module, x: Tensor) -> bool:
    """Whether forward and backward in training mode give a finite gradient to every used layer."""
    model.train()
    outputs = [y for y in tree_leaves(model(x)) if isinstance(y, Tensor)]
    torch.stack([y.square().mean() for y in outputs]).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return bool(gradients) and all(bool(torch.isfinite(g).all()) for g in gradients)


def verdict(row: Row) -> str:
    """"ok", or which of the invariants does not hold."""
    broken = [
        what
        for what, holds in {
            "cloud(edge(x)) differs": row["max_error_split"] == row["max_error_pruned_split"] == 0,
            "ones change the output": row["max_error_mask_ones"] == 0,
            "a zero mask is no removal": row["max_error_mask_zeros"] <= 1e-4,
            "over the budget": row["edge_macs"] <= row["edge_macs_budget"],
            "far below the budget": row["edge_macs"] >= 0.99 * row["edge_macs_budget"],
            "load differs from save": row["save_load_equal"],
            "no training step": row["train_step"],
        }.items()
        if not holds
    ]
    return "; ".join(broken) or "ok"


def reasons(left: dict[str, str]) -> dict[str, list[str]]:
    """Reason -> names."""
    found: dict[str, list[str]] = {}
    for name, why in left.items():
        found.setdefault(why, []).append(name)
    return found


def in_a_process(config: Backbones, name: str, place: str) -> Row:
    """`measure` in a process that is killed at the limit."""
    rows, status = within(config.limit, lambda: [measure(config, name, place)])
    if rows:
        return rows[0]
    return {"model": name, "kind": kind_of(name), "place": place, "status": status,
            "image_size": config.image_size or image_size(name), "split": ""}  # fmt: skip


def main(config: Backbones) -> None:
    """Measure what is missing; write `results/backbones.json` after every model."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(config.threads)
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    known = {(row["model"], row["place"]) for row in rows}
    names = config.only or (*classifiers(), *WITHOUT_HEADS, *SEGMENTATION, *DETECTION)
    for place in config.at:
        for name in names:
            if (name, place) in known:
                continue
            row = in_a_process(config, name, place)
            row["commit"] = commit()
            rows.append(row)
            print(name, row["split"], row["status"], row.get("seconds"), flush=True)
            write("backbones", rows, edge_macs=config.edge_macs, limit_seconds=config.limit)


if __name__ == "__main__":
    main(auto_cli(Backbones, as_positional=False))
