"""Models by name or from a function, and weights that fit or are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from patrol_prune.errors import CheckpointError, InputError, UnsupportedModelError
from patrol_prune.models import SmallResNet, build_model, check_model, load_weights, model_names
from patrol_prune.reid_model import build_reid_model


def test_same_seed_same_weights_and_the_global_generator_untouched() -> None:
    before = torch.get_rng_state()
    first = build_model("small_resnet", 3, image_size=32, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    again = build_model("small_resnet", 3, image_size=32, seed=5)
    other = build_model("small_resnet", 3, image_size=32, seed=6)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_generators_of_accelerators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    build_model("small_resnet", 3, image_size=32, seed=5)
    build_reid_model("small_resnet", 3, image_size=32, seed=5)
    assert seeded == []


def test_small_resnet_keeps_resolution_in_the_stem() -> None:
    model = SmallResNet(3, width=8)
    x = torch.zeros(2, 3, 32, 32)
    assert model.layer1(model.conv1(x)).shape == (2, 8, 32, 32)
    assert model(x).shape == (2, 3)


def test_torchvision_names() -> None:
    assert {"resnet18", "vit_b_16", "small_resnet"} <= set(model_names())
    assert build_model("squeezenet1_1", 4, image_size=64).classifier[1].out_channels == 4


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'resnt18'.*Did you mean: resnet18"):
        build_model("resnt18", 3, image_size=32)


@pytest.mark.parametrize("name", ["alexnet", "squeezenet1_0"])
def test_image_size_the_model_cannot_take(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} cannot take images of 8x8.*--image-size"):
        build_model(name, 3, image_size=8)


SOURCE = """
from torch import nn
def good(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, num_classes))
def fixed(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 7))
def not_a_model(): return 3
def asks(num_classes, width, *, depth, bias=True): return good(num_classes)
def breaks(): raise KeyError("width")
def two(): return Two()
class Two(nn.Module):
    def forward(self, x): return x, x
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_models_for_test.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models_for_test", raising=False)
    return "own_models_for_test"


def test_own_function(own: str) -> None:
    path = list(sys.path)
    assert build_model(f"{own}:good", 5, image_size=8)(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    assert build_model(f"{own}:fixed", 7, image_size=8) is not None
    assert sys.path == path


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("godo", InputError, "has no function 'godo'.*Did you mean: good"),
        ("fixed", InputError, r"logits of shape \(1, 5\).*came \(1, 7\)"),
        ("not_a_model", InputError, r"return a torch\.nn\.Module, came int"),
        ("asks", InputError, "asks for width, depth as well"),
        ("breaks", InputError, "raised KeyError: 'width'"),
        ("two", UnsupportedModelError, "one tensor of logits, came tuple"),
    ],
)
def test_own_function_gone_wrong(
    own: str, function: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_model(f"{own}:{function}", 5, image_size=8)


def test_own_module_that_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_models_for_test.py").write_text("width = missing\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be imported .NameError: name 'missing'"):
        build_model("broken_models_for_test:net", 5, image_size=8)


@pytest.mark.parametrize("name", [":net", "mod:", ":", "..mod:net", "a..b:net"])
def test_names_that_are_no_module_and_function(name: str) -> None:
    with pytest.raises(InputError, match="own as module:function"):
        build_model(name, 5, image_size=8)


def test_own_module_that_is_not_there() -> None:
    with pytest.raises(InputError, match="cannot be imported"):
        build_model("no_such_module_here:model", 5, image_size=8)


def test_checking_leaves_the_modes() -> None:
    model = SmallResNet(3, width=4)
    model.layer2.eval()
    before = [m.training for m in model.modules()]
    statistics = model.bn1.running_mean.clone()
    check_model(model, "it", 3, 16)
    with pytest.raises(InputError):
        check_model(model, "it", 4, 16)
    assert [m.training for m in model.modules()] == before
    assert torch.equal(model.bn1.running_mean, statistics)


def weights_file(path: Path, model: nn.Module) -> Path:
    save_file(model.state_dict(), str(path))
    return path


def test_weights_that_fit(tmp_path: Path) -> None:
    torch.manual_seed(1)
    path = weights_file(tmp_path / "w.safetensors", SmallResNet(3))
    model = build_model("small_resnet", 3, image_size=16)
    assert load_weights(model, path) == []
    torch.manual_seed(1)
    assert torch.equal(model.layer4[1].conv2.weight, SmallResNet(3).layer4[1].conv2.weight)


def test_weights_of_another_task_leave_the_head(tmp_path: Path) -> None:
    source = SmallResNet(10)
    path = weights_file(tmp_path / "w.safetensors", source)
    model = SmallResNet(3)
    head = model.fc.weight.clone()
    assert load_weights(model, path) == ["fc.weight", "fc.bias"]
    assert torch.equal(model.fc.weight, head)
    assert torch.equal(model.conv1.weight, source.conv1.weight)


def test_weights_of_another_model(tmp_path: Path) -> None:
    path = weights_file(tmp_path / "w.safetensors", nn.Linear(2, 3))
    with pytest.raises(InputError, match="belong to another model"):
        load_weights(SmallResNet(3), path)
    path = weights_file(tmp_path / "n.safetensors", SmallResNet(3, width=8))
    with pytest.raises(InputError, match="has shape"):
        load_weights(SmallResNet(3), path)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    """A pickle that would run code is refused before it is read, and the way out is told."""
    trap = tmp_path / "trap"
    (tmp_path / "w.pth").write_bytes(f"cos\nsystem\n(S'touch {trap}'\ntR.".encode())
    with pytest.raises(InputError, match=r"convert one that you trust"):
        load_weights(SmallResNet(3), tmp_path / "w.pth")
    (tmp_path / "w.pth").rename(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_weights(SmallResNet(3), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="no file of weights"):
        load_weights(SmallResNet(3), tmp_path / "none.safetensors")
    assert not trap.exists()
