"""Re-identification sets as they lie on disk: which picture shows whom, seen by which camera.

The folder's layout is recognised by its names: VeRi-776 (Liu et al., ECCV 2016) or Market-1501
(Zheng et al., ICCV 2015). Only names are read here, no picture is opened.
"""

from __future__ import annotations

import codecs
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from patrol_prune.data import ClassFolders, find_parts
from patrol_prune.errors import InputError

VERI = "veri-776"
MARKET = "market-1501"
FOLDER = "image-folder"
NO_CAMERA = -1

_PARTS = {
    VERI: ("image_train", "image_query", "image_test"),
    MARKET: ("bounding_box_train", "query", "bounding_box_test"),
}
_LISTS = ("name_train.txt", "name_query.txt", "name_test.txt")
_NAMES = {
    VERI: re.compile(
        r"(?P<identity>\d+)_c(?P<camera>\d+)_(?P<time>\d+)_\d+\.(jpe?g|png)", re.IGNORECASE),
    MARKET: re.compile(
        r"(?P<identity>-1|\d+)_c(?P<camera>\d+)s\d+_(?P<time>\d+)_\d+(\.(jpe?g|png))+",
        re.IGNORECASE),
}
_EXAMPLES = {VERI: "0001_c001_00016450_0.jpg", MARKET: "0002_c1s1_000451_03.jpg"}
_PICTURES = (".jpg", ".jpeg", ".png")
_JUNK, _DISTRACTOR = -1, 0


@dataclass(frozen=True)
class ReidImage:
    """One picture.

    Attributes:
        path: the file.
        identity: who it shows; 0 in Market-1501 is a distractor, which matches nobody.
        camera: which camera took it; -1 where cameras are not known.
        time: the number the file's name carries as its time or frame, where it carries one.
    """

    path: Path
    identity: int
    camera: int
    time: int | None


@dataclass(frozen=True)
class ReidSet:
    """A training part, and queries to look up in a gallery.

    Attributes:
        layout: "veri-776", "market-1501" or "image-folder".
        train: pictures to learn from; their identities are in no other part (an image folder's
            classes may be in both).
        query: one picture each is looked up.
        gallery: where it is looked up, in the order of the layout's list.
        junk: for each query, positions in the gallery that count neither as right nor as wrong,
            beyond the rule that a picture of the same vehicle by the same camera does not count.
    """

    layout: str
    train: tuple[ReidImage, ...]
    query: tuple[ReidImage, ...]
    gallery: tuple[ReidImage, ...]
    junk: tuple[tuple[int, ...], ...]


def read_reid(root: str | os.PathLike[str]) -> ReidSet:
    """Read a folder in the layout of VeRi-776 or of Market-1501.

    VeRi-776: `image_train/`, `image_query/`, `image_test/` with names such as
    `0001_c001_00016450_0.jpg` (vehicle, camera, time, index). `name_train.txt`, `name_query.txt`
    and `name_test.txt` say which files count and in which order; without them all files do, by
    name. `gt_index.txt` and `jk_index.txt`, where present, have one line per query with positions
    in `name_test.txt`, counted from 1: the matches, and the junk. A picture of the query's
    vehicle that is not among the matches is junk. Lists are in UTF-8, or in UTF-16 with a byte
    order mark.

    Market-1501: `bounding_box_train/`, `query/`, `bounding_box_test/` with names such as
    `0002_c1s1_000451_03.jpg`. Pictures of identity -1 are left out, as the protocol says; 0000 is
    a distractor.

    Pictures end in .jpg, .jpeg or .png, in small or capital letters. Files whose names begin with
    "." are passed over: macOS leaves `._0001_c001_00016450_0.jpg` and the like.

    Args:
        root: the folder that holds the three.

    Raises:
        InputError: the layout is neither, a listed file is absent or listed twice, a name cannot
            be read, an identity is in training and in test, a part is empty, an index list does
            not fit, a list is in another encoding, or all matches of a query are named as junk.
    """
    folder = Path(root)
    layout = _detect(folder)
    parts = [_read_part(folder, layout, i) for i in range(3)]
    if layout == MARKET:
        parts = [[image for image in part if image.identity != _JUNK] for part in parts]
    for name, part in zip(_PARTS[layout], parts, strict=True):
        if not part:
            raise InputError(
                f"Expected pictures such as {_EXAMPLES[layout]} in {folder / name}, found none. "
                "Unpack the set again, all three parts of it."
            )
    train, query, gallery = parts
    _check_identities(layout, train, query, gallery)
    junk = _read_junk(folder, query, gallery) if layout == VERI else ((),) * len(query)
    return ReidSet(layout, tuple(train), tuple(query), tuple(gallery), junk)


def read_retrieval_folder(root: str | os.PathLike[str]) -> ReidSet:
    """An image folder as a retrieval set: a class is an identity.

    `train/<class>/<image>` is the training part. Of `test/` (or `val/`), the first picture of
    every class, by name, is a query and the others are the gallery. No cameras are known
    (`camera` is -1), so that no same-camera rule applies. Classes are numbered in the order of
    their names over both parts. Files and folders whose names begin with "." are passed over, with
    a warning.

    Args:
        root: the folder that holds the two parts.

    Raises:
        InputError: a part or a class folder is missing or empty, or no class has two pictures to
            test with.
    """
    listings = []
    for part in find_parts(Path(root)):
        listing = ClassFolders(part)
        listings.append([(Path(path), listing.classes[label]) for path, label in listing.samples])
    names = sorted({name for samples in listings for _, name in samples})
    numbers = {name: i for i, name in enumerate(names)}
    train, test = (
        [ReidImage(path, numbers[name], NO_CAMERA, None) for path, name in sorted(samples)]
        for samples in listings
    )
    seen: set[int] = set()
    query: list[ReidImage] = []
    gallery: list[ReidImage] = []
    for image in test:
        (gallery if image.identity in seen else query).append(image)
        seen.add(image.identity)
    if not gallery:
        raise InputError(
            f"Expected at least two pictures of some class to test with below {root}, came one of "
            "each. A query needs something to find; add pictures to the test part."
        )
    return ReidSet(FOLDER, tuple(train), tuple(query), tuple(gallery), ((),) * len(query))


def _detect(folder: Path) -> str:
    if not folder.is_dir():
        raise InputError(
            f"Expected a folder with a re-identification set, came {folder}, which is not one. "
            "Name the folder the set was unpacked to."
        )
    for layout, parts in _PARTS.items():
        if all((folder / part).is_dir() for part in parts):
            return layout
    below = [p for p in sorted(folder.iterdir()) if p.is_dir()]
    inside = [p for p in below if any((p / parts[0]).is_dir() for parts in _PARTS.values())]
    there = ", ".join(p.name for p in below[:8]) or "no folder"
    wanted = " or ".join("/, ".join(parts) + f"/ ({name})" for name, parts in _PARTS.items())
    raise InputError(
        f"Expected {folder} to hold {wanted}, came {there}. "
        + (f"Did you mean {inside[0]}?" if inside else "Name the folder that holds the three.")
    )


def _read_part(folder: Path, layout: str, number: int) -> list[ReidImage]:
    """The pictures of one part, in the order of its list where there is one."""
    part = folder / _PARTS[layout][number]
    listing = folder / _LISTS[number]
    if layout == VERI and listing.is_file():
        names = [line.strip() for line in _lines(listing)]
        names = [name for name in names if name]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise InputError(
                f"Expected every name once in {listing}, {len(twice)} stand there more than once, "
                f"the first is {twice[0]}. Use the list that came with the set, or take the second "
                "ones out (index lists count in its order)."
            )
        present = {p.name for p in part.iterdir()}
        missing = [name for name in names if name not in present]
        if missing:
            raise InputError(
                f"{listing} names {len(names)} files, {len(missing)} of which are not in {part}, "
                f"the first is {missing[0]}. Unpack the set again, or correct the list."
            )
    else:
        names = sorted(p.name for p in part.iterdir()
                       if p.suffix.lower() in _PICTURES and not p.name.startswith("."))
    return [_parse(part / name, layout) for name in names]


def _lines(path: Path) -> list[str]:
    """Of a text file in UTF-8, or in what the byte order mark tells that editors on Windows put
    before it.

    Raises:
        InputError: it is in neither.
    """
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"Expected a list of names in UTF-8, came {path}, which is not ({error}). Save it as "
            "UTF-8."
        ) from error


def _parse(path: Path, layout: str) -> ReidImage:
    match = _NAMES[layout].fullmatch(path.name)
    if match is None:
        raise InputError(
            f"Expected a name such as {_EXAMPLES[layout]} in a {layout} set, came {path}. Rename "
            "the file or take it out of the folder."
        )
    return ReidImage(path, int(match["identity"]), int(match["camera"]), int(match["time"]))


def _check_identities(
    layout: str, train: list[ReidImage], query: list[ReidImage], gallery: list[ReidImage]
) -> None:
    if layout == MARKET:
        for image in (*train, *query):
            if image.identity == _DISTRACTOR:
                raise InputError(
                    f"{image.path} is a distractor (identity 0000), which belongs into "
                    f"{_PARTS[MARKET][2]}/ only. Move it there."
                )
    both = {image.identity for image in train} & {image.identity for image in (*query, *gallery)}
    if both:
        raise InputError(
            f"Expected the identities of training and test to be apart, {len(both)} are in both, "
            f"the first is {min(both):04d}. Results would be too good; take its pictures out of "
            "one of the parts."
        )


def _read_junk(
    folder: Path, query: Sequence[ReidImage], gallery: Sequence[ReidImage]
) -> tuple[tuple[int, ...], ...]:
    """Per query, what jk_index.txt names, and its vehicle's pictures that gt_index.txt does not."""
    junk = [set(row) for row in _read_index(folder, "jk_index.txt", len(query), len(gallery))]
    if not junk:
        junk = [set() for _ in query]
    matches = _read_index(folder, "gt_index.txt", len(query), len(gallery))
    where: dict[int, set[int]] = {}
    for position, image in enumerate(gallery):
        where.setdefault(image.identity, set()).add(position)
    for row, found in enumerate(matches):
        same = where.get(query[row].identity, set())
        if not found <= same:
            wrong = gallery[min(found - same)]
            raise InputError(
                f"Line {row + 1} of {folder / 'gt_index.txt'} names {wrong.path.name} as a match "
                f"of {query[row].path.name}, another vehicle. The list belongs to another "
                f"{_LISTS[2]}; use the two of the same copy."
            )
        if found and found <= junk[row]:
            raise InputError(
                f"Line {row + 1} of {folder / 'jk_index.txt'} names all {len(found)} matches of "
                f"{query[row].path.name} in gt_index.txt as junk, so that none would count. Use "
                "the two lists of the same copy, or take jk_index.txt away."
            )
        junk[row] |= same - found
    return tuple(tuple(sorted(row)) for row in junk)


def _read_index(folder: Path, name: str, queries: int, gallery: int) -> list[set[int]]:
    """Positions counted from 0, one set per query; nothing where the file is not there."""
    path = folder / name
    if not path.is_file():
        return []
    for needed in _LISTS[1:]:
        if not (folder / needed).is_file():
            raise InputError(
                f"{path} counts in the order of {needed}, which is not there. Add {needed}, or "
                f"take {name} away to use the cameras' rule alone."
            )
    lines = _lines(path)
    while len(lines) > queries and not lines[-1].strip():
        lines.pop()
    if len(lines) != queries:
        raise InputError(
            f"Expected {path} to have one line per query, {queries} of them, came {len(lines)}. "
            f"Use the {name} that came with this {_LISTS[1]}."
        )
    rows = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not all(word.isdecimal() and 1 <= int(word) <= gallery for word in words):
            raise InputError(
                f"Expected positions from 1 to {gallery} in line {number} of {path}, came "
                f"{line.strip()[:60]!r}. Use the {name} that came with this {_LISTS[2]}."
            )
        rows.append({int(word) - 1 for word in words})
    return rows
