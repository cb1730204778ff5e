"""Folded masks: the model alone is the masked model, before and after the zeros are removed."""

from __future__ import annotations

import copy

import pytest
import torch
from pruning_helpers import backbone, cifar_resnet, half_of_every_group
from torch import Tensor, nn

from patrol_prune.errors import InputError, UnsupportedModelError
from patrol_prune.folding import cannot_fold, fold_masks
from patrol_prune.group_table import GroupTable, remove_channels
from patrol_prune.masks import SoftMasks
from patrol_prune.removal import remove_blocks
from patrol_prune.split import Split


def softened(masks: SoftMasks, seed: int = 3) -> dict[str, Tensor]:
    """Random masks on [0.3, 2), tied channels alike; half of every group is 0. Returns those."""
    g = torch.Generator().manual_seed(seed)
    for name, mask in masks.channels.items():
        tie = masks.table.groups[name].tie
        masks.set(name, (0.3 + 1.7 * torch.rand(len(mask) // tie, generator=g)).repeat(tie))
    gone = half_of_every_group(masks, seed)
    masks.zero(gone)
    return gone


def close(a: Tensor, b: Tensor) -> bool:
    """Within 1e-5 of the larger of 1 and the values' own size."""
    return bool((a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())))


NETWORKS = ["cifar", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "regnet_y_400mf"]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name == "densenet121" else name
    for name in NETWORKS])
def test_masked_is_folded_is_pruned(name: str) -> None:
    """Residual, depthwise, squeeze-and-excite, concatenation, grouped convolutions."""
    model = cifar_resnet(depth=2) if name == "cifar" else backbone(name)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    masks = SoftMasks(model, x[:1])
    gone = softened(masks)
    with torch.no_grad():
        plain = model(x)
        with masks.attached():
            masked = model(x)
        fold_masks(masks)
        folded = model(x)
        remove_channels(GroupTable.build(model, x[:1]), gone)
        pruned = model(x)
    assert not close(plain, masked)
    assert close(folded, masked) and close(pruned, masked)


@pytest.mark.parametrize(("at", "kind"), [("layer2", "consumed"), ("layer2.0", "coupled")])
def test_a_crossing_group_is_folded_into_the_clouds_consumers(at: str, kind: str) -> None:
    model = backbone("resnet50") if kind == "coupled" else cifar_resnet(depth=2)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    split = Split(model, x[:1], at=at)
    masks = SoftMasks(model, x[:1], split=split, boundary="prune")
    crossing = next(g for g in masks.table.groups.values() if g.crossing)
    assert crossing.crossing == kind
    softened(masks)
    with torch.no_grad():
        z_seen, masked = masks.split_forward(x)
        mask = masks.channels[crossing.name].detach().clone()
        fold_masks(masks)
        z = split.edge(x)
        assert close(split.cloud(z), masked) and close(model(x), masked)
        assert close(z * mask.view(1, -1, 1, 1), z_seen)


def test_folding_leaves_masks_that_change_nothing() -> None:
    model, x = cifar_resnet(), torch.randn(2, 3, 16, 16)
    masks = SoftMasks(model, x[:1])
    softened(masks)
    pattern = {n: m.detach() == 0 for n, m in masks.channels.items()}
    parameters = list(model.parameters())
    fold_masks(masks)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        alone = model(x)
        with masks.attached():
            assert torch.equal(model(x), alone)
    fold_masks(masks)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(m.detach() == 0, pattern[n]) for n, m in masks.channels.items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_transposed_and_flattened_consumers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip
    x = torch.randn(2, 3, 9, 9)
    masks = SoftMasks(net, x[:1])
    softened(masks)
    with torch.no_grad():
        with masks.attached():
            masked = net(x)
        fold_masks(masks)
        assert close(net(x), masked)


class Shared(nn.Module):
    """Two layers that read two groups, and may get one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.c(self.a(x).relu()), self.d(self.b(x).relu())], 1)
        return self.head(y.mean((2, 3)))


def test_refusals() -> None:
    model, x = cifar_resnet(), torch.randn(1, 3, 16, 16)
    masks = SoftMasks(model, x)
    with masks.attached(), pytest.raises(InputError, match="attached"):
        fold_masks(masks)
    remove_channels(GroupTable.build(model, x), {"conv1": [0]})
    with pytest.raises(InputError, match="pruned since"):
        fold_masks(masks)
    tied = Shared()
    shared = SoftMasks(tied, x)
    shared.set("a", [1.0, 0.5, 1.0, 1.0])
    tied.d.weight = tied.c.weight
    assert not SoftMasks(tied, x).channels  # tied before, they are not masked at all
    with pytest.raises(UnsupportedModelError, match="share the weight"):
        fold_masks(shared)


def test_a_block_s_mask_is_folded_into_the_end_of_its_branch() -> None:
    """Convolution with bias and batch norm alike; the zero's block can go then."""
    model = cifar_resnet(depth=3)
    model.layer1[1].bn2 = nn.Identity()
    model.layer1[1].conv2 = nn.Conv2d(16, 16, 3, padding=1)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    split = Split(model, x[:1], at="layer2")
    masks = SoftMasks(model, x[:1], split=split, blocks=True)
    assert list(masks.blocks) == ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2"]
    assert not cannot_fold(masks)
    softened(masks)
    for name, value in (("layer1.0", 0.4), ("layer1.2", 1.7), ("layer2.1", 0.0)):
        masks.blocks[name].data.fill_(value)
    with torch.no_grad():
        with masks.attached():
            masked = model(x)
        fold_masks(masks)
        assert close(model(x), masked)
        assert [float(m) for m in masks.blocks.values()] == [1.0, 1.0, 1.0, 0.0, 1.0]
        remove_blocks(split, ["layer2.1"])
        assert close(model(x), masked)


def test_a_block_s_mask_that_has_no_place_is_refused() -> None:
    model, x = cifar_resnet(depth=2), torch.randn(2, 3, 16, 16)
    model.layer1[1].bn2 = nn.Sequential(model.layer1[1].bn2, nn.Tanh())
    masks = SoftMasks(model, x[:1], blocks=True)
    model.layer1[0].bn2.weight = model.layer1[0].bn1.weight
    assert cannot_fold(masks) == {
        "layer1.0": "the last layer of its branch shares its weights",
        "layer1.1": "its branch ends in a Tanh",
    }
    before = copy.deepcopy(model.state_dict())
    masks.set("conv1", 0.5)
    for name in cannot_fold(masks):
        masks.blocks[name].data.fill_(0.5)
        with pytest.raises(UnsupportedModelError, match=f"0.5 of block '{name}'"):
            fold_masks(masks)
        masks.blocks[name].data.fill_(1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
