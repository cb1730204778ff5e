"""Readers of plates and places: geometry against an oracle; what they can read and cannot."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patrol_prune.errors import InputError
from patrol_prune.leaks import (
    Leak,
    PlateReader,
    ReaderConfig,
    SceneReader,
    guess_rate,
    map_square,
    plate_cells,
    square_of,
    weak_reader,
)
from patrol_prune.reid_layout import read_reid
from patrol_prune.vehicle_identities import (
    render_identity,
    sample_identity,
    sample_shot,
    write_vehicle_reid,
)
from patrol_prune.vehicle_truth import read_vehicle_truth

QUICK = ReaderConfig(epochs=8, batch_size=32, width=8)
SCENES = ("road", "coast")


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor, list[str], list[str]]:
    """Vehicles before two cameras, with plates of four characters that are far from each other."""
    rng = random.Random(seed)
    images, boxes, texts, scenes = [], [], [], []
    for i in range(count):
        identity = sample_identity(rng, "".join(rng.choice("17HC") for _ in range(3)))
        shot = replace(sample_shot(rng, (0, 5)[i % 2]), occluder="none")
        picture = render_identity(identity, shot)
        images.append(torch.from_numpy(np.asarray(picture.image).copy()).permute(2, 0, 1) / 255)
        boxes.append(picture.plate_corners)
        texts.append(identity.plate)
        scenes.append(SCENES[i % 2])
    return torch.stack(images), torch.tensor(boxes), texts, scenes


@pytest.fixture(scope="module")
def known() -> tuple[Tensor, Tensor, list[str], list[str]]:
    return pictures(64, 0)


@pytest.fixture(scope="module")
def victims() -> tuple[Tensor, Tensor, list[str], list[str]]:
    return pictures(24, 1)


@pytest.fixture(scope="module")
def reader(known: Any) -> PlateReader:
    return PlateReader(QUICK).fit(*known[:3])


def test_the_homography_agrees_with_its_linear_equations() -> None:
    rng = np.random.default_rng(0)
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=float)
    corners = 10 * square + rng.uniform(-2, 2, (5, 4, 2))
    points = rng.uniform(-0.3, 1.3, (7, 2))
    found = map_square(torch.tensor(corners), torch.tensor(points)).numpy()
    for quad, mapped in zip(corners, found, strict=True):
        rows = []
        for (u, v), (x, y) in zip(square, quad, strict=True):
            rows.append([u, v, 1, 0, 0, 0, -x * u, -x * v])
            rows.append([0, 0, 0, u, v, 1, -y * u, -y * v])
        matrix = np.append(np.linalg.solve(np.array(rows), quad.ravel()), 1.0).reshape(3, 3)
        seen = np.column_stack([points, np.ones(7)]) @ matrix.T
        assert np.allclose(mapped, seen[:, :2] / seen[:, 2:])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_points_of_a_quadrangle_come_back_from_the_square(seed: int, each: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    square = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=torch.float64)
    shifts = torch.rand(5, 4, 2, generator=generator, dtype=torch.float64)
    corners = 10 * square + 4 * shifts - 2
    shape = (5, 7, 2) if each else (7, 2)
    points = torch.rand(shape, generator=generator, dtype=torch.float64)
    there = map_square(corners, points)
    assert torch.allclose(square_of(corners, there), points.expand(5, 7, 2))
    assert torch.allclose(square_of(corners, corners), square.expand(5, 4, 2), atol=1e-9)


def test_a_cell_shows_its_part_of_the_plate() -> None:
    """Left third red, the middle green, the right one blue; also where the plate is turned."""
    image = torch.zeros(1, 3, 30, 60)
    for c in range(3):
        image[0, c, :, 20 * c : 20 * (c + 1)] = 1.0
    box = torch.tensor([[[0.0, 0.0], [60.0, 0.0], [60.0, 30.0], [0.0, 30.0]]])
    for turned, corners in ((image, box), (image.transpose(2, 3), box.flip(2))):
        cells = plate_cells(turned, corners, 3)
        assert cells.shape == (1, 3, 3, 20, 20)
        middle = cells[0, :, :, 8:12, 8:12].mean(dim=(2, 3))
        assert middle.argmax(dim=1).tolist() == [0, 1, 2]
        edge = cells[0, 1, :, 10, 0]
        assert int(edge.argmax()) == 0, "a cell reaches into its neighbour"


def test_light_and_colour_of_a_plate_do_not_matter() -> None:
    images, boxes, _, _ = pictures(2, 3)
    plain, dim = plate_cells(images, boxes, 3), plate_cells(0.5 * images + 0.2, boxes, 3)
    assert torch.allclose(plain, dim, atol=0.2)


def test_plates_of_the_originals_are_read(reader: PlateReader, victims: Any) -> None:
    leak = reader.accuracy(*victims[:3])
    assert leak.rate > 0.9 and leak.count == 72
    assert 0.15 < leak.chance < 0.5
    assert weak_reader(leak) == ""


def test_what_shows_nothing_is_read_at_chance(reader: PlateReader, victims: Any) -> None:
    images, boxes, texts, _ = victims
    grey = images.mean(dim=0, keepdim=True).expand_as(images).contiguous()
    leak = reader.accuracy(grey, boxes, texts)
    assert leak.rate < 0.6
    assert "its own weakness" in weak_reader(leak)


def test_accuracy_counts_characters(reader: PlateReader, victims: Any) -> None:
    images, boxes, _, _ = victims
    read = reader.read(images, boxes)
    assert reader.accuracy(images, boxes, read).rate == 1.0
    other = [("X" if text[0] != "X" else "Y") + text[1:] for text in read]
    assert reader.accuracy(images, boxes, other).rate == pytest.approx(2 / 3)


def test_a_fit_depends_on_its_seed_alone(known: Any) -> None:
    few = tuple(part[:16] for part in known[:3])
    config = ReaderConfig(epochs=1, batch_size=16, width=4)
    state = torch.random.get_rng_state()
    a, b, c = (PlateReader(replace(config, seed=seed)).fit(*few) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert a._network is not None and b._network is not None and c._network is not None
    weights = [torch.cat([p.flatten() for p in r._network.parameters()]) for r in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_scenes_are_told(known: Any, victims: Any) -> None:
    scene = SceneReader(QUICK).fit(known[0], known[3])
    leak = scene.accuracy(victims[0], victims[3])
    assert leak.rate > 0.9 and leak.chance == pytest.approx(0.5) and leak.count == 24
    blank = torch.full_like(victims[0], 0.5)
    assert scene.accuracy(blank, victims[3]).rate == pytest.approx(0.5)


def test_chance_is_the_better_of_two_guesses() -> None:
    assert guess_rate(Counter("aaab"), "aab") == pytest.approx(2 / 3)
    assert guess_rate(Counter("aabc"), "bbc") == pytest.approx(1 / 4)


def test_the_truth_of_a_set_is_in_the_order_of_its_pictures(tmp_path: Path) -> None:
    root = write_vehicle_reid(tmp_path / "set", identities=4, cameras=2, images_per_camera=1)
    found = read_reid(root)
    truth = read_vehicle_truth(root, found.gallery, 128)
    half = read_vehicle_truth(root, found.gallery, 64)
    assert torch.allclose(truth.boxes, 2 * half.boxes) and truth.boxes.shape == (4, 4, 2)
    assert truth.scenes == ("road", "city", "road", "city")
    assert truth.plates[0] == truth.plates[1] != truth.plates[2]
    assert truth.hidden.dtype == torch.bool
    with pytest.raises(InputError, match="picture of every|plate of every"):
        read_vehicle_truth(root, [replace(found.query[0], path=Path("image_query/x.jpg"))], 64)
    with pytest.raises(InputError, match="write_vehicle_reid wrote"):
        read_vehicle_truth(tmp_path, found.query, 64)


def test_bad_input_is_refused(known: Any) -> None:
    images, boxes, texts, scenes = (part[:4] for part in known)
    plates = PlateReader(QUICK)
    for call, match in (
        (lambda: plates.read(images, boxes), "not fitted"),
        (lambda: SceneReader(QUICK).tell(images), "not fitted"),
        (lambda: plates.fit((255 * images).to(torch.uint8), boxes, texts), "Divide bytes"),
        (lambda: plates.fit(images, boxes[:3], texts), "four corners"),
        (lambda: plates.fit(images, boxes, texts[:3]), "one truth for each"),
        (lambda: plates.fit(images, boxes, [*texts[:3], "17"]), "different lengths"),
        (lambda: plates.fit(images, boxes, ["111"] * 4), "differ"),
        (lambda: SceneReader(QUICK).fit(images, ["road"] * 4), "more places"),
        (lambda: ReaderConfig(batch_size=1), "too small"),
    ):
        with pytest.raises(InputError, match=match):
            call()
    assert weak_reader(Leak(0.95, 0.1, 10), least=0.96) != ""
