"""Training on pictures that carry other vehicles' plates, in the vehicles' script."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from vehicle_helpers import few_vehicles

from patrol_prune.errors import InputError
from patrol_prune.leaks import plate_cells
from patrol_prune.rundir import RunDirectory


@pytest.fixture(scope="module")
def script(import_vehicles: Callable[[str], ModuleType]) -> dict[str, Any]:
    """Modules of the script."""
    return {name: import_vehicles(name) for name in ("run", "pictures", "plates", "stages")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def people(script: Any, runs: Path) -> Any:
    return script["pictures"].everybody(few_vehicles(script, runs))


def _outside(boxes: torch.Tensor, side: int) -> torch.Tensor:
    """Pixels whose centre is outside of the rectangle around a plate, `[N, 1, side, side]`."""
    at = torch.arange(side) + 0.5
    low, high = boxes.amin(1), boxes.amax(1)
    x, y = ((at < low[:, i, None]) | (at > high[:, i, None]) for i in (0, 1))
    return (x[:, None, :] | y[:, :, None])[:, None]


def test_a_vehicles_own_plate_changes_nothing(script: Any, people: Any) -> None:
    images, boxes = people.defender.images, people.truth.boxes.double()
    assert torch.equal(script["plates"].paste_plates(images, boxes, images, boxes), images)


def test_the_donors_plate_is_seen_and_all_around_it_stays(script: Any, people: Any) -> None:
    images, boxes = people.defender.images, people.truth.boxes.double()
    n = len(images)
    donors = (torch.arange(n) + n // 2) % n
    seen = ~(people.truth.hidden | people.truth.hidden[donors])
    pasted = script["plates"].paste_plates(images, boxes, images[donors], boxes[donors])
    outside = _outside(boxes, images.shape[-1]).expand_as(images)
    assert torch.equal(pasted[outside], images[outside])

    def likeness(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        cells = [plate_cells(some.float() / 255, where, 3).flatten(1)
                 for some, where in ((pasted, boxes), (one, two))]
        return torch.cosine_similarity(*cells)[seen]

    theirs, own = likeness(images[donors], boxes[donors]), likeness(images, boxes)
    assert theirs.median() > 0.85 and own.median() < 0.6
    assert (theirs > own).float().mean() > 0.95


def test_batches_are_those_without_it_but_for_the_plates(script: Any, people: Any,
                                                         runs: Path) -> None:
    config, make = few_vehicles(script, runs), script["plates"].training_batches
    for augment in (False, True):
        plain, swapped, again = (
            list(make(config, people, 2, augment=augment, swapped=on))
            for on in (False, True, True))
        for (x, y), (other, labels), (same, _) in zip(plain, swapped, again, strict=True):
            assert torch.equal(y, labels) and torch.equal(other, same)
            changed = (x != other).any(1).flatten(1).float().mean(1)
            assert changed.min() > 0 and changed.max() < 0.3
    second = make(config, people, 2, augment=False, swapped=True)
    second.set_epoch(1)
    assert not torch.equal(next(iter(second))[0], swapped[0][0])


def test_plates_come_from_other_vehicles_and_from_where_nothing_hides_them(
    script: Any, people: Any
) -> None:
    labels, count = people.defender.labels, len(people.defender)
    hidden = torch.ones(count, dtype=torch.bool)
    first, other = 0, int((labels != labels[0]).nonzero()[0])
    hidden[[first, other]] = False
    truth = replace(people.truth, hidden=hidden)
    batches = script["plates"].SwappedPlates(people.defender, 4, 3, truth=truth)
    images, boxes, index = people.defender.images, people.truth.boxes.double(), torch.arange(count)
    found = batches.chosen(index, torch.Generator().manual_seed(0))
    made = [script["plates"].paste_plates(images, boxes, images[[k] * count], boxes[[k] * count])
            for k in (first, other)]
    one, two = ((found == some).flatten(1).all(1) for some in made)
    assert bool((one | two).all()) and bool(one.any()) and bool(two.any())
    assert not bool(one[labels == labels[first]].any())
    assert not bool(two[labels == labels[other]].any())
    hidden[other] = True
    with pytest.raises(InputError, match="at least 2 vehicles"):
        script["plates"].SwappedPlates(people.defender, 4, 3, truth=replace(truth, hidden=hidden))


def test_a_teacher_that_tells_plates_is_refused(script: Any, runs: Path) -> None:
    with pytest.raises(InputError, match="no teacher beside swap_plates"):
        few_vehicles(script, runs, swap_plates=True)


@pytest.mark.parametrize("on", [False, True])
def test_the_dense_model_learns_from_the_pictures_as_they_are(
    script: Any, people: Any, runs: Path, tmp_path: Path, on: bool
) -> None:
    swapping = script["plates"].SwappedPlates
    with RunDirectory(tmp_path / "run", {}) as folder:
        config = few_vehicles(script, runs, swap_plates=on, finetune={"distill_weight": 0.0})
        work = script["stages"].Work(config, folder, lambda *_: None, people)
        for stage in ("dense", "taylor", "patrol"):
            work.stage = stage
            assert isinstance(work.batches(2), swapping) is (on and stage != "dense")


@pytest.mark.parametrize("option", [
    ["--swap-plates", "true", "--finetune.distill-weight", "0"], ["--private-plates", "0.5"]])
def test_a_set_that_tells_no_plates_is_refused_before_the_run(
    script: Any, tmp_path: Path, capsys: Any, write_folder: Callable[..., Path],
    option: list[str],
) -> None:
    photos = write_folder(tmp_path / "photos", parts=("train",), count=60)
    write_folder(tmp_path / "photos", parts=("test",), count=4)
    assert script["run"].main([
        "--data", str(photos), "--layout", "folder", "--image-size", "16", "--at", "layer1",
        "--batch.identities", "3", *option, "--runs", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr().err
    assert "tells where plates are" in told and "Leave it out" in told
    assert not (tmp_path / "runs").exists()
