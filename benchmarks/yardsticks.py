"""What an SSIM means on the frontier's images, and what is given away without any feature.

    python benchmarks/yardsticks.py --data ~/.cache/patrol_prune/cifar10 --work runs/frontier

Over the same test images as `frontier.py`: the mean image of the attacker's, the mean image of the
victim's class, thumbnails of the victim's own image, and a decoder that is given the dense model's
answers alone: whoever offers the service at all gives away that much.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from frontier import Step, attack_config
from frontier_methods import Frontier, Method
from frontier_models import NORMALIZATION, Data, dense_model
from jsonargparse import auto_cli
from record import write
from torch import Tensor

import patrol_prune as pp
from patrol_prune.audit_scores import score, thumbnails

DECODERS = ("inverse_network_ssim", "linear_inverse")


def row_of(name: str, originals: Tensor, guess: Tensor, **more: Any) -> dict[str, Any]:
    """Means over the images."""
    numbers, _ = score(originals, guess)
    return {"what": name, **{k: numbers[k] for k in ("ssim", "ssim_worst5", "mse")}, **more}


def main(data: Path, work: Path = Path("runs/frontier"), threads: int = 1) -> None:
    """Measure everything; write `results/yardsticks.json`.

    Args:
        data: ImageFolder tree with train/ and test/, as the frontier's.
        work: where the frontier's stages are kept; its dense model is trained there if need be.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    args = Frontier(data=data.expanduser(), work=work.expanduser(), threads=threads)
    images = Data(args)
    originals = images.victims.images.float() / 255
    known = images.attacker.images.float() / 255
    rows = [row_of("mean image", originals, known.mean(0).expand_as(originals))]
    of_class = torch.stack([known[images.attacker.labels == c].mean(0)
                            for c in range(len(images.test.classes))])
    rows.append(row_of("mean image of its class", originals, of_class[images.victims.labels]))
    rows += [{"what": "thumbnail", **row} for row in thumbnails(originals, 1.0)]
    model, accuracy = dense_model(args, images)
    answers = SimpleNamespace(edge=model)
    config = attack_config(args, Step(Method("dense", "layer4"), ""))
    report = pp.audit(answers, images.attacker.images, images.victims.images, attacks=DECODERS,
                      normalization=NORMALIZATION, config=replace(config, epochs=2 * config.epochs),
                      attacker_labels=images.attacker.labels)
    for record in report.records:
        if record["subject"] == "edge":
            rows.append({"what": "answers", "accuracy": accuracy,
                         **{k: record[k] for k in ("attack", "ssim", "ssim_worst5", "mse",
                                                   "plateau", "attacker_images")}})
    print(write("yardsticks", rows, victim_images=len(originals), threads_used=threads))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
