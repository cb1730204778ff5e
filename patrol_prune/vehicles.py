"""A small labelled set of rendered vehicles, for a demonstration that needs no download.

Each picture shows one vehicle with a readable number plate, so that a person sees at a glance
what a reconstruction gives away: the class (body type), but also colour, place and plate.
Everything is drawn from a seed; the same seed gives the same bytes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patrol_prune import _vehicle_drawing as drawing
from patrol_prune import _vehicle_scenes as scenes
from patrol_prune.errors import InputError, nearest

logger = logging.getLogger(__name__)

BODIES: tuple[str, ...] = tuple(sorted(drawing.SHAPES))
COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (44, 44, 50),
    "blue": (42, 88, 186),
    "green": (46, 128, 76),
    "orange": (232, 128, 36),
    "purple": (122, 66, 152),
    "red": (202, 40, 44),
    "silver": (178, 184, 192),
    "teal": (38, 150, 158),
    "white": (236, 238, 240),
    "yellow": (240, 204, 56),
}
VIEWPOINTS: tuple[str, ...] = ("front-left", "front-right", "rear-left", "rear-right")
CAMERAS: tuple[str, ...] = tuple(scenes.LENSES)
BACKGROUNDS: tuple[str, ...] = tuple(scenes.SCENES)
PLATE_CHARACTERS: str = "".join(drawing.GLYPHS)
SIZES = (32, 256)
DRAWING_VERSION = 1
_OVERSAMPLE = 2


@dataclass(frozen=True)
class Vehicle:
    """All there is to know about one picture.

    Args:
        body: the class, one of `BODIES`.
        colour: paint, one of `COLOURS`.
        viewpoint: the corner that the camera sees, one of `VIEWPOINTS`.
        camera: which camera took it (colour cast, blur, brightness, noise), one of `CAMERAS`.
        background: the scene, one of `BACKGROUNDS`.
        plate: three or four characters out of `PLATE_CHARACTERS`.
        yaw: angle between the vehicle's axis and the line of sight, in degrees, 0 to 90.
        pitch: how far the camera looks down, in degrees.
        scale: share of the picture that the vehicle fills.
        shift: offset of its centre, in shares of the picture.
        detail: seed of everything that has no name: trees, windows, noise.
    """

    body: str
    colour: str
    viewpoint: str
    camera: str
    background: str
    plate: str
    yaw: float = 33.0
    pitch: float = 13.0
    scale: float = 0.94
    shift: tuple[float, float] = (0.0, 0.0)
    detail: int = 0

    def __post_init__(self) -> None:
        choices = (
            ("body", self.body, BODIES),
            ("colour", self.colour, tuple(COLOURS)),
            ("viewpoint", self.viewpoint, VIEWPOINTS),
            ("camera", self.camera, CAMERAS),
            ("background", self.background, BACKGROUNDS),
        )
        for field, value, known in choices:
            if value not in known:
                raise InputError(
                    f"Expected a vehicle's {field} to be one of {', '.join(known)}, came "
                    f"{value!r}. {nearest(value, known)}"
                )
        if not 3 <= len(self.plate) <= 4 or set(self.plate) - set(PLATE_CHARACTERS):
            raise InputError(
                f"Expected a plate of 3 or 4 characters out of {PLATE_CHARACTERS}, came "
                f"{self.plate!r}. Leave out characters that look alike in a small picture."
            )


def sample_vehicle(rng: np.random.Generator, *, body: str | None = None) -> Vehicle:
    """One vehicle with every property drawn independently, except a given body.

    Args:
        rng: the only source of randomness.
        body: fixes the class; drawn uniformly from `BODIES` when left out.
    """

    def pick(options: tuple[str, ...] | str) -> str:
        return options[int(rng.integers(len(options)))]

    drawn = pick(BODIES)
    return Vehicle(
        body=drawn if body is None else body,
        colour=pick(tuple(COLOURS)),
        viewpoint=pick(VIEWPOINTS),
        camera=pick(CAMERAS),
        background=pick(BACKGROUNDS),
        plate="".join(pick(PLATE_CHARACTERS) for _ in range(3)),
        yaw=round(float(rng.uniform(24.0, 41.0)), 2),
        pitch=round(float(rng.uniform(7.0, 19.0)), 2),
        scale=round(float(rng.uniform(0.9, 1.0)), 3),
        shift=(
            round(float(rng.uniform(-0.03, 0.03)), 3),
            round(float(rng.uniform(-0.02, 0.04)), 3),
        ),
        detail=int(rng.integers(2**31)),
    )


def render(vehicle: Vehicle, size: int = 64) -> Image.Image:
    """The picture of one vehicle, RGB, `size` by `size` pixels. A pure function.

    Args:
        vehicle: what to draw.
        size: edge of the picture in pixels, 32 to 256.

    Raises:
        InputError: the size is out of range.
    """
    _check_size(size)
    rng = random.Random(vehicle.detail)
    canvas = scenes.SCENES[vehicle.background](rng, size * _OVERSAMPLE)
    yaw = math.radians(vehicle.yaw if vehicle.viewpoint.startswith("front") else 180 - vehicle.yaw)
    if vehicle.viewpoint.endswith("right"):
        yaw = -yaw
    camera = drawing.Camera3D(yaw, math.radians(vehicle.pitch), 7.5)
    side = rng.choice((-1, 1))
    angle = yaw + side * math.radians(50)
    light = (0.62 * math.cos(angle), 0.62 * math.sin(angle), 0.78)
    base = drawing.PLATE_WHITE if rng.random() < 0.7 else (250, 214, 60)
    faces = drawing.vehicle_faces(
        vehicle.body, COLOURS[vehicle.colour], vehicle.plate, base, camera, light
    )
    flat = [(camera.project(points), colour) for points, colour in faces]
    x0 = min(x for points, _ in flat for x, _ in points)
    x1 = max(x for points, _ in flat for x, _ in points)
    y0 = min(y for points, _ in flat for _, y in points)
    y1 = max(y for points, _ in flat for _, y in points)
    gain = vehicle.scale * min(1.0 / (x1 - x0), 0.86 / (y1 - y0))
    margin = 0.5 - gain * (x1 - x0) / 2  # the plate sits at the vehicle's end: never cut it off
    dx = 0.5 + max(-margin, min(margin, vehicle.shift[0])) - gain * (x0 + x1) / 2
    dy = 0.92 + vehicle.shift[1] - gain * y1
    flat.insert(0, (camera.project(drawing.shadow(vehicle.body)), canvas.shade()))
    for points, colour in flat:
        canvas.polygon([(gain * x + dx, gain * y + dy) for x, y in points], colour)
    return scenes.photograph(canvas.image, scenes.LENSES[vehicle.camera], size, vehicle.detail)


def write_vehicles(
    root: str | os.PathLike[str],
    *,
    train: int = 2000,
    test: int = 500,
    size: int = 64,
    seed: int = 0,
) -> Path:
    """Write the set as an image folder, whole or not at all, and return its path.

    `root/{train,test}/<body>/<nnnnn>_<plate>.png`, the classes balanced to within one picture,
    and `root/attributes.json` with the parameters and the truth of every file. A picture depends
    on the seed, its part and its number only, so a larger set begins with the smaller one. A tree
    that was written with the same parameters and is complete is used as it stands.

    Args:
        root: a folder that does not exist yet, is empty, or holds this very set.
        train: pictures in the training part.
        test: pictures in the test part.
        size: edge of every picture in pixels, 32 to 256.
        seed: of everything.

    Raises:
        InputError: too few pictures for one per class, a size out of range, or a folder that
            holds something else.
    """
    root = Path(root)
    _check_size(size)
    for name, count in (("train", train), ("test", test)):
        if count < len(BODIES):
            raise InputError(
                f"Expected at least {len(BODIES)} pictures in {name!r}, one per class, came "
                f"{count}. Ask for more."
            )
    parameters = {
        "drawing_version": DRAWING_VERSION,
        "train": train,
        "test": test,
        "size": size,
        "seed": seed,
    }
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        _check_same(root, parameters)
        logger.info("the vehicles in %s are used as they stand", root)
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        files: dict[str, dict[str, Any]] = {}
        for part, count in (("train", train), ("test", test)):
            files.update(_write_part(scratch, part, count, size, seed))
        record = {"parameters": parameters, "classes": list(BODIES), "files": files}
        with (scratch / "attributes.json").open("w", encoding="utf-8") as stream:
            json.dump(record, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.chmod(0o755)
        scratch.replace(root)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    logger.info("wrote %d pictures of vehicles to %s", len(files), root)
    return root


def _write_part(
    scratch: Path, part: str, count: int, size: int, seed: int
) -> dict[str, dict[str, Any]]:
    for body in BODIES:
        (scratch / part / body).mkdir(parents=True)
    files: dict[str, dict[str, Any]] = {}
    for i in range(count):
        rng = np.random.default_rng([seed, ("train", "test").index(part), i])
        vehicle = sample_vehicle(rng, body=BODIES[i % len(BODIES)])
        name = f"{part}/{vehicle.body}/{i:05d}_{vehicle.plate}.png"
        render(vehicle, size).save(scratch / name, compress_level=1)
        files[name] = asdict(vehicle)
    return files


def _check_size(size: int) -> None:
    if not SIZES[0] <= size <= SIZES[1]:
        raise InputError(
            f"Expected a picture size from {SIZES[0]} to {SIZES[1]} pixels, came {size}. Choose "
            "one in that range."
        )


def _check_same(root: Path, parameters: dict[str, int]) -> None:
    """Refuse a folder that is not the complete set with these parameters."""
    way_out = "Name another folder, or remove this one first."
    try:
        record = json.loads((root / "attributes.json").read_text(encoding="utf-8"))
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
