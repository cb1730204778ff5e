"""The shared study: resumed, shared by processes, and not blocked by one that was killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tune_helpers import made

from patrol_prune import tune_study, tune_workers
from patrol_prune.errors import (
    InputError,
    MissingPackageError,
    PatrolError,
    RunDirectoryError,
    TrainingError,
)
from patrol_prune.tune_result import Limits, TuneTrial
from patrol_prune.tune_study import SharedStudy, masked

fork = multiprocessing.get_context("fork")


def opened(folder: Path, storage: str | None = None) -> SharedStudy:
    return SharedStudy("s", storage, folder, seed=0)


def easy(trial: Any) -> TuneTrial:
    """More beta, less accuracy and less likeness; under 0.5 the floor of 0.5 is missed."""
    beta = trial.suggest_float("beta", 1.0, 100.0, log=True)
    return made(trial.number, 1 - beta / 100, 1 / beta, beta=beta, limits=Limits(100, 0.5))


def test_trials_are_counted_over_calls_and_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        study.join({"a": 1, "b": {"c": (1, 2)}}, ())
        for _ in range(2):
            study.work(easy, 5)
    with opened(tmp_path) as study:
        study.join({"a": 1, "b": {"c": (1, 2)}}, ())
        assert study.counts() == (2, 0)
        while study.counts()[0] < 5:
            study.work(easy, 5)
        study.work(easy, 5)  # one too many is not run
        trials = study.trials()
    assert [t.number for t in trials] == list(range(5))
    assert len({t.beta for t in trials}) == 5


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        study.join({"a": 1, "trials": 5, "b": {"c": [1]}}, ("trials",))
        study.join({"a": 1, "trials": 9, "b": {"c": (1,)}}, ("trials",))
        with pytest.raises(RunDirectoryError, match=r"b\.c: \[1\] there, \[2\] now"):
            study.join({"a": 1, "trials": 5, "b": {"c": [2]}}, ("trials",))


def test_other_images_are_refused_in_words_not_by_their_digests(tmp_path: Path) -> None:
    there, now = ({"a": a, "images": digit * 64, "places": [{"name": digit * 9}],
                   "weights_digest": digit * 64} for a, digit in ((1, "3"), (2, "4")))
    with opened(tmp_path) as study:
        study.join(there, ())
        with pytest.raises(RunDirectoryError) as refused:
            study.join(now, ())
        assert "333" not in str(refused.value) and "444" not in str(refused.value)
        for told in ("a: 1 there, 2 now", "images: others", "places: others", "weights_digest: an"):
            assert told in str(refused.value)
        with pytest.raises(RunDirectoryError, match="weights_digest: '3+' there, None now"):
            study.join({**there, "weights_digest": None}, ())


def test_a_study_of_an_earlier_release_has_the_defaults_of_what_it_did_not_know(
    tmp_path: Path,
) -> None:
    with opened(tmp_path) as study:
        study.join({"a": 1, "was_compared": 3}, ())
        study.join({"a": 1, "was_compared": 4}, ("was_compared",))
        study.join({"a": 1, "new": {"b": 2}}, ("was_compared",), {"new": {"b": 2}, "a": 7})
        with pytest.raises(RunDirectoryError, match="2 there, 3 now"):
            study.join({"a": 1, "new": {"b": 3}}, ("was_compared",), {"new": {"b": 2}})


def test_the_same_seed_tries_the_same_values(tmp_path: Path) -> None:
    betas = []
    for name in ("one", "two"):
        with opened(tmp_path / name) as study:
            for _ in range(13):  # past the sampler's random beginning
                study.work(easy, 13)
            betas.append([t.beta for t in study.trials()])
    assert betas[0] == betas[1]


def test_a_trial_that_fails_is_kept_with_its_reason_and_counts(tmp_path: Path) -> None:
    def failing(trial: Any) -> TuneTrial:
        raise TrainingError("the loss is NaN", step=1, term="task")

    with opened(tmp_path) as study:
        study.work(failing, 5)
        study.work(easy, 5)
        assert study.failures() == {0: "the loss is NaN"}
        assert study.counts() == (2, 0)
        assert [t.number for t in study.trials()] == [1]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug")])
def test_what_is_not_the_trials_fault_ends_the_search_and_does_not_count(
    tmp_path: Path, error: BaseException
) -> None:
    def stopped(trial: Any) -> TuneTrial:
        raise error

    with opened(tmp_path) as study:
        with pytest.raises(type(error)):
            study.work(stopped, 5)
        assert study.counts() == (0, 0)
        study.work(easy, 1)
        assert study.counts() == (1, 0)


def in_processes(target: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    processes = [fork.Process(target=target, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def share(folder: Path, storage: str | None, most: int) -> None:
    def slowly(trial: Any) -> TuneTrial:
        time.sleep(0.02)
        (folder / f"{os.getpid()}-{trial.number}.ran").touch()
        return easy(trial)

    with opened(folder, storage) as study:
        while study.counts()[0] < most:
            if sum(study.counts()) < most:
                study.work(slowly, most)
            time.sleep(0.05)


def test_two_processes_share_one_journal(tmp_path: Path) -> None:
    in_processes(share, tmp_path, None, 8)
    with opened(tmp_path) as study:
        trials = study.trials()
    assert len(trials) == len({t.beta for t in trials}) == 8
    ran = [p.name.split("-") for p in tmp_path.glob("*.ran")]
    assert len(ran) == 8 and len({pid for pid, _ in ran}) == 2


@pytest.mark.slow
def test_two_processes_share_one_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    in_processes(share, tmp_path, url, 4)
    with opened(tmp_path, url) as study:
        assert len(study.trials()) == 4


def hang(folder: Path, storage: str | None) -> None:
    def forever(trial: Any) -> TuneTrial:
        (folder / "begun").touch()
        time.sleep(600)
        raise AssertionError

    opened(folder, storage).work(forever, 5)


@pytest.mark.parametrize("kind", [
    "journal", pytest.param("database", marks=pytest.mark.slow)])
def test_a_killed_worker_s_trial_fails_and_does_not_count(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_study, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(tune_study, "SILENCE_SECONDS", 3)
    storage = None if kind == "journal" else f"sqlite:///{tmp_path / 'study.db'}"
    process = fork.Process(target=hang, args=(tmp_path, storage))
    process.start()
    while not (tmp_path / "begun").exists():
        assert process.is_alive()
        time.sleep(0.02)
    with opened(tmp_path, storage) as study:
        assert study.release_dead() == [] and study.counts() == (0, 1)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        end = time.monotonic() + (0.0 if kind == "journal" else 60.0)
        gone = study.release_dead()
        while not gone and time.monotonic() < end:
            time.sleep(0.5)
            gone = study.release_dead()
        assert gone == [0]
        assert study.counts() == (0, 0) and study.failures() == {}
        study.work(easy, 1)
        assert [t.number for t in study.trials()] == [1]


def test_a_worker_on_another_machine_is_gone_when_its_file_grows_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as study:
        mine = study.worker
        other = mine.folder / "elsewhere-1-abcd"
        other.touch()
        assert mine.is_alive(other.name) and mine.is_alive(mine.name)
        old = time.time() - tune_workers.GIVEN_UP_SECONDS - 5
        os.utime(other, (old, old))
        assert not mine.is_alive(other.name)
        assert not mine.is_alive("elsewhere-2-never")


def test_a_trial_that_others_gave_up_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as study, opened(tmp_path) as other:
        def presumed_dead(trial: Any) -> TuneTrial:
            other.worker.is_alive = lambda name: False  # type: ignore[method-assign]
            assert other.release_dead() == [0]
            return easy(trial)

        study.work(presumed_dead, 5)
        assert "given up by the other workers" in caplog.text
        assert study.counts() == (0, 0)


def test_without_optuna_the_command_to_type_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingPackageError, match="pip install 'optuna>=4'"):
        tune_study.require_optuna()
    assert issubclass(MissingPackageError, PatrolError)


def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    url = "sqlite:///" + str(tmp_path / "no" / "folder" / "study.db")
    with pytest.raises(InputError, match="cannot be opened"):
        opened(tmp_path, url)
    with pytest.raises(InputError) as error:
        opened(tmp_path, "nosuchsql://me:secret@host/db")
    assert "secret" not in str(error.value) and "me:***@host" in str(error.value)


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, cut: int) -> None:
    """As a killed writer or a full disk leaves it."""
    with opened(tmp_path) as study:
        study.work(easy, 2)
    journal = tmp_path / "journal.log"
    journal.write_bytes(journal.read_bytes()[:-cut])
    for _ in range(2):  # what is appended comes in lines of its own
        with opened(tmp_path) as study:
            study.release_dead()
            study.work(easy, 9)
    with opened(tmp_path) as study:
        assert len(study.trials()) in (2, 3)


def test_a_line_cut_off_beside_a_living_worker(tmp_path: Path) -> None:
    journal = tmp_path / "journal.log"
    with opened(tmp_path) as study:
        study.work(easy, 9)
        with journal.open("ab") as file:
            file.write(b'{"op_code":4,"worker')
        study.work(easy, 9)
        assert len(study.trials()) == 2
    with opened(tmp_path) as study:
        assert len(study.trials()) == 2


def test_a_damaged_journal_is_told(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        study.work(easy, 9)
    journal = tmp_path / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], b"no line\n", *lines[2:]]))
    with pytest.raises(RunDirectoryError, match="journal.log is damaged"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", ["text", "folder", "below a file"])
def test_what_is_no_journal_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "notes"
    if kind == "folder":
        place.mkdir()
    else:
        place.write_text("a note\nand no newline", encoding="utf-8")
    with pytest.raises(InputError, match="Optuna's journal or is not there"):
        opened(tmp_path / "study", str(place / "below" if kind == "below a file" else place))
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]
    assert kind == "folder" or place.read_text(encoding="utf-8") == "a note\nand no newline"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:p@ss@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:p?ss@host/db?a=b@c", "postgresql://me:***@c"),
        ("postgresql://me:p/w@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("postgresql://host:5432/db?options=a@b", "postgresql://host:***@b"),  # or it is a password
        ("postgresql://host:5432/db", "postgresql://host:5432/db"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dsecret",
         "mssql+pyodbc:///?odbc_connect=***"),
        ("mysql://host/db?x=1;password=zz", "mysql://host/db?x=1;password=***"),
        ("postgresql://host/db?user=me&password=secret&x=1",
         "postgresql://host/db?user=me&password=***&x=1"),
        ("sqlite:///study.db", "sqlite:///study.db"),
        ("shared/journal.log", "shared/journal.log"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert masked(url) == shown
