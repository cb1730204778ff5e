"""Cutting: exactness at every place, names, blocks, sharing, and what is refused."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models import VisionTransformer, get_model

import patrol_prune.split as splits
from patrol_prune.cost import count_macs, count_params, edge_macs
from patrol_prune.errors import InputError, UnsupportedModelError
from patrol_prune.split import Split, SplitPoint, split_at_each, split_points

# model -> (image size, keyword arguments, about how many split points to try)
MODELS: dict[str, tuple[int, dict[str, object], int]] = {
    "resnet18": (32, {}, 11),
    "resnet50": (32, {}, 2),
    "alexnet": (64, {}, 5),
    "vgg11_bn": (32, {}, 5),
    "squeezenet1_1": (48, {}, 6),
    "mobilenet_v2": (32, {}, 6),
    "mobilenet_v3_small": (32, {}, 5),
    "efficientnet_b0": (32, {}, 5),
    "densenet121": (32, {}, 3),
    "googlenet": (48, {"init_weights": False}, 3),
    "convnext_tiny": (32, {}, 5),
    "swin_t": (32, {}, 3),
    "vit": (
        32,
        {
            "image_size": 32,
            "patch_size": 8,
            "num_layers": 3,
            "num_heads": 3,
            "hidden_dim": 48,
            "mlp_dim": 64,
        },
        20,
    ),
}
WITHOUT_DROPOUT = ["resnet18", "densenet121", "regnet_y_400mf"]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, class tokens, layer scales and BatchNorm statistics away from their defaults."""
    g = torch.Generator().manual_seed(seed)
    for p in (p for p in model.parameters() if p.numel() < 10_000):
        p.data += 0.02 * torch.randn(p.shape, generator=g)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean = 0.1 * torch.randn(m.num_features, generator=g)
            m.running_var = 0.5 + torch.rand(m.num_features, generator=g)
            m.weight.data = 0.5 + torch.rand(m.num_features, generator=g)
    return model.eval()


def build(name: str, size: int = 32, **kwargs: object) -> tuple[nn.Module, Tensor]:
    make = VisionTransformer if name == "vit" else partial(get_model, name, weights=None)
    model = make(num_classes=7, **kwargs)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return randomised(model), x


def spread(points: list[SplitPoint], count: int) -> list[SplitPoint]:
    return points[:: max(1, len(points) // count)]


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, Tensor]:
    return build("resnet18")


SLOW = ("vgg11_bn", "swin_t", "efficientnet_b0", "densenet121", "convnext_tiny")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODELS])
def test_halves_and_blocks_compose_bit_for_bit_and_cost_what_is_said(name: str) -> None:
    size, kwargs, count = MODELS[name]
    model, x = build(name, size, **kwargs)
    points = split_points(model, x)
    with torch.no_grad():
        expected, untouched = model(x.clone()), x.clone()
    assert expected.std() > 0
    chosen = spread(points, count)
    halves = split_at_each(model, x, [point.name for point in chosen])
    for i, (point, split) in enumerate(zip(chosen, halves, strict=True)):
        if i % 4 == 1:  # two independent counters
            assert point.edge_macs == edge_macs(split) > 0, point.name
        with torch.no_grad():
            z = split.edge(x)
            before = z.clone()
            assert torch.equal(split.cloud(z), expected), point.name
            assert torch.equal(z, before) and torch.equal(x, untouched), point.name
            h = x
            for block in split.blocks:
                previous, kept = h, h.clone()
                h = block(h)
                assert torch.equal(previous, kept)
        assert torch.equal(h, before), point.name
        assert tuple(z.shape[1:]) == point.feature_shape == split.feature_shape
        assert point.edge_params == count_params(split.edge)
        assert point.feature_bytes == z[0].numel() * 4


@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_splits_of_one_trace_are_those_of_their_own(name: str) -> None:
    size, kwargs, _ = MODELS[name]
    model, x = build(name, size, **kwargs)
    points = spread(split_points(model, x), 4)
    together = list(split_at_each(model, x, [point.aliases[-1] if point.aliases else point.name
                                             for point in points]))
    alone = [Split(model, x, point.name) for point in points]
    for shared, own in zip(together, alone, strict=True):
        assert shared.at == own.at and shared.positions == own.positions
        assert (shared.edge_layers, shared.cloud_layers) == (own.edge_layers, own.cloud_layers)
        parts = [shared.edge, shared.cloud, *shared.blocks]
        assert [part.code for part in parts] == [
            part.code for part in (own.edge, own.cloud, *own.blocks)]
    if name == "vit":  # a parameter that no layer holds, replaced in the model
        model.class_token = nn.Parameter(torch.randn_like(model.class_token))
    else:
        pruned = model.layer1[0].conv1
        pruned.weight = nn.Parameter(torch.randn_like(pruned.weight))
    with torch.no_grad():
        expected = model(x)
        for split in together:
            assert torch.equal(split.cloud(split.edge(x)), expected)
    with pytest.raises(InputError, match="There is no split point 'layer9'"):
        next(split_at_each(model, x, ["layer9"]))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name == "densenet121" else name
    for name in WITHOUT_DROPOUT])
def test_training_mode_composes_too(name: str) -> None:
    model, x = build(name)
    points = split_points(model, x)
    model.train()
    for point in spread(points, 2)[:2]:
        split = Split(model, x, point.name)
        state = copy.deepcopy(model.state_dict())
        expected = model(x)
        after = copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        assert torch.equal(split.cloud(split.edge(x)), expected)
        for key, value in model.state_dict().items():
            assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("stretches_agree", [True, False])
def test_disagreeing_counters_fall_back_to_stretches_and_then_to_each_edge(
    monkeypatch: pytest.MonkeyPatch, stretches_agree: bool
) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 4)
    expected = [p.edge_macs for p in split_points(model, x)]
    trace = splits.CutGraph

    def spoiled(model: nn.Module, x: Tensor) -> splits.CutGraph:
        graph = trace(model, x)
        for facts in graph.facts.values():
            facts.macs *= 2
        return graph

    monkeypatch.setattr(splits, "CutGraph", spoiled)
    if not stretches_agree:
        monkeypatch.setattr(splits, "_stretches", lambda *_: [1])
    assert [p.edge_macs for p in split_points(model, x)] == expected


class TestNames:
    def test_resnet(self, resnet: tuple[nn.Module, Tensor]) -> None:
        points = {p.name: p for p in split_points(*resnet)}
        order = list(points)
        assert order[:6] == ["conv1", "bn1", "relu", "maxpool", "layer1.0.add", "layer1.0"]
        assert order[-3:] == ["layer4", "avgpool", "flatten"]
        assert points["layer2"].aliases == ("layer2.1", "layer2.1.relu_1")
        assert {"x", "fc", "layer2.1", "layer1.0.relu"}.isdisjoint(order)
        macs = [p.edge_macs for p in points.values()]
        assert macs == sorted(macs)

    def test_sequential_features(self) -> None:
        points = split_points(*build("squeezenet1_1"))
        names = [p.name for p in points]
        assert names[:5] == [f"features.{i}" for i in range(3)] + [
            "features.3.squeeze",
            "features.3.squeeze_activation",
        ]
        assert "features" in names and "features.12" not in names
        assert "features.12.cat" in points[names.index("features")].aliases

    def test_alias_gives_the_same_split(self, resnet: tuple[nn.Module, Tensor]) -> None:
        assert Split(*resnet, at="layer2.1.relu_1").at == "layer2"

    def test_a_module_called_twice(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.act, self.fc = nn.ReLU(inplace=True), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.act(self.fc(self.act(self.fc(x) * 2)) + 1))

        model, x = Twice(), torch.randn(3, 4)
        names = [p.name for p in split_points(model, x)]
        assert names == ["fc", "mul", "act", "fc_1", "add", "act_1"]
        for name in names:
            split = Split(model, x, name)
            assert torch.equal(split.cloud(split.edge(x)), model(x))


class TestBlocks:
    def test_resnet(self, resnet: tuple[nn.Module, Tensor]) -> None:
        split = Split(*resnet, at="layer2")
        h, outputs = resnet[1], []
        for block in split.blocks:
            h = block(h)
            outputs.append(h)
        ends = ["maxpool", "layer1.0", "layer1.1", "layer2.0", "layer2"]
        assert len(outputs) == len(ends)
        for end, output in zip(ends, outputs, strict=True):
            assert torch.equal(output, Split(*resnet, at=end).edge(resnet[1])), end

    def test_an_edge_of_one_layer_is_one_block(self, resnet: tuple[nn.Module, Tensor]) -> None:
        split = Split(*resnet, at="conv1")
        assert split.blocks == (split.edge,)

    def test_arithmetic_before_the_first_layer_is_no_block(self) -> None:
        class Normalised(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return torch.tanh(self.b(torch.relu(self.a((x - 1) / 2)))) + 1

        split = Split(Normalised(), torch.zeros(1, 4), "tanh")
        assert len(split.blocks) == 2


class TestSharing:
    def test_layers_are_the_models_own(self, resnet: tuple[nn.Module, Tensor]) -> None:
        model, x = resnet
        split = Split(model, x, "layer2")
        assert isinstance(split.edge, fx.GraphModule)
        assert split.edge.get_submodule("layer1.0.conv1") is model.layer1[0].conv1
        ours = {id(p) for half in (split.edge, split.cloud) for p in half.parameters()}
        assert ours == {id(p) for p in model.parameters()}
        for name, layer in {**split.edge_layers, **split.cloud_layers}.items():
            assert model.get_submodule(name) is layer
        assert split.edge_layers["conv1"] is model.conv1
        assert "conv1" not in split.cloud_layers
        protected = split.protected_layers()
        assert any(m is model.fc for m in protected)
        assert not any(m is model.conv1 for m in protected)

    def test_layers_whose_weights_are_read_directly_are_protected(self) -> None:
        model, x = build("swin_t")
        split = Split(model, x, "features.3")
        assert any(m is model.features[5][0].attn.qkv for m in split.protected_layers())

    @pytest.mark.parametrize("name, at", [("convnext_tiny", "features.3"), ("vit", "encoder")])
    def test_replaced_parameters_are_followed(self, name: str, at: str) -> None:
        size, kwargs, _ = MODELS[name]
        model, x = build(name, size, **kwargs)
        split = Split(model, x, at)
        stale = model(x)
        for module in model.modules():
            for key, p in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(p.detach() * 1.5))
        expected = model(x)
        assert not torch.equal(expected, stale)
        assert torch.equal(split.cloud(split.edge(x)), expected)
        ours = {id(p) for half in (split.edge, split.cloud) for p in half.parameters()}
        assert ours == {id(p) for p in model.parameters()}

    def test_halves_pickle_and_copy_and_then_stand_alone(self) -> None:
        model, x = build("convnext_tiny")
        split = Split(model, x, "features.3")
        expected = split.edge(x)
        buffer = io.BytesIO(pickle.dumps(split.edge))
        assert len(buffer.getvalue()) < 1.2 * 4 * count_params(split.edge)  # not the whole model
        copies = [pickle.load(buffer), copy.deepcopy(split.edge)]
        for p in model.parameters():
            p.data.zero_()
        for copied in copies:
            assert torch.equal(copied(x), expected)

    def test_a_split_copies_as_a_whole(self, resnet: tuple[nn.Module, Tensor]) -> None:
        model, x = resnet
        split = Split(model, x, "layer2")
        for copied in (copy.deepcopy(split), pickle.loads(pickle.dumps(split))):
            assert copied.at == "layer2" and copied.model is not model
            assert copied.edge.conv1 is copied.model.conv1
            assert torch.equal(copied.cloud(copied.edge(x)), model(x))

    def test_inputs_of_a_model_cast_in_part_change_where_they_have_to(self) -> None:
        class Net(nn.Module):
            def __init__(self, casts: bool) -> None:
                super().__init__()
                self.first, self.last, self.casts = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), casts

            def forward(self, x: Tensor) -> Tensor:
                x = x.to(self.first.weight.dtype) if self.casts else x
                return self.last(self.first(x).float())

        for casts, dtype in ((False, torch.float64), (True, torch.float32)):
            split = Split(Net(casts), torch.ones(1, 1, 3, 3), "first")
            split.model.first.double()
            assert split.example_inputs.dtype == dtype
            split.refresh()
            assert split.edge(split.example_inputs).dtype == torch.float64

    def test_the_model_is_left_as_found(self) -> None:
        model, x = build("resnet18")
        model.train()
        model.layer1.eval()
        modes = [m.training for m in model.modules()]
        state = copy.deepcopy(model.state_dict())
        attributes = set(model.__dict__)
        rng = torch.get_rng_state()
        split_points(model, x)
        Split(model, x, "layer1")
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert set(model.__dict__) == attributes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert torch.equal(torch.get_rng_state(), rng)
        assert torch.backends.mha.get_fastpath_enabled()


class TestInPlace:
    class Net(nn.Module):
        def __init__(self, second: nn.Module) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 4), second, nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.first(x)))

    class View(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.view(-1).mul_(2)
            return x

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu_(F.relu(self.child(x), True).view(-1, 2, 2)[:, 0]).repeat(1, 2)

    class Effect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.child(x).transpose(0, 1).mul_(3.0)
            return x + 0

    @pytest.mark.parametrize(
        "second", [nn.ReLU(True), nn.Dropout(0.5, True), View(), Functional(), Effect()]
    )
    @pytest.mark.parametrize("training", [False, True])
    def test_the_feature_is_never_written(self, second: nn.Module, training: bool) -> None:
        model, x = self.Net(second).train(training), torch.randn(6, 4)
        split = Split(model, x, "first")
        z = split.edge(x)
        before = z.clone()
        torch.manual_seed(0)
        out = split.cloud(z)
        assert torch.equal(z, before)
        torch.manual_seed(0)
        assert torch.equal(out, model(x))

    def test_an_effect_without_users_is_kept(self) -> None:
        """`mul_` above has no user; dropping it would change the output."""
        model, x = self.Net(self.Effect()), torch.randn(6, 4)
        split = Split(model, x, "first")
        assert not torch.allclose(split.cloud(split.edge(x)), model.last(model.first(x)))


class TestInputIndependent:
    def test_tables_and_constants_do_not_cross(self) -> None:
        class Table(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
                self.table = nn.Parameter(torch.randn(3, 4))

            def forward(self, x: Tensor) -> Tensor:
                row = self.table[1] * torch.tensor([1.0, 2.0, 3.0, 4.0])
                return self.b(self.a(x) + row) * row

        model, x = Table(), torch.randn(2, 4)
        attributes = set(model.__dict__)
        assert [p.name for p in split_points(model, x)] == ["a", "add", "b"]
        split = Split(model, x, "a")
        assert set(model.__dict__) == attributes and not dict(model.named_buffers())
        assert torch.equal(split.cloud(split.edge(x)), model(x))

    class Written(nn.Module):
        def __init__(self, constant: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.table = nn.Parameter(torch.ones(2, 4))
            self.constant = constant

        def forward(self, x: Tensor) -> Tensor:
            table = torch.ones(2, 4) if self.constant else self.table.clone()
            x = self.a(x)
            table.view(-1).add_(x.sum())
            return self.b(x) * table

    def test_a_table_that_is_written_crosses(self) -> None:
        model, x = self.Written(constant=False), torch.randn(2, 4)
        assert [p.name for p in split_points(model, x[:1])] == []
        with pytest.raises(InputError, match="two tensors cross there.*clone"):
            Split(model, x, "b")

    def test_a_constant_that_is_written_is_refused(self) -> None:
        """The trace would make it once, and add to it at every call."""
        model = self.Written(constant=True)
        with pytest.raises(UnsupportedModelError, match="without memory"):
            split_points(model, torch.randn(2, 4))
        assert not hasattr(model, "_tensor_constant0")


class TestRefused:
    def test_unknown_name_offers_the_nearest(self, resnet: tuple[nn.Module, Tensor]) -> None:
        with pytest.raises(InputError, match=r"no split point 'layr2'.*layer2"):
            Split(*resnet, at="layr2")

    @pytest.mark.parametrize("at", ["layer2.0.conv1", "layer2.0.bn1"])
    def test_two_tensors(self, resnet: tuple[nn.Module, Tensor], at: str) -> None:
        with pytest.raises(InputError, match="two tensors cross") as error:
            Split(*resnet, at=at)
        assert "'layer1' and 'layer2.0.add'" in str(error.value)

    def test_output(self, resnet: tuple[nn.Module, Tensor]) -> None:
        with pytest.raises(InputError, match="model's output.*'flatten'"):
            Split(*resnet, at="fc")

    def test_a_number_beside_the_tensor(self) -> None:
        class Batch(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                n = x.size(0)
                return self.b(self.a(x)).view(n, 2, 2).flatten(1).relu()

        with pytest.raises(InputError, match=r"size \(no tensor\)"):
            Split(Batch(), torch.zeros(2, 4), "a")
        assert Split(Batch(), torch.zeros(2, 4), "view").feature_shape == (2, 2)

    def test_indices_are_no_feature(self) -> None:
        model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.ReLU())

        class Indices(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = model

            def forward(self, x: Tensor) -> Tensor:
                return self.body(x.long())

        assert [p.name for p in split_points(Indices(), torch.ones(1, 3))] == ["body.0", "body.1"]
        with pytest.raises(InputError, match="no floating-point tensor"):
            Split(Indices(), torch.ones(1, 3), "long")

    def test_untraceable(self) -> None:
        class Dynamic(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(4, 4)
                self.train()

            def forward(self, x: Tensor) -> Tensor:
                return self.a(x) if x.sum() > 0 else x

        model = Dynamic()
        with pytest.raises(UnsupportedModelError, match="cannot be traced.*Split.from_modules"):
            split_points(model, torch.ones(1, 4))
        assert model.training and model.a.training

    def test_a_trace_that_computes_something_else(self) -> None:
        class InPlaceAlias(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                y = x = self.a(x)
                x += 1  # the trace makes a new tensor of this, and y stays as it was
                return y

        with pytest.raises(UnsupportedModelError, match="something else"):
            split_points(InPlaceAlias(), torch.ones(1, 4))

    def test_several_inputs(self) -> None:
        class Two(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return x + y

        with pytest.raises(InputError):
            split_points(Two(), torch.ones(1, 4))
        with pytest.raises(InputError, match="one tensor"):
            split_points(Two(), (torch.ones(1, 4), torch.ones(1, 4)))

    def test_wrong_size_type_and_rank(self, resnet: tuple[nn.Module, Tensor]) -> None:
        model, _ = resnet
        with pytest.raises(InputError, match=r"\(1, 1, 32, 32\)"):
            split_points(model, torch.zeros(1, 1, 32, 32))
        with pytest.raises(InputError, match="batch dimension"):
            split_points(model, torch.zeros(3))
        with pytest.raises(InputError, match="nn.Module"):
            split_points(lambda x: x, torch.zeros(1, 3, 8, 8))  # type: ignore[arg-type]
        with pytest.raises(InputError, match="name of a split point"):
            Split(model, torch.zeros(1, 3, 32, 32), 2)  # type: ignore[arg-type]


def test_optional_inputs_keep_their_defaults() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor | None = None, twice: bool = True) -> Tensor:
            x = self.a(x) if mask is None else self.a(x) * mask
            return self.b(x) * 2 if twice else self.b(x)

    model, x = Optional(), torch.randn(2, 4)
    split = Split(model, (x,), "a")
    assert torch.equal(split.cloud(split.edge(x)), model(x))


def test_functional_dropout_is_said_to_stay_off(caplog: pytest.LogCaptureFixture) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.dropout(self.a(x), 0.5, self.training))

    with caplog.at_level(logging.WARNING, "patrol_prune"):
        split_points(Dropping(), torch.ones(1, 4))
    assert "functional dropout" in caplog.text


class TestFromModules:
    def test_composes_and_counts(self, resnet: tuple[nn.Module, Tensor]) -> None:
        model, x = resnet
        whole = Split(model, x, "layer2")
        edge = nn.Sequential(
            model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2
        )
        cloud = nn.Sequential(model.layer3, model.layer4, model.avgpool, nn.Flatten(), model.fc)
        split = Split.from_modules(edge, cloud, x)
        assert split.edge is edge and split.cloud is cloud
        assert torch.equal(split.model(x), model(x))
        assert split.feature_shape == whole.feature_shape
        assert len(split.blocks) == len(whole.blocks)
        h = x
        for block in split.blocks:
            h = block(h)
        assert torch.equal(h, edge(x))
        assert edge_macs(split) == edge_macs(whole)
        assert set(split.protected_layers()) == set(whole.protected_layers()) | {cloud[3]}
        for name, layer in {**split.edge_layers, **split.cloud_layers}.items():
            assert split.model.get_submodule(name) is layer
        assert torch.equal(copy.deepcopy(split).model(x), model(x))

    def test_untraceable_edge_is_one_block(self) -> None:
        class Dynamic(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.a(x) if x.sum() > 0 else x)

        edge = Dynamic()
        split = Split.from_modules(edge, nn.Linear(4, 2), torch.ones(2, 4))
        assert split.blocks == (edge,)
        assert edge_macs(split) == 32

    def test_a_cloud_that_writes_works_on_a_copy(self) -> None:
        x = torch.randn(2, 4)
        split = Split.from_modules(nn.Linear(4, 4), nn.Sequential(nn.ReLU(True)), x)
        z = split.edge(x)
        before = z.clone()
        assert torch.equal(split.cloud(z), before.relu()) and torch.equal(z, before)
        cloud = split.cloud
        split.refresh()
        assert split.cloud is cloud

    @pytest.mark.parametrize(
        "edge, cloud, match",
        [
            (nn.LSTM(4, 4), nn.Identity(), "one floating-point tensor"),
            (nn.Linear(5, 4), nn.Identity(), "can run on"),
            (nn.Linear(4, 4), nn.Linear(5, 4), "can run on"),
            (nn.Flatten(0), nn.Identity(), "one floating-point tensor"),
            (None, nn.Identity(), "two nn.Modules"),
        ],
    )
    def test_refused(self, edge: nn.Module, cloud: nn.Module, match: str) -> None:
        with pytest.raises(InputError, match=match):
            Split.from_modules(edge, cloud, torch.ones(2, 4))


def test_gradients_and_masks_reach_through_the_halves(resnet: tuple[nn.Module, Tensor]) -> None:
    """Hooks on the model's layers run inside the halves; the gradients are the model's."""
    model, x = resnet
    split = Split(model, x, "layer2")
    handle = model.layer1[0].conv2.register_forward_pre_hook(lambda m, a: (a[0] * 0.5,))
    try:
        expected = torch.autograd.grad(model(x).square().sum(), model.conv1.weight)[0]
        got = torch.autograd.grad(split.cloud(split.edge(x)).square().sum(), model.conv1.weight)[0]
    finally:
        handle.remove()
    assert torch.equal(got, expected) and got.abs().sum() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_halves_follow_the_model_to_a_device() -> None:
    model, x = build("swin_t")
    split = Split(model, x, "features.3")
    model.cuda()
    assert split.example_inputs.is_cuda
    with torch.no_grad():
        assert torch.equal(split.cloud(split.edge(x.cuda())), model(x.cuda()))
    split.refresh()
    assert Split(model, x, "features.1").edge(x.cuda()).is_cuda


def test_all_points_cost_three_runs_of_the_model() -> None:
    model = get_model("resnet50", weights=None)
    runs = []
    model.conv1.register_forward_hook(lambda *_: runs.append(1))
    points = split_points(model, torch.zeros(1, 3, 224, 224))
    assert len(runs) == 3  # symbolically, with values, and counted
    by_name = {p.name: p.edge_macs for p in points}
    assert by_name["layer4"] + 2048 * 1000 == count_macs(model, torch.zeros(1, 3, 224, 224)).total


def test_models_that_cannot_be_read_are_refused_by_name() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    with torch.device("meta"):
        meta = network()
    forms = {"torch.jit.script": torch.jit.script(network()), "the meta device": meta}
    for message, model in forms.items():
        with pytest.raises(UnsupportedModelError, match=message):
            Split(model, torch.randn(1, 3, 4, 4), at="1")
        with pytest.raises(UnsupportedModelError, match=message):
            split_points(model, torch.randn(1, 3, 4, 4))


class WritesInto(nn.Module):
    """A block that ends in an operator in place, whose result nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y.mul_(4.0)
        return y


def test_a_split_sends_what_its_module_gives_where_that_is_written_in_place() -> None:
    model = nn.Sequential(WritesInto(), WritesInto(), nn.Conv2d(3, 2, 1)).eval()
    x, given = torch.randn(2, 3, 4, 4), []
    model[1].register_forward_hook(lambda *told: given.append(told[2].clone()))
    expected = model(x)
    split = Split(model, x, at="1")
    feature = split.edge(x)
    torch.testing.assert_close(feature, given[0])
    torch.testing.assert_close(split.cloud(feature), expected)
