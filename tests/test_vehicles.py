"""The rendered vehicles: deterministic, balanced, labelled truly, whole or not at all."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patrol_prune import _vehicle_drawing as drawing
from patrol_prune._vehicle_shapes import GLYPHS
from patrol_prune.errors import InputError
from patrol_prune.vehicles import (
    BACKGROUNDS,
    BODIES,
    CAMERAS,
    COLOURS,
    PLATE_CHARACTERS,
    VIEWPOINTS,
    Vehicle,
    render,
    sample_vehicle,
    write_vehicles,
)

RED_CAR = Vehicle("sedan", "red", "front-left", "bridge", "road", "A12")


def pixels(vehicle: Vehicle, size: int = 64) -> np.ndarray:
    return np.asarray(render(vehicle, size)).astype(int)


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("size", [32, 64, 97, 256])
def test_the_size_is_honoured(size: int) -> None:
    picture = render(RED_CAR, size)
    assert picture.size == (size, size)
    assert picture.mode == "RGB"


@pytest.mark.parametrize("size", [31, 257, 0])
def test_a_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(InputError, match="32 to 256"):
        render(RED_CAR, size)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_rendering_is_a_pure_function(body: str, background: str) -> None:
    vehicle = replace(RED_CAR, body=body, background=background, camera="tunnel", detail=5)
    state, numpy_state = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert (pixels(vehicle) == pixels(vehicle)).all()
    assert random.getstate() == state
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("body", BODIES), ("colour", tuple(COLOURS)), ("viewpoint", VIEWPOINTS),
        ("camera", CAMERAS), ("background", BACKGROUNDS), ("plate", ("A12", "A13", "7YT", "1111")),
    ],
)
def test_every_property_is_seen_in_the_picture(field: str, values: tuple[str, ...]) -> None:
    shown = [pixels(replace(RED_CAR, **{field: value})) for value in values]
    for i, one in enumerate(shown):
        assert all((one != other).any() for other in shown[:i]), values[i]


def test_a_plate_changes_nothing_but_the_plate() -> None:
    differs = np.abs(pixels(RED_CAR) - pixels(replace(RED_CAR, plate="PYL"))).max(axis=2) > 0
    rows, columns = np.nonzero(differs)
    assert np.ptp(columns) < 32 and np.ptp(rows) < 24
    assert differs.sum() > 30


def test_the_paint_has_the_colour_it_is_said_to_have() -> None:
    for name in ("red", "blue", "green"):
        image = pixels(replace(RED_CAR, colour=name, background="garage"))
        paint = ("red", "green", "blue").index(name)
        others = [c for c in range(3) if c != paint]
        count = (image[..., paint] > 1.4 * image[..., others].max(axis=2)).sum()
        assert count > 200, name


def test_no_two_glyphs_are_close() -> None:
    glyphs = list(GLYPHS.values())
    assert all(len(g) == 15 and set(g) <= {"#", "."} for g in glyphs)
    for i, one in enumerate(glyphs):
        for other in glyphs[:i]:
            assert one != other


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("viewpoint", VIEWPOINTS)
def test_the_plate_is_readable_at_64_pixels(body: str, viewpoint: str) -> None:
    """Nearest-template reading: the true plate explains the picture best."""
    vehicle = replace(RED_CAR, body=body, viewpoint=viewpoint, plate="7H2", camera="gate", detail=3)
    taken = pixels(vehicle)
    for position in range(3):
        candidates = {}
        for character in PLATE_CHARACTERS:
            plate = vehicle.plate[:position] + character + vehicle.plate[position + 1 :]
            clean = replace(vehicle, plate=plate, detail=vehicle.detail, camera="bridge")
            candidates[character] = np.abs(taken - pixels(clean)).sum()
        assert min(candidates, key=lambda c: candidates[c]) == vehicle.plate[position]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("shift", "outside"), [(-0.3, 0), (0.3, -1)])
def test_a_vehicle_is_never_cut_off(body: str, shift: float, outside: int) -> None:
    """A shift out of the picture is held back at the border: all of the vehicle stays inside."""
    for viewpoint in VIEWPOINTS:
        vehicle = replace(RED_CAR, body=body, viewpoint=viewpoint, scale=0.9, shift=(shift, 0.0))
        repainted = replace(vehicle, colour="blue", plate="111")
        columns = np.nonzero(np.abs(pixels(vehicle) - pixels(repainted)).max(axis=(0, 2)) > 20)[0]
        centred = replace(vehicle, shift=(0.0, 0.0)), replace(repainted, shift=(0.0, 0.0))
        middle = np.nonzero(np.abs(pixels(centred[0]) - pixels(centred[1])).max(axis=(0, 2)) > 20)
        assert abs(np.ptp(columns) - np.ptp(middle[0])) <= 2
        assert (columns[outside] < middle[0][outside]) == (shift < 0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("yaw", [-40, -10, 10, 40])
def test_a_plate_is_read_from_left_to_right_and_upright(sign: int, yaw: int) -> None:
    camera = drawing.Camera3D(np.radians(yaw if sign > 0 else 180 - yaw), np.radians(15), 7.5)
    mesh = drawing.plate_mesh("L1L", drawing.Design("sedan"), sign)
    flat = [camera.project(mesh.points[start:stop]) for start, stop in mesh.spans]
    for corners in flat:  # low left, low right, high right, high left, y downwards
        (x0, y0), (x1, _), (x2, y2), (x3, _) = corners
        assert x0 < x1 and x3 < x2 and y2 < y0
    glyphs = flat[2:]  # after the frame and the ground: L in five runs, 1 in five runs, L in five
    assert len(glyphs) == 15
    middle = [float(glyph[:, 0].mean()) for glyph in glyphs]
    assert max(middle[:5]) < min(middle[5:10]) and max(middle[5:10]) < min(middle[10:])
    heights = [float(glyph[:, 1].mean()) for glyph in glyphs[5:10]]
    assert heights == sorted(heights), "the first row is on top"
    widest = [float(np.ptp(glyph[:2, 0])) for glyph in glyphs[:5]]
    assert widest.index(max(widest)) == 4, "an L has its bar below"


def test_the_camera_agrees_with_a_projection_by_matrices() -> None:
    """Oracle: rotate with explicit axes and divide by depth."""
    rng = np.random.default_rng(0)
    camera = drawing.Camera3D(0.7, 0.3, 6.0)
    eye = np.array(camera.position())
    target = np.array([0.0, 0.0, 0.7])
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    points = rng.uniform(-1, 1, (20, 3))
    seen = (points - eye) @ np.stack([right, -up, forward]).T
    expected = seen[:, :2] / seen[:, 2:]
    assert np.allclose(camera.project(points), expected, atol=1e-12)


def test_a_sample_depends_on_its_generator_alone() -> None:
    draws = [sample_vehicle(np.random.default_rng(3)) for _ in range(2)]
    assert draws[0] == draws[1]
    assert sample_vehicle(np.random.default_rng(4)) != draws[0]
    assert sample_vehicle(np.random.default_rng(3), body="bus") == replace(draws[0], body="bus")


def test_samples_reach_every_value() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_vehicle(rng) for _ in range(300)]
    assert {v.body for v in drawn} == set(BODIES)
    assert {v.colour for v in drawn} == set(COLOURS)
    assert {v.viewpoint for v in drawn} == set(VIEWPOINTS)
    assert {v.camera for v in drawn} == set(CAMERAS)
    assert {v.background for v in drawn} == set(BACKGROUNDS)
    assert {c for v in drawn for c in v.plate} == set(PLATE_CHARACTERS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"body": "sedam"}, "Did you mean: sedan"), ({"colour": "beige"}, "colour"),
        ({"viewpoint": "top"}, "viewpoint"), ({"camera": "none"}, "camera"),
        ({"background": "moon"}, "background"), ({"plate": "AB"}, "3 or 4"),
        ({"plate": "aaa"}, "3 or 4"), ({"plate": "AAAAA"}, "3 or 4"),
    ],
)
def test_a_vehicle_refuses_what_it_cannot_be(change: dict[str, str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        replace(RED_CAR, **change)


def test_the_set_on_disk(tmp_path: Path) -> None:
    root = write_vehicles(tmp_path / "set", train=26, test=12, size=32, seed=1)
    record = json.loads((root / "attributes.json").read_text())
    names = {p.relative_to(root).as_posix() for p in root.rglob("*.png")}
    assert names == set(record["files"]) and len(names) == 38
    for part, count in (("train", 26), ("test", 12)):
        per_class = Counter(name.split("/")[1] for name in names if name.startswith(part))
        assert set(per_class) == set(BODIES) == set(record["classes"])
        assert sum(per_class.values()) == count
        assert max(per_class.values()) - min(per_class.values()) <= 1
    for name, truth in record["files"].items():
        vehicle = Vehicle(**{**truth, "shift": tuple(truth["shift"])})
        assert name.split("/")[1] == vehicle.body
        assert name.endswith(f"_{vehicle.plate}.png")
        with Image.open(root / name) as picture:
            assert (np.asarray(picture) == np.asarray(render(vehicle, 32))).all()
    contents = [data for name, data in tree(root).items() if name.endswith(".png")]
    assert len(set(contents)) == len(contents), "no picture is in both parts"
    assert [p.name for p in tmp_path.iterdir()] == ["set"], "nothing temporary is left"


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    a, b, c = (
        tree(write_vehicles(tmp_path / name, train=6, test=6, size=32, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert a == b
    assert not {d for n, d in a.items() if n.endswith("png")} & set(c.values())


def test_a_larger_set_begins_with_the_smaller(tmp_path: Path) -> None:
    small = tree(write_vehicles(tmp_path / "s", train=6, test=6, size=32))
    large = tree(write_vehicles(tmp_path / "l", train=18, test=7, size=32))
    del small["attributes.json"]
    assert small.items() <= large.items()


def test_a_complete_set_is_used_as_it_stands(tmp_path: Path) -> None:
    root = write_vehicles(tmp_path / "set", train=6, test=6, size=32)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert write_vehicles(root, train=6, test=6, size=32) == root
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


def test_other_parameters_missing_files_and_other_folders_are_refused(tmp_path: Path) -> None:
    root = write_vehicles(tmp_path / "set", train=6, test=6, size=32)
    with pytest.raises(InputError, match="made with"):
        write_vehicles(root, train=6, test=6, size=32, seed=1)
    gone = next(root.rglob("*.png"))
    gone.unlink()
    with pytest.raises(InputError, match=gone.name):
        write_vehicles(root, train=6, test=6, size=32)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="something else"):
        write_vehicles(other, train=6, test=6, size=32)
    assert (other / "mine.txt").read_text() == "keep"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    assert (write_vehicles(tmp_path / "set", train=6, test=6, size=32) / "train").is_dir()


def test_too_few_pictures_are_refused_before_any_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one per class"):
        write_vehicles(tmp_path / "set", train=6, test=5)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def stop(vehicle: Vehicle, size: int) -> Image.Image:
        drawn.append(vehicle)
        if len(drawn) > 4:
            raise KeyboardInterrupt
        return render(vehicle, size)

    monkeypatch.setattr("patrol_prune.vehicles.render", stop)
    with pytest.raises(KeyboardInterrupt):
        write_vehicles(tmp_path / "set", train=6, test=6, size=32)
    assert not list(tmp_path.iterdir())
