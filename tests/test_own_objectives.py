"""Objectives of the user's own: what they hold learns or is told, and so is their penalty."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import patrol_prune as pp
from patrol_prune.defences.nopeek import NoPeekObjective, PenalisedTerms
from patrol_prune.errors import InputError
from patrol_prune.models import SmallResNet

QUICK = pp.FinetuneConfig(epochs=1, surrogate_warmup_steps=0)


def split() -> pp.Split:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pp.Split(SmallResNet(5, width=4), torch.zeros(1, 3, 16, 16), at="layer1")


def batches() -> list[tuple[Tensor, Tensor]]:
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return [(x, torch.arange(8) % 5)] * 2


class Guarded(pp.PatrolObjective):
    """Adds what a discriminator makes of the feature, or what `penalty` does."""

    def __init__(self, of: pp.Split, *, weight: float = 1.0, in_task: bool = False,
                 penalty: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__(of, F.cross_entropy)
        self.weight, self.in_task, self.penalty = weight, in_task, penalty

    def terms(self, x: Tensor, y: Tensor, **more: Any) -> PenalisedTerms:
        terms = super().terms(x, y, **more)
        score: Callable[[Tensor], Any] = self.penalty or self.judged
        penalty = score(terms.z.mean((2, 3)))
        total = terms.total + self.weight * penalty if self.weight else terms.total
        task = terms.task + self.weight * penalty if self.in_task else terms.task
        return PenalisedTerms(**{**vars(terms), "total": total, "task": task}, penalty=penalty)

    def judged(self, z: Tensor) -> Tensor:
        raise NotImplementedError


class Mine(Guarded):
    """A network of its own in `disc`, trained by itself where it has an optimiser."""

    def __init__(self, of: pp.Split, disc: nn.Module) -> None:
        super().__init__(of)
        self.disc = disc

    def judged(self, z: Tensor) -> Tensor:
        optimizer = getattr(self, "optimizer", None)
        if optimizer is not None:
            optimizer.zero_grad()
            self.disc(z.detach()).square().mean().backward()
            optimizer.step()
        return self.disc(z).square().mean()


def disc() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(4, 3)


def train(objective: pp.PatrolObjective, **more: Any) -> dict[str, float]:
    return pp.finetune(objective.split, batches(), objective=objective, config=QUICK,
                       progress=False, **more).history[0]


def told_by(call: Callable[[], object]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call()
    return [w for w in told if "of its own" in str(w.message) or "penalty" in str(w.message)]


def test_a_network_that_nobody_would_train_is_told_once() -> None:
    objective = Mine(split(), disc())
    message = "Mine holds 2 parameters of its own (disc.weight is the first)"
    told = told_by(lambda: train(objective))
    assert len(told) == 1 and message in str(told[0].message) and told[0].filename == __file__


@pytest.mark.parametrize("held", [[disc()], {"z": disc()}, nn.Parameter(torch.zeros(()))])
def test_wherever_it_is_held(held: Any) -> None:
    objective = pp.PatrolObjective(split(), F.cross_entropy)
    objective.held = held  # type: ignore[attr-defined]
    assert "(held" in str(told_by(lambda: train(objective))[0].message)


class Helper:
    def __init__(self, *nets: nn.Module) -> None:
        self.optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = disc()
        self.optimizers = [torch.optim.SGD(self.net.parameters(), lr=0.1)]


def beside() -> list[Any]:
    net = disc()
    return [net, Helper(net)]


@pytest.mark.parametrize("held", [
    disc().eval(), AveragedModel(disc()), nn.Sequential(disc().eval()), Judge(), beside(),
])  # fmt: skip
def test_what_is_not_meant_to_learn_or_is_trained_from_beside_is_not_told(held: Any) -> None:
    objective = pp.PatrolObjective(split(), F.cross_entropy)
    objective.held = held  # type: ignore[attr-defined]
    assert not told_by(lambda: train(objective))


def test_one_that_is_frozen_or_trained_beside_it_is_taken() -> None:
    for optimizer in (None, torch.optim.SGD):
        net = disc()
        before = copy.deepcopy(net.state_dict())
        objective = Mine(split(), net.requires_grad_(optimizer is not None))
        if optimizer is not None:
            objective.optimizer = optimizer(net.parameters(), lr=0.1)  # type: ignore[attr-defined]
        assert not told_by(partial(train, objective)) and train(objective)["penalty"] > 0
        stays = all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert stays == (optimizer is None)


def test_what_the_objective_holds_of_the_training_is_no_network_of_its_own() -> None:
    """The attackers inside have learnt something by then; the teacher is nobody's to train."""
    objective = pp.PatrolObjective(split(), F.cross_entropy, beta=1.0,
                                   surrogates=(pp.SurrogateSpec("transposed", width=8),))
    objective.fit_surrogates(batches(), 1)
    teacher = copy.deepcopy(objective.split.model)
    objective.nets = {"of": teacher, "edge": objective.split.edge}  # type: ignore[attr-defined]
    assert not told_by(lambda: train(objective, teacher=teacher))


@pytest.mark.parametrize(("penalty", "came"), [
    (lambda z: 0.5, "came float"), (lambda z: z.square().mean(1), r"came \(8,\)"),
])  # fmt: skip
def test_a_penalty_that_is_no_scalar_tensor_is_refused(
    penalty: Callable[[Tensor], Any], came: str
) -> None:
    with pytest.raises(InputError, match=f"objective's penalty to give one number.*{came}"):
        train(Guarded(split(), penalty=penalty))


def test_a_penalty_outside_of_total_is_recorded_and_not_trained() -> None:
    weights = []
    for weight in (None, 0.0, 1.0):
        of = split()
        objective = (pp.PatrolObjective(of, F.cross_entropy) if weight is None
                     else Guarded(of, weight=weight, penalty=lambda z: z.square().mean()))
        assert ("penalty" in train(objective)) == (weight is not None)
        weights.append(torch.cat([p.detach().flatten() for p in of.model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def scores(**settings: Any) -> Tensor:
    importance = pp.PatrolImportance(Guarded(split(), penalty=lambda z: z.square().mean(),
                                             **settings))
    for batch in batches():
        importance.accumulate(*batch)
    return torch.cat(list(importance.scores.values()))


def test_a_penalty_that_is_not_scored_is_told_once() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        light, heavy = scores(weight=0.0), scores(weight=1e4)
        in_task = scores(weight=1e4, in_task=True)
    assert torch.equal(light, heavy) and not torch.allclose(light, in_task)
    assert sum("penalty is left out" in str(w.message) for w in told) == 3  # one each
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pp.PatrolImportance(pp.PatrolObjective(split(), F.cross_entropy)).accumulate(*batches()[0])


def package_scores() -> Callable[..., None]:
    """A function that calls `accumulate` from a file of the package."""
    space: dict[str, Any] = {}
    inside = str(Path(pp.__file__).with_name("pipeline.py"))
    exec(compile("def score(of, *batch): of.accumulate(*batch)", inside, "exec"), space)
    score: Callable[..., None] = space["score"]
    return score


@pytest.mark.parametrize("accumulate", [pp.PatrolImportance.accumulate, package_scores()])
def test_the_warning_points_at_the_line_that_led_to_it(accumulate: Callable[..., None]) -> None:
    """The caller of `accumulate`, and behind the package's own files that of theirs."""
    importance = pp.PatrolImportance(NoPeekObjective(split(), F.cross_entropy, weight=1.0))
    told = told_by(lambda: [accumulate(importance, *batch) for batch in batches()])
    assert [w.filename for w in told] == [__file__]
