"""Rendered identities: the layout of VeRi-776, the truth beside it, and the same for a seed."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patrol_prune import _vehicle_drawing as drawing
from patrol_prune import _vehicle_sites as sites
from patrol_prune import vehicle_identities
from patrol_prune.errors import InputError
from patrol_prune.reid_layout import ReidSet, read_reid
from patrol_prune.vehicle_identities import (
    MOST_CAMERAS,
    Shot,
    VehicleIdentity,
    render_identity,
    sample_identity,
    sample_shot,
    write_vehicle_reid,
)
from patrol_prune.vehicles import PLATE_CHARACTERS, VIEWPOINTS

SMALL = {"identities": 5, "cameras": 3, "images_per_camera": 2, "test_identities": 2}


def pixels(identity: VehicleIdentity, shot: Shot, size: int = 64) -> np.ndarray:
    return np.asarray(render_identity(identity, shot, size).image).astype(int)


def plain(seed: int = 0, camera: int = 0) -> tuple[VehicleIdentity, Shot]:
    rng = random.Random(seed)
    return sample_identity(rng, "7H2"), replace(sample_shot(rng, camera), occluder="none")


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vehicle_reid(tmp_path_factory.mktemp("reid") / "set", **SMALL)


@pytest.fixture(scope="module")
def read(written: Path) -> ReidSet:
    return read_reid(written)


@pytest.fixture(scope="module")
def truth(written: Path) -> dict[str, Any]:
    return json.loads((written / "attributes.json").read_text())["files"]


def test_the_reader_reads_what_is_written(read: ReidSet) -> None:
    assert read.layout == "veri-776"
    assert (len(read.train), len(read.query), len(read.gallery)) == (3 * 3 * 2, 2 * 3, 2 * 3 * 2)
    assert {i.identity for i in read.train} == {1, 2, 3}
    assert {i.identity for i in read.gallery} == {4, 5}
    assert Counter((i.identity, i.camera) for i in read.query) == {
        (identity, camera): 1 for identity in (4, 5) for camera in (1, 2, 3)
    }


def test_the_index_lists_say_what_the_cameras_rule_says(written: Path, read: ReidSet) -> None:
    """Matches: the same vehicle by another camera. Junk: by the same one, the query itself too."""
    lines = (written / "gt_index.txt").read_text().splitlines()
    for query, line, junk in zip(read.query, lines, read.junk, strict=True):
        same = [p for p, g in enumerate(read.gallery) if g.identity == query.identity]
        apart = [p for p in same if read.gallery[p].camera != query.camera]
        assert [int(word) - 1 for word in line.split()] == apart
        assert list(junk) == [p for p in same if p not in apart]
        assert query.path.name in {read.gallery[p].path.name for p in junk}


def test_the_truth_is_of_every_file(written: Path, read: ReidSet, truth: dict[str, Any]) -> None:
    files = {p.relative_to(written).as_posix() for p in written.rglob("*.jpg")}
    assert set(truth) == files
    for image in (*read.train, *read.query, *read.gallery):
        said = truth[image.path.relative_to(written).as_posix()]
        assert (said["identity"], said["camera"]) == (image.identity, image.camera)
        assert said["scene"] == sites.SITES[image.camera - 1].scene
        assert len(said["plate"]) == 3 and set(said["plate"]) <= set(PLATE_CHARACTERS)
        with Image.open(image.path) as picture:
            assert picture.size == (64, 64) and picture.mode == "RGB"
    plates = {t["identity"]: t["plate"] for t in truth.values()}
    assert len(set(plates.values())) == len(plates), "each vehicle has a plate of its own"
    assert len({(t["identity"], t["plate"]) for t in truth.values()}) == len(plates)


@pytest.mark.parametrize("camera", range(MOST_CAMERAS))
def test_the_plate_is_within_its_corners(camera: int) -> None:
    """Another text changes pixels inside the corners only, and many of those."""
    for seed in range(3):
        identity, shot = plain(seed, camera)
        picture = render_identity(identity, shot)
        other = render_identity(replace(identity, plate="PYL"), shot)
        shown = np.asarray(picture.image).astype(int)
        changed = np.abs(shown - np.asarray(other.image)).max(2) > 40
        rows, columns = np.nonzero(changed)
        (x0, y0), (x1, y1), (x2, y2), (x3, y3) = picture.plate_corners
        assert changed.sum() > 20
        assert min(x0, x3) - 2 <= columns.min() and columns.max() <= max(x1, x2) + 2
        assert min(y0, y1) - 2 <= rows.min() and rows.max() <= max(y2, y3) + 2
        assert x0 < x1 and x3 < x2 and y0 < y3 and y1 < y2
        assert other.plate_corners == picture.plate_corners


@pytest.mark.parametrize("viewpoint", VIEWPOINTS)
def test_the_plate_is_readable_at_64_pixels(viewpoint: str) -> None:
    """Nearest-template reading through another camera's lens: the true plate explains it best."""
    for seed in range(2):
        identity, shot = plain(seed)
        shot = replace(shot, viewpoint=viewpoint)
        taken = pixels(identity, shot)
        for position in range(3):
            candidates = {}
            for character in PLATE_CHARACTERS:
                plate = identity.plate[:position] + character + identity.plate[position + 1 :]
                seen = replace(shot, noise=shot.noise + 1, lighting="overcast")
                candidates[character] = np.abs(taken - pixels(replace(identity, plate=plate), seen))
            best = min(candidates, key=lambda c: candidates[c].sum())
            assert best == identity.plate[position]


@pytest.mark.parametrize(
    ("roof", "wheels"), [(r, w) for r in drawing.ROOFS for w in drawing.WHEELS]
)
def test_roof_and_wheels_are_seen(roof: str, wheels: str) -> None:
    identity, shot = plain()
    design = replace(identity.design, roof=roof, wheels=wheels)
    shown = pixels(replace(identity, design=design), shot)
    for other in (replace(design, roof="bar" if roof != "bar" else "plain"),
                  replace(design, wheels="cap" if wheels != "cap" else "sport")):
        differs = np.abs(shown - pixels(replace(identity, design=other), shot)).max(2) > 30
        assert differs.sum() > 4


def test_a_sticker_is_on_the_side_it_is_on() -> None:
    identity, shot = plain()
    mark = drawing.Sticker(1, "square", 0.5, 0.5, 0.2, 0.4, "first")
    bare = replace(identity, design=drawing.Design("van"))
    marked = replace(bare, design=replace(bare.design, stickers=(mark,)))
    for viewpoint, seen in (("front-left", True), ("rear-left", True), ("front-right", False)):
        view = replace(shot, viewpoint=viewpoint)
        assert (pixels(bare, view) != pixels(marked, view)).any() == seen


def test_what_stands_in_front_of_the_plate_is_told() -> None:
    identity, shot = plain()
    corners = render_identity(identity, shot).plate_corners
    middle = sum(x for x, _ in corners) / 4 / 64
    for where, hidden in ((middle, True), (0.97 if middle < 0.5 else -0.05, False)):
        picture = render_identity(identity, replace(shot, occluder="pole", where=where))
        assert picture.plate_hidden == hidden


def test_every_camera_has_a_scene_and_a_lens_of_its_own() -> None:
    assert len({site.scene for site in sites.SITES}) == len({s.lens for s in sites.SITES}) == 8
    identity, _ = plain()
    means = [np.mean([pixels(identity, sample_shot(random.Random(i), c)).mean() for i in range(4)])
             for c in range(MOST_CAMERAS)]
    assert len({round(float(m), 1) for m in means}) == MOST_CAMERAS


def test_same_seed_same_bytes_and_a_larger_set_begins_with_the_smaller(
    tmp_path: Path, written: Path
) -> None:
    again = write_vehicle_reid(tmp_path / "again", **SMALL)
    assert tree(again) == tree(written)
    larger = write_vehicle_reid(tmp_path / "larger", **{**SMALL, "identities": 6, "cameras": 2})
    same = {name: data for name, data in tree(written).items()
            if name.startswith("image_train") and "c003" not in name}
    assert same and same.items() <= tree(larger).items()
    other = write_vehicle_reid(tmp_path / "other", **SMALL, seed=1)
    assert not {d for n, d in tree(other).items() if n.endswith("jpg")} & set(tree(again).values())


def test_a_complete_set_is_used_and_another_refused(tmp_path: Path) -> None:
    root = write_vehicle_reid(tmp_path / "set", **SMALL)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert write_vehicle_reid(root, **SMALL) == root
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    with pytest.raises(InputError, match="made with"):
        write_vehicle_reid(root, **SMALL, seed=1)
    gone = next((root / "image_test").iterdir())
    gone.unlink()
    with pytest.raises(InputError, match=gone.name):
        write_vehicle_reid(root, **SMALL)


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def stop(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return render_identity(*arguments)

    monkeypatch.setattr(vehicle_identities, "render_identity", stop)
    with pytest.raises(KeyboardInterrupt):
        write_vehicle_reid(tmp_path / "set", **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [{"identities": 3}, {"identities": 8001}, {"cameras": 1}, {"cameras": 9}, {"size": 63},
     {"size": 257}, {"images_per_camera": 0}, {"test_identities": 4}, {"test_identities": 1}],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(InputError, match="Choose a number|choose one"):
        write_vehicle_reid(tmp_path / "set", **{**SMALL, **change})
    assert not list(tmp_path.iterdir())
