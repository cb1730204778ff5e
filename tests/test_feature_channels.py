"""How many channels of the transmitted feature a pruner leaves, whatever its budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import patrol_prune as pp
from patrol_prune.errors import BudgetError, InputError
from patrol_prune.models import SmallResNet

X = torch.zeros(1, 3, 16, 16)
STREAM = "layer2.0.downsample.0"


def split_of(at: str = "layer2") -> pp.Split:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return pp.Split(SmallResNet(10, width=8), X, at=at)


def pruner_of(split: pp.Split, edge_macs: float | int = 0.5, **more: Any) -> pp.PatrolPruner:
    return pp.PatrolPruner(split.model, X, tp.importance.GroupMagnitudeImportance(p=2),
                           split=split, edge_macs=edge_macs, boundary="prune", **more)


def test_the_feature_has_so_many_channels_those_of_the_highest_scores() -> None:
    split = split_of()
    wide = split.feature_shape[0]
    pruner = pruner_of(split, feature_channels=5)
    scores = pruner.scores()[0][STREAM]
    assert pruner.choose()[STREAM].tolist() == sorted(scores.topk(5).indices.tolist())
    result = pruner.step()
    assert result.kept[STREAM] == (5, wide) and split.feature_shape == (5, 8, 8)
    assert 0.97 * result.budget < result.edge_macs <= result.budget
    assert "layer3.0.conv1" in result.cloud_changed
    assert split.model(torch.rand(2, 3, 16, 16)).shape == (2, 10)


def test_a_budget_that_takes_nothing_leaves_everything_else() -> None:
    split = split_of()
    pruner = pruner_of(split, edge_macs=1.0, feature_channels=3)
    result = pruner.step()
    assert {name for name, (now, before) in result.kept.items() if now < before} == {STREAM}
    assert split.feature_shape == (3, 8, 8) and result.edge_macs < result.budget


@settings(max_examples=12, deadline=None)
@given(channels=st.integers(1, 20), share=st.floats(0.3, 1.0))
def test_the_choice_keeps_to_both_and_gives_back_what_fits(channels: int, share: float) -> None:
    pruner = pruner_of(split_of(), edge_macs=share, feature_channels=channels)
    kept, scores = pruner.choose(), pruner.scores()[0]
    wide = pruner.initial[STREAM]
    assert len(kept[STREAM]) == min(channels, wide)
    macs = pruner.costs.macs(kept)
    assert macs <= pruner.budget
    for name, idxs in kept.items():  # one channel more of any other group breaks the budget
        gone = sorted({*range(pruner.initial[name])} - {*idxs.tolist()},
                      key=lambda i: -scores[name][i])
        assert not gone or scores[name][gone[0]] <= scores[name][idxs].min()
        if gone and name != STREAM:
            more = {**kept, name: torch.tensor(sorted([*idxs.tolist(), gone[0]]))}
            assert pruner.costs.macs(more) > pruner.budget


def test_steps_narrow_it_at_once_and_the_budget_is_met_at_the_end() -> None:
    split = split_of()
    pruner = pruner_of(split, feature_channels=4, iterative_steps=3)
    for _ in range(3):
        result = pruner.step()
        assert split.feature_shape[0] == 4
    assert result.edge_macs <= pruner.budget


def test_the_smallest_edge_has_it_too() -> None:
    plain, fixed = (pruner_of(split_of(), **more) for more in ({}, {"feature_channels": 5}))
    assert plain.smallest_edge_macs() < fixed.smallest_edge_macs()
    smallest = pruner_of(split_of(), edge_macs=fixed.smallest_edge_macs(), feature_channels=5)
    assert smallest.step().edge_macs == fixed.smallest_edge_macs()
    with pytest.raises(BudgetError, match="smallest reachable"):
        pruner_of(split_of(), edge_macs=fixed.smallest_edge_macs() - 1, feature_channels=5)


def test_channels_that_would_go_are_what_the_regularizer_decays() -> None:
    pruner = pruner_of(split_of(), edge_macs=1.0, feature_channels=3)
    pruner.update_regularizer()
    layers = dict(pruner.model.named_modules())
    for layer in layers.values():
        if isinstance(layer, nn.Conv2d):
            layer.weight.grad = torch.zeros_like(layer.weight)
    pruner.regularize(pruner.model)
    decayed = layers[STREAM].weight.grad.flatten(1).abs().sum(1) > 0
    assert int(decayed.sum()) == len(decayed) - 3
    assert not layers["layer1.0.conv1"].weight.grad.any()


@pytest.mark.parametrize(("more", "told"), [
    ({"boundary": "keep"}, "came 'keep'. Give boundary='prune'"),
    ({"structures": "blocks"}, "feature_channels=4"),
    ({"feature_channels": 0}, "feature_channels"),
    ({"feature_channels": 2.5}, "feature_channels"),
    ({"min_channels": 6}, f"Group '{STREAM}' may not keep 4 channels; the nearest numbers are 6"),
    ({"max_pruning_ratio": 0.5}, "are 8 and 9.*max_pruning_ratio"),
    ({"round_to": 8}, "the nearest numbers are 8 and 16"),
])
def test_what_cannot_be_is_refused_before_any_step(more: dict[str, Any], told: str) -> None:
    split = split_of()
    given = {"boundary": "prune", "feature_channels": 4, **more}
    with pytest.raises((InputError, BudgetError), match=told):
        pp.PatrolPruner(split.model, X, tp.importance.GroupMagnitudeImportance(p=2), split=split,
                        edge_macs=0.9, **given)


def test_layers_that_the_caller_keeps_are_named() -> None:
    split = split_of()
    stream = dict(split.model.named_modules())[STREAM]
    with pytest.raises(InputError, match=f"{STREAM}: .* is in ignored_layers"):
        pruner_of(split, feature_channels=4, ignored_layers=[stream])
    pruner_of(split, feature_channels=split.feature_shape[0], ignored_layers=[stream])
