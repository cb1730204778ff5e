"""Whatever `load` returns gives the outputs that `save` saw, bit for bit, and no pickle runs."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from patrol_prune import _tp
from patrol_prune.blocks import residual_blocks
from patrol_prune.checkpoint import load, read_info, save
from patrol_prune.cost import count_macs, edge_macs
from patrol_prune.errors import CheckpointError, UnsupportedModelError
from patrol_prune.group_table import GroupTable, remove_channels
from patrol_prune.models import SmallResNet
from patrol_prune.pixels import Normalization
from patrol_prune.removal import remove_blocks
from patrol_prune.split import Split
from patrol_prune.storage import atomic_directory

FILES = ("weights.safetensors", "architecture.json", "split.json", "manifest.json")


def small() -> nn.Module:
    return SmallResNet(5, width=8)


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def mobilenet() -> nn.Module:
    return models.mobilenet_v2(num_classes=4)


def densenet() -> nn.Module:
    return models.DenseNet(8, (2, 2), 16, num_classes=4)


CASES: list[tuple[Callable[[], nn.Module], str]] = [
    (small, "layer2"), (mobilenet, "features.5"), (densenet, "features.transition1"),
]


def prune(model: nn.Module, x: Tensor, fraction: float = 0.4) -> list[list[object]]:
    """Remove channels of every group at random, in two rounds on rebuilt graphs."""
    history: list[list[object]] = []
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        table = GroupTable.build(model, x)
        for group in table.groups.values():
            gone = torch.randperm(group.channels, generator=generator)
            kept_whole = group.members[0].module is list(model.modules())[-1]
            count = 0 if kept_whole else int(fraction / 2 * group.channels)
            if count:
                remove_channels(table, {group.name: gone[:count].tolist()})
        history += table.graph.pruning_history()
    return history


def trained_split(factory: Callable[[], nn.Module], at: str, *, pruned: bool) -> Split:
    torch.manual_seed(0)
    model, x = factory(), torch.randn(4, 3, 32, 32)
    split = Split(model, x, at)
    if pruned:
        split.pruning_history = prune(model, x)  # type: ignore[attr-defined]
        split.refresh()
    model.train()
    for _ in range(2):  # BatchNorm statistics that are not the initial ones
        model(torch.randn(4, 3, 32, 32))
    model.eval()
    return split


def outputs(split: Split) -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        z = split.edge(x)
        return z, split.cloud(z)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(("factory", "at"), CASES)
def test_round_trip_is_bit_equal(
    tmp_path: Path, factory: Callable[[], nn.Module], at: str, pruned: bool
) -> None:
    split = trained_split(factory, at, pruned=pruned)
    save(split, tmp_path / "edge.patrol", extra={"accuracy": 0.5})
    loaded = load(tmp_path / "edge.patrol", factory)
    if pruned:
        dense = sum(p.numel() for p in factory().parameters())
        assert sum(p.numel() for p in loaded.model.parameters()) < 0.9 * dense
    for ours, theirs in zip(outputs(split), outputs(loaded), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.at == split.at and loaded.feature_shape == split.feature_shape
    assert not loaded.model.training
    assert sorted(p.name for p in (tmp_path / "edge.patrol").iterdir()) == sorted(FILES)


def test_what_was_loaded_can_be_saved_pruned_and_loaded_again(tmp_path: Path) -> None:
    save(trained_split(small, "layer2", pruned=True), tmp_path / "a")
    first = load(tmp_path / "a", small)
    more = prune(first.model, first.example_inputs, 0.2)
    first.pruning_history += more  # type: ignore[attr-defined]
    first.refresh()
    save(first, tmp_path / "b")
    second = load(tmp_path / "b", small)
    for ours, theirs in zip(outputs(first), outputs(second), strict=True):
        assert torch.equal(ours, theirs)


def test_dtype_mode_and_memory_layout_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = small().double(), torch.randn(2, 3, 32, 32).double()
    split = Split(model, x, "layer1")
    split.pruning_history = prune(model, x)  # type: ignore[attr-defined]
    split.refresh()
    split.model.to(memory_format=torch.channels_last)
    split.model.train()
    save(split, tmp_path / "edge.patrol")
    loaded = load(tmp_path / "edge.patrol", small)
    assert loaded.model.training
    for name, tensor in split.model.state_dict().items():
        other = loaded.model.state_dict()[name]
        assert other.dtype == tensor.dtype and other.stride() == tensor.stride(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_after_it_was_pruned_comes_back_in_its_type(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    split = trained_split(plain, "3", pruned=True)
    before, macs = split.example_inputs, edge_macs(split)
    split.model.to(dtype)
    x = split.example_inputs
    save(split, tmp_path / "edge.patrol")
    loaded = load(tmp_path / "edge.patrol", plain)
    split.refresh()
    for other in (split, loaded, copy.deepcopy(split)):
        assert x.dtype == other.example_inputs.dtype == dtype
        assert torch.equal(other.cloud(other.edge(x)), split.model(x))
        assert edge_macs(other) == macs
    split.model.float()
    assert torch.equal(split.example_inputs, before)


def test_a_split_follows_numbers_that_are_no_parameters() -> None:
    split = trained_split(plain, "3", pruned=False)
    for module in list(split.model.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, value.detach())
    split.refresh()
    split.model.double()
    assert split.example_inputs.dtype == torch.double
    split.refresh()


def test_each_module_s_mode_and_what_is_frozen_come_back(tmp_path: Path) -> None:
    split = trained_split(small, "layer2", pruned=False)
    split.model.train()
    norms = {n for n, m in split.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name in norms:
        split.model.get_submodule(name).eval()
    split.model.get_submodule("layer1").requires_grad_(False)
    save(split, tmp_path / "e")
    loaded = load(tmp_path / "e", small).model
    assert {n for n, m in loaded.named_modules() if not m.training} == norms
    frozen = {n for n, p in loaded.named_parameters() if not p.requires_grad}
    assert frozen == {f"layer1.{n}" for n, _ in loaded.get_submodule("layer1").named_parameters()}


def test_halves_in_evaluation_stay_there(tmp_path: Path) -> None:
    def halves() -> tuple[nn.Module, nn.Module]:
        edge = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        return edge.eval(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()

    x = torch.randn(4, 3, 8, 8)
    split = Split.from_modules(*halves(), x)
    before = split.model(x)
    save(split, tmp_path / "e")
    assert torch.equal(load(tmp_path / "e", halves).model(x), before)


def test_information_without_a_model(tmp_path: Path) -> None:
    split = trained_split(small, "layer2", pruned=False)
    save(split, tmp_path / "e", normalization=Normalization.imagenet(), extra={"classes": ["ä"]})
    info = read_info(tmp_path / "e")
    assert info.at == "layer2"
    assert (info.example_shape, info.example_dtype) == ((4, 3, 32, 32), "float32")
    assert info.normalization == Normalization.imagenet()
    assert info.extra == {"classes": ["ä"]}


def test_two_modules(tmp_path: Path) -> None:
    def pair() -> tuple[nn.Module, nn.Module]:
        edge = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        return edge, nn.Sequential(nn.Flatten(), nn.LazyLinear(2))

    split = Split.from_modules(*_materialised(pair()), torch.zeros(1, 3, 32, 32))
    save(split, tmp_path / "e")
    loaded = load(tmp_path / "e", lambda: _materialised(pair()))
    assert torch.equal(outputs(loaded)[1], outputs(split)[1])
    with pytest.raises(CheckpointError, match="two modules"):
        load(tmp_path / "e", small)


def _materialised(pair: tuple[nn.Module, nn.Module]) -> tuple[nn.Module, nn.Module]:
    pair[1](pair[0](torch.zeros(1, 3, 32, 32)))
    return pair


OTHER_PROCESS = """
import sys, pickle, torch
from patrol_prune.blocks import residual_blocks
from patrol_prune.checkpoint import load
from patrol_prune.models import SmallResNet
def refuse(*a, **k): raise AssertionError("unpickled")
pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
split = load(sys.argv[1], lambda: SmallResNet(5, width=8))
x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(9))
with torch.no_grad():
    print(split.cloud(split.edge(x)).double().numpy().tobytes().hex())
"""


@pytest.mark.slow
def test_another_process_needs_the_factory_alone(tmp_path: Path, root: Path) -> None:
    split = trained_split(small, "layer3", pruned=True)
    save(split, tmp_path / "e")
    printed = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "e")],
        cwd=root, capture_output=True, text=True, check=True,
    ).stdout.strip()
    assert printed == outputs(split)[1].double().numpy().tobytes().hex()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_harmed_file_is_refused_by_name(tmp_path: Path, name: str, harm: str) -> None:
    save(trained_split(small, "layer1", pruned=False), tmp_path / "e")
    path = tmp_path / "e" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes(content) if harm == "flip" else bytes(content[:-2]))
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "e", small)
    assert name == "manifest.json" or (name in str(error.value) and error.value.path == str(path))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: SmallResNet(5, width=4), "very model that was saved"),
        (lambda: models.alexnet(num_classes=5), "very model that was saved"),
    ],
)
def test_the_wrong_factory(
    tmp_path: Path, factory: Callable[[], nn.Module], message: str
) -> None:
    save(trained_split(small, "layer1", pruned=True), tmp_path / "e")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "e", factory)


@pytest.mark.parametrize(("classes", "width"), [(5, 16), (6, 8)])
def test_a_wider_model_of_the_kind_loads_to_the_same_answers(
    classes: int, width: int, tmp_path: Path
) -> None:
    split = trained_split(small, "layer1", pruned=True)
    save(split, tmp_path / "e")
    loaded = load(tmp_path / "e", lambda: SmallResNet(classes, width=width))
    assert torch.equal(outputs(loaded)[1], outputs(split)[1])


@pytest.mark.parametrize(("factory", "at"), CASES)
def test_without_a_history_the_layers_take_the_recorded_sizes(
    tmp_path: Path, factory: Callable[[], nn.Module], at: str
) -> None:
    split = trained_split(factory, at, pruned=True)
    del split.pruning_history  # type: ignore[attr-defined]
    save(split, tmp_path / "e")
    loaded = load(tmp_path / "e", factory)
    assert torch.equal(outputs(loaded)[1], outputs(split)[1])
    for (name, ours), theirs in zip(
        split.model.named_modules(), loaded.model.modules(), strict=True
    ):
        assert ours.extra_repr() == theirs.extra_repr(), name
    assert all(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("global_pruning", [False, True])
def test_a_stock_pruner_s_history(tmp_path: Path, global_pruning: bool) -> None:
    torch.manual_seed(0)
    model, x = mobilenet(), torch.randn(1, 3, 32, 32)
    split = Split(model, x, "features.5")
    pruner = _tp.BasePruner(
        model, x, _tp.GroupMagnitudeImportance(), pruning_ratio=0.4, iterative_steps=2,
        global_pruning=global_pruning, ignored_layers=split.protected_layers(),
    )
    pruner.step()
    pruner.step()
    split.refresh()
    model.eval()
    save(split, tmp_path / "e", history=pruner.DG.pruning_history())
    loaded = load(tmp_path / "e", mobilenet)
    assert torch.equal(outputs(loaded)[1], outputs(split)[1])
    dense = Split(mobilenet(), x, "features.5").edge
    assert _size(split.edge) == _size(loaded.edge) < 0.8 * _size(dense)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_another_version_is_refused(tmp_path: Path) -> None:
    save(trained_split(small, "layer1", pruned=False), tmp_path / "e")
    rewritten(tmp_path / "e", "split.json", lambda about: about.update(format="of next year"))
    with pytest.raises(CheckpointError, match="of next year"):
        load(tmp_path / "e", small)


def rewritten(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """A file of JSON as somebody writes it who knows of the manifest; `change` may hand another."""
    contents = {n: (folder / n).read_bytes() for n in FILES if n != "manifest.json"}
    told = json.loads(contents[name])
    other = change(told)
    contents[name] = other if isinstance(other, bytes) else json.dumps(told).encode()
    with atomic_directory(folder) as directory:
        for file, content in contents.items():
            (directory / file).write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned by nobody knows whom, so that the widths are taken from the file."""
    model, x = plain(), torch.randn(2, 3, 12, 12)
    prune(model, x)
    place = tmp_path_factory.mktemp("saved") / "e"
    save(Split(model, x, "2"), place, normalization=Normalization())
    return place


@pytest.mark.parametrize(("name", "change"), [
    ("architecture.json", lambda a: a["layers"]["3"].update(stride=[2, 2])),
    ("architecture.json", lambda a: a["layers"]["3"].update(padding_mode="circular")),
    ("architecture.json", lambda a: a["layers"]["3"].update(in_channels="four")),
    ("architecture.json", lambda a: a["layers"].update({"2": {"inplace": 1}})),
    ("architecture.json", lambda a: a["layers"]["3"].update(groups=3)),
    ("architecture.json", lambda a: a["layers"]["3"].update(groups=[1, 1])),
    ("architecture.json", lambda a: a.update(layers=None)),
    ("architecture.json", lambda a: a.pop("layers")),
    ("architecture.json", lambda a: a.update(pruning_history=[["0", True]])),
    ("architecture.json", lambda a: a.update(removed_blocks=[["0"]])),
    ("architecture.json", lambda a: a.update(opened_attention={"0": 1})),
    ("architecture.json", lambda a: a.update(answers=["yes"])),
    ("architecture.json", lambda a: a.update(strides={"nothing.weight": [1]})),
    ("architecture.json", lambda a: a.update(strides={"0.weight": [1]})),
    ("architecture.json", lambda a: a.update(strides={"0.weight": [-1, 1, 1, 1]})),
    ("architecture.json", lambda a: a.update(strides={"0.weight": [1, 1, 1, 1]})),
    ("architecture.json", lambda a: a.update(strides={"0.weight": [27, 9, 3, 0]})),
    ("architecture.json", lambda a: a.update(strides={"0.weight": [26, 9, 3, 1]})),
    ("architecture.json", lambda a: b"[]"),
    ("architecture.json", lambda a: b"\xff{"),
    ("split.json", lambda a: b"[" * 100_000),
    ("split.json", lambda a: b"{}"),
    ("split.json", lambda a: a["example"].update(dtype="nosuch")),
    ("split.json", lambda a: a["example"].update(dtype="load")),
    ("split.json", lambda a: a["example"].update(dtype="bits8")),
    ("split.json", lambda a: a["example"].update(shape=[-1])),
    ("split.json", lambda a: a["example"].update(shape=[10**40])),
    ("split.json", lambda a: a.update(example=None)),
    ("split.json", lambda a: a.update(at=3)),
    ("split.json", lambda a: a.pop("training")),
    ("split.json", lambda a: a.update(frozen="all")),
    ("split.json", lambda a: a.update(normalization={"mean": [0.0], "std": "one"})),
    ("split.json", lambda a: a.update(extra=[])),
])
def test_files_that_save_never_wrote_are_refused_by_name(
    saved: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "e"))
    rewritten(folder, name, change)
    with pytest.raises(CheckpointError, match=name) as told:
        load(folder, plain)
    assert told.value.path == str(folder / name)


def test_information_of_an_odd_normalization_is_refused_by_name(
    saved: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "e"))
    rewritten(folder, "split.json", lambda a: a["normalization"].update(std=[0.0] * 3))
    with pytest.raises(CheckpointError, match=r"split\.json.*positive std"):
        read_info(folder)


def test_files_of_an_earlier_version_lack_what_came_later(saved: Path, tmp_path: Path) -> None:
    """And tell every list that goes by the name of a width, of whatever it is."""
    folder = Path(shutil.copytree(saved, tmp_path / "e"))
    rewritten(folder, "architecture.json", lambda a: [
        a.pop(key) for key in ("removed_blocks", "opened_attention", "answers")])
    rewritten(folder, "split.json", lambda a: [a.pop(key) for key in ("other_mode", "frozen")])
    rewritten(folder, "architecture.json", lambda a: a["layers"].update({"2": {"groups": ["a"]}}))

    def grouped() -> nn.Module:
        model = plain()
        model[2].groups = ("a",)
        return model

    assert load(folder, grouped).model[2].groups == ("a",)
    assert torch.equal(outputs(load(folder, grouped))[1], outputs(load(saved, plain))[1])


def test_state_that_is_not_tensors_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edge, self.cloud = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.cloud(self.edge(x))

        def get_extra_state(self) -> dict[str, int]:
            return {"n": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    split = Split(Odd(), torch.zeros(1, 4), "edge")
    with pytest.raises(UnsupportedModelError, match="_extra_state"):
        save(split, tmp_path / "e")
    assert not (tmp_path / "e").exists()


class Versioned(nn.Linear):
    """A layer that refuses a state without its version, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):  # type: ignore[no-untyped-def]
        if local_metadata.get("version") != self._version:
            raise ValueError(f"version should be 2 instead of {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_versions_of_layers_are_kept(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(Versioned(4, 6), nn.ReLU(), nn.Linear(6, 2))

    model, x = make(), torch.randn(3, 4)
    save(Split(model, x, at="0"), tmp_path / "edge")
    assert torch.equal(load(tmp_path / "edge", make).model(x), model(x))


def with_removed_blocks() -> Split:
    """Channels, two blocks, channels again: the order in which an iterative pruner works."""
    torch.manual_seed(0)
    model, x = mobilenet().eval(), torch.randn(2, 3, 32, 32)
    split = Split(model, x, "features.7")
    history = prune(model, x, 0.2)
    split.refresh()
    split.pruning_history = history
    remove_blocks(split, ["features.3", "features.6"])
    split.pruning_history = [*history, *prune(model, x, 0.2)]
    split.refresh()
    return split


def test_removed_blocks_and_channels_round_trip(tmp_path: Path) -> None:
    split = with_removed_blocks()
    name, at = split.removed_blocks[0]
    assert name == "features.3" and 0 < at < len(split.pruning_history)
    save(split, tmp_path / "a")
    loaded = load(tmp_path / "a", mobilenet)
    assert list(loaded.removed_blocks) == list(split.removed_blocks)
    assert count_macs(loaded.edge, loaded.example_inputs) == count_macs(
        split.edge, split.example_inputs)
    for ours, theirs in zip(outputs(split), outputs(loaded), strict=True):
        assert torch.equal(ours, theirs)
    remove_blocks(loaded, ["features.5"])
    save(loaded, tmp_path / "b")
    again = load(tmp_path / "b", mobilenet)
    for ours, theirs in zip(outputs(loaded), outputs(again), strict=True):
        assert torch.equal(ours, theirs)


def test_removed_blocks_without_a_history(tmp_path: Path) -> None:
    """Whoever pruned the channels, the blocks are known by name and the widths by the file."""
    split = trained_split(small, "layer2", pruned=False)
    block = next(n for n, b in residual_blocks(
        split.model, split.example_inputs, split=split).items() if b.blocked is None)
    remove_blocks(split, [block])
    prune(split.model, split.example_inputs)
    split.refresh()
    save(split, tmp_path / "a")
    loaded = load(tmp_path / "a", small)
    for ours, theirs in zip(outputs(split), outputs(loaded), strict=True):
        assert torch.equal(ours, theirs)
    architecture = json.loads((tmp_path / "a" / "architecture.json").read_text())
    assert architecture["removed_blocks"] == [[block, 0]]
