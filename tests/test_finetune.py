"""Training: it learns, resumes to the same weights, and stops at the first NaN."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import patrol_prune as pp
from patrol_prune.data import Batches, ImageSet
from patrol_prune.defences.nopeek import NoPeekObjective
from patrol_prune.errors import CheckpointError, InputError, TrainingError
from patrol_prune.finetune import (
    FinetuneConfig,
    accuracy,
    finetune,
    learning_rate,
    recalibrate_batchnorm,
)
from patrol_prune.lipschitz import LipschitzForm
from patrol_prune.objective import PatrolObjective
from patrol_prune.storage import load_state, save_state
from patrol_prune.surrogate import SurrogateSpec
from patrol_prune.trainer import clip_gradients

SPECS = (SurrogateSpec("residual", 8, 1), SurrogateSpec("transposed", 8))
CONFIG = FinetuneConfig(epochs=3, lr=0.05, surrogate_warmup_steps=3, precision="fp32",
                        distill_weight=0.5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, 2, 1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(h.mean((2, 3)))


def _images(count: int = 64) -> ImageSet:
    """Bright images against dark ones."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 100, (count, 3, 8, 8), generator=g)
    return ImageSet((noise + 120 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, ("a", "b"))


def _split() -> pp.Split:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pp.Split(Net(), torch.zeros(1, 3, 8, 8), at="conv2")


def _objective(split: pp.Split, form: LipschitzForm = "scale_free") -> PatrolObjective:
    return PatrolObjective(split, F.cross_entropy, alpha=0.01, beta=1.0, surrogates=SPECS,
                           precision="fp32", lipschitz_form=form)


def _train(split: pp.Split, config: FinetuneConfig = CONFIG, *,
           form: LipschitzForm = "scale_free", **more: object):
    objective = _objective(split, form)
    batches = Batches(_images(), 16, shuffle=True, augment=True, seed=1)
    teacher = copy.deepcopy(_split().model)
    return finetune(split, batches, objective=objective, config=config, teacher=teacher,
                    progress=False, **more)  # type: ignore[arg-type]


def test_plain_training_learns_and_leaves_the_mode() -> None:
    model = _split().model.eval()
    config = dataclasses.replace(CONFIG, epochs=6)
    batches = Batches(_images(), 16, shuffle=True, seed=1)
    state = torch.get_rng_state()
    result = finetune(model, batches, config=config, val_batches=Batches(_images(), 32),
                      progress=False)
    assert result.history[-1]["accuracy"] > 0.95
    assert result.history[-1]["task"] < result.history[0]["task"]
    assert not any(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def _pool() -> Batches:
    """Three batches: more are asked for in an epoch, so that it is gone through again."""
    return Batches(_images(48), 16, shuffle=True, seed=7)


HARDER = dataclasses.replace(CONFIG, renew_every=3, feature_weight=0.5)


@pytest.mark.parametrize(
    "config, pooled, form",
    [(CONFIG, False, "scale_free"), (CONFIG, False, "spectral"), (HARDER, False, "scale_free"),
     (HARDER, True, "scale_free")],
)
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, config: FinetuneConfig, pooled: bool, form: LipschitzForm
) -> None:
    whole = _split()
    pool = {"surrogate_batches": _pool()} if pooled else {}
    _train(whole, config, form=form, **pool)

    class Killed(Exception):
        pass

    class Dies(Batches):
        def __iter__(self):  # type: ignore[no-untyped-def]
            if self.epoch == 2:
                raise Killed
            return super().__iter__()

    halted = _split()
    with pytest.raises(Killed):
        finetune(halted, Dies(_images(), 16, shuffle=True, augment=True, seed=1),
                 objective=_objective(halted, form), config=config,
                 teacher=copy.deepcopy(_split().model), checkpoint_dir=tmp_path, progress=False,
                 **pool)
    resumed = _split()
    result = _train(resumed, config, form=form, checkpoint_dir=tmp_path, resume=True, **pool)
    assert result.resumed_from == 2 and len(result.history) == 3
    for (name, a), b in zip(whole.model.state_dict().items(),
                            resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_training_that_begins_anew_spares_the_checkpoints_of_an_earlier_one(
    tmp_path: Path,
) -> None:
    """Removed they would be lost to whoever forgot `resume`; left they would be resumed later."""
    (tmp_path / "notes").mkdir()
    assert _train(_split(), checkpoint_dir=tmp_path, resume=True).resumed_from == 0
    before = sorted(p.name for p in tmp_path.iterdir())
    fresh = _split()
    weights = copy.deepcopy(fresh.model.state_dict())
    with pytest.raises(CheckpointError, match="epoch-0003.*resume=True"):
        _train(fresh, checkpoint_dir=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before == [
        "epoch-0001", "epoch-0002", "epoch-0003", "notes"]
    assert all(map(torch.equal, weights.values(), fresh.model.state_dict().values()))


def test_the_models_come_back_in_the_mode_and_layout_they_came_in() -> None:
    for layout in (torch.channels_last, torch.contiguous_format):
        model, teacher = _split().model.to(memory_format=layout), Net().train()
        teacher.bn1.eval()
        finetune(model, Batches(_images(), 16), config=CONFIG, teacher=teacher, progress=False)
        assert all(p.is_contiguous(memory_format=layout) for p in model.parameters()
                   if p.dim() == 4)
        assert [m.training for m in teacher.modules()] == [True, True, False, True, True]


def _with_norms() -> pp.Split:
    """Cut behind "2": the norm "1" on the edge, in the cloud "4", and "5" without parameters."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )
    return pp.Split(model, torch.zeros(1, 3, 8, 8), at="2")


def _train_norms(split: pp.Split, how: str) -> None:
    config = dataclasses.replace(CONFIG, epochs=1)
    objective = PatrolObjective(split, F.cross_entropy, alpha=0.01, beta=1.0, surrogates=SPECS,
                                precision="fp32")
    if how == "masks":
        pp.learn_masks(split, Batches(_images(32), 16), objective, edge_macs=0.9, boundary="prune",
                       progress=False, config=pp.MaskConfig(epochs=1, surrogate_warmup_steps=3))
        return
    finetune(split.model if how == "model" else split, Batches(_images(32), 16), config=config,
             objective=objective if how == "objective" else None, progress=False,
             val_batches=Batches(_images(32), 32))


@pytest.mark.parametrize(("how", "frozen", "kept"), [
    ("split", ["3", "4", "9"], {"3", "4", "5", "9"}),  # all of the cloud
    ("objective", ["3", "4", "9"], {"3", "4", "5", "9"}),
    ("masks", ["3", "4", "9"], {"3", "4", "5", "9"}),
    ("model", ["3", "4", "9"], {"3", "4", "9"}),  # where no half is known
    ("split", ["0", "1"], {"0", "1"}),  # all of the edge
    ("split", ["4"], {"4"}),
    ("split", ["3", "4.bias", "9"], {"3", "9"}),
    ("split", [], set()),
])
def test_what_is_frozen_stays_as_it_is(how: str, frozen: list[str], kept: set[str]) -> None:
    split = _with_norms()
    for name, parameter in split.model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    split.model.train().get_submodule("1").eval()
    before = copy.deepcopy(split.model)
    _train_norms(split, how)
    now = split.model.state_dict()
    layers = [n for n, m in before.named_children() if m.state_dict()]
    assert kept == {n for n in layers if all(
        torch.equal(v, now[f"{n}.{k}"]) for k, v in before.get_submodule(n).state_dict().items())}
    modes = [m.training for m in before.modules()]
    assert [m.training for m in split.model.modules()] == modes


@pytest.mark.parametrize("left", [1e3, float("nan")])
def test_a_gradient_left_on_what_is_frozen_counts_nowhere(left: float) -> None:
    """One of a step before the layer was frozen, which no step of this training renews."""
    found = []
    for gradient in (None, left):
        torch.manual_seed(0)
        model = _with_norms().model
        weight = model.get_submodule("0").weight.requires_grad_(False)
        weight.grad = None if gradient is None else torch.full_like(weight, gradient)
        finetune(model, Batches(_images(16), 16), progress=False,
                 config=dataclasses.replace(CONFIG, epochs=1))
        found.append(model.get_submodule("9").weight)
    assert torch.equal(*found)


def test_a_teacher_that_shares_parameters_is_refused() -> None:
    model = _split().model
    teacher = copy.deepcopy(model)
    teacher.fc = model.fc
    for shares, name in ((teacher, "fc.weight"), (model, "conv1.weight")):
        with pytest.raises(InputError, match=rf"shares \d+ parameters.*{name}"):
            finetune(model, Batches(_images(), 16), config=CONFIG, teacher=shares, progress=False)


class _CentreLoss(nn.Module):
    """Cross-entropy of logits in the distance from centres that are to be learnt."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.centres = model, nn.Parameter(torch.eye(2))

    def forward(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(-torch.cdist(logits, self.centres), y)


def test_a_task_loss_with_something_to_learn_is_refused_before_any_work() -> None:
    split = _split()
    loss = _CentreLoss(split.model)  # the model's parameters are trained
    objective = PatrolObjective(split, loss, precision="fp32")
    before = copy.deepcopy(split.model.state_dict())
    config = dataclasses.replace(CONFIG, epochs=1)
    words = r"came _CentreLoss with 1 parameters of its own \(centres is the first.* those alone"
    with pytest.raises(InputError, match=words):
        finetune(split, Batches(_images(16), 16), objective=objective, config=config,
                 progress=False)
    assert all(torch.equal(v, before[k]) for k, v in split.model.state_dict().items())
    loss.centres.requires_grad_(False)
    finetune(split, Batches(_images(16), 16), objective=objective, config=config, progress=False)
    assert not torch.equal(split.model.fc.weight, before["fc.weight"])


def test_surrogates_learn_from_the_pool_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    step = PatrolObjective.update_surrogates

    def spy(self: PatrolObjective, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return step(self, z, x)

    monkeypatch.setattr(PatrolObjective, "update_surrogates", spy)
    split = _split()
    _train(split, dataclasses.replace(CONFIG, epochs=1), surrogate_batches=_pool())
    assert len(seen) == CONFIG.surrogate_warmup_steps + 4 * CONFIG.inner_steps
    allowed = {tuple(image.flatten().tolist()) for image in _images(48).pixels()}
    assert all(tuple(image.flatten().tolist()) in allowed for x in seen for image in x)


def test_the_weakest_surrogate_is_renewed_on_time_and_features_are_recorded() -> None:
    split = _split()
    objective = PatrolObjective(split, F.cross_entropy, beta=1.0, surrogates=SPECS)
    result = finetune(split, Batches(_images(), 16), objective=objective, config=HARDER,
                      teacher=copy.deepcopy(_split().model), progress=False)
    assert int(objective.surrogates.renewals) == 3 * 4 // HARDER.renew_every
    assert 0 < result.history[-1]["features"] < 10
    assert not any(m._forward_pre_hooks for m in split.model.modules())


def test_refused_training_leaves_no_hook_on_either_model() -> None:
    split, teacher = _split(), copy.deepcopy(_split().model)
    objective = PatrolObjective(split, F.cross_entropy, beta=1.0, surrogates=SPECS)
    with pytest.raises(InputError, match="in surrogate_batches, came none"):
        finetune(split, Batches(_images(), 16), objective=objective, config=HARDER,
                 teacher=teacher, surrogate_batches=[], progress=False)
    assert not any(m._forward_pre_hooks for net in (split.model, teacher) for m in net.modules())


def test_resume_refuses_other_settings(tmp_path: Path) -> None:
    _train(_split(), dataclasses.replace(CONFIG, epochs=1), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="lr"):
        _train(_split(), dataclasses.replace(CONFIG, epochs=1, lr=0.2), checkpoint_dir=tmp_path,
               resume=True)


def test_resume_refuses_another_objective_or_another_number_of_batches(tmp_path: Path) -> None:
    split = _split()
    config = dataclasses.replace(CONFIG, epochs=1)

    def train(count: int, resume: bool, **settings: float) -> None:
        finetune(split, Batches(_images(count), 16), config=config, progress=False,
                 objective=PatrolObjective(split, F.cross_entropy, **settings),
                 checkpoint_dir=tmp_path, resume=resume)

    train(64, False, alpha=0.01)
    with pytest.raises(CheckpointError, match="objective's alpha, the objective's noise_std"):
        train(64, True, alpha=0.02, noise_std=0.2)
    with pytest.raises(CheckpointError, match="batches in an epoch"):
        train(32, True, alpha=0.01)
    train(64, True, alpha=0.01)


def test_resume_refuses_what_changes_the_loss_or_the_upload(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, epochs=1)
    teacher = _split().model

    def train(p: float, **more: Any) -> None:
        split = pp.make_defence("feature_dropout", p).apply(_split())
        objective = more.pop("make", PatrolObjective)(
            split, F.cross_entropy, **{"noise_std": np.float32(0.1), **more.pop("settings", {})})
        finetune(split, Batches(_images(), 16), config=config, progress=False,
                 objective=objective, checkpoint_dir=tmp_path, **more)

    train(0.25, teacher=teacher)
    train(0.25, teacher=teacher, resume=True)
    for told, p, more in (
        ("a teacher or none", 0.25, {}),
        ("dropout or noise in the model", 0.5, {"teacher": teacher}),
        ("surrogate_batches or none", 0.25, {"teacher": teacher, "surrogate_batches": _pool()}),
        ("objective's std", 0.25, {"teacher": teacher, "settings": {
            "normalization": pp.Normalization((0.5,) * 3, (0.5,) * 3)}}),
    ):
        with pytest.raises(CheckpointError, match=told):
            train(p, resume=True, **more)
    weights = {weight: NoPeekObjective(_split(), F.cross_entropy, weight).settings()
               for weight in (1.0, 9.0)}
    assert weights[1.0] != weights[9.0]


def test_a_module_that_counts_what_it_sends_is_resumed(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sent, self.generator = 0, torch.Generator()

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            self.sent += len(z)
            return z

    def train(resume: bool, model: nn.Module | None = None) -> int:
        model = model or nn.Sequential(_split().model, Counts())
        return finetune(model, Batches(_images(), 16), progress=False, checkpoint_dir=tmp_path,
                        config=dataclasses.replace(CONFIG, epochs=1), resume=resume).resumed_from

    same = nn.Sequential(_split().model, Counts())
    assert (train(False, same), train(True), train(True, same)) == (0, 1, 1)


class _Drops(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.dropout(x, 0.3, self.training))


class _Killed(Exception):
    pass


class _Dies(DataLoader):  # type: ignore[type-arg]
    left = 2

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.left -= 1
        if self.left < 0:
            raise _Killed
        return super().__iter__()


def _data(count: int = 64) -> TensorDataset:
    images = _images(count)
    return TensorDataset(images.images.float() / 255, images.labels)


def test_a_resumed_run_draws_on_where_dropout_and_shuffling_stood(tmp_path: Path) -> None:
    def train(loader: type, **more: object) -> nn.Module:
        torch.manual_seed(1)
        model = _Drops()
        finetune(model, loader(_data(), batch_size=16, shuffle=True), config=CONFIG, progress=False,
                 **more)
        return model

    whole = train(DataLoader)
    with pytest.raises(_Killed):
        train(_Dies, checkpoint_dir=tmp_path)
    resumed = train(DataLoader, checkpoint_dir=tmp_path, resume=True)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.parametrize("owner", ["loader", "sampler", "pool"])
def test_a_resumed_run_draws_on_where_a_loaders_own_generator_stood(
    tmp_path: Path, owner: str
) -> None:
    def loader(kind: type, seed: int, sampled: bool) -> DataLoader:  # type: ignore[type-arg]
        own = torch.Generator().manual_seed(seed)
        data = _data(32)
        order = {"sampler": RandomSampler(data, generator=own)} if sampled else {
            "shuffle": True, "generator": own}
        return kind(data, batch_size=16, **order)

    def train(kind: type, **more: object) -> nn.Module:
        split = _split()
        pool = {"objective": _objective(split), "surrogate_batches": loader(DataLoader, 8, False)}
        finetune(split, loader(kind, 7, owner == "sampler"), config=config, progress=False,
                 **(pool if owner == "pool" else {}), **more)
        return split.model

    config = dataclasses.replace(CONFIG, surrogate_warmup_steps=1)
    whole = train(DataLoader)
    with pytest.raises(_Killed):
        train(_Dies, checkpoint_dir=tmp_path)
    resumed = train(DataLoader, checkpoint_dir=tmp_path, resume=True)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.parametrize(("own", "other"), [("fp32", "auto"), ("auto", "fp32")])
def test_one_precision_holds_for_all_of_a_training(own: str, other: str) -> None:
    split = _split()
    seen = set()
    split.model.conv1.register_forward_hook(lambda _m, _x, y: seen.add(y.dtype))
    objective = PatrolObjective(split, F.cross_entropy, precision=other)
    teacher = copy.deepcopy(split.model)
    finetune(split, Batches(_images(), 16), objective=objective, teacher=teacher, progress=False,
             config=dataclasses.replace(CONFIG, epochs=1, precision=own))
    assert seen == {torch.float32} and objective.precision == other
    with pytest.raises(InputError, match="one precision"):
        finetune(split, Batches(_images(), 16), progress=False,
                 objective=PatrolObjective(split, F.cross_entropy, precision="bf16"),
                 config=dataclasses.replace(CONFIG, precision="fp32"))


@pytest.mark.slow
def test_the_callers_own_accelerator_keeps_its_settings() -> None:
    """Accelerate's settings are those of the process: whoever comes first sets them for all."""
    code = """
import torch
from accelerate import Accelerator
from torch import nn
import patrol_prune as pp

model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 2))
batches = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))]
train = lambda: pp.finetune(model, batches, config=pp.FinetuneConfig(epochs=1), progress=False)
train()
mine = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=4)
assert mine.mixed_precision == "bf16"
train()
assert mine.gradient_accumulation_steps == 4
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_resume_refuses_other_frozen_parameters(tmp_path: Path) -> None:
    def train(frozen: str, resume: bool = True) -> int:
        model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)), nn.Flatten(),
                              nn.Linear(192, 2))
        model.get_submodule(frozen).requires_grad_(False)
        return finetune(model, Batches(_images(), 16), config=config, progress=False,
                        checkpoint_dir=tmp_path, resume=resume).resumed_from

    config = dataclasses.replace(CONFIG, epochs=1)
    train("0", resume=False)
    for other in ("1", "4"):  # of the same shapes, and of others
        with pytest.raises(CheckpointError, match=r"other settings \(the parameters that are"):
            train(other)
    assert train("0") == 1
    tensors, meta = load_state(tmp_path / "epoch-0001")
    del meta["trained"]  # as an earlier release wrote it
    save_state(tmp_path / "epoch-0001", {k: v for k, v in tensors.items()
                                         if not k.startswith("draws.train")}, meta)
    assert train("0") == 1


def test_resume_refuses_another_lipschitz_form(tmp_path: Path) -> None:
    _train(_split(), dataclasses.replace(CONFIG, epochs=1), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="objective.s lipschitz_form"):
        _train(_split(), dataclasses.replace(CONFIG, epochs=1), form="spectral",
               checkpoint_dir=tmp_path, resume=True)


def test_a_nan_stops_with_step_and_term_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    split = _split()
    calls = 0

    def task(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(logits, y) * (float("nan") if calls > 5 else 1.0)

    objective = PatrolObjective(split, task, precision="fp32")
    with pytest.raises(TrainingError, match="task term became nan at step 5") as caught:
        finetune(split, Batches(_images(), 16, shuffle=True), objective=objective, config=CONFIG,
                 checkpoint_dir=tmp_path, progress=False)
    assert caught.value.step == 5 and caught.value.term == "task"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-0001"]


@pytest.mark.parametrize("zero", [lambda logits: (0 * logits).sum(),
                                  lambda logits: (logits - logits.detach()).sum()],
                         ids=["nan", "inf"])
def test_a_gradient_that_is_not_finite_stops_before_its_step(
    tmp_path: Path, zero: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    split = _split()
    before: dict[str, torch.Tensor] = {}
    calls = 0

    def task(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls != 6:
            return F.cross_entropy(logits, y)
        before.update({n: p.detach().clone() for n, p in split.model.named_parameters()})
        return F.cross_entropy(logits, y) + zero(logits).sqrt()  # a root has no slope at 0

    def train(resume: bool) -> int:
        return finetune(split, Batches(_images(), 16), config=CONFIG, progress=False,
                        objective=PatrolObjective(split, task, precision="fp32"),
                        checkpoint_dir=tmp_path, resume=resume).resumed_from

    with pytest.raises(TrainingError, match="gradient became .* at step 5, though") as caught:
        train(resume=False)
    assert caught.value.step == 5 and caught.value.term == "gradient"
    assert all(torch.equal(p, before[n]) for n, p in split.model.named_parameters())
    assert train(resume=True) == 1
    assert all(bool(p.isfinite().all()) for p in split.model.parameters())


def test_finite_gradients_are_clipped_as_ever_where_their_norm_overflows() -> None:
    weight = nn.Parameter(torch.zeros(2))
    for gradient, clipped in (([30.0, 40.0], [3.0, 4.0]), ([3e30, 4e30], [0.0, 0.0])):
        weight.grad = torch.tensor(gradient)
        clip_gradients([weight], 5.0, 0, "gradient")
        torch.testing.assert_close(weight.grad, torch.tensor(clipped))


def test_labels_outside_the_outputs_are_refused() -> None:
    images = _images()
    images = ImageSet(images.images, images.labels + 1, ("a", "b", "c"))
    with pytest.raises(InputError, match=r"0\.\.1, as the model has 2 outputs; came 2"):
        finetune(_split().model, Batches(images, 16), config=CONFIG, progress=False)


def test_learning_rate_rises_and_falls_to_zero() -> None:
    config = dataclasses.replace(CONFIG, lr=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert max(rates) <= 1.0 and rates.index(max(rates)) == 10
    assert rates[0] < 0.1 and rates[100] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("change", [{"lr": 0.0}, {"epochs": -1}, {"distill_weight": 1.5},
                                    {"precision": "int8"}])
def test_config_refuses(change: dict) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        FinetuneConfig(**change)


def test_recalibration_is_the_plain_average() -> None:
    model = _split().model.eval()
    images = _images(32)
    model.bn1.running_mean.fill_(9.0)
    recalibrate_batchnorm(model, Batches(images, 8))
    with torch.no_grad():
        expected = model.conv1(images.pixels()).mean((0, 2, 3))
    torch.testing.assert_close(model.bn1.running_mean, expected)
    assert model.bn1.momentum == 0.1 and not model.bn1.training


def test_recalibration_without_a_batch_leaves_the_statistics() -> None:
    model = _split().model
    model.bn1.running_mean.fill_(9.0)
    before = copy.deepcopy(model.state_dict())
    for batches, most in (([], 50), (Batches(_images(), 8), 0)):
        with pytest.raises(InputError, match="at least one batch"):
            recalibrate_batchnorm(model, batches, max_batches=most)
        with pytest.raises(RuntimeError):
            recalibrate_batchnorm(model, [(torch.zeros(1, 4, 8, 8), torch.zeros(1))])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_accuracy_counts() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    with torch.no_grad():
        model[1].weight[0].fill_(-1.0)
        model[1].weight[1].fill_(1.0)
        model[1].bias.copy_(torch.tensor([96.0, -96.0]))
    assert accuracy(model, Batches(_images(), 10)) == 1.0
    with pytest.raises(InputError, match="came none"):
        accuracy(model, [])
