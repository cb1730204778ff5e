"""The forms of the Lipschitz term, alone and beside the adversarial one, under fresh attackers.

    python benchmarks/lipschitz.py --data ~/data/cifar10 --work ~/lipschitz

The published Taylor-pruned model is trained on with each form at several weights for as long as the
frontier's other points, and each result meets a fresh decoder; `thorough` ones meet more attacks.
What each form does to the edge is told beside it: the scale-free constant and the spectral bound of
its blocks on held-out images, and what the training without any such term has. Every step is kept
in the working directory; several workers may share it. Rows that are done are in the record.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from frontier import STRONG, Step, attacked, claim_is_ours, row_path, take_over
from frontier_methods import Frontier, Method
from frontier_models import NORMALIZATION, Data, defended, dense_model
from frontier_recipes import LIPSCHITZ, RECIPES
from jsonargparse import auto_cli
from record import ROOT, write

import patrol_prune as pp
from patrol_prune.data import Batches
from patrol_prune.lipschitz import block_lipschitz
from patrol_prune.spectral import SpectralBounds

START = "taylor-layer3"
NOISE = 0.1
"""Standard deviation of the perturbation, that of training, on normalised pixels."""
USUAL = tuple(f"{form}-{alphas[0]:g}" for form, alphas in LIPSCHITZ.items())
"""The recipes at about the same accuracy."""
IMAGES = 256
"""Held out, on which the constants are taken."""


@dataclass(frozen=True)
class Lipschitz:
    """Arguments.

    Attributes:
        data: ImageFolder tree with train/ and test/, images of 32x32.
        work: working directory; one of `frontier.py` with the published models will do.
        beside: weight of the adversarial term that some points have too.
        thorough: recipes of the points that every attack meets; "" is the one without any term.
        threads: of torch.
        collect: attack nothing, and write what is there.
    """

    data: Path
    work: Path
    beside: float = 10.0
    thorough: tuple[str, ...] = ("", *USUAL)
    threads: int = 1
    collect: bool = False


def method(recipe: str, beta: float = 0.0) -> Method:
    """The model that is trained on with a recipe; without attackers inside where `beta` is 0."""
    return Method("with-patrol" if recipe or beta else "with-none", "layer3", recipe=recipe,
                  defence="patrol" if recipe or beta else "none", strength=beta, start=START)


def steps(args: Lipschitz) -> Iterator[Step]:
    """The chosen points under the decoder and others, then other weights, then with `beside`."""
    chosen = [method(recipe) for recipe in args.thorough]
    others = [method(f"{form}-{alpha:g}") for weights in zip(*LIPSCHITZ.values(), strict=True)
              for form, alpha in zip(LIPSCHITZ, weights, strict=True)]
    together = [method(recipe, args.beside) for recipe in ("", *USUAL)]
    for points, attacks in ((chosen, (STRONG, "linear_inverse", "rmle", "unet_ssim")),
                            ([m for m in others if m not in chosen], (STRONG,)),
                            (together, (STRONG,)),
                            (chosen, ("transposed_ssim", "whitened_ssim"))):
        yield from (step(m, attack) for attack in attacks for m in points)


def step(m: Method, attack: str) -> Step:
    """One attack; rMLE goes on from the decoder's answer, on fewer images."""
    if attack == "rmle":
        return Step(m, "white_strong", (STRONG, attack), optimised=True)
    return Step(m, "ssim" if attack == STRONG else attack, (attack,))


@torch.no_grad()
def constants(split: pp.Split, data: Data) -> dict[str, float]:
    """The edge's blocks in evaluation mode: geometric mean of the constants, of the bounds."""
    images = next(iter(Batches(data.victims, IMAGES, normalization=NORMALIZATION)))[0]
    delta = NOISE * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    bounds = SpectralBounds(split.blocks, images[:1])
    bounds.converge(100)
    found = {form: block_lipschitz(split.blocks, images, delta, form=form, reduction="mean")
             for form in ("paper", "scale_free")} | {"spectral": bounds()}
    return {f"constant_{form}": float(k.log().mean().exp()) for form, k in found.items()}


def about(args: Frontier, data: Data, model: Method) -> dict[str, Any]:
    """The term that the training of a finished model had, and what it did to the edge."""
    recipe = RECIPES[model.recipe]
    split, _ = defended(args, data, model)
    return {"form": recipe.lipschitz_form if recipe.alpha else None, "alpha": recipe.alpha,
            "beta": model.strength, **constants(split, data)}


def main(args: Lipschitz) -> None:
    torch.set_num_threads(args.threads)
    frontier = Frontier(data=args.data.expanduser(), work=args.work.expanduser(),
                        models=ROOT / "models", threads=args.threads)
    take_over(frontier)
    data = Data(frontier)
    dense_model(frontier, data)
    claims = frontier.work / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    rows, missing, models = [], [], {}
    for one in steps(args):
        if not args.collect and not row_path(frontier, one).exists() and claim_is_ours(
                claims / one.key):
            attacked(frontier, data, one)
    for one in steps(args):
        if row_path(frontier, one).exists():
            key = one.method.key
            models[key] = models.get(key) or about(frontier, data, one.method)
            rows += [{**row, **models[key]} for row in attacked(frontier, data, one)]
        else:
            missing.append(one.key)
    if not rows:
        raise SystemExit(f"Nothing is measured in {args.work.name} yet.")
    commits = dict.fromkeys(row["made_with"]["commit"] for row in rows)
    settings = {**rows[0]["made_with"], "beside": args.beside, "thorough": args.thorough}
    print(write("lipschitz", rows, commit=", ".join(commits), missing=missing,
                settings={k: v for k, v in settings.items() if k != "commit"}))


if __name__ == "__main__":
    main(auto_cli(Lipschitz, as_positional=False))
