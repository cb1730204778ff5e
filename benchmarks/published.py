"""Are the attacks as strong as the published ones? On the network that those were measured on.

    python benchmarks/published.py --data ~/data/cifar10 --work ~/published

He, Zhang and Lee (ACSAC 2019; IEEE IoT-J 2020) attacked a six-layer CIFAR-10 CNN at three places
and reported PSNR and SSIM over 10 images. Here the same network is trained, cut at the same places
and attacked with the same threat models, over 1,000 test images and over the first 10 of them. The
attacker's images are none of those the network was trained on. Every step is kept in the working
directory; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from frontier_methods import DATASET, NORMALIZATION, Data, Frontier
from jsonargparse import auto_cli
from record import write
from six_layer_cnn import SPLITS, accuracy_of, halves, six_layer_cnn, train
from torch import Tensor, nn

from patrol_prune.attacks.base import Attack, Knowledge
from patrol_prune.attacks.inverse_network import InverseNetwork, InverseNetworkConfig
from patrol_prune.attacks.linear_inverse import LinearInverse
from patrol_prune.attacks.query_free import QueryFree
from patrol_prune.attacks.query_free_config import QueryFreeConfig
from patrol_prune.attacks.rmle import RMLE, RMLEConfig
from patrol_prune.data import Batches
from patrol_prune.metrics import mse, psnr, ssim
from patrol_prune.storage import load_state, save_state

PUBLISHED: dict[tuple[str, str], tuple[float, float]] = {
    ("rmle", "conv11"): (37.59, 0.996), ("rmle", "ReLU22"): (19.47, 0.694),
    ("rmle", "ReLU32"): (13.38, 0.163), ("inverse_network", "conv11"): (49.02, 0.999),
    ("inverse_network", "ReLU22"): (19.36, 0.680), ("inverse_network", "ReLU32"): (13.95, 0.220),
    ("query_free", "conv11"): (21.45, 0.914), ("query_free", "ReLU22"): (11.51, 0.172),
    ("query_free", "ReLU32"): (11.98, 0.010),
}
"""PSNR in dB and SSIM, over 10 images; query-free with other data than the model's."""

LAMBDA_TV = {"conv11": 0.0, "ReLU22": 10.0, "ReLU32": 1000.0}
LARGEST_PSNR = 100.0


@dataclass(frozen=True)
class Published:
    """The whole experiment.

    Attributes:
        data: ImageFolder tree with train/ and test/.
        work: where stages are kept between runs.
        train_images: of the network.
        attacker_images: of every attacker, disjoint from those.
        test_images: attacked.
        few_images: the first so many of them, as many as were published.
        epochs: of the network's training.
        query_free_images: of attackers who cannot query; their shadows take long to train.
        rmle_steps: over all test images; the run over few images takes the published 5,000.
        device: where to train and attack.
        threads: of the process.
        seed: of everything that is drawn.
        collect: write the record of the rows that are done, and name those that are not.
        only: the names of the attacks to run, all of them where empty.
    """

    data: Path
    work: Path = Path("runs/published")
    train_images: int = 40_000
    attacker_images: int = 10_000
    test_images: int = 1_000
    few_images: int = 10
    epochs: int = 10
    query_free_images: int = 4_000
    rmle_steps: int = 100
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    collect: bool = False
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One attack at one split; `threat` is the published attack it is compared with."""

    at: str
    attack: str
    threat: str
    few: bool = False

    @property
    def key(self) -> str:
        return f"{self.at}-{self.attack}"


def steps(args: Published) -> list[Step]:
    """Cheap and certain ones first."""
    listed = [(name, threat, few) for name, threat, few in (
        ("linear_inverse", "inverse_network", False),
        ("inverse_network", "inverse_network", False),
        ("rmle", "rmle", False),
        ("query_free", "query_free", False),
        ("rmle_published", "rmle", True),
    ) if not args.only or name in args.only]
    return [Step(at, *one) for one in listed for at in SPLITS]


def network(args: Published, data: Data) -> tuple[nn.Sequential, float]:
    """The trained network and its accuracy."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)
        model = six_layer_cnn()
    folder = args.work / "cnn"
    if not folder.is_dir():
        start = time.perf_counter()
        train(model, Batches(data.train, 128, normalization=NORMALIZATION, augment=True,
                             shuffle=True, seed=args.seed), epochs=args.epochs)
        measured = accuracy_of(model, data.test_batches())
        save_state(folder, model.state_dict(), {
            "accuracy": measured, "seconds": time.perf_counter() - start,
            "train_images": args.train_images, "epochs": args.epochs})
    tensors, meta = load_state(folder)
    model.load_state_dict(tensors)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval().to(args.device), float(meta["accuracy"])


class Target:
    """The network cut at one place, as an attacker meets it."""

    def __init__(self, args: Published, model: nn.Sequential, at: str) -> None:
        self.device, self.at = torch.device(args.device), at
        self.edge, self.cloud = halves(model, at)

    def __call__(self, pixels: Tensor) -> Tensor:
        z: Tensor = self.edge(NORMALIZATION.to_input(pixels.to(self.device)))
        return z

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        return torch.cat([self(part).cpu() for part in pixels.split(250)])

    def shadow(self, seed: int) -> nn.Module:
        """The edge's architecture with fresh weights."""
        fresh = copy.deepcopy(self.edge)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for layer in fresh.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.reset_parameters()
        return fresh.requires_grad_(True)

    def known(self, data: Data, victims: Tensor, *, querying: bool, few: int) -> Knowledge:
        """What the attacker has, only `few` images where he cannot query.

        Features of 64x32x32 are never stored, but asked for.
        """
        pixels = data.attacker.pixels()
        if not querying:
            return Knowledge(pixels, cloud=self.cloud, labels=data.attacker.labels,
                             observed=self.features(victims), shadow_edge=self.shadow
                             ).first(few)
        z = None if self.at == "conv11" else self.features(pixels)
        return Knowledge(pixels, z=z, edge=self)


def decoder_config(at: str, **changes: Any) -> InverseNetworkConfig:
    """A trunk of 16x16 costs four times as much as one of 8x8, and gets half the blocks."""
    deep = at == "ReLU32"
    return InverseNetworkConfig(depth=8 if deep else 4, epochs=10 if deep else 6,
                                max_extensions=1, seed=1000, **changes)


def made(args: Published, step: Step) -> Attack:
    """The attack of a step, untrained."""
    device = args.device
    precision = "fp32" if step.at == "conv11" else "auto"
    # The edge's own normalisation is public with the model.
    blind: dict[str, Any] = {"mean": NORMALIZATION.mean, "std": NORMALIZATION.std, "seed": 1000}
    blind |= {"epochs": 6, "lr": 5e-3} if step.at == "conv11" else {}
    attacks: dict[str, Callable[[], Attack]] = {
        "linear_inverse": lambda: LinearInverse(device=device),
        "inverse_network": lambda: InverseNetwork(decoder_config(step.at), device=device),
        "rmle": lambda: RMLE(
            RMLEConfig(steps=args.rmle_steps, tuning_images=6, tuning_steps=40,
                       precision=precision),
            warm_start=LinearInverse(device=device), fit_warm_start=True, device=device),
        "rmle_published": lambda: RMLE(RMLEConfig.published(LAMBDA_TV[step.at]), device=device),
        "query_free": lambda: QueryFree(QueryFreeConfig(mode="shadow_same", **blind),
                                        device=device),
    }
    return attacks[step.attack]()


def row_path(args: Published, step: Step) -> Path:
    return args.work / "rows" / f"{step.key}.json"


def attacked(args: Published, data: Data, step: Step) -> None:
    """Fit, reconstruct and measure; over all test images and over few."""
    model, accuracy = network(args, data)
    target = Target(args, model, step.at)
    victims = data.victims.pixels()[: args.few_images if step.few else None]
    start = time.perf_counter()
    known = target.known(data, data.victims.pixels(), querying=step.threat != "query_free",
                         few=args.query_free_images)
    attack = made(args, step)
    fit = attack.fit(known)
    fitted = time.perf_counter()
    guess = attack.reconstruct(target.features(victims)).float().cpu()
    seconds = {"fit_seconds": fitted - start, "reconstruct_seconds": time.perf_counter() - fitted}
    paper_psnr, paper_ssim = PUBLISHED[step.threat, step.at]
    mean_image = known.pixels.mean(0, keepdim=True)
    rows = [{
        "dataset": DATASET, "model": "six-layer CNN", "accuracy": accuracy, "split": step.at,
        "attack": step.attack, "threat": step.threat, "images": len(images),
        "attacker_images": len(known.pixels), **scores(images, guess[: len(images)]),
        "published_psnr": paper_psnr, "published_ssim": paper_ssim,
        **{f"floor_{k}": v for k, v in scores(images, mean_image.expand_as(images)).items()},
        **seconds,
        "plateau": None if fit is None else fit.plateau,
        "chosen": None if fit is None or fit.chosen is None else
        {k: v for k, v in fit.chosen.items() if k not in ("tried", "decoder_history")},
    } for images in parts(args, victims)]
    path = row_path(args, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = torch.cat([victims[:8], guess[:8]])
    save_state(args.work / "examples" / step.key, {"images": shown}, {})
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(rows))
    temporary.replace(path)
    for row in rows:
        print(f"{step.key}: {row['images']} images, PSNR {row['psnr']:.2f} ({paper_psnr}), SSIM "
              f"{row['ssim']:.3f} ({paper_ssim}), {sum(seconds.values()):.0f} s", flush=True)


def parts(args: Published, victims: Tensor) -> Iterator[Tensor]:
    """All images, and the first few where there are more."""
    yield victims
    if len(victims) > args.few_images:
        yield victims[: args.few_images]


def scores(images: Tensor, guess: Tensor) -> dict[str, float]:
    values = {"psnr": psnr(images, guess).clamp(max=LARGEST_PSNR), "ssim": ssim(images, guess),
              "mse": mse(images, guess)}
    return {name: float(value.double().mean()) for name, value in values.items()}


def main(args: Published) -> None:
    args = replace(args, work=args.work.expanduser(), data=args.data.expanduser())
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.collect:
        data = Data(Frontier(data=args.data, work=args.work, train_images=args.train_images,
                             attacker_images=args.attacker_images, seed=args.seed,
                             test_images=args.test_images))
        for step in steps(args):
            if not row_path(args, step).exists():
                attacked(args, data, step)
    rows, missing = [], []
    for step in steps(replace(args, only=())):
        path = row_path(args, step)
        if path.exists():
            rows += json.loads(path.read_text())
        else:
            missing.append(step.key)
    settings = {k: v for k, v in asdict(args).items()
                if k not in ("data", "work", "collect", "only")}
    print(write("published", rows, settings=settings, missing=missing))
    asked = [step.key for step in steps(args) if step.key in missing]
    if asked:
        raise SystemExit(f"not done: {', '.join(asked)}")


if __name__ == "__main__":
    main(auto_cli(Published, as_positional=False))
