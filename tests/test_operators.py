"""Operators between layers that do more with channels than keep them apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from pruning_helpers import half_of_every_group, randomize
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.convnext import LayerNorm2d

from patrol_prune import following
from patrol_prune._tp import GroupMagnitudeImportance, traced
from patrol_prune.errors import BudgetError, UnsupportedModelError
from patrol_prune.group_table import GroupTable, remove_channels
from patrol_prune.masks import SoftMasks
from patrol_prune.operators import doubtful
from patrol_prune.pruner import PatrolPruner
from patrol_prune.split import Split
from patrol_prune.trial import CHANGES

Operator = Callable[[Tensor], Tensor]
ORDER = torch.tensor([3, 0, 1, 2, 7, 5, 6, 4])


class Between(nn.Module):
    """An operator between two convolutions, perhaps behind a norm, and a third behind them."""

    def __init__(self, operator: Operator, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.operator, self.norm = operator, norm or nn.Identity()
        width = operator(torch.zeros(1, 8, 6, 6)).shape[1]
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second, self.third = nn.Conv2d(width, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.operator(torch.relu(self.norm(self.first(x))))
        return self.third(torch.relu(self.second(x)))


def norm_of_the_last(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def spatial_attention(x: Tensor) -> Tensor:
    """CBAM's: what a map says of every position comes from all channels."""
    return x * torch.sigmoid(x.mean(1, keepdim=True) + x.amax(1, keepdim=True))


MIX: dict[str, Operator] = {
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "index": lambda x: x[:, ORDER],
    "index_select": lambda x: x.index_select(1, ORDER),
    "sort": lambda x: x.sort(1)[0],
    "softmax": lambda x: x.softmax(1),
    "cumsum": lambda x: x.cumsum(1),
    "normalize": lambda x: functional.normalize(x, dim=1),
    "maximum": lambda x: x - x.amax(1, keepdim=True),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "spatial attention": spatial_attention,
    "slice": lambda x: x[:, :4],
    "every second": lambda x: x[:, ::2],
    "narrow": lambda x: x.narrow(1, 2, 4),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "shuffle by hand": lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2),
    "maxout": lambda x: x.unflatten(1, (4, 2)).amax(2),
    "pixel_unshuffle": lambda x: functional.pixel_unshuffle(x, 2),
    "local response": lambda x: functional.local_response_norm(x, 3, alpha=1.0),
    "pooling over channels": lambda x: functional.max_pool3d(
        x[:, None], (3, 1, 1), 1, (1, 0, 0))[:, 0],
    "a filter of its own": lambda x: functional.conv2d(
        x, torch.linspace(0.1, 1.0, 8).view(8, 1, 1, 1), groups=8),
    "the channels' number": lambda x: x / x.shape[1] ** 0.5,
    "channels added": lambda x: functional.pad(x, (0, 0, 0, 0, 1, 1)),
    "channels pooled as features": lambda x: functional.max_pool1d(
        x.permute(0, 2, 3, 1).flatten(1, 2), 3, 1, 1).unflatten(1, (6, 6)).permute(0, 3, 1, 2),
    "channels last": lambda x: norm_of_the_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
}
APART: dict[str, Operator] = {
    "flip": lambda x: x.flip(2),
    "roll": lambda x: x.roll(1, 3),
    "softmax": lambda x: x.flatten(2).softmax(2).unflatten(2, x.shape[2:]),
    "normalize": lambda x: functional.normalize(x.flatten(2), dim=2).unflatten(2, x.shape[2:]),
    "every second": lambda x: x[:, :, ::2],
    "mean": lambda x: x - x.mean((2, 3), keepdim=True),
    "maximum": lambda x: x.amax(3, keepdim=True),
    "interpolate": lambda x: functional.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "pixels in windows": lambda x: functional.unfold(x, 2, stride=2).unflatten(-1, (3, 3))
    .unflatten(1, (8, 4)).mean(2),
}


def removed_and_masked(model: nn.Module, x: Tensor) -> tuple[GroupTable, Tensor, Tensor]:
    """The table, and what the model gives without half of all channels, and with zero masks."""
    table = GroupTable.build(model, x)
    masks = SoftMasks(model, x, table=table)
    gone = half_of_every_group(masks)
    masks.zero(gone)
    with masks.attached():
        masked = model(x)
    remove_channels(table, gone)
    return table, model(x), masked


@pytest.mark.parametrize("name", MIX)
def test_what_mixes_channels_stays_whole_and_is_named(name: str) -> None:
    model, x = randomize(Between(MIX[name])).eval(), torch.randn(1, 3, 6, 6)
    table, removed, masked = removed_and_masked(model, x)
    assert table.groups["first"].blocked is not None
    assert table.groups["second"].blocked is None
    torch.testing.assert_close(removed, masked, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.GroupNorm(1, 8), LayerNorm2d(8),
                                  nn.BatchNorm2d(8)])  # fmt: skip
@pytest.mark.parametrize("name", ["flip", "softmax", "spatial attention"])
def test_behind_a_norm_too(name: str, norm: nn.Module) -> None:
    model = randomize(Between(MIX[name], copy.deepcopy(norm))).eval()
    table, removed, masked = removed_and_masked(model, torch.randn(1, 3, 6, 6))
    assert table.groups["first"].blocked is not None and table.groups["second"].blocked is None
    torch.testing.assert_close(removed, masked, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), LayerNorm2d(8), nn.BatchNorm2d(8)])
def test_a_norm_alone_keeps_channels_free(norm: nn.Module) -> None:
    """The flip over positions makes it be tried."""
    model = randomize(Between(APART["flip"], copy.deepcopy(norm))).eval()
    table, removed, masked = removed_and_masked(model, torch.randn(1, 3, 6, 6))
    assert table.groups["first"].blocked is None
    torch.testing.assert_close(removed, masked, rtol=0.0, atol=1e-5)


class Standardised(nn.Conv2d):
    """A convolution with a weight of mean 0, as in timm's BiT."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias)


def test_a_layer_that_changes_its_weight() -> None:
    layers = nn.Conv2d(3, 8, 1), nn.ReLU(), Standardised(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)
    model = randomize(nn.Sequential(*layers)).eval()
    table, removed, masked = removed_and_masked(model, torch.randn(1, 3, 5, 5))
    assert {n for n, g in table.groups.items() if g.blocked is None} == {"2"}
    torch.testing.assert_close(removed, masked, rtol=0.0, atol=1e-5)


class Shifted(nn.Module):
    """A constant as wide as the channels, which no layer owns."""

    def __init__(self, *, registered: bool, width: int = 8) -> None:
        super().__init__()
        constant = torch.linspace(-1.0, 1.0, width).view(-1, 1, 1)
        if registered:
            self.register_buffer("constant", constant)
        else:
            self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        return x - self.constant


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_constant_as_wide_as_the_channels(registered: bool, transposed: bool) -> None:
    """Torch-Pruning narrows no buffer: the pruned model would not run."""
    first = nn.ConvTranspose2d(3, 8, 1) if transposed else nn.Conv2d(3, 8, 1)
    layers = (Shifted(registered=registered, width=3), first, Shifted(registered=registered),
              nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))  # fmt: skip
    model, x = randomize(nn.Sequential(*layers)).eval(), torch.randn(1, 3, 5, 5)
    assert "2.constant" in doubtful(traced(model, x))
    table, removed, masked = removed_and_masked(model, x)
    assert {n for n, g in table.groups.items() if g.blocked is None} == {"3"}
    torch.testing.assert_close(removed, masked, rtol=0.0, atol=1e-5)


class Held(nn.Module):
    """A constant behind a concatenation or a flattening, in a list."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.last = nn.Linear(72, 5) if how == "flattened" else nn.Conv2d(16, 2, 1)
        shape = (72,) if how == "flattened" else (16, 1, 1)
        self.constants = [torch.linspace(-1.0, 1.0, 72 if how == "flattened" else 16).view(shape)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu().flatten(1) if self.how == "flattened" else torch.cat(
            [self.a(x), self.b(x)], 1).relu()
        return self.last(x - self.constants[0])


@pytest.mark.parametrize("how", ["flattened", "concatenated"])
def test_a_constant_in_a_list_as_wide_as_what_is_read(how: str) -> None:
    model, x = randomize(Held(how)).eval(), torch.randn(1, 3, 3, 3)
    assert "constants" in doubtful(traced(model, x))
    table, removed, masked = removed_and_masked(model, x)
    assert all(group.blocked is not None for name, group in table.groups.items()
               if name in ("a", "b") and (name == "a" or how == "concatenated"))
    torch.testing.assert_close(removed, masked, rtol=0.0, atol=1e-5)


class OwnNorm(nn.BatchNorm2d):
    """A batch norm of one's own, whose statistics are narrowed as usual."""


def test_a_batch_norm_of_ones_own_needs_no_trial() -> None:
    layers = nn.Conv2d(3, 8, 1), OwnNorm(8), nn.ReLU(), nn.Conv2d(8, 2, 1)
    model, x = randomize(nn.Sequential(*layers)).eval(), torch.randn(1, 3, 5, 5)
    assert doubtful(traced(model, x)) == ()


class Shaped(nn.Module):
    """Nets in which names, widths and depth could hide what mixes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.aux, self.last = nn.Conv2d(8, 3, 1), nn.Conv2d(16 if how == "alike" else 8, 2, 1)
        self.deep = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(8))

    def forward(self, x: Tensor) -> Any:
        if self.how == "alike":  # two of one width, which change places
            return self.last(torch.cat([self.a(x), self.b(x)], 1).relu().roll(8, 1))
        if self.how == "auxiliary":
            y = (self.a(x) + self.b(x)).relu()
            out = self.last(y.flip(1))
            return (self.aux(y), out) if self.training else out
        y = self.a(x).relu().flip(1)
        for layer in self.deep:
            y = layer(y).relu()
        return self.last(y)


@pytest.mark.parametrize("how", ["alike", "auxiliary", "deep"])
def test_widths_names_and_depth_hide_nothing(how: str) -> None:
    model, x = randomize(Shaped(how)).eval(), torch.randn(1, 3, 5, 5)
    table = GroupTable.build(model, x)
    assert all(g.blocked is not None for n, g in table.groups.items()
               if n in ("a", "b") and (how != "deep" or n == "a"))
    if how == "deep":
        assert all(table.groups[f"deep.{i}"].blocked is None for i in range(8))


def test_a_maximum_over_neighbours_is_refused_by_name() -> None:
    """Torch-Pruning would take more from the first layer than it is asked for."""
    layers = nn.Conv2d(3, 16, 1), Maxout(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)
    model, x = randomize(nn.Sequential(*layers)).eval(), torch.randn(1, 3, 5, 5)
    assert GroupTable.build(model, x).groups["0"].blocked == CHANGES
    split = Split(model, x, "3")
    with pytest.raises(BudgetError, match="1.000 of the present edge"):
        PatrolPruner(model, x, GroupMagnitudeImportance(), split=split, edge_macs=0.8)


class Maxout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2)).amax(2)


class Odd(Between):
    """What it gives beside its output cannot be compared as numbers, or is new each time."""

    def __init__(self, how: str) -> None:
        super().__init__(MIX["flip"])
        self.how = how

    def forward(self, x: Tensor) -> Any:
        if self.how == "in place":
            x.mul_(0.5)
        y = super().forward(x)
        beside = {"flags": y > 0, "nothing": y[:0], "nan": y * float("nan"),
                  "index": y.flatten(1).argmax(1)}.get(self.how, y)
        return functional.dropout(y, 0.5) if self.how == "random" else (y, beside)


@pytest.mark.parametrize("how", ["flags", "nothing", "nan", "index", "in place"])
def test_outputs_of_any_kind(how: str) -> None:
    table = GroupTable.build(randomize(Odd(how)).eval(), torch.randn(1, 3, 6, 6))
    assert table.groups["first"].blocked is not None
    assert table.groups["second"].blocked is None


def test_randomness_is_said_to_leave_it_untried(caplog: pytest.LogCaptureFixture) -> None:
    GroupTable.build(randomize(Odd("random")).eval(), torch.randn(1, 3, 6, 6))
    assert "something else each time" in caplog.text and "as if it did" in caplog.text


@pytest.mark.parametrize("name", APART)
def test_the_same_over_positions_keeps_channels_free(name: str) -> None:
    model, x = randomize(Between(APART[name])).eval(), torch.randn(1, 3, 6, 6)
    table, removed, masked = removed_and_masked(model, x)
    if name != "pixels in windows":
        assert table.groups["first"].blocked is None
    assert table.groups["second"].blocked is None
    torch.testing.assert_close(removed, masked, rtol=0.0, atol=1e-5)


def test_two_that_mix_among_many_are_found() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 1) for i in range(9))
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = layer(x).relu()
                if i in (2, 7):
                    x = x.flip(1)
            return self.last(x)

    table = GroupTable.build(randomize(Many()).eval(), torch.randn(1, 3, 4, 4))
    whole = {n for n, g in table.groups.items() if g.blocked is not None}
    assert whole == {"layers.2", "layers.7", "last"}
    assert table.groups["layers.2"].blocked == CHANGES


def test_a_model_that_cannot_be_copied_is_said_to_be_untried(
    caplog: pytest.LogCaptureFixture
) -> None:
    class Once(Between):
        def __deepcopy__(self, memo: object) -> Once:
            raise TypeError("only one of these")

    model = randomize(Once(MIX["flip"])).eval()
    table = GroupTable.build(model, torch.randn(1, 3, 6, 6))
    assert table.groups["first"].blocked is None
    assert "FlipBackward0 keeps the channels of Once apart could not be tried" in caplog.text


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121",
                                  "mnasnet0_5"])  # fmt: skip
def test_ordinary_networks_need_no_trial(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(following, "changing_more", lambda *a: called.append(a) or {})
    model, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 32, 32)
    assert doubtful(traced(model, x)) == ()
    GroupTable.build(model, x)
    assert not called
    GroupTable.build(Between(MIX["flip"]), torch.randn(1, 3, 6, 6))
    assert len(called) == 1


def test_a_torchvision_model_with_another_layer_or_forward_is_not_taken_on_trust() -> None:
    with torch.device("meta"):
        changed = {how: torchvision.models.resnet18() for how in ("not", "a layer", "a forward")}
    changed["a layer"].relu = nn.Softmax(dim=1)
    block = changed["a forward"].layer1[0]
    block.forward = lambda x: block.conv2(block.conv1(x).flip(1))
    assert [following._is_torchvisions(m) for m in changed.values()] == [True, False, False]


@pytest.mark.parametrize("pooled", [False, True])
def test_features_that_are_pooled_or_scaled_by_their_number(pooled: bool) -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            x = functional.avg_pool1d(x, 3, 1, 1) if pooled else x * x.shape[-1] ** -0.5
            return self.third(self.second(x).relu())

    model, x = randomize(Features()).eval(), torch.randn(4, 6)
    table, removed, masked = removed_and_masked(model, x)
    assert {n for n, g in table.groups.items() if g.blocked is None} == {"second"}
    torch.testing.assert_close(removed, masked, rtol=0.0, atol=1e-5)


def test_of_torchvision_s_models_only_those_with_other_modules_are_tried(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[object] = []
    monkeypatch.setattr(following, "changing_more", lambda *a: called.append(a) or {})
    model = torchvision.models.VisionTransformer(16, 8, 1, 2, 8, 8, num_classes=3)
    x = torch.randn(1, 3, 16, 16)
    assert doubtful(traced(model, x))
    GroupTable.build(model, x)
    assert not called
    model.encoder.ln = nn.Sequential(model.encoder.ln, Shift())
    GroupTable.build(model, x)
    assert len(called) == 1


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1.0


class BetweenConvolutions(nn.Module):
    """A layer between two convolutions that treats the last dimension."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Conv2d(3, 8, 1), layer
        self.second, self.third = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.layer(self.first(x)).relu()).relu())


@pytest.mark.parametrize("layer", [nn.LayerNorm((8, 8)), nn.LayerNorm((8, 8, 8)),
                                   nn.Linear(8, 8)], ids=["norm", "all", "linear"])  # fmt: skip
def test_layers_over_the_columns_of_a_map_keep_its_channels_whole(layer: nn.Module) -> None:
    model, x = randomize(BetweenConvolutions(layer)).eval(), torch.randn(1, 3, 8, 8)
    table, removed, masked = removed_and_masked(model, x)
    assert "second" in {n for n, g in table.groups.items() if g.blocked is None}
    assert table.groups["first"].blocked is not None
    torch.testing.assert_close(removed, masked, rtol=0.0, atol=1e-5)


def test_what_torch_pruning_fails_on_is_refused_in_words() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
            self.rnn, self.last = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x).relu()).relu().flatten(2).transpose(1, 2)
            return self.last(self.rnn(x)[0].mean(1))

    with pytest.raises(UnsupportedModelError, match="came Recurrent: Torch-Pruning fails on it"):
        GroupTable.build(Recurrent(), torch.randn(1, 3, 4, 4))


class Named(nn.Module):
    """An operator between a convolution of some name and one that reads its channels in groups."""

    def __init__(self, operator: Operator, channels: int, groups: int = 1, name: str = "a") -> None:
        super().__init__()
        self.operator, self.name = operator, name
        width = operator(torch.zeros(1, channels, 2, 2)).shape[1]
        self.add_module(name, nn.Conv2d(3, channels, 3, padding=1))
        self.second, self.third = nn.Conv2d(width, 12, 1, groups=groups), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.operator(torch.relu(self.get_submodule(self.name)(x)))
        return self.third(torch.relu(self.second(x)))


UNLIKE: dict[str, tuple[Operator, int, int]] = {
    "every second": (lambda x: x[:, ::2], 8, 1),
    "the last": (lambda x: x[:, -1:], 33, 1),
    "the last of two": (lambda x: x[:, -1:], 2, 1),
    "the first of two": (lambda x: x[:, :1], 2, 1),
    "a half": (lambda x: x.chunk(2, 1)[0], 8, 1),
    "three tied units flipped": (lambda x: x.flip(1), 12, 4),
    "two tied units shuffled": (
        lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2), 8, 4),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_no_name_lets_the_wrong_channels_pass(case: str) -> None:
    operator, channels, groups = UNLIKE[case]
    for name in ("a", "conv1", "stem"):
        model = Named(operator, channels, groups, name).eval()
        group = GroupTable.build(model, torch.rand(1, 3, 4, 4)).groups[name]
        assert group.blocked is not None, name


@pytest.mark.parametrize(("channels", "groups"), [(2, 1), (3, 1), (8, 4), (12, 4)])
def test_few_units_that_are_kept_apart_stay_free(channels: int, groups: int) -> None:
    model = Named(lambda x: x.flip(2), channels, groups).eval()
    assert GroupTable.build(model, torch.rand(1, 3, 4, 4)).groups["a"].blocked is None


@pytest.mark.parametrize("operator", [
    lambda x: x[:, :-1] * torch.sigmoid(x[:, -1:]), lambda x: x[:, -3:], lambda x: x[:, -5:-1],
])
def test_slices_counted_from_the_back(operator: Operator) -> None:
    model = Named(operator, 9).eval()
    assert GroupTable.build(model, torch.rand(1, 3, 4, 4)).groups["a"].blocked is not None


def test_groups_are_the_same_whatever_was_mapped_before() -> None:
    """Torch-Pruning maps a concatenation anew for each group; here only where a width changed."""
    model = Dense().eval()
    x = torch.rand(1, 3, 4, 4)
    table, removed, masked = removed_and_masked(model, x)
    assert [g.blocked for g in table.groups.values()].count(None) == 4
    torch.testing.assert_close(removed, masked)


class Dense(nn.Module):
    """Each layer reads all that came before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4 * i, 4, 1) for i in range(4))
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        held: list[Tensor] = []
        for layer in self.layers:
            x = torch.relu(layer(x))
            held.append(x)
            x = torch.cat(held, 1)
        return self.last(x)
