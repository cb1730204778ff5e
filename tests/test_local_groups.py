"""Where the whole model cannot be followed, its parts are pruned, and the rest is named."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from pruning_helpers import half_of_every_group, randomize
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from patrol_prune import local_groups
from patrol_prune._tp import ExplodingGroupsError, GroupMagnitudeImportance, traced
from patrol_prune.checkpoint import load, save
from patrol_prune.cost import count_macs
from patrol_prune.errors import UnsupportedModelError
from patrol_prune.following import followed
from patrol_prune.group_table import GroupTable, build_graph, remove_channels
from patrol_prune.local_groups import find_parts
from patrol_prune.masks import SoftMasks
from patrol_prune.plan import plan
from patrol_prune.pruner import PatrolPruner
from patrol_prune.split import Split

SWIN = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
        "window_size": [4, 4], "num_classes": 10, "mlp_ratio": 8.0}  # fmt: skip


def swin() -> nn.Module:
    return made(lambda: SwinTransformer(**SWIN))


def swin_v2() -> nn.Module:
    return made(
        lambda: SwinTransformer(
            **SWIN, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2
        )
    )


def maxvit() -> nn.Module:
    return made(
        lambda: MaxVit(
            input_size=(32, 32), stem_channels=8, partition_size=2, block_channels=[8, 16],
            block_layers=[1, 1], head_dim=4, stochastic_depth_prob=0.0, num_classes=10,
        )
    )  # fmt: skip


def vit() -> nn.Module:
    return made(
        lambda: torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=128,
            num_classes=10,
        )
    )  # fmt: skip


def shufflenet() -> nn.Module:
    return made(lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10))


def made(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = randomize(factory())
    for name, p in model.named_parameters():
        if name.endswith(("norm1.weight", "norm2.weight", "head.weight")):
            p.data.uniform_(0.5, 1.5)  # swin's second version and vit begin with zeros there
    return model


CASES = {
    "swin": (swin, 32, "features.3", "features.3.0.attn.qkv"),
    "swin_v2": (swin_v2, 32, "features.3", "features.3.0.attn.proj"),
    "maxvit": (maxvit, 32, "blocks.1.layers.0.layers.MBconv",
               "blocks.0.layers.0.layers.grid_attention.attn_layer.1.to_qkv"),
    "shufflenet": (shufflenet, 64, "stage3.4", "stage3.1.branch2.5"),
    "vit": (vit, 32, "encoder.layers.encoder_layer_1", "it crosses the split (coupled)"),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[[], nn.Module], Tensor, str, str]:
    make, size, at, whole = CASES[request.param]
    return make, torch.randn(1, 3, size, size), at, whole


def test_a_zero_mask_is_a_removal(
    case: tuple[Callable[[], nn.Module], Tensor, str, str],
) -> None:
    make, x, _, _ = case
    model = make()
    before, start = model(x), time.thread_time()
    masks = SoftMasks(model, x)
    assert time.thread_time() - start < 10.0
    assert masks.channels and not masks.inexact
    with masks.attached():
        assert torch.equal(model(x), before)
    gone = half_of_every_group(masks)
    masks.zero(gone)
    with masks.attached():
        masked = model(x)
    scale = before.abs().max()
    assert (masked - before).abs().max() > 1e-4 * scale
    parameters = sum(p.numel() for p in model.parameters())
    remove_channels(masks.table, gone)
    assert sum(p.numel() for p in model.parameters()) < 0.9 * parameters
    assert (masked - model(x)).abs().max() <= 1e-5 * scale


def test_the_budget_is_met_and_survives_saving(
    case: tuple[Callable[[], nn.Module], Tensor, str, str], tmp_path: Path
) -> None:
    make, x, at, whole = case
    model = make()
    split = Split(model, x, at=at)
    pruner = PatrolPruner(model, x, GroupMagnitudeImportance(), split=split, edge_macs=0.7)
    result = pruner.step()
    assert 0.98 * result.budget <= result.edge_macs <= result.budget
    assert result.edge_macs == count_macs(split.edge, x).total
    assert any(whole in f"{name}: {why}" for name, why in result.left_whole.items())
    assert torch.equal(split.cloud(split.edge(x)), model(x))
    save(split, tmp_path / "edge")
    loaded = load(tmp_path / "edge", make).model
    assert torch.equal(loaded(x), model(x))
    loaded.train()
    loaded(torch.cat([x, x + 1])).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in loaded.parameters())


SHUFFLES = functional.channel_shuffle, torch.channel_shuffle


class Shuffled(nn.Module):
    """What is shuffled is added to what is not, concatenated with it, and read by a convolution."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.ChannelShuffle(2)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.added, self.beside = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.wide, self.last = nn.Conv2d(16, 12, 3), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        if self.how == "a layer":
            x = self.layer(x)
        elif self.how == "torch":
            x = torch.channel_shuffle(x, 2)
        else:
            x = functional.channel_shuffle(x, 2)
        x = x + self.added(torch.relu(x))
        x = torch.cat([x, self.beside(torch.relu(x))], dim=1)
        return self.last(torch.relu(self.wide(x)))


@pytest.mark.parametrize("how", ["a layer", "torch", "functional"])
def test_channels_are_followed_up_to_a_shuffle_and_from_there_on(how: str) -> None:
    model, x = made(lambda: Shuffled(how)).eval(), torch.randn(1, 3, 9, 9)
    table = GroupTable.build(model, x)
    free = {n for n, g in table.groups.items() if g.blocked is None}
    assert free == {"first", "beside", "wide"}
    assert "shuffle interleaves" in table.groups["second"].blocked
    masks, before = SoftMasks(model, x, table=table), model(x)
    gone = half_of_every_group(masks)
    assert set(gone) == free
    masks.zero(gone)
    with masks.attached():
        masked = model(x)
    remove_channels(table, gone)
    assert (masked - before).abs().max() > 1e-3
    torch.testing.assert_close(model(x), masked)
    assert (functional.channel_shuffle, torch.channel_shuffle) == SHUFFLES


class Beside(nn.Module):
    """A shuffle by a function of the user's own, named arguments, and a head for training."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1)
        self.last, self.aux = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 3, 1)
        if how == "scripted":
            self.extra = torch.jit.script(nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        y = self.a(x) + x if self.how == "input" else self.a(x)
        y = functional.channel_shuffle(input=self.b(y.relu()), groups=2)
        y = self.c(y).relu()
        if self.how == "scripted":
            y = self.extra(y)
        out = self.last(y)
        if self.training and self.how == "auxiliary":
            return out, self.aux(y)
        return {"o": out, "other": [1]} if self.how == "dictionary" else out


def test_what_is_added_to_the_input_stays_beside_a_shuffle_too() -> None:
    table = GroupTable.build(made(lambda: Beside("input")), torch.randn(1, 8, 4, 4))
    assert "the model's input" in table.groups["a"].blocked
    free = GroupTable.build(made(lambda: Beside("")), torch.randn(1, 8, 4, 4))
    assert free.groups["a"].blocked is None


def test_heads_of_training_are_followed_beside_a_shuffle_too() -> None:
    model, x = made(lambda: Beside("auxiliary")), torch.randn(2, 8, 4, 4)
    table = GroupTable.build(model, x)
    remove_channels(table, {"c": [0, 3]})
    out, aux = model.train()(x)
    assert model.aux.in_channels == 4 and aux.shape[1] == 3


def test_a_scripted_layer_beside_a_shuffle() -> None:
    model, x = made(lambda: Beside("scripted")), torch.randn(1, 8, 4, 4)
    assert GroupTable.build(model, x).groups["a"].blocked is None


def test_the_caller_s_output_transform_is_of_the_output_alone() -> None:
    model, x = made(lambda: Beside("dictionary")), torch.randn(1, 8, 4, 4)
    split = Split.from_modules(model.a, nn.Sequential(nn.ReLU(), model.b), x)
    assert split.feature_shape == (8, 4, 4)
    graph = followed(model, x, None, lambda forward: traced(
        model, x, forward, output_transform=lambda out: out["o"]))  # fmt: skip
    assert graph.shuffled
    assert {"b", "last"} <= {n for n, m in model.named_modules() if m in graph.module2node}


def test_shufflenet_is_followed_between_its_shuffles() -> None:
    table = GroupTable.build(shufflenet(), torch.randn(1, 3, 64, 64))
    assert not table.left_out
    whole = {n for n, g in table.groups.items() if g.blocked is not None}
    assert {n.rpartition(".")[0] for n in whole} <= {"", *(
        f"stage{s}.{u}.branch{b}" for s in (2, 3, 4) for u in range(8) for b in (1, 2))}
    free = set(table.groups) - whole
    assert {"conv1.0", "conv5.0"} <= free
    assert sum(n.startswith("stage") for n in free) == 16  # the inner width of every unit
    assert not any(g.is_output for n, g in table.groups.items() if n != "fc")


@pytest.mark.parametrize("at", ["stage3.0", "conv5"])
def test_shufflenet_with_a_feature_that_may_narrow(at: str) -> None:
    model, x = shufflenet(), torch.randn(1, 3, 64, 64)
    split = Split(model, x, at=at)
    SoftMasks(model, x, split=split, boundary="prune")
    result = PatrolPruner(model, x, GroupMagnitudeImportance(), split=split, edge_macs=0.5,
                          boundary="prune").step()
    assert result.edge_macs == count_macs(split.edge, x).total <= result.budget
    assert torch.equal(split.cloud(split.edge(x)), model(x))


def test_steps_follow_each_other() -> None:
    model, x = shufflenet(), torch.randn(1, 3, 64, 64)
    split = Split(model, x, at="stage3.4")
    scores = GroupMagnitudeImportance()
    pruner = PatrolPruner(model, x, scores, split=split, edge_macs=0.5, iterative_steps=2)
    first, second = pruner.step(), pruner.step()
    assert second.edge_macs < first.edge_macs < first.edge_macs_before
    assert second.edge_macs <= second.budget


def test_the_plan_names_what_stays() -> None:
    result = plan(swin(), torch.randn(1, 3, 32, 32), edge_macs=0.7, at="features.3")
    row = result[result.recommended]
    assert "features.3.0.attn.qkv" in row.left_whole and "head" not in row.left_whole
    assert "Left whole: features.0.0" in result.text and "cannot be followed" in result.text


def test_the_model_is_left_as_found() -> None:
    model = swin().train()
    model.features[1].eval()
    model.features[0][0].weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    seed = torch.get_rng_state()
    graph = build_graph(model, torch.randn(1, 3, 32, 32, generator=torch.Generator()))
    assert graph.parts is not None
    assert torch.equal(torch.get_rng_state(), seed)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class HalfSeen(nn.Module):
    """`second` is called through its weight, so that no graph of layers knows who reads `first`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 12)
        self.third, self.fourth = nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(self.first(x).relu(), self.second.weight)
        return self.fourth(self.third(y).relu())


def run(model: nn.Module) -> Tensor:
    return model(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)))


def test_what_removal_would_break_stays_whole() -> None:
    parts, _ = find_parts(nn.Sequential(HalfSeen(), nn.Linear(8, 3)), run, "of a test")
    assert parts.names == ("0",)
    assert set(parts.blocked) == {"0.first"} and "changes more" in parts.blocked["0.first"]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


def test_a_part_runs_once() -> None:
    model = nn.Sequential(Twice(), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    parts, _ = find_parts(model, run, "of a test")
    assert parts.names[-1] == "1" and "0.inner" not in parts.names


class Explodes(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_of_alike_parts_that_explode_one_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    followed = []

    def explode(part: nn.Module, x: Tensor, *, one_by_one: bool) -> dict[str, str]:
        followed.append((part, tuple(x.shape)))
        raise ExplodingGroupsError("as in a test")

    monkeypatch.setattr(local_groups, "_try", explode)
    model = nn.Sequential(Explodes(4), Explodes(4), Explodes(6), nn.Linear(8, 3))
    parts, _ = find_parts(model, run, "of a test")
    assert parts.names == () and [part for part, _ in followed] == [model[0], model[2]]
    assert {"0", "1", "2"} <= set(parts.failures)
    assert parts.failures["1"] == parts.failures["0"] == "as in a test"


class TwoHeads(nn.Module):
    """An auxiliary head that runs in training mode only, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.deep, self.head = nn.Linear(16, 16), nn.Linear(16, 3)
        self.aux = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.body(x)
        out = self.head(self.deep(y).relu())
        return (out, self.aux(y)) if self.training else out


def test_an_auxiliary_head_is_pruned_along() -> None:
    model = TwoHeads()
    x = torch.randn(4, 8)
    table = GroupTable.build(model, x)
    assert {"aux.0", "aux.2", "head"} <= set(table.groups) and table.graph.parts is None
    assert table.groups["aux.2"].is_output and table.groups["head"].is_output
    statistics = model.body[1].running_mean.clone()
    remove_channels(table, {"body.0": range(5)})
    assert model.aux[0].in_features == model.deep.in_features == 11
    out, aux = model.train()(x)
    (out.sum() + aux.sum()).backward()
    assert len(statistics) == 16 and not statistics.any()


def test_what_no_part_of_can_be_followed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from patrol_prune import _tp

    monkeypatch.setattr(_tp, "_MAX_INDICES", 8)
    with pytest.raises(UnsupportedModelError, match="explode.*each of its parts"):
        build_graph(TwoHeads(), torch.randn(2, 8))
