"""What the frontier compares, and how each compared model is made; see `frontier.py`."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from frontier_recipes import RECIPES
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.data import Batches, ImageSet, find_parts, load_image_folder
from patrol_prune.defences import Defence, make_defence
from patrol_prune.evaluation import accuracy, recalibrate_batchnorm
from patrol_prune.finetune import FinetuneConfig, finetune
from patrol_prune.models import SmallResNet
from patrol_prune.pixels import Normalization
from patrol_prune.storage import load_state, save_state

NORMALIZATION = Normalization((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
DATASET = "CIFAR-10 (JPEG copy)"
ADVERSARIAL = ("patrol", "adversarial_only", "bottleneck", "disco", "cem_patrol")


@dataclass(frozen=True)
class Frontier:
    """The whole experiment.

    Attributes:
        data: ImageFolder tree with train/ and test/.
        work: where stages are kept between runs.
        shifted: ImageFolder tree of other images, for an attacker with the wrong ones; its
            train/ part is read. Without it that row is left out.
        train_images: of the defender.
        attacker_images: of every attacker, disjoint from the defender's.
        test_images: attacked; accuracy is measured on the whole test part.
        optimised_images: the first so many of them, for attacks that optimise every image.
        width: base channels of the ResNet.
        baseline_epochs: of the dense model.
        finetune_epochs: of every pruned model.
        sweep_epochs: of every defence, on top of a pruned and fine-tuned model.
        sweep_images: of the defender's, in each of those epochs.
        sweep_lr: peak learning rate there.
        alpha: weight of each block's Lipschitz constant (scale-free form).
        beta: weight of the adversarial error.
        max_pruning_ratio: largest share of a group's channels that may go.
        attack_epochs: of one schedule of an attacker's training; extended until its plateau.
        workers: processes; each computes with `threads` threads.
        threads: of each worker.
        device: where to train and attack.
        seed: of everything that is drawn.
        collect: write the record of the rows that are done, and name those that are not.
        earlier: a record of an earlier run; of what this one has not measured, its rows are kept.
        only: the names of the methods to do, all of them where empty.
    """

    data: Path
    work: Path = Path("runs/frontier")
    shifted: Path | None = None
    train_images: int = 40_000
    attacker_images: int = 10_000
    test_images: int = 1_000
    optimised_images: int = 256
    width: int = 16
    baseline_epochs: int = 16
    finetune_epochs: int = 5
    sweep_epochs: int = 2
    sweep_images: int = 20_000
    sweep_lr: float = 0.03
    alpha: float = 0.01
    beta: float = 40.0
    max_pruning_ratio: float = 0.5
    attack_epochs: int = 8
    workers: int = 2
    threads: int = 1
    device: str = "cpu"
    seed: int = 0
    collect: bool = False
    earlier: Path | None = None
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """One compared method: how it scores channels, what training keeps on, how it is attacked.

    A `defence` is applied to the finished model of the method whose key is `start`, and trained
    for `sweep_epochs` more.
    """

    name: str
    split: str
    score: str = ""
    score_alpha: float = 0.0
    score_beta: float = 0.0
    alpha: float = 0.0
    beta: float = 0.0
    attack_seeds: tuple[int, ...] = (0,)
    every_attack: bool = False
    defence: str = ""
    strength: float = 0.0
    start: str = ""
    recipe: str = ""

    @property
    def key(self) -> str:
        swept = f"-{self.strength:g}" if self.defence else ""
        recipe = f"@{self.recipe}" if self.recipe else ""
        return f"{self.name}{recipe}{swept}-{self.split}"


def methods(args: Frontier) -> list[Method]:
    """What is compared. The rows that the bar compares are attacked with three seeds."""
    a, b, three = args.alpha, args.beta, (0, 1, 2)
    patrol = Method("patrol", "layer3", "patrol", a, b, a, b, three, every_attack=True)
    rows = [
        patrol,
        Method("taylor", "layer3", "taylor", attack_seeds=three, every_attack=True),
        replace(patrol, name="patrol-adversarial", score_alpha=0.0, alpha=0.0, attack_seeds=(0,)),
        Method("dense", "layer3", every_attack=True),
        *swept(args),
        replace(patrol, name="patrol-score-only", alpha=0.0, beta=0.0, attack_seeds=(0,),
                every_attack=False),
        Method("patrol-finetune-only", "layer3", "taylor", 0.0, 0.0, a, b),
        replace(patrol, name="patrol-lipschitz", score_beta=0.0, beta=0.0, attack_seeds=(0,),
                every_attack=False),
        Method("magnitude", "layer3", "magnitude"),
        Method("dense", "layer2"),
        Method("dense", "layer1"),
        Method("taylor", "layer2", "taylor"),
        replace(patrol, split="layer2", attack_seeds=(0,), every_attack=False),
    ]
    return [row for row in rows if not args.only or row.key in args.only or row.name in args.only]


SWEEP: dict[str, tuple[float, ...]] = {
    "none": (0.0,),
    "patrol": (40.0, 160.0),
    "gaussian_noise": (1.0, 0.5, 2.0),
    "bottleneck": (8.0, 2.0),
    "nopeek": (1.0, 8.0),
    "adversarial_only": (40.0, 160.0),
    "quantisation": (8.0, 2.0, 1.0),
    "disco": (0.5, 0.8),
    "feature_dropout": (0.5, 0.8),
    "cem_patrol": (40.0,),
    "laplacian_noise": (1.0,),
}
"""Each defence and its strengths (see the defence for what the number is), most telling first."""


INSIDE: dict[str, tuple[float, ...]] = {
    "mse": (40.0,), "large": (40.0, 160.0), "renewed": (40.0,), "pool": (40.0,),
    "features": (40.0,), "long": (40.0,),
}
"""PATROL's fine-tuning with other attackers inside (`frontier_recipes`) and its strengths."""


def swept(args: Frontier) -> list[Method]:
    """Every defence at each of its strengths on the Taylor-pruned model, PATROL's among them.

    `patrol-more` goes on with PATROL's own model, which has had five epochs of it before.
    """
    points = [
        Method(f"with-{name}", "layer3", defence=name, strength=strength, alpha=args.alpha,
               start="taylor-layer3")
        for name, strengths in SWEEP.items()
        for strength in strengths
    ]
    points += [replace(p, recipe=recipe, alpha=0.0, strength=strength)
               for p in points if p.defence == "patrol" and p.strength == SWEEP["patrol"][0]
               for recipe, strengths in INSIDE.items() for strength in strengths]
    own = Method("patrol-more", "layer3", defence="patrol", strength=args.beta, alpha=args.alpha,
                 start="patrol-layer3")
    # Each defence's first strength comes first, so that an interrupted sweep has a point of each.
    first = [p for p in points if p.strength == SWEEP[p.defence][0]]
    return [own, *first, *[p for p in points if p not in first]]


class Data:
    """The images, parted by seed."""

    def __init__(self, args: Frontier) -> None:
        cache = args.work / "images"
        if not cache.is_dir():
            train_folder, test_folder = find_parts(args.data)
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

    def batches(self, seed: int, *, augment: bool = True, images: int | None = None) -> Batches:
        """The defender's images; the first so many, or with a negative number all the others."""
        indices = None if images is None else torch.arange(len(self.train))[:images]
        if images is not None and images < 0:
            indices = torch.arange(len(self.train))[-images:]
        return Batches(self.train, 128, normalization=NORMALIZATION, augment=augment,
                       shuffle=True, seed=seed, indices=indices)

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
        finetune(model, data.batches(args.seed), config=config, resume=True, device=args.device,
                 checkpoint_dir=args.work / "baseline-checkpoints", progress=False)
        measured = accuracy(model, data.test_batches(), device=args.device)
        seconds = time.perf_counter() - start
        print(f"dense model: accuracy {measured:.4f} in {seconds:.0f} s", flush=True)
        return model.cpu().state_dict(), {"accuracy": measured, "seconds": seconds}

    tensors, meta = kept(args.work / "baseline", make)
    model.load_state_dict(tensors)
    return model.eval(), float(meta["accuracy"])


def defended(args: Frontier, data: Data, method: Method) -> tuple[pp.Split, dict[str, Any]]:
    """The method's split, pruned and trained; and what is known of it without an attack."""
    if method.defence:
        return with_defence(args, data, method)
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
    extra = json.loads((folder / "split.json").read_text())["extra"]
    return split, {**extra, "feature_bytes": pp.feature_bytes(split.feature_shape)}


def defence_of(method: Method) -> Defence:
    """The defence at the method's strength; attackers inside see as much as elsewhere here."""
    settings: dict[str, Any] = {}
    if method.defence in ADVERSARIAL:
        settings["adversary"] = RECIPES[method.recipe].adversary()
    if method.defence == "patrol":
        settings["alpha"] = method.alpha
    strength = None if method.defence == "none" else method.strength
    return make_defence(method.defence, strength, **settings)


def with_defence(args: Frontier, data: Data, method: Method) -> tuple[pp.Split, dict[str, Any]]:
    """A finished pruned model with one more defence, trained on with it for `sweep_epochs`."""
    origin = next(m for m in methods(replace(args, only=())) if m.key == method.start)
    base, known = defended(args, data, origin)
    defence = defence_of(method)
    calibration = next(iter(data.batches(args.seed + 4, augment=False)))[0]
    split = defence.apply(base, calibration=calibration)

    def make() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        start = time.perf_counter()
        objective = defence.objective(split, normalization=NORMALIZATION, seed=args.seed + 30)
        recipe = RECIPES[method.recipe]
        config = recipe.config(FinetuneConfig(epochs=args.sweep_epochs, lr=args.sweep_lr,
                                              seed=args.seed))
        rest = data.batches(args.seed + 6, images=-args.sweep_images) if recipe.pool else None
        result = finetune(split, data.batches(args.seed + 5, images=args.sweep_images),
                          objective=objective, config=config, teacher=dense_model(args, data)[0],
                          progress=False, resume=True, device=args.device, surrogate_batches=rest,
                          checkpoint_dir=args.work / "checkpoints" / method.key)
        known = believed(args, data, objective)
        split.model.cpu()
        measured = accuracy(split.model, data.test_batches())
        seconds = time.perf_counter() - start
        print(f"{method.key}: accuracy {measured:.4f} in {seconds:.0f} s", flush=True)
        return split.model.state_dict(), {"accuracy": measured, "seconds": seconds, **known,
                                          "history": result.history}

    tensors, meta = kept(args.work / "models" / method.key, make)
    split.model.load_state_dict(tensors)
    split.model.eval()
    return split, {**meta, "accuracy_before_finetuning": known["accuracy"],
                   "feature_bytes": defence.upload_bytes(split.feature_shape)}


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
                      device=args.device, checkpoint_dir=args.work / "checkpoints" / method.key)
    known = believed(args, data, objective)
    split.model.cpu()
    return {
        "accuracy": accuracy(split.model, data.test_batches()),
        "accuracy_before_finetuning": before,
        **known,
        "kept": {name: list(counts) for name, counts in pruned.kept.items()},
        "history": result.history,
    }


def believed(args: Frontier, data: Data, objective: pp.PatrolObjective | None) -> dict[str, Any]:
    """What the attackers inside get out of the victims' images, after some steps more."""
    if objective is None or objective.beta == 0:
        return {}
    objective.fit_surrogates(data.batches(args.seed + 3, augment=False), 100)
    victims = Batches(data.victims, 500, normalization=NORMALIZATION)
    belief = objective.belief(victims)
    return {"surrogate_mse": belief.mse, "surrogate_ssim": belief.ssim}


def objective_for(split: pp.Split, alpha: float, beta: float, seed: int) -> pp.PatrolObjective:
    return pp.PatrolObjective(split, F.cross_entropy, alpha=alpha, beta=beta, seed=seed,
                              adversarial_images=RECIPES[""].images, normalization=NORMALIZATION)


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
