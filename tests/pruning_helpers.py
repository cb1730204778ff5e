"""Small networks, random statistics and a hand-made objective for the pruning tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.group_table import GroupTable, remove_channels
from patrol_prune.masks import SoftMasks
from patrol_prune.split import Split


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random batch-norm statistics and affine parameters, biases included; evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=g)
            module.bias.data.normal_(0.0, 0.3, generator=g)
            module.running_mean.normal_(0.0, 0.3, generator=g)
            module.running_var.uniform_(0.5, 1.5, generator=g)
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            module.bias.data.normal_(0.0, 0.1, generator=g)
    return model.eval()


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, so that no zero or one hides an error; evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.5 / max(1, p[0].numel()) ** 0.5 + 0.1))
    return model.eval()


def backbone(name: str, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return randomize(torchvision.models.get_model(name, weights=None, num_classes=classes))


def half_of_every_group(masks: SoftMasks, seed: int = 1) -> dict[str, Tensor]:
    """For every masked group, half of its tied units, chosen at random."""
    g = torch.Generator().manual_seed(seed)
    gone = {}
    for name in masks.channels:
        group = masks.table.groups[name]
        size = group.channels // group.tie
        gone[name] = group.units(torch.randperm(size, generator=g)[: size // 2])
    return gone


def assert_zero_is_removal(
    model: nn.Module, x: Tensor, choice: Callable[[SoftMasks], dict[str, Tensor]]
) -> None:
    """Masked against really pruned, under layers that normalise over the masked channels."""

    def run(net: nn.Module) -> Tensor:
        with torch.no_grad():
            return net(x)

    pruned, dense = copy.deepcopy(model), run(model)
    masks = SoftMasks(model, x[:1])
    assert masks.normalised and not masks.inexact
    gone = choice(masks)
    masks.zero(gone)
    with masks.attached():
        masked = run(model)
    remove_channels(GroupTable.build(pruned, x[:1]), gone)
    assert (masked - dense).abs().max() > 1e-2 * dense.abs().max()
    assert (masked - run(pruned)).abs().max() <= 2e-6 * max(1.0, masked.abs().max())


class Block(nn.Module):
    """Two 3x3 convolutions around an identity or projected shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.down: nn.Module = nn.Identity()
        if c_in != c_out or stride != 1:
            self.down = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.down(x)).relu()


class CifarResNet(nn.Module):
    """A ResNet with a CIFAR stem: three stages of `depth` blocks."""

    def __init__(self, width: int = 16, depth: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, c_in = [], width
        for i in range(3):
            blocks = []
            for j in range(depth):
                blocks.append(Block(c_in, width * 2**i, 2 if i and not j else 1))
                c_in = width * 2**i
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(c_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def cifar_resnet(width: int = 16, depth: int = 1, seed: int = 0) -> CifarResNet:
    torch.manual_seed(seed)
    model = CifarResNet(width, depth)
    randomize(model, seed)
    return model


@dataclass
class Terms:
    task: Tensor
    lipschitz: Tensor | None
    adversarial: Tensor | None


class HandMadeObjective:
    """Cross-entropy, a gain in place of the Lipschitz term, and a linear attacker on z."""

    def __init__(self, split: Split, *, lipschitz: bool = True, adversarial: bool = True) -> None:
        self.split, self.lipschitz, self.adversarial = split, lipschitz, adversarial
        self.decoder: Tensor | None = None

    def terms(self, x: Tensor, y: Tensor, *, masks: SoftMasks | None = None) -> Terms:
        if masks is None:
            z = self.split.edge(x)
            logits = self.split.cloud(z)
        else:
            with masks.attached():
                z, logits = masks.split_forward(x)
        lipschitz = z.square().mean() if self.lipschitz else None
        adversarial = None
        if self.adversarial:
            if self.decoder is None:
                g = torch.Generator().manual_seed(5)
                self.decoder = torch.randn(x.shape[1], z.shape[1], generator=g) * 0.1
            small = functional.adaptive_avg_pool2d(x, z.shape[-1])
            guess = torch.einsum("pc,bchw->bphw", self.decoder, z)
            adversarial = (small - guess).square().mean()
        return Terms(functional.cross_entropy(logits, y), lipschitz, adversarial)


class ThreeLayers(nn.Module):
    """Three strided convolutions and a classifier, for 16 x 16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        for i, (c_in, c_out) in enumerate(pairwise(widths), 1):
            layer = nn.Sequential(nn.Conv2d(c_in, c_out, 3, 1 if i == 1 else 2, 1),
                                  nn.BatchNorm2d(c_out), nn.ReLU())
            setattr(self, f"layer{i}", layer)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.flatten(self.pool(z)))
