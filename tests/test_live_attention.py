"""Attention that loses channels of its input, its heads and its output at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pruning_helpers import HandMadeObjective, assert_zero_is_removal, half_of_every_group, seeded
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from patrol_prune._tp import GroupMagnitudeImportance
from patrol_prune.blocks import residual_blocks
from patrol_prune.budget import MacModel
from patrol_prune.checkpoint import load, save
from patrol_prune.cost import count_macs, count_params, feature_bytes
from patrol_prune.edge_sizes import EdgeSizes
from patrol_prune.errors import UnsupportedModelError
from patrol_prune.folding import fold_masks
from patrol_prune.group_table import GroupTable, remove_channels
from patrol_prune.importance import PatrolImportance
from patrol_prune.masks import SoftMasks
from patrol_prune.origins import rebuild_optimizer
from patrol_prune.pruner import PatrolPruner
from patrol_prune.split import Split

AT = "encoder.layers.encoder_layer_0"


def vit() -> nn.Module:
    return seeded(VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4,
                                    hidden_dim=32, mlp_dim=64, num_classes=5))


class Attending(nn.Module):
    """Attention with positions first, a mask, weights asked for, and no bias."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 24)
        self.attention = nn.MultiheadAttention(24, 3, bias=False, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).permute(2, 0, 1))
        ahead = torch.ones(len(x), len(x)).triu(1).bool()
        return self.head((x + self.attention(x, x, x, attn_mask=ahead)[0]).mean(0))


class Crossed(nn.Module):
    """Keys and values of another length, and of the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 24), nn.Linear(24, 5)
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        return self.head(self.attention(x[:, :4], x[:, 4:], x[:, 4:])[0].mean(1))


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (vit, 32),
    "attending": (lambda: seeded(Attending()), 4),
    "crossed": (lambda: seeded(Crossed()), 4),
}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    make, size = NETS[request.param]
    return make(), images(size)


def images(size: int, n: int = 2) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7)) + 0.3


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def attention_of(masks: SoftMasks) -> list[nn.MultiheadAttention]:
    return [m for m in masks.model.modules() if isinstance(m, nn.MultiheadAttention)]


@pytest.mark.parametrize("training", [False, True])
def test_zero_is_removal(net: tuple[nn.Module, Tensor], training: bool) -> None:
    net[0].train(training)
    assert_zero_is_removal(*net, half_of_every_group)


def test_ones_change_no_bit(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    before = run(model, x)  # on PyTorch's fast path
    with SoftMasks(model, x[:1]).attached():
        assert torch.equal(run(model, x), before)
    expected = model(x)
    loss = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    with SoftMasks(model, x[:1]).attached():
        got = model(x)
        assert torch.equal(got, expected)
        again = torch.autograd.grad(got.square().sum(), list(model.parameters()))
    for a, b in zip(again, loss, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-6)
    assert not any(m._forward_hooks for m in model.modules())


def test_the_images_shares_add_up_to_the_gradient(net: tuple[nn.Module, Tensor]) -> None:
    """Attention's own part of it is shared alike; what is not attention's is each image's own."""
    model, x = net
    masks = SoftMasks(model, x[:1])
    with masks.attached():
        whole = torch.autograd.grad(model(x).square().sum(), masks.parameters())
        with masks.per_image(len(x)) as copies:
            shares = torch.autograd.grad(model(x).square().sum(), copies)
    for share, gradient in zip(shares, whole, strict=True):
        assert torch.allclose(share.sum(0), gradient, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("at_ones", [True, False])
def test_gradients_are_finite_differences(net: tuple[nn.Module, Tensor], at_ones: bool) -> None:
    model, x = net[0].double(), net[1].double()
    masks = SoftMasks(model, x[:1])
    g = torch.Generator().manual_seed(1)
    for mask in masks.parameters():
        mask.data = torch.ones(len(mask)).double()
        if not at_ones:
            mask.data.uniform_(0.2, 1.2, generator=g)
    with masks.attached():
        gradients = torch.autograd.grad(model(x).sin().sum(), masks.parameters())
        for mask, gradient in zip(masks.parameters(), gradients, strict=True):
            direction = torch.randn(len(mask), generator=g).double()
            start, values = mask.detach().clone(), []
            for step in (1e-5, -1e-5):
                mask.data = start + step * direction
                values.append(run(model, x).sin().sum())
            mask.data = start
            slope = (values[0] - values[1]) / 2e-5
            assert torch.allclose(slope, gradient @ direction, rtol=1e-5, atol=1e-6)


def test_widths_stay_consistent_and_heads_equal() -> None:
    model, x = vit(), images(32)
    table = GroupTable.build(model, x[:1])
    stream = next(g for g in table.groups.values() if g.normalised)
    assert stream.tie == 4 and stream.blocked is None
    before = model.encoder.layers[1].self_attention.in_proj_weight.detach().clone()
    remove_channels(table, {stream.name: stream.units(torch.tensor([0, 5, 6]))})
    layer = model.encoder.layers[1].self_attention
    assert (layer.num_heads, layer.head_dim, layer.embed_dim, model.hidden_dim) == (4, 5, 20, 20)
    alive = [c for c in range(32) if c % 8 not in (0, 5, 6)]
    rows = [i * 32 + c for i in range(3) for c in alive]
    assert torch.equal(layer.in_proj_weight, before[rows][:, alive])
    assert layer.out_proj.weight.shape == (20, 20)
    model.train()(x).square().sum().backward()


class Halved(nn.Module):
    """Two groups of channels side by side: three heads do not take as much from each."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 12), nn.Linear(3, 12), nn.Linear(24, 5)
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.left(x), self.right(x)], 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize(
    ("model", "why"),
    [(Attending(add_bias_kv=True), "keys and values of its own"),
     (Halved(), "different numbers of channels")],
)
def test_attention_that_stays_says_why(model: nn.Module, why: str) -> None:
    groups = GroupTable.build(model, images(4, 1)).groups
    reasons = [g.blocked for g in groups.values() if "attention" in g.normalised]
    assert reasons and all(reason is not None and why in reason for reason in reasons)


def test_a_budget_takes_the_stream_and_survives_saving(tmp_path: Path) -> None:
    """With the boundary open the residual stream shrinks too; the closed form is fvcore's."""
    model, x = vit(), images(32)
    split = Split(model, x[:1], at=AT)
    pruner = PatrolPruner(model, x[:1], GroupMagnitudeImportance(), split=split, edge_macs=0.5,
                          boundary="prune", iterative_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    assert pruner.costs.dense == count_macs(split.edge, x).total
    results = [pruner.step() for _ in range(2)]
    assert results[-1].feature_shape[-1] == model.hidden_dim < 32 and not model.hidden_dim % 4
    assert results[-1].edge_macs == count_macs(split.edge, x).total <= results[-1].budget
    assert any("self_attention" in name for name in results[-1].cloud_changed)
    assert torch.equal(split.cloud(split.edge(x)), model(x))
    rebuilt = rebuild_optimizer(optimizer, model)
    assert set(rebuilt.state) == set(model.parameters())
    assert all(s["momentum_buffer"].shape == p.shape for p, s in rebuilt.state.items())
    save(split, tmp_path / "edge")
    loaded = load(tmp_path / "edge", vit).model
    assert torch.equal(run(loaded, x), run(model, x)) and loaded.hidden_dim == model.hidden_dim
    save(split, tmp_path / "sizes", history=[])
    assert torch.equal(run(load(tmp_path / "sizes", vit).model, x), run(model, x))


def test_parameters_of_attention_in_closed_form() -> None:
    model, x = vit(), images(32, 1)
    split = Split(model, x, at=AT)
    table = GroupTable.build(model, x, split=split)
    sizes = EdgeSizes(split, MacModel(split, table), narrows=True)
    gone = half_of_every_group(SoftMasks(model, x, table=table, split=split, boundary="prune"))
    kept = {n: torch.tensor(sorted(set(range(table.groups[n].channels)) - set(g.tolist())))
            for n, g in gone.items()}
    params, sent = sizes.params(kept), sizes.feature_bytes(kept)
    remove_channels(table, gone)
    split.refresh()
    assert (params, sent) == (count_params(split.edge), feature_bytes(split.feature_shape))


def test_a_closed_boundary_leaves_the_stream() -> None:
    model, x = vit(), images(32)
    split = Split(model, x[:1], at=AT)
    result = PatrolPruner(
        model, x[:1], GroupMagnitudeImportance(), split=split, edge_macs=0.8
    ).step()
    assert any("coupled" in why for why in result.left_whole.values()) and model.hidden_dim == 32


def test_closed_form_with_blocks() -> None:
    model, x = vit(), images(32, 1)
    split = Split(model, x, at="encoder.layers.encoder_layer_1")
    blocks = {n: b for n, b in residual_blocks(model, x, split=split).items()
              if b.blocked is None and b.location == "edge"}
    table = GroupTable.build(model, x, split=split)
    costs = MacModel(split, table, blocks=blocks)
    gone = f"{AT}.self_attention"
    stream = next(g for g in table.groups.values() if g.normalised)
    foretold = costs.macs({stream.name: 24}, without=[gone])
    alone = costs.macs({}, without=[gone])
    assert costs.dense - alone == blocks[gone].edge_macs
    remove_channels(table, {stream.name: stream.units(torch.tensor([1, 2]))})
    split.refresh()
    whole = count_macs(split.edge, x)
    attention = whole.by_module[gone]
    assert whole.total - attention == foretold


def test_cross_attention_stays_within_a_budget() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross, self.out = Crossed(), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cross(x).relu())

    model, x = seeded(Stem()), images(4, 1)
    split = Split(model, x, at="cross")
    pruner = PatrolPruner(model, x, GroupMagnitudeImportance(), split=split, edge_macs=1.0)
    assert pruner.costs.opaque == {"cross.attention"}
    assert "not those of self-attention" in pruner.scores()[1]["cross.embed"]


def test_scores_reach_the_stream() -> None:
    model, x = vit(), images(32, 4)
    split = Split(model, x[:1], at=AT)
    importance = PatrolImportance(HandMadeObjective(split, adversarial=False))
    importance.accumulate(x, torch.arange(4) % 5)
    stream = next(n for n, g in importance.masks.table.groups.items() if g.normalised)
    assert (importance.scores[stream].abs() > 0).all()
    pruner = PatrolPruner(model, x[:1], importance, split=split, edge_macs=0.6, boundary="prune")
    assert pruner.step().kept[stream][0] % 4 == 0


def test_attention_is_not_folded() -> None:
    masks = SoftMasks(seeded(Attending()), images(4, 1))
    masks.set("embed", torch.linspace(0.5, 1.0, 24))
    with pytest.raises(UnsupportedModelError, match="'attention' normalises"):
        fold_masks(masks)
    assert len(attention_of(masks)) == 1
