"""A run on disk: what was asked for, what is done, and what came out.

    runs/<name>/  config.yaml  plan.json  events.jsonl  checkpoints/  edge.patrol/  audit.json
                  figures/  report.html  export/  manifest.json

`manifest.json` records each finished stage with the sha256 of every file it wrote. A stage counts
as done only while its files are what they were, so that a run that was killed, or a file that was
changed, is done again from that stage on.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from patrol_prune.errors import InputError, RunDirectoryError
from patrol_prune.storage import atomic_write_json, atomic_write_text, discard, sha256_of

try:
    import fcntl
except ImportError:  # a system without it runs unlocked
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
EVENTS = "events.jsonl"
MANIFEST = "manifest.json"
OUTPUTS = (
    CONFIG, EVENTS, MANIFEST, "plan.json", "audit.json", "summary.json", "report.json",
    "report.html", "checkpoints", "edge.patrol", "export", "figures", "audit_examples",
)


class RunDirectory:
    """One run's directory, locked against a second process until `close`.

    Args:
        path: `runs/<name>`; made when it is not there.
        config: the run's settings as plain data. A directory with the same settings is resumed.
        overwrite: throw away what an earlier run left here, and nothing else.
        free_keys: dotted settings that do not change a result (`device`); they may differ.
        noted: settings that say where something lies -> the stage and the note that say what it
            holds: where there is such a note, they may differ too, and the caller compares.
        outputs: names of files and folders of a run's own, which `overwrite` throws away as well.
        defaults: plain data of every setting's default: what a run of an earlier release, whose
            settings lack the newer ones, was made with.

    Raises:
        RunDirectoryError: the directory holds a run with other settings (each is named), holds
            something that is no run, or another process works in it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        overwrite: bool = False,
        free_keys: Iterable[str] = (),
        noted: Mapping[str, tuple[str, str]] | None = None,
        outputs: Iterable[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.outputs = Path(path), (*OUTPUTS, *outputs)
        _refuse_strangers(self.path, self.outputs if overwrite else ())
        make_folder(self.path)
        self._lock = _lock(self.path)
        try:
            if overwrite:
                self._clear()
            self._stages: dict[str, dict[str, Any]] = self._read_manifest()
            free = {key for key, (stage, note) in (noted or {}).items()
                    if config.get(key) is not None and self.notes(stage).get(note) is not None}
            self.resumed = self._settle(dict(config), free | set(free_keys), dict(defaults or {}))
        except BaseException:
            self.close()
            raise

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def close(self) -> None:
        """Let another process work here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to `events.jsonl`."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **fields}, default=str)
        with open(self / EVENTS, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def done(self, stage: str) -> bool:
        """Whether `stage` ended, and every file it wrote is still what it was."""
        record = self._stages.get(stage)
        if record is None:
            return False
        for name, digest in record["sha256"].items():
            path = self / name
            if not path.is_file() or sha256_of(path) != digest:
                logger.warning("%s is missing or was changed: %s is done again.", path, stage)
                return False
        return True

    def finish(self, stage: str, outputs: Iterable[str] = (), **notes: Any) -> None:
        """Record `stage` as done, with the sha256 of its outputs (files or directories)."""
        digests: dict[str, str] = {}
        for name in outputs:
            path = self / name
            found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            digests.update({p.relative_to(self.path).as_posix(): sha256_of(p) for p in found})
        self._stages[stage] = {"sha256": digests, "notes": notes}
        self._write_manifest()
        self.event("stage done", stage=stage, **notes)

    def notes(self, stage: str) -> dict[str, Any]:
        """What `finish` was told about a stage; empty when it is not done."""
        return dict(self._stages.get(stage, {}).get("notes", {}))

    def digests(self, stage: str) -> dict[str, str]:
        """The sha256 of every file that a stage wrote; empty when it is not done."""
        return dict(self._stages.get(stage, {}).get("sha256", {}))

    def forget(self, stages: Iterable[str]) -> None:
        """Have these stages done again."""
        for stage in stages:
            self._stages.pop(stage, None)
        self._write_manifest()

    def moved(self, data: str) -> None:
        """Note where the images lie now, once it is known that they are the same."""
        config = read_config(self / CONFIG)
        if config.get("data") != data:
            atomic_write_text(self / CONFIG, yaml.safe_dump(
                {**config, "data": data}, sort_keys=False, allow_unicode=True))

    def _write_manifest(self) -> None:
        atomic_write_json(self / MANIFEST, {"version": 1, "stages": self._stages})

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        try:
            stages = json.loads((self / MANIFEST).read_text(encoding="utf-8"))["stages"]
            return {str(k): {"sha256": dict(v["sha256"]), "notes": dict(v["notes"])}
                    for k, v in stages.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read (%s): all stages are done again.",
                           self / MANIFEST, error)
            return {}

    def _settle(
        self, config: dict[str, Any], free_keys: set[str], defaults: dict[str, Any]
    ) -> bool:
        """Write the settings of a new run, or compare them with those of the one that is here."""
        file = self / CONFIG
        if not file.exists():
            atomic_write_text(file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            return False
        old, new = flatten(read_config(file)), flatten(config)
        old = {k: v for k, v in flatten(defaults).items() if k in new} | old
        different = [key for key in sorted(old.keys() | new.keys())
                     if key not in free_keys and old.get(key) != new.get(key)]
        if different:
            lines = "\n".join(f"  {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in different)
            raise RunDirectoryError(
                f"{self.path} holds another run; these settings differ:\n{lines}\n"
                "Give the run another --name, use the settings above to resume it, or start it "
                "anew with --overwrite."
            )
        return True

    def remove(self, name: str) -> None:
        """Delete a file or folder of the run; of a link, the link alone."""
        discard(self / name)

    def _clear(self) -> None:
        """The settings go last: they make the folder a run's until all else is gone."""
        for name in sorted(self.outputs, key=lambda name: name == CONFIG):
            self.remove(name)


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder, with those around it, where there is none.

    Raises:
        RunDirectoryError: a file is in the way, or nothing may be written there.
    """
    folder = Path(path)
    there = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    if there.exists() and not there.is_dir():
        advice = "name to the run" if there == folder else "folder as --runs"
        raise RunDirectoryError(f"{there} is a file. Give another {advice}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"Expected a folder that can be made at {folder}, which failed ({error}). Give another "
            "folder as --runs."
        ) from error


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        InputError: no such file, or not a YAML mapping.
    """
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"Expected a YAML file of settings at {path}, which cannot be read ({error})."
        ) from error
    if not isinstance(config, dict):
        raise InputError(f"Expected {path} to hold settings as key: value, came {config!r}.")
    return config


def place_of(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """Name and folder of runs of the run in `folder`; not those of its settings if it was moved."""
    name, runs = str(config.get("name", "")), str(config.get("runs", ""))
    where = folder.resolve()
    if name and Path(runs, name).resolve() == where:
        return name, runs
    return where.name, str(where.parent)


def run_command(folder: Path) -> str:
    """What to type into a shell to resume the run in `folder`, also where it was moved."""
    told = f"patrol-prune run --config {shlex.quote(str(folder / CONFIG))}"
    if not (folder / CONFIG).is_file():
        return told
    config = read_config(folder / CONFIG)
    for key, value in zip(("name", "runs"), place_of(folder, config), strict=True):
        if str(config.get(key, "")) != value:
            told += f" --{key} {shlex.quote(value)}"
    return told


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; tuples as lists, as YAML reads them back."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _refuse_strangers(path: Path, outputs: Iterable[str]) -> None:
    """Refuse a folder that is no run's; `outputs` are about to be thrown away in any case."""
    if not path.is_dir() or (path / CONFIG).is_file():
        return
    known = {".lock", EVENTS, *outputs}
    unwritten = tuple(f".{name}." for name in (CONFIG, *outputs))
    strangers = sorted(p.name for p in path.iterdir()
                       if p.name not in known and not p.name.startswith(unwritten))
    if strangers:
        raise RunDirectoryError(
            f"{path} is not empty and holds no run ({', '.join(strangers[:3])}). Give the run "
            "another --name, or an empty directory."
        )


def _lock(path: Path) -> int | None:
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunDirectoryError(
            f"Expected a folder that can be written, came {path} ({error.strerror}). Give the run "
            "another place, --runs."
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise RunDirectoryError(
            f"Another process is working in {path}. Wait until it ends, or give this run another "
            "--name."
        ) from error
    return descriptor
