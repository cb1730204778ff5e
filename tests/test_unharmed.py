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
from patrol_prune.models import SmallResNet
from patrol_prune.unharmed import put_back

IMAGES = smooth_images(60, (3, 16, 16), seed=4)
KNOWN, VICTIM, LABELS = IMAGES[:48], IMAGES[48:], torch.arange(48) % 5


def split() -> pp.Split:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallResNet(5, width=4)
        made = pp.Split(model, KNOWN[:1], at="layer1")
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


def only_asks(half: nn.Module, z: Tensor) -> None:
    half(z)


HARM: dict[Callable[[nn.Module, Tensor], None], list[str]] = {
    trains: ["values", "modes", "gradient"], counts: ["values"], casts: ["values"],
    listens: ["hooks"], exchanges: ["layers"], asks_gradients: ["gradient"], only_asks: [],
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
    assert all(any(word in told for told in changed) for word in HARM[harm])
    assert bool(changed) == bool(HARM[harm])


def test_values_that_are_no_numbers_have_not_changed() -> None:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.bias, float("nan"))
    with put_back(layer) as changed:
        layer(torch.ones(1, 2))
    assert not changed


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
