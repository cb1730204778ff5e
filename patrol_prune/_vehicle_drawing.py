"""The geometry behind `vehicles`: meshes of faces, a pinhole camera, and how they are painted.

The faces of a mesh are in painter's order, far to near, for one of the four corners a camera may
see. Meshes and plates are kept, so that a picture costs one projection of all points and one
polygon per face.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, get_args

import numpy as np

from patrol_prune._vehicle_scenes import Canvas
from patrol_prune._vehicle_shapes import GLYPHS, HALF_WIDTH, SHAPES, Paint, Point, Prism, Shape

Colour = tuple[int, int, int]
PAINTS: tuple[Paint, ...] = get_args(Paint)
FIXED: dict[Paint, Colour] = {
    "box": (226, 226, 220), "dark": (48, 48, 52), "glass": (58, 76, 94), "tyre": (28, 28, 30),
    "arch": (22, 22, 24), "hub": (172, 174, 178), "head": (250, 244, 208), "tail": (204, 24, 28),
    "bed": (44, 42, 42), "ink": (12, 12, 20), "plate": (248, 248, 244),
    "first": (226, 226, 220), "second": (48, 48, 52),
}
ROOFS = ("plain", "two-tone", "box", "bar", "sunroof")
WHEELS = {"plain": 0.55, "cap": 0.32, "sport": 0.74}
_UNLIT: Point = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Sticker:
    """A mark on a flank: a band over its length, a rectangle or an ellipse.

    Args:
        sides: 1 for the left flank, -1 for the right one, 0 for both.
        kind: "band", "square" or "disc".
        u: its middle in shares of the flank's length from the front; likewise `v` of its height.
        width: in shares of the length; likewise `height`.
        paint: which of the identity's two accents.
    """

    sides: int
    kind: str
    u: float
    v: float
    width: float
    height: float
    paint: Paint


@dataclass(frozen=True)
class Design:
    """A vehicle without its colours: body, roof, wheels, marks, and how far it is stretched."""

    body: str
    roof: str = "plain"
    wheels: str = "plain"
    stickers: tuple[Sticker, ...] = ()
    length: float = 1.0
    height: float = 1.0


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

    def project(self, points: np.ndarray) -> np.ndarray:
        """Points `[P, 3]` in metres to the image plane `[P, 2]`, x to the right, y downwards."""
        sin_yaw, cos_yaw = math.sin(self.yaw), math.cos(self.yaw)
        sin_pitch, cos_pitch = math.sin(self.pitch), math.cos(self.pitch)
        right_down_depth = np.array([
            [-sin_yaw, cos_yaw * sin_pitch, -cos_yaw * cos_pitch],
            [cos_yaw, sin_yaw * sin_pitch, -sin_yaw * cos_pitch],
            [0.0, -cos_pitch, -sin_pitch],
        ])
        seen = (points - np.array(self.position())) @ right_down_depth
        return seen[:, :2] / seen[:, 2:]


@dataclass(frozen=True)
class Light:
    """Where the light comes from, and the gain of a face: ambient + diffuse * max(0, cosine)."""

    direction: Point
    ambient: float = 0.66
    diffuse: float = 0.42
    shadow: float = 0.42


class Face(NamedTuple):
    """A polygon; its normal, none for a face that is not lit; whether it may turn away."""

    points: list[Point]
    paint: Paint
    normal: Point = _UNLIT
    turns: bool = False


@dataclass(frozen=True, eq=False)
class Mesh:
    """Faces as arrays: points `[P, 3]`, the span of each face, paint, normal, a point on it."""

    points: np.ndarray
    spans: tuple[tuple[int, int], ...]
    paints: np.ndarray
    normals: np.ndarray
    anchors: np.ndarray
    turns: np.ndarray

    @classmethod
    def of(cls, faces: list[Face]) -> Mesh:
        """The faces in their order."""
        ends = np.cumsum([len(face.points) for face in faces]).tolist()
        return cls(
            np.array([point for face in faces for point in face.points]),
            tuple(zip([0, *ends[:-1]], ends, strict=True)),
            np.array([PAINTS.index(face.paint) for face in faces]),
            np.array([face.normal for face in faces]),
            np.array([face.points[0] for face in faces]),
            np.array([face.turns for face in faces]),
        )


class Placement(NamedTuple):
    """From the image plane to the picture, in shares of its side: `gain * xy + (dx, dy)`."""

    gain: float
    dx: float
    dy: float


def _patch(quad: list[Point], u0: float, v0: float, u1: float, v1: float) -> list[Point]:
    """The part of a quad (low left, low right, high right, high left) between two corners."""
    return [_at(quad, u, v) for u, v in ((u0, v0), (u1, v0), (u1, v1), (u0, v1))]


def _at(quad: list[Point], u: float, v: float) -> Point:
    weights = np.array([(1 - u) * (1 - v), u * (1 - v), u * v, (1 - u) * v])
    x, y, z = (weights @ np.array(quad)).tolist()
    return x, y, z


def _normal(quad: list[Point]) -> Point:
    corner = np.array(quad)
    normal = np.cross(corner[1] - corner[0], corner[3] - corner[0])
    x, y, z = (normal / (np.linalg.norm(normal) or 1.0)).tolist()
    return x, y, z


def _prism_faces(prism: Prism, near: int, paint: Paint, marks: list[Sticker]) -> Iterator[Face]:
    for i, window in ((0, prism.front_window), (1, None), (2, prism.rear_window)):
        quad = prism.strip(i)
        normal = _normal(quad)
        yield Face(quad, paint, normal, True)
        if window is not None:
            yield Face(_patch(quad, *window), "glass", normal, True)
    side = prism.side(near)
    normal = (0.0, float(near), 0.12)
    yield Face(side, paint, normal)
    a, b, c, d = side
    flank = [a, d, c, b]  # low front, low rear, high rear, high front
    if prism.stripe:
        yield Face(_patch(flank, 0.0, 0.28, 1.0, 0.4), "box", normal)
    for mark in marks:
        if mark.sides in (0, near):
            yield Face(_sticker(mark, flank), mark.paint, normal)
    for window in prism.side_windows:
        yield Face(_patch(flank, *window), "glass", normal)


def _sticker(mark: Sticker, flank: list[Point]) -> list[Point]:
    if mark.kind == "disc":
        angles = [2 * math.pi * i / 10 for i in range(10)]
        return [_at(flank, mark.u + mark.width / 2 * math.cos(t),
                    mark.v + mark.height / 2 * math.sin(t)) for t in angles]
    u0, u1 = mark.u - mark.width / 2, mark.u + mark.width / 2
    if mark.kind == "band":
        u0, u1 = 0.0, 1.0
    return _patch(flank, u0, mark.v - mark.height / 2, u1, mark.v + mark.height / 2)


def _disc(x: float, y: float, z: float, radius: float, corners: int = 16) -> list[Point]:
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return [(x + radius * math.cos(t), y, max(0.0, z + radius * math.sin(t))) for t in angles]


def _upright(x: float, sign: int, y0: float, y1: float, z0: float, z1: float) -> list[Point]:
    """A rectangle at x that faces forwards (sign 1) or backwards; y as its viewer sees it."""
    return [(x, sign * y0, z0), (x, sign * y1, z0), (x, sign * y1, z1), (x, sign * y0, z1)]


def _roof_faces(roof: str, top: Prism, near: int) -> Iterator[Face]:
    """What stands on the roof of the topmost solid."""
    (_, _, _), (x0, z, _), (x1, _, w), _ = top.profile
    middle, half = (x0 + x1) / 2, (x0 - x1) / 2
    if roof == "sunroof":
        quad = top.strip(1)
        yield Face(_patch(quad, 0.15, 0.15, 0.85, 0.75), "glass", _normal(quad), True)
    elif roof in ("box", "bar"):
        long, high, wide = (0.8 * half, 0.26, 0.62 * w) if roof == "box" else (0.1, 0.15, 0.8 * w)
        a, b = middle + long, middle - long
        solid = Prism(((a, z, wide), (a, z + high, wide), (b, z + high, wide), (b, z, wide)))
        yield from _prism_faces(solid, near, "second", [])


def _solid_faces(design: Design, shape: Shape, facing: int, near: int) -> Iterator[Face]:
    order = list(range(len(shape.prisms)))
    if shape.box_behind_cab and facing < 0:
        order = [2, 0, 1]
    top = min(1, len(order) - 1)
    flank = top if shape.box_behind_cab else 0
    for i in order:
        prism = shape.prisms[i]
        two_tone = design.roof == "two-tone" and i == 1
        marks = list(design.stickers) if i == flank else []
        if design.roof == "two-tone" and len(order) == 1:
            marks.append(Sticker(0, "band", 0.5, 0.93, 1.0, 0.14, "second"))
        yield from _prism_faces(prism, near, "second" if two_tone else prism.paint, marks)
        if shape.bed is not None and i == 0:
            x0, x1, z = shape.bed
            yield Face([(x0, -0.8, z), (x0, 0.8, z), (x1, 0.8, z), (x1, -0.8, z)], "bed")
        if i == top:
            yield from _roof_faces(design.roof, prism, near)


@lru_cache(maxsize=1024)
def vehicle_mesh(design: Design, facing: int, near: int) -> Mesh:
    """All faces but the plate, far to near.

    Args:
        design: what to build.
        facing: 1 where the camera sees the front, -1 the rear.
        near: 1 where the camera stands to the vehicle's left, -1 to its right.
    """
    shape = SHAPES[design.body]
    w, r = HALF_WIDTH, shape.wheel_radius
    faces = [Face(_disc(x, -near * (w - 0.1), r, r), "tyre") for x in shape.wheels]
    faces.extend(_solid_faces(design, shape, facing, near))
    for x in shape.wheels:
        faces.append(Face(_disc(x, near * (w + 0.005), r, r + 0.07), "arch"))
        faces.append(Face(_disc(x, near * (w + 0.01), r, r), "tyre"))
        hub = WHEELS[design.wheels]
        faces.append(Face(_disc(x, near * (w + 0.02), r, hub * r, 12), "hub"))
    end = (shape.front if facing > 0 else shape.rear) + 0.03 * facing
    for y in (-0.92, 0.68):
        z = shape.light_z
        lamp = _upright(end, facing, y, y + 0.24, z - 0.12, z + 0.12)
        faces.append(Face(lamp, "head" if facing > 0 else "tail"))
    mesh = Mesh.of(faces)
    mesh.points[:] *= (design.length, 1.0, design.height)
    mesh.anchors[:] *= (design.length, 1.0, design.height)
    return mesh


def _plate_faces(text: str, x: float, sign: int, z: float) -> Iterator[Face]:
    """A plate at x whose middle is at height z: its frame, ground, and runs of its glyphs."""
    columns = 4 * len(text) + 1
    cell = min(0.112, 1.5 / columns)
    half, height = cell * columns / 2, 0.098
    left, low = -half + cell, z - 2.5 * height
    high = low + 5 * height
    yield Face(_upright(x, sign, -half - 0.03, half + 0.03, low - 0.09, high + 0.09), "ink")
    yield Face(_upright(x, sign, -half, half, low - 0.055, high + 0.055), "plate")
    for i, character in enumerate(text):
        for row in range(5):
            line = GLYPHS[character][3 * row : 3 * row + 3] + "."
            z0 = low + height * (4 - row)
            start = None
            for column, dot in enumerate(line):
                if dot == "#" and start is None:
                    start = column
                elif dot != "#" and start is not None:
                    y0, y1 = (left + cell * (4 * i + c) for c in (start, column))
                    yield Face(_upright(x, sign, y0, y1, z0, z0 + height), "ink")
                    start = None


@lru_cache(maxsize=1024)
def plate_mesh(text: str, design: Design, facing: int) -> Mesh:
    """The plate at the vehicle's front (facing 1) or rear; its second face is the ground."""
    shape = SHAPES[design.body]
    end = (shape.front if facing > 0 else shape.rear) * design.length + 0.05 * facing
    return Mesh.of(list(_plate_faces(text, end, facing, shape.plate_z * design.height)))


def shadow(design: Design) -> np.ndarray:
    """The outline `[4, 3]` of a vehicle's shadow on the ground."""
    shape, w = SHAPES[design.body], HALF_WIDTH + 0.12
    x0, x1 = design.length * shape.rear - 0.15, design.length * shape.front + 0.15
    return np.array([(x0, -w, 0.0), (x0, w, 0.0), (x1, w, 0.0), (x1, -w, 0.0)])


def palette(colours: dict[Paint, Colour]) -> np.ndarray:
    """All paints `[len(PAINTS), 3]`, those given in place of the usual ones."""
    return np.array([colours.get(paint) or FIXED[paint] for paint in PAINTS], dtype=float)


def place(flat: np.ndarray, scale: float, shift: tuple[float, float]) -> Placement:
    """Fit points `[P, 2]` into the picture; a shift never cuts them off at the sides."""
    (x0, y0), (x1, y1) = flat.min(axis=0).tolist(), flat.max(axis=0).tolist()
    gain = scale * min(1.0 / (x1 - x0), 0.86 / (y1 - y0))
    margin = 0.5 - gain * (x1 - x0) / 2  # the plate sits at the vehicle's end: never cut it off
    dx = 0.5 + max(-margin, min(margin, shift[0])) - gain * (x0 + x1) / 2
    return Placement(gain, dx, 0.92 + shift[1] - gain * y1)


def draw_vehicle(
    canvas: Canvas,
    design: Design,
    paints: np.ndarray,
    plate: str,
    camera: Camera3D,
    light: Light,
    fit: tuple[float, tuple[float, float]],
) -> list[tuple[float, float]]:
    """Draw a vehicle with its shadow; returns the plate's corners.

    Args:
        canvas: is drawn on.
        design: what to draw.
        paints: from `palette`.
        plate: characters out of `GLYPHS`.
        camera: from where it is seen.
        light: how it is lit.
        fit: the share of the picture it fills, and the shift of its middle.

    Returns:
        The corners of the plate's ground in shares of the picture: high left, high right, low
        right, low left, as the viewer sees them.
    """
    eye = camera.position()
    facing, near = (1 if eye[0] > 0 else -1), (1 if eye[1] > 0 else -1)
    body, sign = vehicle_mesh(design, facing, near), plate_mesh(plate, design, facing)
    points = np.concatenate([body.points, sign.points, shadow(design)])
    flat = camera.project(points)
    where = place(flat[: -4], *fit)
    flat = where.gain * flat + (where.dx, where.dy)
    split = len(body.points)
    canvas.polygon(flat[-4:].ravel(), canvas.shade(light.shadow))
    _paint(canvas, body, flat[:split], paints, eye, light)
    _paint(canvas, sign, flat[split:-4], paints, eye, light)
    low_left, low_right, high_right, high_left = flat[split + 4 : split + 8].tolist()
    return [(x, y) for x, y in (high_left, high_right, low_right, low_left)]


def _paint(
    canvas: Canvas, mesh: Mesh, flat: np.ndarray, paints: np.ndarray, eye: Point, light: Light
) -> None:
    lit = mesh.normals.any(axis=1)
    cosine = np.maximum(0.0, mesh.normals @ np.array(light.direction))
    gain = np.where(lit, light.ambient + light.diffuse * cosine, 1.0)
    colours = np.minimum(255.0, paints[mesh.paints] * gain[:, None]).astype(int).tolist()
    toward = (mesh.normals * (np.array(eye) - mesh.anchors)).sum(axis=1) > 0.0
    seen = (toward | ~mesh.turns).tolist()
    canvas.polygons(flat, mesh.spans, colours, seen)
