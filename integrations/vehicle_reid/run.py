"""Re-identification with a pruned edge: dense, Taylor-pruned and PATROL side by side.

    python integrations/vehicle_reid/run.py --data rendered --name vehicles
    python integrations/vehicle_reid/run.py --data /sets/VeRi --model resnet18 --image-size 128
    python integrations/vehicle_reid/run.py --data photos --layout folder

The same command goes on where it was stopped. What it leaves is in `runs/<name>`: `index.html` for
people, `result.json` for programs.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from beginning import planned
from jsonargparse import ArgumentParser
from page import HEADINGS, comparison, unmatched
from pictures import everybody
from rich.console import Console
from rich.table import Table
from settings import ReidRun
from stages import OUTPUTS, PAGE, Work

from patrol_prune.errors import PatrolError
from patrol_prune.plain_settings import build
from patrol_prune.rundir import CONFIG, RunDirectory
from patrol_prune.settings import FREE_KEYS, resolve_device
from patrol_prune.storage import WRITE_ERRORS

BAD_INPUT, INTERRUPTED = 2, 130


def run(
    config: ReidRun, *, overwrite: bool = False, progress: Any = lambda stage, sentence: None
) -> dict[str, Any]:
    """Every stage; the content of `result.json`.

    Raises:
        PatrolError: whatever is wrong with the settings, the pictures or the run's folder. Where
            device, pictures, model, weights or the place of the cut are not there, or the budget
            cannot be met, a new run leaves no folder, and an earlier one stays with `overwrite`.
    """
    # tuples as lists, as YAML reads them back
    plain, defaults = (json.loads(json.dumps(asdict(c))) for c in (config, ReidRun(config.data)))
    path = Path(config.runs) / config.name
    people = made = None
    if overwrite or not (path / CONFIG).is_file():  # what cannot be had costs no run and no name
        resolve_device(config.device)
        progress("data", "Reading the pictures.")
        people = everybody(config)
        made = planned(config, people)
    with RunDirectory(path, plain, overwrite=overwrite, free_keys=FREE_KEYS,
                      outputs=OUTPUTS, defaults=defaults) as folder:
        return Work(config, folder, progress, people, made).go()


def table(result: dict[str, Any]) -> Table:
    """The page's main table for a terminal."""
    made = Table(title="Re-identification, and what an attacker gets out of the uploads",
                 caption=unmatched(result) or None)
    made.add_column("")
    for method in result["methods"]:
        made.add_column(HEADINGS[method], justify="right")
    made.add_column("Original", justify="right")
    made.add_column("By chance", justify="right")
    for row in comparison(result):
        made.add_row(row["label"], *row["cells"])
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="a YAML file of settings")
    parser.add_argument("--overwrite", action="store_true", help="start the run anew")
    parser.add_class_arguments(ReidRun)
    given = sys.argv[1:] if arguments is None else arguments
    values = parser.parse_args([_underscored(a) for a in given]).as_dict()
    values.pop("config", None)
    overwrite = bool(values.pop("overwrite"))
    console = Console()
    try:
        config = build(ReidRun, values, "the command line")
        result = run(config, overwrite=overwrite, progress=lambda stage, sentence: console.print(
            f"{stage:13} {sentence}", markup=False, highlight=False, soft_wrap=True))
    except PatrolError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        return BAD_INPUT
    except WRITE_ERRORS as error:
        Console(stderr=True).print(
            f"error: {error}. What was finished before is kept; the same command goes on from "
            "there once files can be written again.", markup=False, soft_wrap=True)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on.", file=sys.stderr)
        return INTERRUPTED
    console.print(table(result))
    for note in result.get("notes", ()):
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Page: {(Path(config.runs) / config.name / PAGE).resolve()}", soft_wrap=True)
    return 0


def _underscored(argument: str) -> str:
    """`--image-size` as `--image_size`; values stay as they are."""
    return re.sub(r"^--[\w.-]+", lambda m: "--" + m.group()[2:].replace("-", "_"), argument)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    raise SystemExit(main())
