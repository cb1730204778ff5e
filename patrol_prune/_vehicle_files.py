"""A set of rendered pictures on disk: whole or not at all, and used again when it is complete."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from patrol_prune.errors import InputError

logger = logging.getLogger(__name__)
RECORD = "attributes.json"
REID_SET = "vehicle-reid"
"""What the record of a set with identities calls it."""


def write_whole(
    root: Path, parameters: dict[str, Any], fill: Callable[[Path], dict[str, Any]]
) -> Path:
    """Let `fill` write into a scratch folder, add the record, and move it to `root` in one step.

    Args:
        root: does not exist yet, is empty, or holds the set with these very parameters, which
            is then used as it stands.
        parameters: what the set is made with; they go into the record.
        fill: writes the files below the folder it gets and returns what the record says beside
            the parameters; its "files" has the name of every picture.

    Raises:
        InputError: the folder holds something else, other parameters, or not all of the set.
    """
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        _check_same(root, parameters)
        logger.info("the pictures in %s are used as they stand", root)
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        record = {"parameters": parameters, **fill(scratch)}
        with (scratch / RECORD).open("w", encoding="utf-8") as stream:
            json.dump(record, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.chmod(0o755)
        scratch.replace(root)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    logger.info("wrote %d pictures to %s", len(record["files"]), root)
    return root


def _check_same(root: Path, parameters: dict[str, Any]) -> None:
    """Refuse a folder that is not the complete set with these parameters."""
    way_out = "Name another folder, or remove this one first."
    try:
        record = json.loads((root / RECORD).read_text(encoding="utf-8"))
        found, names = record["parameters"], list(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"Expected {root} to be empty or to hold a set of rendered vehicles; it holds "
            f"something else. {way_out}"
        ) from None
    if found != parameters:
        raise InputError(
            f"Expected the vehicles in {root} to be made with {parameters}, came {found}. {way_out}"
        )
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise InputError(
            f"Expected {len(names)} pictures in {root}; {len(missing)} are missing, the first is "
            f"{missing[0]}. {way_out}"
        )
