"""The BNNeck: where it sits, what is embedded, and that cutting and masking stay exact."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import patrol_prune as pp
from patrol_prune.defences import FeatureDropout
from patrol_prune.errors import BudgetError, InputError, UnsupportedModelError
from patrol_prune.models import SmallResNet
from patrol_prune.reid_model import BNNeck, add_bnneck, build_reid_model, embed, neck_of


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = add_bnneck(SmallResNet(5, width=4), 7)
        made.train()
        for _ in range(3):  # statistics other than 0 and 1
            made(torch.randn(8, 3, 16, 16))
    return made.eval()


def test_the_neck_is_a_batchnorm_without_a_shift_before_a_layer_without_a_bias() -> None:
    head = BNNeck(3, 2).eval()
    head.neck.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    head.neck.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
    with torch.no_grad():
        head.neck.weight.copy_(torch.tensor([1.0, 3.0, 1.0]))
    f = torch.tensor([[3.0, 2.5, 4.0]])
    expected = torch.tensor([[1.0, 1.5, 2.0]])  # (f - mean) / std * weight
    torch.testing.assert_close(head.neck(f), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head(f), expected @ head.classifier.weight.T, rtol=1e-4, atol=1e-4)
    assert [n for n, p in head.named_parameters() if p.requires_grad] == [
        "neck.weight", "classifier.weight"
    ]


def test_the_model_keeps_its_layers_and_gets_a_head(model: nn.Module) -> None:
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    assert isinstance(model.fc, BNNeck) and neck_of(model) is model.fc.neck
    assert model.fc.neck.num_features == 32
    assert "layer3" in {p.name for p in pp.split_points(model, torch.zeros(1, 3, 16, 16))}


def test_a_defence_behind_the_edge_leaves_the_head_where_it_is_found(model: nn.Module) -> None:
    split = pp.Split(copy.deepcopy(model), torch.zeros(1, 3, 16, 16), at="layer2")
    noisy = FeatureDropout(0.0).apply(split)
    assert neck_of(noisy.model) is neck_of(split.model)
    x = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(embed(noisy.model, [x]), embed(model, [x]))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvisions_backbones_get_one_too(name: str) -> None:
    model = build_reid_model(name, 6, image_size=32)
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 6)
    features = {"resnet18": 512, "mobilenet_v3_small": 1024}[name]
    assert neck_of(model).num_features == features
    head = dict(model.named_modules())["classifier" if name.startswith("mob") else "fc"]
    assert all(m.p == 0.0 for m in head.modules() if isinstance(m, nn.Dropout))


def test_embeddings_are_the_features_scaled_by_hand(model: nn.Module) -> None:
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    headless = copy.deepcopy(model)
    headless.fc = nn.Identity()
    with torch.no_grad():
        f, neck = headless(x), model.fc.neck
        expected = (f - neck.running_mean) / (neck.running_var + neck.eps).sqrt() * neck.weight
    model.train()
    found = embed(model, x.split(2))
    assert model.training and not neck._forward_hooks
    model.eval()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    logits = model(x)
    torch.testing.assert_close(found @ model.fc.classifier.weight.T, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at", ["layer1", "layer2", "layer4"])
def test_the_halves_are_the_model(model: nn.Module, at: str) -> None:
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    split = pp.Split(model, x, at=at)
    with torch.no_grad():
        assert torch.equal(split.cloud(split.edge(x)), model(x))


def test_masks_of_ones_change_nothing_and_zeros_are_the_removal(model: nn.Module) -> None:
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    copied = copy.deepcopy(model)
    split = pp.Split(copied, x, at="layer2")
    masks = pp.SoftMasks(copied, x, split=split, boundary="keep")
    with torch.no_grad(), masks.attached():
        assert torch.equal(copied(x), model(x))
        for mask in masks.channels.values():
            mask[::2] = 0.0
        masked = copied(x)
    with pytest.raises(BudgetError) as refused:
        _pruner(split, x, 2).step()
    _pruner(split, x, refused.value.smallest_edge_macs).step()  # half of every group goes
    assert copied.layer1[0].conv1.out_channels == 2
    assert not torch.allclose(masked, model(x), atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(copied(x), masked, rtol=1e-4, atol=1e-5)
        assert torch.equal(split.cloud(split.edge(x)), copied(x))


def _pruner(split: pp.Split, x: torch.Tensor, macs: int) -> pp.PatrolPruner:
    return pp.PatrolPruner(split.model, x, _odd_ones_stay, split=split, edge_macs=macs,
                           boundary="keep", max_pruning_ratio=0.5)


def _odd_ones_stay(group: Any) -> torch.Tensor:
    """Torch-Pruning's contract: one score per channel."""
    return torch.arange(len(group[0].idxs), dtype=torch.float32) % 2 + 0.5


def test_what_is_no_reid_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="last linear layer"):
        add_bnneck(nn.Sequential(nn.Conv2d(3, 4, 1)), 3)
    with pytest.raises(UnsupportedModelError, match="last linear layer"):
        add_bnneck(nn.Linear(3, 4), 3)
    with pytest.raises(InputError, match="two identities"):
        add_bnneck(SmallResNet(3, width=4), 1)
    with pytest.raises(InputError, match="without a BNNeck"):
        neck_of(SmallResNet(3, width=4))
    with pytest.raises(InputError, match="came none"):
        embed(add_bnneck(SmallResNet(3, width=4), 3), [])
