"""Images from folders, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from patrol_prune.data import (
    Batches,
    ImageSet,
    find_parts,
    flip_and_shift,
    load_image_folder,
    near_duplicates,
    open_rgb,
    read_image,
)
from patrol_prune.errors import InputError
from patrol_prune.pixels import Normalization


def _image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for number in range(3):
            _image(tmp_path / part / "red" / f"{number}.png", (255, 0, 0))
            _image(tmp_path / part / "blue" / f"{number}.png", (0, 0, 255), (9, 30))
    return tmp_path


def test_images_are_resized_cropped_and_labelled(folder: Path) -> None:
    images = load_image_folder(folder / "train", 16)
    assert images.classes == ("blue", "red")
    assert images.images.shape == (6, 3, 16, 16)
    red = images.pixels(images.labels == 1)  # type: ignore[arg-type]
    assert torch.equal(red[:, 0], torch.ones(3, 16, 16)) and float(red[:, 1:].max()) == 0.0


def test_parts_are_found(folder: Path) -> None:
    assert find_parts(folder) == (folder / "train", folder / "val")
    _image(folder / "test" / "red" / "0.png", (255, 0, 0))
    assert find_parts(folder) == (folder / "train", folder / "test")
    with pytest.raises(InputError, match="train/ and val/ or test/"):
        find_parts(folder / "train")
    with pytest.raises(InputError, match="does not exist"):
        find_parts(folder / "nowhere")


def test_images_in_no_class_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _image(folder / "train" / "0.png", (1, 2, 3))
    (folder / "train" / "list.txt").touch()
    assert len(load_image_folder(folder / "train", 16)) == 6
    assert "1 images lie in" in caplog.text
    caplog.clear()
    load_image_folder(folder / "val", 16)
    assert not caplog.text


def test_hidden_folders_and_files_are_no_classes_and_no_images(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = load_image_folder(folder / "train", 16)
    assert not caplog.text
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/red/0.png", "red/.ipynb_checkpoints/0.png",
                 "red/._0.png", "._0.png"):
        _image(folder / "train" / name, (1, 2, 3))
    (folder / "train" / "red" / ".DS_Store").touch()
    found = load_image_folder(folder / "train", 16)
    assert found.classes == plain.classes and torch.equal(found.images, plain.images)
    assert "2 class folders, 2 images" in caplog.text and len(caplog.records) == 1
    with pytest.raises(InputError, match="hidden folders alone"):
        (folder / "a" / ".hidden").mkdir(parents=True)
        load_image_folder(folder / "a", 16)


def test_files_of_other_kinds_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("red/a.gif", "blue/b.GIF", "blue/c.jfif", "red/list"):
        (folder / "train" / name).touch()
    assert len(load_image_folder(folder / "train", 16)) == 6
    assert "4 files are left out as no images (.gif: 2" in caplog.text
    assert ".jfif: 1" in caplog.text and "no ending: 1" in caplog.text
    assert len(caplog.records) == 1
    (folder / "train" / "green").mkdir()
    (folder / "train" / "green" / "d.heic").touch()
    with pytest.raises(InputError, match=r"classes green.*5 files .*\.heic: 1"):
        load_image_folder(folder / "train", 16)


def test_no_image_and_one_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one folder per class"):
        load_image_folder(tmp_path, 16)
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="remove folders without any"):
        load_image_folder(tmp_path, 16)
    _image(tmp_path / "a" / "0.png", (1, 2, 3))
    with pytest.raises(InputError, match="at least two classes"):
        load_image_folder(tmp_path, 16)


def test_grey_images_of_16_bits_are_rescaled_and_not_clipped(tmp_path: Path) -> None:
    """A 16-bit copy of an 8-bit image is that image: v -> 257 v."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "8.png")
    for name in ("16.png", "16.tif"):
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / name)
        assert (read_image(tmp_path / name, 16) == read_image(tmp_path / "8.png", 16)).all()


@pytest.mark.parametrize(("kind", "message"), [(np.int32, "32 bits"), (np.float32, "floating")])
def test_grey_values_of_no_known_range_are_refused(
    tmp_path: Path, kind: type, message: str
) -> None:
    Image.fromarray(np.full((16, 16), 300, dtype=kind)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=rf"a\.tif holds .*{message}"):
        read_image(tmp_path / "a.tif", 16)


def test_an_image_that_pillow_takes_for_a_bomb_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _image(tmp_path / "large.png", (1, 2, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(InputError, match=r"large\.png cannot be read"):
        read_image(tmp_path / "large.png", 16)


def test_a_broken_file_is_named_whatever_its_decoder_raises(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    first, _, last = (tmp_path / "a.png").read_bytes().rpartition(b"IDAT")
    (tmp_path / "a.png").write_bytes(first + b"ID\0T" + last)
    with pytest.raises(SyntaxError), Image.open(tmp_path / "a.png") as handle:
        handle.load()
    with pytest.raises(InputError, match=r"a\.png cannot be read \(broken PNG"):
        read_image(tmp_path / "a.png", 16)


TURNED = {  # orientation -> what is shown of what is stored
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_images_stand_upright_as_their_exif_says(tmp_path: Path, ending: str) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(stored).save(tmp_path / f"plain.{ending}")
    with Image.open(tmp_path / f"plain.{ending}") as handle:
        plain = np.asarray(handle.convert("RGB"))
    assert (np.asarray(open_rgb(tmp_path / f"plain.{ending}")) == plain).all()
    for orientation, turned in TURNED.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.fromarray(stored).save(tmp_path / f"a.{ending}", exif=exif)
        assert (np.asarray(open_rgb(tmp_path / f"a.{ending}")) == turned(plain)).all(), orientation


def test_grey_images_of_16_bits_are_turned_too_and_a_broken_exif_turns_nothing(
    tmp_path: Path
) -> None:
    grey = np.arange(240, dtype=np.uint8).reshape(12, 20)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png", exif=exif)
    assert (np.asarray(open_rgb(tmp_path / "16.png"))[..., 0] == np.rot90(grey, -1)).all()
    Image.fromarray(grey).save(tmp_path / "broken.png", exif=b"Exif\0\0no header")
    assert (np.asarray(open_rgb(tmp_path / "broken.png"))[..., 0] == grey).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_lies_on_white(tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    bands = rng.integers(0, 256, (12, 20, len(mode)), dtype=np.uint8)
    Image.fromarray(bands, mode).save(tmp_path / "a.png")
    colour, alpha = bands[..., :-1].astype(float), bands[..., -1:] / 255
    wanted = colour * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(open_rgb(tmp_path / "a.png")) - wanted).max() <= 1
    bands[..., -1] = 255
    Image.fromarray(bands, mode).save(tmp_path / "a.png")
    assert (np.asarray(open_rgb(tmp_path / "a.png")) == bands[..., :-1]).all()


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_colour_that_stands_for_transparent_is_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (8, 8), (10, 10, 10))
    image.paste((70, 70, 70), (0, 0, 4, 8))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "a.png", transparency=image.getpixel((7, 7)))
    found = np.asarray(open_rgb(tmp_path / "a.png"))
    assert (found[:, 4:] == 255).all() and (found[:, :4] == 70).all()


def test_a_large_seed_still_draws(folder: Path) -> None:
    images = load_image_folder(folder / "train", 16)
    small, large = (Batches(images, 2, shuffle=True, seed=s) for s in (0, 2**63))
    assert [y.tolist() for _, y in large] == [y.tolist() for _, y in small]


def test_an_unreadable_image_is_named(folder: Path) -> None:
    bad = folder / "train" / "red" / "torn.jpg"
    bad.write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(InputError, match="torn.jpg"):
        load_image_folder(folder / "train", 16)


def test_other_classes_and_labels_outside_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="training part does not: red"):
        load_image_folder(folder / "val", 16, classes=("blue", "green"))
    some = load_image_folder(folder / "val", 16, classes=("azure", "blue", "green", "red"))
    assert sorted(set(some.labels.tolist())) == [1, 3] and len(some.classes) == 4
    with pytest.raises(InputError, match=r"0\.\.1 for 2 classes, came 2 at position 1"):
        ImageSet(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 2]), ("a", "b"))


def _noise(count: int = 10) -> ImageSet:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=g)
    return ImageSet(images, torch.arange(count) % 2, ("a", "b"))


def test_batches_repeat_by_epoch_and_leave_the_global_generator() -> None:
    state = torch.get_rng_state()
    batches = Batches(_noise(), 4, augment=True, shuffle=True, seed=3)
    first, second = list(batches), list(batches)
    batches.set_epoch(0)
    again = list(batches)
    assert torch.equal(torch.cat([x for x, _ in first]), torch.cat([x for x, _ in again]))
    assert not torch.equal(torch.cat([x for x, _ in first]), torch.cat([x for x, _ in second]))
    assert torch.equal(state, torch.get_rng_state())


def test_a_shuffled_epoch_never_ends_with_a_single_image() -> None:
    assert [len(x) for x, _ in Batches(_noise(9), 4, shuffle=True)] == [4, 4]
    assert [len(x) for x, _ in Batches(_noise(9), 4)] == [4, 4, 1]


def test_every_image_is_seen_once_and_normalised() -> None:
    normal = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    images = _noise()
    x = torch.cat([x for x, _ in Batches(images, 4, normalization=normal)])
    torch.testing.assert_close(normal.to_pixels(x), images.pixels())
    with pytest.raises(InputError, match="at least one image"):
        Batches(images, 4, indices=torch.tensor([], dtype=torch.long))


def test_flip_and_shift_moves_whole_images() -> None:
    images = _noise(40).images
    moved = flip_and_shift(images, torch.Generator().manual_seed(1))
    inner = moved[:, :, 2:-2, 2:-2]
    found = 0
    for before, after in zip(images, inner, strict=True):
        for candidate in (before, before.flip(2)):
            patches = candidate.unfold(1, 12, 1).unfold(2, 12, 1).permute(1, 2, 0, 3, 4)
            found += int((patches == after).flatten(2).all(2).any())
    assert found == 40


@pytest.mark.parametrize("change", [
    lambda x: x.index_fill(2, torch.tensor([3]), 0.5) * 0.02 + x * 0.98,
    lambda x: x.flip(3),
    lambda x: (x + 2 / 255).clamp(0, 1),
    lambda x: x.roll(1, 3) * 0.3 + x * 0.7,
])
def test_near_duplicates_are_found_and_others_are_not(change: Callable[[Tensor], Tensor]) -> None:
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(600, 3, 4, 5, generator=g)
    x = torch.nn.functional.interpolate(coarse, size=(20, 24), mode="bilinear")
    images, others = x[:40], x[40:]
    assert near_duplicates(images, others).tolist() == []
    owned = torch.cat([others, change(images[[7, 30]])])
    assert near_duplicates(images, owned).tolist() == [7, 30]
    grey = 0.5 + 0.04 * (x - 0.5)  # hardly any contrast tells as much
    assert near_duplicates(grey[:40], grey[40:]).tolist() == []


def test_flat_pictures_are_near_within_half_a_level() -> None:
    flat = torch.full((2, 1, 16, 16), 0.5)
    flat[1] += 1 / 255
    assert near_duplicates(flat, flat[:1] + 0.3 / 255).tolist() == [0]
