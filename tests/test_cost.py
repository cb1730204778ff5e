"""Counting: hand-computed values, an independent second counter, and leaving the model alone."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model

from patrol_prune.cost import count_macs, count_params, edge_macs, feature_bytes
from patrol_prune.errors import InputError
from patrol_prune.split import Split


def total(module: nn.Module, *shape: int) -> int:
    return count_macs(module, torch.zeros(*shape)).total


@pytest.mark.parametrize(
    "module, shape, expected",
    [
        (nn.Conv2d(3, 8, 3), (1, 3, 6, 6), 8 * 3 * 9 * 4 * 4),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (1, 3, 6, 6), 8 * 3 * 9 * 3 * 3),
        (nn.Conv2d(4, 8, 3, padding="same", groups=2), (1, 4, 6, 6), 8 * 2 * 9 * 6 * 6),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 6 * 4 * 5 * 5),
        (nn.Conv1d(3, 8, 3), (1, 3, 10), 8 * 3 * 3 * 8),
        (nn.Linear(5, 7), (1, 5), 35),
        (nn.Linear(5, 7, bias=False), (1, 9, 5), 9 * 35),
        (nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 4)), (1, 3, 2, 2), 24 + 32),
        (nn.BatchNorm2d(3), (1, 3, 6, 6), 0),
        (nn.AdaptiveAvgPool2d(1), (1, 3, 6, 6), 0),
    ],
)
def test_hand_computed(module: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert total(module, *shape) == expected


class Attention(nn.Module):
    """`form` writes the same two products in four ways; 6 tokens of width 8, 2 heads."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.form == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        if self.form == "matmul":
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v
        if self.form == "einsum":
            weights = torch.einsum("bhqd, bhkd -> bhqk", q, k).softmax(-1)
            return torch.einsum("bhqk,bhkd->bhqd", weights, v)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        bias = torch.zeros(2, 6, 6)
        return torch.bmm(torch.baddbmm(bias, q, k.transpose(1, 2)).softmax(-1), v)


@pytest.mark.parametrize("form", ["fused", "matmul", "einsum", "bmm"])
def test_functional_attention(form: str) -> None:
    projection, product = 6 * 8 * 24, 2 * 6 * 6 * 4
    count = count_macs(Attention(form), torch.randn(1, 6, 8))
    assert count.total == projection + 2 * product
    assert count.by_module["qkv"] == projection


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_is_not_hidden_by_the_fast_path(need_weights: bool) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=need_weights)[0]

    layer = Layer().eval().requires_grad_(False)
    with torch.no_grad():
        assert total(layer, 1, 6, 8) == 6 * 8 * 32 + 2 * (2 * 6 * 6 * 4)


def test_products_with_vectors_and_broadcasting() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vector, self.matrix = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5, 3))

        def forward(self, x: Tensor) -> Tensor:  # [1, 4, 5]
            y = x[0] @ self.vector  # 4 * 5
            return (x @ self.matrix).sum() + torch.mv(x[0], self.vector).sum() + y.sum()

    assert total(Products(), 1, 4, 5) == 20 + 60 + 20


@pytest.mark.parametrize("name, size", [("resnet18", 64), ("densenet121", 32), ("swin_t", 64)])
def test_agrees_with_an_independent_counter(name: str, size: int) -> None:
    model = get_model(name, weights=None).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    assert 2 * total(model, 1, 3, size, size) == counter.get_total_flops()


def test_published_totals() -> None:
    """He et al. 2016 give 1.8e9 for ResNet-18 at 224 x 224."""
    assert total(get_model("resnet18", weights=None), 1, 3, 224, 224) == 1_814_073_344


def test_batch_size_does_not_matter_and_a_tuple_is_fine() -> None:
    conv = nn.Conv2d(3, 8, 3)
    assert total(conv, 4, 3, 6, 6) == count_macs(conv, (torch.zeros(1, 3, 6, 6),)).total


def test_a_layer_called_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))

    count = count_macs(Twice(), torch.zeros(1, 4))
    assert count.total == count.by_module["fc"] == 32


def test_what_is_not_counted_is_listed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Hardswish(), nn.AvgPool2d(2))
    uncounted = count_macs(model, torch.zeros(1, 3, 4, 4)).uncounted
    assert uncounted == {"batch_norm": 1, "hardswish": 1, "avg_pool2d": 1}
    assert "lstm" in count_macs(LastOfLSTM(), torch.zeros(1, 2, 4)).uncounted


class LastOfLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model.train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    calls: list[int] = []
    model[2].register_forward_hook(lambda *a: calls.append(1))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        if fails:
            with pytest.raises(InputError, match=r"\(1, 5, 4, 4\)"):
                total(model, 1, 5, 4, 4)
        else:
            assert total(model, 2, 3, 4, 4) == 3 * 4 * 16 and calls == [1]
    assert caplog.text == ""
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert not model[0].weight.requires_grad and model[0].weight.grad is None
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert torch.backends.mha.get_fastpath_enabled()


def test_parameters_bytes_and_edge() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model.append(model[1])
    assert count_params(model) == 15 + 8
    assert feature_bytes((128, 28, 28)) == 128 * 28 * 28 * 4
    assert feature_bytes((128, 28, 28), torch.int8) == feature_bytes((128, 28, 28)) // 4
    assert edge_macs(Split(model, torch.zeros(2, 4), "1")) == 12


@pytest.mark.parametrize("bad", [None, (), "x", (torch.zeros(1, 4), torch.zeros(1, 4))])
def test_example_inputs_are_checked(bad: object) -> None:
    with pytest.raises(InputError, match="one tensor"):
        count_macs(nn.Linear(4, 4), bad)  # type: ignore[arg-type]


class Product(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.pairs = form, nn.Bilinear(5, 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "tensordot":
            return torch.tensordot(x, torch.zeros(3, 5, 7), dims=([2, 1], [1, 0]))
        if self.form == "inner":
            return torch.inner(x, torch.zeros(4, 5))
        if self.form == "inner by a number":
            return torch.inner(x, torch.tensor(2.0))
        if self.form == "addbmm":
            return torch.addbmm(torch.zeros(3, 3), x, x.transpose(1, 2))
        return self.pairs(x, x) if self.form == "bilinear" else torch.einsum("bij->bji", x)


@pytest.mark.parametrize(("form", "expected"), [
    ("tensordot", 3 * 5 * 7), ("inner", 3 * 4 * 5), ("addbmm", 3 * 3 * 5),
    ("bilinear", 3 * 4 * 5 * 5), ("einsum", 0), ("inner by a number", 0),
])
def test_other_products(form: str, expected: int) -> None:
    assert total(Product(form), 1, 3, 5) == expected
