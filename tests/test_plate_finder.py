"""Plates as private regions, in the vehicles' script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from vehicle_helpers import few_vehicles

import patrol_prune as pp
from patrol_prune.errors import InputError


@pytest.fixture(scope="module")
def script(import_vehicles: Callable[[str], ModuleType]) -> dict[str, Any]:
    """Modules of the script."""
    return {name: import_vehicles(name) for name in ("run", "pictures", "finder", "stages")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def people(script: Any, runs: Path) -> Any:
    return script["pictures"].everybody(few_vehicles(script, runs))


def test_masks_reach_a_little_beyond_the_plates(script: Any) -> None:
    box = torch.tensor([[[10.0, 20.0], [30.0, 20.0], [30.0, 32.0], [10.0, 32.0]]])
    mask = script["finder"].plate_masks(box, 40)
    expected = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    expected[..., 18:34, 7:33] = True  # 15% of 12 and of 20 pixels, centres inside
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("side", [64, 70])
def test_a_finder_takes_pictures_of_any_size(script: Any, side: int) -> None:
    finder = script["finder"].PlateFinder().eval()
    found = finder(torch.rand(2, 3, side, side))
    assert found.shape == (2, 1, side, side) and set(found.unique().tolist()) <= {0.0, 1.0}


def test_it_finds_plates_of_vehicles_that_it_has_not_seen(
    script: Any, people: Any, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, file = script["finder"], runs / "finder.safetensors"
    monkeypatch.setattr(module, "_BATCH", 16)
    monkeypatch.setattr(module, "_STEPS", 64)
    config = few_vehicles(script, runs, private_plates=0.25)
    assert module.regions(few_vehicles(script, runs), people.defender.images, None, file,
                          torch.device("cpu")) is None
    assert not file.exists()
    private = module.regions(config, people.defender.images, people.truth, file,
                             torch.device("cpu"))
    assert isinstance(private, pp.PrivateRegions) and private.share == 0.25
    found = private.masks(people.query.pixels()) > 0
    true = module.plate_masks(people.query.truth.boxes, 64)
    both = (found & true).flatten(1).sum(1)
    assert (both / true.flatten(1).sum(1)).mean() > 0.8
    assert (both / (found | true).flatten(1).sum(1)).mean() > 0.6
    # kept: another start takes it from there, and learns nothing
    monkeypatch.setattr(module, "learn", None)
    again = module.regions(config, people.defender.images, people.truth, file, torch.device("cpu"))
    assert torch.equal(again.masks(people.query.pixels()) > 0, found)


@pytest.mark.parametrize("bias", [-9.0, 9.0])
def test_a_finder_that_marks_nothing_or_everything_is_refused(
    script: Any, people: Any, runs: Path, monkeypatch: pytest.MonkeyPatch, bias: float
) -> None:
    monkeypatch.setattr(script["finder"], "learn",
                        lambda finder, *_, **__: finder.last.bias.data.fill_(bias))
    file = runs / "blind.safetensors"
    with pytest.raises(InputError, match=r"overlap plates by 50% or more, came \d+%"):
        script["finder"].regions(few_vehicles(script, runs, private_plates=0.5),
                                 people.defender.images, people.truth, file, torch.device("cpu"))
    assert not file.exists()


def test_a_share_out_of_its_range_is_refused(script: Any, runs: Path) -> None:
    for share in (-0.1, 1.5):
        with pytest.raises(InputError, match="private_plates as a share from 0 to 1"):
            few_vehicles(script, runs, private_plates=share)


def test_the_result_tells_it(script: Any, runs: Path) -> None:
    assert script["finder"].notes(few_vehicles(script, runs)) == []
    (told,) = script["finder"].notes(few_vehicles(script, runs, private_plates=0.5))
    assert "50% of an error was counted on plates" in told and "aimed_ssim" in told


@pytest.mark.slow
def test_a_whole_run_that_aims_at_plates(script: Any, runs: Path) -> None:
    """Detector, scores, training, attack, page; and the same again from the finder that is kept."""
    short = {"epochs": 1, "inner_steps": 1, "surrogate_warmup_steps": 2}
    config = few_vehicles(
        script, runs, name="aimed", at="layer3", private_plates=0.5, bits=2, train={"epochs": 1},
        finetune={**short, "distill_weight": 0.0}, rounded=short,
        score={"batches": 2, "surrogate_steps": 2},
        attackers={"victims": 8, "reader_share": 0.4, "attacks": ["linear_inverse"]},
        attacker={"width": 8, "depth": 1, "epochs": 1, "max_extensions": 0, "mirror": False})
    result = script["run"].run(config)
    folder = runs / "aimed"
    assert (folder / "checkpoints" / "finder.safetensors").is_file()
    for about in result["methods"].values():
        rows = {r["attack"]: r for r in about["audit"]["records"] if r["subject"] == "edge"}
        assert set(rows) == {"linear_inverse", "aimed_ssim"}
        assert all(-1 <= r["private_ssim"] <= 1 for r in rows.values())
        readers = {r["attack"] for r in about["audit"]["leaks"]["characters"]["rows"]}
        assert "aimed_ssim" in readers
    assert any("counted on plates" in note for note in result["notes"])
    page = (folder / "index.html").read_text()
    assert "on the plates alone" in page and "aimed_ssim" not in page.split("<table")[0]
    assert script["run"].run(config) == result
