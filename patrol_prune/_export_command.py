"""The command `export`: the finished edge of a run, and its cloud, as files to deploy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from patrol_prune.checkpoint import load, read_info
from patrol_prune.export import Exported, export
from patrol_prune.exported import ABOUT, FORMATS
from patrol_prune.pipeline import EDGE, EXPORT
from patrol_prune.preparation import fresh_model, with_dropout
from patrol_prune.reaudit import config_of_run, refuse_unfinished
from patrol_prune.rundir import CONFIG, RunDirectory, read_config


def add_options(parser: ArgumentParser) -> None:
    """The options of `patrol-prune export`."""
    parser.add_argument("run", type=str, help="a run's folder, as in runs/photos")
    parser.add_argument("--model", type=str, help="the module:function in the run's settings, "
                                                  "where it is one, to have it imported")
    parser.add_argument("--formats", type=str, nargs="+", default=["onnx"],
                        help=f"out of {', '.join(FORMATS)}")
    parser.add_argument("--out", type=str, help=f"a folder; {EXPORT}/ in the run's without")
    parser.add_argument("--any_batch", action="store_true",
                        help="let the edge take any number of pictures at once, not one")
    parser.add_argument("--opset", type=int, help="of ONNX")


def write(options: dict[str, Any], tell: Callable[[str, str], None]) -> None:
    """Carry the command out.

    Args:
        options: as the command line gave them.
        tell: called with a stage and a sentence.
    """
    written = export_run(
        options["run"], options["out"], model=options["model"], formats=options["formats"],
        any_batch=options["any_batch"], opset=options["opset"],
    )
    for name, difference in written.differences.items():
        size = (written.path / name).stat().st_size / 1024
        told = ("it draws, and was not compared" if difference is None
                else f"its answers differ by {difference:.0e} at most")
        tell("export", f"{written.path / name}: {size:,.0f} KiB; {told}.")
    taken = written.about["edge"]["input"]
    tell("export", f"The edge takes {taken['holds']}, {taken['dtype']} {taken['shape']}; names, "
                   f"shapes and classes are in {written.path / ABOUT}.")


def export_run(
    directory: str | Path,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    formats: list[str] | tuple[str, ...] = ("onnx",),
    any_batch: bool = False,
    opset: int | None = None,
) -> Exported:
    """Export the finished edge of a run, which takes pixels on [0, 1], and its cloud.

    The images of the run are not needed. A `privacy.dropout` is part of the edge.

    Args:
        directory: of the run.
        out: a folder; the run's own `export/` where None.
        model: of a run of the user's own model, the `module:function` in its settings.
        formats: see `patrol_prune.export`; likewise `any_batch` and `opset`.

    Raises:
        RunDirectoryError: there is no run, it has no finished edge yet, or it is being worked on.
        PatrolError: as `patrol_prune.export`.
    """
    path = Path(directory)
    config = config_of_run(path, model)
    with RunDirectory(path, read_config(path / CONFIG)) as folder:
        refuse_unfinished(folder)
        about = read_info(path / EDGE)
        classes = [str(name) for name in about.extra["classes"]]
        plain = load(path / EDGE, lambda: fresh_model(config, len(classes)))
        return export(
            with_dropout(config.privacy, plain, config.seed), path / EXPORT if out is None else out,
            formats=formats, normalization=about.normalization, any_batch=any_batch, opset=opset,
            classes=classes)
