"""The plan: what every split costs, what pruning to the budget takes there, and which to choose."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from pruning_helpers import ThreeLayers
from torch import nn

from patrol_prune import _cuts
from patrol_prune.budget import MacModel
from patrol_prune.cost import count_macs, count_params, feature_bytes
from patrol_prune.edge_sizes import EdgeSizes
from patrol_prune.errors import BudgetError, InputError
from patrol_prune.group_table import GroupTable, remove_channels
from patrol_prune.models import SmallResNet
from patrol_prune.plan import Plan, PlanLimits, parse_budget, plan, short
from patrol_prune.plan_limits import EdgeCost
from patrol_prune.removal import remove_blocks
from patrol_prune.split import Split, split_points

X = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return SmallResNet(4, width=8)


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return ThreeLayers()


@pytest.fixture(scope="module")
def keep(model: nn.Module) -> Plan:
    return plan(model, X, edge_macs="layer1")


@pytest.fixture(scope="module")
def prune(model: nn.Module) -> Plan:
    return plan(model, X, edge_macs="layer1", boundary="prune")


def test_rows_are_the_split_points_shallow_to_deep(model: nn.Module, keep: Plan) -> None:
    points = {p.name: p for p in split_points(model, X)}
    assert {"layer1", "layer2", "layer3", "layer4"} <= {r.name for r in keep.rows}
    for row in keep.rows:
        assert row.edge_macs == points[row.name].edge_macs
        assert row.feature_bytes == points[row.name].feature_bytes
        assert row.budget_fraction == pytest.approx(keep.budget_edge_macs / row.edge_macs)
    macs = [row.edge_macs for row in keep.rows]
    assert macs == sorted(macs)


def test_a_budget_given_as_a_split_is_that_dense_edge(model: nn.Module, keep: Plan) -> None:
    dense = count_macs(Split(model, X, "layer1").edge, X).total
    assert keep.budget_edge_macs == dense
    assert keep["layer1"].channel_ratio == 0.0 and keep["layer1"].reason == "It fits as it is."


@pytest.mark.parametrize("boundary", ["keep", "prune"])
@pytest.mark.parametrize("name", ["layer2", "layer3", "layer4.0"])
def test_the_uniform_ratio_meets_the_budget_and_one_percent_less_does_not(
    model: nn.Module, keep: Plan, prune: Plan, boundary: str, name: str
) -> None:
    """The oracle prunes a copy for real and lets fvcore count it."""
    result = keep if boundary == "keep" else prune
    ratio = result[name].channel_ratio
    assert ratio is not None
    assert really_pruned(model, name, ratio, boundary) <= result.budget_edge_macs
    assert really_pruned(model, name, ratio - 0.01, boundary) > result.budget_edge_macs


def really_pruned(model: nn.Module, name: str, ratio: float, boundary: str) -> int:
    copied = copy.deepcopy(model)
    split = Split(copied, X, name)
    table = GroupTable.build(copied, X, split=split)
    gone = {
        g.name: list(range(int(g.channels * round(100 * ratio) // 100)))
        for g in table.groups.values()
        if g.location == "edge" and g.blocked is None
        and (boundary == "prune" or g.crossing is None)
    }
    remove_channels(table, gone)
    split.refresh()
    return count_macs(split.edge, X).total


def test_the_smallest_edge_is_every_group_at_its_floor(model: nn.Module) -> None:
    result = plan(model, X, edge_macs="layer1", boundary="prune", min_channels=3)
    copied = copy.deepcopy(model)
    split = Split(copied, X, "layer3")
    table = GroupTable.build(copied, X, split=split)
    gone = {g.name: list(range(max(3, round(0.05 * g.channels)), g.channels))
            for g in table.groups.values() if g.location == "edge" and g.blocked is None}
    remove_channels(table, gone)
    split.refresh()
    assert result["layer3"].smallest_edge_macs == count_macs(split.edge, X).total


def test_boundary_says_what_happens_to_the_feature_and_the_cloud(keep: Plan, prune: Plan) -> None:
    assert keep["layer2"].crossing == {"layer2.0.downsample.0": "consumed"}
    assert "keeps its width" in keep["layer2"].effect
    assert "layer3.0.conv1" in prune["layer2"].cloud_layers
    assert "narrows with the edge" in prune["layer2"].effect
    assert prune["layer3.0"].crossing == {"layer3.0.downsample.0": "coupled"}
    assert "residual stream runs on" in prune["layer3.0"].effect
    assert "layer3.1.conv2" in prune["layer3.0"].cloud_layers
    assert prune["layer2"].smallest_edge_macs < keep["layer2"].smallest_edge_macs


def test_recommended_is_the_deepest_moderate_map(keep: Plan, model: nn.Module) -> None:
    rows = [r for r in keep.rows if r.fits and not r.is_tail and (r.channel_ratio or 0) <= 0.6]
    assert keep.recommended == rows[-1].name
    gentle = plan(model, X, edge_macs="layer1", max_channel_ratio=0.35)
    assert gentle.recommended in ("layer2", "layer2.0")
    assert f"Cut after {keep.recommended}" in keep.text


def test_at_overrules_and_offers_the_nearest(model: nn.Module) -> None:
    assert plan(model, X, edge_macs="layer1", at="flatten").recommended == "flatten"
    assert plan(model, X, edge_macs=0.5, at="layer2").recommended == "layer2"
    with pytest.raises(InputError, match=r"no split point 'layr2'.*Did you mean: layer2"):
        plan(model, X, edge_macs="layer1", at="layr2")


def test_plain_data(keep: Plan) -> None:
    data = json.loads(json.dumps(keep.to_json()))
    assert data["recommended"] == keep.recommended
    assert len(data["rows"]) == len(keep.rows)
    assert data["rows"][-1]["feature_shape"] == list(keep.rows[-1].feature_shape)


def test_the_model_is_left_as_found(model: nn.Module) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    plan(model, X, edge_macs="layer1")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("9.9M", 9_900_000), ("12k", 12_000), ("1.5G", 1_500_000_000), ("9_900", 9_900),
     ("9,900,000", 9_900_000), ("9,900,000 MACs", 9_900_000),
     ("1e6", 1_000_000), (123, 123), (123.0, 123), ("2MMACs", 2_000_000), ("1", 1)],
)
def test_budget_spellings(text: str | float, expected: int) -> None:
    assert parse_budget(text, [], None) == expected


def test_budget_as_a_fraction(model: nn.Module) -> None:
    point = next(p for p in split_points(model, X) if p.name == "layer2")
    for half in (0.5, "0.5", ".5"):
        assert parse_budget(half, [point], point) == point.edge_macs // 2
    assert parse_budget("1.0", [point], point) == point.edge_macs
    with pytest.raises(InputError, match="fraction of a dense edge, but no split"):
        parse_budget(0.5, [point], None)


@pytest.mark.parametrize(
    "value", ["", "lots", "-3M", "1.2.3M", "3 apples", ".", 0, -1, float("nan"), float("inf"),
              True, "0", "9,9M", "9,900,00", "0,500", "1,2345", ",5", "1.5,000M",
              "9,900M", "1,234.5K", "1e999"],
)
def test_budgets_that_are_none(value: float | str) -> None:
    with pytest.raises(InputError):
        parse_budget(value, [], None)


def test_a_decimal_comma_is_no_thousands_separator() -> None:
    with pytest.raises(InputError, match="with a decimal point.*came '9,9M'"):
        parse_budget("9,9M", [], None)


def test_rounding_raises_the_smallest_edge(model: nn.Module) -> None:
    plain, rounded = (plan(model, X, edge_macs="layer1", boundary="prune", round_to=n)
                      for n in (None, 32))
    copied = copy.deepcopy(model)
    split = Split(copied, X, "layer3")
    table = GroupTable.build(copied, X, split=split)
    gone = {g.name: list(range(32, g.channels)) for g in table.groups.values()
            if g.location == "edge" and g.blocked is None and g.channels > 32}
    remove_channels(table, gone)
    split.refresh()
    assert rounded["layer3"].smallest_edge_macs == count_macs(split.edge, X).total
    assert plain["layer3"].smallest_edge_macs < rounded["layer3"].smallest_edge_macs


def test_a_misspelt_split_as_budget_offers_the_nearest(model: nn.Module) -> None:
    with pytest.raises(InputError, match=r"Did you mean: layer1"):
        plan(model, X, edge_macs="layr1")


def test_a_budget_nothing_can_meet_tells_the_smallest(model: nn.Module) -> None:
    with pytest.raises(BudgetError, match="smallest reachable is") as error:
        plan(model, X, edge_macs=1000)
    smallest = error.value.smallest_edge_macs
    assert smallest is not None and plan(model, X, edge_macs=smallest).recommended
    with pytest.raises(BudgetError, match="at layer3 to") as error:
        plan(model, X, edge_macs=1000, at="layer3")
    smallest = error.value.smallest_edge_macs
    assert smallest is not None
    assert plan(model, X, edge_macs=smallest, at="layer3")["layer3"].fits


def test_a_budget_above_the_dense_edge(model: nn.Module) -> None:
    with pytest.raises(InputError, match="above the dense edge at layer2"):
        plan(model, X, edge_macs="100M", at="layer2")
    with pytest.raises(InputError, match="above every dense edge"):
        plan(model, X, edge_macs="100G")
    with pytest.raises(InputError, match="boundary"):
        plan(model, X, edge_macs="layer1", boundary="cut")


def test_the_model_is_traced_once_for_all_places(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    trace = _cuts.trace
    monkeypatch.setattr(_cuts, "trace", lambda *args: traced.append(1) or trace(*args))
    assert len(plan(model, X, edge_macs="layer1").rows) > 2
    assert len(traced) == 2  # to list the places, and to cut at them


@pytest.mark.parametrize("wrong", [dict(at=3), dict(measure_latency=1.5),
                                   dict(measure_latency="yes")])
def test_arguments_of_another_kind(model: nn.Module, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        plan(model, X, edge_macs="layer1", **wrong)


def test_every_place_can_be_shown(model: nn.Module) -> None:
    assert len(plan(model, X, edge_macs="layer1", every=True).rows) >= len(
        plan(model, X, edge_macs="layer1").rows
    )


@pytest.mark.parametrize(
    ("count", "text"), [(9_884_160, "9.88M"), (4_087_136_256, "4.09G"), (12, "12"), (1000, "1K")]
)
def test_short(count: int, text: str) -> None:
    assert short(count) == text


def real_cost(model: nn.Module, name: str, gone: dict[str, list[int]]) -> EdgeCost:
    """The oracle: a copy is pruned and counted."""
    copied = copy.deepcopy(model)
    split = Split(copied, X, name)
    table = GroupTable.build(copied, X, split=split)
    remove_channels(table, gone)
    split.refresh()
    return EdgeCost(count_macs(split.edge, X).total, count_params(split.edge),
                    feature_bytes(split.feature_shape))


def shares_gone(model: nn.Module, name: str, ratio: float) -> dict[str, list[int]]:
    copied = copy.deepcopy(model)
    table = GroupTable.build(copied, X, split=Split(copied, X, name))
    return {g.name: list(range(int(g.channels * round(100 * ratio) // 100)))
            for g in table.groups.values() if g.location == "edge" and g.blocked is None}


@pytest.mark.parametrize("name", ["layer2", "layer3.0", "flatten"])
def test_what_is_left_agrees_with_a_pruned_copy(
    model: nn.Module, prune: Plan, name: str
) -> None:
    row = prune[name]
    assert row.channel_ratio and row.pruned is not None
    assert row.pruned == real_cost(model, name, shares_gone(model, name, row.channel_ratio))
    floors = {n: list(range(max(1, -(-len_of // 20)), len_of))
              for n, len_of in widths(model, name).items()}
    assert row.smallest == real_cost(model, name, floors)


def test_what_is_left_agrees_where_layers_have_biases(tiny: nn.Module) -> None:
    row = plan(tiny, X, edge_macs="250K", boundary="prune")["layer3"]
    assert row.channel_ratio and row.pruned is not None
    assert row.pruned == real_cost(tiny, "layer3", shares_gone(tiny, "layer3", row.channel_ratio))


def widths(model: nn.Module, name: str) -> dict[str, int]:
    table = GroupTable.build(model, X, split=Split(model, X, name))
    return {g.name: g.channels for g in table.groups.values()
            if g.location == "edge" and g.blocked is None}


@pytest.mark.parametrize("name", [
    "mobilenet_v3_small:features.4", "densenet121:features.denseblock2", "vgg11:classifier.1",
    "convnext_tiny:features.3", "resnext50_32x4d:layer2", "regnet_y_400mf:trunk_output.block2",
    "vit_b_32:encoder.layers.encoder_layer_1",
])
@pytest.mark.slow
def test_parameters_and_bytes_in_closed_form_on_backbones(name: str) -> None:
    name, at = name.split(":")
    model = torchvision.models.get_model(name, num_classes=4).eval()
    side = 224 if name.startswith(("vit", "vgg")) else 64
    x = torch.zeros(1, 3, side, side)
    split = Split(model, x, at)
    table = GroupTable.build(model, x, split=split)
    groups = [g for g in table.groups.values() if g.location == "edge" and g.blocked is None]
    sizes = EdgeSizes(split, MacModel(split, table), narrows=True)
    kept = {g.name: g.units(torch.arange(max(1, g.channels // g.tie * 2 // 3))) for g in groups}
    gone = {n: sorted(set(range(table.groups[n].channels)) - set(k.tolist()))
            for n, k in kept.items()}
    params, sent = sizes.params(kept), sizes.feature_bytes(kept)
    assert sizes.params({}) == count_params(split.edge)
    remove_channels(table, gone)
    split.refresh()
    assert (params, sent) == (count_params(split.edge), feature_bytes(split.feature_shape))
    assert params < sizes.params({})


def test_limits_of_parameters_ask_for_more_to_go(tiny: nn.Module) -> None:
    free = plan(tiny, X, edge_macs="layer1", at="layer3", boundary="prune")["layer3"]
    assert free.pruned is not None
    most = free.pruned.edge_params // 2
    made = plan(tiny, X, edge_macs="layer1", at="layer3", boundary="prune",
                limits=PlanLimits(edge_params=most))
    row = made["layer3"]
    assert row.pruned is not None and row.pruned.edge_params <= most
    assert row.channel_ratio and free.channel_ratio and row.channel_ratio > free.channel_ratio
    less = real_cost(tiny, "layer3", shares_gone(tiny, "layer3", row.channel_ratio - 0.01))
    assert less.edge_params > most
    assert row.prune_to == row.pruned.edge_macs < made.budget_edge_macs
    assert "For the other limits, prune to" in made.text
    assert free.prune_to == made.budget_edge_macs


def test_every_limit_holds_where_it_is_recommended(tiny: nn.Module) -> None:
    """The upload shrinks with depth: a limit rules out what lies before."""
    keep = plan(tiny, X, edge_macs="layer1")
    small = min(row.feature_bytes for row in keep.rows if not row.is_tail)
    made = plan(tiny, X, edge_macs="layer2", limits=PlanLimits(feature_bytes=small))
    assert made[made.recommended].feature_bytes <= small
    assert not made["layer1"].fits and "bytes to upload" in made["layer1"].reason
    params = PlanLimits(edge_params=keep["layer1"].edge_params)
    shallow = plan(tiny, X, edge_macs="100G", limits=params)
    row = shallow[shallow.recommended]
    assert row.pruned is not None and row.pruned.edge_params <= keep["layer1"].edge_params


@pytest.mark.parametrize("name", ["edge_params", "feature_bytes"])
def test_an_impossible_limit_tells_the_smallest_there_is(tiny: nn.Module, name: str) -> None:
    with pytest.raises(BudgetError, match="the smallest reachable is") as error:
        plan(tiny, X, edge_macs="layer1", limits=PlanLimits(**{name: 1}))
    least = int(error.value.smallest[name])
    made = plan(tiny, X, edge_macs="100G", limits=PlanLimits(**{name: least}))
    row = made[made.recommended]
    assert row.pruned is not None and getattr(row.pruned, name) == least
    with pytest.raises(BudgetError):
        plan(tiny, X, edge_macs="100G", limits=PlanLimits(**{name: least - 1}))


def test_limits_that_no_place_meets_together(tiny: nn.Module) -> None:
    keep = plan(tiny, X, edge_macs="layer1")
    few = min(row.smallest.edge_params for row in keep.rows)
    little = min(row.smallest.feature_bytes for row in keep.rows)
    with pytest.raises(BudgetError, match="no place to cut meets all at once"):
        plan(tiny, X, edge_macs="100G", limits=PlanLimits(few, little))


def test_a_narrower_feature_counts_as_fewer_bytes(tiny: nn.Module) -> None:
    dense = next(p for p in split_points(tiny, X) if p.name == "layer2").feature_bytes
    limits = PlanLimits(feature_bytes=dense // 2)
    row = plan(tiny, X, edge_macs="layer1", at="layer2", boundary="prune", limits=limits)["layer2"]
    assert row.pruned is not None and row.pruned.feature_bytes <= dense // 2
    with pytest.raises(BudgetError, match=r"at layer2 to .* bytes uploaded"):
        plan(tiny, X, edge_macs="layer1", at="layer2", limits=limits)


@pytest.mark.parametrize("bad", [0, -1, True, float("nan"), float("inf"), "8"])
def test_limits_that_are_none(bad: Any) -> None:
    for name in ("edge_params", "feature_bytes", "latency_ms"):
        with pytest.raises(InputError, match=name):
            PlanLimits(**{name: bad})


@pytest.mark.slow
def test_blocks_make_the_smallest_edge_smaller(model: nn.Module, keep: Plan) -> None:
    """Against the edge that really lost every block, and every group down to its floor."""
    both = plan(model, X, edge_macs="layer1", structures="both")
    alone = plan(model, X, edge_macs="layer1", structures="blocks")
    row = alone["layer3"]
    assert row.blocks == both["layer3"].blocks and len(row.blocks) == 4
    assert row.channel_ratio is None
    copied = copy.deepcopy(model)
    split = Split(copied, X, at="layer3")
    remove_blocks(split, row.blocks)
    assert count_macs(split.edge, X).total == row.smallest_edge_macs
    for name in ("layer2", "layer3"):
        assert both[name].smallest_edge_macs < keep[name].smallest_edge_macs
        assert both[name].smallest_edge_macs < alone[name].smallest_edge_macs
        assert both[name].channel_ratio == keep[name].channel_ratio == both[name].strength
    assert keep["layer3"].blocks == ()


@pytest.mark.slow
def test_blocks_alone_are_recommended_by_the_macs_that_have_to_go(model: nn.Module) -> None:
    made = plan(model, X, edge_macs="layer2.0", structures="blocks")
    row = made[made.recommended]
    assert row.fits and row.strength == pytest.approx(1 - made.budget_edge_macs / row.edge_macs)
    assert row.strength <= 0.6 and "residual blocks have to go" in row.reason
    deeper = [r for r in made.rows if r.fits and not r.is_tail and (r.strength or 0) <= 0.6]
    assert deeper[-1] == row
    with pytest.raises(BudgetError, match="No choice of blocks"):
        plan(model, X, edge_macs="conv1", at="layer3", structures="blocks")
    with pytest.raises(InputError, match="structures"):
        plan(model, X, edge_macs="layer1", structures="block")


@pytest.mark.parametrize("round_to", [2, 3, 4])
def test_a_row_counts_what_the_rounding_allows(model: nn.Module, round_to: int) -> None:
    """`pruned` is what is left of a copy that loses the same share, rounded up."""
    row = plan(model, X, edge_macs="layer1", at="layer3", round_to=round_to)["layer3"]
    assert row.pruned is not None and row.channel_ratio
    twin = copy.deepcopy(model)
    split = Split(twin, X, at="layer3")
    table = GroupTable.build(twin, X, split=split)
    gone = {}
    for name, group in table.groups.items():
        if group.location == "edge" and group.blocked is None and group.crossing is None:
            wanted = group.channels - int(group.channels * row.channel_ratio)
            kept = min(group.channels, -(-wanted // round_to) * round_to)
            gone[name] = list(range(kept, group.channels))
    remove_channels(table, gone)
    split.refresh()
    assert row.pruned.edge_macs == count_macs(split.edge, X).total <= row.prune_to
    assert row.pruned.edge_params == count_params(split.edge)


@pytest.mark.parametrize("arguments", [
    {"edge_macs": None}, {"edge_macs": "layer1", "max_channel_ratio": "a"}])
def test_no_number_is_refused_in_words(model: nn.Module, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        plan(model, X, **arguments)


def test_numpys_numbers_are_limits() -> None:
    assert PlanLimits(feature_bytes=np.int64(1000)).feature_bytes == 1000
