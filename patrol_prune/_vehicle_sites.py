"""Where `vehicle_identities` puts its cameras, what the light does, and what stands in the way."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache

from PIL import Image

from patrol_prune._vehicle_drawing import Colour
from patrol_prune._vehicle_scenes import SCENES, Canvas, Lens

_WIDER = 1.2


@dataclass(frozen=True)
class Site:
    """One camera: its scene, the corners it sees, from where, and what it does to a picture.

    Args:
        scene: what is behind the vehicles.
        viewpoints: the corners it sees vehicles from.
        yaw: range of the angle to the vehicle's axis, in degrees.
        pitch: range of how far it looks down, in degrees.
        distance: in metres.
        lens: colour cast, brightness, contrast, blur and noise.
        blocked: share of pictures with something in the way.
    """

    scene: str
    viewpoints: tuple[str, ...]
    yaw: tuple[float, float]
    pitch: tuple[float, float]
    distance: float
    lens: Lens
    blocked: float


SITES: tuple[Site, ...] = (
    Site("road", ("front-left",), (22, 38), (8, 14), 8.0,
         Lens((1.0, 1.0, 1.0), 0.0, 1.05, 0.0, 0.008), 0.15),
    Site("city", ("rear-left", "rear-right"), (18, 36), (10, 18), 7.0,
         Lens((1.08, 1.0, 0.86), 0.02, 1.0, 0.25, 0.010), 0.3),
    Site("forest", ("front-right",), (26, 44), (6, 12), 7.5,
         Lens((0.92, 1.04, 0.94), -0.02, 0.98, 0.2, 0.012), 0.3),
    Site("garage", ("front-left", "front-right"), (16, 34), (14, 22), 6.0,
         Lens((1.04, 1.0, 0.9), 0.0, 0.94, 0.3, 0.012), 0.2),
    Site("night", ("rear-right",), (20, 38), (8, 16), 8.5,
         Lens((1.02, 0.96, 0.88), -0.06, 0.92, 0.2, 0.020), 0.15),
    Site("coast", ("rear-left", "front-right"), (24, 42), (8, 16), 9.0,
         Lens((0.94, 1.0, 1.1), 0.03, 1.02, 0.1, 0.008), 0.15),
    Site("snow", ("front-left", "rear-left"), (18, 40), (10, 20), 7.5,
         Lens((0.96, 1.0, 1.06), 0.02, 0.96, 0.25, 0.010), 0.2),
    Site("tunnel", ("front-right", "rear-right"), (16, 34), (12, 20), 7.0,
         Lens((1.06, 0.98, 0.84), -0.08, 0.9, 0.25, 0.018), 0.2),
)


@dataclass(frozen=True)
class Lighting:
    """What the hour does: gain of red, green and blue, brightness, and how hard shadows are."""

    cast: tuple[float, float, float]
    brightness: float
    ambient: float
    diffuse: float
    shadow: float


LIGHTINGS: dict[str, Lighting] = {
    "sunny": Lighting((1.03, 1.0, 0.96), 0.02, 0.62, 0.48, 0.42),
    "overcast": Lighting((0.98, 1.0, 1.03), 0.0, 0.8, 0.18, 0.66),
    "low sun": Lighting((1.1, 0.98, 0.84), -0.01, 0.56, 0.54, 0.4),
    "dusk": Lighting((0.86, 0.88, 1.0), -0.05, 0.72, 0.24, 0.6),
}
OCCLUDERS = ("none", "pole", "leaves", "barrier")


def lens_under(site: Site, lighting: str) -> Lens:
    """What the camera and the hour do together."""
    light, lens = LIGHTINGS[lighting], site.lens
    red, green, blue = (a * b for a, b in zip(lens.cast, light.cast, strict=True))
    return replace(lens, cast=(red, green, blue), brightness=lens.brightness + light.brightness)


@lru_cache(maxsize=16)
def _scene(name: str, size: int) -> Image.Image:
    return SCENES[name](random.Random(name), round(size * _WIDER)).image


def background(site: Site, size: int, left: float, top: float) -> Canvas:
    """The site's scene, the same place in every picture, seen through a window of this size.

    Args:
        site: whose scene.
        size: side of the window in pixels.
        left: where it is, 0 to 1; likewise `top`. The scene is a fifth larger than the window.
    """
    scene = _scene(site.scene, size)
    room = scene.width - size
    x, y = round(left * room), round(top * room)
    return Canvas.on(scene.crop((x, y, x + size, y + size)))


def occlude(
    canvas: Canvas, kind: str, where: float, plate: list[tuple[float, float]]
) -> bool:
    """Draw something in front of the vehicle; whether it reaches over the plate.

    Args:
        canvas: is drawn on.
        kind: one of `OCCLUDERS`.
        where: its place, 0 to 1.
        plate: the plate's corners in shares of the picture.
    """
    if kind == "none":
        return False
    if kind == "pole":
        boxes = [(where, -0.1, where + 0.06, 1.1)]
        canvas.rectangle(*boxes[0], (92, 94, 98))
        canvas.rectangle(where, -0.1, where + 0.018, 1.1, (132, 134, 138))
    elif kind == "barrier":
        top = 0.86 + 0.08 * where
        boxes = [(-0.1, top, 1.1, 1.1)]
        canvas.rectangle(*boxes[0], (150, 152, 152))
        canvas.rectangle(-0.1, top + 0.03, 1.1, top + 0.05, (98, 100, 102))
    else:
        x, leaf = where, (44, 84, 42)
        boxes = [(x - 0.18, -0.1, x + 0.18, 0.22)]
        for dx, dy, colour in ((-0.09, 0.02, leaf), (0.08, 0.06, (56, 100, 50)),
                               (0.0, 0.1, (38, 74, 40))):
            canvas.ellipse(x + dx, dy, 0.09, 0.11, colour)
    xs, ys = [x for x, _ in plate], [y for _, y in plate]
    return any(
        x0 < max(xs) and min(xs) < x1 and y0 < max(ys) and min(ys) < y1 for x0, y0, x1, y1 in boxes
    )


def jitter(rng: random.Random, colour: Colour, spread: int) -> Colour:
    """A colour near this one, every channel on its own."""
    red, green, blue = (min(255, max(0, c + rng.randint(-spread, spread))) for c in colour)
    return red, green, blue
