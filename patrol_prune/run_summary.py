"""A run in plain numbers: gathered from what its stages noted, and read back."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from patrol_prune.audit_kept import KeptAttacks
from patrol_prune.audit_report import AuditReport
from patrol_prune.errors import RunDirectoryError
from patrol_prune.plain_settings import build
from patrol_prune.preparation import Images, dropout_notes, rounding_notes
from patrol_prune.report import RunSummary, write_report
from patrol_prune.rundir import CONFIG, RunDirectory, place_of, read_config, run_command
from patrol_prune.settings import FREE_KEYS, MOVABLE, AuditConfig, RunConfig
from patrol_prune.storage import atomic_write_json
from patrol_prune.versions import version_of

SUMMARY = "summary.json"
AUDITING = "checkpoints/audit"
_COST = ("edge_macs", "edge_params", "feature_bytes", "accuracy")


def kept_attacks(
    config: RunConfig, folder: RunDirectory, images: Images, device: str
) -> KeptAttacks:
    """What an interrupted audit of this edge by the same attackers had come to."""
    settings = {k: v for k, v in config.to_dict().items() if k not in (*FREE_KEYS, *MOVABLE)}
    return KeptAttacks(folder / AUDITING, {
        "settings": settings, "images": images.digest, "normalization": str(images.normalization),
        "edge": folder.digests("finetune"), "dense": folder.digests("model"), "device": device,
        "versions": versions(),
    })


def audit_notes(config: RunConfig, *, device: str, notes: Iterable[str]) -> dict[str, Any]:
    """What is kept with an audit: who attacked, where, and what a page on it has to say."""
    dropout = dropout_notes(config.privacy, config.audit.uploads)
    return {"settings": config.to_dict()["audit"], "device": device, "versions": versions(),
            "notes": [*notes, *rounding_notes(config.bits, config.privacy.dropout), *dropout]}


def summarise(config: RunConfig, folder: RunDirectory, notes: Iterable[str] = ()) -> RunSummary:
    """What the report needs of a run whose stages up to the audit are done; of the audit, what was
    kept with it (`audit_notes`), and `notes` before that."""
    told = {stage: folder.notes(stage) for stage in ("plan", "model", "prune", "finetune", "audit")}
    made = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    at, audit = told["plan"]["at"], told["audit"]
    row = next(r for r in made["rows"] if r["name"] == at)
    config = replace(config, audit=build(AuditConfig, audit["settings"], str(folder.path)))
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
        history=_in_a_row(told["finetune"]["history"],
                          told["finetune"].get("history_rounded", ())),
        config=config.to_dict(),
        versions=audit["versions"],
        seed=config.seed,
        command=run_command(folder.path),
        device=audit["device"],
        notes=list(dict.fromkeys([*notes, *audit["notes"]])),
    )


def _in_a_row(
    first: Sequence[dict[str, Any]], then: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The epochs of two trainings, one behind the other."""
    return [*first, *({**one, "epoch": len(first) + i} for i, one in enumerate(then, 1))]


def write_page(config: RunConfig, folder: RunDirectory, notes: Iterable[str] = ()) -> Path:
    """Summary and page of a run whose stages up to the audit are done, recorded as the stage
    `report`; the page's path. See `summarise`."""
    summary = summarise(config, folder, notes)
    atomic_write_json(folder / SUMMARY, asdict(summary))
    page = write_report(summary, AuditReport.from_json(folder / "audit.json"), folder.path)
    folder.finish("report", [SUMMARY, "report.html", "figures"])
    return page


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
    if not (folder / CONFIG).is_file():
        read_summary(folder)
    with RunDirectory(folder, read_config(folder / CONFIG)) as run:
        if run.done("plan") and run.done("audit") and run.notes("audit"):
            config = RunConfig.from_yaml(folder / CONFIG)
            name, runs = place_of(folder, config.to_dict())
            notes = read_summary(folder).notes if run.done("report") else ()
            return write_page(replace(config, name=name, runs=runs), run, notes)
        summary = read_summary(folder)  # of a run that is not finished, or of an earlier release
        name, runs = place_of(folder, summary.config)
        summary = replace(summary, name=name, command=run_command(folder),
                          config={**summary.config, "name": name, "runs": runs})
        return write_report(summary, AuditReport.from_json(folder / "audit.json"), folder)


def versions() -> dict[str, str]:
    """Of Python and of what the numbers depend on."""
    found = {"python": platform.python_version()}
    names = ("patrol-prune", "torch", "torchvision", "torch-pruning", "torchmetrics")
    return found | {name: version_of(name) for name in names}
