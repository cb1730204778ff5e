"""Torch-Pruning's usual script, with PATROL's importance in place of a magnitude.

    python integrations/torch_pruning/prune.py --model resnet18 --at layer3 --pruning_ratio 0.5

Everything but the lines between the two marks is what a Torch-Pruning user already has. The data
here are random numbers, so that the script runs anywhere; put your own loader in their place.
"""

from __future__ import annotations

import argparse

import torch
import torch_pruning as tp
import torchvision

import patrol_prune as pp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--at", default="layer3", help="where the network is split")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--pruning_ratio", type=float, default=0.5)
    parser.add_argument("--global_pruning", action="store_true")
    parser.add_argument("--isomorphic", action="store_true")
    parser.add_argument("--iterative_steps", type=int, default=1)
    parser.add_argument("--round_to", type=int)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model, num_classes=10).eval()
    example_inputs = torch.rand(1, 3, args.image_size, args.image_size)
    calibration = [(torch.rand(8, 3, args.image_size, args.image_size),
                    torch.randint(0, 10, (8,))) for _ in range(3)]

    # --- PATROL instead of tp.importance.MagnitudeImportance() ---------------------------------
    split = pp.Split(model, example_inputs, at=args.at)
    objective = pp.PatrolObjective(split, torch.nn.functional.cross_entropy, beta=10.0)
    objective.fit_surrogates(calibration, steps=10)
    importance = pp.PatrolImportance(objective)
    for x, y in calibration:
        importance.accumulate(x, y)
    # ---------------------------------------------------------------------------------------------

    base_macs, base_params = tp.utils.count_ops_and_params(model, example_inputs)
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs,
        importance=importance,
        global_pruning=args.global_pruning,
        isomorphic=args.isomorphic,
        pruning_ratio=args.pruning_ratio,
        iterative_steps=args.iterative_steps,
        round_to=args.round_to,
        ignored_layers=split.protected_layers(),
    )
    for _ in range(args.iterative_steps):
        pruner.step()
    macs, params = tp.utils.count_ops_and_params(model, example_inputs)
    print(f"MACs {base_macs / 1e6:.1f} M -> {macs / 1e6:.1f} M")
    print(f"parameters {base_params / 1e6:.2f} M -> {params / 1e6:.2f} M")
    print(f"uploaded feature {tuple(split.edge(example_inputs).shape)}")


if __name__ == "__main__":
    main()
