"""The proximal step: by hand, to exact zeros, never past the schedule or below a floor."""

from __future__ import annotations

import math

import pytest
import torch
from pruning_helpers import backbone, cifar_resnet
from torch import Tensor, nn

from patrol_prune._block_pruning import prunable_blocks
from patrol_prune.budget import MacModel
from patrol_prune.choice import Limits
from patrol_prune.errors import BudgetError
from patrol_prune.group_table import GroupTable
from patrol_prune.masks import SoftMasks
from patrol_prune.shrinkage import (
    BLOCK,
    Shrinker,
    adapted,
    block_key,
    scheduled_macs,
    soft_threshold,
)
from patrol_prune.split import Split


def shrinker(
    model: nn.Module, at: str, *, size: int = 16, budget: float = 0.5, **more: object
) -> tuple[Shrinker, dict[str, Tensor]]:
    x = torch.randn(1, 3, size, size)
    split = Split(model, x, at=at)
    masks = SoftMasks(model, x, split=split, boundary="prune")
    costs = MacModel(split, GroupTable.build(model, x, split=split))
    limits = more.pop("limits", Limits())
    values = {n: torch.ones(len(m)) for n, m in masks.channels.items()}
    made = Shrinker(costs, tuple(values), limits, round(budget * costs.dense), **more)
    return made, values


def drawn(values: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.rand(len(v), generator=g) for n, v in values.items()}


def test_the_formulas() -> None:
    m = torch.tensor([0.5, 0.2, 0.1, -0.3])
    assert soft_threshold(m, torch.tensor(0.2)).tolist() == pytest.approx([0.3, 0.0, 0.0, 0.0])
    assert [scheduled_macs(s, 10, 100, 40) for s in (-3, 0, 5, 10, 99)] == [100, 100, 70, 40, 40]
    assert adapted(2.0, 0.1, 50.0, 10) == pytest.approx(2.0 * math.exp(0.5))
    assert adapted(2.0, 0.0, 50.0, 10) == 2.0
    assert adapted(1.0, -1.0, 1e9, 1) == pytest.approx(math.exp(-0.7))


def test_soft_threshold_minimises_its_objective() -> None:
    """Against a grid: argmin_{u >= 0} (u - m)^2 / 2 + t |u|."""
    grid = torch.linspace(0, 2, 20_001)
    for m, t in ((1.3, 0.4), (0.3, 0.4), (-0.5, 0.1)):
        best = grid[((grid - m).square() / 2 + t * grid).argmin()]
        found = float(soft_threshold(torch.tensor(m), torch.tensor(t)))
        assert found == pytest.approx(float(best), abs=1e-3)


@pytest.mark.parametrize(("name", "at"), [("cifar", "layer2"), ("regnet", "trunk_output.block2")])
def test_costs_are_the_macs_that_removal_saves(name: str, at: str) -> None:
    """Against counting each tied unit out, at sizes where some channels are gone already."""
    model = cifar_resnet(width=8) if name == "cifar" else backbone("regnet_y_400mf")
    made, values = shrinker(model, at, size=16 if name == "cifar" else 32)
    for n, value in values.items():
        value[made.costs.table.groups[n].units(torch.tensor([0]))] = 0.0
    shares = made.shares(values)
    now, expected = made.macs(values), {}
    for n in list(values)[:6]:
        group = made.costs.table.groups[n]
        unit = group.units(torch.tensor([1]))
        fewer = {**values, n: values[n].clone()}
        fewer[n][unit] = 0.0
        expected[n] = (now - made.macs(fewer)) / len(unit)
    first = next(iter(expected))
    for n, cost in expected.items():
        assert float(shares[n][1] / shares[first][1]) == pytest.approx(cost / expected[first])
    assert sum(float(s.sum()) for s in shares.values()) == pytest.approx(1.0, abs=1e-5)


def test_one_step_by_hand() -> None:
    """The largest mask of a group holds its floor of one channel and pays nothing."""
    made, values = shrinker(cifar_resnet(width=8), "layer2")
    shares = {n: torch.full_like(v, 0.1) for n, v in values.items()}
    for value in values.values():
        value[:4] = torch.tensor([0.05, -0.2, 1.0, 1.5])
    done = made.step(values, 1.0, shares, target=0)
    for value in done.values.values():
        assert value[:4].tolist() == pytest.approx([0.0, 0.0, 0.9, 1.5])
    assert done.macs == done.unlimited == made.macs(done.values) < made.costs.dense
    still = made.step(values, 0.0, shares, target=made.costs.dense)
    for value in still.values.values():
        assert value[:4].tolist() == pytest.approx([0.05, 0.0, 1.0, 1.5])


def test_a_step_stops_at_the_schedule() -> None:
    made, values = shrinker(cifar_resnet(width=8), "layer2")
    values, target = drawn(values), round(0.7 * made.costs.dense)
    done = made.step(values, 1e3, made.shares(values), target)
    dearest = 0.05 * made.costs.dense  # two channels of the stem, which cross together
    assert done.unlimited < target <= done.macs <= target + 1.1 * dearest


@pytest.mark.parametrize("force", [0.0, 1.0])
def test_a_gradient_that_goes_too_far_is_cut_short(force: float) -> None:
    made, values = shrinker(cifar_resnet(width=8), "layer2")
    now, target = drawn(values), round(0.7 * made.costs.dense)
    beyond = {name: value - 10.0 for name, value in now.items()}
    shares = made.shares(values)
    assert made.step(beyond, force, shares, target).macs < target
    done = made.step(beyond, force, shares, target, now=now)
    assert done.unlimited < target <= done.macs < made.costs.dense


def test_floors_and_ties_hold_under_any_force() -> None:
    made, values = shrinker(
        backbone("regnet_y_400mf"), "trunk_output.block2", size=32, budget=0.9,
        limits=Limits(min_channels=4, max_pruning_ratio=0.6),
    )  # fmt: skip
    done = made.step(drawn(values), 1e9, made.shares(values), target=0)
    ties = set()
    for name, value in done.values.items():
        group = made.costs.table.groups[name]
        units = value.view(group.tie, -1)
        assert torch.equal(units, units[:1].expand_as(units))
        assert int((value > 0).sum()) >= max(4, 0.4 * group.channels)
        ties.add(group.tie)
    assert max(ties) > 1
    projected = made.project(done.values)
    assert made.macs(projected) <= made.budget


def test_the_budget_is_checked_at_once() -> None:
    with pytest.raises(BudgetError, match="smallest reachable"):
        shrinker(cifar_resnet(), "layer2", budget=0.2, limits=Limits(max_pruning_ratio=0.1))


def with_blocks(budget: float = 0.5, channels: bool = True) -> tuple[Shrinker, dict[str, Tensor]]:
    x = torch.randn(1, 3, 16, 16)
    model = cifar_resnet(width=8, depth=2)
    split = Split(model, x, at="layer2")
    masks = SoftMasks(model, x, split=split, blocks=True)
    costs = MacModel(split, masks.table, blocks=prunable_blocks(split, "both", ()))
    assert set(costs.blocks) == {"layer1.0", "layer1.1", "layer2.1"} == set(masks.blocks)
    values = {n: torch.ones(len(m)) for n, m in masks.channels.items()} if channels else {}
    made = Shrinker(costs, tuple(values), Limits(), round(budget * costs.dense))
    return made, {**values, **{block_key(n): torch.ones(1) for n in costs.blocks}}


def test_a_block_costs_all_that_goes_with_it() -> None:
    made, values = with_blocks()
    inner, block = "layer1.0.conv1", block_key("layer1.0")
    values[inner][:3] = 0.0
    shares = made.shares(values)
    without = {**values, block: torch.zeros(1)}
    fewer = {**values, inner: values[inner].clone()}
    fewer[inner][4] = 0.0
    saved = made.macs(values) - made.macs(without), made.macs(values) - made.macs(fewer)
    assert float(shares[block] / shares[inner][4]) == pytest.approx(saved[0] / saved[1])
    assert sum(float(s.sum()) for s in shares.values()) == pytest.approx(1.0, abs=1e-5)
    assert float(made.shares(without)[inner].abs().sum()) == 0.0  # what is gone saves nothing


def test_a_block_comes_down_as_fast_as_an_average_channel() -> None:
    made, values = with_blocks()
    shares, keys = made.shares(values), [n for n in values if n.startswith(BLOCK)]
    assert set(made.pace) == set(keys) and min(made.pace.values()) > 3
    done = made.step(values, 0.5 * made.structures, shares, target=0)
    for key in keys:  # the threshold is force / structures, whatever the block costs
        assert float(done.values[key]) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("channels", [True, False])
def test_blocks_are_projected_to_the_budget(channels: bool) -> None:
    made, values = with_blocks(0.35, channels)
    values = drawn(values)
    values[block_key("layer1.1")] = torch.tensor([0.01])
    projected = made.project(values)
    assert made.macs(projected) <= made.budget < made.macs(values)
    assert float(projected[block_key("layer1.1")]) == 0.0
    for name, value in projected.items():
        assert bool(((value == 0) | (value == values[name])).all())


def test_the_last_block_of_an_edge_of_blocks_stays() -> None:
    """Where nothing but blocks does work on the edge, no force takes the best one."""
    x = torch.randn(1, 3, 8, 8)
    model = nn.Sequential(Wrapped(), Wrapped(), nn.Conv2d(3, 2, 1))
    split = Split(model, x, at="1")
    costs = MacModel(split, GroupTable.build(model, x, split=split),
                     blocks=prunable_blocks(split, "blocks", ()))
    made = Shrinker(costs, (), Limits(), costs.dense // 2)
    names = [block_key(n) for n in costs.blocks]
    values = dict(zip(names, (torch.tensor([0.4]), torch.tensor([0.9])), strict=True))
    done = made.step(values, 1e9, made.shares(values), target=0)
    assert [bool(done.values[n]) for n in names] == [False, True]


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)
