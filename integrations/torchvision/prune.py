"""Prune the edge of a torchvision backbone to half its MACs, check it, fine-tune, save and load.

    python integrations/torchvision/prune.py --model resnet50 --at layer3

The images are random numbers, so that the script runs anywhere; `--data FOLDER` takes an
ImageFolder tree instead (one folder of images per class), `--weights DEFAULT` trained weights.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms import v2

import patrol_prune as pp

IMAGENET = pp.Normalization.imagenet()
Batches = list[tuple[Tensor, Tensor]]


def build(args: argparse.Namespace, classes: int) -> nn.Module:
    """The dense model; what `load` gets as its factory."""
    if args.weights is None:
        return torchvision.models.get_model(args.model, num_classes=classes).eval()
    model = torchvision.models.get_model(args.model, weights=args.weights)
    if classes != 1000:  # a new last layer on trained ones
        last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
        parent, _, name = last.rpartition(".")
        old = model.get_submodule(last)
        new = (nn.Linear(old.in_features, classes) if isinstance(old, nn.Linear)
               else nn.Conv2d(old.in_channels, classes, old.kernel_size))  # SqueezeNet's
        setattr(model.get_submodule(parent), name, new)
    return model.eval()


def images(args: argparse.Namespace) -> tuple[Batches, int]:
    """A few batches in the model's input space, and the number of classes."""
    size, count = args.image_size, args.batches
    if args.data is None:
        draw = torch.Generator().manual_seed(0)
        shape = (args.batch_size, 3, size, size)
        return [(IMAGENET.to_input(torch.rand(shape, generator=draw)),
                 torch.randint(0, 10, shape[:1], generator=draw)) for _ in range(count)], 10
    crop = v2.Compose([
        v2.PILToTensor(), v2.RandomResizedCrop(size, antialias=True),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET.mean, IMAGENET.std),
    ])  # fmt: skip
    folder = torchvision.datasets.ImageFolder(args.data, transform=crop)
    if len(folder) < args.batch_size:
        raise SystemExit(f"{args.data} has {len(folder)} images, less than one batch of "
                         f"{args.batch_size}. Give a smaller --batch_size.")
    loader = torch.utils.data.DataLoader(folder, args.batch_size, shuffle=True, drop_last=True)
    return [batch for batch, _ in zip(loader, range(count), strict=False)], len(folder.classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--at", default="layer3", help="where the network is split")
    parser.add_argument("--edge_macs", type=float, default=0.5, help="share of the dense edge")
    parser.add_argument("--boundary", choices=("keep", "prune"), default="keep")
    parser.add_argument("--weights", help="torchvision's weights, as in DEFAULT; random without")
    parser.add_argument("--data", help="an ImageFolder tree; random images without it")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--surrogate_steps", type=int, default=20, help="several hundred for real")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--out", help="where to save; a temporary folder without it")
    args = parser.parse_args()
    if min(args.batches, args.batch_size, args.image_size) < 1:
        parser.error("--batches, --batch_size and --image_size have to be at least 1")

    torch.manual_seed(0)
    batches, classes = images(args)
    x = batches[0][0]
    model = build(args, classes)
    teacher = copy.deepcopy(model)

    # split and score
    split = pp.Split(model, x, at=args.at)
    objective = pp.PatrolObjective(
        split, nn.functional.cross_entropy, beta=10.0, normalization=IMAGENET
    )
    objective.fit_surrogates(batches, steps=args.surrogate_steps)
    importance = pp.PatrolImportance(objective)
    for images_, labels in batches:
        importance.accumulate(images_, labels)

    # prune
    pruner = pp.PatrolPruner(
        model, x, importance, split=split, edge_macs=args.edge_macs, boundary=args.boundary
    )
    result = pruner.step()
    print(f"edge MACs {result.edge_macs_before / 1e6:.1f} M -> {result.edge_macs / 1e6:.1f} M, "
          f"budget {result.budget / 1e6:.1f} M; {result.removed_channels} channels removed")
    print(f"uploaded feature {result.feature_shape_before} -> {result.feature_shape}")

    # check
    with torch.no_grad():
        assert torch.equal(split.cloud(split.edge(x)), model(x)), "the halves are not the model"
    assert pp.edge_macs(split) == result.edge_macs <= result.budget, "over the budget"
    print("cloud(edge(x)) equals model(x); fvcore counts the same MACs")

    # a few steps of fine-tuning, with the attackers inside
    done = pp.finetune(
        split, batches, objective=objective, teacher=teacher, progress=False,
        config=pp.FinetuneConfig(epochs=args.epochs, lr=0.01, surrogate_warmup_steps=0),
    )  # fmt: skip
    if done.history:
        print(f"fine-tuned: task loss {done.history[-1]['task']:.3f}")

    # save and load
    model.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(args.out or folder) / "edge.patrol"
        pp.save(split, path, normalization=IMAGENET)
        loaded = pp.load(path, lambda: build(args, classes))
        assert torch.equal(loaded.model(x), model(x)), "load differs from save"
        size = sum(file.stat().st_size for file in path.iterdir())
    print(f"saved {size / 1e6:.1f} MB; loaded, it gives the same answers bit for bit")


if __name__ == "__main__":
    main()
