"""PatrolPruner meets its budget and gives back what it borrowed; Torch-Pruning takes our scores."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from pruning_helpers import HandMadeObjective, backbone, cifar_resnet
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.cost import MacCount, count_macs
from patrol_prune.errors import BudgetError, InputError
from patrol_prune.importance import PatrolImportance
from patrol_prune.objective import PatrolObjective
from patrol_prune.pruner import PatrolPruner
from patrol_prune.regularizer import as_weight
from patrol_prune.split import Split
from patrol_prune.surrogate import SurrogateSpec


def batch(n: int = 8, size: int = 16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=g), torch.randint(0, 10, (n,), generator=g)


def prepared(
    model: nn.Module | None = None, at: str = "layer2", size: int = 16
) -> tuple[nn.Module, Tensor, Split, PatrolImportance]:
    model = model or cifar_resnet(width=16)
    x = torch.randn(1, 3, size, size)
    split = Split(model, x, at=at)
    importance = PatrolImportance(HandMadeObjective(split))
    importance.accumulate(*batch(size=size))
    return model, x, split, importance


@pytest.mark.parametrize("boundary", ["keep", "prune"])
@pytest.mark.parametrize(
    ("name", "at", "size"), [("cifar", "layer2", 32), ("mobilenet_v2", "features.10", 64)]
)
def test_budget_is_met_from_below(name: str, at: str, size: int, boundary: str) -> None:
    model = cifar_resnet(depth=2) if name == "cifar" else backbone(name)
    model, x, split, importance = prepared(model, at, size)
    dense = count_macs(split.edge, x).total
    cloud = {n: copy.deepcopy(m.state_dict()) for n, m in split.cloud_layers.items()}
    feature = split.feature_shape
    pruner = PatrolPruner(model, x, importance, split=split, edge_macs=0.5, boundary=boundary)
    result = pruner.step()
    macs = count_macs(split.edge, x).total
    assert result.edge_macs_before == dense and result.edge_macs == macs
    assert 0.99 * 0.5 * dense <= macs <= result.budget == math.floor(0.5 * dense)
    assert torch.equal(split.cloud(split.edge(x)), model(x))
    assert result.feature_shape_before == feature
    assert result.feature_shape == split.feature_shape == tuple(split.edge(x).shape[1:])
    if boundary == "keep":
        assert result.feature_shape == feature and result.cloud_changed == ()
        for n, layer in split.cloud_layers.items():
            assert all(torch.equal(v, cloud[n][k]) for k, v in layer.state_dict().items())
        assert any("crosses the split" in why for why in result.left_whole.values())
    else:
        assert result.feature_shape[0] < feature[0]
        shapes = {n: [v.shape for v in s.values()] for n, s in cloud.items()}
        changed = {
            n for n, m in split.cloud_layers.items()
            if [v.shape for v in m.state_dict().values()] != shapes[n]
        }  # fmt: skip
        assert set(result.cloud_changed) == changed != set()


def test_only_the_edge_shrinks() -> None:
    model, x, split, importance = prepared()
    cloud = [p.shape for p in model.layer3.parameters()]
    PatrolPruner(model, x, importance, split=split, edge_macs=0.3).step()
    assert [p.shape for p in model.layer3.parameters()] == cloud
    assert model.layer1[0].conv1.out_channels < 16


def test_a_count_is_a_budget_too() -> None:
    model, x, split, importance = prepared()
    dense = count_macs(split.edge, x).total
    pruner = PatrolPruner(model, x, importance, split=split, edge_macs=f"{dense // 3:_}")
    result = pruner.step()
    assert result.budget == dense // 3 and 0.99 * (dense // 3) <= result.edge_macs <= dense // 3
    assert result.removed_channels > 0


def test_what_goes_has_the_lowest_scores() -> None:
    model, x, split, importance = prepared()
    scores = {n: s.clone() for n, s in importance.scores.items()}
    before = model.layer2[0].conv1.weight.detach().clone()
    result = PatrolPruner(model, x, importance, split=split, edge_macs=0.5).step()
    kept, total = result.kept["layer2.0.conv1"]
    best = scores["layer2.0.conv1"].topk(kept).indices.sort().values
    after = model.layer2[0].conv1.weight
    stem = [n for n in result.kept if n.startswith(("conv1", "layer1.0.conv2"))]
    assert kept < total and stem
    same_inputs = after.shape[1] == before.shape[1]
    norm = before[best].flatten(1).norm(dim=1)
    assert not same_inputs or torch.allclose(after.flatten(1).norm(dim=1), norm)


def test_iterative_steps_go_down_evenly() -> None:
    model, x, split, importance = prepared()
    dense = count_macs(split.edge, x).total
    pruner = PatrolPruner(model, x, importance, split=split, edge_macs=0.4, iterative_steps=3)
    seen = [pruner.step() for _ in range(3)]
    assert [r.budget for r in seen] == pytest.approx(
        [0.8 * dense, 0.6 * dense, 0.4 * dense], rel=1e-4
    )
    assert all(0.98 * r.budget <= r.edge_macs <= r.budget for r in seen)
    assert seen[1].edge_macs_before == seen[0].edge_macs
    assert seen[2].edge_macs == count_macs(split.edge, x).total
    with pytest.warns(UserWarning, match="nothing is pruned"):
        assert pruner.step().edge_macs == seen[2].edge_macs


def test_stale_scores_are_refused() -> None:
    model, x, split, importance = prepared()
    PatrolPruner(model, x, importance, split=split, edge_macs=0.5).step()
    pruner = PatrolPruner(model, x, importance, split=split, edge_macs=0.5)
    with pytest.raises(InputError, match="stale"):
        pruner.step()
    importance.accumulate(*batch())
    assert pruner.step().edge_macs <= pruner.budget


def test_floors_hold_in_one_step() -> None:
    model, x, split, importance = prepared(cifar_resnet(width=24))
    pruner = PatrolPruner(
        model, x, importance, split=split, edge_macs=0.35, boundary="prune", round_to=8,
        max_pruning_ratio=0.7, min_channels=5,
    )  # fmt: skip
    result = pruner.step()
    for kept, total in result.kept.values():
        assert kept % 8 == 0 or kept == total
        assert kept >= max(8, 0.3 * total)
    assert result.edge_macs <= result.budget


def test_max_pruning_ratio_holds_over_steps() -> None:
    model, x, split, importance = prepared()
    pruner = PatrolPruner(
        model, x, importance, split=split, edge_macs=0.45, boundary="prune",
        max_pruning_ratio=0.4, iterative_steps=2,
    )  # fmt: skip
    initial = dict(pruner.initial)
    pruner.step()
    for name, (kept, _) in pruner.step().kept.items():
        assert kept >= 0.6 * initial[name]


def test_no_group_is_emptied_however_low_its_scores() -> None:
    model, x, split, importance = prepared()
    importance.scores["layer1.0.conv1"].fill_(-1e4)
    pruner = PatrolPruner(model, x, importance, split=split, edge_macs=0.5)
    kept, total = pruner.step().kept["layer1.0.conv1"]
    assert (kept, total) == (1, 16)


def test_ignored_layers_stay_whole() -> None:
    model, x, split, importance = prepared()
    pruner = PatrolPruner(
        model, x, importance, split=split, edge_macs=0.6, ignored_layers=[model.layer1[0].conv1]
    )
    result = pruner.step()
    assert model.layer1[0].conv1.out_channels == 16
    assert "ignored_layers" in result.left_whole["layer1.0.conv1"]


def test_everything_comes_back() -> None:
    model, x, split, importance = prepared()
    model.train()
    model.layer1.eval()
    for p in model.layer2.parameters():
        p.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    dicts = {n: {} for n in ("in_channel_groups", "out_channel_groups", "num_heads")}
    pruner = PatrolPruner(model, x, importance, split=split, edge_macs=0.5, **dicts)
    pruner.step()
    assert [m.training for m in model.modules()] == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.is_leaf for p in model.parameters())
    assert all(d == {} for d in dicts.values())
    other = cifar_resnet()
    defaults = tp.pruner.BasePruner(other, x, importance=tp.importance.RandomImportance())
    assert not set(defaults.in_channel_groups) & set(model.modules())


def test_history_replays_on_a_fresh_model() -> None:
    model, x, split, importance = prepared()
    fresh = copy.deepcopy(model)
    pruner = PatrolPruner(
        model, x, importance, split=split, edge_macs=0.5, boundary="prune", iterative_steps=2
    )
    pruner.step()
    pruner.step()
    graph = tp.DependencyGraph().build_dependency(fresh, x)
    graph.load_pruning_history(pruner.pruning_history())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_interactive() -> None:
    model, x, split, importance = prepared()
    pruner = PatrolPruner(model, x, importance, split=split, edge_macs=0.5)
    for group in pruner.step(interactive=True):
        assert torch.is_grad_enabled()
        group.prune()
    result = pruner.last_result
    assert 0.99 * result.budget <= result.edge_macs <= result.budget
    assert result.edge_macs == count_macs(split.edge, x).total


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "random"])
def test_torch_prunings_importances_share_the_budget(criterion: str) -> None:
    model, x, split, _ = prepared()
    importance = {
        "magnitude": tp.importance.GroupMagnitudeImportance(),
        "taylor": tp.importance.GroupTaylorImportance(),
        "random": tp.importance.RandomImportance(),
    }[criterion]
    inputs, y = batch()
    functional.cross_entropy(model(inputs), y).backward()
    result = PatrolPruner(model, x, importance, split=split, edge_macs=0.5).step()
    assert 0.99 * result.budget <= result.edge_macs <= result.budget
    assert result.edge_macs == count_macs(split.edge, x).total


def test_an_importance_of_the_wrong_length_is_refused() -> None:
    model, x, split, _ = prepared()
    pruner = PatrolPruner(model, x, lambda group: torch.ones(3), split=split, edge_macs=0.5)
    with pytest.raises(InputError, match="came shape"):
        pruner.step()
    assert model.conv1.out_channels == 16


def test_a_depthwise_and_a_grouped_network_run_after_pruning() -> None:
    model, x, split, importance = prepared(backbone("regnet_y_400mf"), "trunk_output.block2", 64)
    pruner = PatrolPruner(
        model, x, importance, split=split, edge_macs=0.5, boundary="prune", iterative_steps=2
    )
    pruner.step()
    result = pruner.step()
    assert result.edge_macs == count_macs(split.edge, x).total <= result.budget
    model(torch.randn(2, 3, 64, 64))


def test_regularize_shrinks_the_channels_that_will_go() -> None:
    model, x, split, importance = prepared()
    pruner = PatrolPruner(
        model, x, importance, split=split, edge_macs=0.4, boundary="prune", reg=0.5
    )
    with pytest.raises(InputError, match="update_regularizer"):
        pruner.regularize(model, torch.zeros(()))
    pruner.update_regularizer()
    kept = pruner.choose()["layer2.0.conv1"]
    gone = sorted(set(range(32)) - set(kept.tolist()))
    start = model.layer2[0].conv1.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, y = batch()
    for _ in range(3):
        optimizer.zero_grad()
        loss = 1e-3 * functional.cross_entropy(model(inputs), y)
        loss.backward()
        pruner.regularize(model, loss)
        optimizer.step()
    weight = model.layer2[0].conv1.weight.detach()
    ratio = weight.flatten(1).norm(dim=1) / start.flatten(1).norm(dim=1)
    assert ratio[gone] == pytest.approx(torch.full((len(gone),), 0.95**3), rel=1e-2)
    assert ratio[kept] == pytest.approx(torch.ones(len(kept)), rel=1e-2)
    shift = model.layer2[0].bn1.weight.detach()
    assert shift[gone].mean() < shift[kept].mean()
    pruner.step()
    with pytest.raises(InputError, match="update_regularizer"):
        pruner.regularize(model)
    pruner.update_regularizer()  # a loop of sparse training that goes on
    model.zero_grad()
    functional.cross_entropy(model(inputs), y).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    pruner.regularize(model)
    now = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, before, now))


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(6, 4, 1), (6, 6, 6), (6, 4, 2)])
def test_the_decay_of_a_transposed_layer_reaches_what_makes_the_channel(
    inputs: int, outputs: int, groups: int
) -> None:
    layer = nn.ConvTranspose2d(inputs, outputs, 2, groups=groups)
    strength = torch.arange(float(outputs))
    rows = as_weight(strength, layer)
    assert rows.shape == layer.weight.shape[:2]
    with torch.no_grad():
        layer.weight.copy_(rows[:, :, None, None].expand_as(layer.weight))
        layer.bias.zero_()
        y = layer(torch.ones(1, inputs, 1, 1))
    assert torch.equal(y[0, :, 0, 0], strength * (inputs // groups))


def test_the_final_choice_of_a_pruned_edge_is_all_of_it() -> None:
    model, x, split, _ = prepared()
    pruner = PatrolPruner(model, x, tp.importance.GroupMagnitudeImportance(), split=split,
                          edge_macs=0.5)
    pruner.step()
    assert pruner.budget > count_macs(split.edge, x).total  # channels do not fit to the last MAC
    kept = pruner.choose()
    assert kept and all(len(idxs) == pruner.table.groups[n].channels for n, idxs in kept.items())


SCRIPTS = [(False, False), (True, False), (True, True)]  # isomorphic needs global_pruning


@pytest.mark.parametrize(("global_pruning", "isomorphic"), SCRIPTS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("round_to", [None, 8])
def test_unchanged_base_pruner(
    global_pruning: bool, steps: int, isomorphic: bool, round_to: int | None
) -> None:
    """A Torch-Pruning script with one line changed."""
    model, x, split, importance = prepared(cifar_resnet(width=16, depth=2))
    dense = count_macs(split.edge, x).total
    pruner = tp.pruner.BasePruner(
        model, x, importance=importance, global_pruning=global_pruning, pruning_ratio=0.5,
        iterative_steps=steps, isomorphic=isomorphic, round_to=round_to,
        ignored_layers=split.protected_layers(), in_channel_groups={}, out_channel_groups={},
        num_heads={}, channel_groups={},
    )  # fmt: skip
    stem = importance.masks.table.members_of(model.conv1, "out")[0][0]
    expected = importance.scores[stem].topk(8).values
    for _ in range(steps):
        pruner.step()
    split.refresh()
    assert count_macs(split.edge, x).total < dense
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    if not global_pruning:
        assert model.conv1.out_channels == 8
        group = pruner.DG.get_pruning_group(
            model.conv1, tp.prune_conv_out_channels, list(range(8))
        )
        score = importance(group)
        assert score is not None and torch.equal(score.sort(descending=True).values, expected)


def test_magnitude_pruner_script() -> None:
    """MagnitudePruner is Torch-Pruning's old name; its loop works with our scores."""
    model, x, split, importance = prepared()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.MagnitudePruner(
            model, x, importance=importance, pruning_ratio=0.5, iterative_steps=3,
            ignored_layers=[model.fc],
        )  # fmt: skip
    for _ in range(3):
        for group in pruner.step(interactive=True):
            group.prune()
    assert model.layer3[0].conv1.out_channels == 32
    model(torch.randn(2, 3, 16, 16))


def test_bad_arguments() -> None:
    model, x, split, importance = prepared()

    def make(**kwargs: object) -> PatrolPruner:
        return PatrolPruner(model, x, importance, **{"split": split, "edge_macs": 0.5, **kwargs})

    for bad in (0, 0.0, -0.5, 1.5, True, float("nan"), float("inf"), "half"):
        with pytest.raises(InputError, match="fraction"):
            make(edge_macs=bad)
    with pytest.raises(InputError, match="dense edge"):
        make(edge_macs=10**12)
    with pytest.raises(BudgetError, match="smallest reachable") as caught:
        make(edge_macs=0.05, max_pruning_ratio=0.2)
    assert make(edge_macs=caught.value.smallest_edge_macs, max_pruning_ratio=0.2)
    with pytest.raises(InputError, match="boundary"):
        make(boundary="bottleneck")
    with pytest.raises(InputError, match="another model"):
        make(split=Split(cifar_resnet(), x, at="layer2"))
    with pytest.raises(InputError, match="pruning_ratio_dict"):
        make(pruning_ratio_dict={model.conv1: 0.5})
    with pytest.raises(InputError, match="iterative_steps"):
        make(iterative_steps=0)
    with pytest.warns(UserWarning, match="edge_macs decides"):
        make(pruning_ratio=0.5, global_pruning=True)
    fresh = PatrolImportance(HandMadeObjective(split))
    with pytest.raises(InputError, match="calibration data"):
        PatrolPruner(model, x, fresh, split=split, edge_macs=0.5).step()
    assert model.conv1.out_channels == 16


@pytest.mark.parametrize(("wrong", "told"), [
    ({"split": None}, "as a Split"),
    ({"importance": tp.importance.MagnitudeImportance}, "scores groups"),
    ({"importance": "magnitude"}, "scores groups"),
    ({"ignored_layers": ["layer1"]}, "get_submodule..layer1"),
    ({"ignored_layers": "layer1"}, "get_submodule..layer1"),
    ({"ignored_layers": [3]}, "ignored_layers"),
    ({"round_to": "8"}, "round_to as a whole number"),
    ({"round_to": 3.5}, "round_to as a whole number"),
    ({"min_channels": 1.5}, "min_channels as a whole number"),
    ({"max_pruning_ratio": None}, "max_pruning_ratio as a number"),
    ({"iterative_steps": 1.5}, "iterative_steps as a whole number"),
    ({"reg": -1.0}, "reg as a number"),
    ({"max_ch_sparsity": 0.5}, "max_pruning_ratio|further arguments"),
])
def test_arguments_of_another_kind_are_refused_in_words(wrong: dict[str, object], told: str
                                                        ) -> None:
    model, x, split, importance = prepared()
    arguments = {"importance": importance, "split": split, "edge_macs": 0.5, **wrong}
    with pytest.raises(InputError, match=told):
        PatrolPruner(model, x, **arguments)  # type: ignore[arg-type]


def test_parameters_and_generators_of_ignored_layers_stay_whole_too() -> None:
    model, x, split, importance = prepared()
    kept = (layer for layer in [model.conv1.weight, model.layer1[0].conv1.weight])
    result = PatrolPruner(model, x, importance, split=split, edge_macs=0.7,
                          ignored_layers=kept).step()
    assert model.conv1.out_channels == model.layer1[0].conv1.out_channels == 16
    assert "ignored_layers" in result.left_whole["layer1.0.conv1"]
    shuffled = backbone("shufflenet_v2_x0_5")  # its graph is built twice
    split = Split(shuffled, torch.rand(1, 3, 64, 64), at="stage2")
    pruner = PatrolPruner(
        shuffled, split.example_inputs, tp.importance.GroupMagnitudeImportance(), split=split,
        edge_macs=0.7, ignored_layers=(layer for layer in [shuffled.conv1]))
    pruner.step()
    assert shuffled.conv1[0].out_channels == 24


def test_a_parameter_to_keep_is_kept_in_every_step() -> None:
    """The layer before it shrinks first, which gives it a new parameter."""
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 4, 1))
    split = Split(model, torch.rand(1, 3, 8, 8), at="6")
    pruner = PatrolPruner(model, split.example_inputs, tp.importance.GroupMagnitudeImportance(),
                          split=split, edge_macs=0.5, iterative_steps=2,
                          ignored_layers=[model[2].weight])
    for _ in range(2):
        pruner.step()
    assert model[2].out_channels == 32 and model[0].out_channels < 24


@pytest.mark.parametrize("as_parameter", [False, True])
def test_what_is_to_be_kept_keeps_its_block(as_parameter: bool) -> None:
    model = cifar_resnet(width=16, depth=2)
    x = torch.rand(1, 3, 16, 16)
    split = Split(model, x, at="layer2")
    importance = PatrolImportance(PatrolObjective(split, functional.cross_entropy), blocks=True)
    importance.accumulate(*batch())
    kept = [block.conv1 for layer in (model.layer1, model.layer2) for block in layer]
    result = PatrolPruner(
        model, x, importance, split=split, edge_macs=0.85, structures="both",
        ignored_layers=[conv.weight for conv in kept] if as_parameter else kept).step()
    assert result.removed_blocks == ()


class Tied(nn.Module):
    """Two convolutions with one weight between others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.c, self.d = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.e = nn.Conv2d(12, 4, 3, padding=1)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = layer(x).relu()
        return self.e(x)


def test_layers_that_share_a_weight_stay_tied() -> None:
    model = Tied()
    split = Split(model, torch.rand(1, 3, 8, 8), at="d")
    pruner = PatrolPruner(model, split.example_inputs, tp.importance.GroupMagnitudeImportance(),
                          split=split, edge_macs=0.8, boundary="prune")
    result = pruner.step()
    assert model.b.weight is model.c.weight and model.d.out_channels < 12
    assert any("shares its weight" in why for why in result.left_whole.values())


def test_what_cannot_be_reached_tells_what_stays_and_what_may_still_be_loosened() -> None:
    model, x, split, importance = prepared()
    with pytest.raises(BudgetError) as caught:
        PatrolPruner(model, x, importance, split=split, edge_macs=0.01, boundary="prune",
                     ignored_layers=[model.conv1])
    told = str(caught.value)
    assert "boundary='prune'" not in told and "max_pruning_ratio" not in told
    assert "What stays whole:" in told and "is in ignored_layers" in told


def test_a_loop_that_is_left_early_leaves_a_split_that_fits() -> None:
    model, x, split, importance = prepared()
    before = count_macs(split.edge, x).total
    groups = PatrolPruner(model, x, importance, split=split, edge_macs=0.5).step(interactive=True)
    next(groups).prune()
    groups.close()
    assert count_macs(split.edge, x).total < before
    assert split.pruning_history and torch.equal(split.cloud(split.edge(x)), model(x))


def test_batches_behind_another_pruner_need_no_refresh_by_hand() -> None:
    model, x, split, _ = prepared()
    objective = PatrolObjective(split, functional.cross_entropy, beta=1.0,
                                surrogates=(SurrogateSpec("transposed", 8),))
    importance = PatrolImportance(objective)
    importance.accumulate(*batch())
    tp.pruner.BasePruner(model, x, importance=importance, pruning_ratio=0.5,
                         ignored_layers=[model.fc]).step()
    importance.zero_grad()
    objective.fit_surrogates([batch()], 1)
    importance.accumulate(*batch())
    assert importance.scores


def test_layers_of_other_types_than_the_roots_stay_whole() -> None:
    model, x, split, importance = prepared()
    with pytest.raises(BudgetError, match="root_module_types"):
        PatrolPruner(model, x, importance, split=split, edge_macs=0.5,
                     root_module_types=[nn.Linear])
    by_name = PatrolPruner(model, x, importance, split=split, edge_macs=0.5,
                           root_module_types=[nn.Conv2d])
    assert by_name.step().edge_macs <= by_name.budget


@pytest.mark.parametrize(("option", "message"), [
    ({"root_module_types": ["Conv2d"]}, "root_module_types as a list of classes"),
    ({"iterative_pruning_ratio_scheduler": lambda r, s: [r]}, "2 finite numbers"),
    ({"iterative_pruning_ratio_scheduler": lambda r, s: [0.0, math.nan]}, "2 finite numbers"),
    ({"unwrapped_parameters": [nn.Parameter(torch.ones(3, 2))]}, "pairs of a parameter"),
    ({"customized_pruners": {nn.Conv2d: 3}}, "prune_out_channels"),
    ({"importance": lambda group: [1.0]}, "a tensor \\[C\\] of scores"),
    ({"importance": lambda group: 1 / 0}, "ZeroDivisionError"),
    ({"example_inputs": torch.zeros(1, 1, 16, 16)}, "the forward pass failed"),
])  # fmt: skip
def test_options_of_the_host_that_are_something_else(option: dict[str, Any], message: str) -> None:
    model, x, split, importance = prepared()
    given = {"example_inputs": x, "importance": importance, "edge_macs": 0.5, **option}
    with pytest.raises(InputError, match=message):
        PatrolPruner(model, split=split, **given).step()


def scheduled(given: Callable[[float, int], Any] | None) -> PatrolPruner:
    model, x, split, importance = prepared()
    more = {} if given is None else {"iterative_pruning_ratio_scheduler": given}
    pruner = PatrolPruner(model, x, importance, split=split, edge_macs=0.5, iterative_steps=2,
                          **more)
    pruner.step()
    pruner.step()
    return pruner


def test_a_schedule_may_be_a_tensor() -> None:
    usual, given = scheduled(None), scheduled(lambda r, n: torch.linspace(0.0, r, n + 1))
    assert given.per_step_pruning_ratio == pytest.approx(usual.per_step_pruning_ratio)
    assert given.last_result.kept == usual.last_result.kept


def test_a_schedule_beyond_the_budget_is_told() -> None:
    with pytest.warns(UserWarning, match="goes to 0.6 .* the budget takes 0.5"):
        beyond = scheduled(lambda r, n: [0.0, 0.6, r])
    assert beyond.last_result.edge_macs <= 0.4 * beyond.dense_edge_macs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduled(lambda r, n: [0.0, r, 1.0])  # the last step goes to the budget by itself


def test_what_an_interactive_step_did_is_read_from_the_layers() -> None:
    model, x, split, importance = prepared()
    pruner = PatrolPruner(model, x, importance, split=split, edge_macs=0.5)
    with pytest.warns(UserWarning, match="above the budget|the budget is"):
        for number, group in enumerate(pruner.step(interactive=True)):
            if number == 0:
                group.prune()
    widths = {n: (pruner.table.groups[n].channels, total)
              for n, (_, total) in pruner.last_result.kept.items()}
    assert pruner.last_result.kept == widths
    assert sum(kept < total for kept, total in widths.values()) == 1
    assert pruner.last_result.edge_macs == count_macs(split.edge, x).total


class Tokens(nn.Module):
    """Torch's own transformer layers, on both sides of a cut, or as one encoder."""

    def __init__(self, stack: bool) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
                  for _ in range(3)]
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.layers = nn.TransformerEncoder(layers[0], 2) if stack else nn.Sequential(*layers)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize(("boundary", "share"), [("keep", 0.95), ("keep", 0.7), ("prune", 0.7)])
@pytest.mark.parametrize("stack", [False, True])
def test_torchs_own_transformer_layers_shrink_inside_to_the_budget(
    stack: bool, boundary: str, share: float
) -> None:
    torch.manual_seed(0)
    model, x = Tokens(stack).eval(), torch.rand(2, 3, 16, 16)
    split = Split(model, x, "layers" if stack else "layers.1")
    cloud = copy.deepcopy(split.cloud.state_dict())
    importance = tp.importance.GroupMagnitudeImportance()
    pruner = PatrolPruner(model, x, importance, split=split, edge_macs=share, boundary=boundary)
    inner = [g for n, g in pruner.table.groups.items() if n.endswith("linear1")]
    assert [g.location for g in inner].count("edge") == 2
    assert [m.layer_name for g in inner for m in g.members if m.direction == "out"] == [
        g.name for g in inner]
    predicted = pruner.costs.macs(pruner.choose())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = pruner.step()
    assert result.edge_macs == predicted == count_macs(split.edge, x).total
    assert 0.99 * result.budget <= result.edge_macs <= result.budget
    assert torch.equal(split.cloud(split.edge(x)), model(x))
    same = all(map(torch.equal, cloud.values(), split.cloud.state_dict().values()))
    assert same == (boundary == "keep")


def test_an_edge_far_below_what_was_expected_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for share, told in ((0.98, False), (0.9, True)):
        model, x = Tokens(True).eval(), torch.rand(2, 3, 16, 16)
        split = Split(model, x, "layers")
        pruner = PatrolPruner(model, x, tp.importance.RandomImportance(), split=split,
                              edge_macs=0.7)
        counted = MacCount(int(share * pruner.costs.macs(pruner.choose())))
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch.setattr("patrol_prune.pruner.count_macs", lambda *_, counted=counted: counted)
            pruner.step()
        assert any("were to stay" in str(w.message) for w in caught) == told
