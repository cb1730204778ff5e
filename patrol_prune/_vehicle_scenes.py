"""The scenes behind a vehicle and the cameras in front of it, for `vehicles`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Lens:
    """What one camera does to a picture.

    Args:
        cast: gain of red, green and blue.
        brightness: added to every pixel, in units of the whole range.
        contrast: gain around mid-grey.
        blur: radius of the Gaussian blur in pixels of a 64-pixel picture.
        noise: standard deviation of the sensor's noise, in units of the whole range.
    """

    cast: tuple[float, float, float]
    brightness: float
    contrast: float
    blur: float
    noise: float


LENSES: dict[str, Lens] = {
    "bridge": Lens((1.0, 1.0, 1.0), 0.0, 1.05, 0.0, 0.008),
    "gate": Lens((1.08, 1.0, 0.86), 0.03, 1.0, 0.25, 0.010),
    "roof": Lens((0.9, 0.99, 1.12), -0.04, 0.95, 0.3, 0.012),
    "tunnel": Lens((1.06, 0.98, 0.82), -0.12, 0.88, 0.2, 0.020),
}


class Canvas:
    """A square picture to draw on, in coordinates from 0 to 1 with y downwards."""

    def __init__(self, size: int, top: Colour, bottom: Colour) -> None:
        ramp = np.linspace(0.0, 1.0, size, dtype=np.float32)[:, None, None]
        rows = np.asarray(top, np.float32) * (1 - ramp) + np.asarray(bottom, np.float32) * ramp
        self._hold(Image.fromarray(rows.astype(np.uint8)).resize((size, size)))

    def _hold(self, image: Image.Image) -> None:
        self.size = image.width
        self.image = image
        self.draw = ImageDraw.Draw(image)

    @classmethod
    def on(cls, image: Image.Image) -> Canvas:
        """A canvas over a square picture that is there already; the picture is drawn on."""
        canvas = cls.__new__(cls)
        canvas._hold(image)
        return canvas

    def shade(self, share: float) -> Colour:
        """The ground's colour in a shadow that leaves this share of the light."""
        pixel = self.image.getpixel((self.size // 2, self.size - 2))
        assert isinstance(pixel, tuple)
        red, green, blue = (int(share * channel) for channel in pixel)
        return red, green, blue

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """An upright rectangle."""
        s = self.size
        self.draw.rectangle((x0 * s, y0 * s, x1 * s, y1 * s), fill=colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """An ellipse around (x, y)."""
        s = self.size
        self.draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=colour)

    def polygon(self, corners: np.ndarray, colour: Colour) -> None:
        """A filled polygon, its corners as x, y, x, y, ..."""
        self.draw.polygon((corners * self.size).tolist(), fill=colour)

    def polygons(
        self,
        points: np.ndarray,
        spans: tuple[tuple[int, int], ...],
        colours: list[list[int]],
        seen: list[bool],
    ) -> None:
        """Those polygons that are seen, in their order; `points[start:stop]` are one's corners."""
        flat = (points * self.size).ravel().tolist()
        for (start, stop), (red, green, blue), shown in zip(spans, colours, seen, strict=True):
            if shown:
                self.draw.polygon(flat[2 * start : 2 * stop], fill=(red, green, blue))


def _vary(rng: random.Random, colour: Colour, spread: int = 16) -> Colour:
    shift = rng.randint(-spread, spread)
    red, green, blue = (min(255, max(0, c + shift)) for c in colour)
    return red, green, blue


def _road(rng: random.Random, size: int) -> Canvas:
    canvas = Canvas(size, _vary(rng, (112, 168, 222)), _vary(rng, (224, 234, 240)))
    for _ in range(3):
        x = rng.uniform(-0.1, 1.1)
        canvas.ellipse(x, 0.5, rng.uniform(0.2, 0.4), rng.uniform(0.06, 0.16),
                       _vary(rng, (104, 142, 92)))
    for _ in range(rng.randint(1, 3)):
        canvas.ellipse(rng.random(), rng.uniform(0.06, 0.2), 0.14, 0.035, (240, 244, 248))
    canvas.rectangle(0, 0.48, 1, 1, _vary(rng, (112, 150, 78)))
    canvas.rectangle(0, 0.56, 1, 1, _vary(rng, (104, 104, 108)))
    offset = rng.uniform(-0.2, 0.0)
    for i in range(5):
        canvas.rectangle(offset + i * 0.28, 0.93, offset + i * 0.28 + 0.15, 0.955, (232, 226, 190))
    return canvas


def _city(rng: random.Random, size: int, night: bool = False) -> Canvas:
    top, bottom = ((16, 20, 44), (58, 56, 84)) if night else ((150, 176, 206), (214, 216, 220))
    canvas = Canvas(size, _vary(rng, top, 8), _vary(rng, bottom, 8))
    x = rng.uniform(-0.15, 0.0)
    while x < 1.0:
        width, height = rng.uniform(0.16, 0.3), rng.uniform(0.25, 0.55)
        wall = _vary(rng, (44, 44, 58), 8) if night else _vary(
            rng, rng.choice([(164, 138, 118), (134, 140, 150), (176, 166, 148)]))
        canvas.rectangle(x, 0.58 - height, x + width, 0.6, wall)
        for row in range(int(height / 0.1)):
            for column in range(int(width / 0.075)):
                lit = night and rng.random() < 0.4
                pane = (240, 208, 120) if lit else ((30, 30, 42) if night else (84, 96, 112))
                wx, wy = x + 0.025 + column * 0.075, 0.605 - height + row * 0.1
                canvas.rectangle(wx, wy, wx + 0.035, wy + 0.05, pane)
        x += width + rng.uniform(0.0, 0.03)
    canvas.rectangle(0, 0.58, 1, 1, (64, 64, 72) if night else (168, 164, 160))
    canvas.rectangle(0, 0.66, 1, 1, _vary(rng, (50, 50, 58) if night else (94, 94, 98), 8))
    return canvas


def _night(rng: random.Random, size: int) -> Canvas:
    return _city(rng, size, night=True)


def _forest(rng: random.Random, size: int) -> Canvas:
    canvas = Canvas(size, _vary(rng, (150, 182, 176)), _vary(rng, (84, 110, 74)))
    for _ in range(9):
        x, width = rng.random(), rng.uniform(0.012, 0.03)
        canvas.rectangle(x - width, 0.1, x + width, 0.62, _vary(rng, (78, 58, 42)))
        for _ in range(2):
            canvas.ellipse(x + rng.uniform(-0.06, 0.06), rng.uniform(0.05, 0.3),
                           rng.uniform(0.08, 0.15), rng.uniform(0.07, 0.13),
                           _vary(rng, (52, 98, 50), 24))
    canvas.rectangle(0, 0.58, 1, 1, _vary(rng, (92, 112, 62)))
    canvas.rectangle(0, 0.68, 1, 1, _vary(rng, (142, 118, 88)))
    return canvas


def _coast(rng: random.Random, size: int) -> Canvas:
    canvas = Canvas(size, _vary(rng, (90, 168, 226)), _vary(rng, (236, 236, 220)))
    if rng.random() < 0.7:
        canvas.ellipse(rng.random(), rng.uniform(0.08, 0.2), 0.06, 0.06, (255, 240, 180))
    canvas.rectangle(0, 0.42, 1, 0.62, _vary(rng, (40, 116, 168)))
    for _ in range(5):
        x, y = rng.random(), rng.uniform(0.45, 0.58)
        canvas.rectangle(x, y, x + 0.12, y + 0.008, (160, 206, 226))
    canvas.rectangle(0, 0.6, 1, 1, _vary(rng, (222, 204, 158)))
    return canvas


def _garage(rng: random.Random, size: int) -> Canvas:
    canvas = Canvas(size, _vary(rng, (120, 120, 122)), _vary(rng, (176, 174, 168)))
    stripe = rng.choice([(206, 160, 40), (52, 118, 176), (176, 64, 56), (70, 140, 92)])
    canvas.rectangle(0, 0.42, 1, 0.5, stripe)
    start = rng.uniform(0.0, 0.35)
    for i in range(3):
        x = start + i * 0.36
        canvas.rectangle(x, 0.0, x + 0.08, 0.62, _vary(rng, (148, 148, 146)))
        canvas.rectangle(x, 0.42, x + 0.08, 0.5, stripe)
    canvas.rectangle(0.1, 0.05, 0.9, 0.075, (250, 250, 240))
    canvas.rectangle(0, 0.62, 1, 1, _vary(rng, (128, 126, 126)))
    return canvas


def _tunnel(rng: random.Random, size: int) -> Canvas:
    canvas = Canvas(size, _vary(rng, (66, 60, 52)), _vary(rng, (120, 108, 88)))
    canvas.ellipse(0.5, 0.52, 0.62, 0.46, _vary(rng, (92, 84, 70)))
    canvas.ellipse(0.5, 0.54, 0.16, 0.13, _vary(rng, (216, 216, 206), 10))
    for i in range(6):
        x, width = 0.08 + 0.16 * i, 0.035 if i in (2, 3) else 0.055
        canvas.rectangle(x, 0.1 + 0.05 * abs(i - 2.5), x + width, 0.13 + 0.05 * abs(i - 2.5),
                         (250, 224, 150))
    canvas.rectangle(0, 0.58, 1, 1, _vary(rng, (70, 68, 66)))
    canvas.rectangle(0, 0.58, 1, 0.62, (150, 140, 118))
    for i in range(4):
        canvas.rectangle(0.05 + i * 0.28, 0.94, 0.18 + i * 0.28, 0.96, (214, 206, 176))
    return canvas


def _snow(rng: random.Random, size: int) -> Canvas:
    canvas = Canvas(size, _vary(rng, (176, 190, 206)), _vary(rng, (226, 230, 236)))
    for x in (rng.uniform(-0.1, 0.3), rng.uniform(0.5, 1.0)):
        canvas.polygon(np.array([x - 0.4, 0.56, x, rng.uniform(0.12, 0.24), x + 0.4, 0.56]),
                       _vary(rng, (140, 152, 172)))
    canvas.rectangle(0, 0.54, 1, 1, _vary(rng, (240, 243, 248), 6))
    for _ in range(6):
        x, height = rng.random(), rng.uniform(0.12, 0.24)
        canvas.polygon(np.array([x - 0.06, 0.6, x, 0.6 - height, x + 0.06, 0.6]),
                       _vary(rng, (52, 82, 76)))
    canvas.rectangle(0, 0.66, 1, 1, _vary(rng, (176, 180, 188)))
    canvas.rectangle(0, 0.93, 1, 1, (228, 232, 238))
    return canvas


SCENES: dict[str, Callable[[random.Random, int], Canvas]] = {
    "city": _city,
    "coast": _coast,
    "forest": _forest,
    "garage": _garage,
    "night": _night,
    "road": _road,
    "snow": _snow,
    "tunnel": _tunnel,
}


def photograph(picture: Image.Image, lens: Lens, size: int, seed: int) -> Image.Image:
    """The picture at `size` pixels as one camera records it: blur, cast, contrast, noise."""
    factor = picture.width // size
    if picture.width == factor * size:
        picture = picture.reduce(factor)
    else:
        picture = picture.resize((size, size), Image.Resampling.BOX)
    if lens.blur > 0.0:
        picture = picture.filter(ImageFilter.GaussianBlur(lens.blur * size / 64))
    cast = np.asarray(lens.cast, np.float32)
    gain = cast * np.float32(lens.contrast)
    offset = cast * np.float32(255.0 * (0.5 + lens.brightness - 0.5 * lens.contrast)) + 0.5
    noise = np.random.default_rng(seed).standard_normal((size, 3 * size), dtype=np.float32)
    noise *= np.float32(255.0 * lens.noise)
    # A line of pixels at a time: NumPy is slow where what repeats is three numbers long.
    pixels = np.asarray(picture).reshape(size, 3 * size) * np.tile(gain, size)
    pixels += np.tile(offset.astype(np.float32), size)
    pixels += noise
    pixels.clip(0.0, 255.0, out=pixels)
    return Image.fromarray(pixels.astype(np.uint8).reshape(size, size, 3))
