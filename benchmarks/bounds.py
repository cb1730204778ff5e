"""What can be proved about the frontier's noisy models, beside what the attackers reached.

    python benchmarks/bounds.py --work ~/frontier

Reads the models and rows that `frontier.py` left in its working directory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from frontier_methods import NORMALIZATION, Data, Frontier, defended, methods
from jsonargparse import auto_cli
from record import write
from torch import Tensor, nn

from patrol_prune.access import lent
from patrol_prune.bounds import conditional_entropy_bound, diagonal_fisher_information
from patrol_prune.jacobian import jacobian_effective_rank


@dataclass(frozen=True)
class Bounds:
    """The whole experiment.

    Attributes:
        work: of the frontier.
        images: over which the Fisher information is averaged.
        rank_images: at which the Jacobian's rank is estimated.
        covariance_images: over which the features' spread is measured.
        probes: sign vectors.
    """

    work: Path
    images: int = 64
    rank_images: int = 8
    covariance_images: int = 2_000
    probes: int = 16


def main(args: Bounds) -> None:
    torch.set_num_threads(1)
    frontier = Frontier(data=args.work, work=args.work.expanduser())
    data = Data(frontier)
    rows: list[dict[str, Any]] = []
    for method in methods(frontier):
        noisy = method.defence == "gaussian_noise"
        attacked = closest(frontier.work / "rows", method.key)
        if attacked is None or not (noisy or method.every_attack):
            continue
        if not (frontier.work / "models" / method.key).is_dir():
            continue  # never trained here
        split, _ = defended(frontier, data, method)
        split.model.eval()
        row = {"method": method.name, "strength": method.strength if noisy else None,
               "attack": attacked["attack"], "attacker_mse": attacked["mse"],
               "attacker_ssim": attacked["ssim"],
               "floor_mse": attacked["floor_mse"], "accuracy": attacked["accuracy"]}
        features = split.edge.features if noisy else split.edge
        sigma = float(split.edge.upload.sigma) if noisy else None
        rows.append({**row, **bounds(args, data, features, sigma)})
        print(rows[-1], flush=True)
    settings = {k: getattr(args, k) for k in ("images", "rank_images", "covariance_images",
                                              "probes")}
    print(write("bounds", rows, settings=settings))


def closest(rows: Path, key: str) -> dict[str, Any] | None:
    """The row with the smallest error of all attacks on a model over all test images."""
    found: list[dict[str, Any]] = []
    for path in rows.glob(f"{key}-*.json"):
        content = json.loads(path.read_text())
        found += content if isinstance(content, list) else [content]
    found = [row for row in found if row.get("victim_images", 1_000) == 1_000]
    return min(found, key=lambda row: float(row["mse"]), default=None)


def bounds(args: Bounds, data: Data, features: nn.Module, sigma: float | None) -> dict[str, Any]:
    """The figures of one edge, its noise left out; the bounds only where there is noise."""
    pixels = data.victims.pixels()

    def edge(x: Tensor) -> Tensor:
        z: Tensor = features(NORMALIZATION.to_input(x))
        return z

    with lent(features):
        rank = jacobian_effective_rank(edge, pixels[: args.rank_images])
        found: dict[str, Any] = {"participation_ratio": float(rank.participation_ratio.mean())}
        if sigma is None:
            return found
        leakage = diagonal_fisher_information(edge, pixels[: args.images], sigma,
                                              probes=args.probes)
        with torch.no_grad():
            known = data.attacker.pixels(slice(args.covariance_images))
            z = torch.cat([edge(part) for part in known.split(250)])
    diagonal = conditional_entropy_bound(z, sigma, pixels[0].numel())
    shrunk = conditional_entropy_bound(z, sigma, pixels[0].numel(), shrinkage="auto")
    return {**found, "sigma": sigma, "unbiased_mse_bound": leakage.mse_bound,
            "unbiased_worst_mse_bound": leakage.worst_mse_bound,
            "information_nats": diagonal.information, "entropy_power_factor": diagonal.mse_factor,
            "shrunk_information_nats": shrunk.information,
            "shrunk_entropy_power_factor": shrunk.mse_factor}


if __name__ == "__main__":
    main(auto_cli(Bounds, as_positional=False))
