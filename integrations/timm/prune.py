"""Prune the edges of three timm models to half their MACs, check them, fine-tune, save and load.

    python integrations/timm/prune.py
    python integrations/timm/prune.py --models convnext_atto:stages.1

Weights and images are random, so that the script runs anywhere; `--pretrained` takes timm's
weights, and your own loader goes where `images` is.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import patrol_prune as pp

MODELS = (
    "resnet26:layer2",  # residual streams
    "mobilenetv3_small_050:blocks.3",  # depthwise convolutions, squeeze and excitation
    "regnetz_005:s3",  # grouped convolutions, inverted bottlenecks
)
CLASSES = 10


def images(
    normalization: pp.Normalization, size: int, batches: int, batch_size: int
) -> list[tuple[Tensor, Tensor]]:
    """A few batches in the model's input space."""
    draw = torch.Generator().manual_seed(0)
    return [(normalization.to_input(torch.rand(batch_size, 3, size, size, generator=draw)),
             torch.randint(0, CLASSES, (batch_size,), generator=draw)) for _ in range(batches)]


def prune(args: argparse.Namespace, name: str, at: str) -> None:
    """One model from split to load."""

    def build() -> nn.Module:
        return timm.create_model(name, pretrained=args.pretrained, num_classes=CLASSES).eval()

    began = time.perf_counter()
    model = build()
    data = timm.data.resolve_model_data_config(model)  # what its weights expect of an image
    normalization = pp.Normalization(tuple(data["mean"]), tuple(data["std"]))
    size = args.image_size or data["input_size"][-1]
    batches = images(normalization, size, args.batches, args.batch_size)
    x, teacher = batches[0][0], copy.deepcopy(model)

    # split and score
    split = pp.Split(model, x, at=at)
    objective = pp.PatrolObjective(
        split, nn.functional.cross_entropy, beta=10.0, normalization=normalization
    )
    objective.fit_surrogates(batches, steps=args.surrogate_steps)
    importance = pp.PatrolImportance(objective)
    for images_, labels in batches:
        importance.accumulate(images_, labels)

    # prune
    result = pp.PatrolPruner(
        model, x, importance, split=split, edge_macs=args.edge_macs
    ).step()
    print(f"{name} cut after {split.at}: edge MACs {result.edge_macs_before / 1e6:.1f} M -> "
          f"{result.edge_macs / 1e6:.1f} M, budget {result.budget / 1e6:.1f} M; "
          f"{result.removed_channels} channels removed")

    # check
    with torch.no_grad():
        assert torch.equal(split.cloud(split.edge(x)), model(x)), "the halves are not the model"
    assert pp.edge_macs(split) == result.edge_macs <= result.budget, "over the budget"

    # a few steps of fine-tuning, with the attackers inside
    done = pp.finetune(
        split, batches, objective=objective, teacher=teacher, progress=False,
        config=pp.FinetuneConfig(epochs=args.epochs, lr=0.01, surrogate_warmup_steps=0),
    )  # fmt: skip

    # save and load
    model.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(args.out or folder) / f"{name}.patrol"
        pp.save(split, path, normalization=normalization)
        loaded = pp.load(path, build)
        assert torch.equal(loaded.model(x), model(x)), "load differs from save"
    trained = f"task loss {done.history[-1]['task']:.3f}; " if done.history else ""
    print(f"  halves, budget and file checked; {trained}{time.perf_counter() - began:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="as in name:split")
    parser.add_argument("--edge_macs", type=float, default=0.5, help="share of the dense edge")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights")
    parser.add_argument("--image_size", type=int, help="the model's own without it")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--surrogate_steps", type=int, default=20, help="several hundred for real")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--out", help="where to save; a temporary folder without it")
    args = parser.parse_args()
    if min(args.batches, args.batch_size) < 1:
        parser.error("--batches and --batch_size have to be at least 1")
    entries = [entry.rpartition(":") for entry in args.models]  # hf-hub:... has one of its own
    if not all(name and at for name, _, at in entries):
        parser.error("--models takes each as name:split, as in resnet26:layer2; "
                     "pp.split_points(model, x) lists the splits")
    torch.manual_seed(0)
    for name, _, at in entries:
        prune(args, name, at)


if __name__ == "__main__":
    main()
