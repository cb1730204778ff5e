"""Search beta, alpha, the split, the budget's use and what is uploaded, for one's own model, images
and limits.

Each trial is a short run of the pipeline from one dense model that all trials share. What comes out
is the front between accuracy and the strongest attack's SSIM, among the trials that keep to the
limits, and for each of its points the settings that train it in full.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from patrol_prune._report_facts import floor_of
from patrol_prune.attacks.checks import ATTACK_FAILED, LOSS_DID_NOT_FALL
from patrol_prune.errors import InputError, PatrolError
from patrol_prune.pipeline import Progress, RunResult, run, train_dense
from patrol_prune.plan import short
from patrol_prune.preparation import incoming_model, read_images
from patrol_prune.rundir import CONFIG, make_folder
from patrol_prune.settings import resolve_device
from patrol_prune.tune_report import write_results
from patrol_prune.tune_result import CAUTION, UNMEASURED, Limits, TuneResult, TuneTrial
from patrol_prune.tune_settings import (
    FREE_IN_A_TUNE,
    Point,
    TuneConfig,
    dense_config,
    trial_config,
)
from patrol_prune.tune_space import Space, search_space
from patrol_prune.tune_study import SharedStudy, masked, require_optuna
from patrol_prune.tune_workers import is_free, one_at_a_time

logger = logging.getLogger(__name__)

SETTINGS = "tune.yaml"
TRIALS = "trials"
POLL_SECONDS = 2.0
GIVE_UP_AFTER, LATER = 3, 5
"""Failures in a row that end a worker, before the study's first success and after it."""
_HEAVY = ("checkpoints", "edge.patrol")


def tune(
    config: TuneConfig, *, progress: Progress | None = None, bars: bool = False
) -> TuneResult:
    """Work on the study until it has its trials, and write what came out.

    Any number of processes may do so at once, on one machine or several; a study that was
    interrupted goes on. The folder is `config.runs/config.name`.

    Args:
        config: what is tuned, how it is searched, and the limits.
        progress: called with a stage and a sentence.
        bars: show progress bars while the dense model trains.

    Returns:
        The whole study's trials; the front is empty where no trial keeps to the limits, and
        `why_empty` then says which is the hardest to meet.

    Raises:
        MissingPackageError: Optuna is not installed.
        InputError: three trials in a row failed, or five once one had succeeded.
        RunDirectoryError: the folder holds a study with other settings.
        PatrolError: whatever else is wrong with the settings, the images, the model or the storage.
    """
    require_optuna()
    resolve_device(config.device)
    for sentence in config.unused():
        logger.warning("%s", sentence)
    folder = Path(config.runs) / config.name
    if (folder / CONFIG).is_file():
        raise InputError(f"{folder} holds a run. Give the search another --name.")
    images = read_images(config)
    model, _ = incoming_model(config, len(images.classes))
    space = search_space(config, model, images.example())
    make_folder(folder)
    with SharedStudy(config.name, config.storage, folder, config.seed) as study:
        places = [asdict(candidate) for candidate in space.candidates]
        weights = _digest(config.weights)
        study.join(
            {**config.to_dict(), "images": images.digest, "places": places,
             "weights_digest": weights}, FREE_IN_A_TUNE,
            {**TuneConfig(config.data, config.edge_macs).to_dict(), "weights_digest": weights},
        )
        _keep_settings(config, folder)
        stopped = _Search(config, folder, space, study, progress, bars).go()
        result = TuneResult(
            folder, study.trials(), study.failures(), config.trials, _shown(config)
        )
        result = write_results(config, result, _dense_weights(folder))
    if stopped is not None:
        raise InputError(stopped)
    return result


class _Search:
    """One worker's share of the study."""

    def __init__(
        self, config: TuneConfig, folder: Path, space: Space, study: SharedStudy,
        progress: Progress | None, bars: bool,
    ) -> None:
        self.config, self.folder, self.space, self.study = config, folder, space, study
        self.progress, self.bars = progress, bars
        self.last_told = ""
        self.failed: list[tuple[int, str]] = []  # by this worker, since it last succeeded

    def say(self, stage: str, sentence: str) -> None:
        logger.info("%s: %s", stage, sentence)
        if self.progress is not None and sentence != self.last_told:
            self.progress(stage, sentence)
        self.last_told = sentence

    def go(self) -> str | None:
        """Trials until the study has enough of them, or this worker's time is up.

        Returns:
            Why there will be no more, where one trial after the other fails.
        """
        config, end = self.config, time.monotonic() + (self.config.timeout or float("inf"))
        while True:
            for number in self.study.release_dead():
                _lighten(self.folder / TRIALS / f"{number:04d}")
            finished, running = self.study.counts()
            if finished >= config.trials:
                return None
            if time.monotonic() >= end:
                self.say("tune", f"Time is up with {finished} of {config.trials} trials.")
                return None
            if len(self.failed) >= (LATER if self.study.trials() else GIVE_UP_AFTER):
                return self.why_hopeless()
            if finished + running >= config.trials:
                self.say("tune", f"Waiting for the last trials of other workers: {running}.")
                time.sleep(POLL_SECONDS)
                continue
            dense = self.dense()
            self.study.work(functools.partial(self.attempt, dense), config.trials)

    def why_hopeless(self) -> str:
        number, reason = self.failed[-1]
        return (
            f"{len(self.failed)} trials in a row failed; the search stops here. Trial {number}: "
            f"{reason.rstrip('.')}. Once that is mended the same command goes on; other settings "
            f"need another --name. Failed trials count: raise --trials to make up for them."
        )

    def dense(self) -> Path:
        """The dense model's weights; the first worker on this disk trains them."""
        lock = self.folder / "dense.lock"
        if not is_free(lock):
            self.say("dense", "Waiting for the worker that trains the dense model.")
        with one_at_a_time(lock):
            candidate = self.space.candidates[0]
            point = Point(candidate.name, candidate.most_edge_macs, 0.0, 0.0)
            return train_dense(
                dense_config(self.config, point, self.folder), bars=self.bars,
                progress=lambda stage, told: self.say("dense", told) if stage == "model" else None,
            )

    def attempt(self, dense: Path, trial: Any) -> TuneTrial:
        """A short run with the values that the study proposes."""
        begun, point = time.monotonic(), self.suggest(trial)
        self.say(
            "trial", f"{trial.number}: cut after {point.split}, {short(point.edge_macs)} MACs, "
            f"beta {point.beta:.3g}, alpha {point.alpha:g}{_upload(point)}.",
        )
        folder = self.folder / TRIALS / f"{trial.number:04d}"
        try:
            with _flags_untold():
                result = run(trial_config(self.config, point, dense, folder), overwrite=True,
                             notes=(CAUTION,))
            found = self.found(trial.number, point, result, time.monotonic() - begun)
        except (PatrolError, torch.OutOfMemoryError) as error:
            self.failed.append((trial.number, str(error)))
            self.say("trial", f"{trial.number} failed: {error}")
            raise
        finally:
            _lighten(folder)
        self.failed.clear()
        finished = self.study.counts()[0] + 1
        self.say("trial", f"{_figures(found)} {finished} of {self.config.trials} done.")
        return found

    def suggest(self, trial: Any) -> Point:
        config = self.config
        names = [candidate.name for candidate in self.space.candidates]
        split = trial.suggest_categorical("split", names)
        share = trial.suggest_float("budget_share", *config.budget_range)
        beta = trial.suggest_float("beta", *config.beta_range, log=True)
        alpha = trial.suggest_categorical("alpha", config.alpha_choices)
        bits, channels = (  # no name in the study for what has one value
            trial.suggest_categorical(name, tried) if len(tried) > 1 else tried[0]
            for name, tried in (("bits", config.tried_bits),
                                ("feature_channels", config.tried_channels)))
        return Point(split, self.space.edge_macs(split, share, channels), beta, alpha, bits,
                     channels)

    def found(self, number: int, point: Point, result: RunResult, seconds: float) -> TuneTrial:
        config, summary = self.config, result.summary
        guess = floor_of(result.audit.records)
        strongest, dense = result.audit.strongest("edge"), summary.dense["accuracy"]
        floor = config.min_accuracy
        if config.max_accuracy_drop is not None:
            floor = max(0.0, dense - config.max_accuracy_drop)
        accuracy, ssim = float(summary.pruned["accuracy"]), float(strongest["ssim"])
        if not (math.isfinite(accuracy) and math.isfinite(ssim)):
            raise InputError(f"It came to accuracy {accuracy} and SSIM {ssim}, which nothing can "
                             "be ranked by.")
        return TuneTrial(
            number=number, split=point.split, edge_macs_asked=point.edge_macs, beta=point.beta,
            alpha=point.alpha, bits=point.bits, feature_channels=point.feature_channels,
            accuracy=accuracy, ssim=ssim, attack=str(strongest["attack"]),
            edge_macs=int(summary.pruned["edge_macs"]),
            feature_bytes=int(summary.pruned["feature_bytes"]), dense_accuracy=float(dense),
            limits=Limits(self.space.budget_edge_macs, floor, config.max_feature_bytes),
            floor_ssim=None if guess is None else float(guess["ssim"]),
            flags=tuple(dict.fromkeys(
                flag["name"] for flag in result.audit.flags if flag.get("subject") == "edge"
            )),
            sound=is_sound(config.trial_attacks, result.audit.flags),
            seconds=round(seconds, 1),
        )


def _upload(point: Point) -> str:
    told = "" if point.feature_channels is None else f", {point.feature_channels} channels a group"
    return told if point.bits is None else f"{told}, {point.bits} bits of a value"


def _figures(found: TuneTrial) -> str:
    missed = [name.replace("_", " ") for name, excess in found.excess.items() if excess > 0]
    return (
        f"{found.number}: accuracy {100 * found.accuracy:.1f}%, SSIM {found.ssim:.3f} by "
        f"{found.attack}" + (f"; misses the limit of {', '.join(missed)}" if missed else "")
        + ("." if found.sound else f"; no measure, as {UNMEASURED}: on no front.")
    )


@contextlib.contextmanager
def _flags_untold() -> Iterator[None]:
    """The audit's warnings are kept with the trial, and told once, of all trials together."""
    audits = logging.getLogger("patrol_prune.audit")
    before = audits.level
    if not audits.isEnabledFor(logging.INFO):
        audits.setLevel(logging.ERROR)
    try:
        yield
    finally:
        audits.setLevel(before)


def is_sound(attacks: Sequence[str], flags: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a trial's SSIM measures anything: no attack broke off, and one at least learnt."""
    named = [(flag["name"], flag.get("attack")) for flag in flags if flag.get("subject") == "edge"]
    if any(name == ATTACK_FAILED.name for name, _ in named):
        return False
    return not all((LOSS_DID_NOT_FALL.name, attack) in named for attack in attacks)


def _dense_weights(folder: Path) -> Path:
    return folder / "dense" / "checkpoints" / "dense" / "weights.safetensors"


def _lighten(folder: Path) -> None:
    """Drop a trial's weights: its records and page stay, a chosen point is trained anew."""
    for name in _HEAVY:
        shutil.rmtree(folder / name, ignore_errors=True)


def _digest(weights: str | None) -> str | None:
    """What tells the file of weights from another, wherever it lies."""
    return None if weights is None else hashlib.sha256(Path(weights).read_bytes()).hexdigest()


def _shown(config: TuneConfig) -> dict[str, Any]:
    storage = None if config.storage is None else masked(config.storage)
    return {**config.to_dict(), "storage": storage}


def _keep_settings(config: TuneConfig, folder: Path) -> None:
    """As a file that `--config` reads; a database's password stays out of it.

    What may differ stays as it was at the first start, but for the number of trials.
    """
    kept = replace(config, storage=_shown(config)["storage"])
    if (folder / SETTINGS).exists():
        with contextlib.suppress(PatrolError):  # a torn one is written anew
            kept = replace(TuneConfig.from_yaml(folder / SETTINGS), trials=config.trials)
    kept.to_yaml(folder / SETTINGS)
