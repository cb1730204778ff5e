"""Accuracy against what an attacker reconstructs, at equal edge MACs, on CIFAR-10.

    python benchmarks/frontier.py --data ~/data/cifar10 --work ~/frontier

The training images are parted once, by seed: the defender trains on the first part, every
attacker on another. One dense model is trained, then each method cuts it, prunes its edge to the
multiply-adds of the dense edge after `layer1`, fine-tunes it for the same number of epochs with
the same distillation from the dense model, and is attacked by freshly trained decoders. Every
step is kept in the working directory, so that an interrupted run goes on where it stopped;
several workers may share the directory.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from jsonargparse import auto_cli
from record import write
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.data import Batches, ImageSet, find_parts, load_image_folder
from patrol_prune.finetune import FinetuneConfig, accuracy, finetune, recalibrate_batchnorm
from patrol_prune.models import SmallResNet
from patrol_prune.pixels import Normalization
from patrol_prune.storage import load_state, save_state

NORMALIZATION = Normalization((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
DATASET = "CIFAR-10 (JPEG copy)"


@dataclass(frozen=True)
class Frontier:
    """The whole experiment.

    Attributes:
        data: ImageFolder tree with train/ and test/.
        work: where stages are kept between runs.
        train_images: of the defender.
        attacker_images: of every attacker, disjoint from the defender's.
        test_images: attacked; accuracy is measured on the whole test part.
        width: base channels of the ResNet.
        baseline_epochs: of the dense model.
        finetune_epochs: of every pruned model.
        alpha: weight of each block's Lipschitz constant (scale-free form).
        beta: weight of the adversarial error.
        max_pruning_ratio: largest share of a group's channels that may go.
        attack_epochs: of one schedule of an attacker's training; extended until its plateau.
        workers: processes; each computes with one thread.
        seed: of everything that is drawn.
        collect: write the record of the rows that are done, and name those that are not.
        only: the names of the methods to do, all of them where empty.
    """

    data: Path
    work: Path = Path("runs/frontier")
    train_images: int = 40_000
    attacker_images: int = 10_000
    test_images: int = 1_000
    width: int = 16
    baseline_epochs: int = 16
    finetune_epochs: int = 5
    alpha: float = 0.01
    beta: float = 40.0
    max_pruning_ratio: float = 0.5
    attack_epochs: int = 8
    workers: int = 2
    seed: int = 0
    collect: bool = False
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """One compared method: how it scores channels, and what fine-tuning keeps on."""

    name: str
    split: str
    score: str = ""
    score_alpha: float = 0.0
    score_beta: float = 0.0
    alpha: float = 0.0
    beta: float = 0.0
    attack_seeds: tuple[int, ...] = (0,)

    @property
    def key(self) -> str:
        return f"{self.name}-{self.split}"


def methods(args: Frontier) -> list[Method]:
    """What is compared. The rows that the bar compares are attacked with three seeds."""
    a, b, three = args.alpha, args.beta, (0, 1, 2)
    patrol = Method("patrol", "layer3", "patrol", a, b, a, b, three)
    rows = [
        patrol,
        Method("taylor", "layer3", "taylor", attack_seeds=three),
        replace(patrol, name="patrol-adversarial", score_alpha=0.0, alpha=0.0, attack_seeds=(0,)),
        Method("dense", "layer3"),
        replace(patrol, name="patrol-score-only", alpha=0.0, beta=0.0, attack_seeds=(0,)),
        Method("patrol-finetune-only", "layer3", "taylor", 0.0, 0.0, a, b),
        replace(patrol, name="patrol-lipschitz", score_beta=0.0, beta=0.0, attack_seeds=(0,)),
        Method("taylor", "layer2", "taylor"),
        replace(patrol, split="layer2", attack_seeds=(0,)),
        Method("dense", "layer2"),
        Method("dense", "layer1"),
    ]
    return [row for row in rows if not args.only or row.key in args.only or row.name in args.only]


class Data:
    """The images, parted by seed."""

    def __init__(self, args: Frontier) -> None:
        train_folder, test_folder = find_parts(args.data)
        cache = args.work / "images"
        if not cache.is_dir():
            parts = {"train": load_image_folder(train_folder, 32)}
            parts["test"] = load_image_folder(test_folder, 32)
            save_state(cache, {f"{part}.{name}": getattr(images, name)
                               for part, images in parts.items() for name in ("images", "labels")},
                       {"classes": list(parts["train"].classes)})
        tensors, meta = load_state(cache)
        classes = tuple(meta["classes"])
        whole = ImageSet(tensors["train.images"], tensors["train.labels"], classes)
        self.test = ImageSet(tensors["test.images"], tensors["test.labels"], classes)
        generator = torch.Generator().manual_seed(args.seed)
        order = torch.randperm(len(whole), generator=generator)
        first = args.train_images
        self.train = whole.subset(order[:first])
        self.attacker = whole.subset(order[first : first + args.attacker_images])
        victims = torch.randperm(len(self.test), generator=generator)[: args.test_images]
        self.victims = self.test.subset(victims)

    def batches(self, seed: int, *, augment: bool = True) -> Batches:
        return Batches(self.train, 128, normalization=NORMALIZATION, augment=augment,
                       shuffle=True, seed=seed)

    def test_batches(self) -> Batches:
        return Batches(self.test, 500, normalization=NORMALIZATION)


def kept(path: Path, make: Callable[[], tuple[dict[str, torch.Tensor], dict[str, Any]]]
         ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `make` returned the first time."""
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_state(path, *make())
    return load_state(path)


def dense_model(args: Frontier, data: Data) -> tuple[SmallResNet, float]:
    """The undefended model, trained once; and its accuracy."""
    torch.manual_seed(args.seed)
    model = SmallResNet(10, width=args.width)

    def make() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        start = time.perf_counter()
        config = FinetuneConfig(epochs=args.baseline_epochs, lr=0.1, distill_weight=0.0,
                                beta_warmup=0.0, seed=args.seed)
        finetune(model, data.batches(args.seed), config=config, resume=True,
                 checkpoint_dir=args.work / "baseline-checkpoints", progress=False)
        measured = accuracy(model, data.test_batches())
        seconds = time.perf_counter() - start
        print(f"dense model: accuracy {measured:.4f} in {seconds:.0f} s", flush=True)
        return model.state_dict(), {"accuracy": measured, "seconds": seconds}

    tensors, meta = kept(args.work / "baseline", make)
    model.load_state_dict(tensors)
    return model.eval(), float(meta["accuracy"])


def defended(args: Frontier, data: Data, method: Method) -> tuple[pp.Split, dict[str, Any]]:
    """The method's split, pruned and fine-tuned; and what is known of it without an attack."""
    dense, dense_accuracy = dense_model(args, data)
    example = torch.zeros(1, 3, 32, 32)
    budget = pp.edge_macs(pp.Split(dense, example, at="layer1"))
    folder = args.work / "models" / method.key
    if not folder.is_dir():
        start = time.perf_counter()
        model = copy.deepcopy(dense)
        split = pp.Split(model, example, at=method.split)
        extra: dict[str, Any] = {"accuracy": dense_accuracy}
        if method.score:
            extra = prune_and_finetune(args, data, method, dense, split, budget)
        extra["seconds"] = time.perf_counter() - start
        pp.save(split, folder, extra=extra)
        print(f"{method.key}: {extra}", flush=True)
    split = pp.load(folder, lambda: SmallResNet(10, width=args.width))
    return split, json.loads((folder / "split.json").read_text())["extra"]


def prune_and_finetune(args: Frontier, data: Data, method: Method, dense: SmallResNet,
                       split: pp.Split, budget: int) -> dict[str, Any]:
    """Score, prune to the budget, repair; the attackers inside are fit on the defender's images."""
    importance = scored(args, data, method, split)
    pruner = pp.PatrolPruner(split.model, split.example_inputs, importance, split=split,
                             edge_macs=budget, boundary="keep",
                             max_pruning_ratio=args.max_pruning_ratio)
    pruned = pruner.step()
    objective = objective_for(split, method.alpha, method.beta, args.seed + 10)
    recalibrate_batchnorm(split.model, data.batches(args.seed + 1))
    before = accuracy(split.model, data.test_batches())
    config = FinetuneConfig(epochs=args.finetune_epochs, lr=0.1, seed=args.seed)
    result = finetune(split, data.batches(args.seed + 2), objective=objective, config=config,
                      teacher=copy.deepcopy(dense), progress=False, resume=True,
                      checkpoint_dir=args.work / "checkpoints" / method.key)
    believed = None
    if method.beta:
        believed = objective.fit_surrogates(data.batches(args.seed + 3, augment=False), 100)
    return {
        "accuracy": accuracy(split.model, data.test_batches()),
        "accuracy_before_finetuning": before,
        "surrogate_mse": believed,
        "kept": {name: list(counts) for name, counts in pruned.kept.items()},
        "history": result.history,
    }


def objective_for(split: pp.Split, alpha: float, beta: float, seed: int) -> pp.PatrolObjective:
    return pp.PatrolObjective(split, F.cross_entropy, alpha=alpha, beta=beta, seed=seed,
                              adversarial_images=64, normalization=NORMALIZATION)


def scored(args: Frontier, data: Data, method: Method, split: pp.Split) -> Any:
    """An importance that has seen 2,560 of the defender's images."""
    batches = data.batches(args.seed + 4, augment=False)
    if method.score == "magnitude":
        return tp.importance.GroupMagnitudeImportance()
    if method.score == "taylor":
        importance = tp.importance.GroupTaylorImportance()
        split.model.eval()
        for number, (x, y) in enumerate(batches):
            if number == 20:
                break
            F.cross_entropy(split.model(x), y).backward()
        return importance
    objective = objective_for(split, method.score_alpha, method.score_beta, args.seed + 20)
    if method.score_beta:
        objective.fit_surrogates(batches, 300)
    importance = pp.PatrolImportance(objective)
    for number, (x, y) in enumerate(batches):
        if number == 20:
            break
        importance.accumulate(x, y)
    return importance


def row_path(args: Frontier, method: Method, seed: int) -> Path:
    return args.work / "rows" / f"{method.key}-{seed}.json"


def attacked(args: Frontier, data: Data, method: Method, seed: int) -> dict[str, Any]:
    """One row: the method's split under one freshly trained attacker."""
    path = row_path(args, method, seed)
    if path.exists():
        return json.loads(path.read_text())
    split, known = defended(args, data, method)
    # A feature of 16x16 or more has a trunk of four times the cost and converges much sooner.
    shallow = method.split != "layer3"
    epochs = max(1, args.attack_epochs // 2) if shallow else args.attack_epochs
    config = pp.InverseNetworkConfig(epochs=epochs, max_extensions=1)
    start = time.perf_counter()
    report = pp.audit(split, data.attacker.images, data.victims.images, seeds=(1000 + seed,),
                      normalization=NORMALIZATION, config=config, examples=8)
    row = next(r for r in report.records if r["subject"] == "edge")
    floor = next(r for r in report.records if r["subject"] == "floor")
    result = {
        "dataset": DATASET, "model": f"resnet18-cifar-w{args.width}", "method": method.name,
        "split": method.split, "train_seed": args.seed,
        "edge_macs": pp.edge_macs(split), "edge_params": pp.count_params(split.edge),
        "feature_bytes": pp.feature_bytes(split.feature_shape),
        "attack_seed": seed, "floor_ssim": floor["ssim"], "floor_mse": floor["mse"],
        **{k: row[k] for k in ("attack", "attacker_images", "ssim", "ssim_worst5", "psnr", "mse",
                               "epochs", "plateau")},
        **{k: known.get(k) for k in ("accuracy", "accuracy_before_finetuning", "surrogate_mse",
                                     "kept")},
        "train_seconds": known["seconds"], "attack_seconds": time.perf_counter() - start,
        "flags": sorted({flag["name"] for flag in report.flags}),
    }
    if seed == method.attack_seeds[0]:
        save_state(args.work / "examples" / method.key,
                   {k: torch.from_numpy(v).contiguous() for k, v in report.examples.items()}, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(result))
    temporary.replace(path)
    print(f"{method.key} seed {seed}: accuracy {result['accuracy']:.4f} ssim {result['ssim']:.3f} "
          f"mse {result['mse']:.4f} plateau {result['plateau']}", flush=True)
    return result


def work(args: Frontier) -> None:
    """Take steps that nobody has taken until none is left; a claim of a dead process is void."""
    data = Data(args)
    dense_model(args, data)
    todo = [(m, s) for m in methods(args) for s in m.attack_seeds]
    todo.sort(key=lambda step: step[1])
    claims = args.work / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    for method, seed in todo:
        claim = claims / (method.key if seed == 0 else f"{method.key}-{seed}")
        if claim_is_ours(claim):
            attacked(args, data, method, seed)


def claim_is_ours(claim: Path) -> bool:
    """Whether this process may take the step: first come, or the claimant has died."""
    try:
        with open(claim, "x") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        owner = claim.read_text().strip()
        alive = owner.isdigit() and Path(f"/proc/{owner}").exists()
        if not alive:
            claim.write_text(str(os.getpid()))
        return not alive or owner == str(os.getpid())


def main(args: Frontier) -> None:
    args = replace(args, work=args.work.expanduser(), data=args.data.expanduser())
    if os.environ.get("FRONTIER_WORKER"):
        torch.set_num_threads(1)
        work(args)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    codes: list[int] = []
    if not args.collect:
        dense_model(args, Data(args))
        environment = {**os.environ, "FRONTIER_WORKER": "1", "OMP_NUM_THREADS": "1"}
        workers = [subprocess.Popen([sys.executable, *sys.argv], env=environment)
                   for _ in range(args.workers)]
        codes = [worker.wait() for worker in workers]
    rows, missing = [], []
    for method in methods(args):
        for seed in method.attack_seeds:
            path = row_path(args, method, seed)
            if path.exists():
                rows.append(json.loads(path.read_text()))
            else:
                missing.append(path.stem)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()
                if k not in ("data", "work", "collect", "only")}
    print(write("frontier", rows, settings=settings, workers_threads=1, missing=missing))
    if any(codes) or missing:
        raise SystemExit(f"not done: {', '.join(missing)}; exit codes {codes}")


if __name__ == "__main__":
    main(auto_cli(Frontier, as_positional=False))
