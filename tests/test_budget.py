"""The closed form is fvcore's count, and the chosen channels meet the budget from below."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_helpers import Block, backbone, cifar_resnet
from torch import Tensor, nn

from patrol_prune.budget import MacModel
from patrol_prune.choice import Limits, choose, smallest
from patrol_prune.cost import count_macs
from patrol_prune.errors import BudgetError, InputError
from patrol_prune.group_table import GroupTable, remove_channels
from patrol_prune.split import Split


class Prepared:
    """A split model with its table, cost model and random scores of the groups on the edge."""

    def __init__(self, model: nn.Module, at: str, size: int, boundary: str = "keep") -> None:
        self.x = torch.randn(1, 3, size, size)
        self.split = Split(model, self.x, at=at)
        self.table = GroupTable.build(model, self.x, split=self.split)
        self.costs = MacModel(self.split, self.table)
        g = torch.Generator().manual_seed(3)
        self.scores = {
            n: torch.rand(group.channels, generator=g)
            for n, group in self.table.groups.items()
            if group.location == "edge"
            and group.blocked is None
            and (boundary == "prune" or group.crossing is None)
        }

    def prune(self, kept: dict[str, Tensor]) -> int:
        """Remove what is not kept for real; fvcore's count of the edge."""
        gone = {
            n: sorted(set(range(self.table.groups[n].channels)) - set(idxs.tolist()))
            for n, idxs in kept.items()
        }
        remove_channels(self.table, gone)
        self.split.refresh()
        return count_macs(self.split.edge, self.x).total


CASES = [
    ("resnet18", "layer3", 64, "keep"),
    ("mobilenet_v2", "features.10", 64, "prune"),
    ("densenet121", "features.denseblock1", 64, "prune"),
    ("regnet_y_400mf", "trunk_output.block2", 64, "keep"),
    ("efficientnet_b0", "features.4", 64, "keep"),
    ("squeezenet1_1", "features.7", 64, "prune"),
]


@pytest.mark.parametrize(("name", "at", "size", "boundary"), CASES)
def test_closed_form_equals_fvcore(name: str, at: str, size: int, boundary: str) -> None:
    p = Prepared(backbone(name), at, size, boundary)
    assert p.costs.dense == count_macs(p.split.edge, p.x).total
    assert p.costs.constant == 0
    budget = int(0.45 * p.costs.dense)
    kept = choose(p.costs, p.scores, budget)
    predicted = p.costs.macs(kept)
    assert p.costs.macs({n: len(k) for n, k in kept.items()}) == predicted
    assert 0.99 * budget <= predicted <= budget
    assert p.prune(kept) == predicted
    after = GroupTable.build(p.split.model, p.x, split=p.split)
    assert MacModel(p.split, after, previous=p.costs).dense == predicted


def test_hand_computed_costs() -> None:
    """conv 3->4 3x3 on 6x6, depthwise 3x3, conv 4->6 1x1 stride 2, flatten, linear 54->5."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 6, 1, stride=2), nn.Flatten(), nn.Linear(54, 5), nn.ReLU(), nn.Linear(5, 2),
    )  # fmt: skip
    p = Prepared(net, "6", 6)
    dense = 36 * 3 * 4 * 9 + 36 * 4 * 9 + 9 * 4 * 6 + 54 * 5
    assert p.costs.dense == dense
    pruned = 36 * 3 * 3 * 9 + 36 * 3 * 9 + 9 * 3 * 2 + 9 * 2 * 5
    first = p.table.members_of(net[0], "out")[0][0]
    assert p.costs.macs({first: 3, "3": 2}) == pruned
    assert p.prune({first: torch.tensor([0, 1, 3]), "3": torch.tensor([4, 5])}) == pruned


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(8, 4, 4), (4, 8, 4), (8, 8, 2)])
def test_grouped_layers_cost_what_is_counted(inputs: int, outputs: int, groups: int) -> None:
    """A layer with as many groups as outputs has one input channel each only at equal widths."""
    net = nn.Sequential(
        nn.Conv2d(3, inputs, 3, padding=1), nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups),
        nn.ReLU(), nn.Conv2d(outputs, 2, 3), nn.Flatten(), nn.Linear(32, 2),
    )  # fmt: skip
    p = Prepared(net, "2", 6)
    assert p.costs.dense == 36 * 9 * (3 * inputs + inputs // groups * outputs)
    assert p.costs.dense == count_macs(p.split.edge, p.x).total


def test_what_is_no_layer_is_a_constant() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, 4)
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            t = self.stem(x).flatten(2).transpose(1, 2)
            t = t + torch.softmax(t @ t.transpose(1, 2), -1) @ t
            t = self.down(self.up(t).relu())
            return self.head(t.mean(1))

    p = Prepared(Attention(), "down", 16)
    assert p.costs.constant == 2 * 16 * 16 * 8
    assert p.costs.dense == count_macs(p.split.edge, p.x).total
    assert p.prune({"up": torch.arange(9)}) == p.costs.macs({"up": 9})


@pytest.mark.parametrize("fraction", [0.8, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("at", ["layer1", "layer2", "layer3"])
def test_within_one_percent_on_a_small_resnet(at: str, fraction: float) -> None:
    p = Prepared(cifar_resnet(depth=2), at, 32, "prune")
    budget = int(fraction * p.costs.dense)
    if smallest(p.costs, p.scores) > budget:
        pytest.skip("the floors are above this budget")
    macs = p.costs.macs(choose(p.costs, p.scores, budget))
    assert macs <= budget
    if (at, fraction) == ("layer1", 0.1):  # every size there is: 9216 * s * (3 + 2 a + 2 b)
        reachable = [9216 * s * (3 + 2 * t) for s in range(1, 17) for t in range(2, 33)]
        assert macs == max(m for m in reachable if m <= budget) == 976896
    else:
        assert 0.99 * budget <= macs


@pytest.mark.parametrize("fraction", [0.7, 0.4, 0.2, 0.1, 0.05])
def test_coarse_networks_come_as_close_as_any_choice(fraction: float) -> None:
    """Few and wide steps: against every combination of widths."""
    p = Prepared(nn.Sequential(*(nn.Conv2d(c, d, 1) for c, d in [(3, 5), (5, 4), (4, 6), (6, 2)])),
                 "2", 4, "prune")  # fmt: skip
    budget = max(int(fraction * p.costs.dense), smallest(p.costs, p.scores))
    widths = itertools.product(range(1, 6), range(1, 5), range(1, 7))
    all_macs = [p.costs.macs(dict(zip(p.scores, w, strict=True))) for w in widths]
    best = max(m for m in all_macs if m <= budget)
    macs = p.costs.macs(choose(p.costs, p.scores, budget))
    assert macs <= budget and (macs >= 0.99 * budget or macs == best)


def test_worst_scores_go_first() -> None:
    """Equal cost per channel: what goes is exactly the lowest scores of each group."""
    p = Prepared(cifar_resnet(), "layer2", 16, "prune")
    kept = choose(p.costs, p.scores, int(0.5 * p.costs.dense))
    for name, idxs in kept.items():
        gone = set(range(len(p.scores[name]))) - set(idxs.tolist())
        if gone:
            assert p.scores[name][list(gone)].max() <= p.scores[name][idxs].min()
    assert any(len(i) < len(p.scores[n]) for n, i in kept.items())


def test_choice_loses_hardly_more_than_the_best_choice() -> None:
    """Against every pair of widths of a two-group network, tried out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Conv2d(10, 12, 3), nn.Conv2d(12, 4, 3))
    p = Prepared(nn.Sequential(net, nn.ReLU(), nn.Conv2d(4, 2, 1)), "0", 16)
    a, b = (n for n in p.scores)
    order = {n: p.scores[n].sort(descending=True).values for n in (a, b)}
    budget = int(0.5 * p.costs.dense)
    best = max(
        float(order[a][:i].sum() + order[b][:j].sum())
        for i, j in itertools.product(range(1, 11), range(1, 13))
        if p.costs.macs({a: i, b: j}) <= budget
    )
    kept = choose(p.costs, p.scores, budget)
    got = sum(float(p.scores[n][i].sum()) for n, i in kept.items())
    assert got >= 0.9 * best


def test_floors_and_rounding_hold() -> None:
    p = Prepared(cifar_resnet(width=24), "layer2", 16, "prune")
    limits = Limits(min_channels=3, max_pruning_ratio=0.7, round_to=8)
    for name in list(p.scores)[:2]:
        p.scores[name] *= 1e-6
    kept = choose(p.costs, p.scores, int(0.4 * p.costs.dense), limits=limits)
    for name, idxs in kept.items():
        total = p.table.groups[name].channels
        assert len(idxs) % 8 == 0 or len(idxs) == total
        assert len(idxs) >= max(8, 0.3 * total)
        assert len(set(idxs.tolist())) == len(idxs)


def test_a_group_of_worthless_channels_keeps_its_floor() -> None:
    """Torch-Pruning leaves such a group at full width."""
    p = Prepared(cifar_resnet(), "layer2", 16, "prune")
    worthless = next(iter(p.scores))
    p.scores[worthless] = torch.full_like(p.scores[worthless], -1e3)
    kept = choose(p.costs, p.scores, int(0.2 * p.costs.dense), limits=Limits(min_channels=2))
    assert 2 <= len(kept[worthless]) < len(p.scores[worthless])
    assert min(len(i) for i in kept.values()) >= 2


def test_tied_channels_go_together() -> None:
    p = Prepared(backbone("regnet_y_400mf"), "trunk_output.block1", 64, "prune")
    kept = choose(p.costs, p.scores, int(0.6 * p.costs.dense))
    tied = {n: i for n, i in kept.items() if p.table.groups[n].tie > 1}
    assert tied
    for name, idxs in tied.items():
        group = p.table.groups[name]
        assert torch.equal(group.units(idxs), idxs)
    assert any(len(i) < p.table.groups[n].channels for n, i in tied.items())
    p.prune(kept)
    p.split.cloud(p.split.edge(torch.randn(2, 3, 64, 64)))


class SharedSum(nn.Module):
    """One convolution's output is added to a concatenation of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Conv2d(3, 12, 3, padding=1)
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Conv2d(12, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.whole(x) + torch.cat([self.left(x), self.right(x)], 1)
        return self.head(self.mix(z.relu()).relu())


def test_a_layer_with_a_part_of_a_group_is_not_emptied() -> None:
    p = Prepared(SharedSum(), "mix", 8, "prune")
    for name in p.scores:
        p.scores[name][:4] *= -1.0
    kept = choose(p.costs, p.scores, smallest(p.costs, p.scores))
    predicted = p.costs.macs(kept)
    assert p.prune(kept) == predicted
    model = p.split.model
    assert min(model.left.out_channels, model.right.out_channels) >= 1
    assert model.left.out_channels + model.right.out_channels == model.whole.out_channels
    model(torch.randn(2, 3, 8, 8))


def test_impossible_budget_tells_the_smallest() -> None:
    p = Prepared(cifar_resnet(), "layer2", 16)
    limits = Limits(max_pruning_ratio=0.5)
    floor = smallest(p.costs, p.scores, limits=limits)
    with pytest.raises(BudgetError, match=rf"{floor} MACs, 0\.\d+") as caught:
        choose(p.costs, p.scores, floor - 1, limits=limits)
    assert caught.value.smallest_edge_macs == floor
    kept = choose(p.costs, p.scores, floor, limits=limits)
    assert p.costs.macs(kept) == floor == p.prune(kept)


def test_dense_budget_keeps_everything() -> None:
    p = Prepared(cifar_resnet(), "layer2", 16)
    kept = choose(p.costs, p.scores, p.costs.dense)
    assert all(len(i) == len(p.scores[n]) for n, i in kept.items())


def test_bad_arguments() -> None:
    p = Prepared(cifar_resnet(), "layer2", 16)
    name = next(iter(p.scores))
    with pytest.raises(InputError, match="dense edge"):
        choose(p.costs, p.scores, p.costs.dense + 1)
    with pytest.raises(InputError, match="finite"):
        choose(p.costs, {name: p.scores[name] * float("nan")}, p.costs.dense)
    with pytest.raises(InputError, match="16 scores"):
        choose(p.costs, {name: torch.ones(3)}, p.costs.dense)
    with pytest.raises(InputError, match="channel groups"):
        choose(p.costs, {"nothing": torch.ones(3)}, p.costs.dense)
    with pytest.raises(InputError, match="channel groups"):
        p.costs.macs({"nothing": 3})
    for bad in ({"min_channels": 0}, {"max_pruning_ratio": 0.0}, {"round_to": 0}):
        with pytest.raises(InputError):
            Limits(**bad)


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, str]:
    """A chain of convolutions, residual blocks and depthwise layers, cut somewhere inside."""
    widths = draw(st.lists(st.integers(2, 12), min_size=3, max_size=5))
    layers: list[nn.Module] = []
    c_in = 3
    for width in widths:
        kind = draw(st.sampled_from(["conv", "block", "depthwise"]))
        if kind == "block":
            layers.append(Block(c_in, width))
        else:
            layers += [nn.Conv2d(c_in, width, draw(st.sampled_from([1, 3])), padding=1), nn.ReLU()]
            if kind == "depthwise":
                layers.append(nn.Conv2d(width, width, 3, padding=1, groups=width))
        c_in = width
    cut = len(layers) - 1
    layers += [nn.Conv2d(c_in, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    return nn.Sequential(*layers), str(cut)


@settings(max_examples=20)
@given(networks(), st.floats(0.05, 1.0), st.sampled_from(["keep", "prune"]), st.integers(1, 3))
def test_any_network_meets_its_budget(
    net: tuple[nn.Module, str], fraction: float, boundary: str, floor: int
) -> None:
    model, at = net
    p = Prepared(model, at, 8, boundary)
    limits = Limits(min_channels=floor)
    budget = max(int(fraction * p.costs.dense), smallest(p.costs, p.scores, limits=limits))
    kept = choose(p.costs, p.scores, budget, limits=limits)
    predicted = p.costs.macs(kept)
    assert predicted <= budget
    assert all(len(i) >= min(floor, len(p.scores[n])) for n, i in kept.items())
    assert p.prune(kept) == predicted
    assert torch.isfinite(model(torch.randn(2, 3, 8, 8))).all()
