"""Figures of a report as PNG bytes, drawn with matplotlib's Agg canvas and no global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from patrol_prune.errors import InputError

INK, MUTED, LIGHT, PALE = "#1d2733", "#5b6673", "#b4bec9", "#d5dce4"
ACCENT, WARM, GREY = "#0b6e69", "#b5482a", "#8a94a0"
_MOST_NAMED_LAYERS = 60
_MARKS = "os^Dv<>pPh*d8H"
_FEWEST_COLUMNS = 5  # or titles are cut off
_TERMS = {
    "accuracy": "Accuracy on held-out pictures (%)",
    "task": "Task loss",
    "adversarial": "Loss of the inner attackers",
    "lipschitz": "Lipschitz term",
    "distillation": "Distillation loss",
}


def png(image: np.ndarray) -> bytes:
    """One picture uint8 [H, W, 3] as a PNG file."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(
            f"Expected a picture uint8 [H, W, 3], came {image.dtype} {image.shape}. "
            "Convert it first."
        )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None},
                   pil_kwargs={"compress_level": 3})
    return buffer.getvalue()


def _literal(text: str) -> str:
    """The text with its dollar signs kept from being read as mathematics."""
    return text.replace("$", r"\$")


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(PALE)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)


def pictures(rows: Sequence[tuple[str, np.ndarray, Sequence[str]]]) -> bytes:
    """A strip of pictures, one row per (label, uint8 [K, H, W, 3], K captions)."""
    columns = max(_FEWEST_COLUMNS, *(len(images) for _, images, _ in rows))
    figure = Figure(figsize=(1.25 * columns, 1.55 * len(rows)))
    grid = figure.subplots(len(rows), 1, squeeze=False)
    for axes, (label, images, captions) in zip(grid.flat, rows, strict=True):
        axes.imshow(_side_by_side(images, columns), interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(label, loc="left", fontsize=9, color=INK, pad=3)
        for j, caption in enumerate(captions):
            axes.text(
                (j + 0.5) / columns, -0.03, caption, transform=axes.transAxes, ha="center",
                va="top", fontsize=7.5, color=MUTED,
            )
    figure.subplots_adjust(0.01, 0.05, 0.99, 0.95, hspace=0.28)
    return _png(figure)


def _side_by_side(images: np.ndarray, columns: int, edge: int = 192, gap: int = 8) -> np.ndarray:
    """Pictures in one row, each `edge` pixels wide, on white."""
    row = Image.new("RGB", (columns * (edge + gap) - gap, edge), "white")
    for j, image in enumerate(images):
        shown = Image.fromarray(image).resize((edge, edge), Image.Resampling.BICUBIC)
        row.paste(shown, (j * (edge + gap), 0))
    return np.asarray(row)


def leak(
    bars: Sequence[tuple[str, float, Sequence[float]]], *, undefended: bool = True
) -> bytes:
    """SSIM per subject: (label, the strongest attack's value, every attack's value).

    Args:
        bars: in the order undefended, edge, floor.
        undefended: whether the first of these is there.
    """
    figure = Figure(figsize=(7.6, 0.42 * len(bars) + 0.62))
    axes = figure.subplots()
    colours = {0: WARM, 1: ACCENT} if undefended else {0: ACCENT}
    for i, (_, value, seeds) in enumerate(bars):
        axes.barh(i, value, height=0.62, color=colours.get(i, GREY))
        if len(seeds) > 1:
            axes.plot(seeds, [i] * len(seeds), "|", color=INK, markersize=9)
        axes.text(value + 0.012, i, f"{value:.3f}", va="center", fontsize=9.5, color=INK)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.0)
    axes.set_xlabel("SSIM of the strongest attack (1 is the same picture)", fontsize=8, color=MUTED)
    _plain(axes)
    axes.tick_params(axis="y", labelsize=9.5, colors=INK)
    figure.tight_layout(pad=0.4)
    return _png(figure)


def channels(prune: Mapping[str, tuple[int, int]]) -> bytes:
    """Channels kept per layer against channels there were, layers from input to cut."""
    names, count = list(prune), len(prune)
    kept = [k for k, _ in prune.values()]
    total = [t for _, t in prune.values()]
    if count > _MOST_NAMED_LAYERS:
        figure = Figure(figsize=(7.6, 2.4))
        axes = figure.subplots()
        axes.bar(range(count), total, width=1.0, color=PALE, label="removed")
        axes.bar(range(count), kept, width=1.0, color=ACCENT, label="kept")
        axes.set_xlabel("layer, from the input to the cut", fontsize=8, color=MUTED)
        axes.set_ylabel("channels", fontsize=8, color=MUTED)
    else:
        figure = Figure(figsize=(7.6, 0.27 * count + 0.75))
        axes = figure.subplots()
        axes.barh(range(count), total, height=0.66, color=PALE, label="removed")
        axes.barh(range(count), kept, height=0.66, color=ACCENT, label="kept")
        for i in range(count):
            axes.text(
                total[i] + 0.01 * max(total), i, f"{kept[i]} of {total[i]}", va="center",
                fontsize=8, color=INK,
            )
        labels = [_literal(name if len(name) <= 34 else "…" + name[-33:]) for name in names]
        axes.set_yticks(range(count), labels)
        axes.set_ylim(count - 0.4, -0.6)
        axes.set_xlim(0, 1.14 * max(total, default=1))
        axes.set_xlabel("channels", fontsize=8, color=MUTED)
    axes.legend(
        fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 0.99),
        borderaxespad=0.0,
    )
    _plain(axes)
    figure.tight_layout(pad=0.4)
    return _png(figure)


def training(history: Sequence[Mapping[str, Any]]) -> bytes:
    """One small curve per quantity that was recorded each epoch."""
    keys = [k for k in _TERMS if any(k in record for record in history)]
    keys += sorted({k for record in history for k in record} - {*_TERMS, "epoch"})
    keys = [k for k in keys if all(isinstance(r.get(k, 0.0), int | float) for r in history)]
    columns = 2 if len(keys) == 4 else min(3, max(1, len(keys)))
    rows = -(-len(keys) // columns) or 1
    figure = Figure(figsize=(7.6, 1.55 * rows + 0.1))
    grid = figure.subplots(rows, columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i >= len(keys):
            axes.set_axis_off()
            continue
        gain = 100.0 if keys[i] == "accuracy" else 1.0
        points = [
            (record.get("epoch", j + 1), gain * float(record[keys[i]]))
            for j, record in enumerate(history)
            if keys[i] in record
        ]
        xs, ys = zip(*points, strict=True)
        axes.set_xlim(min(xs) - 0.5, max(xs) + 0.5)
        axes.plot(xs, ys, color=ACCENT, linewidth=1.6, marker="o", markersize=2.5)
        axes.set_title(_literal(_TERMS.get(keys[i], keys[i])), fontsize=8, color=INK, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", color=PALE, linewidth=0.6)
        _plain(axes)
    figure.supxlabel("epoch of fine-tuning", fontsize=8, color=MUTED, y=0.01)
    figure.tight_layout(pad=0.5)
    return _png(figure)


def front(
    trials: Sequence[tuple[int, str, float, float, bool]],
    numbers: Sequence[int],
    *,
    floor: float | None = None,
    guess: float | None = None,
) -> bytes:
    """Accuracy against SSIM: (number, split, SSIM, accuracy, whether every limit is met).

    Args:
        trials: of a search; an SSIM as they are ranked by.
        numbers: those on the front, which are joined and named.
        floor: the least accuracy that is allowed.
        guess: SSIM of the average picture, which no defence needs to get below.
    """
    figure = Figure(figsize=(7.6, 4.4))
    axes = figure.subplots()
    splits = sorted({split for _, split, _, _, _ in trials})
    for number, split, x, y, met in trials:
        if number not in numbers:
            axes.scatter(x, 100 * y, marker=_mark(splits, split) if met else "x", s=32,
                         color=GREY if met else LIGHT, linewidth=1.2, zorder=2)
    best = sorted((x, 100 * y, n, s) for n, s, x, y, _ in trials if n in numbers)
    if best:
        axes.step([x for x, *_ in best], [y for _, y, *_ in best], where="post", color=ACCENT,
                  linewidth=1.4, zorder=3)
    for x, y, number, split in best:
        axes.scatter(x, y, marker=_mark(splits, split), color=ACCENT, s=46, zorder=4)
        axes.annotate(str(number), (x, y), xytext=(-4, 5), textcoords="offset points", ha="right",
                      fontsize=8, color=INK)
    if floor is not None:
        axes.axhline(100 * floor, color=WARM, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(f"least accuracy {100 * floor:.1f}%", (1.0, 100 * floor), ha="right",
                      xycoords=("axes fraction", "data"), xytext=(0, 3), fontsize=8, color=WARM,
                      textcoords="offset points")
    if guess is not None:
        axes.axvline(guess, color=MUTED, linewidth=1.0, linestyle=(0, (1, 3)), zorder=1)
        axes.annotate("average picture", (guess, 0.0), xycoords=("data", "axes fraction"),
                      xytext=(3, 4), textcoords="offset points", fontsize=8, color=MUTED,
                      rotation=90, va="bottom")
    _name_the_marks(axes, splits, any(not able for *_, able in trials), bool(best))
    axes.margins(0.08)
    axes.set_xlabel("SSIM of a short attack, or the average picture's where that is more "
                    "(further left hides more)", fontsize=8, color=MUTED)
    axes.set_ylabel("accuracy after a short fine-tuning (%)", fontsize=8, color=MUTED)
    axes.grid(color=PALE, linewidth=0.5, zorder=0)
    _plain(axes)
    figure.tight_layout(pad=0.5)
    return _png(figure)


def _mark(splits: Sequence[str], split: str) -> str:
    return _MARKS[splits.index(split) % len(_MARKS)]


def _name_the_marks(axes: Axes, splits: Sequence[str], missed: bool, best: bool) -> None:
    marks = [(_mark(splits, split), GREY, f"cut after {split}") for split in splits]
    marks += [("x", LIGHT, "misses a limit")] if missed else []
    for marker, color, label in marks:
        axes.scatter([], [], marker=marker, color=color, label=_literal(label), s=30)
    if best:
        axes.plot([], [], color=ACCENT, linewidth=1.4, label="front, with numbers of trials")
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0),
                borderaxespad=0.2)


@dataclass(frozen=True)
class Place:
    """A place to cut, as the plan's figure shows it.

    Attributes:
        name: of the split.
        chosen: whether it is the recommended one.
        fits: whether the budget can be met there.
        edge_macs: of the dense edge.
        smallest: the fewest multiply-adds that pruning reaches.
        ms: median and interquartile range of the dense edge's time, where it was measured.
    """

    name: str
    chosen: bool
    fits: bool
    edge_macs: int
    smallest: int
    ms: tuple[float, float] | None = None


def places(
    rows: Sequence[Place],
    *,
    budget: int,
    pruned: Sequence[tuple[str, float, float]] = (),
    limit_ms: float | None = None,
) -> bytes:
    """Multiply-adds of every place to cut, and milliseconds beside them where there are any.

    Args:
        rows: shallow to deep.
        budget: multiply-adds, a line.
        pruned: (rounding, median, interquartile range) of the recommended edge pruned.
        limit_ms: the longest it may take, a line.
    """
    timed = all(row.ms is not None for row in rows)
    figure = Figure(figsize=(10.4 if timed else 7.6, 0.27 * len(rows) + 1.1))
    grid = figure.subplots(1, 2 if timed else 1, squeeze=False, sharey=True)[0]
    axes, at = grid[0], range(len(rows))
    axes.barh(at, [r.edge_macs / 1e6 for r in rows], height=0.66, color=PALE, label="dense")
    axes.barh(at, [r.smallest / 1e6 for r in rows], height=0.3, color=LIGHT,
              label="pruned to the floors")
    axes.axvline(budget / 1e6, color=WARM, linewidth=1.2, label="budget")
    axes.set_xlabel("edge MACs (millions)", fontsize=8, color=MUTED)
    axes.set_yticks(at, [_literal(r.name) for r in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    if timed:
        _times(grid[1], rows, pruned, limit_ms)
    for each in grid:
        _plain(each)
        each.legend(fontsize=8, frameon=False, ncols=3 if each is axes else 2, loc="lower left",
                    bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(ACCENT if row.chosen else INK if row.fits else GREY)
        label.set_fontweight("bold" if row.chosen else "normal")
    figure.tight_layout(pad=0.5)
    return _png(figure)


def _times(
    axes: Axes, rows: Sequence[Place], pruned: Sequence[tuple[str, float, float]],
    limit_ms: float | None,
) -> None:
    known = [row.ms or (0.0, 0.0) for row in rows]
    axes.barh(range(len(rows)), [m for m, _ in known], xerr=[i / 2 for _, i in known],
              height=0.66, color=PALE, label="dense",
              error_kw={"ecolor": MUTED, "elinewidth": 1.0})
    chosen = next((i for i, row in enumerate(rows) if row.chosen), 0)
    for mark, (name, median, iqr) in zip(_MARKS, pruned, strict=False):
        axes.errorbar(median, chosen, xerr=iqr / 2, fmt=mark, color=ACCENT, markersize=4,
                      elinewidth=1.0, label=f"pruned, {name}")
    if limit_ms is not None:
        axes.axvline(limit_ms, color=WARM, linewidth=1.2, label="limit")
    axes.set_xlabel("milliseconds on this device (median, interquartile range)", fontsize=8,
                    color=MUTED)
