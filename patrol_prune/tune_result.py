"""What a search found: its trials, which of them are not beaten, and which limit is in the way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from patrol_prune.storage import atomic_write_text

CAUTION = (
    "A trial is trained and attacked only briefly: its figures rank the trials, they do not say "
    "what an attacker sees. A full attack sees more. Train the point you choose, and audit it, in "
    "full."
)
UNMEASURED = "the attacks learnt nothing or broke off"
ANEW = "under another --name, as a study keeps its settings"
_VERSION = 1
_LIMITS = {
    "accuracy": ("accuracy", "at least", "{:.1%}"),
    "edge_macs": ("edge MACs", "at most", "{:,.0f}"),
    "feature_bytes": ("uploaded bytes", "at most", "{:,.0f}"),
}


@dataclass(frozen=True)
class Limits:
    """What a point has to keep to; None is no limit.

    Attributes:
        edge_macs: the most multiply-adds on the device.
        accuracy: the least accuracy, in [0, 1].
        feature_bytes: the most that is uploaded per image.
    """

    edge_macs: float
    accuracy: float | None = None
    feature_bytes: float | None = None

    def bounds(self) -> dict[str, float]:
        """Those that there are, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def excess(self, measured: Mapping[str, float]) -> dict[str, float]:
        """By how much each limit is missed, in its own unit; at most 0 where it is met.

        `accuracy` is a least value, so its excess is `limit - measured`; the others are
        `measured - limit`.
        """
        return {  # rounded: 0.85 - 0.02 must not be missed by 0.83
            name: round((bound - measured[name]) * (1 if name == "accuracy" else -1), 9)
            for name, bound in self.bounds().items()
        }


@dataclass(frozen=True)
class TuneTrial:
    """One finished trial.

    Attributes:
        number: in the study.
        split: where the model was cut.
        edge_macs_asked: what the pruner was asked for, in multiply-adds.
        beta: weight of the surrogate attackers.
        alpha: weight of the Lipschitz term.
        accuracy: on the test images after the short fine-tuning, in [0, 1].
        ssim: of the strongest of the trial's short attacks, mean over the victim's images.
        attack: which one that was.
        edge_macs: multiply-adds of the pruned edge.
        feature_bytes: uploaded per image, as float32 or packed bits.
        dense_accuracy: of the model before pruning.
        limits: what held for this trial, `edge_macs` and `feature_bytes` at most and `accuracy` at
            least; None is no limit.
        floor_ssim: SSIM of the average picture, which needs no upload.
        flags: names of what the audit warned of, as that an attack was still improving.
        sound: whether `ssim` measures anything: no attack broke off, and one at least learnt.
        seconds: that it took.
        bits: of an uploaded value; None is float32.
        feature_channels: of each group that crosses; None is as many as the budget left.
    """

    number: int
    split: str
    edge_macs_asked: int
    beta: float
    alpha: float
    accuracy: float
    ssim: float
    attack: str
    edge_macs: int
    feature_bytes: int
    dense_accuracy: float
    limits: Limits
    floor_ssim: float | None = None
    flags: tuple[str, ...] = ()
    seconds: float = 0.0
    sound: bool = True
    bits: int | None = None
    feature_channels: int | None = None

    @property
    def excess(self) -> dict[str, float]:
        """Limit -> by how much it is missed, in its own unit; at most 0 where it is met."""
        return self.limits.excess(asdict(self))

    @property
    def likeness(self) -> float:
        """What a trial is ranked by, the less the better. It is `ssim`, but no less than the
        average picture's, which anyone has; 1 where the trial is not `sound`.
        """
        if not self.sound:
            return 1.0
        return max(self.ssim, self.ssim if self.floor_ssim is None else self.floor_ssim)

    @property
    def feasible(self) -> bool:
        """Whether every limit is met."""
        return max(self.excess.values()) <= 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TuneTrial:
        """The trial that `dataclasses.asdict` made plain data of."""
        limits, flags = Limits(**values["limits"]), tuple(values["flags"])
        return cls(**{**values, "limits": limits, "flags": flags})


def pareto_front(trials: Iterable[TuneTrial]) -> tuple[TuneTrial, ...]:
    """The feasible and sound trials that none of them beats, the most accurate first.

    One beats another if it is at least as accurate, its `likeness` is no higher, and one of the two
    is better. Equal ones do not beat each other.
    """
    front: list[TuneTrial] = []
    for trial in sorted((t for t in trials if t.feasible and t.sound),
                        key=lambda t: (-t.accuracy, t.likeness, t.number)):
        last = front[-1] if front else None
        if last is None or trial.likeness < last.likeness or (
            (trial.accuracy, trial.likeness) == (last.accuracy, last.likeness)
        ):
            front.append(trial)
    return tuple(front)


@dataclass(frozen=True)
class TuneResult:
    """The study as it stands.

    Attributes:
        directory: of the study.
        trials: finished trials of all workers, by number.
        failures: number of each failed trial to what went wrong.
        wanted: how many trials were asked for.
        settings: of the search, as plain data.
        files: what was written: "json", "plot", and "trial 7" and so on, the settings of the run
            that trains a point of the front in full.
    """

    directory: Path
    trials: tuple[TuneTrial, ...]
    failures: dict[int, str] = field(default_factory=dict)
    wanted: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def front(self) -> tuple[TuneTrial, ...]:
        """The feasible and sound trials that none beats, the most accurate first.

        One beats another if it is at least as accurate, its `likeness` is no higher, and one of the
        two is better.
        """
        return pareto_front(self.trials)

    @property
    def why_empty(self) -> str | None:
        """Why the front is empty, in sentences; None if it is not."""
        if self.front:
            return None
        if any(trial.feasible for trial in self.trials):
            return ("In no trial that keeps to the limits do the attacks measure anything: they "
                    "learnt nothing or broke off. Raise --trial-attack-epochs, or take other "
                    f"--trial-attacks, {ANEW}.")
        if self.trials:
            return _hardest_limit(self.trials)
        if self.failures:
            number, reason = sorted(self.failures.items())[-1]
            return f"No trial succeeded; {len(self.failures)} failed, the last, {number}: {reason}"
        return "No trial was finished. Give the study more time."

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The study as JSON text; with `path`, also written there, whole or not at all."""
        content = {
            "version": _VERSION,
            "caution": CAUTION,
            "wanted": self.wanted,
            "front": [trial.number for trial in self.front],
            "why_empty": self.why_empty,
            "trials": [
                {**asdict(trial), "likeness": trial.likeness, "feasible": trial.feasible,
                 "excess": trial.excess}
                for trial in self.trials
            ],
            "failures": [{"number": n, "reason": reason} for n, reason in self.failures.items()],
            "settings": self.settings,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        if path is not None:
            atomic_write_text(path, text + "\n")
        return text


def _hardest_limit(trials: Sequence[TuneTrial]) -> str:
    """Which limit no trial met and by how much, or which the nearest trial misses.

    Limits have different units, so a miss is compared as a share of the limit.
    """

    def miss(trial: TuneTrial, name: str) -> float:
        return max(0.0, trial.excess[name]) / max(trial.limits.bounds()[name], 1e-12)

    names = tuple(trials[0].excess)
    nearest = {name: min(trials, key=lambda t, n=name: miss(t, n))  # type: ignore[misc]
               for name in names}
    name = max(names, key=lambda n: miss(nearest[n], n))
    trial = nearest[name]
    count = f"{len(trials)} finished trial" + ("s" if len(trials) > 1 else "")
    if miss(trial, name) > 0:
        return (
            f"None of {count} meets every limit. Hardest to meet is the {_LIMITS[name][0]}: "
            f"{_told(trial, name)} Give more trials (--trials); or loosen this limit, widen the "
            f"ranges, or give longer trials (--trial-epochs), {ANEW}."
        )
    trial = min(trials, key=lambda t: max(miss(t, n) for n in names))
    name = max(names, key=lambda n: miss(trial, n))
    return (
        f"None of {count} meets every limit at once, though each alone is met. The nearest misses "
        f"the {_LIMITS[name][0]}: {_told(trial, name)} Give more trials (--trials); or loosen a "
        f"limit, {ANEW}."
    )


def _told(trial: TuneTrial, name: str) -> str:
    _, sense, form = _LIMITS[name]
    bound, came = trial.limits.bounds()[name], float(getattr(trial, name))
    short_by = f"{100 * trial.excess[name]:.1f} points" if name == "accuracy" else form.format(
        trial.excess[name]
    )
    return (
        f"{sense} {form.format(bound)} is asked, the best is {form.format(came)} (trial "
        f"{trial.number}), which misses it by {short_by}."
    )
