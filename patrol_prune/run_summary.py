"""A run in plain numbers: gathered from what its stages noted, and read back."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from patrol_prune.audit_report import AuditReport
from patrol_prune.errors import RunDirectoryError
from patrol_prune.report import RunSummary, write_report
from patrol_prune.rundir import CONFIG, RunDirectory, place_of, run_command
from patrol_prune.settings import RunConfig

SUMMARY = "summary.json"
_COST = ("edge_macs", "edge_params", "feature_bytes", "accuracy")


def summarise(
    config: RunConfig, folder: RunDirectory, *, at: str, device: str, notes: Iterable[str]
) -> RunSummary:
    """What the report needs of a run whose stages up to fine-tuning are done."""
    told = {stage: folder.notes(stage) for stage in ("plan", "model", "prune", "finetune")}
    made = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    row = next(r for r in made["rows"] if r["name"] == at)
    return RunSummary(
        name=config.name,
        model=config.model,
        dataset=f"{Path(config.data).name}, {config.image_size} pixels",
        split=at,
        plan={
            "budget": told["plan"]["budget"],
            "boundary": config.boundary,
            "effect": row["effect"],
            "left_whole": told["prune"]["left_whole"],
        },
        removed_blocks=list(told["prune"].get("removed_blocks", [])),
        prune={name: (now, before) for name, (now, before) in told["prune"]["kept"].items()},
        dense={key: told["model"][key] for key in _COST},
        pruned={key: told["finetune"][key] for key in _COST},
        history=told["finetune"]["history"],
        config=config.to_dict(),
        versions=versions(),
        seed=config.seed,
        command=run_command(folder.path),
        device=device,
        notes=list(notes),
    )


def read_summary(directory: str | Path) -> RunSummary:
    """The summary that a finished run left.

    Raises:
        RunDirectoryError: there is none, or it is torn.
    """
    folder = Path(directory)
    try:
        values = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        values["prune"] = {k: (now, before) for k, (now, before) in values["prune"].items()}
        return RunSummary(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not (folder / CONFIG).is_file():
            raise RunDirectoryError(
                f"Expected a run's folder, came {folder}, which has no {CONFIG}. Give that of a "
                "finished run, as in runs/photos."
            ) from error
        raise RunDirectoryError(
            f"Expected a finished run in {folder}, but its {SUMMARY} cannot be read ({error}). "
            f"Let the run finish first: {run_command(folder)}"
        ) from error


def rewrite_report(directory: str | Path) -> Path:
    """The page of a finished run, made again from its records; its path.

    A run that was renamed or moved is called what it is called now.
    """
    folder = Path(directory)
    summary = read_summary(folder)
    name, runs = place_of(folder, summary.config)
    summary = replace(summary, name=name, command=run_command(folder),
                      config={**summary.config, "name": name, "runs": runs})
    return write_report(summary, AuditReport.from_json(folder / "audit.json"), folder)


def versions() -> dict[str, str]:
    """Of Python and of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("patrol-prune", "torch", "torchvision", "torch-pruning", "torchmetrics"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
