"""Records to tables, figures and one page that a person understands in a minute.

The page is a single file: its pictures are inside, it links to nothing and runs no script. Numbers
in its tables stand in `<data value=…>` elements with the record's full precision, and again in
`report.json` beside it.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from patrol_prune import figures
from patrol_prune._report_facts import (
    EDGE,
    FLOOR,
    UNDEFENDED,
    Audit,
    RunSummary,
    attack_rows,
    attacks_on,
    comparison,
    floor_of,
    headline,
    limits,
    number,
    story,
)
from patrol_prune.errors import InputError
from patrol_prune.metrics import ssim
from patrol_prune.storage import atomic_write_bytes, atomic_write_json, atomic_write_text
from patrol_prune.tables import (
    HEADINGS,
    SUBJECTS,
    attack_columns,
    console_table,
    merged_flags,
    render_table,
)

__all__ = ["RunSummary", "console_table", "render_table", "write_report"]

ORIGINAL = "originals"
_ROWS = {
    ORIGINAL: ("Original", "what the camera took"),
    UNDEFENDED: ("Undefended", "rebuilt from the unpruned network's upload, cut at the same place"),
    EDGE: ("PATROL", "rebuilt from the pruned network's upload"),
}
_MOST_EXAMPLES = 8


def write_report(summary: RunSummary, audit: Audit, directory: str | os.PathLike[str]) -> Path:
    """Write `figures/*.png`, `report.json` and `report.html`, each whole or not at all.

    Args:
        summary: of the run.
        audit: an `AuditReport`: at least one record of the subject `edge`, and examples with the
            keys `originals` and `edge`.
        directory: made if it is not there.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: nothing was attacked, there are no example pictures, or the summary holds
            something that is not JSON.
    """
    directory = Path(directory)
    twin = {
        "headline": headline(summary, audit),
        "summary": asdict(summary),
        "comparison": comparison(summary, audit),
        "attacks": attack_rows(audit.records),
        "records": list(audit.records),
        "flags": merged_flags(audit.flags),
        "limits": limits(summary, audit),
    }
    strip = _picture_rows(audit)
    plots = _plots(summary, audit, strip)
    page = _page(summary, audit, twin, strip, plots)
    for name, data in plots.items():
        atomic_write_bytes(directory / "figures" / f"{name}.png", data)
    atomic_write_json(directory / "report.json", _finite(twin))
    atomic_write_text(directory / "report.html", page)
    return directory / "report.html"


def _page(
    summary: RunSummary,
    audit: Audit,
    twin: Mapping[str, Any],
    strip: Sequence[tuple[str, np.ndarray, list[float | None]]],
    plots: Mapping[str, bytes],
) -> str:
    """The HTML, from what goes into `report.json`, the pictures and the figures."""
    rows = [
        {
            "label": _ROWS[key][0],
            "help": _ROWS[key][1],
            "pictures": [
                {"src": _inline(figures.png(image)), "ssim": score}
                for image, score in zip(images, scores, strict=True)
            ],
        }
        for key, images, scores in strip
    ]
    return _environment().get_template("report.html.j2").render(
        summary=summary,
        lead=twin["headline"],
        story=story(summary, audit),
        strip=rows,
        headings=HEADINGS,
        rows=twin["comparison"],
        spread=_spread(audit),
        plots={name: _inline(data) for name, data in plots.items()},
        leak_text=", ".join(f"{label} {value:.3f}" for label, value, _ in _bars(audit)),
        attacks=twin["attacks"],
        attack_columns=attack_columns(twin["attacks"]),
        subjects=SUBJECTS,
        flags=twin["flags"],
        limits=twin["limits"],
        records=twin["records"],
        record_keys=_record_keys(audit.records),
        settings={
            "Settings": _json(summary.config),
            "Plan": _json(summary.plan),
            "Versions": _json(summary.versions),
        },
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("patrol_prune", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["number"] = number
    return environment


def _picture_rows(audit: Audit) -> list[tuple[str, np.ndarray, list[float | None]]]:
    """The strip's rows: subject, pictures, and the SSIM of each to its original."""
    if ORIGINAL not in audit.examples or EDGE not in audit.examples:
        raise InputError(
            f"Expected the audit's examples to hold 'originals' and 'edge', came "
            f"{sorted(audit.examples)}. Audit with examples=8."
        )
    originals = _colour(audit.examples[ORIGINAL])
    rows: list[tuple[str, np.ndarray, list[float | None]]] = []
    for key in _ROWS:
        if key not in audit.examples:
            continue
        images = _colour(audit.examples[key])
        if images.shape != originals.shape:
            raise InputError(
                f"Expected the examples of {key!r} to have the originals' shape "
                f"{originals.shape}, came {images.shape}. Save the same victims for each subject."
            )
        scores: list[float | None] = [None] * len(images)
        if key != ORIGINAL:
            scores = list(_ssim(images, originals))
        rows.append((key, images, scores))
    return rows


def _colour(images: np.ndarray) -> np.ndarray:
    """The first pictures as uint8 [K, H, W, 3]; grey ones [K, H, W, 1] are repeated."""
    shown = np.asarray(images)[:_MOST_EXAMPLES]
    grey = shown.ndim == 4 and shown.shape[3] == 1
    return np.repeat(shown, 3, axis=3) if grey else shown


def _ssim(images: np.ndarray, originals: np.ndarray) -> list[float]:
    def pixels(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.copy()).permute(0, 3, 1, 2).float() / 255.0

    values: list[float] = ssim(pixels(images), pixels(originals)).tolist()
    return values


def _bars(audit: Audit) -> list[tuple[str, float, list[float]]]:
    bars = []
    for subject, heading in HEADINGS.items():
        records = attacks_on(audit.records, subject)
        if subject == FLOOR:
            records = [r for r in records if r == floor_of(audit.records)]
        if records:
            values = [float(record["ssim"]) for record in records]
            bars.append((heading, values[0], values))
    return bars


def _plots(
    summary: RunSummary,
    audit: Audit,
    strip: Sequence[tuple[str, np.ndarray, list[float | None]]],
) -> dict[str, bytes]:
    captioned = [
        (f"{_ROWS[key][0]}: {_ROWS[key][1]}", images,
         ["" if score is None else f"SSIM {score:.2f}" for score in scores])
        for key, images, scores in strip
    ]
    plots = {"pictures": figures.pictures(captioned), "leak": figures.leak(
        _bars(audit), undefended=bool(attacks_on(audit.records, UNDEFENDED)))}
    if summary.prune:
        plots["channels"] = figures.channels(summary.prune)
    if summary.history:
        plots["training"] = figures.training(summary.history)
    return plots


def _spread(audit: Audit) -> dict[str, str]:
    """Lowest to highest SSIM over attacks and seeds, for each subject with several."""
    texts = {}
    for subject in (UNDEFENDED, EDGE):
        records = attacks_on(audit.records, subject)
        values = [float(record["ssim"]) for record in records]
        if len(values) > 1:
            attacks = len({record["attack"] for record in records})
            fits = f" ({len(values)} times)" * (len(values) > attacks)
            over = "one attack" if attacks == 1 else f"{attacks} attacks"
            texts[subject] = f"{min(values):.3f} to {max(values):.3f} over {over}{fits}"
    return texts


def _record_keys(records: Sequence[Mapping[str, Any]]) -> list[str]:
    keys: dict[str, None] = {}
    for record in records:
        keys.update(
            {k: None for k, v in record.items() if v is None or isinstance(v, str | int | float)}
        )
    return list(keys)


def _inline(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _json(value: Any) -> str:
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    """The value with infinities and NaN as text, which JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
