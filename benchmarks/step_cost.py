"""What PATROL's terms add to a training step, beside what counting multiply-adds predicts.

    python benchmarks/step_cost.py

One plain fine-tuning step (task and distillation) and one PATROL step (the same and the privacy
terms) take turns in one process, both through `finetune`'s own step, each on its own copy of one
pruned model; which goes first changes from turn to turn. A ratio is the median of the ratios
within a turn. Images and weights are random: time does not depend on them.

The prediction counts multiply-adds with fvcore and takes them to cost the same everywhere. With
`e`, `c`, `t`, `s` those of the edge, the cloud, the teacher and all surrogates, forward and per
image; a backward pass twice a forward one, the half of it that ends in the input or in the
weights once; `B` images in a batch, `A` of them for the surrogates, `P` for the Lipschitz term,
`n` inner steps, `i` power iterations:

    plain               B (3 e + 3 c + t)
    adversarial         A (s + s) for the term, n A (3 s) for the surrogates' own steps
    paper, scale_free   2 P (3 e): the edge, forward and backward, on clean and on noisy images
    spectral            i (e + e) + (e + e): forward and transposed, then forward and weights,
                        on one image
    ratio               (plain + adversarial + Lipschitz) / plain

Multiply-adds do not all take as long, and the sampled Lipschitz forms are computed in float32
whatever the rest is: `pace` times each part alone, in the precision it has in a step, and says how
long one of its multiply-adds takes beside one of a plain step.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from jsonargparse import auto_cli
from record import write
from torch import Tensor
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.finetune import FinetuneConfig
from patrol_prune.lipschitz import LipschitzForm
from patrol_prune.models import SmallResNet
from patrol_prune.precision import autocast, has_native_bf16
from patrol_prune.trainer import Trainer


@dataclass(frozen=True)
class StepCost:
    """The whole experiment.

    Attributes:
        width: base channels of the ResNet.
        at: where it is cut.
        budget_of: the split whose dense edge's multiply-adds the pruned edge may cost.
        max_pruning_ratio: largest share of a group's channels that may go.
        image_size: side of the square images.
        batch: images in a step.
        turns: of both sides, for each row.
        threads: torch's, one table for each.
        precisions: of the training, one table for each; "auto" is bfloat16 where the device has it.
        inner_steps: of the surrogates, for each step of the model.
        adversarial_images: images of a batch that the surrogates see; 0 stands for all.
        publish: whether the result is written to `results/step_cost.json`.
        only: rows to do, as `adversarial`, `scale_free` or `adversarial+scale_free`; all if empty.
    """

    width: int = 16
    at: str = "layer3"
    budget_of: str = "layer1"
    max_pruning_ratio: float = 0.5
    image_size: int = 32
    batch: int = 128
    turns: int = 25
    threads: tuple[int, ...] = (1, 2)
    precisions: tuple[str, ...] = ("auto", "fp32")
    inner_steps: tuple[int, ...] = (1, 2)
    adversarial_images: tuple[int, ...] = (0, 64)
    publish: bool = True
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Terms:
    """Which privacy terms a step has."""

    adversarial: bool = False
    lipschitz: LipschitzForm | None = None
    inner_steps: int = 0
    images: int | None = None

    @property
    def name(self) -> str:
        return "+".join(filter(None, ["adversarial" * self.adversarial, self.lipschitz or ""]))


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one forward pass of one image."""

    edge: int
    cloud: int
    teacher: int
    surrogates: int


def predicted_ratio(
    macs: Macs, terms: Terms, *, batch: int, lipschitz_images: int, iterations: int = 1
) -> float:
    """A PATROL step over a plain one by multiply-adds; the formula is this file's docstring."""
    plain = batch * (3 * macs.edge + 3 * macs.cloud + macs.teacher)
    added = 0
    if terms.adversarial:
        images = batch if terms.images is None else min(terms.images, batch)
        added += images * macs.surrogates * (2 + 3 * terms.inner_steps)
    if terms.lipschitz == "spectral":
        added += (2 * iterations + 2) * macs.edge
    elif terms.lipschitz is not None:
        added += 2 * min(lipschitz_images, batch) * 3 * macs.edge
    return (plain + added) / plain


def measured_terms(config: StepCost) -> Iterator[Terms]:
    """Every row: each term alone, then both."""
    forms: tuple[LipschitzForm | None, ...] = (None, "paper", "scale_free", "spectral")
    adversarial = [Terms(True, None, n, images or None)
                   for n in config.inner_steps for images in config.adversarial_images]
    rows = [*adversarial, *(Terms(lipschitz=form) for form in forms[1:]),
            *(replace(row, lipschitz="scale_free") for row in adversarial)]
    yield from (row for row in rows if not config.only or row.name in config.only)


def pruned_split(config: StepCost) -> tuple[pp.Split, torch.nn.Module]:
    """The pruned model, cut, and its dense teacher."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallResNet(10, width=config.width).eval()
    example = torch.zeros(1, 3, config.image_size, config.image_size)
    budget = pp.edge_macs(pp.Split(model, example, at=config.budget_of))
    split = pp.Split(model, example, at=config.at)
    teacher = copy.deepcopy(model)
    scores = tp.importance.GroupMagnitudeImportance()
    pp.PatrolPruner(model, example, scores, split=split, edge_macs=budget,
                    max_pruning_ratio=config.max_pruning_ratio).step()
    return split, teacher


class Side:
    """One way of training, on a copy of the model, ready for one step after another."""

    def __init__(
        self, split: pp.Split, teacher: torch.nn.Module, terms: Terms | None, batch: int,
        precision: str = "auto",
    ) -> None:
        split = copy.deepcopy(split)
        self.objective = None
        settings = FinetuneConfig(epochs=1, surrogate_warmup_steps=0, precision=precision)
        if terms is not None:
            settings = replace(settings, inner_steps=terms.inner_steps)
            self.objective = pp.PatrolObjective(
                split, F.cross_entropy, alpha=1e-3 if terms.lipschitz else 0.0,
                beta=1.0 if terms.adversarial else 0.0, adversarial_images=terms.images,
                lipschitz_form=terms.lipschitz or "scale_free", precision=precision,
            )
        self.split = split
        self.trainer = Trainer(split.model, self.objective, settings, copy.deepcopy(teacher),
                                torch.device("cpu"), batches=10_000)
        split.model.train()
        self.steps = 0
        generator = torch.Generator().manual_seed(1)
        side = split.example_inputs.shape[-1]
        self.x = torch.randn(batch, 3, side, side, generator=generator)
        self.y = torch.arange(batch) % 10

    def step(self) -> tuple[float, float]:
        """Wall and CPU seconds of one step."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.trainer._train_step(self.steps, self.x, self.y)
        self.steps += 1
        return time.perf_counter() - wall, time.process_time() - cpu


def counts(split: pp.Split, teacher: torch.nn.Module) -> Macs:
    """fvcore's counts of everything that runs in a step."""
    x = split.example_inputs
    objective = pp.PatrolObjective(split, F.cross_entropy, beta=1.0)
    z = torch.zeros(1, *split.feature_shape)
    return Macs(
        pp.count_macs(split.edge, x).total, pp.count_macs(split.cloud, z).total,
        pp.count_macs(teacher, x).total,
        sum(pp.count_macs(d, z).total for d in objective.surrogates.decoders),
    )


def pace(
    config: StepCost, split: pp.Split, teacher: torch.nn.Module, precision: str
) -> dict[str, float]:
    """Time of one multiply-add of each part, as a multiple of one of all of a plain step.

    The parts run forward and back, the teacher forward, the surrogates with their loss and without,
    in turns; `lipschitz` is the edge on as many images as its sampled forms take.
    """
    macs = counts(split, teacher)
    step = Side(split, teacher, None, config.batch, precision)
    edge, cloud, mixed = step.split.edge, step.split.cloud, autocast("cpu", precision)
    objective = pp.PatrolObjective(split, F.cross_entropy, beta=1.0)
    decoders = objective.surrogates
    x, few = step.x, step.x[: objective.lipschitz_images]
    with torch.no_grad():
        z = edge(x)
    z, pixels = z.requires_grad_(), torch.rand_like(x)
    decoders.observe(z, pixels)

    def backward(*outputs: Tensor) -> None:
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()

    def trained(part: torch.nn.Module, inputs: Tensor) -> None:
        with mixed:
            outputs = part(inputs)
        backward(outputs)

    @torch.no_grad()
    def taught() -> None:
        assert step.trainer.distiller is not None
        with mixed:
            step.trainer.distiller.teacher(x)

    parts: dict[str, tuple[Callable[[], object], int, int]] = {
        "plain step": (step.step, config.batch,
                       3 * macs.edge + 3 * macs.cloud + macs.teacher),
        "edge": (lambda: trained(edge, x), config.batch, 3 * macs.edge),
        "lipschitz": (lambda: backward(edge(few)), len(few), 3 * macs.edge),
        "cloud": (lambda: trained(cloud, z), config.batch, 3 * macs.cloud),
        "teacher": (taught, config.batch, macs.teacher),
        "surrogates": (lambda: backward(*decoders.guesses(z, precision=precision)), config.batch,
                       3 * macs.surrogates),
        "surrogates, loss": (
            lambda: decoders.errors(z, pixels, precision=precision).sum().backward(),
            config.batch, 3 * macs.surrogates),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(config.turns + 2):
        for name, (work, _, _) in parts.items():
            began = time.perf_counter()
            work()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    each = {name: statistics.median(seconds[name]) / (images * count)
            for name, (_, images, count) in parts.items()}
    return {name: round(value / each["plain step"], 2) for name, value in each.items()}


def row(
    config: StepCost, split: pp.Split, teacher: torch.nn.Module, terms: Terms, threads: int,
    precision: str,
) -> dict[str, Any]:
    """One row: both sides in turns."""
    torch.set_num_threads(threads)
    plain, patrol = (Side(split, teacher, which, config.batch, precision)
                     for which in (None, terms))
    seconds: dict[str, list[tuple[float, float]]] = {"plain": [], "patrol": []}
    for turn in range(config.turns + 2):
        sides = [("plain", plain), ("patrol", patrol)]
        for name, side in reversed(sides) if turn % 2 else sides:
            taken = side.step()
            if turn >= 2:  # the first two warm up
                seconds[name].append(taken)
    assert patrol.objective is not None
    predicted = predicted_ratio(
        counts(split, teacher), terms, batch=config.batch,
        lipschitz_images=patrol.objective.lipschitz_images,
    )
    pairs = list(zip(seconds["plain"], seconds["patrol"], strict=True))
    wall, cpu = (statistics.median(b[i] / a[i] for a, b in pairs) for i in (0, 1))
    return {
        "threads": threads, "precision": precision,
        "terms": terms.name, "inner_steps": terms.inner_steps,
        "adversarial_images": terms.images or (config.batch if terms.adversarial else 0),
        "lipschitz_form": terms.lipschitz, "turns": config.turns,
        "plain_ms": round(1000 * statistics.median(a[0] for a, _ in pairs), 1),
        "patrol_ms": round(1000 * statistics.median(b[0] for _, b in pairs), 1),
        "measured": round(wall, 3), "measured_cpu": round(cpu, 3),
        "predicted": round(predicted, 3), "measured_over_predicted": round(wall / predicted, 3),
        "measured_over_predicted_cpu": round(cpu / predicted, 3),
    }  # fmt: skip


def main(config: StepCost) -> None:
    """Measure every row and write `results/step_cost.json`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    split, teacher = pruned_split(config)
    rows = []
    for threads, precision in itertools.product(config.threads, config.precisions):
        for terms in measured_terms(config):
            rows.append(row(config, split, teacher, terms, threads, precision))
            print(rows[-1], flush=True)
    if config.publish:
        torch.set_num_threads(config.threads[0])
        print(write("step_cost", rows, batch=config.batch, macs=vars(counts(split, teacher)),
                    bf16=has_native_bf16("cpu"),
                    pace={p: pace(config, split, teacher, p) for p in config.precisions},
                    model=f"SmallResNet(10, width={config.width})", split=config.at,
                    image_size=config.image_size))


if __name__ == "__main__":
    main(auto_cli(StepCost, as_positional=False))
