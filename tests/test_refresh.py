"""Reading a cut model again after it changed, and what its layers cost per channel pair."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from test_split import MODELS, build
from torch import Tensor, fx, nn

import patrol_prune.split as splits
from patrol_prune.cost import count_macs
from patrol_prune.errors import InputError
from patrol_prune.split import Split, split_points


class TestRefresh:
    def test_narrower_layers(self) -> None:
        """Sizes that the trace baked into a reshape follow, in the same module objects."""

        class Baked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.width = 6
                self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(torch.relu(self.a(x)).reshape(-1, self.width))

        model, x = Baked(), torch.randn(2, 5)
        split = Split(model, x, "reshape")
        edge, cloud = split.edge, split.cloud
        model.width = 4
        model.a.weight, model.a.bias = (nn.Parameter(p[:4]) for p in (model.a.weight, model.a.bias))
        model.b.weight = nn.Parameter(model.b.weight[:, :4])
        split.refresh()
        assert split.edge is edge and split.cloud is cloud
        assert split.feature_shape == (4,)
        assert torch.equal(cloud(edge(x)), model(x))

    def test_replaced_block_and_hooks(self) -> None:
        model, x = build("convnext_tiny")
        split = Split(model, x, "features.3")
        edge, old = split.edge, split.edge(x)
        model.features[1][1] = nn.Identity()
        for _ in range(2):
            split.refresh()
        assert split.edge is edge and len(edge._forward_pre_hooks) == 1
        assert not torch.equal(edge(x), old)
        assert torch.equal(split.cloud(edge(x)), model(x))


    def test_other_widths_alone_are_read_by_one_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x = build("resnet18")
        split = Split(model, x, "layer2")
        halves = [split.edge, split.cloud, *split.blocks]
        graphs = [half.graph for half in halves if isinstance(half, fx.GraphModule)]
        prune(model, x, model.layer2[0].conv2, [0, 1, 5])
        monkeypatch.setattr(splits, "CutGraph", None)
        model.train()
        split.refresh()
        assert split.feature_shape == (125, 4, 4)
        assert all(half.training for half in halves) and model.training
        assert [split.edge, split.cloud, *split.blocks] == halves
        assert all(h.graph is g for h, g in zip(halves, graphs, strict=True))
        model.eval()
        assert torch.equal(split.cloud(split.edge(x)), model(x))

    def test_a_forward_that_asks_for_widths_is_traced_again(self) -> None:
        class Asks(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

            def forward(self, x: Tensor) -> Tensor:
                x = self.a(x)
                return self.c(self.b(x) if self.b.in_features == self.a.out_features else -x)

        model, x = Asks().eval(), torch.randn(2, 4)
        split = Split(model, x, "a")
        model.b.in_features = 5
        split.refresh()
        assert torch.equal(split.cloud(split.edge(x)), model(x))
        assert "b" not in split.cloud_layers

    def test_what_writes_in_place_since_then_is_traced_again(self) -> None:
        model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4)
        split = Split(model, x, "0")
        model[1].inplace = True
        split.refresh()
        z = split.edge(x)
        before = z.clone()
        split.cloud(z)
        assert torch.equal(z, before)

    def test_another_stride_makes_other_positions(self) -> None:
        model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1)), torch.randn(1, 1, 7, 7)
        split = Split(model, x, "0")
        assert split.positions == {"0": 9 * 25}
        model[0].stride = (2, 2)
        split.refresh()
        assert split.positions == {"0": 9 * 9} and split.feature_shape == (2, 3, 3)

    def test_a_layer_that_is_read_through_its_weight_alone(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.p = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(F.linear(self.a(x), self.p.weight).relu())

        model, x = Net(), torch.randn(2, 4)
        split = Split(model, x, "relu")
        model.p = nn.Linear(4, 4)
        split.refresh()
        assert split.edge_layers["p"] is model.p
        assert torch.equal(split.cloud(split.edge(x)), model(x))

    @pytest.mark.parametrize("change", [
        lambda m: setattr(m[1], "scale_factor", 3.0), lambda m: m.double(),
        lambda m: m.__setitem__(1, nn.Upsample(scale_factor=2.0)),
    ])  # fmt: skip
    def test_settings_layers_and_numbers_of_other_kinds_are_traced_again(
        self, change: Callable[[nn.Module], object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layers = nn.Conv2d(1, 2, 1), nn.Upsample(scale_factor=2.0), nn.Conv2d(2, 2, 1)
        model, x = nn.Sequential(*layers, nn.ReLU()), torch.randn(1, 1, 5, 5)
        split = Split(model, x, "2")
        change(model)
        traced: list[int] = []
        graph = splits.CutGraph
        monkeypatch.setattr(splits, "CutGraph", lambda *a: traced.append(1) or graph(*a))
        split.refresh()
        assert traced and split.positions == Split(model, split.example_inputs, "2").positions

    def test_positions_that_are_channels_follow_them(self) -> None:
        """A linear layer over the tokens runs once for each channel."""

        class Mixer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.enter, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
                self.tokens = nn.Linear(5, 5)

            def forward(self, x: Tensor) -> Tensor:
                x = self.enter(x).relu().transpose(1, 2)
                return self.last(self.tokens(x).transpose(1, 2).relu())

        model, x = Mixer(), torch.randn(1, 5, 3)
        split = Split(model, x, "relu_1")
        assert split.positions == {"enter": 5, "tokens": 8}
        model.enter.weight = nn.Parameter(model.enter.weight[:4])
        model.enter.bias = nn.Parameter(model.enter.bias[:4])
        model.last.weight = nn.Parameter(model.last.weight[:, :4])
        split.refresh()
        assert split.positions == {"enter": 5, "tokens": 4}

    def test_a_refresh_that_fails_takes_nothing_away(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
                self.gain = nn.Parameter(torch.ones(4))

            def forward(self, x: Tensor) -> Tensor:
                return self.b((self.a(x) * self.gain).relu())

        model, x = Net(), torch.randn(2, 4)
        split = Split(model, x, "relu")
        kept, model.b = model.b, nn.Linear(7, 4)
        with pytest.raises(InputError):
            split.refresh()
        model.b = kept
        split.refresh()
        model.gain = nn.Parameter(torch.full((4,), 3.0))
        assert torch.equal(split.cloud(split.edge(x)), model(x))

    def test_a_layer_with_a_tensor_among_its_settings_is_traced_again(self) -> None:
        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.shift = torch.tensor([1.0, 2.0])

            def forward(self, x: Tensor) -> Tensor:
                return x + self.shift.sum()

        model, x = nn.Sequential(nn.Linear(2, 2), Layer(), nn.Linear(2, 2)), torch.randn(1, 2)
        split = Split(model, x, "1")
        model[1].shift = torch.tensor([1.0, 5.0])
        split.refresh()
        assert torch.equal(split.cloud(split.edge(x)), model(x))

    def test_a_model_that_no_longer_runs(self) -> None:
        model, x = build("resnet18")
        split = Split(model, x, "layer2")
        model.layer3[0].conv1.weight = nn.Parameter(torch.ones(8, 100, 3, 3))
        with pytest.raises(InputError, match=r"ResNet can run on.*\(1, 3, 32, 32\)"):
            split.refresh()


def prune(model: nn.Module, x: Tensor, layer: nn.Module, channels: list[int]) -> None:
    graph = tp.DependencyGraph().build_dependency(model, x)
    graph.get_pruning_group(layer, tp.prune_conv_out_channels, channels).prune()


class Scored(nn.Module):
    """A weighted mean of positions, by products that no counter of PyTorch's sees."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.ones(width))

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.softmax(torch.mv(z[0, 0], self.query), 0).view(1, 1, -1, 1)


class TestPositions:
    """Multiply-adds per channel pair, without a counter's run."""

    @pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit", "swin_t"])
    def test_every_layer_costs_what_fvcore_counts(self, name: str) -> None:
        size, kwargs, _ = MODELS[name]
        model, x = build(name, size, **kwargs)
        last = split_points(model, x)[-1].name
        split = Split(model, x, last)
        if name in ("vit", "swin_t"):
            assert split.positions is None  # attention has products of its own
            return
        assert split.positions is not None
        counted = count_macs(split.edge, x)
        macs = {n: at * split.edge_layers[n].weight.shape[:2].numel()
                for n, at in split.positions.items()}
        assert sum(macs.values()) == counted.total > 0
        assert all(counted.by_module[n] == macs[n] for n in macs)

    @pytest.mark.parametrize("product", [
        lambda w, z: F.linear(z, w), lambda w, z: z @ w, lambda w, z: torch.mv(w, z[0])[None],
        lambda w, z: torch.einsum("ni,ij->nj", z, w), lambda w, z: z @ z.T @ z,
        lambda w, z: torch.inner(z, w), lambda w, z: torch.addmm(z, z, w),
        lambda w, z: F.scaled_dot_product_attention(z, z, z),
        lambda w, z: torch.einsum("ni,nj->nij", z, z).sum(1),
    ])  # fmt: skip
    def test_products_in_a_forward_are_counted_by_a_run(
        self, product: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)
                self.weight = nn.Parameter(torch.randn(5, 5))

            def forward(self, x: Tensor) -> Tensor:
                return self.last(torch.relu(product(self.weight, self.first(x))))

        x = torch.randn(1, 3)
        assert Split(Net(), x, "first").positions == {"first": 1}
        assert Split(Net(), x, "relu").positions is None

    @pytest.mark.parametrize(("layer", "call", "plain"), [
        (nn.PReLU(4), lambda layer, z: layer(z), True),
        (nn.MultiheadAttention(6, 2), lambda layer, z: z + layer(z[0], z[0], z[0])[0], False),
        (Scored(6), lambda layer, z: layer(z), False),
        (nn.LayerNorm([4, 6, 6]), lambda layer, z: layer(z), True),
        (nn.ConvTranspose2d(4, 4, 3), lambda layer, z: layer(z), False),
        (nn.Bilinear(6, 6, 6), lambda layer, z: layer(z, z), False),
        (nn.Embedding(4, 6), lambda layer, z: z + layer(torch.tensor([0])), False),
    ])  # fmt: skip
    def test_layers_of_other_kinds(
        self, layer: nn.Module, call: Callable[..., Tensor], plain: bool
    ) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.layer, self.last = nn.Conv2d(3, 4, 1), layer, nn.Conv2d(4, 2, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.last(call(self.layer, self.first(x)))

        model, x = Net(), torch.randn(1, 3, 6, 6)
        split = Split(model, x, split_points(model, x)[-1].name)
        assert split.positions == ({"first": 36} if plain else None)
