"""What a search leaves: `tune.json`, `front.png`, and settings for each point of the front."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from patrol_prune import figures
from patrol_prune.storage import atomic_write_bytes
from patrol_prune.tune_result import TuneResult, TuneTrial
from patrol_prune.tune_settings import Point, TuneConfig, full_config

FRONT = "front"


def write_results(config: TuneConfig, result: TuneResult, dense: Path) -> TuneResult:
    """Write the study's results into its folder; the result with the paths of what was written.

    Args:
        config: of the search.
        result: the study as it stands.
        dense: weights that the full runs start from.
    """
    folder, front = result.directory, result.front
    files = {"json": folder / "tune.json"}
    written = {_config_file(folder, trial): trial for trial in front}
    for path, trial in written.items():
        point = Point(trial.split, trial.edge_macs_asked, trial.beta, trial.alpha, trial.bits,
                      trial.feature_channels)
        full_config(config, point, dense, f"{config.name}-{trial.number:04d}").to_yaml(path)
        files[f"trial {trial.number}"] = path
    for stale in (folder / FRONT).glob("trial-*.yaml"):
        if stale not in written:
            stale.unlink(missing_ok=True)
    if any(trial.sound for trial in result.trials):
        files["plot"] = folder / "front.png"
        floors, guess = {t.limits.accuracy for t in result.trials}, result.trials[-1].floor_ssim
        atomic_write_bytes(files["plot"], figures.front(
            [(t.number, t.split, t.likeness, t.accuracy, t.feasible)
             for t in result.trials if t.sound],
            [t.number for t in front], guess=guess,
            floor=floors.pop() if len(floors) == 1 else None,
        ))
    complete = replace(result, files=files)
    complete.to_json(files["json"])
    return complete


def _config_file(folder: Path, trial: TuneTrial) -> Path:
    return folder / FRONT / f"trial-{trial.number:04d}.yaml"
