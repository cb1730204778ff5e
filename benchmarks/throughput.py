"""How much faster the white-box attack is for many images at once than for one after another.

    python benchmarks/throughput.py

Both ways run the same number of the same steps in the same process and take turns; one at a time
on the first few images of the batch. Weights and images are random: time does not depend on them,
and the errors beside it show that both ways arrive at the same place. Seconds are medians over
the turns, and the ratio is the median of the ratios within a turn; CPU seconds stand beside the
wall clock's, since a busy machine distorts the latter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jsonargparse import auto_cli
from record import write
from six_layer_cnn import halves, six_layer_cnn
from torch import Tensor, nn

from patrol_prune import Split
from patrol_prune.attacks.base import Knowledge
from patrol_prune.attacks.checks import smooth_images
from patrol_prune.attacks.rmle import RMLE, RMLEConfig
from patrol_prune.metrics import mse
from patrol_prune.models import SmallResNet


@dataclass(frozen=True)
class Throughput:
    """The whole experiment.

    Attributes:
        edges: `model:split`, the model being `six_layer_cnn` or `small_resnet`.
        images: reconstructed at once.
        alone: of these, reconstructed one at a time.
        steps: of the attack, both ways.
        chunk: batch size of the many; 0 is what the attack chooses itself.
        turns: of both ways.
        precisions: of the edge, both ways the same; the first convolution is always "fp32", as
            bfloat16 is too coarse for it.
        threads: of torch.
        device: where both run.
        publish: whether the result is written to `results/throughput.json`.
    """

    edges: tuple[str, ...] = (
        "six_layer_cnn:conv11", "six_layer_cnn:ReLU22", "small_resnet:layer2",
        "small_resnet:layer3",
    )  # fmt: skip
    images: int = 256
    alone: int = 8
    steps: int = 10
    chunk: int = 0
    turns: int = 3
    precisions: tuple[str, ...] = ("fp32", "auto")
    threads: int = 2
    device: str = "cpu"
    publish: bool = True


def edge_of(entry: str) -> nn.Module:
    """A frozen first half with fresh weights, in evaluation mode."""
    name, at = entry.split(":")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "six_layer_cnn":
            edge: nn.Module = halves(six_layer_cnn(), at)[0]
        else:
            edge = Split(SmallResNet(width=16).eval(), torch.zeros(1, 3, 32, 32), at).edge
    return edge.eval()


def timed(work: Callable[[], Tensor], device: str) -> tuple[float, float, Tensor]:
    """Wall-clock and CPU seconds of `work`, and what it returned."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def attack_of(
    config: Throughput, batch_size: int | None, known: Knowledge, precision: str
) -> RMLE:
    """The attack with one setting, ready to reconstruct."""
    settings = RMLEConfig(
        losses=("mse",), spaces=("pixels",), lambda_tv=(1e-3,), lambda_2=(), steps=2,
        tuning_steps=2, tuning_images=2, refine=False, precision=precision,
    )  # fmt: skip
    attack = RMLE(replace(settings, batch_size=batch_size), device=config.device)
    attack.fit(known)
    attack.steps = config.steps
    return attack


def measure(
    config: Throughput, entry: str, images: Tensor, precision: str
) -> dict[str, Any]:
    """One row: both ways in turns, the order of the ways changing from turn to turn."""
    edge = edge_of(entry).to(config.device)
    with torch.no_grad():
        z = edge(images.to(config.device))
    known = Knowledge(images, edge=edge)
    ways = {"together": (attack_of(config, config.chunk or None, known, precision), z),
            "alone": (attack_of(config, 1, known, precision), z[: config.alone])}  # fmt: skip
    seconds: dict[str, list[float]] = {f"{way}_{clock}": [] for way in ways
                                       for clock in ("wall", "cpu")}  # fmt: skip
    errors: dict[str, float] = {}
    for turn in range(config.turns + 1):  # the first one warms up
        for way in sorted(ways, reverse=turn % 2 == 1):
            attack, features = ways[way]
            wall, cpu, guess = timed(lambda a=attack, f=features: a.reconstruct(f), config.device)
            if turn:
                seconds[f"{way}_wall"].append(wall / len(features))
                seconds[f"{way}_cpu"].append(cpu / len(features))
            first = guess[: config.alone].cpu()
            errors[way] = float(mse(images[: config.alone], first).mean())

    def ratio(clock: str) -> float:
        pairs = zip(seconds[f"alone_{clock}"], seconds[f"together_{clock}"], strict=True)
        return round(statistics.median(alone / together for alone, together in pairs), 2)

    return {
        "edge": entry,
        "feature_shape": list(z.shape[1:]),
        "images": config.images,
        "batch_size": ways["together"][0].batch_size,
        "steps": config.steps,
        "alone": config.alone,
        "turns": config.turns,
        "precision": precision,
        "device": config.device,
        **{f"ms_per_image_{name}": round(1000 * statistics.median(values), 2)
           for name, values in seconds.items()},
        "times_faster_wall": ratio("wall"),
        "times_faster_cpu": ratio("cpu"),
        **{f"mse_{way}": round(error, 6) for way, error in errors.items()},
    }  # fmt: skip


def main(config: Throughput) -> None:
    """Measure every edge and write `results/throughput.json`."""
    torch.set_num_threads(config.threads)
    images = smooth_images(config.images, (3, 32, 32), seed=1)
    rows = []
    for entry in config.edges:
        for precision in config.precisions:
            if precision == "fp32" or not entry.endswith("conv11"):
                rows.append(measure(config, entry, images, precision))
                print(rows[-1], flush=True)
    if config.publish:
        print(write("throughput", rows))


if __name__ == "__main__":
    main(auto_cli(Throughput, as_positional=False))
