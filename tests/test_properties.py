"""Invariants on random networks: one drawn network, one traced graph, four properties.

A mask of ones changes no bit; a mask of zeros is the removal; the closed form of the MACs is what
fvcore counts afterwards; what `load` gives equals what `save` saw, bit for bit.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pruning_helpers import randomize
from torch import Tensor, nn

import patrol_prune as pp
from patrol_prune.budget import MacModel
from patrol_prune.cost import count_macs
from patrol_prune.group_table import remove_channels
from patrol_prune.masks import SoftMasks
from patrol_prune.split import Split

WIDTHS = (4, 6, 8, 12)


@dataclass(frozen=True)
class Stage:
    """What follows the features so far; `width` channels come out where the kind lets them."""

    kind: str
    width: int
    norm: bool
    bias: bool


@dataclass(frozen=True)
class Drawn:
    """One example: a network, where it is cut, and what is removed."""

    stages: tuple[Stage, ...]
    head: str
    cut: int
    boundary: str
    share: float
    history: bool
    seed: int


class Conv(nn.Sequential):
    """A convolution, perhaps with a batch norm."""

    def __init__(self, c_in: int, c_out: int, stage: Stage, *, k: int = 3, groups: int = 1) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(c_in, c_out, k, padding=k // 2, groups=groups, bias=stage.bias)
        ]
        if stage.norm:
            layers.append(nn.BatchNorm2d(c_out))
        super().__init__(*layers)


class Chain(nn.Module):
    def __init__(self, c: int, s: Stage) -> None:
        super().__init__()
        self.conv, self.out = Conv(c, s.width, s), s.width

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


class Strided(Chain):
    def __init__(self, c: int, s: Stage) -> None:
        super().__init__(c, s)
        self.conv[0].stride = (2, 2)


class Grouped(Chain):
    def __init__(self, c: int, s: Stage) -> None:
        super().__init__(c, s)
        self.conv = Conv(c, s.width, s, groups=2)


class Add(nn.Module):
    """A residual block, with a projected shortcut where the widths differ."""

    def __init__(self, c: int, s: Stage) -> None:
        super().__init__()
        self.first, self.second, self.out = Conv(c, s.width, s), Conv(s.width, s.width, s), s.width
        self.shortcut = nn.Identity() if c == s.width else Conv(c, s.width, s, k=1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x).relu()) + self.shortcut(x)).relu()


class Dense(nn.Module):
    """New channels beside the old ones, as in densenet."""

    def __init__(self, c: int, s: Stage) -> None:
        super().__init__()
        self.conv, self.out = Conv(c, s.width, s), c + s.width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(x).relu()], 1)


class Branches(nn.Module):
    """Two convolutions side by side."""

    def __init__(self, c: int, s: Stage) -> None:
        super().__init__()
        self.a, self.b, self.out = Conv(c, s.width, s), Conv(c, 4, s, k=1), s.width + 4

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 1).relu()


class Depthwise(nn.Module):
    """A depthwise convolution on the features as they are, and one inside a bottleneck."""

    def __init__(self, c: int, s: Stage) -> None:
        super().__init__()
        self.own = Conv(c, c, s, groups=c)
        self.up, self.down, self.out = Conv(c, s.width, s, k=1), Conv(s.width, c, s, k=1), c
        self.inner = Conv(s.width, s.width, s, groups=s.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.inner(self.up(self.own(x)).relu()).relu())


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, c: int, s: Stage) -> None:
        super().__init__()
        self.squeeze, self.excite, self.out = nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1), c

    def forward(self, x: Tensor) -> Tensor:
        scale = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * scale


class Twice(nn.Module):
    """One convolution on its own output."""

    def __init__(self, c: int, s: Stage) -> None:
        super().__init__()
        self.conv, self.out = Conv(c, c, s), c

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu()).relu()


class Siamese(nn.Module):
    """One convolution on two inputs, whose results are added."""

    def __init__(self, c: int, s: Stage) -> None:
        super().__init__()
        self.enter, self.shared, self.out = Conv(c, c, s, k=1), Conv(c, s.width, s), s.width

    def forward(self, x: Tensor) -> Tensor:
        return (self.shared(x) + self.shared(self.enter(x).relu())).relu()


class SharedBlock(nn.Module):
    """A residual branch that runs twice with the same weights."""

    def __init__(self, c: int, s: Stage) -> None:
        super().__init__()
        self.first, self.second, self.out = Conv(c, s.width, s), Conv(s.width, c, s), c

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.second(self.first(x).relu())
        return x


class SharedConcat(nn.Module):
    """One convolution on two inputs, whose results stand side by side."""

    def __init__(self, c: int, s: Stage) -> None:
        super().__init__()
        self.shared, self.out = Conv(c, s.width, s), 2 * s.width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.shared(x), self.shared(x.neg()).relu()], 1)


class Shuffle(nn.Module):
    """Half of the channels pass a bottleneck, then both halves are interleaved."""

    def __init__(self, c: int, s: Stage) -> None:
        super().__init__()
        self.up, self.down = Conv(c // 2, s.width, s, k=1), Conv(s.width, c // 2, s)
        self.shuffle, self.out = nn.ChannelShuffle(2), c

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return self.shuffle(torch.cat([a, self.down(self.up(b).relu()).relu()], 1))


KINDS = {
    k.__name__: k
    for k in (Chain, Strided, Grouped, Add, Dense, Branches, Depthwise, Gate, Twice, Siamese,
              SharedBlock, SharedConcat, Shuffle)
}  # fmt: skip
HEADS = ("pool", "flatten", "two")


class Net(nn.Module):
    """A stem, the drawn stages, and a head of one output or two."""

    def __init__(self, stages: Sequence[Stage], head: str) -> None:
        super().__init__()
        c, self.head = 6, head
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.stages = nn.Sequential()
        for stage in stages:
            self.stages.append(KINDS[stage.kind](c, stage))
            c = self.stages[-1].out
        if head != "pool":
            self.hidden, self.flat = nn.Linear(4 * c, 6), nn.Linear(6, 3)
        if head != "flatten":
            self.pooled = nn.Linear(c, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stages(self.stem(x).relu())
        if self.head == "pool":
            return self.pooled(x.mean((2, 3)))
        small = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        flat = self.flat(self.hidden(small).relu())
        return flat if self.head == "flatten" else (flat, self.pooled(x.mean((2, 3))))


@st.composite
def examples(draw: st.DrawFn) -> Drawn:
    stage = st.builds(Stage, st.sampled_from(sorted(KINDS)), st.sampled_from(WIDTHS),
                      st.booleans(), st.booleans())
    stages = tuple(draw(st.lists(stage, min_size=1, max_size=3)))
    return Drawn(
        stages, draw(st.sampled_from(HEADS)), draw(st.integers(0, len(stages) - 1)),
        draw(st.sampled_from(["keep", "prune"])), draw(st.sampled_from([0.3, 0.6, 0.9])),
        draw(st.booleans()), draw(st.integers(0, 999)),
    )  # fmt: skip


def net_of(drawn: Drawn) -> nn.Module:
    return Net(drawn.stages, drawn.head)


def some_units(masks: SoftMasks, costs: MacModel, share: float, seed: int) -> dict[str, Tensor]:
    """For every masked group a random set of tied units; every layer keeps a channel at least."""
    g = torch.Generator().manual_seed(seed)
    gone = {}
    for name in masks.channels:
        group = masks.table.groups[name]
        units = group.channels // group.tie
        drop = torch.rand(units, generator=g) < share
        parts = torch.from_numpy(costs.segments(name))
        for part in parts.unique():
            here = (parts == part).nonzero().flatten() % units
            drop[here[int(torch.randint(len(here), (1,), generator=g))]] = False
        gone[name] = group.units(drop.nonzero().flatten())
    return gone


def tensors(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def same_bits(a: Tensor | tuple[Tensor, ...], b: Tensor | tuple[Tensor, ...]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(tensors(a), tensors(b), strict=True))


KEPT = re.compile(
    "these channels are the model's output|its .* channels cannot be divided by .* channel groups|"
    "'.*' puts a part of these channels into groups|the channels of '.*' are concatenated twice|"
    "a channel shuffle interleaves its channels|"
    "it crosses the split of a model that shuffles channels|"
    "'.*' reads them beside channels that cannot be followed|"
    "its channels leave '.*'; .* cannot be followed: .*|it crosses the split inside '.*', and .*"
)


@torch.no_grad()
def check(drawn: Drawn) -> int:
    """All four properties of one example; the number of channels that went."""
    torch.manual_seed(drawn.seed)
    model, x = randomize(net_of(drawn), drawn.seed), torch.randn(2, 3, 6, 6)
    split = Split(model, x[:1], at=f"stages.{drawn.cut}")
    masks = SoftMasks(model, x[:1], split=split, boundary=drawn.boundary, scope="model")
    costs = MacModel(split, masks.table)
    for group in masks.table.groups.values():  # what is not supported stays whole and is named
        assert group.blocked is None or KEPT.fullmatch(group.blocked), group.blocked

    dense = model(x)
    with masks.attached():
        assert same_bits(model(x), dense), "ones changed a bit"

    gone = some_units(masks, costs, drawn.share, drawn.seed)
    masks.zero(gone)
    with masks.attached():
        masked = model(x)
    predicted = costs.macs({n: m.nonzero().flatten() for n, m in masks.channels.items()})

    remove_channels(masks.table, gone)
    split.refresh()
    pruned = model(x)
    for a, b in zip(tensors(masked), tensors(pruned), strict=True):
        assert (a - b).abs().max() <= 2e-6 * max(1.0, float(b.abs().max())), "zero is no removal"
    assert count_macs(split.edge, x[:1]).total == predicted

    history = masks.table.graph.pruning_history() if drawn.history else None
    with tempfile.TemporaryDirectory() as folder:
        pp.save(split, Path(folder) / "edge", history=history)
        loaded = pp.load(Path(folder) / "edge", lambda: net_of(drawn))
    assert same_bits(loaded.model(x), pruned)
    assert same_bits(loaded.cloud(loaded.edge(x)), pruned)
    return sum(len(idxs) for idxs in gone.values())


def check_many(count: int) -> None:
    removed: list[int] = []

    @settings(deadline=None, derandomize=True, database=None, max_examples=count,
              suppress_health_check=list(HealthCheck))
    @given(examples())
    def each(drawn: Drawn) -> None:
        removed.append(check(drawn))

    each()
    assert len(removed) >= count and sum(r > 0 for r in removed) > 0.9 * count


def test_random_networks() -> None:
    check_many(25)


def test_a_concatenation_inside_another_before_a_flattening() -> None:
    stages = (Stage("Branches", 4, False, False), Stage("Dense", 4, False, False))
    drawn = Drawn(stages, head="flatten", cut=0, boundary="keep", share=0.3, history=False, seed=0)
    assert check(drawn) > 0


@pytest.mark.slow
def test_many_random_networks() -> None:
    check_many(4000)
