"""Optimisers rebuilt after removal keep the momentum of what was kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import patrol_prune as pp
from patrol_prune._tp import GroupMagnitudeImportance


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 5, 3, padding=1)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.conv3(torch.relu(self.conv2(h)))).mean((2, 3)))


@pytest.fixture
def model() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def _optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.02}]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.05)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    g = torch.Generator().manual_seed(1)
    optimizer.zero_grad()
    model(torch.randn(4, 3, 8, 8, generator=g)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("steps", [1, 2])
def test_moments_follow_the_kept_channels(model: Net, kind: str, steps: int) -> None:
    split = pp.Split(model, torch.zeros(1, 3, 8, 8), at="conv3")
    optimizer = _optimizer(kind, model)
    _step(model, optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    moment = "momentum_buffer" if kind == "sgd" else "exp_avg"
    before = {names[id(p)]: s[moment].clone() for p, s in optimizer.state.items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    pruner = pp.PatrolPruner(model, split.example_inputs, GroupMagnitudeImportance(), split=split,
                             edge_macs=0.4, iterative_steps=steps)
    for _ in range(steps):
        pruner.step()
    rebuilt = pp.rebuild_optimizer(optimizer, model)
    assert type(rebuilt) is type(optimizer)
    after = {name: rebuilt.state[p][moment] for name, p in model.named_parameters()}
    shrunk = 0
    for name, p in model.named_parameters():
        assert after[name].shape == p.shape
        shrunk += int(after[name].shape != before[name].shape)
        # every kept entry sits where its weight went: match by the weights' unique values
        old = {float(w): float(m) for w, m in zip(weights[name].flatten(), before[name].flatten(),
                                                  strict=True)}
        if name in ("bn1.weight", "bn1.bias"):
            continue
        assert all(old[float(w)] == float(m) for w, m in
                   zip(p.detach().flatten(), after[name].flatten(), strict=True)), name
    assert shrunk >= 5
    assert [g["weight_decay"] for g in rebuilt.param_groups][0] == 0.1
    assert rebuilt.param_groups[1]["lr"] == 0.02
    held = {id(p) for g in rebuilt.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_the_old_optimiser_trains_nothing_and_the_new_one_does(model: Net) -> None:
    split = pp.Split(model, torch.zeros(1, 3, 8, 8), at="conv3")
    optimizer = _optimizer("sgd", model)
    pp.PatrolPruner(model, split.example_inputs, GroupMagnitudeImportance(), split=split,
                    edge_macs=0.4).step()
    before = model.conv2.weight.detach().clone()
    _step(model, optimizer)
    assert torch.equal(before, model.conv2.weight)
    _step(model, pp.rebuild_optimizer(optimizer, model))
    assert not torch.equal(before, model.conv2.weight)


def test_unknown_origins_start_anew(model: Net, caplog: pytest.LogCaptureFixture) -> None:
    optimizer = _optimizer("sgd", model)
    _step(model, optimizer)
    model.conv3.weight = nn.Parameter(model.conv3.weight.detach() + 1.0)
    rebuilt = pp.rebuild_optimizer(optimizer, model)
    assert "conv3.weight" in caplog.text
    assert model.conv3.weight not in rebuilt.state
    assert any(p is model.conv3.weight for g in rebuilt.param_groups for p in g["params"])
