"""How many channels of the transmitted feature a pruner leaves, whatever its budget."""

from __future__ import annotations

import itertools
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


@pytest.mark.parametrize("seed", [1, 6])
def test_what_feeds_the_upload_is_priced_by_its_width_then(seed: int) -> None:
    """Priced by the whole one, the layer before the cut gave up most of its channels."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = []
        for wide, narrow in ((3, 32), (32, 32), (32, 32), (32, 128)):
            layers += [nn.Conv2d(wide, narrow, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5))
    split = pp.Split(model, X, at="6")
    pruner = pruner_of(split, edge_macs=0.12, feature_channels=4)
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(len(s), generator=generator)
              for name, s in pruner.scores()[0].items()}
    pruner.scores = lambda: (scores, {})  # type: ignore[method-assign]
    kept = {name: len(idxs) for name, idxs in pruner.choose().items()}
    loss = {n: [0.0, *scores[n].sort().values.cumsum(0).tolist()] for n in ("0", "2", "4")}

    def lost(widths: tuple[int, ...]) -> float:
        return sum(loss[n][32 - width] for n, width in zip(loss, widths, strict=True))

    least = min(lost(widths) for widths in itertools.product(range(1, 33), repeat=3)
                if pruner.costs.macs({**dict(zip(loss, widths, strict=True)), "6": 4})
                <= pruner.budget)
    assert kept["6"] == 4 and lost(tuple(kept[n] for n in loss)) <= 1.1 * least


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
    ({"min_channels": 6},
     f"'{STREAM}' may keep, came 4; .* are 6 and 7. Give one of those, or loosen min_channels"),
    ({"max_pruning_ratio": 0.5}, "are 8 and 9.*max_pruning_ratio"),
    ({"round_to": 8}, "the nearest numbers are 8 and 16"),
])
def test_what_cannot_be_is_refused_before_any_step(more: dict[str, Any], told: str) -> None:
    split = split_of()
    given = {"boundary": "prune", "feature_channels": 4, **more}
    with pytest.raises((InputError, BudgetError), match=told):
        pp.PatrolPruner(split.model, X, tp.importance.GroupMagnitudeImportance(p=2), split=split,
                        edge_macs=0.9, **given)


def test_a_budget_that_the_width_leaves_no_room_for_says_so() -> None:
    with pytest.raises(BudgetError, match="give fewer feature_channels"):
        pruner_of(split_of(), edge_macs=0.005, feature_channels=15)


def test_channels_that_go_together_are_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1),
                          nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=4),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    split = pp.Split(model, X, at="2")
    with pytest.raises(InputError, match="are 8 and 12. Its channels go 4 at a time. Give one of "
                                         "those\\.$"):
        pruner_of(split, edge_macs=0.9, feature_channels=6)


def test_layers_that_the_caller_keeps_are_named() -> None:
    split = split_of()
    stream = dict(split.model.named_modules())[STREAM]
    with pytest.raises(InputError, match=f"{STREAM}: .* is in ignored_layers"):
        pruner_of(split, feature_channels=4, ignored_layers=[stream])
    pruner_of(split, feature_channels=split.feature_shape[0], ignored_layers=[stream])
