"""Masks: ones change nothing, zeros are the removal, nothing is left behind."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from pruning_helpers import backbone, cifar_resnet, half_of_every_group, randomize
from torch import Tensor, nn

from patrol_prune._tp import GroupMagnitudeImportance
from patrol_prune.errors import InputError, UnsupportedModelError
from patrol_prune.group_table import GroupTable, build_graph, remove_channels
from patrol_prune.masks import SoftMasks
from patrol_prune.prunable import check_prunable
from patrol_prune.pruner import PatrolPruner
from patrol_prune.split import Split

EXACT = [
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "densenet121",
    "squeezenet1_1",
    "efficientnet_b0",
    "regnet_y_400mf",
    "resnext50_32x4d",
]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def without_chance(model: nn.Module, training: bool) -> nn.Module:
    """Training mode with dropout and stochastic depth asleep, so that two runs compare."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.eval()
    return model


def masked_and_pruned(
    model: nn.Module, x: torch.Tensor, training: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the masked model and of a copy that lost the same channels."""
    without_chance(model, training)
    pruned = copy.deepcopy(model)
    masks = SoftMasks(model, x[:1])
    gone = half_of_every_group(masks)
    masks.zero(gone)
    with torch.no_grad(), masks.attached():
        masked = model(x)
    remove_channels(GroupTable.build(pruned, x[:1]), gone)
    with torch.no_grad():
        return masked, pruned(x)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name == "densenet121" else name
    for name in EXACT])
def test_zero_is_removal(name: str) -> None:
    masked, pruned = masked_and_pruned(backbone(name), torch.randn(2, 3, 64, 64), False)
    assert (masked - pruned).abs().max() <= 2e-6 * max(1.0, pruned.abs().max())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_zero_is_removal_in_training_mode(name: str) -> None:
    masked, pruned = masked_and_pruned(backbone(name), torch.randn(4, 3, 64, 64), True)
    assert (masked - pruned).abs().max() <= 5e-5 * max(1.0, pruned.abs().max())


def test_flattened_consumers() -> None:
    """A linear layer that reads 4 positions of every channel, as in VGG."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 12), nn.Sigmoid(), nn.Linear(12, 4),
    )  # fmt: skip
    masked, pruned = masked_and_pruned(randomize(net), torch.randn(2, 3, 9, 9), False)
    assert torch.allclose(masked, pruned, atol=1e-6)


class Joined(nn.Module):
    """Two branches side by side, and what reads them, given by its kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1), kind
        self.grouped = nn.Conv2d(12, 4, 1, groups=2)
        self.add = nn.Conv2d(3, 16, 1)
        self.end = nn.Linear({"flatten": 48, "grouped": 4, "twice": 16}[kind], 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "twice":
            wide = self.add(x) + torch.cat([self.a(x), self.a(x.neg())], 1)
            return self.end(wide.relu().mean((2, 3)))
        both = torch.cat([self.a(x), self.b(x)], 1).relu()
        if self.kind == "grouped":
            return self.end(self.grouped(both).mean((2, 3)))
        return self.end(nn.functional.adaptive_avg_pool2d(both, 2).flatten(1))


@pytest.mark.parametrize("kind", ["flatten", "grouped", "twice"])
def test_concatenations_that_torch_pruning_misreads(kind: str) -> None:
    """Flattened at once; divided into groups across its parts; one layer's channels twice."""
    torch.manual_seed(0)
    masked, pruned = masked_and_pruned(randomize(Joined(kind)), torch.randn(2, 3, 6, 6), False)
    assert torch.allclose(masked, pruned, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "whole"),
    [("flatten", {}), ("grouped", {"a": "'grouped' puts a part", "b": "'grouped' puts a part"}),
     ("twice", {"add": "'a' are concatenated twice"})],
)
def test_what_cannot_be_followed_stays_whole_and_is_named(
    kind: str, whole: dict[str, str]
) -> None:
    table = GroupTable.build(Joined(kind).eval(), torch.randn(1, 3, 6, 6))
    blocked = {n: g.blocked for n, g in table.groups.items() if g.blocked and not g.is_output}
    assert blocked.keys() == whole.keys()
    assert all(why in (blocked[n] or "") for n, why in whole.items())
    if kind == "flatten":
        read = {n: m.idxs.tolist() for n, m in table.members_of(table.model.end, "in")}
        assert sorted(read["a"]) == list(range(32)) and sorted(read["b"]) == list(range(32, 48))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2"])
def test_ones_change_no_bit_and_hooks_go(name: str) -> None:
    model, x = backbone(name), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        masks = SoftMasks(model, x[:1])
        with masks.attached():
            assert torch.equal(model(x), before)
            assert hooks(model) > 0
        assert hooks(model) == 0
        assert torch.equal(model(x), before)


def test_hooks_go_after_an_exception() -> None:
    model = cifar_resnet()
    split = Split(model, torch.randn(1, 3, 32, 32), at="layer2")
    left = hooks(model) + hooks(split.edge) + hooks(split.cloud)
    masks = SoftMasks(model, split.example_inputs, split=split, boundary="prune")
    with pytest.raises(RuntimeError, match="user"), masks.attached(), masks.attached():
        raise RuntimeError("the user's own")
    assert hooks(model) + hooks(split.edge) + hooks(split.cloud) == left


def test_masked_model_can_be_pickled_and_copied() -> None:
    model, x = cifar_resnet(), torch.randn(2, 3, 16, 16)
    masks = SoftMasks(model, x[:1])
    masks.set("conv1", 0.5)
    with torch.no_grad(), masks.attached():
        expected = model(x)
        again = pickle.loads(pickle.dumps(model))
        twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(again(x), expected)
        assert torch.equal(twin(x), expected)
        assert not torch.equal(model(x), expected)


CUTS = [("layer2", "consumed"), ("layer2.0", "coupled")]


@pytest.mark.parametrize(("at", "kind"), CUTS)
def test_masked_feature_is_the_pruned_feature(at: str, kind: str) -> None:
    """Where the feature itself narrows: z keeps its other channels, and the logits agree."""
    x = torch.randn(2, 3, 16, 16)
    model = backbone("resnet50") if kind == "coupled" else cifar_resnet(depth=2)
    pruned = copy.deepcopy(model)
    split, twin = Split(model, x[:1], at=at), Split(pruned, x[:1], at=at)
    masks = SoftMasks(model, x[:1], split=split, boundary="prune")
    crossing = [g for g in masks.table.groups.values() if g.crossing]
    assert [g.crossing for g in crossing] == [kind]
    gone = half_of_every_group(masks)
    masks.zero(gone)
    with torch.no_grad():
        z, logits = masks.split_forward(x)
        remove_channels(GroupTable.build(pruned, x[:1], split=twin), gone)
        twin.refresh()
        z_pruned = twin.edge(x)
        dead = gone[crossing[0].name]
        alive = [c for c in range(z.shape[1]) if c not in set(dead.tolist())]
        assert (z[:, dead] == 0).all()
        assert torch.allclose(z[:, alive], z_pruned, atol=1e-5)
        assert torch.allclose(logits, twin.cloud(z_pruned), atol=1e-5)
        with masks.attached():
            assert torch.equal(split.edge(x), z)
            assert torch.allclose(split.cloud(split.edge(x)), logits, atol=1e-6)


def test_concatenated_feature_knows_its_groups() -> None:
    """densenet's feature is many groups side by side."""
    model, x = backbone("densenet121"), torch.randn(1, 3, 32, 32)
    split = Split(model, x, at="features.denseblock1")
    masks = SoftMasks(model, x, split=split, boundary="prune")
    crossing = [n for n, g in masks.table.groups.items() if g.crossing]
    assert len(crossing) == 7 and split.feature_shape[0] == 256
    masks.zero({"features.denseblock1.denselayer2.conv2": [0, 5]})
    with torch.no_grad():
        z, _ = masks.split_forward(x)
        dead = (z.abs().amax((0, 2, 3)) == 0).nonzero().flatten().tolist()
        raw = split.edge(x)
    assert dead == [64 + 32, 64 + 32 + 5]
    assert (raw.abs().amax((0, 2, 3)) > 0).all()


def test_soft_mask_is_applied_once() -> None:
    """split_forward with m = 0.5 equals the model whose consumers see half the channels."""
    model, x = cifar_resnet(), torch.randn(2, 3, 16, 16)
    split = Split(model, x[:1], at="layer2")
    masks = SoftMasks(model, x[:1], split=split, boundary="prune")
    crossing = next(n for n, g in masks.table.groups.items() if g.crossing)
    masks.set(crossing, 0.5)
    with torch.no_grad():
        raw = split.edge(x)
        z, logits = masks.split_forward(x)
        assert torch.equal(z, raw * 0.5)
        assert torch.allclose(logits, split.cloud(raw * 0.5), atol=1e-6)


def test_keep_leaves_crossing_groups_without_a_mask() -> None:
    model, x = cifar_resnet(), torch.randn(1, 3, 16, 16)
    split = Split(model, x, at="layer2")
    masks = SoftMasks(model, x, split=split)
    groups = masks.table.groups
    assert all(groups[n].location == "edge" and not groups[n].crossing for n in masks.channels)
    with torch.no_grad():
        z, _ = masks.split_forward(x)
        assert torch.equal(z, split.edge(x))
    whole = SoftMasks(model, x, split=split, boundary="prune", scope="model")
    assert set(whole.channels) == {n for n, g in groups.items() if not g.is_output}


def test_gradient_reaches_only_the_masks_that_matter() -> None:
    model, x = cifar_resnet(), torch.randn(2, 3, 16, 16)
    split = Split(model, x[:1], at="layer2")
    masks = SoftMasks(model, x[:1], split=split, boundary="prune", scope="model")
    z, logits = masks.split_forward(x)
    edge = torch.autograd.grad(z.sum(), masks.parameters(), retain_graph=True, allow_unused=True)
    task = torch.autograd.grad(logits.sum(), masks.parameters(), allow_unused=True)
    for name, of_z, of_task in zip(masks.channels, edge, task, strict=True):
        assert of_task is not None
        assert (of_z is not None) == (masks.table.groups[name].location == "edge")


def test_masks_follow_the_channels_of_the_table_only() -> None:
    model, x = cifar_resnet(), torch.randn(1, 3, 16, 16)
    masks = SoftMasks(model, x)
    remove_channels(GroupTable.build(model, x), {"conv1": [0]})
    with pytest.raises(InputError, match="pruned since"), masks.attached():
        pass


class OnTheInput(nn.Module):
    """A residual block and a concatenation right on the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1))
        self.other = nn.Conv2d(3, 3, 3, padding=1)
        self.mix, self.head = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.branch(x)
        return self.head(self.mix(torch.cat([y, self.other(x)], 1)).relu())


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_channels_summed_with_the_input_stay(wrap: Callable[[Tensor], object]) -> None:
    torch.manual_seed(0)
    model, x = OnTheInput(), torch.randn(2, 3, 8, 8)
    table = GroupTable.build(model, wrap(x))
    assert "model's input" in (table.groups["branch.1"].blocked or "")
    free = {n for n, g in table.groups.items() if g.blocked is None}
    assert free == {"branch.0", "other", "mix"}
    masks = SoftMasks(model, wrap(x), table=table)
    gone = half_of_every_group(masks)
    masks.zero(gone)
    with masks.attached():
        masked = model(x)
    remove_channels(GroupTable.build(model, wrap(x)), gone)
    assert torch.allclose(model(x), masked, atol=1e-6)


def test_a_pruners_own_forward_reaches_the_second_tracing() -> None:
    model, x = OnTheInput(), torch.randn(2, 3, 8, 8)

    def forward(net: nn.Module, given: dict[str, Tensor]) -> Tensor:
        return net(given["picture"])

    pruner = PatrolPruner(
        model, {"picture": x}, GroupMagnitudeImportance(), split=Split(model, x, at="mix"),
        edge_macs=0.7, forward_fn=forward,
    )  # fmt: skip
    assert "model's input" in (pruner.table.groups["branch.1"].blocked or "")
    pruner.step()
    assert model.branch[1].out_channels == 3 and model(x).shape == (2, 2, 8, 8)


class BesideTheInput(nn.Module):
    """A layer that reads the picture, or coordinates, and channels of its own side by side."""

    def __init__(self, is_first: bool, is_constant: bool) -> None:
        super().__init__()
        self.is_first, self.is_constant = is_first, is_constant
        self.conv, self.mix = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(9, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        other = torch.ones_like(x) if self.is_constant else x
        parts = [other, y] if self.is_first else [y, other]
        return self.head(self.mix(torch.cat(parts, 1)).relu())


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("is_constant", [True, False])
def test_channels_beside_what_is_not_followed_stay(is_first: bool, is_constant: bool) -> None:
    model, x = BesideTheInput(is_first, is_constant), torch.randn(2, 3, 8, 8)
    table = GroupTable.build(model, x)
    assert "beside channels that cannot be followed" in (table.groups["conv"].blocked or "")
    assert table.groups["mix"].blocked is None
    assert set(SoftMasks(model, x, table=table).channels) == {"mix"}


def test_bad_arguments() -> None:
    model, x = cifar_resnet(), torch.randn(1, 3, 16, 16)
    with pytest.raises(InputError, match="boundary"):
        SoftMasks(model, x, boundary="bottleneck")
    masks = SoftMasks(model, x)
    with pytest.raises(InputError, match="Did you mean: conv1"):
        masks.set("conv", 0.0)
    with pytest.raises(InputError, match="16 values"):
        masks.set("conv1", [0.0, 1.0])
    with pytest.raises(InputError, match="split="):
        masks.split_forward(x)


def test_building_leaves_the_model_as_found() -> None:
    model = cifar_resnet()
    model.train()
    model.layer1.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    model.fc.weight.requires_grad_(True)
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        table = GroupTable.build(model, torch.randn(1, 3, 16, 16))
    assert "conv1" in table.groups
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


class FrozenBatchNorm2d(nn.Identity):
    """Named as the real one, whose statistics are buffers."""


def _weight_norm() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    nn.utils.parametrizations.weight_norm(net[0])
    return net


def _old_spectral_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3))


def _with_weights(*values: float) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    net[1].weight.data.view(-1)[: len(values)] = torch.tensor(values)
    return net


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_weight_norm(), "'0'.*computed"),
        (_old_spectral_norm(), "'0'.*computed"),
        (_with_weights(math.nan), "'1.weight'.*NaN"),
        (_with_weights(math.inf, -math.inf), "'1.weight'.*infinite"),
        (nn.Sequential(nn.ReLU()), "nothing to prune"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), "lazy"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d()), "'1'.*buffers"),
    ],
)
def test_models_refused_by_name(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        build_graph(model, torch.randn(1, 3, 12, 12))


def test_weights_whose_sum_overflows_are_finite() -> None:
    model = _with_weights(3e38, 3e38)
    assert not model[1].weight.sum().isfinite()
    check_prunable(model)


def test_the_users_own_error_is_not_hidden() -> None:
    with pytest.raises(InputError, match=r"\(1, 5, 12, 12\).* forward pass failed.*channels"):
        build_graph(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 5, 12, 12))


def test_exploding_groups_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_pruning.dependency import Group

    from patrol_prune import _tp

    before = Group.add_dep
    monkeypatch.setattr(_tp, "_MAX_INDICES", 8)
    with pytest.raises(UnsupportedModelError, match="explode"):
        GroupTable.build(cifar_resnet(), torch.randn(1, 3, 16, 16))
    assert Group.add_dep is before


def test_a_layer_is_not_emptied_through_a_part_of_a_group() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)
            self.c, self.end = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.cat([self.a(x), self.b(x)], 1) + self.c(x)
            return self.end(y.relu().mean((2, 3)))

    model = Sum()
    table = GroupTable.build(model, torch.randn(1, 3, 6, 6))
    name = next(n for n, g in table.groups.items() if g.channels == 6)
    with pytest.raises(InputError, match="'b' would lose all of its 2 channels"):
        remove_channels(table, {name: [4, 5]})
    assert model.b.out_channels == 2
    remove_channels(table, {name: [0, 5]})
    assert model(torch.randn(1, 3, 6, 6)).shape == (1, 2)


def test_last_group_is_the_output() -> None:
    """A model that ends in a linear layer, which Torch-Pruning itself would prune."""
    table = GroupTable.build(cifar_resnet(), torch.randn(1, 3, 16, 16))
    assert [n for n, g in table.groups.items() if g.is_output] == ["fc"]
    with pytest.raises(InputError, match="lose all"):
        remove_channels(table, {"conv1": range(16)})


def test_quantised_and_inference_models_are_refused_for_pruning_alone() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    x = torch.randn(1, 3, 4, 4)
    with torch.inference_mode():
        inference = network()
    with pytest.raises(UnsupportedModelError, match="inference_mode"):
        build_graph(inference, x)
    compiled = network()
    compiled[2].compile(backend="eager")
    assert Split(compiled, x, at="1").feature_shape == (4, 4, 4)
