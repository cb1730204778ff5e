"""Files that are written whole or not at all, and read only after their sha256 agrees.

A directory is filled beside its final place, its files and itself are fsynced, and one rename
puts it there; a link to a directory stays one, and its target is replaced. `manifest.json`,
written last, holds the sha256 of every other file, so that a torn or changed file is refused by
name instead of being read. The hashes are not keyed: they find accidents and careless edits, not
a forger who rewrites the manifest as well.

Nothing here unpickles: tensors go through safetensors, everything else through JSON.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save_file
from torch import Tensor

from patrol_prune.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
META = "meta.json"

WRITE_ERRORS = (OSError, SafetensorError)
"""What a full or read-only disk raises."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_LITTER = re.compile(r"\.DS_Store|Thumbs\.db|desktop\.ini|\._.*|\.nfs.*")  # of others
_TOLD_ERRNO = re.compile(r"(?:os error|code:) (\d+)")  # as safetensors writes it

_ours: set[str] = set()  # names of the temporaries of this process


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # some systems do not open directories
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        logger.debug("Could not fsync %s: %s", path, error)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """A disk that takes nothing more is an OSError that names `path`, from whatever wrote there."""
    try:
        yield
    except WRITE_ERRORS as error:
        found = _TOLD_ERRNO.search(str(error)) if isinstance(error, SafetensorError) else None
        number = int(found.group(1)) if found else getattr(error, "errno", None)
        if number is None or (not found and number not in _FULL):
            raise
        raise OSError(number, f"{os.strerror(number)}. Make room or give another place; what was "
                      "there before is kept, and this is not written", str(path)) from error


def _temporary(path: Path, kind: str) -> Path:
    temporary = path.parent / f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"
    _ours.add(temporary.name)
    return temporary


def _is_being_written(name: str) -> bool:
    match = re.search(r"-(\d+)-[0-9a-f]+$", name)
    if match is None or name in _ours:
        return True
    if int(match.group(1)) == os.getpid():  # an earlier process had our number
        return False
    try:
        os.kill(int(match.group(1)), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _place(path: str | os.PathLike[str]) -> Path:
    """Where a directory lies that is written to `path`: a link's target, there or not yet."""
    path = Path(path)  # without the slash at its end, which would ask for the target
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def discard(path: Path) -> None:
    """Delete a file or folder where there is one; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clean_temporaries(path: str | os.PathLike[str]) -> list[Path]:
    """Undo what a killed writer of `path` left beside it, and say what was removed.

    A directory that was moved aside for its replacement is moved back when the replacement never
    arrived; half-written temporaries are deleted. Those of a process still alive stay.
    """
    path = _place(path)
    removed: list[Path] = []
    for kind in ("old", "tmp"):
        for stray in sorted(path.parent.glob(f".{glob.escape(path.name)}.{kind}-*")):
            if _is_being_written(stray.name):
                continue
            if kind == "old" and not path.exists():
                os.rename(stray, path)
                logger.warning("Put back %s, whose replacement was interrupted.", path)
                continue
            discard(stray)
            removed.append(stray)
            logger.info("Removed %s, left by an interrupted write.", stray)
    return removed


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, whole."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_temporaries(path)
    temporary = _temporary(path, "tmp")
    try:
        with _told(path), open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what came first is what is told
            temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`atomic_write_text` of `value` as indented JSON."""
    atomic_write_text(path, to_json(value, path))


def to_json(value: Any, where: str | os.PathLike[str]) -> str:
    """Indented JSON of `value`; `where` names the file in the error."""
    try:
        return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(
            f"What goes into {where} must be JSON: numbers, strings, lists and dictionaries with "
            f"string keys, came something else ({error}). Convert it first; tensors go among the "
            "tensors."
        ) from error


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a directory beside `path`, then put it there in one rename with its manifest.

    Where `path` is a link, it stays one, and what it points at is the directory that is meant.

    Yields the temporary directory. When the block ends well, `manifest.json` is written, all is
    fsynced and `path` becomes the new directory, whatever stood there before; when it raises,
    `path` is as it was. A disk that is full is told as an OSError that names `path`. A folder that
    holds what was not written so is not replaced (InputError).
    """
    path = _place(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; a checkpoint is a directory. Give another path.")
    _check_not_here(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_temporaries(path)
    temporary = _temporary(path, "tmp")
    temporary.mkdir()
    try:
        with _told(path):
            yield temporary
            _write_manifest(temporary)
        check_replaceable(path, [p.relative_to(temporary).as_posix() for p in temporary.rglob("*")])
        _put_in_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_not_here(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # of a current directory that is gone
        here = Path.cwd()
        if path.resolve() in (here, *here.parents):
            raise InputError(f"Expected a folder that can be replaced as a whole, came {path}, the "
                             "current directory or one above it. Name a folder inside it.")


def check_replaceable(path: Path, names: Collection[str]) -> None:
    """An InputError where files would go when a directory with files of these names takes the place
    of `path`: others than those, and than the manifest there lists.
    """
    known = {MANIFEST, *names, *_listed(path / MANIFEST)}
    files = (p for p in path.rglob("*") if not p.is_dir() or p.is_symlink())
    others = (p.relative_to(path).as_posix() for p in files if not _LITTER.fullmatch(p.name))
    found = sorted(itertools.islice((name for name in others if name not in known), 3))
    if found:
        raise InputError(f"{path} holds what was not written with it, {', '.join(found)}, which "
                         "would go. Give a folder of its own, or move those away.")


def _listed(manifest: Path) -> set[str]:
    """The files that a manifest names; none where it is another program's, torn or gone."""
    try:
        return set(json.loads(manifest.read_bytes())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _write_manifest(directory: Path) -> None:
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    digests = {p.relative_to(directory).as_posix(): sha256_of(p) for p in files}
    manifest = directory / MANIFEST
    manifest.write_text(to_json({"version": 1, "sha256": digests}, manifest), encoding="utf-8")
    folders = sorted({p.parent for p in files} | {directory}, reverse=True)
    for entry in (*files, manifest, *folders):
        _fsync(entry)


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
        _fsync(path.parent)
        return
    aside = _temporary(path, "old")
    os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(aside, path)
        raise
    _fsync(path.parent)
    shutil.rmtree(aside)


def read_whole(directory: str | os.PathLike[str]) -> dict[str, bytes]:
    """Every file of a directory that `atomic_directory` wrote, name -> bytes, sha256 verified.

    Raises:
        CheckpointError: the manifest or a file is missing, torn or changed; `path` names it.
    """
    directory = Path(directory)
    with contextlib.suppress(OSError):  # a read-only disk still has to be readable
        clean_temporaries(directory)
    manifest = directory / MANIFEST
    if not manifest.is_file():
        what = "has no manifest.json" if directory.is_dir() else "is not there"
        raise CheckpointError(
            f"Expected a checkpoint directory, but {directory} {what}: it was not written to the "
            "end, or it is something else. Give another path, or write it again.",
            path=str(manifest),
        )
    try:
        digests = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
        expected = {str(name): str(digest) for name, digest in digests.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{manifest} is torn or was changed: it is not the JSON of a manifest ({error}). "
            "Write the checkpoint again, or use another one.",
            path=str(manifest),
        ) from error
    return {name: _read_file(directory, name, digest) for name, digest in expected.items()}


def _read_file(directory: Path, name: str, digest: str) -> bytes:
    """One file, by its name alone below the directory: the file itself may be a link."""
    path, told = directory / name, PureWindowsPath(name)  # it takes both kinds of slash
    if told.drive or told.root or ".." in told.parts:
        raise CheckpointError(
            f"The manifest in {directory} names {name!r}, which lies outside the directory. It was "
            "changed; do not use it.",
            path=str(path),
        )
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, though the manifest beside it lists it. Copy the whole "
            "directory again, or use another checkpoint.",
            path=str(path),
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(
            f"{path} is torn or was changed: its sha256 is not the one in the manifest. Copy the "
            "directory again, or use another checkpoint.",
            path=str(path),
        )
    return content


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of CPU copies; tensors that share memory are stored once each."""
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, str(path))


def read_tensors(content: bytes, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors in a safetensors file's bytes; `path` names it in the error."""
    try:
        return tensors_from_bytes(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file ({error}). Give a file written by safetensors; "
            "pickled weights are never read.",
            path=str(path),
        ) from error


def save_state(
    directory: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write a training state: tensors of any shape and dtype, and JSON-able `meta`, atomically."""
    text = to_json(dict(meta), Path(directory) / META)
    with atomic_directory(directory) as temporary:
        write_tensors(temporary / TENSORS, tensors)
        (temporary / META).write_text(text, encoding="utf-8")


def load_state(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`(tensors, meta)` as `save_state` got them, tensors on the CPU.

    Raises:
        CheckpointError: something is missing, torn or changed; `path` names the file.
    """
    files = read_whole(directory)
    for name in (TENSORS, META):
        if name not in files:
            raise CheckpointError(
                f"{directory} is a checkpoint of another kind: it holds no {name}. Give a "
                "directory written by save_state.",
                path=str(Path(directory) / name),
            )
    tensors = read_tensors(files[TENSORS], Path(directory) / TENSORS)
    return tensors, json.loads(files[META])


def keep_newest(parent: str | os.PathLike[str]) -> None:
    """Of a finished training's checkpoints under `parent`, drop all but the newest whole one."""
    newest = newest_whole(parent)
    if newest is None:
        return
    kept = newest.resolve()
    for entry in [e for e in Path(parent).iterdir() if e.is_dir() and e.resolve() != kept]:
        discard(entry)


def newest_whole(parent: str | os.PathLike[str]) -> Path | None:
    """The whole checkpoint with the highest number (`epoch-0007`) under `parent`, or None.

    A checkpoint that is torn or was changed is passed over with a warning that names it.
    """
    parent = Path(parent)
    if not parent.is_dir():
        return None
    numbered: list[tuple[int, Path]] = []
    for entry in parent.iterdir():
        match = re.fullmatch(r"[^.].*?(\d+)", entry.name)
        if match is not None and entry.is_dir():
            numbered.append((int(match.group(1)), entry))
    for _, entry in sorted(numbered, reverse=True):
        try:
            read_whole(entry)
        except CheckpointError as error:
            logger.warning("Passed over the checkpoint %s: %s", entry, error)
            continue
        return entry
    return None
