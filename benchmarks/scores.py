"""Which score keeps the accuracy when half of the multiply-adds and more go at once?

    python benchmarks/scores.py --data DIR --weights dense.safetensors

One trained model is pruned to the same edge budget by each score, under several limits on the
share of a group's channels that may go, without any privacy term; running statistics are measured
anew, the accuracy is taken, and taken again after one epoch of fine-tuning with distillation, the
same for all. Rows that are in the record are not repeated.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from fidelity import NORMALIZATION, Fidelity, load_images, trained
from jsonargparse import auto_cli
from record import ROOT, commit, write
from torch import nn
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.cost import edge_macs
from patrol_prune.data import Batches, find_parts, load_image_folder
from patrol_prune.evaluation import accuracy
from patrol_prune.finetune import FinetuneConfig, finetune, recalibrate_batchnorm

LIMITS = (0.5, 0.75, 0.9)
FIRST = (("taylor", 0.5), ("second_order", 0.75), ("taylor", 0.75), ("absolute", 0.75))
"""The most telling rows, measured first."""
STRUCTURES = ("channels", "blocks", "both")
"""What may go, by the score of second order, at `blocks_edge_macs`."""
OURS = ("second_order", "absolute")
HOSTS = {
    "taylor": tp.importance.GroupTaylorImportance,
    "magnitude": tp.importance.GroupMagnitudeImportance,
}


@dataclass(frozen=True)
class Scores:
    """The whole experiment.

    Attributes:
        data: ImageFolder tree with train/ and test/, images of 32x32.
        weights: safetensors file of the trained `SmallResNet(10, width=16)`.
        split: where the model is cut.
        edge_macs: budget of the edge, as a fraction.
        blocks_edge_macs: budget where blocks alone are to meet it; few of them can go.
        blocks_limit: largest share of a group's channels that may go there.
        train_images: of the epoch after pruning.
        calibration_images: on which channels are scored.
        batch_size: of both.
        lr: peak learning rate of the epoch.
        threads: of torch.
        seed: of everything that is drawn.
    """

    data: Path
    weights: Path
    split: str = "layer3"
    edge_macs: float = 0.37
    blocks_edge_macs: float = 0.5
    blocks_limit: float = 0.75
    train_images: int = 20_000
    calibration_images: int = 1_280
    batch_size: int = 128
    lr: float = 0.05
    threads: int = 1
    seed: int = 0


def importance_of(score: str, split: pp.Split, calibration: Batches, structures: str) -> Any:
    """The score, accumulated over the same batches."""
    if score in OURS:
        objective = pp.PatrolObjective(split, F.cross_entropy, normalization=NORMALIZATION)
        ours = pp.PatrolImportance(objective, task_change=score, blocks=structures != "channels")
        for x, y in calibration:
            ours.accumulate(x, y)
        return ours
    if score == "taylor":
        for x, y in calibration:
            F.cross_entropy(split.model(x), y).backward()
    return HOSTS[score]()


def measure(args: Scores, dense: nn.Module, images: Any, test: Batches, score: str, limit: float,
            structures: str = "channels", budget: float | None = None) -> dict[str, Any]:
    """One row."""
    start = time.perf_counter()
    model = copy.deepcopy(dense)
    split = pp.Split(model, torch.zeros(1, 3, 32, 32), at=args.split)
    calibration = Batches(images.calibration, args.batch_size, normalization=NORMALIZATION)
    importance = importance_of(score, split, calibration, structures)
    result = pp.PatrolPruner(model, split.example_inputs, importance, split=split,
                             edge_macs=budget or args.edge_macs, max_pruning_ratio=limit,
                             structures=structures).step()
    model.zero_grad(set_to_none=True)
    recalibrate_batchnorm(model, images.batches(args.seed + 1, augment=False))
    before = accuracy(model, test)
    config = FinetuneConfig(epochs=1, lr=args.lr, distill_weight=0.9, seed=args.seed)
    finetune(model, images.batches(args.seed + 2), config=config, teacher=dense, progress=False)
    return {
        "score": score, "max_pruning_ratio": limit, "seed": args.seed,
        "structures": structures, "budget": budget or args.edge_macs,
        "removed_blocks": list(result.removed_blocks),
        "edge_macs": edge_macs(split), "accuracy_before": before,
        "accuracy": accuracy(model, test), "seconds": round(time.perf_counter() - start),
        "commit": commit(),
    }


def main(args: Scores) -> None:
    """Measure what is missing and write `results/scores.json` after each row."""
    torch.set_num_threads(args.threads)
    path = ROOT / "results" / "scores.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {(r["score"], r["max_pruning_ratio"], r["structures"], r["budget"], r["seed"])
            for r in rows}
    about = Fidelity(data=args.data, train_images=args.train_images, seed=args.seed,
                     calibration_images=args.calibration_images)
    images = load_images(about)
    _, whole = (load_image_folder(folder, 32) for folder in find_parts(args.data))
    test = Batches(whole, 500, normalization=NORMALIZATION)
    dense = trained(about, images, "small_resnet", args.weights)
    settings = {k: v for k, v in asdict(args).items() if k not in ("data", "weights", "seed")}
    settings["dense_accuracy"] = accuracy(dense, test)
    every = [(score, limit) for limit in LIMITS for score in (*OURS, *HOSTS)]
    wanted = [("second_order", args.blocks_limit, structures, args.blocks_edge_macs)
              for structures in STRUCTURES]
    wanted += [(score, limit, "channels", args.edge_macs)
               for score, limit in dict.fromkeys((*FIRST, *every))]
    for row in wanted:
        if (*row, args.seed) in done:
            continue
        rows.append(measure(args, dense, images, test, *row))
        print(rows[-1], flush=True)
        write("scores", rows, settings=settings)


if __name__ == "__main__":
    main(auto_cli(Scores, as_positional=False))
