"""What a vehicle is made of, for `vehicles`: bodies as extruded profiles, and plate glyphs.

A vehicle stands at the origin, x forward, y to its left, z up, in metres of a toy whose width is
1.9. Every solid is a side profile extruded over the width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Point = tuple[float, float, float]
Paint = Literal[
    "body", "box", "dark", "glass", "tyre", "arch", "hub", "head", "tail", "bed", "ink", "plate",
    "first", "second",
]

HALF_WIDTH = 0.95

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
    paint: Paint = "body"
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
