"""How each model that the frontier compares is made: data, dense model, pruning, defence."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from frontier_methods import Frontier, Method, methods
from frontier_recipes import RECIPES
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.data import Batches, ImageSet, find_parts, load_image_folder
from patrol_prune.defences import Combined, Defence, make_defence
from patrol_prune.evaluation import accuracy, recalibrate_batchnorm
from patrol_prune.finetune import FinetuneConfig, finetune
from patrol_prune.models import SmallResNet
from patrol_prune.pixels import Normalization
from patrol_prune.storage import load_state, save_state

NORMALIZATION = Normalization((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
ADVERSARIAL = ("patrol", "adversarial_only", "bottleneck", "disco", "cem_patrol")



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
    share = RECIPES[method.recipe].budget
    whole = pp.edge_macs(pp.Split(dense, example, at="layer1" if share is None else "layer4"))
    budget = whole if share is None else int(share * whole)
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


def published(name: str) -> pp.Split:
    """A model of `benchmarks/models` by its name there, one trained on from another included."""
    folder = Path(__file__).resolve().parent / "models" / "models"
    method = next((m for m in methods(Frontier(data=Path("."))) if m.key == name), None)
    if method is None or not (folder / name).is_dir():
        raise SystemExit(f"There is no model {name!r} in {folder}, which has "
                         f"{', '.join(sorted(path.name for path in folder.iterdir()))}")
    origin = method.start if method.defence else name
    split = pp.load(folder / str(origin), lambda: SmallResNet(10, width=16))
    if method.defence:
        split.model.load_state_dict(load_state(folder / name)[0])
    return split


def defence_of(method: Method) -> Defence:
    """The defence at the method's strength; attackers inside see as much as elsewhere here."""
    settings: dict[str, Any] = {}
    if method.defence in ADVERSARIAL:
        settings["adversary"] = RECIPES[method.recipe].adversary()
    if method.defence == "patrol":
        recipe = RECIPES[method.recipe]
        settings["alpha"] = recipe.alpha if method.recipe else method.alpha
        settings["lipschitz_form"] = recipe.lipschitz_form
    strength = None if method.defence == "none" else method.strength
    defence = make_defence(method.defence, strength, **settings)
    behind = RECIPES[method.recipe].behind
    return defence if behind is None else Combined((behind, defence))


def with_defence(args: Frontier, data: Data, method: Method) -> tuple[pp.Split, dict[str, Any]]:
    """A finished pruned model with one more defence, trained on with it for `sweep_epochs`."""
    origin = next(m for m in methods(replace(args, only=())) if m.key == method.start)
    base, known = defended(args, data, origin)
    if base.at != method.split:
        history = base.pruning_history
        base = pp.Split(base.model, base.example_inputs, at=method.split)
        base.pruning_history = history
        known = {**known, "feature_bytes": pp.feature_bytes(base.feature_shape)}
    channels = RECIPES[method.recipe].upload_channels
    if channels is not None:
        base = narrowed(args, data, base, origin, channels)
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


def narrowed(args: Frontier, data: Data, split: pp.Split, origin: Method, channels: int
             ) -> pp.Split:
    """The split with this many channels left in what it uploads, by PATROL's score; kept."""
    folder = args.work / "models" / f"{origin.key}-upload-{channels}"
    if not folder.is_dir():
        method = Method("patrol", origin.split, "patrol", score_beta=args.beta)
        importance = scored(args, data, method, split)
        pp.PatrolPruner(split.model, split.example_inputs, importance, split=split, edge_macs=1.0,
                        boundary="prune", feature_channels=channels).step()
        recalibrate_batchnorm(split.model, data.batches(args.seed + 1))
        pp.save(split, folder)
    return pp.load(folder, lambda: SmallResNet(10, width=args.width))


def prune_and_finetune(args: Frontier, data: Data, method: Method, dense: SmallResNet,
                       split: pp.Split, budget: int) -> dict[str, Any]:
    """Score, prune to the budget, repair; the attackers inside are fit on the defender's images.

    Learned masks take more than half of the epochs, so that no method trains for longer.
    """
    epochs = whole = method.epochs or args.finetune_epochs
    if method.score == "masks":
        epochs = max(1, whole // 2 + 1)
        pruned = masked(args, data, method, dense, split, budget, epochs)
        epochs = max(1, whole - epochs)
    else:
        pruner = pp.PatrolPruner(split.model, split.example_inputs,
                                 scored(args, data, method, split), split=split,
                                 edge_macs=budget, boundary="keep",
                                 max_pruning_ratio=method.max_pruning_ratio
                                 or args.max_pruning_ratio)
        pruned = pruner.step()
    objective = objective_for(split, method.alpha, method.beta, args.seed + 10)
    recalibrate_batchnorm(split.model, data.batches(args.seed + 1))
    before = accuracy(split.model, data.test_batches())
    config = FinetuneConfig(epochs=epochs, lr=0.1, seed=args.seed)
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


def masked(args: Frontier, data: Data, method: Method, dense: SmallResNet, split: pp.Split,
           budget: int, epochs: int) -> Any:
    """Masks and weights learned together down to the budget, then hardened."""
    config = pp.MaskConfig(epochs=epochs, lr=0.1, max_pruning_ratio=args.max_pruning_ratio,
                           seed=args.seed)
    learned = pp.learn_masks(
        split, data.batches(args.seed + 7), objective_for(split, method.alpha, method.beta,
                                                          args.seed + 40),
        edge_macs=budget, config=config, teacher=copy.deepcopy(dense), progress=False,
        resume=True, checkpoint_dir=args.work / "checkpoints" / f"{method.key}-masks",
        device=args.device)
    split.model.cpu()
    return learned.harden()


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
