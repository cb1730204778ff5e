"""What the frontier compares; see `frontier.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

DATASET = "CIFAR-10 (JPEG copy)"


@dataclass(frozen=True)
class Frontier:
    """The whole experiment.

    Attributes:
        data: ImageFolder tree with train/ and test/.
        work: where stages are kept between runs.
        models: finished models and rows of an earlier run, such as `benchmarks/models`, taken
            over where `work` has none of its own.
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
        record: the name of the record that is written.
        only: the names of the methods to do, all of them where empty.
    """

    data: Path
    work: Path = Path("runs/frontier")
    models: Path | None = None
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
    record: str = "frontier"
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """One compared method: how it scores channels, what training keeps on, how it is attacked.

    A `defence` is applied to the finished model of the method whose key is `start`, and trained
    for `sweep_epochs` more. `epochs` and `max_pruning_ratio` stand in for the experiment's.
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
    epochs: int | None = None
    max_pruning_ratio: float | None = None

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
        replace(patrol, name="patrol-masks", score="masks", score_alpha=0.0, score_beta=0.0,
                alpha=0.0, attack_seeds=(0,), every_attack=False),
        *deeper(args),
        Method("dense", "layer2"),
        Method("dense", "layer1"),
        Method("taylor", "layer2", "taylor"),
        replace(patrol, split="layer2", attack_seeds=(0,), every_attack=False),
    ]
    return [row for row in rows if not args.only or row.key in args.only or row.name in args.only]


SWEEP: dict[str, tuple[float, ...]] = {
    "none": (0.0,),
    "patrol": (40.0, 10.0, 3.0, 1.0),
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
SWEPT_LONGER: dict[str, tuple[float, ...]] = {
    "none": (0.0,), "disco": (0.5,), "feature_dropout": (0.5, 0.8), "gaussian_noise": (1.0, 2.0),
}
"""Of these, what is trained three times as long too, as PATROL is."""


DEEPER: dict[str, dict[str, tuple[float, ...]]] = {
    "layer4.0": {"none": (0.0,), "patrol": (10.0, 40.0), "patrol@longer": (10.0,),
                 "disco": (0.5,), "feature_dropout": (0.5,), "gaussian_noise": (1.0,)},
    "layer4": {"none": (0.0,), "none@longer": (0.0,), "patrol@longer": (10.0, 3.0),
               "patrol@longer-whole": (10.0,),
               "patrol@longer-dropout": (10.0,), "patrol@longer-spared-dropout": (10.0,),
               "feature_dropout@longer": (0.5,), "gaussian_noise@longer": (1.0,),
               "disco@longer": (0.5,)},
    "avgpool": {"none": (0.0,), "none@longer": (0.0,), "patrol@longer": (10.0,),
                "none@longest": (0.0,), "patrol@longest": (10.0,),
                "patrol@longer-light-dropout": (10.0,),
                "feature_dropout@longer": (0.5,), "gaussian_noise@longer": (1.0,)},
}
"""Deeper splits whose edge can be brought to the budget with the upload whole, and what stands on
each pruned model: the defence, its recipe, its strengths."""
SAME_MODEL = {"avgpool": "layer4"}
"""Splits with nothing to prune behind another: what stands there begins with that one's model."""
SHALLOWER = "with-patrol-10-layer3"
"""At the shallower cut, what stands beside PATROL's own model of `beta`: Taylor's pruned model,
fine-tuned against attackers for as long as the other defences."""
ATTACKED_LONGER = (SHALLOWER, "with-patrol@longer-10-layer3", "with-patrol@longest-10-layer3",
                   "with-patrol@long-10-layer3", "with-patrol@long-3-layer3",
                   "with-disco@longer-0.5-layer3", "with-disco@long-0.5-layer3",
                   "with-feature_dropout@longer-0.5-layer3",
                   "with-none@longer-0-layer4", "with-patrol@longer-10-layer4",
                   "with-feature_dropout@longer-0.5-layer4",
                   "with-gaussian_noise@longer-1-layer4", "with-disco@longer-0.5-layer4",
                   "with-patrol@longer-dropout-10-layer4",
                   "with-patrol@longer-spared-dropout-10-layer4",
                   "with-patrol@longer-light-dropout-10-avgpool",
                   "with-patrol@half-longer-10-avgpool",
                   "with-patrol@half-longer-light-dropout-10-avgpool",
                   "with-patrol@half-longer-whole-10-avgpool",
                   "with-patrol@half-longer-whole-30-avgpool",
                   "with-patrol@half-longest-whole-60-avgpool",
                   "with-patrol@half-long-60-avgpool",
                   "with-patrol@half-long-30-avgpool",
                   "with-patrol@half-longer-whole-light-dropout-10-avgpool",
                   "patrol-masks-layer3", "magnitude-layer3")
"""What is compared with the best of these, so that its longest attack has others beside it."""
SEEN_OFTEN = ("with-feature_dropout@longer-0.5-layer4", "with-gaussian_noise@longer-1-layer4",
              "with-patrol@longer-dropout-10-layer4",
              "with-patrol@longer-spared-dropout-10-layer4",
              "with-feature_dropout@longer-0.5-avgpool",
              "with-patrol@longer-light-dropout-10-avgpool",
              "with-patrol@half-longer-light-dropout-10-avgpool",
              "with-patrol@half-longer-whole-light-dropout-10-avgpool")
"""What draws for every upload, and is attacked without its draws too: any number of uploads of a
picture come to that."""
CONTROL = "with-none@longer-0-layer4"
"""The pruned model of the best row there, trained on as long without attackers."""
MET_BY_OTHERS = (SHALLOWER, "with-patrol@longer-10-layer3", "with-patrol@long-10-layer3",
                 "with-patrol@half-longer-10-avgpool",
                 "with-patrol@half-longer-whole-10-avgpool",
                 "with-patrol@half-longer-whole-30-avgpool",
                 "with-patrol@half-longest-whole-60-avgpool",
                 "with-patrol@half-long-60-avgpool",
                 "with-patrol@half-long-30-avgpool",
                 "with-patrol@half-longer-whole-light-dropout-10-avgpool",
                 "with-patrol@half-longer-light-dropout-10-avgpool",
                 "with-patrol@longer-dropout-10-layer4", "with-feature_dropout@longer-0.5-layer4",
                 CONTROL)
"""What reaches the goal within a point of the dense model, and what drops values, which a white box
that knows it leaves out, and the control: they meet decoders of other families and the white box
too."""
DEEPER_EPOCHS = 8
"""Of fine-tuning there, before any defence."""
DEEPER_BEST = "with-patrol@longer-whole-10-layer4"
"""Of these, what meets every attack."""
BEST_BEFORE = "with-patrol@longer-10-layer4"
"""What did in earlier records."""
DEEPEST = "with-patrol@longest-10-avgpool"
"""And another, where an attack that fails would look like a defence that holds."""


INSIDE: dict[str, tuple[float, ...]] = {
    "mse": (40.0,), "longer": (10.0, 3.0, 20.0), "longest": (10.0,), "large": (10.0,),
    "pool": (10.0,), "renewed": (10.0,), "features": (10.0,), "long": (10.0, 3.0),
    "narrow-16": (40.0, 10.0), "narrow-8": (40.0,),
}
"""PATROL's fine-tuning with other attackers inside (`frontier_recipes`) and its strengths."""


def swept(args: Frontier) -> list[Method]:
    """Every defence at each of its strengths on the Taylor-pruned model, PATROL's among them.

    `patrol-more` goes on with PATROL's own model, which has had five epochs of it before. PATROL's
    first strength has the Lipschitz term as well; the others have not, as is the default now.
    """
    points = [
        Method(f"with-{name}", "layer3", defence=name, strength=strength, start="taylor-layer3",
               alpha=args.alpha if (name, strength) == ("patrol", 40.0) else 0.0)
        for name, strengths in SWEEP.items()
        for strength in strengths
    ]
    points += [replace(p, recipe=recipe, alpha=0.0, strength=strength)
               for p in points if p.defence == "patrol" and p.strength == SWEEP["patrol"][0]
               for recipe, strengths in INSIDE.items() for strength in strengths]
    points += [Method(f"with-{name}", "layer3", defence=name, strength=strength,
                      start="taylor-layer3", recipe="longer")
               for name, strengths in SWEPT_LONGER.items() for strength in strengths]
    points.append(Method("with-disco", "layer3", defence="disco", strength=0.5,
                         start="taylor-layer3", recipe="long"))
    own = Method("patrol-more", "layer3", defence="patrol", strength=args.beta, alpha=args.alpha,
                 start="patrol-layer3")
    # Each defence's first strength comes first, so that an interrupted sweep has a point of each.
    first = [p for p in points if p.strength == SWEEP[p.defence][0]]
    return [own, *first, *[p for p in points if p not in first]]


def deeper(args: Frontier) -> list[Method]:
    """More layers on the device at the same budget, and defences on top of that model.

    So much must go there that the scores differ: this base is pruned by the score of second order
    for the task alone, up to 75% of a group; Taylor's stands beside it at its own best limit.
    """
    rows = []
    for split, defences in DEEPER.items():
        base = Method("patrol-score-only", SAME_MODEL.get(split, split), "patrol",
                      epochs=DEEPER_EPOCHS, max_pruning_ratio=0.75)
        if split not in SAME_MODEL:
            rows.append(base)
        for name, strengths in defences.items():
            defence, _, recipe = name.partition("@")
            rows += [Method(f"with-{defence}", split, defence=defence, strength=strength,
                            start=base.key, recipe=recipe) for strength in strengths]
    half = Method("patrol-score-only", "layer4", "patrol", epochs=DEEPER_EPOCHS, recipe="half",
                  max_pruning_ratio=0.75)
    rows += [half, Method("with-none", "avgpool", defence="none", start=half.key,
                          recipe="half-longer"),
             *(Method("with-patrol", "avgpool", defence="patrol", strength=strength,
                      start=half.key, recipe=recipe) for recipe, strength in (
                          ("half-longer", 10.0), ("half-longer-light-dropout", 10.0),
                          ("half-longer-whole", 10.0), ("half-longer-whole", 30.0),
                          ("half-longest-whole", 60.0),
                          ("half-long", 60.0), ("half-long", 30.0),
                          ("half-longer-whole-light-dropout", 10.0)))]
    shallow = Method("taylor", "layer3", "taylor", epochs=DEEPER_EPOCHS, recipe="half",
                     max_pruning_ratio=0.5)
    rows += [shallow, Method("with-none", "layer3", defence="none", start=shallow.key,
                             recipe="half-longer")]
    host = Method("taylor", "layer4.0", "taylor", epochs=DEEPER_EPOCHS,
                  max_pruning_ratio=0.5)
    rows += [host, Method("with-none", "layer4.0", defence="none", start=host.key,
                          recipe="taylor")]
    return [replace(row, every_attack=row.key in (DEEPER_BEST, DEEPEST)) for row in rows]
