"""The geometry behind `vehicles`: bodies as extruded profiles, a pinhole camera, plate glyphs.

A vehicle stands at the origin, x forward, y to its left, z up, in metres of a toy whose width is
1.9. Every solid is a side profile extruded over the width; faces that turn away from the camera
are dropped, the rest is painted from far to near.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Point = tuple[float, float, float]
Colour = tuple[int, int, int]
Face = tuple[list[Point], Colour]

HALF_WIDTH = 0.95
TYRE: Colour = (28, 28, 30)
HUB: Colour = (172, 174, 178)
GLASS: Colour = (58, 76, 94)
BOX: Colour = (226, 226, 220)
CHASSIS: Colour = (48, 48, 52)
HEADLIGHT: Colour = (250, 244, 208)
TAIL_LIGHT: Colour = (204, 24, 28)
PLATE_WHITE: Colour = (248, 248, 244)
PLATE_INK: Colour = (12, 12, 20)

# Three columns by five rows, so that a stroke is wider than a pixel in a 64-pixel picture. Only
# characters that cannot be taken for one another at that size.
GLYPHS: dict[str, str] = {
    "0": "####.##.##.####",
    "1": ".#.##..#..#.###",
    "2": "###..#####..###",
    "3": "###..####..####",
    "4": "#.##.####..#..#",
    "5": "####..###..####",
    "6": "####..####.####",
    "7": "###..#..#..#..#",
    "8": "####.#####.####",
    "9": "####.####..####",
    "A": ".#.#.#####.##.#",
    "C": "####..#..#..###",
    "E": "####..##.#..###",
    "F": "####..##.#..#..",
    "H": "#.##.#####.##.#",
    "L": "#..#..#..#..###",
    "P": "####.#####..#..",
    "T": "###.#..#..#..#.",
    "U": "#.##.##.##.####",
    "Y": "#.##.#.#..#..#.",
}


@dataclass(frozen=True)
class Prism:
    """A profile of four corners (x, z, half width): front low, front high, rear high, rear low.

    Windows are given on each face in fractions (u, v) of its width and height.
    """

    profile: tuple[Point, Point, Point, Point]
    paint: str = "body"
    front_window: tuple[float, float, float, float] | None = None
    rear_window: tuple[float, float, float, float] | None = None
    side_windows: tuple[tuple[float, float, float, float], ...] = ()
    stripe: bool = False

    def strip(self, i: int) -> list[Point]:
        """The face over edge i, corners counter-clockwise from low left as its viewer sees it."""
        (x0, z0, w0), (x1, z1, w1) = self.profile[i], self.profile[i + 1]
        if i == 2:  # the rear runs downwards: start from its lower edge, seen from behind
            return [(x1, w1, z1), (x1, -w1, z1), (x0, -w0, z0), (x0, w0, z0)]
        return [(x0, -w0, z0), (x0, w0, z0), (x1, w1, z1), (x1, -w1, z1)]

    def side(self, sign: int) -> list[Point]:
        """The flank at y > 0 (sign 1) or y < 0, front low first, in the profile's order."""
        return [(x, sign * w, z) for x, z, w in self.profile]


@dataclass(frozen=True)
class Shape:
    """One body type: its solids from bottom to top, wheels, plate height and load bed."""

    prisms: tuple[Prism, ...]
    wheels: tuple[float, ...]
    wheel_radius: float
    front: float
    rear: float
    plate_z: float
    light_z: float
    bed: tuple[float, float, float] | None = None
    box_behind_cab: bool = False


def _lower(front: float, rear: float, z0: float, z1: float, z2: float) -> Prism:
    w = HALF_WIDTH
    return Prism(((front, z0, w), (front - 0.03, z1, w), (rear + 0.03, z2, w), (rear, z0, w)))


def _cabin(
    xs: tuple[float, float, float, float],
    z0: float,
    z1: float,
    sides: tuple[tuple[float, float], ...],
    rear: bool = True,
    roof: float = 0.76,
) -> Prism:
    a, b, c, d = xs
    return Prism(
        ((a, z0, 0.92), (b, z1, roof), (c, z1, roof), (d, z0, 0.92)),
        front_window=(0.06, 0.1, 0.94, 0.88),
        rear_window=(0.1, 0.25, 0.9, 0.88) if rear else None,
        side_windows=tuple((u0, 0.14, u1, 0.84) for u0, u1 in sides),
    )


def _make_shapes() -> dict[str, Shape]:
    w = HALF_WIDTH
    two_doors = ((0.09, 0.47), (0.53, 0.91))
    bus = Prism(
        ((1.9, 0.24, w), (1.83, 2.0, w), (-1.9, 2.0, w), (-1.9, 0.24, w)),
        front_window=(0.06, 0.42, 0.94, 0.9),
        rear_window=(0.12, 0.56, 0.88, 0.88),
        side_windows=tuple((0.03 + i * 0.16, 0.5, 0.165 + i * 0.16, 0.84) for i in range(6)),
        stripe=True,
    )
    cab = Prism(
        ((1.8, 0.26, w), (1.7, 1.62, 0.9), (0.86, 1.62, 0.9), (0.86, 0.26, w)),
        front_window=(0.07, 0.52, 0.93, 0.92),
        side_windows=((0.14, 0.52, 0.74, 0.9),),
    )
    box = Prism(((0.76, 0.56, w), (0.76, 2.06, w), (-1.8, 2.06, w), (-1.8, 0.56, w)), "box")
    frame = Prism(
        ((0.95, 0.3, 0.8), (0.95, 0.56, 0.8), (-1.76, 0.56, 0.8), (-1.76, 0.3, 0.8)), "dark"
    )
    sedan_top = _cabin((0.98, 0.3, -0.72, -1.28), 0.96, 1.5, two_doors)
    hatch_top = _cabin((0.86, 0.32, -1.12, -1.46), 0.98, 1.58, two_doors)
    van_top = _cabin((1.52, 0.9, -1.7, -1.76), 1.06, 1.94, ((0.07, 0.27),), roof=0.86)
    pickup_top = _cabin((0.92, 0.42, -0.26, -0.4), 1.06, 1.66, ((0.12, 0.88),))
    return {
        "bus": Shape((bus,), (1.15, -1.15), 0.38, 1.9, -1.9, 0.6, 0.6),
        "hatchback": Shape(
            (_lower(1.5, -1.5, 0.24, 0.92, 0.98), hatch_top),
            (0.92, -0.95), 0.36, 1.5, -1.5, 0.6, 0.66,
        ),
        "pickup": Shape(
            (_lower(1.9, -1.9, 0.32, 1.04, 1.06), pickup_top),
            (1.2, -1.2), 0.42, 1.9, -1.9, 0.68, 0.74, bed=(-0.5, -1.78, 1.065),
        ),
        "sedan": Shape(
            (_lower(1.85, -1.85, 0.24, 0.86, 0.94), sedan_top),
            (1.15, -1.15), 0.35, 1.85, -1.85, 0.57, 0.64,
        ),
        "truck": Shape(
            (frame, box, cab), (1.26, -0.62, -1.34), 0.38, 1.8, -1.8, 0.62, 0.62,
            box_behind_cab=True,
        ),
        "van": Shape(
            (_lower(1.8, -1.78, 0.24, 1.0, 1.06), van_top),
            (1.15, -1.15), 0.37, 1.8, -1.78, 0.6, 0.72,
        ),
    }


SHAPES = _make_shapes()


@dataclass(frozen=True)
class Camera3D:
    """A pinhole camera that looks at (0, 0, 0.7) from `distance` metres at yaw and pitch."""

    yaw: float
    pitch: float
    distance: float

    def position(self) -> Point:
        """Where the camera stands, in the vehicle's coordinates."""
        flat = self.distance * math.cos(self.pitch)
        return (
            flat * math.cos(self.yaw),
            flat * math.sin(self.yaw),
            0.7 + self.distance * math.sin(self.pitch),
        )

    def project(self, points: list[Point]) -> list[tuple[float, float]]:
        """Points in metres to the image plane, x to the right and y downwards."""
        cx, cy, cz = self.position()
        sin_yaw, cos_yaw = math.sin(self.yaw), math.cos(self.yaw)
        sin_pitch, cos_pitch = math.sin(self.pitch), math.cos(self.pitch)
        flat: list[tuple[float, float]] = []
        for x, y, z in points:
            dx, dy, dz = x - cx, y - cy, z - cz
            right = dy * cos_yaw - dx * sin_yaw
            out = dx * cos_yaw + dy * sin_yaw
            depth = -(out * cos_pitch + dz * sin_pitch)
            up = dz * cos_pitch - out * sin_pitch
            flat.append((right / depth, -up / depth))
        return flat


def _patch(quad: list[Point], u0: float, v0: float, u1: float, v1: float) -> list[Point]:
    """The part of a quad (low left, low right, high right, high left) between two corners."""
    corners = []
    for u, v in ((u0, v0), (u1, v0), (u1, v1), (u0, v1)):
        weights = ((1 - u) * (1 - v), u * (1 - v), u * v, (1 - u) * v)
        corners.append(
            (
                sum(w * p[0] for w, p in zip(weights, quad, strict=True)),
                sum(w * p[1] for w, p in zip(weights, quad, strict=True)),
                sum(w * p[2] for w, p in zip(weights, quad, strict=True)),
            )
        )
    return corners


def _normal(quad: list[Point]) -> Point:
    ax, ay, az = (quad[1][i] - quad[0][i] for i in range(3))
    bx, by, bz = (quad[3][i] - quad[0][i] for i in range(3))
    nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
    length = math.sqrt(nx * nx + ny * ny + nz * nz) or 1.0
    return nx / length, ny / length, nz / length


def _lit(colour: Colour, normal: Point, light: Point) -> Colour:
    dot = sum(n * v for n, v in zip(normal, light, strict=True))
    k = 0.66 + 0.42 * max(0.0, dot)
    red, green, blue = (min(255, int(channel * k)) for channel in colour)
    return red, green, blue


def _faces_camera(quad: list[Point], normal: Point, eye: Point) -> bool:
    return sum(n * (e - q) for n, e, q in zip(normal, eye, quad[0], strict=True)) > 0.0


def _prism_faces(prism: Prism, colour: Colour, eye: Point, light: Point) -> Iterator[Face]:
    sign = 1 if eye[1] > 0 else -1
    for i, window in ((0, prism.front_window), (1, None), (2, prism.rear_window)):
        quad = prism.strip(i)
        normal = _normal(quad)
        if not _faces_camera(quad, normal, eye):
            continue
        yield quad, _lit(colour, normal, light)
        if window is not None:
            yield _patch(quad, *window), _lit(GLASS, normal, light)
    side = prism.side(sign)
    normal = (0.0, float(sign), 0.12)
    yield side, _lit(colour, normal, light)
    a, b, c, d = side
    flank = [a, d, c, b]  # low front, low rear, high rear, high front
    if prism.stripe:
        yield _patch(flank, 0.0, 0.28, 1.0, 0.4), _lit(BOX, normal, light)
    for window in prism.side_windows:
        yield _patch(flank, *window), _lit(GLASS, normal, light)


def _disc(x: float, y: float, z: float, radius: float, corners: int = 18) -> list[Point]:
    return [
        (
            x + radius * math.cos(2 * math.pi * i / corners),
            y,
            max(0.0, z + radius * math.sin(2 * math.pi * i / corners)),
        )
        for i in range(corners)
    ]


def _upright(x: float, sign: int, y0: float, y1: float, z0: float, z1: float) -> list[Point]:
    """A rectangle at x that faces forwards (sign 1) or backwards; y as its viewer sees it."""
    return [(x, sign * y0, z0), (x, sign * y1, z0), (x, sign * y1, z1), (x, sign * y0, z1)]


def _plate_faces(text: str, x: float, sign: int, z: float, base: Colour) -> Iterator[Face]:
    """A plate at x whose middle is at height z, its frame, ground and glyphs as rectangles."""
    columns = 4 * len(text) + 1
    cell = min(0.112, 1.5 / columns)
    half, height = cell * columns / 2, 0.098
    left, low = -half + cell, z - 2.5 * height
    high = low + 5 * height
    yield _upright(x, sign, -half - 0.03, half + 0.03, low - 0.09, high + 0.09), PLATE_INK
    yield _upright(x, sign, -half, half, low - 0.055, high + 0.055), base
    for i, character in enumerate(text):
        rows = GLYPHS[character]
        for row in range(5):
            line = rows[3 * row : 3 * row + 3]
            start = 0
            while start < 3:
                if line[start] != "#":
                    start += 1
                    continue
                stop = start
                while stop < 3 and line[stop] == "#":
                    stop += 1
                y0 = left + cell * (4 * i + start)
                z0 = low + height * (4 - row)
                yield _upright(x, sign, y0, y0 + cell * (stop - start), z0, z0 + height), PLATE_INK
                start = stop


def vehicle_faces(
    body: str, colour: Colour, plate: str, plate_base: Colour, camera: Camera3D, light: Point
) -> list[Face]:
    """Every visible face of one vehicle, far to near, as 3-D polygons with their colours."""
    shape = SHAPES[body]
    eye = camera.position()
    facing = 1 if eye[0] > 0 else -1
    near = 1 if eye[1] > 0 else -1
    paints = {"body": colour, "box": BOX, "dark": CHASSIS}
    w, r = HALF_WIDTH, shape.wheel_radius
    faces: list[Face] = [(_disc(x, -near * (w - 0.1), r, r), TYRE) for x in shape.wheels]
    prisms = shape.prisms
    if shape.box_behind_cab and facing < 0:
        prisms = (prisms[2], prisms[0], prisms[1])
    for i, prism in enumerate(prisms):
        faces.extend(_prism_faces(prism, paints[prism.paint], eye, light))
        if shape.bed is not None and i == 0:
            x0, x1, z = shape.bed
            bed = [(x0, -0.8, z), (x0, 0.8, z), (x1, 0.8, z), (x1, -0.8, z)]
            faces.append((bed, (44, 42, 42)))
    for x in shape.wheels:
        faces.append((_disc(x, near * (w + 0.005), r, r + 0.07), (22, 22, 24)))
        faces.append((_disc(x, near * (w + 0.01), r, r), TYRE))
        faces.append((_disc(x, near * (w + 0.02), r, 0.55 * r, 12), HUB))
    end = (shape.front if facing > 0 else shape.rear) + 0.03 * facing
    lamp = HEADLIGHT if facing > 0 else TAIL_LIGHT
    z = shape.light_z
    for y in (-0.92, 0.68):
        faces.append((_upright(end, facing, y, y + 0.24, z - 0.12, z + 0.12), lamp))
    faces.extend(_plate_faces(plate, end + 0.02 * facing, facing, shape.plate_z, plate_base))
    return faces


def shadow(body: str) -> list[Point]:
    """The outline of a vehicle's shadow on the ground."""
    shape, w = SHAPES[body], HALF_WIDTH + 0.12
    x0, x1 = shape.rear - 0.15, shape.front + 0.15
    return [(x0, -w, 0.0), (x0, w, 0.0), (x1, w, 0.0), (x1, -w, 0.0)]
