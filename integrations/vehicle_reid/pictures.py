"""The pictures of a re-identification set, read into memory and divided between who owns what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from settings import ReidRun
from torch import Tensor

import patrol_prune as pp
from patrol_prune.data import ImageSet, fingerprints, open_rgb
from patrol_prune.errors import InputError
from patrol_prune.reid_layout import ReidImage, ReidSet, read_reid, read_retrieval_folder
from patrol_prune.vehicle_identities import write_vehicle_reid
from patrol_prune.vehicle_truth import VehicleTruth, drawn_with, read_vehicle_truth

_LEAST_STD = 1e-3


@dataclass(frozen=True)
class Pictures:
    """Some pictures and what is known of them.

    Attributes:
        images: uint8 `[N, 3, S, S]`.
        identities: `[N]`, as the set numbers them.
        cameras: `[N]`, -1 where unknown.
        truth: plates and places, where the set tells them.
    """

    images: Tensor
    identities: Tensor
    cameras: Tensor
    truth: VehicleTruth | None = None

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Sequence[int] | Tensor) -> Pictures:
        """Some of them."""
        index = torch.as_tensor(indices, dtype=torch.long)
        return Pictures(self.images[index], self.identities[index], self.cameras[index],
                        None if self.truth is None else _some(self.truth, index))

    def and_then(self, other: Pictures) -> Pictures:
        """These, and the other ones behind them, of the same set."""
        truth = None
        if self.truth is not None and other.truth is not None:
            one, two = self.truth, other.truth
            truth = VehicleTruth(one.plates + two.plates, torch.cat([one.boxes, two.boxes]),
                                 one.scenes + two.scenes, torch.cat([one.hidden, two.hidden]))
        return Pictures(*(torch.cat([getattr(self, key), getattr(other, key)])
                          for key in ("images", "identities", "cameras")), truth)

    def pixels(self) -> Tensor:
        """float32 on [0, 1]."""
        return self.images.float() / 255.0


@dataclass(frozen=True)
class Everybody:
    """Who owns which pictures.

    Attributes:
        defender: what the model is trained, scored and fine-tuned on; its classes are identities.
        inverter: the attacker's pictures that his inversion attacks learn from.
        reader: the attacker's other pictures, in an open set of other identities, with other
            plates: what is rebuilt of them looks as what is rebuilt of a victim's.
        query, gallery: of the test part.
        victims: positions among the queries whose uploads are inverted.
        junk: as in `ReidSet`.
        normalization: from pixels to the model's input.
        layout: of the set.
        closed: whether identities of the test, all or some, were trained on.
        copies: so many of the query and gallery pictures were trained on themselves.
        digest: of every picture and identity.
        labels_digest: of what `digest` leaves out: cameras, junk, plates and places. Runs of
            earlier releases noted `digest` alone.
        truth: of the defender's pictures, where the set tells it.
    """

    defender: ImageSet
    inverter: Pictures
    reader: Pictures
    query: Pictures
    gallery: Pictures
    victims: Tensor
    junk: tuple[tuple[int, ...], ...]
    normalization: pp.Normalization
    layout: str
    closed: bool
    copies: int
    digest: str
    labels_digest: str
    truth: VehicleTruth | None = None

    @property
    def notes(self) -> list[str]:
        """What a reader of the result should know, in sentences."""
        if not self.copies:
            return []
        return [f"{self.copies} of the {len(self.query) + len(self.gallery)} query and gallery "
                "pictures are also among those that the model is trained on, byte for byte: mAP "
                "and privacy look better on them than on new ones."]

    def example(self) -> Tensor:
        """One picture as model input `[1, 3, S, S]`."""
        return self.normalization.to_input(self.defender.pixels([0]))


def everybody(config: ReidRun) -> Everybody:
    """Read the set that the settings name, drawing it first where it is the rendered one.

    The attacker's identities are none of the defender's; where test identities were trained on,
    as in an image folder, the training pictures are divided one by one instead.

    Raises:
        InputError: a set that cannot be read, or too few identities or pictures for everybody.
    """
    root = set_folder(config)
    found = read_set(config, root)
    parts = [read(part, root, config.image_size)
             for part in (found.train, found.query, found.gallery)]
    train, query, gallery = parts
    count = min(config.attackers.victims, len(query))
    victims = torch.linspace(0, len(query) - 1, count).round().long()
    generator = torch.Generator().manual_seed(config.seed)
    closed = bool(set(train.identities.tolist()) & set(query.identities.tolist()))
    theirs = _attackers(train, config.attackers.share, closed, generator)
    own = train.subset((~theirs).nonzero().flatten())
    attacker = _without(train.subset(theirs.nonzero().flatten()), query.subset(victims))
    attacker = attacker.subset(torch.randperm(len(attacker), generator=generator))
    for_readers = _attackers(attacker, config.attackers.reader_share, closed, generator)
    inverter, reader = (attacker.subset(m.nonzero().flatten()) for m in (~for_readers, for_readers))
    if config.swap_plates and (
        own.truth is None or len(own.identities[~own.truth.hidden].unique()) < 2
    ):
        raise InputError(
            "Expected a set that tells where plates are, of at least 2 vehicles of the defender's "
            f"that nothing hides, for --swap-plates, but {root} does not. Leave it out; rendered "
            "vehicles have them.")
    if config.private_plates and own.truth is None:
        raise InputError(f"Expected a set that tells where plates are for --private-plates, but "
                         f"{root} does not. Leave it out; rendered vehicles have them.")
    defender = _labelled(own)
    if len(inverter) < 40 or len(reader) < 20 or len(defender.classes) < config.batch.identities:
        raise InputError(
            "Expected at least 40 pictures for the attacker to invert with, 20 to read with and "
            f"{config.batch.identities} identities for the defender, came {len(inverter)}, "
            f"{len(reader)} and {len(defender.classes)}. Give more pictures, or change "
            "--attackers.share, --attackers.reader-share or --batch.identities."
        )
    trained = set(fingerprints(defender.images))
    copies = sum(known in trained for part in (query, gallery)
                 for known in fingerprints(part.images))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.images.numpy().tobytes() + part.identities.numpy().tobytes())
    return Everybody(
        defender, inverter, reader, query, gallery,
        victims, found.junk, _normalization(defender), found.layout,
        closed, copies, digest.hexdigest(), labels_digest(parts, found.junk), own.truth,
    )


def labels_digest(parts: Sequence[Pictures], junk: Sequence[Sequence[int]]) -> str:
    """Of what is known of some pictures beside their identities: see `Everybody`."""
    known: list[object] = [[list(row) for row in junk]]
    for part in parts:
        known.append(part.cameras.tolist())
        if (truth := part.truth) is not None:
            known.append([truth.plates, truth.boxes.tolist(), truth.scenes, truth.hidden.tolist()])
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def set_folder(config: ReidRun) -> Path:
    """Where the pictures lie; the rendered ones are drawn there first.

    They lie in `<name>-vehicles` beside the run; where vehicles of another seed, size or number
    are there already, in a folder named after these.
    """
    if config.data != "rendered":
        return Path(config.data).expanduser()
    asked = {**asdict(config.rendered), "size": config.image_size, "seed": config.seed}
    root = Path(config.runs) / f"{config.name}-vehicles"
    there = drawn_with(root)
    if there and any(there.get(key) != value for key, value in asked.items()):
        told = "-".join(f"{key}-{value}" for key, value in asked.items()).replace("_", "-")
        root = root.with_name(f"{root.name}-{told}")
    return write_vehicle_reid(root, **asked)


def read_set(config: ReidRun, root: Path) -> ReidSet:
    """Who is on which file."""
    return read_retrieval_folder(root) if config.layout == "folder" else read_reid(root)


def read(images: Sequence[ReidImage], root: Path, size: int) -> Pictures:
    """The files, each stretched to a square: nothing of a narrow picture is cut off.

    Raises:
        InputError: a file that is no picture, by name; as `open_rgb`.
    """
    pixels = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for row, image in enumerate(images):
        picture = open_rgb(image.path)
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BILINEAR)
        pixels[row] = np.asarray(picture)
    return Pictures(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([image.identity for image in images]),
        torch.tensor([image.camera for image in images]),
        read_vehicle_truth(root, images, size) if drawn_with(root) else None,
    )


def _attackers(
    train: Pictures, share: float, closed: bool, generator: torch.Generator
) -> Tensor:
    """Which of these pictures the attacker owns, or his readers: a share of the identities, in a
    closed set of the pictures.
    """
    if closed:
        order = torch.randperm(len(train), generator=generator)
        mine = torch.zeros(len(train), dtype=torch.bool)
        mine[order[: round(share * len(train))]] = True
        return mine
    identities = train.identities.unique()
    order = torch.randperm(len(identities), generator=generator)
    return torch.isin(train.identities, identities[order[: round(share * len(identities))]])


def _without(attacker: Pictures, victims: Pictures) -> Pictures:
    """The attacker's pictures but for copies of a victim's."""
    seen = {image.numpy().tobytes() for image in victims.images}
    keep = [i for i, image in enumerate(attacker.images) if image.numpy().tobytes() not in seen]
    return attacker.subset(keep)


def _labelled(pictures: Pictures) -> ImageSet:
    names, labels = pictures.identities.unique(return_inverse=True)
    return ImageSet(pictures.images, labels, tuple(str(n) for n in names.tolist()))


def _normalization(defender: ImageSet) -> pp.Normalization:
    some = defender.pixels(torch.linspace(0, len(defender) - 1, min(2000, len(defender))).long())
    mean, std = some.mean(dim=(0, 2, 3)), some.std(dim=(0, 2, 3)).clamp(min=_LEAST_STD)
    return pp.Normalization(tuple(round(v, 4) for v in mean.tolist()),
                            tuple(round(v, 4) for v in std.tolist()))


def _some(truth: VehicleTruth, index: Tensor) -> VehicleTruth:
    rows = index.tolist()
    return VehicleTruth(tuple(truth.plates[i] for i in rows), truth.boxes[index],
                        tuple(truth.scenes[i] for i in rows), truth.hidden[index])
