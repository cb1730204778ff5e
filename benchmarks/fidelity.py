"""Do the scores rank channels as their real removal does?

    python benchmarks/fidelity.py --data DIR

The oracle zeroes every prunable channel of the edge, one after the other, and evaluates the whole
objective `J` on the same calibration images, with the same surrogates and perturbation, in
evaluation mode. A score is as faithful as its Spearman rank correlation with that change of `J`:
over all channels, and within each group. The predicted change of each single term is held against
the real change of that term.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from jsonargparse import auto_cli
from record import write
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vgg import make_layers

import patrol_prune as pp
from patrol_prune.data import Batches, ImageSet, find_parts, load_image_folder
from patrol_prune.evaluation import accuracy
from patrol_prune.finetune import FinetuneConfig, finetune
from patrol_prune.learned_masks import MaskConfig, learn_masks
from patrol_prune.models import SmallResNet, load_weights
from patrol_prune.pixels import Normalization

NORMALIZATION = Normalization((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
TERMS = ("task", "lipschitz", "adversarial")
Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Fidelity:
    """The whole experiment.

    Attributes:
        data: ImageFolder tree with train/ and test/, images of 32x32.
        models: name and split point, as `name:split`; names as in `MODELS`.
        weights: safetensors file of the first model; without it that model is trained as well.
        train_images: for the models, the surrogates and the masks.
        epochs: of a model that is trained here.
        calibration_images: on which scores and changes of `J` are measured.
        adversarial_images: the first so many of them for the adversarial term, and of a batch.
        surrogate_steps: of the surrogates, before anything is scored.
        mask_epochs: of the masks' training.
        edge_macs: budget of the masks' training, as a fraction.
        alpha: weight of each block's Lipschitz constant (scale-free form).
        beta: weight of the adversarial error.
        threads: of torch.
        seed: of everything that is drawn.
    """

    data: Path
    models: tuple[str, ...] = ("small_resnet:layer3", "vgg11_bn:features.17")
    weights: Path | None = None
    train_images: int = 10_000
    epochs: int = 4
    calibration_images: int = 128
    adversarial_images: int = 32
    surrogate_steps: int = 200
    mask_epochs: int = 2
    edge_macs: float = 0.4
    alpha: float = 0.01
    beta: float = 40.0
    threads: int = 1
    seed: int = 0


class NarrowVGG(nn.Module):
    """VGG-11 with batch normalisation at a quarter of its width, for images of 32x32."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128, "M"]
        self.features = make_layers(widths, batch_norm=True)
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[N, 3, 32, 32]` to logits `[N, 10]`."""
        return self.classifier(self.features(x).flatten(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small_resnet": lambda: SmallResNet(10, width=16),
    "vgg11_bn": NarrowVGG,
}


@dataclass
class Images:
    """The images, parted by seed."""

    train: ImageSet
    calibration: ImageSet
    test: ImageSet

    def batches(self, seed: int, *, augment: bool = True) -> Batches:
        return Batches(self.train, 128, normalization=NORMALIZATION, augment=augment,
                       shuffle=True, seed=seed)

    def calibration_batch(self) -> tuple[Tensor, Tensor]:
        whole = Batches(self.calibration, len(self.calibration), normalization=NORMALIZATION)
        return next(iter(whole))


def load_images(args: Fidelity) -> Images:
    train, test = (load_image_folder(folder, 32) for folder in find_parts(args.data))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed))
    end = args.train_images + args.calibration_images
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(args.seed))[:2000]
    return Images(train.subset(order[: args.train_images]),
                  train.subset(order[args.train_images : end]), test.subset(some))


def trained(args: Fidelity, images: Images, name: str, weights: Path | None) -> nn.Module:
    """The model, trained briefly where no weights are given."""
    torch.manual_seed(args.seed)
    model = MODELS[name]()
    if weights is not None:
        load_weights(model, weights)
    else:
        config = FinetuneConfig(epochs=args.epochs, lr=0.1, distill_weight=0.0, seed=args.seed)
        finetune(model, images.batches(args.seed), config=config, progress=False)
    return model.eval()


def objective_of(args: Fidelity, split: pp.Split) -> pp.PatrolObjective:
    return pp.PatrolObjective(split, F.cross_entropy, alpha=args.alpha, beta=args.beta,
                              normalization=NORMALIZATION, seed=args.seed, precision="fp32",
                              adversarial_images=args.adversarial_images)


def real_changes(objective: pp.PatrolObjective, masks: pp.SoftMasks, x: Tensor, y: Tensor
                 ) -> dict[str, Scores]:
    """Term or "J" -> group -> `[C]` change when each channel is really zeroed."""

    def measured() -> dict[str, float]:
        objective.generator.manual_seed(0)
        with torch.no_grad():
            terms = objective.terms(x, y, masks=masks)
        return {"J": float(terms.total), **{t: float(getattr(terms, t)) for t in TERMS}}

    before = measured()
    changes: dict[str, Scores] = {
        key: {n: torch.zeros(len(m)) for n, m in masks.channels.items()} for key in before
    }
    with masks.attached():
        for name, mask in masks.channels.items():
            for channel in range(len(mask)):
                masks.zero({name: [channel]})
                for key, value in measured().items():
                    changes[key][name][channel] = value - before[key]
                masks.set(name, 1.0)
    return changes


def torch_prunings(importance: Any, masks: pp.SoftMasks) -> Scores:
    with torch.no_grad():
        return {n: importance(masks.table.raw[n]).float() for n in masks.channels}


def mask_config(args: Fidelity) -> MaskConfig:
    """Small steps of the weights, so that the masks rank channels of this model."""
    return MaskConfig(epochs=args.mask_epochs, lr=0.02, schedule_share=1.0, seed=args.seed,
                      surrogate_warmup_steps=args.surrogate_steps, max_pruning_ratio=0.75)


def learned(args: Fidelity, images: Images, model: nn.Module, at: str) -> Scores:
    """|m| of masks that were learned from this model on a copy of it."""
    split = pp.Split(copy.deepcopy(model), torch.zeros(1, 3, 32, 32), at=at)
    result = learn_masks(split, images.batches(args.seed + 1), objective_of(args, split),
                         edge_macs=args.edge_macs, config=mask_config(args), teacher=model,
                         progress=False)
    return result.channels


def scored(args: Fidelity, images: Images, objective: pp.PatrolObjective, **how: str
           ) -> pp.PatrolImportance:
    importance = pp.PatrolImportance(objective, **how)
    objective.generator.manual_seed(0)
    importance.accumulate(*images.calibration_batch())
    return importance


def all_scores(args: Fidelity, images: Images, split: pp.Split, objective: pp.PatrolObjective,
               masks: pp.SoftMasks) -> tuple[dict[str, Scores], dict[str, tuple[str, Scores]]]:
    """(score -> group -> `[C]`, name of a prediction -> its term, group -> `[C]` change)."""
    ways = {"patrol": {}, "patrol_j_weights": {"normalizer": "objective"},
            "patrol_absolute": {"task_change": "absolute"},
            "patrol_absolute_j_weights": {"task_change": "absolute", "normalizer": "objective"}}
    made = {name: scored(args, images, objective, **how) for name, how in ways.items()}
    raw, absolute = made["patrol"].raw, made["patrol_absolute"].raw["task"]
    x, y = images.calibration_batch()
    F.cross_entropy(split.model(x), y).backward()
    taylor = torch_prunings(tp.importance.GroupTaylorImportance(), masks)
    split.model.zero_grad(set_to_none=True)
    of_channels = {name: {n: i.scores[n] for n in masks.channels} for name, i in made.items()}
    return {
        **of_channels,
        "learned_masks": learned(args, images, split.model, split.at),
        "taylor": taylor,
        "magnitude": torch_prunings(tp.importance.GroupMagnitudeImportance(), masks),
    }, {
        "second_order_task": ("task", raw["task"]),
        "absolute_task": ("task", absolute),
        "first_order_lipschitz": ("lipschitz", raw["lipschitz"]),
        "first_order_adversarial": ("adversarial", raw["adversarial"]),
    }


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rank correlation; None where one of them is constant."""
    if len(a) < 3 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    return round(float(spearmanr(a.numpy(), b.numpy()).statistic), 4)


def rows_of(about: dict[str, Any], score: str, of: str, predicted: Scores, real: Scores
            ) -> list[dict[str, Any]]:
    """One row over all channels, and one per group."""
    pairs = {n: (predicted[n], real[n]) for n in real}
    whole = tuple(torch.cat([pair[i] for pair in pairs.values()]) for i in (0, 1))
    return [
        {**about, "score": score, "of": of, "group": group, "structures": len(a),
         "spearman": correlation(a, b)}
        for group, (a, b) in {"all": whole, **pairs}.items()
    ]


def measure(args: Fidelity, images: Images, entry: str, weights: Path | None
            ) -> list[dict[str, Any]]:
    """All rows of one model."""
    start = time.perf_counter()
    name, at = entry.split(":")
    model = trained(args, images, name, weights)
    split = pp.Split(model, torch.zeros(1, 3, 32, 32), at=at)
    objective = objective_of(args, split)
    objective.fit_surrogates(images.batches(args.seed + 2, augment=False), args.surrogate_steps)
    masks = pp.SoftMasks(model, split.example_inputs, split=split)
    about = {"model": name, "split": split.at, "weights": "given" if weights else "trained here",
             "accuracy": accuracy(model, Batches(images.test, 500, normalization=NORMALIZATION))}
    scores, predictions = all_scores(args, images, split, objective, masks)
    print(f"{entry}: scored after {time.perf_counter() - start:.0f} s", flush=True)
    real = real_changes(objective, masks, *images.calibration_batch())
    rows = []
    for score, values in scores.items():
        rows += rows_of(about, score, "J", values, real["J"])
    for name, (term, values) in predictions.items():
        rows += rows_of(about, name, term, values, real[term])
    print(f"{entry}: done after {time.perf_counter() - start:.0f} s", flush=True)
    for row in rows:
        if row["group"] == "all":
            print(row, flush=True)
    return rows


def main(args: Fidelity) -> None:
    """Measure every model and write `results/fidelity.json`."""
    torch.set_num_threads(args.threads)
    images = load_images(args)
    rows = []
    for number, entry in enumerate(args.models):
        rows += measure(args, images, entry, args.weights if number == 0 else None)
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "weights", "models")}
    settings["masks"] = asdict(mask_config(args))
    print(write("fidelity", rows, settings=settings))


if __name__ == "__main__":
    main(auto_cli(Fidelity, as_positional=False))
