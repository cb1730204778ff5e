"""What an audit found, as plain data: flat records, flags, per-image scores, example images."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from patrol_prune.audit_scores import thumbnail_side
from patrol_prune.errors import CheckpointError, InputError, nearest
from patrol_prune.storage import atomic_directory, atomic_write_text, read_whole

METRICS: tuple[str, ...] = (
    "ssim", "ssim_worst5", "ms_ssim", "psnr", "mse", "mse_worst5", "gmsd", "rank1", "rank5",
)
IN_REGIONS: tuple[str, ...] = ("private_ssim", "private_mse")
"""Of audits that were told of private regions."""
_GROUP = ("subject", "attack", "box", "attacker_data", "attacker_images")
_VERSION = 1


@dataclass(repr=False)
class AuditReport:
    """The result of `audit`.

    Attributes:
        records: one flat dict per subject, attack, seed and attacker's images. `subject` is
            `"edge"`, `"undefended"` (the ceiling) or `"floor"` (the mean image, and the attacker's
            image whose feature is nearest); then `attack`, `attack_seed`, `box` (`"white"`,
            `"black"`, `"none"`: what the attacker could do with the edge; None if it does not
            tell), `attacker_data` (`"same"` or `"shifted"`), `attacker_images`, `victim_images`,
            `random_edge`, `uploads` (of each picture); `ssim`, `ms_ssim` (None on small images),
            `psnr` (dB, at most 100 per image), `mse` and `gmsd` as means over the victim's images
            on [0, 1] pixels; `ssim_worst5` and `mse_worst5`, the means over the 5% of images that
            were reconstructed best by that measure; `rank1`, `rank5`, `chance1`, `chance5`: how
            often the reconstruction leads back to its original among all victims, and a guess does;
            of an audit with `private`, `private_ssim` and `private_mse`, the same within the
            private regions, over the `private_images` that have some;
            `plateau`, `epochs` (or settings tried), `extensions`, `best_epoch`, `held_out_loss`,
            `gradient_norm`, `chosen` of the attack's training (None where an attack does not tell,
            or where a number is not finite); `seconds` of it all, reconstruction and scores
            included.
        flags: one dict per warning: `subject`, `attack`, `attack_seed`, `name`, `meaning`,
            `advice`, and `attacker_data` and `attacker_images` where it is about one row.
        per_image: `"subject/attack/seed"` to the lists `ssim`, `psnr`, `mse`, `gmsd` (and
            `ms_ssim`) over the victim's images, in their order; rows of other attackers than the
            one with the most images end in `/same-100`, `/shifted-500` and so on.
        examples: `"originals"` and each subject to uint8 images `[E, H, W, C]`; a subject's are
            the reconstructions of its strongest attack.
        example_indices: which of the victim's images the examples are.
        thumbnails: what thumbnails of the victim's images show, from one pixel to as many as the
            strongest attack's SSIM: `side`, `ssim`, `ssim_worst5`, `mse`, means over `images` of
            them, evenly spaced (at most 500, fewer of large ones).
        setup: what the audit was made with. Two reports compare two edges where it agrees, but for
            `features`. `attacks`: name to `seeds` and `settings` (None of an attack of your own);
            `attackers` and `victims`: how many images, and a `sha256` of them at 8 bits;
            `features`: subject to the shape of one upload; `normalization`, `uploads`, `versions`.
            Empty in reports of earlier releases.
    """

    records: list[dict[str, Any]]
    flags: list[dict[str, Any]] = field(default_factory=list)
    per_image: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    examples: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    example_indices: list[int] = field(default_factory=list)
    thumbnails: list[dict[str, Any]] = field(default_factory=list)
    setup: dict[str, Any] = field(default_factory=dict)

    @property
    def subjects(self) -> tuple[str, ...]:
        """The subjects that have records, in their order."""
        return tuple(dict.fromkeys(r["subject"] for r in self.records))

    def __repr__(self) -> str:
        """One line per subject: the most that any attack on it saw, and how many flags there are.

        The attack with the highest mean SSIM is named, and where another has the larger worst 5% or
        the smaller MSE, that one beside its figure.
        """
        lines = [f"AuditReport: {len(self.records)} records, {len(self.flags)} flags"]
        for subject in self.subjects:
            best = self.strongest(subject)
            told = [f"SSIM {best['ssim']:.3f} by {best['attack']}"]
            for furthest, name, text in ((max, "ssim_worst5", "worst 5% {:.3f}"),
                                         (min, "mse", "MSE {:.4f}")):
                value = furthest(float(record[name]) for record in self._of(subject))
                by = [r["attack"] for r in self._of(subject) if r[name] == value]
                told.append(text.format(value) + f" by {by[0]}" * (best["attack"] not in by))
            lines.append(f"  {subject}: {', '.join(told)}")
        return "\n".join(lines)

    def strongest(self, subject: str = "edge") -> dict[str, Any]:
        """The subject's record with the highest mean SSIM, whatever attack and seed it is of.

        Whether that attack had reached its plateau makes no difference: it saw what it saw.

        Raises:
            InputError: there are no records of the subject.
        """
        return max(self._of(subject), key=lambda record: float(record["ssim"]))

    def as_thumbnail(self, subject: str = "edge") -> float | None:
        """The side, in pixels, of the thumbnail with the strongest attack's mean SSIM.

        A way to say what an SSIM means: at 3.4, the attacker's pictures are as like the originals
        as thumbnails between 3x3 and 4x4 pixels, enlarged. The shorter side of the pictures where
        they are seen whole. None where the mean colour alone shows more, or thumbnails were not
        measured.
        """
        return thumbnail_side(self.thumbnails, float(self.strongest(subject)["ssim"]))

    def summary(self) -> list[dict[str, Any]]:
        """One row per subject, attack and attacker's images: mean and spread over the seeds.

        `seeds` says how many there were; `ssim_std` and so on are the sample standard deviation
        (n - 1), None for a single seed; both are None where a measure was not taken. `plateau` is
        whether every seed reached it, None where no attack tells.
        """
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for record in self.records:
            key = tuple(record.get(name) for name in _GROUP)
            groups.setdefault(key, []).append(record)
        return [
            _summarise(dict(zip(_GROUP, key, strict=True)), records)
            for key, records in groups.items()
        ]

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text; with `path`, also written there.

        The examples go to a folder beside it (`audit_examples` beside `audit.json`), one PNG row
        per subject. Both are written whole or not at all. Text alone carries no examples.
        """
        content = {
            "version": _VERSION,
            "records": self.records,
            "flags": self.flags,
            "per_image": self.per_image,
            "example_indices": self.example_indices,
            "thumbnails": self.thumbnails,
            "setup": self.setup,
            "examples": {},
        }
        if path is not None and self.examples:
            name_of_folder = f"{Path(path).stem}_examples"
            with atomic_directory(Path(path).parent / name_of_folder) as folder:
                for name, images in self.examples.items():
                    _save_row(folder / f"{name}.png", images)
            content["examples"] = {n: f"{name_of_folder}/{n}.png" for n in self.examples}
        text = json.dumps(content, indent=1, allow_nan=False)
        if path is not None:
            atomic_write_text(path, text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> AuditReport:
        """Read a report from its path, with its examples, or from the text itself.

        Raises:
            CheckpointError: it is not there, torn, or not a report; `path` names the file.
        """
        text, path = _read(source)
        where = "the given text" if path is None else str(path)
        try:
            content = json.loads(text)
            version = content["version"]
            report = cls(*(content[k] for k in ("records", "flags", "per_image")))
            report.example_indices = content["example_indices"]
            report.thumbnails = content.get("thumbnails", [])
            report.setup = content.get("setup", {})
            files = content["examples"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"Expected an audit report in {where}, came something else or a part of one "
                f"({error}). Run the audit again.",
                path=where,
            ) from error
        if version != _VERSION:
            raise CheckpointError(
                f"Expected an audit report of version {_VERSION} in {where}, came {version}. "
                "Read it with the release that wrote it.",
                path=where,
            )
        if path is not None and files:
            pngs = read_whole(path.with_name(f"{path.stem}_examples"))
            for name, file in files.items():
                content_png = pngs.get(Path(file).name)
                if content_png is None:
                    raise CheckpointError(
                        f"{where} names the examples {file}, which are not there. Run the audit "
                        "again.",
                        path=str(path.parent / file),
                    )
                report.examples[name] = _read_row(content_png, len(report.example_indices))
        return report

    def _of(self, subject: str) -> list[dict[str, Any]]:
        records = [r for r in self.records if r["subject"] == subject]
        if not records:
            raise InputError(
                f"This report has records of {', '.join(self.subjects)}, not of {subject!r}. "
                f"{nearest(subject, self.subjects)}"
            )
        return records


def _summarise(group: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {**group, "seeds": len(records)}
    asked = IN_REGIONS if any(IN_REGIONS[0] in record for record in records) else ()
    for metric in (*METRICS, *asked):
        values = [record.get(metric) for record in records]
        known = [value for value in values if value is not None]
        whole = len(known) == len(values)
        row[metric], row[f"{metric}_std"] = mean_and_std(known) if whole else (None, None)
    plateaus = [r["plateau"] for r in records if r["plateau"] is not None]
    row["plateau"] = all(plateaus) if plateaus else None
    return row


def mean_and_std(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1), the latter None for one value."""
    numbers = list(values)
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in numbers) / (len(numbers) - 1))


def _read(source: str | os.PathLike[str]) -> tuple[str, Path | None]:
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return source, None
    path = Path(source)
    try:
        return path.read_text(encoding="utf-8"), path
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"Expected an audit report at {path}, came: {error}. Run the audit first.",
            path=str(path),
        ) from error


def _save_row(path: Path, images: NDArray[np.uint8]) -> None:
    """Images `[E, H, W, C]` side by side, as one PNG."""
    row = np.concatenate(list(images), axis=1)
    Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row).save(path, format="PNG")


def _read_row(content: bytes, count: int) -> NDArray[np.uint8]:
    row = np.array(Image.open(io.BytesIO(content)), dtype=np.uint8)
    row = row[:, :, None] if row.ndim == 2 else row
    return np.stack(np.split(row, count, axis=1))
