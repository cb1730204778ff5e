"""The study that all workers share: the one module that knows Optuna.

It is kept in Optuna's journal, a file that several processes append to, or in a database. Trials
of a worker that was killed are marked as failed and do not count: in a database by Optuna's
heartbeat, beside a journal by the workers' own (`tune_workers`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patrol_prune.errors import InputError, MissingPackageError, PatrolError, RunDirectoryError
from patrol_prune.rundir import flatten
from patrol_prune.tune_result import TuneTrial
from patrol_prune.tune_workers import Worker

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

FOUND, ERROR, WORKER, SETTINGS = "found", "error", "worker", "settings"
_IN_WORDS = {  # what is long, or a digest
    "images": "others now than there, by their pixels or labels",
    "places": "others now than there, or of another cost (it follows from the model and budget)",
    "weights_digest": "another file of weights now than there",
}
HEARTBEAT_SECONDS, SILENCE_SECONDS = 30, 150
_NAMELESS_SECONDS = 60
_JOURNAL_BEGINS = b'{"op_code":'
_SECRET = re.compile("pass|pwd|secret|token|key", re.IGNORECASE)
Attempt = Callable[[Any], TuneTrial]
"""Takes an `optuna.Trial` to ask for values, and returns what was found there."""


class _Failed(Exception):
    """The trial failed for a reason that is kept with it."""


class _NotNeeded(Exception):
    """Another worker began the last trial at the same moment."""


def require_optuna() -> Any:
    """The module `optuna`.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingPackageError(
            "The search needs Optuna, which is not installed here. Type: pip install 'optuna>=4'"
        ) from error
    return optuna


class SharedStudy:
    """One worker's view of the study; close it at the end.

    Args:
        name: of the study.
        storage: a URL, a path, or None for a journal in `folder`.
        folder: of the study on this machine.
        seed: of the sampler; each trial's values follow from it, its number, and those before.
    """

    def __init__(self, name: str, storage: str | None, folder: Path, seed: int) -> None:
        self._optuna = require_optuna()
        self._seed = seed
        url = storage is not None and "://" in storage
        journal = Path(storage) if storage and not url else folder / "journal.log"
        if not url:
            _check_journal(journal)
        self.worker = Worker(journal.parent / f"{journal.stem}.workers")
        self._heartbeat = url
        try:
            with self._quiet():
                kept = self._database(storage or "") if url else self._journal(journal)
                self._study = self._optuna.create_study(
                    study_name=name, storage=kept, directions=("maximize", "minimize"),
                    load_if_exists=True,
                )
        except BaseException:
            self.worker.close()
            raise

    def __enter__(self) -> SharedStudy:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()

    def _journal(self, file: Path) -> Any:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        # Not the default lock, a link: it is never given up where its relative target dangles.
        lock = JournalFileOpenLock(str(file))

        class Whole(JournalFileBackend):
            """Never appends to a line that was cut off."""

            def append_logs(self, logs: list[dict[str, Any]]) -> None:
                _drop_torn_line(file, lock)
                super().append_logs(logs)

        _drop_torn_line(file, lock)
        try:
            return JournalStorage(Whole(str(file), lock))
        except Exception as error:  # whatever Optuna makes of it
            raise RunDirectoryError(
                f"The study's journal {file} is damaged and cannot be read "
                f"({type(error).__name__}: {error}). Put a copy of it back, or give the search "
                "another --name or --storage."
            ) from error

    def _database(self, url: str, tries: int = 3) -> Any:
        """Several workers may make the tables of a new database at the same moment."""
        more: dict[str, Any] = {"pool_pre_ping": True}
        if url.startswith("sqlite"):
            more["connect_args"] = {"timeout": 60}
        for left in reversed(range(tries)):
            try:
                return self._optuna.storages.RDBStorage(
                    url, engine_kwargs=more, heartbeat_interval=HEARTBEAT_SECONDS,
                    grace_period=SILENCE_SECONDS,
                )
            except Exception as error:  # of SQLAlchemy, the driver or the network
                if left:
                    time.sleep(0.5)
                    continue
                raise InputError(
                    f"The database {masked(url)} cannot be opened ({type(error).__name__}). "
                    "Expected a URL as in sqlite:///study.db or postgresql://user@host/name, its "
                    "driver installed (for PostgreSQL: pip install psycopg2-binary) and its server "
                    "running."
                ) from error
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Optuna tells of every trial by itself, and warns of what is meant here."""
        logs = self._optuna.logging
        before = logs.get_verbosity()
        logs.set_verbosity(logs.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module=r"optuna\..*")
                warnings.filterwarnings("ignore", category=FutureWarning, message=".*constraints")
                warnings.filterwarnings(
                    "ignore", category=self._optuna.exceptions.ExperimentalWarning
                )
                yield
        finally:
            logs.set_verbosity(before)

    def join(self, settings: Mapping[str, Any], free_keys: Iterable[str],
             defaults: Mapping[str, Any] | None = None) -> None:
        """Begin the study with these settings, or compare them with those it began with; a study
        of an earlier release has the `defaults` of what that did not know.

        Raises:
            RunDirectoryError: they differ; each is named.
        """
        free = set(free_keys)
        new = {k: v for k, v in flatten(settings).items() if k not in free}
        old = self._study.user_attrs.get(SETTINGS)
        if old is None:
            self._study.set_user_attr(SETTINGS, new)
            return
        old = {k: v for k, v in old.items() if k not in free}
        old = {k: v for k, v in flatten(defaults or {}).items() if k in new} | old
        different = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        if different:
            lines = "\n".join(
                f"  {k}: {_IN_WORDS[k]}" if k in _IN_WORDS and old.get(k) and new.get(k)
                else f"  {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in different
            )
            raise RunDirectoryError(
                f"The study {self._study.study_name} was begun with other settings:\n{lines}\n"
                "Give the search another --name, or use the settings above to go on with it."
            )

    def trials(self) -> tuple[TuneTrial, ...]:
        """The finished ones, by number."""
        return tuple(TuneTrial.from_dict(t.user_attrs[FOUND]) for t in self._all()
                     if t.state.name == "COMPLETE")

    def failures(self) -> dict[int, str]:
        """Number of each trial that failed by itself, to the reason."""
        return {t.number: t.user_attrs[ERROR] for t in self._all()
                if t.state.name == "FAIL" and ERROR in t.user_attrs}

    def counts(self) -> tuple[int, int]:
        """How many trials are finished, failed ones included, and how many are running."""
        trials = self._all()
        return sum(map(_is_finished, trials)), sum(t.state.name == "RUNNING" for t in trials)

    def _all(self) -> list[optuna.trial.FrozenTrial]:
        trials: list[optuna.trial.FrozenTrial] = self._study.get_trials(deepcopy=False)
        return trials

    def release_dead(self) -> list[int]:
        """Mark the running trials of workers that are gone as failed; their numbers."""
        running = [t for t in self._all() if t.state.name == "RUNNING"]
        with self._quiet():
            if self._heartbeat:
                self._optuna.storages.fail_stale_trials(self._study)
            for trial in running:
                if self._is_abandoned(trial):
                    self._study.tell(
                        trial.number, state=self._optuna.trial.TrialState.FAIL,
                        skip_if_finished=True,
                    )
        after = {t.number: t for t in self._all()}
        gone = [t.number for t in running if after[t.number].state.name == "FAIL"
                and not _is_finished(after[t.number])]
        for number in gone:
            logger.warning("Trial %d was cut off: its worker is gone. It does not count.", number)
        return gone

    def _is_abandoned(self, trial: optuna.trial.FrozenTrial) -> bool:
        name = trial.user_attrs.get(WORKER)
        if name is None:  # its worker had no time to sign it
            begun = trial.datetime_start
            age = 0.0 if begun is None else (datetime.now() - begun).total_seconds()
            return age > _NAMELESS_SECONDS
        return not self._heartbeat and not self.worker.is_alive(name)

    def work(self, attempt: Attempt, most: int) -> None:
        """One trial, unless `most` are finished or under way already.

        A `PatrolError`, and running out of memory, is kept with the trial as its reason to fail.
        """
        started: list[int] = []
        broken: list[Exception] = []

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            started.append(trial.number)
            trial.set_user_attr(WORKER, self.worker.name)
            if self._before(trial.number) >= most:
                raise _NotNeeded
            trial.study.sampler = self._sampler(trial.number)
            try:
                found = attempt(trial)
            except (PatrolError, torch.OutOfMemoryError) as error:
                trial.set_user_attr(ERROR, str(error))
                raise _Failed from error
            except self._optuna.exceptions.UpdateFinishedTrialError:
                raise
            except Exception as error:
                broken.append(error)
                raise
            if hasattr(trial, "set_constraint"):
                for name, excess in found.excess.items():
                    trial.set_constraint(name, excess)
            trial.set_user_attr(FOUND, asdict(found))
            return found.accuracy, found.likeness

        try:
            with self._quiet():
                self._study.optimize(objective, n_trials=1, catch=(_Failed, _NotNeeded))
        except (ValueError, self._optuna.exceptions.UpdateFinishedTrialError):
            state = self._study.get_trials(deepcopy=False)[started[-1]].state if started else None
            if broken or state is None or state.name != "FAIL":
                raise
            logger.warning(
                "Trial %d was given up by the other workers, who had not heard from this one. "
                "Its result is dropped.", started[-1],
            )

    def _before(self, number: int) -> int:
        return sum(t.number < number and (_is_finished(t) or t.state.name == "RUNNING")
                   for t in self._study.get_trials(deepcopy=False))

    def _sampler(self, number: int) -> Any:
        """Seeded by the trial, so that workers with one seed do not try the same values."""
        more: dict[str, Any] = {}
        if not hasattr(self._optuna.Trial, "set_constraint"):  # before Optuna 5
            more["constraints_func"] = _constraints
        return self._optuna.samplers.TPESampler(
            seed=(self._seed * 1_000_003 + number) % 2**32, constant_liar=True, **more
        )


def _check_journal(file: Path) -> None:
    """An InputError where no journal can be: before anything is written beside it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            return
        with file.open("rb") as lines:
            first = lines.readline()
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise _no_journal(file) from error
    if first and not first.startswith(_JOURNAL_BEGINS[:len(first)]):
        raise _no_journal(file)


def _no_journal(file: Path) -> InputError:
    return InputError(
        "Expected storage as a database's URL, or as a file that is Optuna's journal or is not "
        f"there yet, came {file}. Give another path."
    )


def _drop_torn_line(file: Path, lock: Any) -> None:
    """Cut what a writer that was killed, or a full disk, left of a last line."""
    lock.acquire()
    try:
        if not file.exists() or not file.stat().st_size:
            return
        with file.open("rb+") as journal:
            journal.seek(-1, os.SEEK_END)
            if journal.read(1) == b"\n":
                return
            journal.seek(0)
            whole = journal.read().rfind(b"\n") + 1
            logger.warning("The last line of %s was cut off while it was written and is dropped.",
                           file)
            journal.truncate(whole)
    finally:
        lock.release()


def _constraints(trial: optuna.trial.FrozenTrial) -> list[float]:
    return list(TuneTrial.from_dict(trial.user_attrs[FOUND]).excess.values())


def _is_finished(trial: optuna.trial.FrozenTrial) -> bool:
    """By itself, that is: a trial whose worker was killed is not."""
    return trial.state.name == "COMPLETE" or (
        trial.state.name == "FAIL" and ERROR in trial.user_attrs
    )


def masked(url: str) -> str:
    """A database's URL with passwords left out, also those among its options."""
    scheme, mark, rest = url.partition("://")
    rest = re.sub(r"^([^:/?]*):.*@", r"\1:***@", rest)  # a password may hold anything
    where, question, options = rest.partition("?")
    shown = re.sub(r"([^&;=]*)=([^&;]+)", lambda option: (
        f"{option[1]}=***" if _SECRET.search(option[0]) else option[0]), options)
    return f"{scheme}{mark}{where}{question}{shown}"
