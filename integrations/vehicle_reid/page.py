"""One page that a person understands in a minute: what is left of the pictures, at what cost."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from leak_checks import row_name
from pictures import Pictures
from PIL import Image
from uploads import DIRECT

from patrol_prune import figures
from patrol_prune.audit_report import AuditReport
from patrol_prune.storage import atomic_write_text

HEADINGS = {"dense": "Not pruned", "taylor": "Taylor", "patrol": "PATROL"}
HELP = {
    "original": "what the camera took",
    "dense": "rebuilt from the upload of the network as it was",
    "taylor": "rebuilt after pruning for accuracy alone",
    "patrol": "rebuilt after pruning and training with PATROL",
}
DASH = "–"
_PLATE = (96, 40)
_MARGIN = 0.12


def percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}%"


def decimal(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def million(value: float) -> str:
    return f"{value / 1e6:.2f} M"


def kib(count: int) -> str:
    """Bytes as KiB, with three digits that count below 10."""
    size = count / 1024
    return f"{size:.3g} KiB" if size < 10 else f"{size:.0f} KiB"


def unmatched(result: Mapping[str, Any]) -> str:
    """Over how many queries the mAP is, where some have nothing to find; else nothing."""
    found = next(iter(result["methods"].values()))["retrieval"]
    missing = found.get("without_match", 0)
    return (f"mAP over {found['queries']} queries; {missing} have nothing to find."
            if missing else "")


def comparison(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the main table: a label, and a cell for each method, the originals and chance."""
    methods, originals = result["methods"], result["originals"]
    rows: list[dict[str, Any]] = []

    def add(label: str, cells: list[str], original: str = "", chance: str = "",
            kind: str = "") -> None:
        rows.append({"label": label, "cells": [*cells, original, chance], "kind": kind})

    each = list(methods.values())
    for key, label in (("map", "Vehicles found again, mAP"), ("rank1", "… first hit is right"),
                       ("minp", "… mINP")):
        add(label, [percent(m["retrieval"][key]) for m in each], kind="task")
    add("Multiply-adds on the device", [million(m["edge_macs"]) for m in each], kind="cost")
    add("Upload per picture", [kib(m["feature_bytes"]) for m in each], kind="cost")
    best = [m["audit"]["strongest"] for m in each]
    floor = next((r for r in each[0]["audit"]["records"] if r["attack"] == "mean_image"),
                 each[0]["audit"]["floor"])
    add("Likeness of rebuilt pictures, SSIM", [decimal(b["ssim"]) for b in best], "1.000",
        decimal(floor["ssim"]), "leak")
    add("… the 5% rebuilt best", [decimal(b["ssim_worst5"]) for b in best], "1.000",
        decimal(floor["ssim_worst5"]), "leak")
    if all("private_ssim" in r for m in each for r in m["audit"]["records"]):
        add("… on the plates alone", [decimal(on_regions(m, "edge")) for m in each], "1.000",
            decimal(on_regions(each[0], "floor")), "leak")
    for key, label in (("plates", "Plates read, whole"), ("characters", "… single characters"),
                       ("scenes", "Places recognised")):
        found = [m["audit"]["leaks"].get(key) for m in each]
        if all(f is not None for f in found):
            add(label, [percent(f["strongest"]["rate"]) for f in found],
                percent(originals[key]["strongest"]["rate"]),
                percent(found[0]["strongest"]["chance"]), "leak")
    found = [m["audit"]["leaks"]["identification"]["strongest"] for m in each]
    for key, label in (("map", "Vehicle named without the cloud's half, mAP"),
                       ("rank1", "… first hit is right")):
        add(label, [percent(f[key]) for f in found],
            percent(originals["identification"]["strongest"][key]),
            percent(originals["identification"]["chance"][key]), "leak")
    return rows


def on_regions(method: Mapping[str, Any], subject: str) -> float:
    """The highest SSIM that was reached on private regions."""
    return max(float(r["private_ssim"]) for r in method["audit"]["records"]
               if r["subject"] == subject)


def headline(result: Mapping[str, Any]) -> str:
    """The comparison in one or two sentences, from the numbers alone."""
    methods = result["methods"]
    base = "taylor" if "taylor" in methods else "dense"
    one, two = methods[base], methods["patrol"]
    points = 100 * (two["retrieval"]["map"] - one["retrieval"]["map"])
    text = (f"PATROL against {HEADINGS[base]}: {points:+.1f} points of mAP, SSIM of the strongest "
            f"attack {two['audit']['strongest']['ssim']:.3f} instead of "
            f"{one['audit']['strongest']['ssim']:.3f}.")
    plates = [m["audit"]["leaks"].get("plates") for m in (one, two)]
    if all(plates):
        rates = [p["strongest"]["rate"] for p in plates]
        text += (f" Number plates that an attacker reads: {percent(rates[1])} instead of "
                 f"{percent(rates[0])}.")
    return text


def write_page(
    result: Mapping[str, Any], audits: Mapping[str, AuditReport], victims: Pictures,
    path: Path,
) -> None:
    """Write the page to `path`, whole or not at all; its pictures are inside.

    Args:
        result: the content of `result.json`.
        audits: of each method; their examples are all victims.
        victims: in the same order.
        path: of the HTML file.
    """
    count = min(result["settings"]["attackers"]["examples"], len(victims))
    index = np.linspace(0, len(victims) - 1, count).round().astype(int)
    rows = [("original", victims.images.permute(0, 2, 3, 1).numpy())]
    rows += [(method, report.examples["edge"]) for method, report in audits.items()]
    boxes = [None if victims.truth is None else plate_box(victims.truth.boxes[i].tolist())
             for i in index]
    strips = [
        {
            "label": {"original": "Original", **HEADINGS}[key], "help": HELP[key],
            "pictures": [
                {"src": inline(images[i]),
                 "plate": None if box is None else inline(crop(images[i], box))}
                for i, box in zip(index, boxes, strict=True)
            ],
        }
        for key, images in rows
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )
    html = environment.get_template("page.html.j2").render(
        result=result, lead=headline(result), strips=strips, count=count,
        plates=any(box is not None for box in boxes), rows=comparison(result),
        columns=[*(HEADINGS[m] for m in result["methods"]), "Original", "By chance"],
        attacks=attack_rows(result), headings=HEADINGS, percent=percent, decimal=decimal,
        unmatched=unmatched(result),
    )
    atomic_write_text(path, html)


def attack_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each method and attack: SSIM, and what could be read out of it at best.

    The uploads themselves come last, of which no picture was rebuilt.
    """
    rows = []
    seeds = result["settings"]["attackers"]["seeds"]
    for method, about in result["methods"].items():
        leaks = about["audit"]["leaks"]
        shown = [(row_name(r["attack"], r["attack_seed"], seeds), r["ssim"], r["ssim_worst5"])
                 for r in about["audit"]["records"] if r["subject"] == "edge"]
        for attack, ssim, worst in (*shown, (DIRECT, None, None)):
            row = {"method": HEADINGS[method], "attack": attack, "ssim": ssim,
                   "ssim_worst5": worst}
            for key, kind, figure in (("plates", "plates", "rate"), ("scenes", "scenes", "rate"),
                                      ("named", "identification", "map")):
                found = [r[figure] for r in leaks.get(kind, {}).get("rows", [])
                         if r["attack"] == attack
                         or (attack == DIRECT and r["attack"].startswith(DIRECT))]
                row[key] = max(found) if found else None
            if ssim is not None or row["named"] is not None:
                rows.append(row)
    return rows


def plate_box(corners: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom around a plate's corners with a margin, in pixels."""
    xs, ys = [p[0] for p in corners], [p[1] for p in corners]
    dx, dy = _MARGIN * (max(xs) - min(xs)), _MARGIN * (max(ys) - min(ys))
    return min(xs) - dx, min(ys) - dy, max(xs) + dx, max(ys) + dy


def crop(image: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """The plate, enlarged."""
    made = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(
        made.transform(_PLATE, Image.Transform.EXTENT, box, Image.Resampling.BICUBIC)
    )


def inline(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(figures.png(image)).decode("ascii")
