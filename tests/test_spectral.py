"""Bounds from spectral norms: explicit matrices, sampled constants, finite differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.errors import CheckpointError, UnsupportedModelError
from patrol_prune.group_table import GroupTable, remove_channels
from patrol_prune.lipschitz import block_lipschitz
from patrol_prune.models import SmallResNet
from patrol_prune.spectral import PowerIteration, SpectralBounds
from patrol_prune.spectral_rules import max_pool_gain


def _seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def _resnet(seed: int = 0) -> nn.Module:
    """A small ResNet whose BatchNorms have seen data and have gains of either sign."""
    model = _seeded(lambda: SmallResNet(3, width=4), seed)
    g = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=g))
            layer.running_var.copy_(torch.rand(layer.weight.shape, generator=g) + 0.1)
    return model


def _converged(blocks: list[nn.Module], x: torch.Tensor, iterations: int = 300) -> torch.Tensor:
    bounds = SpectralBounds(blocks, x)
    bounds.converge(iterations)
    return bounds().detach()


def _matrix(linear: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The map's explicit matrix, one unit input after another."""
    units = torch.eye(math.prod(shape)).view(-1, *shape)
    zero = linear(torch.zeros(1, *shape)).flatten()
    return torch.stack([linear(u.unsqueeze(0)).flatten() - zero for u in units], 1).detach()


LINEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 6, 6)),
    "stride": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 7, 6)),
    "no-padding": (lambda: nn.Conv2d(3, 2, (3, 2), bias=False), (3, 5, 6)),
    "wide-padding": (lambda: nn.Conv2d(1, 2, 3, padding=2, stride=3), (1, 6, 5)),
    "circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 6, 6)),
    "dilated": (lambda: nn.Conv2d(2, 2, 3, padding=2, dilation=2), (2, 6, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, padding=1, stride=2, groups=3), (3, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1), (3, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 9)),
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "average": (lambda: nn.AvgPool2d(3, 2, 1), (2, 6, 6)),
    "global-average": (lambda: nn.AdaptiveAvgPool2d(1), (2, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", LINEAR)
def test_the_norm_is_the_largest_singular_value_of_the_explicit_matrix(case: str) -> None:
    make, shape = LINEAR[case]
    layer = _seeded(make)
    expected = torch.linalg.matrix_norm(_matrix(layer, shape), ord=2)
    found = _converged([layer], torch.zeros(1, *shape), 1000)
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=0.0)


def test_few_iterations_stay_below_and_persist_from_call_to_call() -> None:
    layer = _seeded(lambda: nn.Conv2d(3, 8, 3, padding=1))
    expected = float(torch.linalg.matrix_norm(_matrix(layer, (3, 8, 8)), ord=2))
    bounds = SpectralBounds([layer], torch.zeros(1, 3, 8, 8), iterations=1)
    values = [float(bounds().detach()) for _ in range(200)]
    assert all(a <= b + 1e-5 for a, b in itertools.pairwise(values))
    assert values[0] < values[-1] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_no_sampled_constant_of_a_block_is_above_its_bound(seed: int) -> None:
    split = pp.Split(_resnet(seed), torch.zeros(1, 3, 16, 16), at="layer3")
    bound = _converged(list(split.blocks), split.example_inputs)
    g = torch.Generator().manual_seed(seed)
    for scale in (1e-3, 0.1, 3.0):
        x = 2.0 * torch.randn(32, 3, 16, 16, generator=g)
        delta = scale * torch.randn(x.shape, generator=g)
        with torch.no_grad():
            sampled = block_lipschitz(split.blocks, x, delta)
        assert (sampled <= bound * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", [
    "resnet18", pytest.param("vgg11_bn", marks=pytest.mark.slow), "mobilenet_v2",
    pytest.param("densenet121", marks=pytest.mark.slow),
    pytest.param("googlenet", marks=pytest.mark.slow), "shufflenet_v2_x1_0", "squeezenet1_1"])
def test_common_backbones_are_read(name: str) -> None:
    arguments = {"init_weights": False} if name == "googlenet" else {}
    model = _seeded(lambda: torchvision.models.get_model(name, weights=None, **arguments))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    points = pp.split_points(model, x)
    split = pp.Split(model, x, at=points[len(points) // 3].name)
    bound = SpectralBounds(split.blocks, x)().detach()
    delta = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sampled = block_lipschitz(split.blocks, x, delta)
    assert len(bound) == len(split.blocks) and (sampled <= bound).all()


def test_scaling_a_convolution_scales_a_chains_bound() -> None:
    chain = _seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
                                          nn.MaxPool2d(2), nn.Conv2d(4, 5, 3)))
    x = torch.zeros(1, 3, 12, 12)
    before = _converged([chain], x)
    chain[0].weight.data.mul_(2.5)
    torch.testing.assert_close(_converged([chain], x), 2.5 * before, rtol=1e-4, atol=0.0)


class Residual(nn.Module):
    """`relu(shortcut(x) + 0.5 * branch(x))` with diagonal matrices."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.norm = nn.BatchNorm1d(2, eps=1e-12)  # torch 2.10 refuses 0
        self.first.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
        self.second.weight.data = torch.diag(torch.tensor([0.5, 2.0]))
        self.norm.weight.data = torch.tensor([-6.0, 1.0])
        self.norm.running_var.copy_(torch.tensor([9.0, 1.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.second(torch.relu(self.norm(self.first(x))))
        return torch.relu(self.shortcut(x) + 0.5 * branch)


def test_a_residual_block_by_hand() -> None:
    x = torch.zeros(1, 2)
    # branch: 3 * (6 / sqrt(9)) * 2 = 12, halved
    assert float(_converged([Residual(nn.Identity()).eval()], x)) == pytest.approx(1 + 6, rel=1e-4)
    shortcut = nn.Linear(2, 2)
    shortcut.weight.data = 4.0 * torch.eye(2)
    assert float(_converged([Residual(shortcut).eval()], x)) == pytest.approx(4 + 6, rel=1e-4)


class Joined(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x + x, x, x / -4.0], 1).flatten(1).view(x.size(0), -1).sigmoid()


def test_joins_and_repeated_inputs_by_hand() -> None:
    expected = 0.25 * math.sqrt(2**2 + 1 + 0.25**2)
    assert float(_converged([Joined().eval()], torch.zeros(1, 2, 3, 3))) == pytest.approx(expected)


@pytest.mark.parametrize("kernel,stride,dilation", [(2, 2, 1), (3, 2, 1), (3, 1, 1), (3, 2, 2)])
def test_max_pool_counts_shared_windows(kernel: int, stride: int, dilation: int) -> None:
    ones = torch.ones(1, 1, 16, 16)
    unfolded = F.unfold(ones, kernel, dilation=dilation, stride=stride)
    windows = F.fold(unfolded, 16, kernel, dilation=dilation, stride=stride)
    gain = max_pool_gain(kernel, stride, dilation, 2)
    assert gain == pytest.approx(math.sqrt(float(windows.max())))
    pool = nn.MaxPool2d(kernel, stride, dilation=dilation)
    assert float(_converged([pool], ones)) == pytest.approx(gain)


@pytest.mark.parametrize("layer", [
    nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Mish(), nn.Hardswish(), nn.SELU(),
    nn.Hardsigmoid(), nn.LeakyReLU(1.5), nn.ELU(2.0), nn.PReLU(init=3.0), nn.Softplus(),
], ids=lambda layer: f"{type(layer).__name__}")  # fmt: skip
def test_slopes_of_activations_are_tight(layer: nn.Module) -> None:
    grid = torch.linspace(-12, 12, 100_001, dtype=torch.double).requires_grad_()
    (slope,) = torch.autograd.grad(layer.double()(grid).sum(), grid)
    bound = float(_converged([layer.float()], torch.zeros(1, 3)))
    assert float(slope.abs().max()) <= bound * (1 + 1e-6)
    assert bound <= float(slope.abs().max()) * 1.001


def test_the_gradient_matches_finite_differences() -> None:
    block = _seeded(lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3, 2)
    )).double()
    block[1].weight.data = torch.tensor([0.5, -1.5, 1.0], dtype=torch.double)
    x = torch.zeros(1, 2, 6, 6, dtype=torch.double)
    bounds = SpectralBounds([block], x)
    bounds.converge(2000)
    bounds().sum().backward()
    for parameter in (block[0].weight, block[1].weight, block[3].weight):
        index = int(parameter.grad.abs().argmax())
        values = []
        for step in (1e-5, -1e-5):
            parameter.data.view(-1)[index] += step
            bounds.converge(500)
            values.append(float(bounds().detach()))
            parameter.data.view(-1)[index] -= step
        slope = (values[0] - values[1]) / 2e-5
        assert float(parameter.grad.view(-1)[index]) == pytest.approx(slope, rel=1e-3)
    assert block[0].bias.grad is None or not block[0].bias.grad.any()


class Softmaxed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, 1)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * x


@pytest.mark.parametrize(("block", "named"), [
    (Softmaxed(), r"softmax .*edge block 1"), (Gated(), r"mul .*edge block 1"),
    (nn.GroupNorm(1, 2), r"GroupNorm .*edge block 1"),
    (nn.BatchNorm2d(2, track_running_stats=False), "BatchNorm2d"),
])  # fmt: skip
def test_unknown_operators_are_named(block: nn.Module, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        SpectralBounds([nn.Conv2d(3, 2, 1), block.eval()], torch.zeros(1, 3, 4, 4))


def test_a_block_of_zeros_has_the_bound_zero_and_comes_back() -> None:
    layer = nn.Linear(3, 3)
    layer.weight.data.zero_()
    bounds = SpectralBounds([layer], torch.zeros(1, 3))
    k = bounds()
    k.sum().backward()
    assert float(k.detach()) == 0.0 and torch.isfinite(layer.weight.grad).all()
    layer.weight.data = 2.0 * torch.eye(3)
    assert float(bounds().detach()) == pytest.approx(2.0)


def test_state_seed_and_widths() -> None:
    split = pp.Split(_resnet(), torch.zeros(1, 3, 16, 16), at="layer2")
    first, second = (SpectralBounds(split.blocks, split.example_inputs, seed=3) for _ in range(2))
    assert torch.equal(first(), second())
    saved = {k: v.clone() for k, v in first.state().items()}
    expected = [first().detach() for _ in range(3)]
    other = SpectralBounds(split.blocks, split.example_inputs, seed=4)
    assert not torch.equal(other().detach(), expected[0])
    other.load_state(saved, "here")
    assert all(torch.equal(other(), k) for k in expected)
    with pytest.raises(CheckpointError, match="here"):
        other.load_state({"0": torch.zeros(1, 3, 16, 16)}, "here")
    split.refresh()
    assert first.fits(split.blocks)
    table = GroupTable.build(split.model, split.example_inputs, split=split)
    remove_channels(table, {"layer1.0.conv1": [0]})
    split.refresh()
    assert not first.fits(split.blocks)


def test_reading_leaves_modes_statistics_and_the_global_generator() -> None:
    model = _resnet().train()
    split = pp.Split(model, torch.zeros(1, 3, 16, 16), at="layer2")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    bounds = SpectralBounds(split.blocks, split.example_inputs)
    bounds()
    assert model.layer1.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_powers_vector_keeps_its_length() -> None:
    power = PowerIteration(lambda v: v @ torch.diag(torch.tensor([5.0, 1.0])), torch.ones(1, 2))
    for _ in range(20):
        power.iterate()
        assert float(torch.linalg.vector_norm(power.vector)) == pytest.approx(1.0, rel=1e-5)
    assert float(power.sigma()) == pytest.approx(5.0)


class Recalibrated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean((2, 3), keepdim=True)


class Widened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 64, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize("block, x, grows", [
    (Recalibrated(), torch.zeros(1, 2, 8, 8), 2.0), (Widened(), torch.zeros(1, 1, 4, 4), 8.0)])
def test_what_broadcasts_grows(block: nn.Module, x: Tensor, grows: float) -> None:
    """A constant image reaches the true constant, and the bound is not below it."""
    one = torch.ones_like(x)
    with torch.no_grad():
        reached = float((block(one) - block(x)).norm() / one.norm())
    assert reached == pytest.approx(grows)
    assert float(SpectralBounds([block], x)()) >= grows - 1e-4


class Repeating(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, [0, 0, 0, 0]]


class Picked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.kept]


def test_a_mask_of_booleans_takes_each_value_once() -> None:
    assert float(SpectralBounds([Picked()], torch.zeros(1, 2, 4, 4))()) == 1.0


class Floored(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.div(x, 2.0, rounding_mode="floor")


class Endless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


class Named(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.div(input=x, other=2.0)


@pytest.mark.parametrize("block", [Repeating(), Floored(), Endless(), Named()])
def test_what_has_no_such_constant_is_refused(block: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="knows no Lipschitz constant"):
        SpectralBounds([block], torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize("layer", [
    nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 2, 1), nn.Upsample(scale_factor=2, mode="bilinear")])
def test_fixed_maps_have_their_whole_norm(layer: nn.Module) -> None:
    x = torch.zeros(1, 1, 16, 16)
    with torch.no_grad():
        matrix = torch.stack([layer(e.view(x.shape)).flatten() for e in torch.eye(x.numel())], 1)
    norm = float(torch.linalg.matrix_norm(matrix.double(), 2))
    assert float(SpectralBounds([layer], x)()) == pytest.approx(norm, rel=2e-4)


class InPlace(nn.Module):
    """An identity whose value is written into, by an operator whose result nobody takes."""

    def __init__(self, write: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.dirac_(self.layer.weight)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.write(y, x)
        return y


@pytest.mark.parametrize(("write", "grows"), [
    (lambda y, x: y.add_(x), 2.0), (lambda y, x: y.mul_(4.0), 4.0), (lambda y, x: F.relu_(y), 1.0),
    (lambda y, x: F.relu(y.mul_(3.0), inplace=True), 3.0), (lambda y, x: y.mul(4.0), 1.0),
    (lambda y, x: y.mul_(torch.tensor(3.0)), 3.0),
])
def test_what_is_written_in_place_counts(
    write: Callable[[Tensor, Tensor], object], grows: float
) -> None:
    block, x = InPlace(write).eval(), torch.ones(1, 3, 4, 4)
    assert float(_converged([block], x, 50)[0]) == pytest.approx(grows)
    seen = (block(1.1 * x) - block(x)).norm() / (0.1 * x).norm()
    assert float(seen.detach()) == pytest.approx(grows, rel=1e-4)


def test_a_part_that_is_written_in_place_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="mul_"):
        SpectralBounds([InPlace(lambda y, x: y[:, :1].mul_(4.0))], torch.ones(1, 3, 4, 4))
