"""Masks under layers that normalise over channels: exact, smooth, and ones change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from pruning_helpers import assert_zero_is_removal, half_of_every_group, seeded
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt, LayerNorm2d

from patrol_prune.channel_norms import ChannelNorm, channel_norm, over_live_channels
from patrol_prune.errors import UnsupportedModelError
from patrol_prune.folding import fold_masks
from patrol_prune.group_table import GroupTable, remove_channels
from patrol_prune.masks import SoftMasks
from patrol_prune.split import Split


def convnext() -> nn.Module:
    return seeded(ConvNeXt([CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 1)], num_classes=5))


class Mixer(nn.Module):
    """LayerNorm over the last dimension, before and behind a residual sum, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.norm1, self.up = nn.LayerNorm(32), nn.Linear(32, 24)
        self.norm2, self.down = nn.LayerNorm(24, elementwise_affine=False), nn.Linear(24, 32)
        self.norm3, self.head = nn.LayerNorm(32, bias=False), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        x = x + self.down(self.norm2(self.up(self.norm1(x)).relu()))
        return self.head(self.norm3(x).mean(1))


class Joined(nn.Module):
    """One norm over two groups of channels side by side."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(6, 8, 3), nn.Conv2d(6, 12, 3)
        self.norm, self.head = norm, nn.Conv2d(20, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu())


def group_normed(groups: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(6, 16, 3), nn.GroupNorm(groups, 16), nn.ReLU(),
        nn.Conv2d(16, 12, 3, bias=False), nn.GroupNorm(groups, 12, affine=False), nn.ReLU(),
        nn.Conv2d(12, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def flat() -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 16), nn.GroupNorm(4, 16), nn.Tanh(),
        nn.Linear(16, 5),
    )  # fmt: skip


NETS: dict[str, Callable[[], nn.Module]] = {
    "convnext": convnext,
    "layernorm": lambda: seeded(Mixer()),
    "groupnorm 1": lambda: seeded(group_normed(1)),
    "groupnorm 4": lambda: seeded(group_normed(4)),
    "groupnorm without positions": lambda: seeded(flat()),
    "layernorm over two groups": lambda: seeded(Joined(LayerNorm2d(20))),
    "groupnorm over two groups": lambda: seeded(Joined(nn.GroupNorm(1, 20))),
}


def batch(name: str) -> Tensor:
    g = torch.Generator().manual_seed(7)
    shape = (2, 3, 32, 32) if name == "convnext" else (2, 6, 8, 8)
    return torch.randn(shape, generator=g) + 0.5


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    return NETS[request.param](), batch(request.param)


def all_but_two_units(masks: SoftMasks) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    gone = {}
    for name in masks.channels:
        group = masks.table.groups[name]
        size = group.channels // group.tie
        gone[name] = group.units(torch.randperm(size, generator=g)[2:])
    return gone


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("choice", [half_of_every_group, all_but_two_units])
@pytest.mark.parametrize("training", [False, True])
def test_zero_is_removal(
    net: tuple[nn.Module, Tensor],
    choice: Callable[[SoftMasks], dict[str, Tensor]],
    training: bool,
) -> None:
    net[0].train(training)
    assert_zero_is_removal(*net, choice)


def test_ones_change_no_bit(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    before = run(model, x)
    masks = SoftMasks(model, x[:1])
    with masks.attached():
        assert torch.equal(run(model, x), before)
        assert torch.equal(model(x).detach(), before)
    assert torch.equal(run(model, x), before)


def test_every_image_has_its_own_gradient(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    masks = SoftMasks(model, x[:1])
    with masks.attached(), masks.per_image(len(x)) as copies:
        assert torch.equal(model(x), run(model, x))
        shares = torch.autograd.grad(model(x).square().sum(), copies)
    for i in range(len(x)):
        with masks.attached():
            alone = torch.autograd.grad(model(x[i : i + 1]).square().sum(), masks.parameters())
        for share, whole in zip(shares, alone, strict=True):
            assert torch.allclose(share[i], whole, atol=1e-5 * float(whole.abs().max()) + 1e-6)


def test_weights_learn_the_same_under_ones(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with SoftMasks(model, x[:1]).attached():
        got = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-7)


@pytest.mark.parametrize("at_ones", [True, False])
def test_gradients_are_finite_differences(net: tuple[nn.Module, Tensor], at_ones: bool) -> None:
    """Also at ones, where the value is the layer's own and the gradient the formula's."""
    model, x = net[0].double(), net[1].double()
    masks = SoftMasks(model, x[:1])
    g = torch.Generator().manual_seed(1)
    for mask in masks.parameters():
        mask.data = torch.ones(len(mask)).double()
        if not at_ones:
            mask.data.uniform_(0.2, 1.2, generator=g)

    def loss() -> Tensor:
        return model(x).sin().sum()

    with masks.attached():
        gradients = torch.autograd.grad(loss(), masks.parameters())
        for mask, gradient in zip(masks.parameters(), gradients, strict=True):
            direction = torch.randn(len(mask), generator=g).double()
            start, step = mask.detach().clone(), 1e-5
            with torch.no_grad():
                mask.copy_(start + step * direction)
                above = loss()
                mask.copy_(start - step * direction)
                below = loss()
                mask.copy_(start)
            slope = (above - below) / (2 * step)
            assert torch.allclose(slope, gradient @ direction, rtol=1e-5, atol=1e-6)


def test_the_derivative_in_the_docstring() -> None:
    layer, mask = nn.LayerNorm(5, elementwise_affine=False, eps=0.1), torch.ones(5).double()
    x = torch.randn(5, generator=torch.Generator().manual_seed(0)).double()
    got = torch.autograd.functional.jacobian(
        lambda m: over_live_channels(layer, ChannelNorm(-1), x, m), mask
    )
    var, mu = torch.var_mean(x, correction=0)
    u = (x - mu) / (var + 0.1).sqrt()
    expected = -(u[None] + u[:, None] * (u[None].square() - var / (var + 0.1)) / 2) / 5
    assert torch.allclose(got, expected)


def test_weighted_moments_are_those_of_repeated_channels() -> None:
    """Integer weights: a channel of weight 3 counts like three channels of its value."""
    layer, counts = nn.LayerNorm(4, elementwise_affine=False), torch.tensor([3, 1, 0, 2])
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    got = over_live_channels(layer, ChannelNorm(-1), x, counts.float())
    repeated = nn.functional.layer_norm(x.repeat_interleave(counts, 1), (6,))
    assert torch.allclose(got[:, [0, 1, 3]], repeated[:, [0, 3, 4]], atol=1e-6)
    assert torch.allclose(got, over_live_channels(layer, ChannelNorm(-1), x, 0.3 * counts))


class Shifted(nn.LayerNorm):
    """Not what its base class is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1) + 0.1


class Renamed(nn.GroupNorm):
    """What its base class is."""


def test_a_subclass_is_judged_by_what_it_computes() -> None:
    assert channel_norm(LayerNorm2d(6)) == ChannelNorm(1)
    assert channel_norm(seeded(LayerNorm2d(3))) == ChannelNorm(1)  # as wide as an image's rows
    assert channel_norm(Renamed(2, 6)) == ChannelNorm(1, 2)
    assert channel_norm(Shifted(6)) is channel_norm(nn.LayerNorm((6, 4))) is None
    assert channel_norm(nn.BatchNorm2d(4)) is None


def test_removal_that_would_move_channels_between_groups_is_none() -> None:
    """One GroupNorm over two groups of the model side by side: they stay whole."""
    table = GroupTable.build(seeded(Joined(nn.GroupNorm(4, 20))), batch("")[:1])
    for name in ("left", "right"):
        why = table.groups[name].blocked or ""
        assert "'norm' puts a part of these channels into groups" in why


def test_what_stays_approximate_is_named() -> None:
    model, x = seeded(Joined(Shifted(20))), batch("")
    masks = SoftMasks(model, x[:1])
    assert masks.inexact == {"left": ("norm",), "right": ("norm",)} == masks.normalised
    masks.zero({"left": masks.table.groups["left"].units(torch.tensor([0]))})
    with masks.attached():
        masked = run(model, x)
    gone = {"left": masks.table.groups["left"].units(torch.tensor([0]))}
    remove_channels(masks.table, gone)
    assert (masked - run(model, x)).abs().max() > 1e-3


def test_no_channel_left_is_no_nan() -> None:
    model, x = convnext(), batch("convnext")
    masks = SoftMasks(model, x[:1])
    for name in masks.channels:
        masks.set(name, 0.0)
    with masks.attached():
        gradients = torch.autograd.grad(model(x).sum(), masks.parameters(), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)


def test_half_precision() -> None:
    model, x = seeded(Mixer()).bfloat16(), batch("").bfloat16()
    before = run(model, x)
    masks = SoftMasks(model, x[:1])
    with masks.attached():
        assert torch.equal(model(x).detach(), before)
        masks.set("embed", 0.5)
        assert run(model, x).dtype == torch.bfloat16


def test_both_halves_of_a_split_know() -> None:
    model, x = convnext(), batch("convnext")
    pruned = copy.deepcopy(model)
    split, twin = Split(model, x[:1], at="features.1.0"), Split(pruned, x[:1], at="features.1.0")
    masks = SoftMasks(model, x[:1], split=split, boundary="prune", scope="model")
    gone = half_of_every_group(masks)
    masks.zero(gone)
    with torch.no_grad():
        z, logits = masks.split_forward(x)
        remove_channels(GroupTable.build(pruned, x[:1]), gone)
        twin.refresh()
        alive = [c for c in range(16) if c not in gone["features.0.0"].tolist()]
        assert torch.allclose(z[:, alive], twin.edge(x), atol=1e-5)
        assert torch.allclose(logits, twin.cloud(twin.edge(x)), atol=1e-5)


def test_a_mask_in_the_statistics_cannot_be_folded() -> None:
    model, x = seeded(Mixer()), batch("")
    masks = SoftMasks(model, x[:1])
    masks.zero({"embed": [0]})
    with pytest.raises(UnsupportedModelError, match="'norm1' normalises"):
        fold_masks(masks)
    masks.set("embed", 0.5)
    with masks.attached():
        expected = run(model, x)
    fold_masks(masks)
    assert torch.allclose(run(model, x), expected, atol=1e-6)
