"""Attention with heads of its own computes what the old layer does, and loses heads one by one."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_helpers import half_of_every_group, seeded
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformerBlockV2,
)

import patrol_prune as pp
from patrol_prune import checkpoint
from patrol_prune.attention_heads import UNITS, HeadProduct, channel_order
from patrol_prune.folding import fold_masks
from patrol_prune.group_table import GroupTable, remove_channels
from patrol_prune.open_attention import open_attention, opened_attention

SWIN = {"patch_size": [4, 4], "embed_dim": 12, "depths": [2, 2], "num_heads": [3, 6],
        "window_size": [4, 4], "num_classes": 5}  # fmt: skip


def vit() -> nn.Module:
    return seeded(VisionTransformer(32, 8, 2, 4, 16, 32, num_classes=5))


def swin() -> nn.Module:
    return seeded(SwinTransformer(**SWIN))


def swin_v2() -> nn.Module:
    return seeded(SwinTransformer(**SWIN, block=SwinTransformerBlockV2,
                                  downsample_layer=PatchMergingV2))  # fmt: skip


def maxvit() -> nn.Module:
    return seeded(MaxVit(
        input_size=(32, 32), stem_channels=8, partition_size=2, block_channels=[16, 24],
        block_layers=[1, 1], head_dim=4, stochastic_depth_prob=0.0, num_classes=5,
    ))  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "vit": (vit, "encoder.layers.encoder_layer_1", 2),
    "swin": (swin, "features.1", 4),
    "swin_v2": (swin_v2, "features.1", 4),
    "maxvit": (maxvit, "blocks.0", 4),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[[], nn.Module], Tensor, str, int]:
    make, at, layers = CASES[request.param]
    return make, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)), at, layers


Case = tuple[Callable[[], nn.Module], Tensor, str, int]


class TestTheSameLayer:
    @pytest.mark.parametrize("unit", UNITS)
    def test_outputs_gradients_and_cost_stay(self, case: Case, unit: str) -> None:
        make, x, at, layers = case
        model, old = make(), make()
        opened = open_attention(model, x, unit=unit)
        assert len(opened.opened) == layers and not opened.left
        assert opened_attention(model) == dict.fromkeys(opened.opened, unit)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        close(model(ours), old(theirs))
        model(ours).square().sum().backward()
        old(theirs).square().sum().backward()
        close(ours.grad, theirs.grad)
        cost = [pp.edge_macs(pp.Split(m, x, at=at)) for m in (model, old)]
        assert cost[0] == cost[1]

    def test_the_mode_of_every_module_stays(self) -> None:
        model = vit().train()
        model.encoder.layers[1].self_attention.eval()
        open_attention(model, torch.randn(1, 3, 32, 32))
        assert model.encoder.layers[0].self_attention.core.training
        assert not model.encoder.layers[1].self_attention.core.training

    @settings(max_examples=40)
    @given(
        second=st.booleans(), heads=st.integers(1, 4), head_dim=st.integers(1, 4),
        window=st.tuples(st.integers(2, 4), st.integers(2, 4)), shifted=st.booleans(),
        size=st.tuples(st.integers(1, 11), st.integers(1, 11)), bias=st.booleans(),
        unit=st.sampled_from(UNITS),
    )  # fmt: skip
    def test_windows_of_any_size(
        self, second: bool, heads: int, head_dim: int, window: tuple[int, int], shifted: bool,
        size: tuple[int, int], bias: bool, unit: str,
    ) -> None:  # fmt: skip
        kind = ShiftedWindowAttentionV2 if second else ShiftedWindowAttention
        shift = [w // 2 if shifted else 0 for w in window]
        layer = seeded(kind(heads * head_dim, list(window), shift, heads, qkv_bias=bias))
        x = torch.randn(2, *size, heads * head_dim, generator=torch.Generator().manual_seed(1))
        model = nn.Sequential(layer)
        expected = model(x)
        assert open_attention(model, x, unit=unit).opened == ("0",)
        close(model(x), expected)

    def test_dropout_is_of_training_alone(self) -> None:
        layer = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        model, x = Itself(layer).eval(), torch.randn(2, 6, 8)
        expected = model(x)
        open_attention(model, x)
        close(model(x), expected)
        model.train()
        assert not torch.equal(model(x), model(x))

    def test_a_sequence_may_come_first(self) -> None:
        model, x = Itself(nn.MultiheadAttention(8, 2)).eval(), torch.randn(5, 3, 8)
        expected = model(x[:1]), model(x)
        assert open_attention(model, x).opened == ("attention",)
        close(model(x[:1]), expected[0])
        close(model(x), expected[1])

    def test_frozen_parameters_stay_frozen(self) -> None:
        model = vit().requires_grad_(False)
        model.encoder.layers[1].self_attention.in_proj_weight.requires_grad_(True)
        open_attention(model, torch.randn(1, 3, 32, 32))
        trained = {n.removeprefix("encoder.layers.encoder_layer_1.self_attention.")
                   for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {"q.weight", "k.weight", "v.weight"}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_precisions(self, dtype: torch.dtype, tmp_path: Path) -> None:
        model, x = swin().to(dtype), torch.randn(2, 3, 32, 32).to(dtype)
        assert len(open_attention(model, x).opened) == 4
        split = pp.Split(model, x, at="features.1")
        pp.save(split, tmp_path / "it")
        for make in (swin, lambda: swin().to(dtype)):
            assert torch.equal(pp.load(tmp_path / "it", make).model(x), model(x))

    def test_nobody_s_random_numbers_are_used(self) -> None:
        model = vit()
        before = torch.get_rng_state()
        open_attention(model, torch.zeros(1, 3, 32, 32))
        assert torch.equal(torch.get_rng_state(), before)

    def test_zeros_as_an_example_prove_nothing_and_are_not_taken(self) -> None:
        model = vit()
        x = torch.randn(1, 3, 32, 32)
        expected = model(x)
        open_attention(model, torch.zeros(1, 3, 32, 32))
        close(model(x), expected)


class TestWhatStays:
    def test_a_layer_that_reads_attention_s_weights_keeps_it(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model, x = nn.Sequential(layer).eval(), torch.randn(1, 5, 8)
        expected = model(x)
        found = open_attention(model, x)
        assert not found.opened and "does not run" in found.left["0.self_attn"]
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize(
        ("how", "why"),
        [({"masked": True}, "no masks"), ({"crossed": True}, "other keys"),
         ({"weights": True}, "need_weights=False")],
    )  # fmt: skip
    def test_what_the_new_layer_cannot_do(self, how: dict[str, bool], why: str) -> None:
        model = Itself(nn.MultiheadAttention(8, 2, batch_first=True), **how)
        x = torch.randn(1, 5, 8)
        nn.init.zeros_(model.attention.out_proj.weight)  # the outputs could not tell
        expected = model.eval()(x)
        assert why in open_attention(model, x).left["attention"]
        assert torch.equal(model(x), expected)

    def test_a_mask_that_comes_later_is_refused(self) -> None:
        model = Itself(nn.MultiheadAttention(8, 2, batch_first=True)).eval()
        assert open_attention(model, torch.randn(1, 5, 8)).opened
        model.masked = True
        with pytest.raises(pp.InputError, match="no masks"):
            model(torch.randn(1, 5, 8))

    def test_shared_and_hooked_layers(self) -> None:
        layer = nn.MultiheadAttention(8, 2, batch_first=True)
        twice = nn.Sequential(Itself(layer), Itself(layer)).eval()
        found = open_attention(twice, torch.randn(1, 5, 8))
        assert not found.opened and "shares weights" in found.left["0.attention"]
        hooked = Itself(nn.MultiheadAttention(8, 2, batch_first=True)).eval()
        hooked.attention.out_proj.register_forward_hook(lambda *_: None)
        assert "hooks" in open_attention(hooked, torch.randn(1, 5, 8)).left["attention"]

    def test_what_inherits_may_do_anything(self) -> None:
        class Own(nn.MultiheadAttention):
            pass

        found = open_attention(Itself(Own(8, 2, batch_first=True)), torch.randn(1, 5, 8))
        assert found.opened == () and found.left == {}

    def test_a_model_that_asks_what_layer_it_has(self) -> None:
        model = Asking(nn.MultiheadAttention(8, 2, batch_first=True)).eval()
        x = torch.randn(1, 5, 8)
        expected = model(x)
        assert "gives something else" in open_attention(model, x).left["attention"]
        assert torch.equal(model(x), expected)

    def test_the_model_itself(self) -> None:
        layer = ShiftedWindowAttention(8, [2, 2], [0, 0], 2).eval()
        assert "the model itself" in open_attention(layer, torch.randn(1, 4, 4, 8)).left[""]
        with pytest.raises(pp.UnsupportedModelError, match="the model itself"):
            open_attention(layer, torch.randn(1, 4, 4, 8), names=[""])
        assert "" not in dict(layer.named_children())

    def test_timm_s_other_attention_is_not_taken_for_the_plain_one(self) -> None:
        timm = pytest.importorskip("timm")
        made = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 3}
        plain = timm.models.vision_transformer.VisionTransformer(**made, num_classes=5).eval()
        beit = timm.models.beit.Beit(**made, num_classes=5).eval()
        x = torch.randn(1, 3, 32, 32)
        expected = plain(x)
        assert open_attention(plain, x).opened == ("blocks.0.attn",)
        close(plain(x), expected)
        assert open_attention(beit, x).opened == ()

    def test_attention_that_adds_keys(self) -> None:
        model = Itself(nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)).eval()
        assert "keys and values" in open_attention(model, torch.randn(1, 5, 8)).left["attention"]

    def test_an_asked_for_layer_that_cannot_is_an_error(self) -> None:
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
        with pytest.raises(pp.UnsupportedModelError, match=r"0\.self_attn"):
            open_attention(model, torch.randn(1, 5, 8), names=["0.self_attn"])
        with pytest.raises(pp.InputError, match="Did you mean"):
            open_attention(model, torch.randn(1, 5, 8), names=["0.self_atn"])
        both = nn.Sequential(Itself(nn.MultiheadAttention(8, 2, batch_first=True)), *model).eval()
        with pytest.raises(pp.UnsupportedModelError):
            open_attention(both, torch.randn(1, 5, 8), names=["0.attention", "1.self_attn"])
        assert isinstance(both[0].attention, nn.MultiheadAttention)

    def test_a_network_without_attention_is_not_even_run(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
        model.register_forward_hook(lambda *_: pytest.fail("was run"))
        assert open_attention(model, torch.randn(1, 3, 8, 8)).opened == ()


class TestHeadsGo:
    @pytest.mark.parametrize("unit", UNITS)
    def test_ones_change_no_bit_and_zeros_are_removals(self, case: Case, unit: str) -> None:
        make, x, _, layers = case
        model = make()
        open_attention(model, x, unit=unit)
        before = model(x)
        masks = pp.SoftMasks(model, x)
        heads = [n for n in masks.channels if n.endswith((".q", ".k", ".v"))]
        assert len(heads) == layers and not masks.inexact
        with masks.attached():
            assert torch.equal(model(x), before)
        gone = half_of_every_group(masks)
        masks.zero(gone)
        with masks.attached():
            expected = model(x)
        remove_channels(masks.table, gone)
        close(model(x), expected)
        assert not torch.allclose(expected, before, rtol=0.0, atol=1e-3)

    @pytest.mark.parametrize("kind", ["vit", "swin", "swin_v2", "maxvit"])
    def test_a_removed_head_is_a_head_that_nobody_reads(self, kind: str) -> None:
        """Held against the old layer: its output columns of that head set to zero."""
        make, _, _ = CASES[kind]
        model, old, x = make(), make(), torch.randn(2, 3, 32, 32)
        name = open_attention(model, x).opened[-1]
        layer = model.get_submodule(name)
        heads, head_dim, lost = layer.num_heads, layer.core.head_dim, 1
        source = old.get_submodule(name)
        out = next(getattr(source, n) for n in ("out_proj", "proj", "merge") if hasattr(source, n))
        out.weight.data[:, lost * head_dim : (lost + 1) * head_dim] = 0.0
        table = GroupTable.build(model, x)
        group = next(n for n in table.groups if n.startswith(f"{name}."))
        remove_channels(table, {group: table.groups[group].units(torch.tensor([lost]))})
        assert layer.num_heads == heads - 1 == source_heads(source) - 1
        assert layer.core.kept().tolist() == [h for h in range(heads) if h != lost]
        close(model(x), old(x))

    @pytest.mark.parametrize("unit", UNITS)
    def test_the_budget_is_met_and_counted_exactly(self, case: Case, unit: str) -> None:
        make, x, at, _ = case
        model = make()
        open_attention(model, x, unit=unit)
        split = pp.Split(model, x, at=at)
        pruner = pp.PatrolPruner(model, x, scored(split, x), split=split, edge_macs=0.7)
        assert pruner.costs.constant == 0 and pruner.dense_edge_macs == pp.edge_macs(split)
        result = pruner.step()
        assert result.edge_macs == pp.edge_macs(split) <= result.budget
        model.train()
        model(x).sum().backward()

    def test_one_head_may_be_all_that_is_left(self) -> None:
        model, x = vit(), torch.randn(2, 3, 32, 32)
        open_attention(model, x)
        split = pp.Split(model, x, at="encoder.layers.encoder_layer_0")
        importance = tp.importance.GroupMagnitudeImportance()
        least = pp.PatrolPruner(model, x, importance, split=split, edge_macs=1.0)
        pp.PatrolPruner(model, x, importance, split=split,
                        edge_macs=least.smallest_edge_macs()).step()  # fmt: skip
        assert model.encoder.layers[0].self_attention.num_heads == 1
        assert model.encoder.layers[1].self_attention.num_heads == 4
        assert model(x).isfinite().all()

    def test_blocks_go_beside_heads(self) -> None:
        model, x = vit(), torch.randn(2, 3, 32, 32)
        open_attention(model, x)
        split = pp.Split(model, x, at="encoder.layers.encoder_layer_1")
        masks = pp.SoftMasks(model, x, split=split, blocks=True)
        name = "encoder.layers.encoder_layer_0.self_attention"
        masks.zero({}, [name])
        with masks.attached():
            expected = model(x)
        pp.remove_blocks(split, [name])
        close(model(x), expected)

    def test_learned_masks_take_whole_heads(self) -> None:
        model, x = vit(), torch.randn(8, 3, 32, 32)
        open_attention(model, x)
        split = pp.Split(model, x, at="encoder.layers.encoder_layer_1")
        labels = torch.arange(8) % 5
        config = pp.MaskConfig(epochs=6, lr=0.01, max_pruning_ratio=0.8)
        objective = pp.PatrolObjective(split, functional.cross_entropy)
        learned = pp.learn_masks(split, [(x, labels)] * 3, objective, edge_macs=0.7,
                                 config=config, progress=False)  # fmt: skip
        learned.harden()
        for layer in model.encoder.layers:
            attention = layer.self_attention
            assert attention.core.head_of.numel() == attention.num_heads * 4
            assert attention.q.out_features == attention.num_heads * 4
        assert model(x).isfinite().all()

    @pytest.mark.slow
    def test_torch_pruning_s_own_pruner_takes_whole_heads(self) -> None:
        """With its convention for channels that go together, and nothing else of ours imported."""
        script = """
import torch, torch_pruning as tp, patrol_prune as pp
from torchvision.models import VisionTransformer
model, x = VisionTransformer(32, 8, 2, 4, 16, 32).eval(), torch.rand(1, 3, 32, 32)
names = pp.open_attention(model, x).opened
layers = [model.get_submodule(n) for n in names]
whole = [model.heads, model.conv_proj, *(l.mlp[3] for l in model.encoder.layers),
         *(l.out for l in layers)]
tp.pruner.BasePruner(
    model, x, tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5, ignored_layers=whole,
    out_channel_groups={p: p.tied for a in layers for p in (a.q, a.k, a.v)},
    in_channel_groups={}, num_heads={},
).step()
model(x)
print([a.num_heads for a in layers])
"""
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], text=True,
                              capture_output=True, check=True)  # fmt: skip
        assert done.stdout.strip() == "[2, 2]"

    def test_projections_that_lost_channels_and_heads_that_did_not(self) -> None:
        model, x = vit(), torch.randn(1, 3, 32, 32)
        open_attention(model, x)
        layer = model.encoder.layers[0].self_attention
        for p in (layer.q, layer.k, layer.v):
            tp.prune_linear_out_channels(p, [0, 4, 8, 12])
        tp.prune_linear_in_channels(layer.out, [0, 4, 8, 12])
        with pytest.raises(pp.InputError, match="Prune opened attention by PatrolPruner"):
            model(x)


class TestKept:
    @pytest.mark.parametrize("unit", [
        "heads", pytest.param("dimensions", marks=pytest.mark.slow)])
    def test_load_gives_the_same_bits(self, case: Case, unit: str, tmp_path: Path) -> None:
        make, x, at, _ = case
        model = make()
        open_attention(model, x, unit=unit)
        split = pp.Split(model, x, at=at)
        pp.PatrolPruner(model, x, scored(split, x), split=split, edge_macs=0.7).step()
        expected = model(x)
        pp.save(split, tmp_path / "with")
        split.pruning_history = ()
        pp.save(split, tmp_path / "without")
        for name in ("with", "without"):
            again = pp.load(tmp_path / name, make)
            assert torch.equal(again.model(x), expected)
            assert torch.equal(again.cloud(again.edge(x)), expected)
            assert opened_attention(again.model) == opened_attention(model)

    def test_a_record_of_names_alone_is_of_heads(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As it was written before there were other units."""
        model, x = vit(), torch.randn(1, 3, 32, 32)
        open_attention(model, x)
        split = pp.Split(model, x, at="encoder.layers.encoder_layer_0")
        monkeypatch.setattr(checkpoint, "opened_attention", lambda m: [*opened_attention(m)])
        pp.save(split, tmp_path / "it")
        assert torch.equal(pp.load(tmp_path / "it", vit).model(x), model(x))

    def test_the_factory_may_open_it_itself(self, tmp_path: Path) -> None:
        x = torch.randn(1, 3, 32, 32)

        def opened() -> nn.Module:
            model = vit()
            open_attention(model, x)
            return model

        split = pp.Split(opened(), x, at="encoder.layers.encoder_layer_0")
        pp.save(split, tmp_path / "it")
        assert torch.equal(pp.load(tmp_path / "it", opened).model(x), split.model(x))

    def test_a_factory_that_opens_it_otherwise(self, tmp_path: Path) -> None:
        x = torch.randn(1, 3, 32, 32)

        def opened(unit: str) -> nn.Module:
            model = vit()
            open_attention(model, x, unit=unit)
            return model

        split = pp.Split(opened("dimensions"), x, at="encoder.layers.encoder_layer_0")
        pp.save(split, tmp_path / "it")
        same = pp.load(tmp_path / "it", lambda: opened("dimensions")).model
        assert torch.equal(same(x), split.model(x))
        with pytest.raises(pp.CheckpointError, match="lose heads, but .* lose dimensions"):
            pp.load(tmp_path / "it", lambda: opened("heads"))

    def test_a_factory_of_another_model(self, tmp_path: Path) -> None:
        model, x = vit(), torch.randn(1, 3, 32, 32)
        open_attention(model, x)
        pp.save(pp.Split(model, x, at="encoder.layers.encoder_layer_0"), tmp_path / "it")

        def other() -> nn.Module:
            net = vit()
            net.encoder.layers[1].self_attention = Twice(8)
            return net

        with pytest.raises(pp.CheckpointError, match="encoder_layer_1"):
            pp.load(tmp_path / "it", other)

    def test_copies_run_alone(self, case: Case) -> None:
        make, x, _, _ = case
        model = make()
        open_attention(model, x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), model(x))


def masked_dimensions(model: nn.Module, x: Tensor) -> tuple[pp.SoftMasks, list[str]]:
    """Masks of a model whose heads may lose dimensions, and the names of the heads' groups."""
    open_attention(model, x, unit="dimensions")
    masks = pp.SoftMasks(model, x)
    return masks, [n for n in masks.channels if n.endswith((".q", ".k", ".v"))]


class TestDimensionsGo:
    @pytest.mark.parametrize("kind", sorted(CASES))
    def test_what_is_left_is_attention_over_the_other_dimensions(self, kind: str) -> None:
        """Held against the formula, with q, k and v of the old layer's weights."""
        make, _, _ = CASES[kind]
        model, x = make(), torch.randn(2, 3, 32, 32)
        name = open_attention(model, x, unit="dimensions").opened[-1]
        layer = model.get_submodule(name)
        heads, head_dim, scale, cosine = (
            getattr(layer.core, n) for n in ("heads", "head_dim", "scale", "cosine"))
        given: list[Tensor] = []
        layer.q.register_forward_pre_hook(lambda m, args: given.append(args[0]))
        got: list[Tensor] = []
        layer.core.register_forward_hook(lambda m, args, out: got.append(out))
        biases: list[dict[str, Tensor]] = []
        layer.core.register_forward_pre_hook(
            lambda m, args, kwargs: biases.append(kwargs), with_kwargs=True)
        before = [(p.weight.clone(), p.bias) for p in (layer.q, layer.k, layer.v)]
        lost = list(range(0, head_dim, 2))
        left = [i for i in range(head_dim) if i not in lost]
        table = GroupTable.build(model, x)
        group = next(n for n in table.groups if n.startswith(f"{name}."))
        for calls in (given, got, biases):
            calls.clear()
        remove_channels(table, {group: table.groups[group].units(torch.tensor(lost))})
        model(x)
        assert layer.core.head_dim == len(left) and layer.num_heads == heads
        q, k, v = (functional.linear(given[0], w, b).unflatten(-1, (heads, head_dim))[..., left]
                   .transpose(-3, -2) for w, b in before)
        if cosine:
            own = biases[0]["logit_scale"].clamp(max=torch.tensor(100.0).log()).exp()
            unit = [t / t.norm(dim=-1, keepdim=True) for t in (q, k)]
            logits = torch.einsum("...nd,...md->...nm", *unit) * own
        else:
            logits = torch.einsum("...nd,...md->...nm", q, k) * scale
        logits = logits + biases[0].get("bias", 0.0)
        if "mask" in biases[0]:
            mask = biases[0]["mask"]
            logits = logits + mask.repeat(len(logits) // len(mask), 1, 1)[:, None]
        expected = (logits.softmax(-1) @ v).transpose(-3, -2).flatten(-2)
        close(got[0], expected)

    @pytest.mark.parametrize("kind", sorted(CASES))
    def test_any_mask_folds_where_no_length_depends_on_it(self, kind: str) -> None:
        make, _, _ = CASES[kind]
        model, x = make(), torch.randn(2, 3, 32, 32)
        masks, own = masked_dimensions(model, x)
        if kind == "swin_v2":
            assert set(own) <= set(masks.normalised)
            return
        assert not set(own) & set(masks.normalised)
        for number, name in enumerate(own):
            g = torch.Generator().manual_seed(number)
            masks.set(name, torch.rand(len(masks.channels[name]), generator=g))
        with masks.attached():
            expected = model(x)
        plain = model(x)
        fold_masks(masks)
        close(model(x), expected)
        assert not torch.allclose(plain, expected, rtol=0.0, atol=1e-3)

    @pytest.mark.parametrize("kind", sorted(CASES))
    def test_the_slope_at_ones_is_that_of_the_way_to_removal(self, kind: str) -> None:
        """A central difference of the masked model, in every unit of one layer."""
        make, _, _ = CASES[kind]
        model, x = make().double(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
        masks, (name, *_) = masked_dimensions(model, x)
        mask = masks.channels[name]
        mask.data = mask.data.double()
        with masks.attached():
            model(x).square().sum().backward()
            for channel in range(0, len(mask), 3):
                values = []
                for step in (1e-5, -1e-5):
                    mask.data[channel] = 1.0 + step
                    values.append(float(model(x).detach().square().sum()))
                    mask.data[channel] = 1.0
                slope = (values[0] - values[1]) / 2e-5
                assert slope == pytest.approx(float(mask.grad[channel]), rel=1e-4, abs=1e-7)

    @pytest.mark.parametrize("kind", sorted(CASES))
    def test_masks_of_each_image_alone(self, kind: str) -> None:
        make, _, _ = CASES[kind]
        model, x = make(), torch.randn(3, 3, 32, 32)
        masks, (name, *_) = masked_dimensions(model, x)
        index = list(masks.channels).index(name)
        alone = []
        with masks.attached():
            for image in x:
                out = model(image[None]).square().sum()
                alone.append(torch.autograd.grad(out, masks.channels[name])[0])
            with masks.per_image(len(x)) as copies:
                each = torch.autograd.grad(model(x).square().sum(), copies[index])[0]
        close(each, torch.stack(alone))

    def test_shared_q_with_masks_of_its_own_is_not_folded(self) -> None:
        model, x = vit(), torch.randn(1, 3, 32, 32)
        open_attention(model, x, unit="dimensions")
        one, two = (layer.self_attention for layer in model.encoder.layers)
        masks = pp.SoftMasks(model, x)
        own = [n for n in masks.channels if n.endswith((".q", ".k", ".v"))]
        two.q.weight = one.q.weight
        assert not set(own[:1]) & set(pp.SoftMasks(model, x).channels)  # tied, it stays whole
        before = one.q.weight.clone()
        masks.set(own[0], 0.5)
        with pytest.raises(pp.UnsupportedModelError, match="share the weight"):
            fold_masks(masks)
        assert torch.equal(one.q.weight, before)
        masks.set(own[1], 0.5)
        with masks.attached():
            expected = model(x)
        fold_masks(masks)
        close(model(x), expected)

    def test_a_root_has_no_infinite_slope_at_zero(self) -> None:
        model, x = swin_v2(), torch.randn(1, 3, 32, 32)
        masks, (name, *_) = masked_dimensions(model, x)
        masks.set(name, 0.0)
        with masks.attached():
            model(x).sum().backward()
        assert masks.channels[name].grad.isfinite().all()

    def test_learned_masks_take_the_same_dimensions_of_every_head(self) -> None:
        model, x = vit(), torch.randn(8, 3, 32, 32)
        open_attention(model, x, unit="dimensions")
        split = pp.Split(model, x, at="encoder.layers.encoder_layer_1")
        config = pp.MaskConfig(epochs=6, lr=0.01, max_pruning_ratio=0.8)
        objective = pp.PatrolObjective(split, functional.cross_entropy)
        pp.learn_masks(split, [(x, torch.arange(8) % 5)] * 3, objective, edge_macs=0.7,
                       config=config, progress=False).harden()  # fmt: skip
        for layer in model.encoder.layers:
            attention = layer.self_attention
            assert attention.num_heads == 4
            assert attention.q.out_features == 4 * attention.core.head_dim
        assert any(a.self_attention.core.head_dim < 4 for a in model.encoder.layers)
        assert model(x).isfinite().all()

    def test_an_unknown_unit(self) -> None:
        with pytest.raises(pp.InputError, match="score.head_unit.* heads, dimensions, came 'rows'"):
            open_attention(vit(), torch.randn(1, 3, 32, 32), unit="rows")


@given(heads=st.integers(1, 6), head_dim=st.integers(1, 6), unit=st.sampled_from(UNITS))
def test_the_order_puts_every_unit_s_channels_where_ties_are(
    heads: int, head_dim: int, unit: str
) -> None:
    order = channel_order(heads, head_dim, unit)
    core = HeadProduct(heads, head_dim, scale=1.0, unit=unit)
    assert sorted(order.tolist()) == list(range(heads * head_dim))
    assert torch.equal(core.head_of.long(), order // head_dim)
    assert core.kept().tolist() == list(range(heads))
    assert (core.heads, core.head_dim) == (heads, head_dim)
    tied = order.view(core.tied, -1)  # `{i + k C / tie}` by columns
    same = tied // head_dim if unit == "heads" else tied % head_dim
    assert (same == same[:1]).all()


class Itself(nn.Module):
    """Attention of a sequence to itself, or not quite."""

    def __init__(
        self, attention: nn.Module, masked: bool = False, crossed: bool = False,
        weights: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention, self.masked, self.crossed = attention, masked, crossed
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1]).triu(1).bool() if self.masked else None
        other = x.flip(1) if self.crossed else x
        value: Tensor = self.attention(x, x, other, attn_mask=mask, need_weights=self.weights)[0]
        return value


class Asking(Itself):
    """Adds its input only around the layer it knows."""

    def forward(self, x: Tensor) -> Tensor:
        known = isinstance(self.attention, nn.MultiheadAttention)
        return super().forward(x) + (x if known else 0.0)


class Twice(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, *args: Tensor, **kwargs: bool) -> tuple[Tensor, None]:
        return 2 * x, None


def source_heads(layer: nn.Module) -> int:
    return int(getattr(layer, "num_heads", None) or layer.n_heads)


def scored(split: pp.Split, x: Tensor) -> pp.PatrolImportance:
    importance = pp.PatrolImportance(pp.PatrolObjective(split, functional.cross_entropy))
    importance.accumulate(x, torch.arange(len(x)) % 5)
    return importance


def close(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert ours is not None and theirs is not None
    scale = float(theirs.detach().abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=2e-5 * scale + 1e-7)
