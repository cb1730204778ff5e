"""What the answers of the frontier's best models give away, beside what their uploads do.

    python benchmarks/answers.py --data ~/data/cifar10 --work ~/frontier-1 --seed 1

Whoever has the cloud's half turns an upload into the model's answers, so that an attack on uploads
which sees less than the same attack on these answers has failed, and has not met a defence. The
working directory is one of `frontier.py` with that seed, and has the models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from frontier import STRONG, Step, attack_config, dense_accuracy
from frontier_methods import Frontier, methods
from frontier_models import NORMALIZATION, Data, defended
from jsonargparse import auto_cli
from record import ROOT, record, write

import patrol_prune as pp

MODELS = ("with-patrol@half-longer-whole-light-dropout-10-avgpool",
          "with-patrol@half-longest-whole-60-avgpool", "with-patrol@half-long-60-avgpool",
          "with-none@half-longer-0-avgpool")
KEPT = ("attack", "ssim", "ssim_worst5", "mse", "plateau", "attacker_images")


def main(data: Path, work: Path, seed: int = 0, models: Sequence[str] = MODELS,
         attacks: Sequence[str] = (STRONG, "linear_inverse"), threads: int = 1) -> None:
    """Attack each model's answers; its rows in `results/answers.json` are replaced.

    Args:
        data: ImageFolder tree with train/ and test/, as the frontier's.
        work: the frontier's working directory.
        seed: its training seed.
        models: keys of models that are finished there.
        attacks: on the answers.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    args = Frontier(data=data.expanduser(), work=work.expanduser(), threads=threads, seed=seed)
    images = Data(args)
    found = {m.key: m for m in methods(args)}
    if unknown := [key for key in models if not (args.work / "models" / key).is_dir()]:
        raise SystemExit(f"No finished model {', '.join(unknown)} in {work.name}: run frontier.py "
                         "there first.")
    for key in models:
        method = found[key]
        split, known = defended(args, images, method)
        report = pp.audit(
            SimpleNamespace(edge=torch.nn.Sequential(split.edge, split.cloud)),
            images.attacker.images, images.victims.images, attacks=attacks, seeds=(1000,),
            normalization=NORMALIZATION, config=attack_config(args, Step(method, "")),
            attacker_labels=images.attacker.labels)
        keep([{"model": key, "train_seed": seed, "accuracy": known["accuracy"],
               "dense_accuracy": dense_accuracy(args), **{k: one[k] for k in KEPT}}
              for one in report.records if one["subject"] == "edge"])


def keep(rows: list[dict[str, Any]]) -> None:
    """Put a model's rows into the record in place of its earlier ones; all tell their commit."""
    path = ROOT / "results" / "answers.json"
    of = {(row["model"], row["train_seed"]) for row in rows}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    about = record("answers", [])
    rows = [{**row, "commit": about["commit"]} for row in rows]
    kept = [row for row in before if (row["model"], row["train_seed"]) not in of]
    print(write("answers", [*kept, *rows]))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
