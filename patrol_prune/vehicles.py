"""A small labelled set of rendered vehicles, for a demonstration that needs no download.

Each picture shows one vehicle with a readable number plate, so that a person sees at a glance
what a reconstruction gives away: the class (body type), but also colour, place and plate.
Everything is drawn from a seed; the same seed gives the same bytes.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patrol_prune import _vehicle_drawing as drawing
from patrol_prune import _vehicle_scenes as scenes
from patrol_prune._vehicle_files import write_whole
from patrol_prune._vehicle_shapes import GLYPHS, SHAPES
from patrol_prune.errors import InputError, nearest

BODIES: tuple[str, ...] = tuple(sorted(SHAPES))
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
PLATE_CHARACTERS: str = "".join(GLYPHS)
SIZES = (32, 256)
DRAWING_VERSION = 2
OVERSAMPLE = 2


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
    check_size(size)
    rng = random.Random(vehicle.detail)
    canvas = scenes.SCENES[vehicle.background](rng, size * OVERSAMPLE)
    camera = drawing.Camera3D(
        corner_yaw(vehicle.viewpoint, vehicle.yaw), math.radians(vehicle.pitch), 7.5
    )
    light = drawing.Light(sun(camera.yaw, rng.choice((-1, 1))))
    base: drawing.Colour = (248, 248, 244) if rng.random() < 0.7 else (250, 214, 60)
    paints = drawing.palette({"body": COLOURS[vehicle.colour], "plate": base})
    drawing.draw_vehicle(
        canvas, drawing.Design(vehicle.body), paints, vehicle.plate, camera, light,
        (vehicle.scale, vehicle.shift),
    )
    return scenes.photograph(canvas.image, scenes.LENSES[vehicle.camera], size, vehicle.detail)


def corner_yaw(viewpoint: str, degrees: float) -> float:
    """The camera's yaw in radians for a viewpoint and an angle to the vehicle's axis."""
    yaw = math.radians(degrees if viewpoint.startswith("front") else 180 - degrees)
    return -yaw if viewpoint.endswith("right") else yaw


def sun(yaw: float, side: int) -> tuple[float, float, float]:
    """A direction of light from 50 degrees to one side of the camera, and from above."""
    angle = yaw + side * math.radians(50)
    return (0.62 * math.cos(angle), 0.62 * math.sin(angle), 0.78)


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
    check_size(size)
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

    def fill(scratch: Path) -> dict[str, Any]:
        files: dict[str, dict[str, Any]] = {}
        for part, count in (("train", train), ("test", test)):
            files.update(_write_part(scratch, part, count, size, seed))
        return {"classes": list(BODIES), "files": files}

    return write_whole(Path(root), parameters, fill)


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


def check_size(size: int) -> None:
    """Refuse a picture size that nothing can be drawn at."""
    if not SIZES[0] <= size <= SIZES[1]:
        raise InputError(
            f"Expected a picture size from {SIZES[0]} to {SIZES[1]} pixels, came {size}. Choose "
            "one in that range."
        )
