"""Operators between layers that do more with channels than keep them apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from pruning_helpers import half_of_every_group, randomize
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune import following
from patrol_prune._tp import traced
from patrol_prune.group_table import GroupTable, remove_channels
from patrol_prune.masks import SoftMasks
from patrol_prune.operators import doubtful

Operator = Callable[[Tensor], Tensor]
ORDER = torch.tensor([3, 0, 1, 2, 7, 5, 6, 4])


class Between(nn.Module):
    """An operator between two convolutions, and a third behind them."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator = operator
        width = operator(torch.zeros(1, 8, 6, 6)).shape[1]
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second, self.third = nn.Conv2d(width, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.operator(torch.relu(self.first(x)))
        return self.third(torch.relu(self.second(x)))


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
}
APART: dict[str, Operator] = {
    "flip": lambda x: x.flip(2),
    "roll": lambda x: x.roll(1, 3),
    "softmax": lambda x: x.flatten(2).softmax(2).unflatten(2, x.shape[2:]),
    "normalize": lambda x: functional.normalize(x.flatten(2), dim=2).unflatten(2, x.shape[2:]),
    "every second": lambda x: x[:, :, ::2],
    "mean": lambda x: x - x.mean((2, 3), keepdim=True),
    "maximum": lambda x: x.amax(3, keepdim=True),
    "local response": lambda x: functional.local_response_norm(x, 3),
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


@pytest.mark.parametrize("name", APART)
def test_the_same_over_positions_keeps_channels_free(name: str) -> None:
    model, x = randomize(Between(APART[name])).eval(), torch.randn(1, 3, 6, 6)
    table, removed, masked = removed_and_masked(model, x)
    if name not in ("local response", "pixels in windows"):
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
    assert table.groups["layers.2"].blocked == "removing channels changes more than these channels"


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


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0",
                                  "densenet121", "squeezenet1_1", "regnet_y_400mf", "mnasnet0_5"])
def test_ordinary_networks_need_no_trial(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "changing_more", None)
    model, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 32, 32)
    assert doubtful(traced(model, x)) == ()
    GroupTable.build(model, x)
