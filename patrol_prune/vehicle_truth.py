"""The truth beside a rendered re-identification set, in the order of its pictures, for `leaks`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patrol_prune._vehicle_files import RECORD, REID_SET
from patrol_prune.errors import InputError
from patrol_prune.reid_layout import ReidImage


@dataclass(frozen=True)
class VehicleTruth:
    """What pictures give away, one entry per picture.

    Attributes:
        plates: the plates' texts.
        boxes: the plates' corners in pixels, `[N, 4, 2]`: upper left, upper right, lower right,
            lower left, as x and y from the picture's upper left corner.
        scenes: what is behind the vehicle.
        hidden: whether something reaches over the plate, `[N]`, bool.
    """

    plates: tuple[str, ...]
    boxes: Tensor
    scenes: tuple[str, ...]
    hidden: Tensor


def drawn_with(root: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_vehicle_reid` drew the set in this folder with; empty for any other folder."""
    try:
        found = json.loads((Path(root) / RECORD).read_text(encoding="utf-8"))["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) and found.get("set") == REID_SET else {}


def read_vehicle_truth(
    root: str | os.PathLike[str], images: Sequence[ReidImage], image_size: int
) -> VehicleTruth:
    """The truth of some pictures of a set that `write_vehicle_reid` wrote.

    Args:
        root: the set's folder.
        images: which pictures, for example `read_reid(root).gallery`.
        image_size: side in pixels at which they are read; the corners are scaled to it.

    Raises:
        InputError: the folder has no truth, or not of one of the pictures.
    """
    path = Path(root) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files, size = record["files"], record["parameters"]["size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"Expected {path} with the truth of rendered vehicles, it cannot be read ({error}). "
            "Only sets that write_vehicle_reid wrote have it."
        ) from error
    names = [f"{image.path.parent.name}/{image.path.name}" for image in images]
    unknown = [name for name in names if name not in files or "plate_corners" not in files[name]]
    if unknown or not names:
        raise InputError(
            f"Expected {path} to tell the plate of every picture, {len(unknown)} of {len(names)} "
            f"are not in it, the first is {unknown[0] if unknown else 'missing'}. Give pictures of "
            "this set."
        )
    rows = [files[name] for name in names]
    return VehicleTruth(
        tuple(row["plate"] for row in rows),
        torch.tensor([row["plate_corners"] for row in rows]) * (image_size / size),
        tuple(row["scene"] for row in rows),
        torch.tensor([row["plate_hidden"] for row in rows]),
    )
