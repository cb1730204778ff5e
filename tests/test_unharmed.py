"""What an attack of one's own does to the split that it attacks harms nobody after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import patrol_prune as pp
from patrol_prune.attacks.checks import smooth_images
from patrol_prune.audit_attack import changes
from patrol_prune.models import SmallResNet
from patrol_prune.unharmed import put_back

IMAGES = smooth_images(60, (3, 16, 16), seed=4)
KNOWN, VICTIM, LABELS = IMAGES[:48], IMAGES[48:], torch.arange(48) % 5


def split() -> pp.Split:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallResNet(5, width=4)
        made = pp.Split(model, KNOWN[:1], at="layer1")
    model.apply(lambda m: setattr(m, "extra", 1))
    model.train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    return made


def state(of: nn.Module) -> list[Any]:
    """Copies of all that an attack may change, but for what tells it anew."""
    tensors = [*of.parameters(), *of.buffers()]
    return copy.deepcopy([
        [t.detach() for t in tensors], [t.requires_grad for t in tensors],
        [t.grad for t in tensors], [m.training for m in of.modules()],
        [len(m._forward_hooks) for m in of.modules()], [str(m) for m in of.modules()],
        [sorted(n for n in vars(m) if not n.startswith("_")) for m in of.modules()],
        [getattr(m, "eps", None) for m in of.modules()],
    ])


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def trains(half: nn.Module, z: Tensor) -> None:
    half.requires_grad_(True).train()
    steps = torch.optim.SGD(half.parameters(), lr=0.5)
    functional.cross_entropy(half(z).flatten(1), LABELS[: len(z)]).backward()
    steps.step()


def counts(half: nn.Module, z: Tensor) -> None:
    half.train()
    half(z)
    half.eval()


def casts(half: nn.Module, z: Tensor) -> None:
    half.double()


def listens(half: nn.Module, z: Tensor) -> None:
    next(m for m in half.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(
        lambda module, args, out: 0.0 * out)


def exchanges(half: nn.Module, z: Tensor) -> None:
    name, _ = next(iter(half.named_children()))
    setattr(half, name, nn.Identity())


def asks_gradients(half: nn.Module, z: Tensor) -> None:
    half.requires_grad_(True)
    half(z).sum().backward()


def monkeypatches(half: nn.Module, z: Tensor) -> None:
    layer: Any = next(m for m in half.modules() if isinstance(m, nn.Conv2d))
    layer.forward = lambda x: 0.0 * nn.Conv2d.forward(layer, x)


def sets_anew(half: nn.Module, z: Tensor) -> None:
    norm: Any = next(m for m in half.modules() if isinstance(m, nn.BatchNorm2d))
    norm.eps, norm.momentum, norm.track_running_stats = 3.0, 0.5, False
    norm.added = True
    del norm.extra


def slices(half: nn.Module, z: Tensor) -> None:
    weight = next(half.parameters())
    weight.data = weight.data[:1]


def parametrises(half: nn.Module, z: Tensor) -> None:
    layer = next(m for m in half.modules() if isinstance(m, nn.Conv2d))
    nn.utils.parametrizations.weight_norm(layer)


def copies(half: nn.Module, z: Tensor) -> None:
    copy.deepcopy(half)


def only_asks(half: nn.Module, z: Tensor) -> None:
    half(z)


HARM: dict[Callable[[nn.Module, Tensor], None], list[str]] = {
    trains: ["values", "modes", "gradient"], counts: ["values"], casts: ["values"],
    listens: ["hooks"], exchanges: ["layers"], asks_gradients: ["gradient"], only_asks: [],
    monkeypatches: ["1 attributes"], sets_anew: ["5 attributes"], slices: ["values"],
    parametrises: ["attributes", "exchanged"], copies: [],
}


@pytest.mark.parametrize("which", ["edge", "cloud"])
@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("raises", [False, True])
def test_a_half_stands_as_it_stood(
    harm: Callable[[nn.Module, Tensor], None], which: str, raises: bool
) -> None:
    made = split()
    made.model.eval()
    half = getattr(made, which)
    z = KNOWN[:4] if which == "edge" else made.edge(KNOWN[:4]).detach()
    half.requires_grad_(False)
    before, whole, answer = state(half), state(made.model), half(z)
    memory = [p.data_ptr() for p in made.model.parameters()]
    try:
        with put_back(made.edge, made.cloud) as changed:
            harm(half, z)
            assert alike(state(half), before) == (not HARM[harm])
            if raises:
                raise OSError
    except OSError:
        assert raises
    assert alike(state(half), before) and alike(state(made.model), whole)
    assert torch.equal(half(z), answer)
    assert [p.data_ptr() for p in made.model.parameters()] == memory
    assert all(any(word in told for told in changed.found) for word in HARM[harm])
    assert bool(changed.found) == bool(HARM[harm]) and not changed.lost


def strided() -> dict[str, Tensor]:
    whole = torch.arange(12.0).reshape(4, 3)
    return {
        "column": whole[:, 0], "one": whole[:1, 1], "step": torch.arange(9)[::2],
        "expanded": torch.ones(1).expand(5),
        "row": torch.arange(3.0)[None].expand(4, 3), "windows": torch.arange(6.0).unfold(0, 3, 1),
        "none": torch.empty(0, 3), "number": torch.tensor(2.0), "yes": torch.tensor([True, False]),
        "conjugate": torch.view_as_complex(torch.ones(3, 2)).conj(),
        "negative": torch.view_as_complex(torch.ones(3, 2)).conj().imag,
    }


@pytest.mark.parametrize("name", strided())
def test_tensors_of_any_strides_are_put_back(name: str) -> None:
    layer: Any = nn.Module()
    layer.register_buffer("held", strided()[name])
    held, before, place = layer.held, strided()[name].clone(), layer.held.stride()
    with put_back(layer) as changed:
        pass
    assert not changed.found
    with put_back(layer) as changed:
        held.untyped_storage().fill_(1)
        layer.held = torch.ones(2)
    assert torch.equal(layer.held, before) and layer.held is held and held.stride() == place
    assert len(changed.found) == 1 + bool(held.numel()) and not changed.lost


def test_tensors_that_cannot_be_kept_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = nn.Linear(2, 2)
    sparse = nn.Embedding(4, 2, sparse=True)
    layer.register_buffer("whole", torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.quint8))
    with torch.inference_mode():
        layer.register_parameter("frozen", nn.Parameter(torch.ones(2)))
    sparse(torch.tensor([1])).sum().backward()
    grad = sparse.weight.grad
    with put_back(layer, sparse) as changed:
        with torch.inference_mode():
            layer.frozen.fill_(3.0)
        sparse.weight.grad = None
    assert layer.frozen.tolist() == [1.0, 1.0] and sparse.weight.grad is grad
    assert changed.found == ["1 parameters and buffers by their values"] and not changed.lost
    monkeypatch.setattr(Tensor, "clone", raises_for_memory)
    with put_back(layer) as changed:
        layer.weight.data.fill_(2.0)
    monkeypatch.undo()
    assert not changed.found and bool((layer.weight == 2.0).all())
    with put_back(layer) as changed:
        layer.weight.data.fill_(5.0)
        monkeypatch.setattr(Tensor, "copy_", raises_for_memory)
    assert changed.lost == ["a tensor [2, 2] (no memory)"] and changed.found
    told = changes(changed)[0].meaning
    assert "could not be put back" in told and "That was put back" not in told


def raises_for_memory(*args: Any, **more: Any) -> None:
    raise RuntimeError("no memory\nof any kind")


def test_values_that_are_no_numbers_have_not_changed() -> None:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.bias, float("nan"))
    with put_back(layer) as changed:
        layer(torch.ones(1, 2))
    assert not changed.found


def test_a_parameter_that_was_replaced_before_is_read_again_afterwards() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.scale = nn.Conv2d(3, 4, 3), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            scaled: Tensor = self.first(x) * self.scale
            return scaled

    made = pp.Split(Scaled(), KNOWN[:1], at="first")
    z = made.edge(KNOWN[:2])
    made.model.scale = nn.Parameter(torch.full((1,), 3.0))
    with put_back(made.cloud):
        assert torch.equal(made.cloud(z), 3.0 * z)
    assert torch.equal(made.cloud(z), 3.0 * z)


class Harmful:
    """Trains the cloud that it is lent, when it is fitted and when it is asked."""

    def __init__(self, raises: bool = False) -> None:
        self.raises = raises

    def fit(self, known: pp.Knowledge) -> None:
        assert known.cloud is not None and known.z is not None
        self.cloud, self.shape = known.cloud, known.pixels.shape[1:]
        trains(self.cloud, known.z)
        if self.raises:
            raise OSError("no place left")

    def reconstruct(self, z: Tensor) -> Tensor:
        trains(self.cloud, z)
        return torch.full((len(z), *self.shape), 0.5)


class Reads:
    """Answers with what the cloud makes of an upload."""

    def fit(self, known: pp.Knowledge) -> None:
        assert known.cloud is not None
        self.cloud = known.cloud

    @torch.no_grad()
    def reconstruct(self, z: Tensor) -> Tensor:
        level = self.cloud(z).sigmoid()[:, :3, None, None]
        return torch.as_tensor(level.expand(-1, -1, 16, 16))


@pytest.mark.parametrize("raises", [False, True])
def test_no_attack_of_an_audit_meets_what_an_own_attack_left(raises: bool) -> None:
    found = []
    for first in ({}, {"harmful": Harmful(raises)}):
        made = split()
        before = state(made.model)
        report = pp.audit(made, KNOWN, VICTIM, attacks={**first, "reads": Reads()}, examples=0)
        assert alike(state(made.model), before)
        found.append([r["mse"] for r in report.records if r["attack"] == "reads"])
        flags = {f["name"]: f for f in report.flags if f["attack"] == "harmful"}
        assert ("changed_model" in flags) == bool(first)
        assert not any(f["name"] == "changed_model" for f in report.flags
                       if f["attack"] == "reads")
    assert "parameters and buffers by their values" in flags["changed_model"]["meaning"]
    assert ("attack_failed" in flags) == raises
    assert found[0] == found[1]
