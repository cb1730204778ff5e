"""Models that are hard to follow, pruned by several pruners, and what a failed step leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.cost import count_macs
from patrol_prune.defences.dropout import Dropper
from patrol_prune.errors import InputError, PatrolError, UnsupportedModelError

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Random(tp.importance.Importance):
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, group, **_: object) -> Tensor:  # type: ignore[no-untyped-def]
        return torch.rand(len(group[0].idxs), generator=self.generator)


class Chain(nn.Module):
    """Three convolutions and a linear layer; what happens between them is `between`."""

    def __init__(self, first: nn.Module, width: int, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = first, nn.Conv2d(width, 8, 3, padding=1)
        self.c, self.f, self.between = nn.Conv2d(8, 12, 3, padding=1), nn.Linear(12, 5), between

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(self.between(self.a(x))))
        return self.f(F.relu(self.c(x)).mean((2, 3)))


def gated(x: Tensor) -> Tensor:
    u, v = x.chunk(2, 1)
    return u * torch.sigmoid(v)


def added(x: Tensor) -> Tensor:
    u, v = x.split(8, 1)
    return F.relu(u) + v


def chain(between: Callable[[Tensor], Tensor] = F.relu, width: int = 8) -> Chain:
    torch.manual_seed(1)
    return Chain(nn.Conv2d(3, 16, 3, padding=1), width, between).eval()


@pytest.mark.parametrize("between", [gated, added])
def test_halves_that_meet_again_are_counted_as_they_are(
    between: Callable[[Tensor], Tensor]
) -> None:
    model = chain(between)
    split = pp.Split(model, X, at="c")
    masks = pp.SoftMasks(model, X, split=split)
    pruner = pp.PatrolPruner(model, X, Random(), split=split, edge_macs=0.7)
    kept = pruner.choose()
    masks.zero({name: sorted(set(range(len(masks.channels[name]))) - set(idxs.tolist()))
                for name, idxs in kept.items()})
    with masks.attached(), torch.no_grad():
        masked = model(X)
    pruner.importance = Random()
    result = pruner.step()
    assert result.edge_macs == count_macs(split.edge, X).total <= result.budget
    assert torch.allclose(model(X), masked, atol=1e-5)


def test_a_transposed_convolution_in_groups_stays_whole() -> None:
    class Upwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.u = nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
            self.e, self.g = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, padding=1)
            self.f = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.e(F.relu(self.u(F.relu(self.a(x))))))
            return self.f(F.relu(self.g(x)).mean((2, 3)))

    model = Upwards().eval()
    result = pp.PatrolPruner(model, X, Random(), split=pp.Split(model, X, at="g"),
                             edge_macs=0.7).step()
    assert "transposed convolution in groups" in " ".join(result.left_whole.values())
    assert model.u.weight.shape == (8, 4, 2, 2) and model(X).shape == (2, 5)


class Positioned(nn.Module):
    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.pos = nn.Parameter(torch.randn(1, 8, size, size))
        self.b, self.c = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.f = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(F.relu(self.c(F.relu(self.b(F.relu(self.a(x) + self.pos))))).mean((2, 3)))


def positioned(size: int = 16) -> Positioned:
    torch.manual_seed(1)
    return Positioned(size).eval()


@pytest.mark.parametrize("size", [16, 8])
def test_a_parameter_is_not_cut_along_its_positions(size: int) -> None:
    model, x = positioned(size), X[..., :size, :size]
    split = pp.Split(model, x, at="c")
    result = pp.PatrolPruner(model, x, Random(), split=split, edge_macs=0.6).step()
    assert model.pos.shape == (1, 8, size, size) and "pos" in result.left_whole["a"]
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("kind", [list, dict])
def test_where_the_caller_says_so_its_channels_go_and_the_file_is_loaded(
    tmp_path: Path, kind: type
) -> None:
    model = positioned()
    split = pp.Split(model, X, at="c")
    pp.PatrolPruner(model, X, Random(), split=split, edge_macs=0.5,
                    unwrapped_parameters=kind([(model.pos, 1)])).step()
    assert model.pos.shape[1] == model.a.out_channels < 8 and model.pos.shape[2:] == (16, 16)
    pp.save(split, tmp_path / "a")
    assert torch.equal(pp.load(tmp_path / "a", positioned).model(X), model(X))


def stock(model: nn.Module) -> None:
    tp.pruner.BasePruner(model, X, importance=Random(), pruning_ratio=0.3,
                         ignored_layers=[model.f]).step()


@pytest.mark.parametrize("order", [("stock", "ours"), ("ours", "stock"),
                                   ("ours", "stock", "ours")])
def test_what_several_pruners_left_is_loaded(order: tuple[str, ...], tmp_path: Path) -> None:
    model = chain(width=16)
    split = pp.Split(model, X, at="c")
    for who in order:
        if who == "stock":
            stock(model)
            split.refresh()
        else:
            pp.PatrolPruner(model, X, Random(), split=split, edge_macs=0.7).step()
    pp.save(split, tmp_path / "a")
    loaded = pp.load(tmp_path / "a", lambda: chain(width=16))
    assert torch.equal(loaded.model(X), model(X))
    assert pp.edge_macs(loaded) == pp.edge_macs(split)


def test_another_model_is_still_refused(tmp_path: Path) -> None:
    model = chain(width=16)
    split = pp.Split(model, X, at="c")
    pp.PatrolPruner(model, X, Random(), split=split, edge_macs=0.7).step()
    pp.save(split, tmp_path / "a")
    with pytest.raises(PatrolError):
        pp.load(tmp_path / "a", positioned)


def test_a_step_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(width=16)
    split = pp.Split(model, X, at="c")
    before, state = model(X), copy.deepcopy(model.state_dict())
    pruner = pp.PatrolPruner(model, X, Random(), split=split, edge_macs=0.5)
    real, calls = type(split).refresh, []

    def fails(self: pp.Split) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise InputError("something else was narrowed")
        real(self)

    monkeypatch.setattr(type(split), "refresh", fails)
    with pytest.raises(UnsupportedModelError, match="as it was before.*something else"):
        pruner.step()
    assert torch.equal(model(X), before) and model.a.out_channels == 16
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(split.cloud(split.edge(X)), before) and not list(split.pruning_history)
    monkeypatch.undo()
    again = pp.PatrolPruner(model, X, Random(), split=split, edge_macs=0.5).step()
    assert again.edge_macs == pp.edge_macs(split) <= again.budget


class Rows(nn.Module):
    """`[N, H, W, C]` crosses, with as many rows as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 16)
        self.c, self.f = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x)).permute(0, 2, 3, 1)))
        return self.f(F.relu(self.c(x)).mean((1, 2)))


class Signal(nn.Module):
    """`[N, C, L]` crosses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
        self.c, self.f = nn.Conv1d(8, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))).mean(2))


@pytest.mark.parametrize(("build", "shape", "axis"), [
    (Rows, (3, 16, 16), 3), (Rows, (3, 8, 8), 3), (Signal, (3, 16), 1), (Signal, (3, 8), 1),
    (Signal, (3, 5), 1)])
def test_masks_lie_on_the_channels_of_what_crosses(
    build: type[nn.Module], shape: tuple[int, ...], axis: int
) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(2, *shape)
    split = pp.Split(model, x, at="relu_1")
    masks = pp.SoftMasks(model, x, split=split, boundary="prune")
    plain = split.edge(x)
    masks.zero({"b": [1, 2]})
    with masks.attached(), torch.no_grad():
        z = split.edge(x)
    gone = torch.zeros(plain.shape[axis], dtype=torch.bool)
    gone[[1, 2]] = True
    assert float(z.movedim(axis, 0)[gone].abs().max()) == 0.0
    assert torch.equal(z.movedim(axis, 0)[~gone], plain.movedim(axis, 0)[~gone])


def test_a_flattened_feature_is_wider_than_any_layer() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.f = nn.Linear(8 * 16 * 16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(torch.flatten(F.relu(self.b(F.relu(self.a(x)))), 1))

    model = Flat().eval()
    split = pp.Split(model, X, at="flatten")
    masks = pp.SoftMasks(model, X, split=split, boundary="prune")
    masks.zero({"b": [3]})
    with masks.attached(), torch.no_grad():
        z = split.edge(X).view(2, 8, 16, 16)
    assert float(z[:, 3].abs().max()) == 0.0 and float(z[:, 4].abs().max()) > 0.0


class Scaled(Chain):
    """Its forward uses a number that no file holds."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Conv2d(3, width, 3, padding=1), width, F.relu)
        self.scale = width**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


def test_a_wider_model_with_other_answers_is_refused(tmp_path: Path) -> None:
    model = Scaled(16).eval()
    split = pp.Split(model, X, at="c")
    pp.PatrolPruner(model, X, Random(), split=split, edge_macs=0.7).step()
    pp.save(split, tmp_path / "a")
    assert torch.equal(pp.load(tmp_path / "a", lambda: Scaled(16).eval()).model(X), model(X))
    with pytest.raises(PatrolError, match="Give the factory of the very model"):
        pp.load(tmp_path / "a", lambda: Scaled(64).eval())


def test_an_output_that_another_pruner_narrowed_is_loaded(tmp_path: Path) -> None:
    model = chain(width=16)
    tp.pruner.BasePruner(model, X, importance=Random(), pruning_ratio=0.3).step()
    with torch.no_grad():
        model.f = nn.Linear(model.f.in_features, 4)
    split = pp.Split(model, X, at="c")
    pp.save(split, tmp_path / "a")
    loaded = pp.load(tmp_path / "a", lambda: chain(width=16))
    assert torch.equal(loaded.model(X), model(X))


def test_an_edge_of_ones_own_that_cannot_be_traced_is_one_block() -> None:
    edge = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True),
                         nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), Dropper(0.1, 0))
    cloud = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    split = pp.Split.from_modules(edge, cloud, X)
    assert split.blocks == (edge,)
    objective = pp.PatrolObjective(split, F.cross_entropy, alpha=1.0, beta=0.0)
    objective.terms(X, torch.tensor([0, 1])).total.backward()
    assert edge[0].weight.grad is not None


def test_a_block_that_cannot_go_leaves_the_channels_too(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chain(width=16)
    split = pp.Split(model, X, at="c")
    before = {name: p.clone() for name, p in model.named_parameters()}
    pruner = pp.PatrolPruner(model, X, Random(), split=split, edge_macs=0.5)

    def refused(self: pp.PatrolPruner, names: tuple[str, ...]) -> tuple[str, ...]:
        assert self.model.a.out_channels < 16, "channels go first"
        self.model.c = nn.Identity()  # half of a removal
        self.split.removed_blocks = [("c", 0)]
        raise UnsupportedModelError("the block's layer is read elsewhere")

    monkeypatch.setattr(pp.PatrolPruner, "_remove_blocks", refused)
    with pytest.raises(UnsupportedModelError, match="read elsewhere"):
        pruner.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not list(split.pruning_history) and not split.removed_blocks
    assert model(X).shape == (2, 5)


def test_masks_of_a_part_of_the_channels_lie_on_channels() -> None:
    class Partly(nn.Module):
        """Half of what crosses stays whole: `[N, 12, 32]`."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(3, 4, 3, padding=1)
            self.c, self.f = nn.Conv1d(12, 8, 3, padding=1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            z = F.relu(torch.cat([self.a(x), self.b(x).flip(1)], 1))
            return self.f(F.relu(self.c(z)).mean(2))

    torch.manual_seed(0)
    model, x = Partly().eval(), torch.randn(2, 3, 32)
    split = pp.Split(model, x, at="relu")
    plain = split.edge(x)
    masks = pp.SoftMasks(model, x, split=split, boundary="prune")
    assert "a" in masks.channels and "b" not in masks.channels
    masks.zero({"a": [0, 1]})
    with masks.attached(), torch.no_grad():
        z = split.edge(x)
    assert float(z[:, :2].abs().max()) == 0.0 and torch.equal(z[:, 2:], plain[:, 2:])


@pytest.mark.parametrize("shape", [(16, 16, 16), (16, 16, 1), (16, 1, 16)])
def test_a_parameter_without_a_batch_dimension_stays_whole(shape: tuple[int, ...]) -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.g = nn.Conv2d(3, 16, 3, padding=1), nn.Parameter(torch.rand(shape))
            self.b, self.c = nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
            self.f = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.b(F.relu(self.a(x) * self.g)))
            return self.f(F.relu(self.c(x)).mean((2, 3)))

    model = Gained().eval()
    split = pp.Split(model, X, at="c")
    result = pp.PatrolPruner(model, X, Random(), split=split, edge_macs=0.6).step()
    assert model.g.shape == shape and "nobody can tell" in result.left_whole["a"]


def test_looking_for_the_channels_leaves_no_hook_on_the_cloud() -> None:
    """A residual stream runs on behind the split, and the cloud's layers make its channels too."""
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.c, self.f = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            x = F.relu(x + self.b(x))
            return self.f(F.relu(x + self.c(x)).mean((2, 3)))

    model, x = Stream().eval(), X[..., :8, :8]
    split = pp.Split(model, x, at="relu_1")
    masks = pp.SoftMasks(model, x, split=split, boundary="prune")
    assert any(g.crossing == "coupled" for g in masks.table.groups.values())
    assert not any(m._forward_hooks for m in model.modules())
