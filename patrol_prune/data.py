"""Images from a folder, held as bytes, and the batches made of them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from patrol_prune.errors import InputError, nearest
from patrol_prune.pixels import Normalization

log = logging.getLogger(__name__)
TRAIN_NAMES = ("train",)
TEST_NAMES = ("test", "val")
MEMORY_LIMIT_GIB = 16.0
_THUMBNAIL = 8
_NEAR = 0.2
_NEAR_LEVELS = 0.5
_NEAR_CHUNK = 256
_EXIF_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


@dataclass
class ImageSet:
    """Labelled images in memory.

    Attributes:
        images: bytes, `[N, 3, H, W]`, dtype uint8.
        labels: class indices, `[N]`, dtype int64.
        classes: one name per class.

    Raises:
        InputError: images of another kind, or labels that do not fit them or the classes.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise InputError(
                "An ImageSet holds uint8 images [N, 3, H, W], came "
                f"{self.images.dtype} {tuple(self.images.shape)}. Scale and stack them first."
            )
        if len(self.images) != len(self.labels):
            raise InputError(
                f"Expected one label per image, came {len(self.labels)} labels for "
                f"{len(self.images)} images."
            )
        check_labels(self.labels, len(self.classes))

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: Sequence[int] | Tensor | slice = slice(None)) -> Tensor:
        """Pixels on [0, 1], float32 `[n, 3, H, W]`, of all images or of some."""
        return self.images[indices].float() / 255.0

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The same classes, fewer images."""
        index = torch.as_tensor(indices, dtype=torch.long)
        return ImageSet(self.images[index], self.labels[index], self.classes)


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels outside `0 .. classes - 1`, naming the first."""
    bad = ((labels < 0) | (labels >= classes)).nonzero()
    if len(bad):
        where = int(bad[0])
        raise InputError(
            f"Labels must lie in 0..{classes - 1} for {classes} classes, came {int(labels[where])} "
            f"at position {where}. Check the class folders, or the number of outputs of the model."
        )


def find_parts(root: str | Path) -> tuple[Path, Path]:
    """The folders to train on and to test on: `root/train`, and `root/test` or else `root/val`."""
    folder = Path(root)
    if not folder.is_dir():
        told = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"Expected a folder of images, came {folder}, which {told}.")
    train = [folder / name for name in TRAIN_NAMES if (folder / name).is_dir()]
    test = [folder / name for name in TEST_NAMES if (folder / name).is_dir()]
    if not train or not test:
        there = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "no folder"
        raise InputError(
            f"Expected {folder} to hold train/ and val/ or test/, each with one folder per class, "
            f"came {there}. Lay the images out as ImageFolder does."
        )
    return train[0], test[0]


def fingerprints(images: Tensor) -> list[bytes]:
    """What tells uint8 images `[N, ...]` from one another, byte for byte."""
    return [hashlib.sha256(image.tobytes()).digest() for image in images.numpy()]


@torch.no_grad()
def near_duplicates(images: Tensor, others: Tensor) -> Tensor:
    """Which of the images one of the others hardly differs from, or its mirror image: indices.

    Two pictures are near where the root mean square of the difference between their thumbnails of
    8x8 pixels is at most a fifth of the standard deviation of the image's, or half a grey level.
    Of CIFAR-10's training and test pictures those are the same photographs, cropped or coloured a
    little differently at most; from a quarter on others come among them.

    Args:
        images: `[N, C, H, W]` on [0, 1].
        others: `[M, C, H, W]`, likewise.
    """
    theirs = _thumbnails(others)
    centre = theirs.mean(0)  # against cancellation in the distances
    those = theirs - centre
    near = torch.zeros(len(images), dtype=torch.bool)
    for mirrored in (False, True):
        for start in range(0, len(images), _NEAR_CHUNK):
            part = images[start : start + _NEAR_CHUNK]
            these = _thumbnails(part.flip(3) if mirrored else part)
            each = these.unflatten(1, (-1, _THUMBNAIL**2)).var(2).mean(1).sqrt()  # no colour cast
            most = (_NEAR * each).clamp_min(_NEAR_LEVELS / 255.0) ** 2 * these.shape[1]
            squares = torch.cdist(these - centre, those) ** 2
            near[start : start + _NEAR_CHUNK] |= (squares <= most[:, None]).any(1)
    return near.nonzero().flatten()


def _thumbnails(images: Tensor) -> Tensor:
    """`[N, C * 64]`."""
    return torch.cat([F.adaptive_avg_pool2d(part, _THUMBNAIL).flatten(1)
                      for part in images.split(_NEAR_CHUNK)])


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is of the system's, or of an editor's."""
    return name.startswith(".") or name == "__MACOSX"


class ClassFolders(ImageFolder):  # type: ignore[misc]
    """The images `root/<class>/<image>` by name; what is hidden or no image is left out, and told.

    Raises:
        InputError: no class folder, or one without an image.
    """

    def __init__(self, root: Path) -> None:
        self.hidden_folders = self.hidden_images = 0
        self.others: Counter[str] = Counter()
        try:
            super().__init__(str(root), is_valid_file=self._counts)
        except FileNotFoundError as error:
            told = f"{error} {self._told_of_others()}" if self.others else f"{error}"
            raise InputError(
                f"Expected {root} to hold one folder per class with images in each: {told} Lay the "
                "images out as root/<class>/<image>.jpg, and remove folders without any."
            ) from error
        if self.hidden_folders or self.hidden_images:
            log.warning("Hidden files and folders below %s are left out: %d class folders, %d "
                        "images.", root, self.hidden_folders, self.hidden_images)
        if self.others:
            log.warning("Below %s, %s", root, self._told_of_others())

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Names of the classes, and their numbers."""
        names = super().find_classes(directory)[0]
        kept = [name for name in names if not is_hidden(name)]
        self.hidden_folders = len(names) - len(kept)
        if not kept:
            raise FileNotFoundError(f"{directory} holds hidden folders alone.")
        return kept, {name: number for number, name in enumerate(kept)}

    def _counts(self, path: str) -> bool:
        hidden = any(is_hidden(name) for name in path[len(self.root):].split(os.sep))
        ending = os.path.splitext(path)[1].lower()
        is_image = ending in IMG_EXTENSIONS
        if not is_image and not hidden:
            self.others[ending or "no ending"] += 1
        self.hidden_images += is_image and hidden
        return is_image and not hidden

    def _told_of_others(self) -> str:
        endings = ", ".join(f"{ending}: {n}" for ending, n in self.others.most_common(5))
        return (f"{self.others.total()} files are left out as no images ({endings}); names of "
                f"images end in {', '.join(IMG_EXTENSIONS)}.")


def load_image_folder(
    root: str | Path, image_size: int, *, classes: tuple[str, ...] | None = None
) -> ImageSet:
    """Read `root/<class>/<image>` into memory, shorter side resized, centre cropped to a square.

    Args:
        root: a folder with one sub-folder per class.
        image_size: side of the square, in pixels, at least 8.
        classes: the classes of the training part, whose numbers the labels then are; some may be
            missing here, others are refused.

    Raises:
        InputError: no image, a single class, an unreadable image (named), unknown classes, or more
            than 16 GiB of pixels.
    """
    folder = Path(root)
    if image_size < 8:
        raise InputError(f"Expected an image size of at least 8 pixels, came {image_size}.")
    listing = ClassFolders(folder)
    loose = sum(path.is_file() and path.suffix.lower() in IMG_EXTENSIONS
                and not is_hidden(path.name) for path in folder.iterdir())
    if loose:
        log.warning("%d images lie in %s itself, in no class, and are left out.", loose, folder)
    names = tuple(listing.classes)
    if len(names) < 2:
        raise InputError(
            f"Expected at least two classes below {folder}, came one ({names[0]}). The task loss "
            "needs a choice to make; add the other classes."
        )
    targets = torch.tensor(listing.targets, dtype=torch.long)
    if classes is not None:
        odd = sorted(set(names) - set(classes))
        if odd:
            raise InputError(
                f"{folder} holds {len(odd)} classes that the training part does not: "
                f"{', '.join(odd[:5])}. {nearest(odd[0], classes)} Remove or rename the folders."
            )
        targets = torch.tensor([classes.index(name) for name in names])[targets]
        names = classes
    needed = len(listing.samples) * 3 * image_size**2 / 2**30
    if needed > MEMORY_LIMIT_GIB:
        raise InputError(
            f"{len(listing.samples)} images of {image_size}x{image_size} need {needed:.0f} GiB of "
            f"memory, above the limit of {MEMORY_LIMIT_GIB:.0f}. Take a part of them, or a "
            "smaller size."
        )
    images = np.empty((len(listing.samples), image_size, image_size, 3), dtype=np.uint8)
    for row, (path, _) in enumerate(listing.samples):
        images[row] = read_image(Path(path), image_size)
    log.info("read %d images of %d classes from %s", len(images), len(names), folder)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return ImageSet(tensor, targets, names)


def read_image(path: Path, image_size: int) -> np.ndarray:
    """One image as `open_rgb` gives it, as bytes `[size, size, 3]`, cropped to a square.

    Raises:
        InputError: as `open_rgb`.
    """
    image = open_rgb(path)
    if image.size != (image_size, image_size):
        scale = image_size / min(image.size)
        size = (max(image_size, round(image.width * scale)),
                max(image_size, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - image_size) // 2, (size[1] - image_size) // 2
        image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image)


def open_rgb(path: Path) -> Image.Image:
    """One image in colours of 8 bits: upright as its EXIF orientation says, on white where it is
    transparent, grey values of 16 bits rescaled.

    Raises:
        InputError: a file that cannot be read, or grey values of no known range; it is named.
    """
    try:
        with Image.open(path) as handle:
            handle.load()
            return _as_rgb(_upright(handle), handle.format == "PNG", path)
    except InputError:
        raise
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise InputError(
            f"Expected an image, but {path} cannot be read ({error}). Remove or replace it."
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    if not any(key in image.info for key in _EXIF_KEYS):  # the search takes time
        return image
    try:
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # of a broken header, beside which the image may be whole
        return image
    return ImageOps.exif_transpose(image) if is_turned else image


def _as_rgb(image: Image.Image, is_png: bool, path: Path) -> Image.Image:
    """In colours of 8 bits; Pillow alone would clip what is above 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and is_png):
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode[:1] in ("I", "F"):
        raise InputError(
            f"Expected pixels of 8 or 16 bits, but {path} holds "
            f"{'whole numbers of 32 bits' if image.mode[0] == 'I' else 'floating-point numbers'}"
            ", and what is white in them is not known. Convert it to 8 bits."
        )
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        shown = image.convert("RGBA")
        if shown.getchannel("A").getextrema() != (255, 255):
            white = Image.new("RGBA", shown.size, "white")
            return Image.alpha_composite(white, shown).convert("RGB")
    return image.convert("RGB")


class Batches:
    """Batches `(x [B, 3, H, W], y [B])` of an `ImageSet`, as model inputs; the same for a seed.

    Iterating twice gives two epochs; `set_epoch` makes an epoch repeatable, so that a resumed
    run sees what the first would have seen.

    Args:
        image_set: where the images come from.
        batch_size: images in a batch; the last may be smaller, and is left out where it would be
            a single image in training (`shuffle`), on which BatchNorm would fail.
        normalization: of the pixels on [0, 1]; none without.
        augment: random horizontal flips and shifts of up to an eighth of the side.
        shuffle: another order each epoch.
        seed: of order and augmentation.
        indices: only these images, `[n]`.

    Raises:
        InputError: no image, or no positive batch size.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int = 128,
        *,
        normalization: Normalization | None = None,
        augment: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        indices: Tensor | None = None,
    ) -> None:
        self.image_set = image_set
        self.indices = torch.arange(len(image_set)) if indices is None else indices
        if len(self.indices) == 0 or batch_size < 1:
            raise InputError(
                f"Expected at least one image and a positive batch size, came {len(self.indices)} "
                f"images and batch_size={batch_size}."
            )
        self.batch_size = batch_size
        self.normalization = normalization or Normalization()
        self.augment = augment
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.indices), self.batch_size)
        drop_last = self.shuffle and full > 0 and rest < 2
        return full + (1 if rest and not drop_last else 0)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration draws order and augmentation of this epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(
            (self.seed * 100_003 + self.epoch) % 2**63
        )
        self.epoch += 1
        order = self.indices
        if self.shuffle:
            order = order[torch.randperm(len(order), generator=generator)]
        for batch in range(len(self)):
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            images = self.image_set.images[index]
            if self.augment:
                images = flip_and_shift(images, generator)
            pixels = images.float() / 255.0
            yield self.normalization.to_input(pixels), self.image_set.labels[index]


def flip_and_shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image flipped with probability one half and shifted by up to side/8, reflected."""
    count, _, height, width = images.shape
    pad = max(1, min(height, width) // 8)
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    padded = F.pad(images.float(), (pad, pad, pad, pad), mode="reflect").to(torch.uint8)
    top = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)
    rows = (top + torch.arange(height)).view(count, 1, height, 1)
    columns = (left + torch.arange(width)).view(count, 1, 1, width)
    channels = torch.arange(images.shape[1]).view(1, -1, 1, 1)
    return padded[torch.arange(count).view(-1, 1, 1, 1), channels, rows, columns]
