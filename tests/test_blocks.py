"""Residual blocks: found where they are, masked by one number, and gone without a trace."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_helpers import backbone, cifar_resnet, half_of_every_group, randomize
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import SwinTransformer, VisionTransformer

from patrol_prune.blocks import Removed, residual_blocks
from patrol_prune.cost import count_macs
from patrol_prune.errors import InputError, UnsupportedModelError
from patrol_prune.group_table import GroupTable, remove_channels
from patrol_prune.masks import SoftMasks
from patrol_prune.removal import remove_blocks
from patrol_prune.split import Split


def images(size: int, n: int = 2) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return randomize(model)


def swin() -> nn.Module:
    torch.manual_seed(0)
    return randomize(SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=5))


BACKBONES = [
    ("resnet18", 32, "layer3", 4),  # layer1.0, layer1.1, layer2.1, layer3.1
    pytest.param("mobilenet_v2", 32, "features.10", 6, marks=pytest.mark.slow),
    pytest.param("mobilenet_v3_small", 32, "features.8", 4, marks=pytest.mark.slow),
    pytest.param("efficientnet_b0", 32, "features.4", 4, marks=pytest.mark.slow),
    ("regnet_y_400mf", 32, "trunk_output.block2", 2),
    pytest.param("convnext_tiny", 32, "features.3", 6, marks=pytest.mark.slow),
    (vit, 32, "encoder.layers.encoder_layer_1", 4),
]


def made(what: str | Callable[[], nn.Module]) -> nn.Module:
    model = backbone(what) if isinstance(what, str) else what()
    for name, p in model.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.uniform_(p, 0.5, 1.5)
    return model


@pytest.mark.parametrize(("what", "size", "at", "count"), BACKBONES)
def test_backbones(what: str | Callable[[], nn.Module], size: int, at: str, count: int) -> None:
    """Found on the edge; ones change no bit; zero is the removal; the price falls as foretold."""
    model, x = made(what), images(size)
    split = Split(model, x[:1], at=at)
    blocks = residual_blocks(model, x[:1], split=split)
    here = {n: b for n, b in blocks.items() if b.location == "edge" and b.blocked is None}
    assert len(here) == count
    masks = SoftMasks(model, x[:1], split=split, blocks=True)
    maskable = [n for n, b in here.items() if b.scaled is not None]
    assert list(masks.blocks) == maskable and masks.unmaskable.keys() == here.keys() - {*maskable}
    gone = maskable[::2]
    dense = count_macs(split.edge, x).total
    cloud = {n: p.detach().clone() for m in split.cloud_layers.values()
             for n, p in m.named_parameters()}
    with torch.no_grad():
        before, z = model(x), split.edge(x)
        with masks.attached():
            assert torch.equal(model(x), before) and torch.equal(split.edge(x), z)
        masks.zero({}, gone)
        z_masked, masked = masks.split_forward(x)
        assert remove_blocks(split, gone) == tuple(gone)
        assert relative(split.edge(x), z_masked) <= 1e-6 < relative(z, z_masked)
        assert torch.allclose(model(x), masked, rtol=0, atol=1e-5)
        assert torch.equal(split.cloud(split.edge(x)), model(x))
    saved = sum(here[n].edge_macs for n in gone)
    assert count_macs(split.edge, x).total == dense - saved < dense
    after = {n: p for m in split.cloud_layers.values() for n, p in m.named_parameters()}
    assert after.keys() == cloud.keys() and all(torch.equal(p, cloud[n]) for n, p in after.items())
    assert [name for name, _ in split.removed_blocks] == gone
    GroupTable.build(model, x[:1], split=split)


def test_swin_has_two_blocks_per_module() -> None:
    """Its channel groups are another matter; removal needs none."""
    model, x = swin(), images(32)
    split = Split(model, x[:1], at="features.1")
    blocks = residual_blocks(model, x[:1], split=split)
    here = [n for n, b in blocks.items() if b.location == "edge"]
    assert here == [f"features.1.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")]
    assert "operator" in str(blocks[here[0]].unscaled) and blocks[here[1]].scaled is not None
    dense = count_macs(split.edge, x).total
    remove_blocks(split, here[:2])
    assert count_macs(split.edge, x).total == dense - sum(blocks[n].edge_macs for n in here[:2])
    with torch.no_grad():
        stem = model.features[0](x)
        assert torch.equal(model.features[1][0](stem), stem)


class Wrapped(nn.Module):
    """A residual around anything."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class PreActivated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.conv, self.skip = nn.Conv2d(width, width, 3, padding=1), nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(self.act(self.norm(x)))
        out += self.skip(x)
        return out


class Activated(nn.Module):
    """An activation behind the addition, on an input that may be negative."""

    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x)


class Gated(nn.Module):
    """A layer scale, a functional activation, and a branch of two paths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)
        self.gate = nn.Conv2d(width, width, 1)
        self.scale = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(functional.gelu(self.up(x))) * self.gate(x).sigmoid()
        return self.scale * y + x


class Several(nn.Module):
    """Additions in a forward that does other things as well; the last layer reads all."""

    def __init__(self, width: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, width, 3, padding=1), nn.Sequential(*blocks)
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.two = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.Tanh())
        self.end, self.head = nn.Conv2d(width, width, 1), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = functional.relu(x + self.one(x))
        x += self.two(x)
        return self.head(self.end(x).mean((2, 3)))


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "wrapped": lambda w: Wrapped(nn.Conv2d(w, w, 3, padding=1)),
    "nested": lambda w: Wrapped(nn.Sequential(Wrapped(nn.Conv2d(w, w, 1)), nn.Conv2d(w, w, 1))),
    "preactivated": PreActivated,
    "relu": lambda w: Activated(w, nn.ReLU(inplace=True)),
    "gelu": lambda w: Activated(w, nn.GELU()),
    "gated": Gated,
    "plain": lambda w: nn.Sequential(nn.Conv2d(w, w, 1), nn.ReLU()),
}


def several(kinds: list[str], width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return randomize(Several(width, [KINDS[k](width) for k in kinds]), seed)


@settings(max_examples=8)
@given(kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4),
       width=st.integers(2, 5), seed=st.integers(0, 9), data=st.data())
def test_zero_is_removal(kinds: list[str], width: int, seed: int, data: st.DataObject) -> None:
    """Any blocks, alone and together with half of every channel group."""
    model, x = several(kinds, width, seed), images(6, 3)
    split = Split(model, x[:1], at="end")
    blocks = residual_blocks(model, x[:1], split=split)
    free = [n for n, b in blocks.items() if b.blocked is None]
    masks = SoftMasks(model, x[:1], split=split, boundary="prune", blocks=True)
    gone = data.draw(st.lists(st.sampled_from([n for n in free if n in masks.blocks]), unique=True))
    with torch.no_grad():
        before = model(x)
        with masks.attached():
            assert torch.equal(model(x), before)
        masks.zero({}, gone)
        _, masked = masks.split_forward(x)
        channels = half_of_every_group(masks)
        masks.zero(channels)
        _, both = masks.split_forward(x)
        dense = count_macs(split.edge, x).total
        outer = [n for n in gone if not {*blocks[n].within} & {*gone}]
        twin = copy.deepcopy(split)
        assert sorted(remove_blocks(split, gone)) == sorted(outer)
        assert torch.allclose(model(x), masked, atol=1e-6 * float(masked.abs().max()))
        saved = sum(blocks[n].edge_macs for n in outer)
        assert count_macs(split.edge, x).total == dense - saved
        remove_channels(GroupTable.build(twin.model, x[:1]), channels)
        twin.refresh()
        remove_blocks(twin, gone)
        assert torch.allclose(twin.model(x), both, atol=2e-6 * float(both.abs().max()))


def test_what_takes_a_blocks_place() -> None:
    """A ReLU stays where its input may be negative, and goes where that cannot be."""
    model, x = several(["relu", "relu", "gelu"], 4, 0), images(6)
    blocks = residual_blocks(model, x)
    first, second, third = (blocks[f"blocks.{i}"].substitutes[f"blocks.{i}"] for i in range(3))
    assert isinstance(first, nn.Sequential) and not first[0].inplace
    assert isinstance(second, nn.Identity)
    assert isinstance(third[0], nn.GELU)
    parts = blocks["two"].substitutes
    assert isinstance(parts["two"], Removed) and parts["two"].zero
    resnet = residual_blocks(backbone("resnet18"), images(32))
    assert isinstance(resnet["layer1.0"].substitutes["layer1.0"], nn.Identity)
    assert "projection" in str(resnet["layer2.0"].blocked)


def test_half_a_mask_scales_the_branch() -> None:
    model, x = several(["wrapped"], 4, 0), images(6)
    masks = SoftMasks(model, x[:1], blocks=True)
    masks.blocks["blocks.0"].data.fill_(0.5)
    with torch.no_grad():
        stem = model.stem(x)
        with masks.attached():
            half = model.blocks(stem)
            again = pickle.loads(pickle.dumps(model))
        assert torch.equal(half, stem + 0.5 * model.blocks[0].inner(stem))
        assert torch.equal(again.blocks(stem), half)


def test_training_mode_and_gradients() -> None:
    """A mask's gradient is the branch's share; statistics of what is left are the same."""
    model, x = several(["preactivated", "relu"], 4, 1).train(), images(6, 4)
    split = Split(model, x[:1], at="end")
    masks = SoftMasks(model, x[:1], split=split, blocks=True)
    z, _ = masks.split_forward(x)
    gradients = torch.autograd.grad(z.square().sum(), masks.parameters(), allow_unused=True)
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    masks.zero({}, ["blocks.1", "two"])
    with torch.no_grad():
        _, masked = masks.split_forward(x)
        remove_blocks(split, ["blocks.1", "two"])
        assert torch.allclose(model(x), masked, atol=1e-5)
    assert model.training and all(m.training for m in model.modules())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.act, self.read = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)
        self.query, self.value = nn.Linear(4, 8), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(x)
        x = x + self.conv(x)
        y = self.read(x)
        x = x + y
        x = (x + self.act(x)) * y
        x = x.flatten(2).transpose(1, 2)
        q, k = self.query(x).chunk(2, -1)
        x = x + torch.softmax(q @ k.transpose(1, 2), -1) @ self.value(x)
        return self.head(x.mean(1))


def test_what_has_to_stay_says_why() -> None:
    blocks = residual_blocks(Shared().eval(), images(4))
    reasons = [b.blocked for b in blocks.values()]
    assert [r is not None and (word in r) for r, word in zip(
        reasons, ["more than once", "more than once", "elsewhere", "own forward"], strict=True
    )] == [True] * 4
    assert all(b.scaled is None for b in blocks.values())


def test_a_branch_that_writes_into_its_input_stays() -> None:
    model = several(["plain"], 4, 0)
    model.one = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    blocks = residual_blocks(model, images(4))
    assert "in place" in str(blocks["one"].blocked)


def test_refusals_leave_the_model_as_it_was() -> None:
    model, x = cifar_resnet(depth=2), images(16)
    split = Split(model, x[:1], at="layer2")
    before = split.edge(x)
    for names, message in [
        (["layer1.7"], "no residual block"), (["layer2.0"], "projection"),
        (["layer3.1"], "in the cloud"),
    ]:
        with pytest.raises(InputError, match=message):
            remove_blocks(split, names)
    assert remove_blocks(split, []) == () and split.removed_blocks == ()
    assert torch.equal(split.edge(x), before)
    masks = SoftMasks(model, x[:1], split=split, blocks=True)
    with pytest.raises(InputError, match=r"layer1\.0"):
        masks.zero({}, ["layer1.5"])
    remove_blocks(split, ["layer1.0"])
    with pytest.raises(InputError, match="pruned since"), masks.attached():
        pass


def test_the_edge_is_never_empty() -> None:
    model = nn.Sequential(Wrapped(nn.Conv2d(3, 3, 1)), Wrapped(nn.Conv2d(3, 3, 1)), nn.Flatten(),
                          nn.Linear(27, 2)).eval()
    x = images(3)
    split = Split(model, x[:1], at="1")
    with pytest.raises(InputError, match="left on the edge"):
        remove_blocks(split, ["0", "1"])
    assert isinstance(model[0], Wrapped) and len(split.edge_layers) == 2
    assert remove_blocks(split, ["0"]) == ("0",)
    assert torch.equal(model[:2](x), split.edge(x))


class Nosy(nn.Module):
    """Asks what its block is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 1), Wrapped(nn.Conv2d(4, 4, 1))
        self.end = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        return self.end(x * self.block.inner.weight.shape[0]).mean((2, 3))


def test_a_model_that_needs_its_block_gets_it_back() -> None:
    model, x = Nosy().eval(), images(4)
    split = Split(model, x[:1], at="block")
    before = model(x)
    with pytest.raises(UnsupportedModelError, match="does not run without block"):
        remove_blocks(split, ["block"])
    assert isinstance(model.block, Wrapped)
    assert torch.equal(split.cloud(split.edge(x)), before)


def test_two_modules_as_halves() -> None:
    edge = nn.Sequential(nn.Conv2d(3, 4, 1), Wrapped(nn.Conv2d(4, 4, 1)))
    split = Split.from_modules(edge, nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), images(4))
    blocks = residual_blocks(split.model, images(4), split=split)
    assert {n: b.location for n, b in blocks.items()} == {"edge.1": "edge"}
    remove_blocks(split, ["edge.1"])
    assert torch.equal(split.edge(images(4)), edge[0](images(4)))
