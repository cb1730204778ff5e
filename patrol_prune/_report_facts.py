"""What a run comes to, in plain numbers and sentences; `report` puts them on a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from patrol_prune.audit_scores import shows_all, thumbnail_side
from patrol_prune.errors import InputError

COSTS = ("edge_macs", "edge_params", "feature_bytes", "accuracy")
EDGE, UNDEFENDED, FLOOR = "edge", "undefended", "floor"
ATTACKS = {
    "inverse_network": "a decoder network trained on the attacker's own pictures",
    "inverse_network_ssim": "a decoder network trained for likeness on the attacker's own pictures",
    "transposed": "a transposed-convolution decoder trained on the attacker's own pictures",
    "transposed_ssim": "a transposed-convolution decoder trained for likeness",
    "unet": "a U-shaped decoder trained on the attacker's own pictures",
    "unet_ssim": "a U-shaped decoder trained for likeness",
    "dropped_ssim": "a decoder network trained for likeness on uploads of which half is dropped",
    "whitened_ssim": "a decoder network trained for likeness on the uploads' whitened channels",
    "aimed_ssim": "a decoder network trained for likeness, within private regions above all",
    "linear_inverse": "the best linear decoder, by least squares on the attacker's own pictures",
    "nearest_image": "answering with the attacker's own picture whose upload is nearest",
    "rmle": "white-box optimisation of the picture (rMLE)",
    "image_prior": "white-box optimisation of an untrained image generator",
    "query_free_same": "a query-free attack through a shadow edge of the same architecture",
    "query_free_other": "a query-free attack through a shadow edge of another architecture",
    "query_free_match": "a query-free attack that matches the distribution of uploads",
    "mean_image": "answering with the mean image",
}
_WHITE = ("rmle", "image_prior")
_LESS_SHOWS_MORE = ("mse", "gmsd")
_AVERAGED = ("ssim", "ssim_worst5", "psnr", "mse", "gmsd", "rank1", "chance1", "private_ssim")


class Audit(Protocol):
    """The part of an `AuditReport` that a page needs."""

    @property
    def records(self) -> list[dict[str, Any]]:
        """One flat dictionary per subject, attack and seed."""

    @property
    def flags(self) -> list[dict[str, Any]]:
        """Warnings: name, meaning, advice, and the subject, attack and seed they are about."""

    @property
    def examples(self) -> dict[str, np.ndarray]:
        """Pictures uint8 [K, H, W, 3] by subject, and the originals."""

    @property
    def thumbnails(self) -> list[dict[str, Any]]:
        """What thumbnails of the pictures show; empty where that was not measured."""


@dataclass
class RunSummary:
    """Everything about a run except the attack; plain data that survives JSON.

    Args:
        name: of the run.
        model: what was pruned, in the user's words.
        dataset: what it was trained and attacked on, in the user's words.
        split: the cut, by the name of the last module on the device.
        plan: of the run, shown as it is. `boundary` and `budget` are named in the text if there.
        prune: channels by layer or group, name to (kept, total).
        dense: `edge_macs, edge_params, feature_bytes, accuracy` before, cut at the same place.
        pruned: the same numbers after.
        history: one flat dictionary per epoch of fine-tuning.
        config: every setting.
        versions: of the libraries.
        seed: of the run.
        command: the line that repeats it.
        device: where it ran.
        notes: what the reader has to know besides, one sentence each.
        removed_blocks: residual blocks that were replaced by their shortcuts.
    """

    name: str
    model: str
    dataset: str
    split: str
    plan: dict[str, Any]
    prune: dict[str, tuple[int, int]]
    dense: dict[str, float]
    pruned: dict[str, float]
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    command: str = ""
    device: str = "cpu"
    notes: list[str] = field(default_factory=list)
    removed_blocks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for field_name, costs in (("dense", self.dense), ("pruned", self.pruned)):
            missing = [key for key in COSTS if key not in costs]
            if missing:
                raise InputError(
                    f"Expected `{field_name}` of a RunSummary to hold {', '.join(COSTS)}; "
                    f"{', '.join(missing)} did not come. Measure them first."
                )
        for name, (kept, total) in self.prune.items():
            if not 0 < kept <= total:
                raise InputError(
                    f"Expected `prune` to give (kept, total) with 0 < kept <= total, came "
                    f"{(kept, total)} for {name}. Give the channels kept first."
                )


def attacks_on(records: Iterable[Mapping[str, Any]], subject: str) -> list[dict[str, Any]]:
    """The records of one subject, the strongest (highest mean SSIM) first."""
    found = [dict(record) for record in records if record.get("subject") == subject]
    return sorted(found, key=lambda record: -float(record["ssim"]))


def strongest(records: Iterable[Mapping[str, Any]], subject: str) -> dict[str, Any] | None:
    """The record of the attack that saw most of one subject, or None if nobody attacked it."""
    found = attacks_on(records, subject)
    return found[0] if found else None


def furthest(records: Iterable[Mapping[str, Any]], subject: str, key: str) -> float | None:
    """What the attack came to that gets furthest in one measure; None where nothing was measured.

    One that saw most by SSIM may be another than the one that came nearest in MSE.
    """
    values = [float(r[key]) for r in attacks_on(records, subject) if r.get(key) is not None]
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return None
    return min(known) if key in _LESS_SHOWS_MORE else max(known)


def floor_of(records: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The record of the average picture, which needs no upload; the first where there are more."""
    found = [dict(r) for r in records if r.get("subject") == FLOOR]
    return next((r for r in found if r.get("attack") == "mean_image"), found[0] if found else None)


def attack_rows(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per subject, attack and attacker's pictures: means over the seeds.

    Within a subject the highest SSIM comes first; `strongest` marks the row of the subject's
    strongest single record. What was not measured is None.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    kept = [dict(record) for record in records]
    for r in kept:
        pictures = r.get("attacker_images")
        told = None if pictures is None else f"{pictures:,}"
        if told is not None and r.get("attacker_data") == "shifted":
            told += ", other"
        groups.setdefault((r["subject"], r["attack"], r.get("box"), told), []).append(r)
    rows = []
    for (subject, attack, box, told), same in groups.items():
        row = {"subject": subject, "attack": attack, "box": box, "attacker": told,
               "seeds": len(same), "strongest": strongest(kept, subject) in same}
        for key in _AVERAGED:
            values = [r[key] for r in same if r.get(key) is not None]
            row[key] = math.fsum(values) / len(values) if values else None
        rows.append(row)
    order = {UNDEFENDED: 0, EDGE: 1, FLOOR: 2}
    return sorted(rows, key=lambda row: (order.get(row["subject"], 3), -float(row["ssim"])))


def short(count: float, unit: str = "") -> str:
    """A count in three digits with k, M or G: `short(2359296)` is `2.36 M`."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= factor:
            return f"{count / factor:.3g} {letter}{unit}"
    return f"{count:.3g} {unit}".strip()


def number(key: str, value: Any) -> str:
    """One value as tables show it; `key` says what it is."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "∞" if value > 0 else str(value)
        if key in ("accuracy", "rank1", "rank5", "chance1", "chance5"):
            return f"{100 * value:.1f}%"
        if key == "mse":
            return f"{value:.4f}"
        if key in ("psnr", "seconds"):
            return f"{value:.1f}"
        return f"{value:,.0f}" if key in COSTS else f"{value:.3f}"
    return str(value)


AT_THE_FLOOR = 0.02
"""An SSIM this close to the average picture's says nothing about a difference."""


def headline(summary: RunSummary, audit: Audit) -> str:
    """One sentence: what the strongest attacker sees, between ceiling and floor."""
    edge = strongest(audit.records, EDGE)
    if edge is None:
        raise InputError(
            "Expected the audit to hold at least one record of the subject 'edge', came none. "
            "Attack the edge before you report on it."
        )
    ceiling, floor = strongest(audit.records, UNDEFENDED), floor_of(audit.records)
    seen = f"a likeness (SSIM) of {edge['ssim']:.2f}"
    tried = len({record["attack"] for record in attacks_on(audit.records, EDGE)})
    who = "the strongest attack tried"
    if tried > 1:
        who = f"the strongest of the {tried} attacks tried, {edge['attack']},"
    if ceiling is None:
        text = f"From what the device uploads, {who} rebuilds pictures to {seen}"
    elif floor is not None and max(ceiling["ssim"], edge["ssim"]) < floor["ssim"] - AT_THE_FLOOR:
        text = (
            "Not even from the undefended upload does an attack tried rebuild pictures to a "
            f"likeness (SSIM) of more than {ceiling['ssim']:.2f}; after pruning it is "
            f"{edge['ssim']:.2f}"
        )
    elif floor is not None and max(ceiling["ssim"], edge["ssim"]) - floor["ssim"] < AT_THE_FLOOR:
        text = (
            "Cut this deep, even from the undefended upload no attack tried rebuilds pictures to "
            f"more than a likeness (SSIM) of {ceiling['ssim']:.2f}; after pruning it is "
            f"{edge['ssim']:.2f}"
        )
    elif ceiling["ssim"] - edge["ssim"] < 0.01:
        text = (
            f"{who[0].upper()}{who[1:]} rebuilds pictures to {seen}, no worse than from the "
            f"undefended upload ({ceiling['ssim']:.2f}): this run hides nothing"
        )
    else:
        text = (
            f"From what the device uploads, {who} rebuilds pictures to {seen} "
            f"instead of {ceiling['ssim']:.2f}"
        )
    if floor is not None:
        text += f"; guessing the average picture gives {floor['ssim']:.2f}"
    if is_below_the_floor(audit):
        text += (". An attack that does worse than a guess has failed: this figure does not say "
                 "that the upload hides anything")
    return text + "."


def is_below_the_floor(audit: Audit) -> bool:
    """Whether what was seen of the edge is clearly less than the average picture shows."""
    edge, floor = strongest(audit.records, EDGE), floor_of(audit.records)
    return None not in (edge, floor) and edge["ssim"] < floor["ssim"] - AT_THE_FLOOR  # type: ignore[index]


def story(summary: RunSummary, audit: Audit) -> list[tuple[str, str]]:
    """What was cut where, what it costs, what an attacker sees: titles with a sentence or two."""
    kept = sum(k for k, _ in summary.prune.values())
    total = sum(t for _, t in summary.prune.values())
    cut = (
        f"{summary.model} is cut after {summary.split}. The device computes everything up to there "
        f"and uploads the result."
    )
    if total:
        cut += (f" {total - kept:,} of the {total:,} channels on the device that may go were "
                "removed.")
    blocks = summary.removed_blocks
    if blocks:
        cut += (
            f" {len(blocks)} residual block{' was' if len(blocks) == 1 else 's were'} removed "
            f"whole: {', '.join(blocks)}."
        )
    dense, pruned = summary.dense, summary.pruned
    share = pruned["edge_macs"] / dense["edge_macs"] if dense["edge_macs"] else 1.0
    cost = (
        f"{short(pruned['edge_macs'])} multiply-adds per picture, {100 * share:.0f}% of the "
        f"{short(dense['edge_macs'])} before, and {short(pruned['feature_bytes'], 'B')} to upload"
        f" ({short(dense['feature_bytes'], 'B')} before). Accuracy "
        f"{100 * pruned['accuracy']:.1f}%, before {100 * dense['accuracy']:.1f}%."
    )
    edge = strongest(audit.records, EDGE) or {}
    attack = ATTACKS.get(str(edge.get("attack")), str(edge.get("attack")))
    sees = f"The strongest attack tried is {attack}."
    undefended = strongest(audit.records, UNDEFENDED)
    if undefended is not None and undefended["attack"] != edge.get("attack"):
        name = ATTACKS.get(str(undefended["attack"]), str(undefended["attack"]))
        sees += f" On the undefended upload it is {name}."
    ceiling, floor = strongest(audit.records, UNDEFENDED), floor_of(audit.records)
    if (
        ceiling is not None
        and floor is not None
        and ceiling["ssim"] - floor["ssim"] >= AT_THE_FLOOR
        and not is_below_the_floor(audit)
    ):
        span = ceiling["ssim"] - floor["ssim"]
        left = min(1.0, max(0.0, (edge["ssim"] - floor["ssim"]) / span))
        sees += (
            f" Of the likeness that the undefended upload gives away beyond the average picture, "
            f"{100 * left:.0f}% is left."
        )
    if not is_below_the_floor(audit):
        sees += as_thumbnail(audit)
    sees += " SSIM 1 is the same picture."
    return [("What was cut", cut), ("What it costs the device", cost), ("What is seen", sees)]


def as_thumbnail(audit: Audit) -> str:
    """One sentence: how small a thumbnail shows as much; empty where that was not measured."""
    shown: dict[str, tuple[str, str]] = {}
    for subject in (EDGE, UNDEFENDED):
        best = strongest(audit.records, subject)
        seen = -1.0 if best is None else float(best["ssim"])
        side = thumbnail_side(audit.thumbnails, seen)
        if side is not None:
            size = f"{side:.0f}x{side:.0f}"
            shown[subject] = (f"as much as a thumbnail of {size} pixels, enlarged", f"of {size}")
            if shows_all(audit.thumbnails, seen):
                shown[subject] = ("the whole picture", "the whole picture")
    if EDGE not in shown:
        few = audit.thumbnails and (strongest(audit.records, EDGE) or {}).get("ssim", 1.0) < (
            audit.thumbnails[0]["ssim"])
        return " By SSIM it shows less than the picture's mean colour would." if few else ""
    text = f" By SSIM it shows {shown[EDGE][0]}"
    before = shown.get(UNDEFENDED)
    return f"{text}; the undefended upload, {before[1]}." if before else f"{text}."


def limits(summary: RunSummary, audit: Audit) -> list[str]:
    """What the numbers do not show, in sentences; never empty."""
    edge = attacks_on(audit.records, EDGE)
    names = sorted({str(record["attack"]) for record in edge})
    seeds = len({record.get("attack_seed") for record in edge})
    broken = sorted({str(flag["attack"]) for flag in audit.flags
                     if flag["name"] == "attack_failed" and flag.get("subject", EDGE) == EDGE
                     and flag.get("attack") is not None})
    did = "gave a result" if broken else "were tried"
    texts = [
        f"Only these attacks {did}: {', '.join(names)}, with {seeds} seed"
        f"{'' if seeds == 1 else 's'}. A stronger or longer attack may see more.",
    ]
    if broken:
        texts.append(f"Broken off, with one seed at least: {', '.join(broken)}.")
    if not any(r.get("box") == "white" or r["attack"] in _WHITE for r in edge):
        texts.append("No white-box attack, one that knows the device's weights, gave a result."
                     if broken else
                     "No white-box attack, one that knows the device's weights, was tried.")
    images = sorted({int(r["attacker_images"]) for r in edge
                     if r.get("attacker_images") and r.get("attacker_data") != "shifted"})
    if images:
        texts.append(
            f"The attacker owned {images[-1]:,} pictures of the same kind as the victims'. One "
            "who owns more, or fewer, sees more, or less."
        )
    if strongest(audit.records, UNDEFENDED) is None:
        texts.append(
            "The undefended upload was not attacked, so there is no ceiling to compare with."
        )
    texts += [
        "SSIM, PSNR and MSE measure how like two pictures are. They do not say whether a person, "
        "a place or a number plate can still be recognised: look at the pictures.",
        "This is one trained model with one seed. Another training run differs.",
        "There is no formal guarantee: nothing is proved about attacks that were not tried.",
    ]
    return texts + list(summary.notes)


def comparison(summary: RunSummary, audit: Audit) -> list[dict[str, Any]]:
    """The table's rows: key, label, and the raw values `undefended`, `edge` and `floor`.

    What is seen is, row by row, that of the attack that gets furthest there.
    """
    rows: list[dict[str, Any]] = []
    for key, label in (
        ("edge_macs", "Multiply-adds (MACs) on the device"),
        ("edge_params", "Parameters on the device"),
        ("feature_bytes", "Bytes uploaded per picture"),
        ("accuracy", "Accuracy of the task"),
    ):
        rows.append(
            {"key": key, "label": label, UNDEFENDED: summary.dense[key],
             EDGE: summary.pruned[key], FLOOR: None}
        )
    floor = floor_of(audit.records) or {}
    for key, label in (
        ("ssim", "SSIM of the strongest attack (lower hides more)"),
        ("ssim_worst5", "SSIM on the 5% of pictures that are rebuilt best"),
        ("private_ssim", "SSIM within private regions (lower hides more)"),
        ("psnr", "PSNR in dB (lower hides more)"),
        ("mse", "MSE on [0, 1] pixels (higher hides more)"),
        ("gmsd", "Perceptual distance, GMSD (higher hides more)"),
        ("rank1", "Pictures told from all others by what is rebuilt (lower hides more)"),
        ("chance1", "The same by guessing"),
    ):
        row = {"key": key, "label": label, FLOOR: floor.get(key),
               **{name: furthest(audit.records, name, key) for name in (UNDEFENDED, EDGE)}}
        if any(row[name] is not None for name in (UNDEFENDED, EDGE, FLOOR)):
            rows.append(row)
    return rows
