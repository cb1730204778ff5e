"""|m| as a score: zero masks go first, and what the masked model computes stays."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from pruning_helpers import cifar_resnet, half_of_every_group
from torch import Tensor, nn

from patrol_prune.budget import MacModel
from patrol_prune.errors import InputError
from patrol_prune.folding import fold_masks
from patrol_prune.mask_importance import MaskImportance
from patrol_prune.masks import SoftMasks
from patrol_prune.pruner import PatrolPruner
from patrol_prune.split import Split


def learned(
    boundary: str = "keep", seed: int = 0
) -> tuple[nn.Module, Split, SoftMasks, dict[str, Tensor], int]:
    """A model whose masks are random, half of every group 0; those channels, and the live MACs."""
    model = cifar_resnet(depth=2)
    split = Split(model, torch.randn(1, 3, 16, 16), at="layer2")
    masks = SoftMasks(model, split.example_inputs, split=split, boundary=boundary)
    g = torch.Generator().manual_seed(seed)
    for name, mask in masks.channels.items():
        masks.set(name, 0.2 + torch.rand(len(mask), generator=g))
    gone = half_of_every_group(masks, seed)
    masks.zero(gone)
    live = {n: m.detach().nonzero().flatten() for n, m in masks.channels.items()}
    return model, split, masks, gone, MacModel(split, masks.table).macs(live)


def masked(model: nn.Module, masks: SoftMasks, x: Tensor) -> Tensor:
    with torch.no_grad(), masks.attached():
        return model(x)


@pytest.mark.parametrize("boundary", ["keep", "prune"])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_goes_is_what_is_zero(boundary: str, seed: int) -> None:
    model, split, masks, gone, macs = learned(boundary, seed)
    x = torch.randn(2, 3, 16, 16)
    expected = masked(model, masks, x)
    importance = MaskImportance(masks)
    fold_masks(masks)
    pruner = PatrolPruner(model, split.example_inputs, importance, split=split, edge_macs=macs,
                          boundary=boundary)
    kept = pruner.choose()
    assert kept.keys() == gone.keys()
    for name, idxs in kept.items():
        assert not set(idxs.tolist()) & set(gone[name].tolist())
        assert len(idxs) + len(gone[name]) == len(masks.channels[name])
    assert pruner.step().edge_macs == macs
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("room", [1.004, 1.02, 1.1, 1.5])
def test_what_comes_back_does_not_matter(room: float) -> None:
    """A looser budget: some channels with a zero mask stay; none with another mask goes."""
    model, split, masks, gone, macs = learned()
    x = torch.randn(2, 3, 16, 16)
    expected = masked(model, masks, x)
    importance = MaskImportance(masks)
    fold_masks(masks)
    pruner = PatrolPruner(model, split.example_inputs, importance, split=split,
                          edge_macs=int(room * macs))
    for name, idxs in pruner.choose().items():
        every = set(range(len(masks.channels[name])))
        assert every - set(idxs.tolist()) <= set(gone[name].tolist())
    result = pruner.step()
    assert macs <= result.edge_macs <= result.budget
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_no_exchange_for_a_channel_of_worth() -> None:
    """Where zero masks alone cannot come within 1% of the budget, the others still stay."""
    model = cifar_resnet(width=4)
    split = Split(model, torch.randn(1, 3, 16, 16), at="layer2")
    masks = SoftMasks(model, split.example_inputs, split=split)
    masks.zero({"conv1": [1]})
    whole = MacModel(split, masks.table).dense
    importance = MaskImportance(masks)
    pruner = PatrolPruner(model, split.example_inputs, importance, split=split,
                          edge_macs=int(0.995 * whole))
    result = pruner.step()
    assert result.removed_channels == 1 and model.conv1.out_channels == 3
    assert result.edge_macs < 0.99 * result.budget


def test_an_unchanged_base_pruner_in_two_steps() -> None:
    model, split, masks, gone, _ = learned("keep")
    x = torch.randn(2, 3, 16, 16)
    expected = masked(model, masks, x)
    importance = MaskImportance(masks)
    fold_masks(masks)
    pruner = tp.pruner.BasePruner(
        model, split.example_inputs, importance=importance, global_pruning=False,
        pruning_ratio=0.5, iterative_steps=2, ignored_layers=split.protected_layers(),
        in_channel_groups={}, out_channel_groups={}, num_heads={}, channel_groups={},
    )  # fmt: skip
    widths = {n: masks.table.groups[n].members[0].module for n in gone}
    pruner.step()
    pruner.step()
    for name, layer in widths.items():
        assert layer.weight.shape[0] == len(masks.channels[name]) - len(gone[name])
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_scores_are_a_copy_of_the_masks_and_go_stale() -> None:
    model, split, masks, _, macs = learned()
    before = copy.deepcopy({n: m.detach().abs() for n, m in masks.channels.items()})
    importance = MaskImportance(masks)
    fold_masks(masks)
    assert all(torch.equal(s, before[n]) for n, s in importance.scores.items())
    pruner = PatrolPruner(model, split.example_inputs, importance, split=split, edge_macs=macs)
    pruner.step()
    with pytest.raises(InputError, match="stale"):
        PatrolPruner(model, split.example_inputs, importance, split=split, edge_macs=0.9).step()


def test_a_group_where_zero_is_no_removal_has_no_score() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.Conv2d(8, 6, 3), nn.ReLU(),
                        nn.Conv2d(6, 2, 3))
    masks = SoftMasks(net, torch.randn(1, 3, 12, 12))
    assert set(MaskImportance(masks).scores) == {"2"} and set(masks.channels) == {"0", "2"}
