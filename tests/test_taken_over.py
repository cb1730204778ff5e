"""Finished models of an earlier run of the frontier, taken over by the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from patrol_prune.storage import load_state, save_state


@pytest.fixture(scope="module")
def frontier(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("frontier")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = tmp_path / "finished"
    save_state(folder / "baseline", {"w": torch.ones(2)}, {"accuracy": 0.8})
    save_state(folder / "models" / "taylor-layer3", {"w": torch.zeros(2)}, {"accuracy": 0.7})
    (folder / "rows").mkdir()
    (folder / "rows" / "taylor-layer3-0.json").write_text("[]")
    return folder


def arguments(frontier: ModuleType, work: Path, models: Path | None) -> object:
    return frontier.Frontier(data=work, work=work, models=models)


def test_everything_that_is_finished_is_taken_over(frontier: ModuleType, finished: Path,
                                                   tmp_path: Path) -> None:
    args = arguments(frontier, tmp_path / "work", finished)
    frontier.take_over(args)
    tensors, meta = load_state(args.work / "models" / "taylor-layer3")
    assert tensors["w"].tolist() == [0, 0] and meta["accuracy"] == 0.7
    assert frontier.dense_accuracy(args) == 0.8
    assert sorted(path.name for path in args.work.rglob("*") if path.is_file()) == sorted(
        path.name for path in finished.rglob("*") if path.is_file())


def test_what_is_there_is_kept(frontier: ModuleType, finished: Path, tmp_path: Path) -> None:
    args = arguments(frontier, tmp_path / "work", finished)
    frontier.take_over(args)
    row = args.work / "rows" / "taylor-layer3-0.json"
    row.write_text("[1]")
    frontier.take_over(args)
    assert row.read_text() == "[1]"


def test_models_of_two_dense_models_are_not_mixed(frontier: ModuleType, finished: Path,
                                                  tmp_path: Path) -> None:
    args = arguments(frontier, tmp_path / "work", finished)
    save_state(args.work / "baseline", {"w": torch.zeros(2)}, {"accuracy": 0.8})
    with pytest.raises(SystemExit, match="dense model of its own"):
        frontier.take_over(args)
    assert not (args.work / "models").exists()


def test_a_folder_without_models_is_refused(frontier: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected a folder with baseline"):
        frontier.take_over(arguments(frontier, tmp_path / "work", tmp_path))
    frontier.take_over(arguments(frontier, tmp_path / "work", None))
