"""Models whose answers are no class of a picture: masks, numbers, several answers at once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import patrol_prune as pp
from patrol_prune.distillation import Distiller, logit_distance
from patrol_prune.errors import InputError
from patrol_prune.evaluation import accuracy
from patrol_prune.surrogate import SurrogateSpec

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ONE = (SurrogateSpec("transposed", 8),)


def config(**more: Any) -> pp.FinetuneConfig:
    return pp.FinetuneConfig(epochs=1, lr=0.05, surrogate_warmup_steps=1, **more)


class Two(nn.Module):
    """A mask and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.mask, self.number = nn.Conv2d(4, 3, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(self.stem(x).relu()).relu()
        return {"mask": self.mask(h), "number": self.number(h.mean((2, 3)))}


def test_a_distance_of_masks_is_the_mean_over_their_pixels() -> None:
    own, target = torch.randn(2, 2, 5, 6, 7).unbind(0)
    flat = [v.permute(0, 2, 3, 1).reshape(-1, 5) for v in (own, target)]
    torch.testing.assert_close(logit_distance(own, target, 3.0), logit_distance(*flat, 3.0))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 8, 8)])
def test_answers_without_classes_are_not_distilled(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="distill_weight to 0"):
        Distiller(nn.Identity(), nn.Identity(), 1.0)(torch.randn(shape), torch.randn(shape))


def test_a_teacher_of_several_answers_can_teach_features_alone() -> None:
    model, teacher = Two(), Two()
    with pytest.raises(InputError, match="Set distill_weight to 0"):
        Distiller(model, teacher, 1.0)(X, model(X))
    distiller = Distiller(model, teacher, 1.0, features=True, answers=False)
    distiller.attach()
    distance, features = distiller(X, model(X))
    assert distance is None and features is not None and float(features.detach()) > 0


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_several_targets_reach_a_loss_that_takes_them(precision: str) -> None:
    model, came = Two(), []

    def loss(answers: dict[str, Tensor], y: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        came.append({value.dtype for value in answers.values()})
        return (F.cross_entropy(answers["mask"], y[0])
                + F.mse_loss(answers["number"], y[1]["number"]))

    y = (torch.zeros(4, 8, 8, dtype=torch.long), {"number": torch.ones(4, 1)})
    split = pp.Split(model, X, at="stem")
    objective = pp.PatrolObjective(split, loss, beta=1.0, surrogates=ONE, surrogate_loss="mse")
    history = pp.finetune(split, [(X, y)] * 6, objective=objective, teacher=Two(), progress=False,
                          config=config(precision=precision, distill_weight=0.0,
                                        feature_weight=0.1)).history
    assert all(dtypes == {torch.float32} for dtypes in came)
    assert "distillation" not in history[0] and history[0]["features"] > 0
    assert float(loss(model(X), y)) < float(loss(Two()(X), y))


def test_a_teacher_of_numbers_is_warned_of() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(),
                        nn.Linear(32, 2))
    split = pp.Split(net, X, at="1")
    y = torch.zeros(4, 2)
    for task_loss, told in ((F.mse_loss, True), (nn.BCEWithLogitsLoss(), True),
                            (F.cross_entropy, False)):
        objective = pp.PatrolObjective(split, task_loss)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pp.finetune(split, [(X, y)], objective=objective, config=config(), progress=False,
                        teacher=copy.deepcopy(net))
        assert any("distill_weight=0" in str(w.message) for w in caught) is told


def test_the_accuracy_of_masks_is_a_share_of_their_pixels() -> None:
    classes = torch.randint(0, 3, (4, 8, 8), generator=torch.Generator().manual_seed(1))
    logits = F.one_hot(classes, 3).permute(0, 3, 1, 2).float()
    labels = classes.clone()
    labels[:, 0] = (labels[:, 0] + 1) % 3  # an eighth of the pixels
    assert accuracy(nn.Identity(), [(logits, labels)], device="cpu") == 1 - 1 / 8


@pytest.mark.parametrize(("answers", "y"), [
    (torch.zeros(4, 1), torch.zeros(4)), (torch.zeros(4, 6), torch.zeros(4, 6)),
    (torch.zeros(4), torch.zeros(4, dtype=torch.long)),
    (torch.zeros(4, 6), torch.zeros(4, 1, dtype=torch.long)),
])
def test_what_is_no_class_has_no_accuracy(answers: Tensor, y: Tensor) -> None:
    with pytest.raises(InputError, match="leave val_batches out"):
        accuracy(nn.Identity(), [(answers, y)], device="cpu")


def test_videos_can_be_trained_on() -> None:
    net = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 2 * 6 * 6, 2))
    batches = [(torch.rand(4, 3, 4, 8, 8), torch.tensor([0, 1, 0, 1]))] * 2
    before = net[0].weight.detach().clone()
    pp.finetune(net, batches, config=config(), progress=False)
    assert not torch.equal(net[0].weight, before)


def test_a_model_without_a_split_point_names_the_way_out() -> None:
    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = F.interpolate(self.last(self.first(x)), size=x.shape[-2:])
            return answer

    with pytest.raises(InputError, match="Split.from_modules") as error:
        pp.Split(Resized(), X, at="first")
    assert "none" not in str(error.value)


def test_validation_that_one_epoch_would_use_up_is_refused_before_any_training() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    batches = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))]
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match="val_batches that can be read again .* came generator"):
        pp.finetune(net, batches, config=config(), progress=False, val_batches=(b for b in batches))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


EMPTY = (torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.long))
GOOD = (torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize(("val", "told"), [
    ([(GOOD[0], GOOD[1].float())], "leave val_batches out"), ([], "came none"),
    ([EMPTY], "came none"), ([(*GOOD, GOOD[1])], "came a tuple of 3"),
    ([(GOOD[0][:1], torch.tensor(1))], "leave val_batches out"),
    ([{"x": GOOD[0], "y": GOOD[1]}], "came a dict of x, y"), (5, "val_batches .* came int"),
])
def test_validation_that_cannot_be_measured_is_refused_before_any_training(
    val: Any, told: str
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match=told):
        pp.finetune(net, [GOOD], config=config(), progress=False, val_batches=val)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_validation_is_looked_at_once_before_a_training_and_not_after_its_end(
    tmp_path: Path
) -> None:
    class Counted(list):  # type: ignore[type-arg]
        read, epoch = 0, 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[Any]:
            self.read += 1
            self.epoch += 1
            return super().__iter__()

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    val = Counted([EMPTY, GOOD])
    for reads in (2, 2):
        pp.finetune(net, [GOOD], config=config(), progress=False, val_batches=val, resume=True,
                    checkpoint_dir=tmp_path / "epochs")
        assert (val.read, val.epoch) == (reads, 1)


def test_looking_at_validation_first_changes_no_draw() -> None:
    x, y = torch.rand(8, 3, 8, 8), torch.tensor([0, 1] * 4)
    data = TensorDataset(x, y)

    def trained(**more: object) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
                            nn.Linear(4 * 36, 2))
        loader = DataLoader(data, 4, shuffle=True)
        pp.finetune(net, loader, config=config(), progress=False, **more)  # type: ignore[arg-type]
        return net.state_dict()

    mine = DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(3))
    shuffled = DataLoader(data, 4, shuffle=True)
    for val in (mine, shuffled):
        other = trained(val_batches=val)
        assert all(torch.equal(v, other[k]) for k, v in trained().items())
    stood = torch.Generator().manual_seed(3)
    list(DataLoader(data, 4, shuffle=True, generator=stood))
    assert torch.equal(mine.generator.get_state(), stood.get_state())  # read once, after the epoch
