"""Re-identification sets on disk: both layouts, an image folder, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from patrol_prune.errors import InputError
from patrol_prune.reid_layout import ReidImage, read_reid, read_retrieval_folder

VERI = {
    "image_train": ["0002_c001_00000010_0.jpg", "0002_c004_00000020_0.jpg"],
    "image_query": ["0001_c002_00000030_0.jpg", "0005_c001_00000040_1.jpg"],
    "image_test": ["0005_c003_00000050_0.jpg", "0001_c002_00000030_0.jpg",
                   "0001_c001_00016450_0.jpg", "0001_c019_00000070_3.jpg"],
}
LISTS = {"name_train.txt": "image_train", "name_query.txt": "image_query",
         "name_test.txt": "image_test"}
MARKET = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg"],
    "query": ["0003_c2s1_000151_00.jpg"],
    "bounding_box_test": ["-1_c1s1_000401_03.jpg", "0000_c3s1_000001_00.jpg",
                          "0003_c1s6_015971_02.jpg"],
}


def lay_out(root: Path, parts: dict[str, list[str]]) -> Path:
    for part, names in parts.items():
        (root / part).mkdir(parents=True)
        for name in names:
            (root / part / name).touch()
    return root


def veri(root: Path) -> Path:
    lay_out(root, VERI)
    for listing, part in LISTS.items():
        (root / listing).write_text("".join(f"{name}\n" for name in VERI[part]))
    return root


def test_veri_as_it_is_received(tmp_path: Path) -> None:
    root = veri(tmp_path)
    (root / "gt_index.txt").write_text("3 4 \n1 \n")
    (root / "jk_index.txt").write_text("2 \n\n")
    found = read_reid(root)
    assert found.layout == "veri-776"
    assert found.gallery[2] == ReidImage(root / "image_test" / VERI["image_test"][2], 1, 1, 16450)
    assert [image.path.name for image in found.gallery] == VERI["image_test"], "the list's order"
    assert [(image.identity, image.camera) for image in found.query] == [(1, 2), (5, 1)]
    assert {image.identity for image in found.train} == {2}
    assert found.junk == ((1,), ())


def test_a_picture_of_the_vehicle_that_is_no_match_is_junk(tmp_path: Path) -> None:
    root = veri(tmp_path)
    (root / "gt_index.txt").write_text("3\n1\n")
    assert read_reid(root).junk == ((1, 3), ())


def test_veri_without_lists_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    found = read_reid(lay_out(tmp_path, VERI))
    assert [image.path.name for image in found.gallery] == sorted(VERI["image_test"])
    assert found.junk == ((), ())
    (tmp_path / "gt_index.txt").write_text("1\n1\n")
    with pytest.raises(InputError, match=r"Add name_query\.txt"):
        read_reid(tmp_path)


def test_files_that_no_list_names_do_not_count(tmp_path: Path) -> None:
    root = veri(tmp_path)
    (root / "image_test" / "0001_c009_00000001_0.jpg").touch()
    assert len(read_reid(root).gallery) == 4


def test_market(tmp_path: Path) -> None:
    (lay_out(tmp_path, MARKET) / "query" / "Thumbs.db").touch()
    found = read_reid(tmp_path)
    assert found.layout == "market-1501"
    assert [image.identity for image in found.gallery] == [0, 3], "-1 is left out, 0 is not"
    assert found.query[0] == ReidImage(tmp_path / "query" / MARKET["query"][0], 3, 2, 151)
    assert found.junk == ((),)


def test_an_image_folder_as_a_retrieval_set(
    tmp_path: Path, write_folder: Callable[..., Path]
) -> None:
    root = write_folder(tmp_path, count=3)
    found = read_retrieval_folder(root)
    assert [image.path.parent.name for image in found.query] == ["blue", "green", "red"]
    assert [image.identity for image in found.query] == [0, 1, 2]
    assert {image.path.name for image in found.query} == {"000.png"}
    assert len(found.gallery) == 6 and len(found.train) == 9
    assert {image.camera for image in (*found.query, *found.gallery)} == {-1}
    assert not {i.path for i in found.query} & {i.path for i in found.gallery}


def test_an_image_folder_needs_two_pictures_of_a_class(
    tmp_path: Path, write_folder: Callable[..., Path]
) -> None:
    with pytest.raises(InputError, match="something to find"):
        read_retrieval_folder(write_folder(tmp_path, count=1))


@pytest.mark.parametrize("ending", [".JPG", ".jpeg", ".png", ".PNG"])
@pytest.mark.parametrize("parts", [VERI, MARKET])
def test_endings_in_capitals_and_of_other_formats(
    tmp_path: Path, parts: dict[str, list[str]], ending: str
) -> None:
    renamed = {part: [name.replace(".jpg", ending) for name in names]
               for part, names in parts.items()}
    here, there = (read_reid(lay_out(tmp_path / name, names))
                   for name, names in (("usual", parts), ("renamed", renamed)))
    for part in ("train", "query", "gallery"):
        assert [(i.identity, i.camera, i.time) for i in getattr(there, part)] == [
            (i.identity, i.camera, i.time) for i in getattr(here, part)]
        assert {i.path.suffix for i in getattr(there, part)} == {ending}


def test_what_macos_leaves_beside_pictures_is_passed_over(
    tmp_path: Path, write_folder: Callable[..., Path]
) -> None:
    for parts in (VERI, MARKET):
        root = lay_out(tmp_path / next(iter(parts)), parts)
        before = read_reid(root)
        for part, names in parts.items():
            (root / part / f"._{names[0]}").touch()
        assert read_reid(root) == before
    root = write_folder(tmp_path / "folder", count=2)
    plain = read_retrieval_folder(root)
    for picture in list(root.rglob("000.png")):
        picture.with_name("._000.png").touch()
    for part in ("train", "test"):
        (root / part / ".ipynb_checkpoints").mkdir()
        (root / part / ".ipynb_checkpoints" / "0.png").touch()
    assert read_retrieval_folder(root) == plain


def test_a_match_that_is_named_as_junk_too_is_junk(tmp_path: Path) -> None:
    root = veri(tmp_path)
    (root / "gt_index.txt").write_text("3 4\n1\n")
    (root / "jk_index.txt").write_text("2 4\n\n")
    assert read_reid(root).junk == ((1, 3), ())


def test_lists_that_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    root = veri(tmp_path)
    (root / "gt_index.txt").write_text("3 4\n1\n")
    (root / "jk_index.txt").write_text("2\n\n")
    plain = read_reid(root)
    for listing in (*LISTS, "gt_index.txt", "jk_index.txt"):
        (root / listing).write_text((root / listing).read_text(), encoding="utf-8-sig")
    assert read_reid(root) == plain


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_lists_in_utf_16_are_read_by_their_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    root = veri(tmp_path)
    (root / "gt_index.txt").write_text("3 4\n1\n")
    plain = read_reid(root)
    mark = "" if encoding == "utf-16" else "\ufeff"
    for listing in (*LISTS, "gt_index.txt"):
        text = (root / listing).read_text().replace("\n", "\r\n")
        (root / listing).write_bytes((mark + text).encode(encoding))
    assert read_reid(root) == plain


@pytest.mark.parametrize("content", ["Überblick".encode("latin-1"), b"\xff\xfe0"])
def test_lists_in_other_encodings_are_named(tmp_path: Path, content: bytes) -> None:
    root = veri(tmp_path)
    (root / "name_test.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"name_test\.txt.*Save it as UTF-8"):
        read_reid(root)


def rename(root: Path, part: str, old: str, new: str) -> None:
    (root / part / old).rename(root / part / new)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda r: (r / "image_test" / VERI["image_test"][0]).unlink(), "Unpack the set again"),
        (lambda r: (r / "name_query.txt").write_text(""), "found none"),
        (lambda r: (r / "gt_index.txt").write_text("3\n"), "one line per query, 2"),
        (lambda r: (r / "gt_index.txt").write_text("5\n1\n"), "from 1 to 4 in line 1"),
        (lambda r: (r / "gt_index.txt").write_text("0\n1\n"), "from 1 to 4 in line 1"),
        (lambda r: (r / "jk_index.txt").write_text("3\nx\n"), "from 1 to 4 in line 2"),
        (lambda r: (r / "gt_index.txt").write_text("3\n3\n"), "another vehicle"),
        (lambda r: (r / "jk_index.txt").write_text("3 4\n1\n"), "take jk_index.txt away"),
        (lambda r: (r / "name_test.txt").write_text(
            "".join(f"{name}\n" for name in [*VERI["image_test"], VERI["image_test"][1]])),
         f"more than once, the first is {VERI['image_test'][1]}"),
        (lambda r: (r / "image_query").rename(r / "images"), "image_train, images"),
    ],
)
def test_a_spoilt_veri_set_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object], match: str
) -> None:
    root = veri(tmp_path)
    (root / "gt_index.txt").write_text("3 4\n1\n")
    spoil(root)
    with pytest.raises(InputError, match=match):
        read_reid(root)


def test_a_bad_name_and_an_identity_in_both_parts_are_refused(tmp_path: Path) -> None:
    root = lay_out(tmp_path, MARKET)
    rename(root, "query", MARKET["query"][0], "car.jpg")
    with pytest.raises(InputError, match=r"0002_c1s1_000451_03\.jpg.*car\.jpg"):
        read_reid(root)
    rename(root, "query", "car.jpg", "0002_c2s1_000151_00.jpg")
    with pytest.raises(InputError, match="the first is 0002"):
        read_reid(root)
    rename(root, "query", "0002_c2s1_000151_00.jpg", "0000_c2s1_000151_00.jpg")
    with pytest.raises(InputError, match="distractor"):
        read_reid(root)


def test_the_folder_above_is_told_where_the_set_is(tmp_path: Path) -> None:
    lay_out(tmp_path / "VeRi", VERI)
    with pytest.raises(InputError, match=r"Did you mean .*VeRi\?"):
        read_reid(tmp_path)
    with pytest.raises(InputError, match="not one"):
        read_reid(tmp_path / "nowhere")
