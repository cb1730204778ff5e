"""A split is saved with the defences behind its edge, and loads to the very edge that was sent."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch_pruning as tp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import models

import patrol_prune as pp
from patrol_prune.checkpoint import read_info
from patrol_prune.defences import (
    Bottleneck,
    CemPatrol,
    Combined,
    Defence,
    Disco,
    FeatureDropout,
    GaussianNoise,
    LaplacianNoise,
    Patrol,
    Quantisation,
    RandomUpload,
)
from patrol_prune.defences.base import wrapped
from patrol_prune.errors import CheckpointError, InputError, UnsupportedModelError
from patrol_prune.models import SmallResNet
from patrol_prune.storage import atomic_directory

X = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DEFENCES = [
    Quantisation(2), GaussianNoise(0.5, seed=3), LaplacianNoise(0.3, seed=2**200 + 1),
    FeatureDropout(0.5, seed=7, spared=0.25), Bottleneck(3), Disco(0.5),
    Combined((FeatureDropout(0.3), Bottleneck(4), Patrol(beta=10.0), Quantisation(3))),
]


def small() -> nn.Module:
    return SmallResNet(5, width=8)


def vit() -> nn.Module:
    return models.VisionTransformer(32, 8, 2, 4, 16, 32, num_classes=5)


def trained(factory: Callable[[], nn.Module] = small, at: str = "layer2") -> pp.Split:
    torch.manual_seed(0)
    model = factory().train()
    with torch.no_grad():
        model(torch.rand(8, 3, 32, 32))
    return pp.Split(model.eval(), X, at)


@dataclass(frozen=True)
class Mine(Defence):
    """One that this package does not know."""

    name: ClassVar[str] = "mine"

    factor: float = 2.0

    def apply(self, split: pp.Split, *, calibration: Tensor | None = None) -> pp.Split:
        return wrapped(split, Scaled(self.factor), by=self)


class Scaled(RandomUpload):
    """Multiplies, and keeps how often it was called."""

    calls: Tensor

    def __init__(self, factor: float) -> None:
        super().__init__(0)
        self.factor = factor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.factor * z * torch.rand(1, generator=self.generator(z.device)).item()


def same_draws(one: pp.Split, other: pp.Split, x: Tensor = X) -> bool:
    """Whether both send, and answer, alike three times over."""
    with torch.no_grad():
        sent = [(one.edge(x), other.edge(x)) for _ in range(3)]
        return all(torch.equal(a, b) and torch.equal(one.cloud(a), other.cloud(b))
                   for a, b in sent)


@pytest.mark.parametrize("defence", DEFENCES, ids=lambda d: d.name)
@pytest.mark.parametrize("pruned", [False, True])
def test_what_was_sent_is_sent_again(tmp_path: Path, defence: Defence, pruned: bool) -> None:
    split = trained()
    if pruned:
        pp.PatrolPruner(split.model, X, tp.importance.GroupMagnitudeImportance(), split=split,
                        edge_macs=0.5).step()
    sending = defence.apply(split, calibration=X)
    with torch.no_grad():
        sending.edge(X)  # what draws is not where it began
    pp.save(sending, tmp_path / "it", normalization=pp.Normalization.imagenet())
    again = pp.load(tmp_path / "it", small)
    assert again.feature_shape == sending.feature_shape
    assert again.undefended is not None and again.undefended.edge is not again.edge
    assert same_draws(again, sending)
    innermost = again
    while innermost.undefended is not None:
        innermost = innermost.undefended
    with torch.no_grad():
        assert torch.equal(innermost.edge(X), split.edge(X))
    assert list(innermost.pruning_history) == list(split.pruning_history)
    assert bool(innermost.pruning_history) == pruned
    told = read_info(tmp_path / "it")
    assert told.defences == (("feature_dropout", "bottleneck", "quantisation")
                             if isinstance(defence, Combined) else (defence.name,))
    assert told.at == "layer2" and told.normalization == pp.Normalization.imagenet()


def test_it_can_be_trained_saved_and_loaded_again(tmp_path: Path) -> None:
    sending = Quantisation(3).apply(trained(), calibration=X)
    pp.save(sending, tmp_path / "one")
    again = pp.load(tmp_path / "one", small)
    pp.finetune(again, [(X, torch.arange(6) % 5)], progress=False,
                config=pp.FinetuneConfig(epochs=1, distill_weight=0.0))
    assert not same_draws(again, sending)
    pp.save(again, tmp_path / "two")
    assert same_draws(pp.load(tmp_path / "two", small), again)


@pytest.mark.parametrize("at", ["layer2", "encoder.layers.encoder_layer_0"])
def test_a_copy_is_saved_like_its_original(tmp_path: Path, at: str) -> None:
    factory = small if at == "layer2" else vit
    split = copy.deepcopy(Quantisation(4).apply(trained(factory, at), calibration=X))
    assert isinstance(split.defence, Quantisation)
    with torch.no_grad():
        for parameter in split.model.parameters():  # also a class token's, which no layer holds
            parameter.mul_(0.9)
    pp.save(split, tmp_path / "it")
    assert read_info(tmp_path / "it").defences == ("quantisation",)
    assert same_draws(pp.load(tmp_path / "it", factory), split)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("defence", [Quantisation(2), Bottleneck(3)], ids=lambda d: d.name)
def test_types_and_modes_come_back(tmp_path: Path, defence: Defence, dtype: torch.dtype) -> None:
    sending = defence.apply(trained(), calibration=X)
    sending.model.to(dtype).train()
    sending.edge.upload.eval()
    for parameter in sending.edge.upload.parameters():
        parameter.requires_grad_(False)
    pp.save(sending, tmp_path / "it")
    again = pp.load(tmp_path / "it", small)
    state, other = sending.model.state_dict(), again.model.state_dict()
    assert {k: (v.dtype, v.shape) for k, v in state.items()} == {
        k: (v.dtype, v.shape) for k, v in other.items()}
    assert not again.edge.upload.training and again.edge.features.training
    assert all(not p.requires_grad for p in again.edge.upload.parameters())
    sending.model.eval()
    pp.save(sending, tmp_path / "evaluating")
    again = pp.load(tmp_path / "evaluating", small)
    assert again.undefended is not None
    assert not any(m.training for m in again.undefended.model.modules())
    assert not again.model.training and not again.edge.upload.training
    assert same_draws(again, sending, X.to(dtype))


def test_one_of_your_own_is_given_to_load(tmp_path: Path) -> None:
    both = Combined((Mine(3.0), Quantisation(4)))
    sending = both.apply(trained(), calibration=X)
    with torch.no_grad():
        sending.edge(X)
    pp.save(sending, tmp_path / "it")
    with pytest.raises(CheckpointError, match="'mine', which is none of this package"):
        pp.load(tmp_path / "it", small)
    again = pp.load(tmp_path / "it", small, defence=both)
    assert same_draws(again, sending)
    assert int(again.edge.features.upload.calls) == int(sending.edge.features.upload.calls) > 3
    for wrong, came in (
        (Mine(), r"mine\(factor=2"), (Quantisation(4), r"quantisation\(bits=4\)\."),
        (Combined((Mine(), Mine())), r"mine\(.*\) \+ mine\("), (Patrol(), "no defence"),
        (Combined((Mine(3.0), Quantisation(8))), r"quantisation\(bits=8\)"),
        (Combined((Mine(4.0), Quantisation(4))), "factor=4.0"),
    ):
        with pytest.raises(CheckpointError, match=rf"mine\(.*4\) behind the .* came .*{came}"):
            pp.load(tmp_path / "it", small, defence=wrong)


def test_a_defence_that_the_file_has_not_is_refused(tmp_path: Path) -> None:
    pp.save(trained(), tmp_path / "it")
    assert read_info(tmp_path / "it").defences == ()
    with pytest.raises(CheckpointError, match="Expected no defence .* came quantisation"):
        pp.load(tmp_path / "it", small, defence=Quantisation(4))
    for odd in ("quantisation", (Quantisation(4),), Quantisation):
        with pytest.raises(InputError, match="Expected defence as a Defence, came"):
            pp.load(tmp_path / "it", small, defence=odd)  # type: ignore[arg-type]


def test_what_prunes_is_in_the_history_and_prunes_no_second_time(tmp_path: Path) -> None:
    both = Combined((CemPatrol(ratio=0.3), Mine(3.0)))
    sending = both.apply(trained(), calibration=X)
    pp.save(sending, tmp_path / "it")
    again = pp.load(tmp_path / "it", small, defence=both)
    assert pp.edge_macs(again) == pp.edge_macs(sending)
    assert same_draws(again, sending)


def test_halves_are_no_longer_what_the_factory_gives(tmp_path: Path) -> None:
    sending = Quantisation(4).apply(trained(), calibration=X)
    pp.save(sending, tmp_path / "it")
    with pytest.raises(CheckpointError, match="before its defence, which load puts there itself"):
        pp.load(tmp_path / "it", lambda: (sending.edge, sending.cloud))


def test_a_defence_behind_two_modules(tmp_path: Path) -> None:
    def halves() -> tuple[nn.Module, nn.Module]:
        return (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
                nn.Sequential(nn.Flatten(), nn.Linear(4 * 30 * 30, 5)))

    sending = Quantisation(2).apply(pp.Split.from_modules(*halves(), X), calibration=X)
    pp.save(sending, tmp_path / "it")
    assert same_draws(pp.load(tmp_path / "it", halves), sending)


@dataclass(frozen=True)
class Stronger(FeatureDropout):
    """Of the name of one that the package knows."""

    def apply(self, split: pp.Split, *, calibration: Tensor | None = None) -> pp.Split:
        made = super().apply(split)
        made.edge.upload.p = 0.99
        return made


def test_one_derived_from_a_known_one_is_given_to_load(tmp_path: Path) -> None:
    sending = Stronger(0.5).apply(trained())
    pp.save(sending, tmp_path / "it")
    with pytest.raises(CheckpointError, match="'feature_dropout', which is none of this package"):
        pp.load(tmp_path / "it", small)
    assert same_draws(pp.load(tmp_path / "it", small, defence=Stronger(0.5)), sending)


@pytest.mark.parametrize("number", [np.float32(0.75), np.float64(0.75), torch.tensor(0.75)])
def test_numbers_of_other_libraries_are_kept(tmp_path: Path, number: Any) -> None:
    narrow = np.int64(8)
    for name, defence in (("p", FeatureDropout(number)), ("ratio", Disco(number, width=narrow))):
        sending = defence.apply(trained(), calibration=X)
        pp.save(sending, tmp_path / name)
        again = pp.load(tmp_path / name, small)
        assert getattr(again.defence, name) == 0.75
        assert same_draws(again, sending)


class Positioned(nn.Module):
    """Reads a buffer of its own between its layers."""

    pos: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("pos", torch.randn(4, 32, 32))
        self.last = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.second(self.first(x).relu() + self.pos).relu()
        return self.last(z.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("change", ["half", "double", "other numbers", "other tensors",
                                    "put anew"])
def test_a_buffer_that_the_edge_reads_itself_is_the_edges(tmp_path: Path, change: str) -> None:
    torch.manual_seed(0)
    split = pp.Split(Positioned().eval(), X, "relu_1")
    sending = Quantisation(6).apply(split, calibration=X)
    x = X
    if change in ("half", "double"):
        getattr(sending.model, change)()
        x = getattr(X, change)()
    else:
        sending.model.double()
        x = X.double()
        other = {name: value + 0.1 if name.endswith("pos") else value
                 for name, value in sending.model.state_dict().items()}
        sending.model.load_state_dict(other, assign=change == "other tensors")
        if change == "put anew":
            split.model.pos = 3.0 * split.model.pos.double()
    pp.save(sending, tmp_path / "it")
    assert read_info(tmp_path / "it").defences == ("quantisation",)
    assert same_draws(pp.load(tmp_path / "it", Positioned), sending, x)


def pruned_itself(sending: pp.Split) -> None:
    sending.pruning_history = [["edge.features.conv1", True, [0]]]


def other_upload(sending: pp.Split) -> None:
    sending.model.edge.upload = nn.ReLU()
    sending.refresh()


def other_layer(sending: pp.Split) -> None:
    sending.model.edge.features.conv1 = copy.deepcopy(sending.model.edge.features.conv1)
    sending.refresh()


def more_behind(sending: pp.Split) -> None:
    sending.model.edge.append(nn.Tanh())
    sending.refresh()


def more_between(sending: pp.Split) -> None:
    sending.model.edge.features = nn.Sequential(sending.model.edge.features, nn.Tanh())
    sending.refresh()


def more_in_the_cloud(sending: pp.Split) -> None:
    sending.model.cloud = nn.Sequential(sending.model.cloud, nn.Softmax(1))
    sending.refresh()


class Clip(nn.Module):
    """A tenth of what it holds says: it has a child, and no number of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * self.inner(x)  # type: ignore[no-any-return]


def clipped_cloud(sending: pp.Split) -> None:
    sending.model.cloud = Clip(sending.model.cloud)
    sending.refresh()


def clipped_edge(sending: pp.Split) -> None:
    sending.model.edge.features = Clip(sending.model.edge.features)
    sending.refresh()


def other_steps(sending: pp.Split) -> None:
    sending.model.edge.upload.levels = 1


@pytest.mark.parametrize("change", [other_upload, other_layer, more_behind, more_between,
                                    more_in_the_cloud, other_steps, clipped_cloud, clipped_edge])
def test_one_that_was_changed_since_is_saved_as_two_halves(
    tmp_path: Path, change: Callable[[pp.Split], None],
) -> None:
    """The record of its defence would leave the change out."""
    def halves() -> tuple[nn.Module, nn.Module]:
        made = Quantisation(2).apply(pp.Split(small(), X, "layer2"))
        change(made)
        return made.edge, made.cloud

    sending = Quantisation(2).apply(trained(), calibration=X)
    change(sending)
    pp.save(sending, tmp_path / "it")
    assert read_info(tmp_path / "it").defences == ()
    assert same_draws(pp.load(tmp_path / "it", halves), sending)


def test_a_known_one_behind_your_own_that_was_changed_is_saved_as_two_halves(
    tmp_path: Path,
) -> None:
    sending = Combined((Mine(), FeatureDropout(0.1))).apply(trained())
    pp.save(sending, tmp_path / "as made")
    assert read_info(tmp_path / "as made").defences == ("mine", "feature_dropout")
    sending.edge.upload.p = 0.9
    pp.save(sending, tmp_path / "it")
    assert read_info(tmp_path / "it").defences == ()


def test_a_defence_that_puts_nothing_behind_the_edge_may_be_given(tmp_path: Path) -> None:
    split = trained()
    pp.save(split, tmp_path / "it")
    for defence in (Patrol(), CemPatrol(), Combined((Patrol(),))):
        again = pp.load(tmp_path / "it", small, defence=defence)
        assert again.defence is None and same_draws(again, split)


@dataclass(frozen=True)
class Halving(Mine):
    """Changes the weights as well."""

    def apply(self, split: pp.Split, *, calibration: Tensor | None = None) -> pp.Split:
        with torch.no_grad():
            for parameter in split.model.parameters():
                parameter.mul_(0.5)
        return super().apply(split)


def test_what_your_own_does_to_the_weights_is_done_once(tmp_path: Path) -> None:
    sending = Halving().apply(trained())
    pp.save(sending, tmp_path / "it")
    assert same_draws(pp.load(tmp_path / "it", small, defence=Halving()), sending)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    sending = Combined((Bottleneck(3), Quantisation(4))).apply(trained(), calibration=X)
    sending.model.train()
    state = {k: v.clone() for k, v in sending.model.state_dict().items()}
    modes = [m.training for m in sending.model.modules()]
    pp.save(sending, tmp_path / "it")
    assert modes == [m.training for m in sending.model.modules()] and all(modes)
    assert all(torch.equal(v, state[k]) for k, v in sending.model.state_dict().items())


def test_a_narrow_layer_under_other_names_is_saved_as_two_halves(tmp_path: Path) -> None:
    sending = Bottleneck(4).apply(trained(), calibration=X)
    nn.utils.parametrizations.weight_norm(sending.edge.upload)
    pp.save(sending, tmp_path / "it")
    assert read_info(tmp_path / "it").defences == ()


def test_a_narrow_layer_that_was_pruned_is_saved_as_two_halves(tmp_path: Path) -> None:
    def halves() -> tuple[nn.Module, nn.Module]:
        made = Bottleneck(8).apply(pp.Split(small(), X, "layer2"))
        return made.edge, made.cloud

    sending = Bottleneck(8).apply(trained(), calibration=X)
    tp.pruner.BasePruner(sending.model, X, tp.importance.GroupMagnitudeImportance(),
                         pruning_ratio=0.5, ignored_layers=[sending.model.cloud.rest.fc]).step()
    sending.refresh()
    pp.save(sending, tmp_path / "it")
    assert read_info(tmp_path / "it").defences == ()
    assert same_draws(pp.load(tmp_path / "it", halves), sending)


def test_one_that_was_pruned_behind_its_defence_is_saved_as_two_halves(tmp_path: Path) -> None:
    sending = FeatureDropout(0.5).apply(trained())
    pruned_itself(sending)
    pp.save(sending, tmp_path / "it")
    assert read_info(tmp_path / "it").defences == ()


def rewritten(
    path: Path, to: Path, change: Callable[[dict[str, Any]], None],
    more: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """A copy of a saved split with another split.json, whole."""
    with atomic_directory(to) as folder:
        for file in path.iterdir():
            if file.name not in ("manifest.json", ".lock"):
                (folder / file.name).write_bytes(file.read_bytes())
        about = json.loads((folder / "split.json").read_text())
        change(about)
        (folder / "split.json").write_text(json.dumps(about))
        more(folder)
    return to


@pytest.mark.parametrize(("change", "said"), [
    (lambda a: a.update(defences=[]), "format does not go with its defences"),
    (lambda a: a.pop("defences"), "format does not go with its defences"),
    (lambda a: a.update(format="patrol-prune split, version 1"), "format does not go with"),
    (lambda a: a.update(format="patrol-prune split, version 3"), "another version"),
    (lambda a: a["defences"][0].update(name=3), "its 'defences' is"),
    (lambda a: a["defences"][0].pop("frozen"), "its 'defences' is"),
    (lambda a: a["defences"][0].update(name="unheard"), "'unheard', which is none of this"),
    (lambda a: a["defences"][0].update(settings={"bits": 99}), "from 1 to 16, came 99"),
    (lambda a: a["defences"][0].update(settings={"colour": 1}), "no setting 'colour'"),
    (lambda a: a["defences"].append(a["defences"][0]), "holds other numbers"),
    (lambda a: a["defences"][0].update(name="feature_dropout", settings={}), "other numbers"),
    (lambda a: a["defences"][0].pop("of"), "its 'defences' is"),
    (lambda a: a["defences"][0].update(settings={"name": "quantisation"}), "no defence is set up"),
    (lambda a: a["defences"][0].update(name="bottleneck", settings={"channels": 99}),
     "split.json as .* at most the feature's"),
    (lambda a: a["defences"][0].update(name="gaussian_noise", settings={"seed": "x"}),
     "no defence is set up so"),
])
def test_files_that_save_never_wrote_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str,
) -> None:
    pp.save(Quantisation(2).apply(trained(), calibration=X), tmp_path / "it")
    with pytest.raises(CheckpointError, match=said):
        pp.load(rewritten(tmp_path / "it", tmp_path / "odd", change), small)


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.pop("0.upload.scale"), "holds other numbers"),
    (lambda t: t.clear(), "holds other numbers"),
    (lambda t: t.update({"0.upload.scale": t["0.upload.scale"][:-1]}), "holds other numbers"),
    (lambda t: t.update({"0.upload.scale": t["0.upload.scale"].int()}), "holds other numbers"),
    (lambda t: t.update({"2.upload.scale": torch.ones(1)}), "no place for 2.upload.scale"),
    (lambda t: t.update({"1.upload._extra_state": torch.zeros(5, dtype=torch.uint8)}),
     "not what .* tell of"),
])
def test_numbers_that_save_never_wrote_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], said: str,
) -> None:
    sending = Quantisation(2).apply(trained(), calibration=X)
    pp.save(FeatureDropout(0.5).apply(sending), tmp_path / "it")

    def changed(folder: Path) -> None:
        numbers = load_file(folder / "defences.safetensors")
        change(numbers)
        save_file(numbers, folder / "defences.safetensors")

    odd = rewritten(tmp_path / "it", tmp_path / "odd", lambda about: None, changed)
    with pytest.raises(CheckpointError, match=said):
        pp.load(odd, small)


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    sending = Mine().apply(trained())
    sending.edge.upload.get_extra_state = lambda: {"a": 1}
    with pytest.raises(UnsupportedModelError, match="0.upload._extra_state, which is dict"):
        pp.save(sending, tmp_path / "it")
