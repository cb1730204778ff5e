"""Easy slips are refused in words, and what looks alike is told apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.distillation import Distiller
from patrol_prune.errors import InputError
from patrol_prune.folding import cannot_fold
from patrol_prune.group_table import remove_channels
from patrol_prune.mask_importance import MaskImportance
from patrol_prune.origins import recording

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3])


class Block(nn.Module):
    """Adds to its input what its layers make of it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Net(nn.Module):
    def __init__(self, *last: nn.Module) -> None:
        super().__init__()
        self.n = nn.Conv2d(3, 8, 3, padding=1)
        self.one = Block(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), *last)
        self.two = Block(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1),
                         *copy.deepcopy(last))
        self.c, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.c(self.two(self.one(self.n(x))))).mean((2, 3)))


def net(*last: nn.Module) -> tuple[Net, pp.Split]:
    torch.manual_seed(0)
    model = Net(*last).eval()
    return model, pp.Split(model, X, at="two")


@pytest.mark.parametrize("last", [nn.Dropout(0.1), nn.GroupNorm(2, 8), nn.Identity()])
def test_a_blocks_mask_goes_through_what_passes_a_factor_on(last: nn.Module) -> None:
    model, split = net(last)
    masks = pp.SoftMasks(model, X, split=split, blocks=True)
    assert set(masks.blocks) == {"one", "two"} and not cannot_fold(masks)
    with torch.no_grad():
        masks.blocks["one"].fill_(0.3)
    with masks.attached(), torch.no_grad():
        masked = model(X)
    pp.fold_masks(masks)
    assert torch.allclose(model(X), masked, atol=1e-5)


@pytest.mark.parametrize("channels_first", [False, True])
def test_no_parameter_is_added_that_the_old_optimiser_left_out(channels_first: bool) -> None:
    """Not even once a block is gone, and with it parameters that had been pruned before."""
    model, split = net()
    held = [p for name, p in model.named_parameters() if not name.startswith(("n.", "fc."))]
    optimizer = torch.optim.SGD(held, lr=0.1, momentum=0.9)
    if channels_first:
        table = pp.SoftMasks(model, X, split=split).table
        gone = {"one.layers.0": torch.tensor([1, 4]), "two.layers.0": torch.tensor([0])}
        with recording(table, gone):
            remove_channels(table, gone)
        split.refresh()
    pp.remove_blocks(split, ["one"])
    fresh = pp.rebuild_optimizer(optimizer, model)
    names = {id(p): name for name, p in model.named_parameters()}
    now = {names[id(p)] for group in fresh.param_groups for p in group["params"]}
    assert not any(name.startswith(("n.", "fc.")) for name in now)
    assert {name for name in names.values() if name.startswith("c.")} <= now


def test_what_another_pruner_left_first_is_trained_on() -> None:
    """Nobody recorded where its parameters came from; ours came from those."""
    model, split = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    table = pp.SoftMasks(model, X, split=split).table
    table.raw["one.layers.0"].prune([0, 1])
    split.refresh()
    table = pp.SoftMasks(model, X, split=split).table
    gone = {"one.layers.0": torch.tensor([1]), "two.layers.0": torch.tensor([0])}
    with recording(table, gone):
        remove_channels(table, gone)
    fresh = pp.rebuild_optimizer(optimizer, model)
    now = {id(p) for group in fresh.param_groups for p in group["params"]}
    assert now == {id(p) for p in model.parameters()}


class HeadFirst(nn.Module):
    """The head is registered before layers that run earlier, and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.unused = nn.Linear(6, 5), nn.Linear(192, 6), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=F.relu(self.body(x.flatten(1))))


def test_features_are_compared_at_the_last_linear_layer_that_runs() -> None:
    torch.manual_seed(0)
    model, teacher = HeadFirst().eval(), HeadFirst().eval()
    distiller = Distiller(model, teacher, 1.0, features=True)
    distiller.attach()
    _, features = distiller(X, model(X))
    own, theirs = (F.relu(m.body(X.flatten(1))) for m in (model, teacher))
    distiller.close()
    expected = (own - theirs).square().sum() / theirs.square().sum()
    assert features is not None and float(features) == pytest.approx(float(expected), rel=1e-5)


def test_an_auxiliary_head_behind_the_classifier_is_not_compared() -> None:
    class Auxiliary(HeadFirst):
        def forward(self, x: Tensor) -> Tensor:
            answers = super().forward(x)
            if self.training:
                self.unused(x.flatten(1)[:, :3])
            return answers

    torch.manual_seed(0)
    model, teacher = Auxiliary().train(), Auxiliary().eval()
    teacher.load_state_dict(model.state_dict())
    distiller = Distiller(model, teacher, 1.0, features=True)
    distiller.attach()
    assert float(distiller(X, model(X))[1]) == 0.0  # type: ignore[arg-type]
    distiller.close()


@pytest.mark.parametrize("y", [torch.tensor([0, 1, 2, -1]), Y.int(), Y[:, None],
                               torch.tensor([0, 1, 2, 5])])
@pytest.mark.parametrize("objective", [False, True])
def test_labels_that_cross_entropy_cannot_take(y: Tensor, objective: bool) -> None:
    _, split = net()
    made = pp.PatrolObjective(split, F.cross_entropy, beta=0.0) if objective else None
    with pytest.raises(InputError, match=r"[Ll]abels"):
        pp.finetune(split, [(X, y)], objective=made, progress=False,
                    config=pp.FinetuneConfig(epochs=1))


def test_labels_that_are_passed_over_are_none() -> None:
    _, split = net()
    for y in (torch.tensor([0, 1, -100, 2]), Y.to(torch.uint8)):
        pp.finetune(split, [(X, y)], progress=False,
                    config=pp.FinetuneConfig(epochs=1, precision="fp32"))


@pytest.mark.parametrize("settings", [{"epochs": 1.5}, {"lr": "0.1"}, {"inner_steps": 1.5},
                                      {"momentum": None}, {"warmup": float("nan")}])
def test_settings_of_a_wrong_type(settings: dict[str, Any]) -> None:
    for config in (pp.FinetuneConfig, pp.MaskConfig):
        with pytest.raises(InputError, match=next(iter(settings))):
            config(**settings)


def test_a_refresh_that_is_no_whole_number() -> None:
    with pytest.raises(InputError, match="refresh"):
        pp.MaskConfig(refresh=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("slip", [
    lambda model, split: pp.remove_blocks(model, ["one"]),
    lambda model, split: pp.residual_blocks(split, X),
    lambda model, split: pp.open_attention(split, X),
    lambda model, split: pp.SoftMasks(None, X),
    lambda model, split: pp.fold_masks(split),
    lambda model, split: MaskImportance(split),
    lambda model, split: pp.rebuild_optimizer(None, model),
    lambda model, split: pp.SoftMasks(model, X, split=split).zero({"one.layers.0": [99]}),
    lambda model, split: pp.SoftMasks(model, X, split=split).zero({}, ["one"]),
])
def test_the_wrong_object_is_named(slip: Callable[[nn.Module, pp.Split], object]) -> None:
    with pytest.raises(InputError, match="Expected"):
        slip(*net())
