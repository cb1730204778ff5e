"""Rendered vehicles with identities, seen by several cameras, in the layout of VeRi-776.

An identity is a body with its proportions, paint, roof, marks, wheels and plate. A camera has a
scene of its own, corners it sees vehicles from, and a colour cast and blur of its own. So the same
vehicle looks different to two cameras, and two vehicles may look alike to one. What an upload must
not give away is written beside the pictures, for `leaks`.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patrol_prune import _vehicle_drawing as drawing
from patrol_prune import _vehicle_sites as sites
from patrol_prune._vehicle_drawing import Colour, Design, Sticker
from patrol_prune._vehicle_files import REID_SET, write_whole
from patrol_prune._vehicle_scenes import photograph
from patrol_prune.errors import InputError
from patrol_prune.vehicles import (
    BODIES,
    COLOURS,
    OVERSAMPLE,
    PLATE_CHARACTERS,
    SIZES,
    corner_yaw,
    sun,
)

DRAWING_VERSION = 1
REID_SIZES = (64, SIZES[1])
MOST_CAMERAS = len(sites.SITES)
MOST_IDENTITIES = len(PLATE_CHARACTERS) ** 3
_QUALITY = 95
_ACCENTS: tuple[Colour, ...] = (
    (232, 232, 228), (40, 40, 44), (216, 52, 44), (40, 96, 196), (240, 196, 48), (48, 150, 84),
    (236, 124, 40), (150, 70, 160),
)
_PARTS = (("image_train", "name_train.txt"), ("image_query", "name_query.txt"),
          ("image_test", "name_test.txt"))


@dataclass(frozen=True)
class VehicleIdentity:
    """What stays the same from picture to picture.

    Attributes:
        design: body, proportions, roof, wheels and marks.
        paint: the name its colour is nearest to, a key of `COLOURS`.
        colour: the paint itself, red, green and blue.
        accents: colours of its roof and marks.
        hub: colour of its wheels.
        plate: three characters.
        plate_colour: white or yellow.
    """

    design: Design
    paint: str
    colour: Colour
    accents: tuple[Colour, Colour]
    hub: Colour
    plate: str
    plate_colour: Colour


@dataclass(frozen=True)
class Shot:
    """What changes from picture to picture.

    Attributes:
        camera: number of the camera, from 0.
        viewpoint: the corner it sees.
        yaw: angle between the vehicle's axis and the line of sight, in degrees.
        pitch: how far the camera looks down, in degrees.
        scale: share of the picture that the vehicle fills.
        shift: of its middle, in shares of the picture.
        window: which part of the scene is behind it, 0 to 1 each way.
        lighting: one of "sunny", "overcast", "low sun", "dusk".
        sun_side: 1 or -1.
        occluder: "none", "pole", "leaves" or "barrier".
        where: the occluder's place, 0 to 1.
        noise: seed of the sensor's noise.
    """

    camera: int
    viewpoint: str
    yaw: float
    pitch: float
    scale: float
    shift: tuple[float, float]
    window: tuple[float, float]
    lighting: str
    sun_side: int
    occluder: str
    where: float
    noise: int


@dataclass(frozen=True)
class Picture:
    """A rendered picture and where its plate is.

    Attributes:
        image: RGB.
        plate_corners: in pixels from the picture's upper left corner: the plate's upper left, upper
            right, lower right and lower left corner.
        plate_hidden: whether something in front reaches over the plate.
    """

    image: Image.Image
    plate_corners: tuple[tuple[float, float], ...]
    plate_hidden: bool


def sample_identity(rng: random.Random, plate: str) -> VehicleIdentity:
    """A vehicle with every property drawn independently, except its plate."""
    paint = rng.choice(tuple(COLOURS))
    first, second = rng.sample(_ACCENTS, 2)
    marks = tuple(_sample_sticker(rng) for _ in range(rng.choice((0, 1, 1, 2))))
    design = Design(
        body=rng.choice(BODIES), roof=rng.choice(drawing.ROOFS),
        wheels=rng.choice(tuple(drawing.WHEELS)), stickers=marks,
        length=round(rng.uniform(0.93, 1.07), 3), height=round(rng.uniform(0.94, 1.06), 3),
    )
    return VehicleIdentity(
        design, paint, sites.jitter(rng, COLOURS[paint], 18),
        (sites.jitter(rng, first, 12), sites.jitter(rng, second, 12)),
        sites.jitter(rng, rng.choice(((172, 174, 178), (92, 92, 96), (206, 186, 128))), 10),
        plate, (248, 248, 244) if rng.random() < 0.7 else (250, 214, 60),
    )


def _sample_sticker(rng: random.Random) -> Sticker:
    kind = rng.choice(("band", "square", "disc"))
    height = 0.12 if kind == "band" else rng.uniform(0.3, 0.5)
    return Sticker(
        sides=rng.choice((0, 0, 1, -1)), kind=kind, u=round(rng.uniform(0.3, 0.7), 3),
        v=round(rng.uniform(0.4, 0.7), 3), width=round(rng.uniform(0.09, 0.2), 3),
        height=round(height, 3), paint=rng.choice(("first", "second")),
    )


def sample_shot(rng: random.Random, camera: int) -> Shot:
    """One passing of a vehicle before a camera, 0 to `MOST_CAMERAS - 1`."""
    site = sites.SITES[camera]
    blocked = rng.random() < site.blocked
    return Shot(
        camera, rng.choice(site.viewpoints), round(rng.uniform(*site.yaw), 2),
        round(rng.uniform(*site.pitch), 2), round(rng.uniform(0.88, 1.0), 3),
        (round(rng.uniform(-0.04, 0.04), 3), round(rng.uniform(-0.03, 0.04), 3)),
        (round(rng.random(), 3), round(rng.random(), 3)),
        rng.choice(tuple(sites.LIGHTINGS)), rng.choice((-1, 1)),
        rng.choice(sites.OCCLUDERS[1:]) if blocked else "none",
        round(rng.uniform(0.05, 0.9), 3), rng.getrandbits(31),
    )


def render_identity(identity: VehicleIdentity, shot: Shot, size: int = 64) -> Picture:
    """The picture of one vehicle by one camera. A pure function.

    Args:
        identity: whom to draw.
        shot: how it is seen.
        size: side of the picture in pixels, 64 to 256.

    Raises:
        InputError: the size is out of range.
    """
    _check_size(size)
    site, hour = sites.SITES[shot.camera], sites.LIGHTINGS[shot.lighting]
    canvas = sites.background(site, size * OVERSAMPLE, *shot.window)
    yaw = corner_yaw(shot.viewpoint, shot.yaw)
    camera = drawing.Camera3D(yaw, math.radians(shot.pitch), site.distance)
    light = drawing.Light(sun(yaw, shot.sun_side), hour.ambient, hour.diffuse, hour.shadow)
    first, second = identity.accents
    paints = drawing.palette({
        "body": identity.colour, "plate": identity.plate_colour, "hub": identity.hub,
        "first": first, "second": second,
    })
    corners = drawing.draw_vehicle(
        canvas, identity.design, paints, identity.plate, camera, light, (shot.scale, shot.shift)
    )
    hidden = sites.occlude(canvas, shot.occluder, shot.where, corners)
    image = photograph(canvas.image, sites.lens_under(site, shot.lighting), size, shot.noise)
    return Picture(image, tuple((size * x, size * y) for x, y in corners), hidden)


def write_vehicle_reid(
    root: str | os.PathLike[str],
    *,
    identities: int = 200,
    cameras: int = 6,
    images_per_camera: int = 4,
    size: int = 64,
    seed: int = 0,
    test_identities: int | None = None,
) -> Path:
    """Write a re-identification set in the layout of VeRi-776, whole or not at all.

    `image_train/`, `image_query/`, `image_test/` and the name lists, as `read_reid` reads them;
    `gt_index.txt` (the same vehicle by another camera) and `jk_index.txt` (by the same one). The
    identities of the test are in no picture of the training. Every camera sees every identity; the
    first picture of each identity by each camera is a query, and as in VeRi-776 queries are in the
    gallery too. `attributes.json` has, for every file, the truth of what a picture gives away:
    plate and its corners in pixels, scene, colour, body, lighting, viewpoint.

    A vehicle depends on the seed and its number only, a picture on these, its camera and its own
    number. A set that is there already, complete and with the same parameters, is used.

    Args:
        root: a folder that does not exist yet, is empty, or holds this very set.
        identities: vehicles in all, 4 to 8000; each has a plate of its own.
        cameras: 2 to 8.
        images_per_camera: pictures of each vehicle by each camera, 1 to 1000.
        size: side of every picture in pixels, 64 to 256.
        seed: of everything.
        test_identities: how many are kept for the test, 2 to `identities - 2`; a quarter when left
            out.

    Returns:
        `root`.

    Raises:
        InputError: a number out of range, or a folder that holds something else.
    """
    held_out = max(2, round(identities / 4)) if test_identities is None else test_identities
    _check_counts(identities, held_out, cameras, images_per_camera)
    _check_size(size)
    parameters = {
        "set": REID_SET, "drawing_version": DRAWING_VERSION, "identities": identities,
        "test_identities": held_out, "cameras": cameras, "images_per_camera": images_per_camera,
        "size": size, "seed": seed,
    }

    def fill(scratch: Path) -> dict[str, Any]:
        files = _write_pictures(scratch, parameters)
        _write_lists(scratch, list(files))
        return {"files": files}

    return write_whole(Path(root), parameters, fill)


def _write_pictures(scratch: Path, parameters: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All pictures, each with its truth; the files' names in the order of the lists."""
    for part, _ in _PARTS:
        (scratch / part).mkdir()
    seed, count = parameters["seed"], parameters["identities"]
    plates = np.random.default_rng([seed, 0]).permutation(MOST_IDENTITIES)[:count].tolist()
    files: dict[str, dict[str, Any]] = {}
    for number in range(1, count + 1):
        identity = sample_identity(_generator(seed, number), _plate(plates[number - 1]))
        train = number <= count - parameters["test_identities"]
        for camera in range(parameters["cameras"]):
            for i in range(parameters["images_per_camera"]):
                rng = _generator(seed, number, camera, i)
                shot = sample_shot(rng, camera)
                picture = render_identity(identity, shot, parameters["size"])
                time = 10_000 * camera + rng.randrange(1000) + 1000 * (i % 10)
                name = f"{number:04d}_c{camera + 1:03d}_{time:08d}_{i}.jpg"
                places = ["image_train"] if train else ["image_test"]
                if not train and i == 0:
                    places.insert(0, "image_query")
                for place in places:
                    picture.image.save(scratch / place / name, quality=_QUALITY, subsampling=0)
                    files[f"{place}/{name}"] = _truth(number, identity, shot, picture)
    return files


def _truth(
    number: int, identity: VehicleIdentity, shot: Shot, picture: Picture
) -> dict[str, Any]:
    return {
        "identity": number, "camera": shot.camera + 1, "plate": identity.plate,
        "plate_corners": [[round(x, 2), round(y, 2)] for x, y in picture.plate_corners],
        "plate_hidden": picture.plate_hidden, "scene": sites.SITES[shot.camera].scene,
        "paint": identity.paint, "colour": list(identity.colour), "body": identity.design.body,
        "viewpoint": shot.viewpoint, "lighting": shot.lighting, "occluder": shot.occluder,
    }


def _write_lists(scratch: Path, files: list[str]) -> None:
    names = {part: [f.split("/")[1] for f in files if f.startswith(part)] for part, _ in _PARTS}
    for part, listing in _PARTS:
        (scratch / listing).write_text("".join(f"{name}\n" for name in names[part]))
    same: dict[str, list[int]] = {}
    for position, name in enumerate(names["image_test"], 1):
        same.setdefault(name[:4], []).append(position)
    matches, junk = [], []
    for name in names["image_query"]:
        camera = name.split("_")[1]
        by_camera = {p: names["image_test"][p - 1].split("_")[1] for p in same[name[:4]]}
        matches.append(" ".join(str(p) for p, c in by_camera.items() if c != camera))
        junk.append(" ".join(str(p) for p, c in by_camera.items() if c == camera))
    for listing, rows in (("gt_index.txt", matches), ("jk_index.txt", junk)):
        (scratch / listing).write_text("".join(f"{row}\n" for row in rows))


def _generator(*numbers: int) -> random.Random:
    return random.Random("/".join(str(number) for number in numbers))


def _plate(code: int) -> str:
    base = len(PLATE_CHARACTERS)
    return "".join(PLATE_CHARACTERS[code // base**i % base] for i in range(3))


def _check_size(size: int) -> None:
    if not REID_SIZES[0] <= size <= REID_SIZES[1]:
        raise InputError(
            f"Expected a picture size from {REID_SIZES[0]} to {REID_SIZES[1]} pixels, came {size}. "
            "A plate cannot be read in smaller ones; choose one in that range."
        )


def _check_counts(identities: int, held_out: int, cameras: int, images: int) -> None:
    for name, value, least, most in (
        ("identities", identities, 4, MOST_IDENTITIES),
        ("test_identities", held_out, 2, identities - 2),
        ("cameras", cameras, 2, MOST_CAMERAS),
        ("images_per_camera", images, 1, 1000),
    ):
        if not least <= value <= most:
            raise InputError(
                f"Expected {name} from {least} to {most}, came {value}. Choose a number in that "
                "range."
            )
