"""A run directory: resumed with the same settings, refused with others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from patrol_prune.errors import InputError, RunDirectoryError
from patrol_prune.rundir import RunDirectory, flatten, read_config

CONFIG = {
    "model": "resnet18", "seed": 0, "data": {"root": "images", "size": (1, 2)}, "device": "cpu",
}


def test_a_new_run_writes_its_settings(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "runs" / "a", flatten_lists(CONFIG)) as run:
        assert not run.resumed
        run.event("hello", n=1)
    assert read_config(tmp_path / "runs" / "a" / "config.yaml") == flatten_lists(CONFIG)
    line = json.loads((tmp_path / "runs" / "a" / "events.jsonl").read_text())
    assert (line["event"], line["n"]) == ("hello", 1)


def flatten_lists(config: dict[str, object]) -> dict[str, object]:
    return json.loads(json.dumps(config))


def test_the_same_settings_resume(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a", flatten_lists(CONFIG)) as run:
        (run / "plan.json").write_text("{}")
        run.finish("plan", ["plan.json"], recommended="layer2")
    with RunDirectory(tmp_path / "a", flatten_lists(CONFIG)) as run:
        assert run.resumed and run.done("plan") and not run.done("prune")
        assert run.notes("plan") == {"recommended": "layer2"}
        run.forget(["plan"])
        assert not run.done("plan")


@pytest.mark.parametrize("harm", ["change", "remove"])
def test_a_stage_whose_file_changed_is_not_done(tmp_path: Path, harm: str) -> None:
    with RunDirectory(tmp_path / "a", {}) as run:
        (run / "figures").mkdir()
        (run / "figures" / "one.png").write_bytes(b"one")
        run.finish("report", ["figures"])
        assert run.done("report")
        if harm == "change":
            (run / "figures" / "one.png").write_bytes(b"two")
        else:
            (run / "figures" / "one.png").unlink()
        assert not run.done("report")


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a", flatten_lists(CONFIG)):
        pass
    other = {**flatten_lists(CONFIG), "seed": 1, "device": "cuda"}
    other["data"] = {"root": "photos", "size": [1, 2]}
    with pytest.raises(RunDirectoryError) as error:
        RunDirectory(tmp_path / "a", other, free_keys={"device"})
    text = str(error.value)
    assert "seed: 0 there, 1 now" in text and "data.root: 'images' there, 'photos' now" in text
    assert "model" not in text and "device" not in text and "size" not in text
    assert "--name" in text and "--overwrite" in text
    with RunDirectory(tmp_path / "a", flatten_lists(CONFIG)) as run:  # the lock was given back
        assert run.resumed


def test_what_lies_elsewhere_may_differ_where_it_was_noted(tmp_path: Path) -> None:
    noted = {"data": ("data", "digest"), "weights": ("data", "sha")}
    with RunDirectory(tmp_path / "a", {"data": "x", "weights": "w"}):
        pass
    with pytest.raises(RunDirectoryError, match="data: 'x' there, 'y' now"):
        RunDirectory(tmp_path / "a", {"data": "y", "weights": "w"}, noted=noted)
    with RunDirectory(tmp_path / "a", {"data": "x", "weights": "w"}) as run:
        run.finish("data", digest="0a", sha=None)
    with RunDirectory(tmp_path / "a", {"data": "y", "weights": "w"}, noted=noted) as run:
        assert run.resumed and run.digests("data") == {}
    for weights in (None, "v"):  # left out, or of an earlier release that noted none
        with pytest.raises(RunDirectoryError, match="weights: 'w' there"):
            RunDirectory(tmp_path / "a", {"data": "y", "weights": weights}, noted=noted)


def test_an_interrupted_overwrite_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings go last: without them, the rest would be a stranger's."""
    with RunDirectory(tmp_path / "a", {"seed": 0}) as run:
        for name in ("checkpoints", "figures"):
            (run / name).mkdir()

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("patrol_prune.storage.shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            RunDirectory(tmp_path / "a", {"seed": 1}, overwrite=True)
    assert read_config(tmp_path / "a" / "config.yaml") == {"seed": 0}
    (tmp_path / "a" / "config.yaml").unlink()  # as an earlier release left it
    with pytest.raises(RunDirectoryError, match="holds no run"):
        RunDirectory(tmp_path / "a", {"seed": 1})
    with RunDirectory(tmp_path / "a", {"seed": 1}, overwrite=True) as run:
        assert {p.name for p in run.path.iterdir()} == {".lock", "config.yaml"}


def test_overwrite_removes_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a", {"seed": 0}) as run:
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk" / "mine").write_text("keep")
        (run / "checkpoints").symlink_to(tmp_path / "disk", target_is_directory=True)
    with RunDirectory(tmp_path / "a", {"seed": 1}, overwrite=True) as run:
        assert not (run / "checkpoints").exists()
    assert (tmp_path / "disk" / "mine").read_text() == "keep"


@pytest.mark.parametrize("name", ["runs", "runs/a", "runs/a/b"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(RunDirectoryError, match="runs is a file"):
        RunDirectory(tmp_path / name, {})


def test_overwrite_clears_a_run_and_nothing_else(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a", {"seed": 0}) as run:
        (run / "plan.json").write_text("{}")
        (run / "mine.txt").write_text("keep")
        run.finish("plan", ["plan.json"])
    with RunDirectory(tmp_path / "a", {"seed": 1}, overwrite=True) as run:
        assert not run.resumed and not run.done("plan")
        assert not (run / "plan.json").exists()
        assert (run / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_is_no_run_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"thesis\.tex"):
        RunDirectory(tmp_path, {}, overwrite=overwrite)
    with pytest.raises(RunDirectoryError, match="is a file"):
        RunDirectory(tmp_path / "thesis.tex", {}, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with RunDirectory(tmp_path / "a", {}):
        with pytest.raises(RunDirectoryError, match="Another process"):
            RunDirectory(tmp_path / "a", {})
    with RunDirectory(tmp_path / "a", {}):
        pass


@pytest.mark.parametrize("text", ["", "[]", "{", '{"stages": {"plan": 3}}'])
def test_a_torn_manifest_does_everything_again(tmp_path: Path, text: str) -> None:
    with RunDirectory(tmp_path / "a", {}) as run:
        run.finish("plan")
    (tmp_path / "a" / "manifest.json").write_text(text)
    with RunDirectory(tmp_path / "a", {}) as run:
        assert not run.done("plan")


@pytest.mark.parametrize("text", ["- 1", "a: [", "\x00"])
def test_settings_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=r"c\.yaml"):
        read_config(tmp_path / "c.yaml")
    with pytest.raises(InputError, match="none"):
        read_config(tmp_path / "none.yaml")


def test_flatten() -> None:
    nested = {"a": {"b": (1, 2), "c": {}}, "d": None}
    assert flatten(nested) == {"a.b": [1, 2], "a.c": {}, "d": None}


def test_overwrite_clears_a_runs_own_outputs_too(tmp_path: Path) -> None:
    for overwrite, kept in ((False, True), (True, False)):
        with RunDirectory(tmp_path / "a", {}, overwrite=overwrite, outputs=["mine"]) as run:
            (run / "theirs").mkdir(exist_ok=True)
            assert (run / "mine").exists() is (kept and run.resumed)
            (run / "mine").mkdir(exist_ok=True)
    with RunDirectory(tmp_path / "a", {}, overwrite=True, outputs=["mine"]) as run:
        assert not (run / "mine").exists() and (run / "theirs").is_dir()
