"""One attack of an audit: made, fitted, asked, and what it hands back checked and scored."""

from __future__ import annotations

import dataclasses
import inspect
import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patrol_prune.attacks import (
    Attack,
    FitRecord,
    Flag,
    Knowledge,
    check_fit,
    check_reconstructions,
)
from patrol_prune.attacks.checks import ATTACK_FAILED, CHANGED_MODEL, OBSERVER_FAILED
from patrol_prune.attacks.registry import box_of
from patrol_prune.audit_choice import Factory
from patrol_prune.audit_scores import check_guess, score
from patrol_prune.errors import TrainingError
from patrol_prune.unharmed import Changes

Observer = Callable[..., None]
"""Called with a subject, an attack's name, the attack and its reconstructions `[N, C, H, W]`.

One with a keyword-only parameter `record` that has no default gets the attack's row of the report.
"""


@dataclass(frozen=True)
class Outcome:
    """What one attack, or a floor, came to: pictures, numbers and doubts, plain data but for them.

    `numbers` and `per_image` are those of `audit_scores.score`.
    """

    guess: Tensor
    numbers: dict[str, float | None]
    per_image: dict[str, Tensor]
    box: str | None = "none"
    attack: Attack | None = None
    fit: FitRecord | None = None
    flags: list[Flag] = field(default_factory=list)
    doubts: list[Flag] = field(default_factory=list)
    """`flags` are of the training, `doubts` of the reconstructions."""

    @classmethod
    def of(cls, victim: Tensor, guess: Tensor, **more: Any) -> Outcome:
        """That of reconstructions `[N, C, H, W]` of the victim's images, both on [0, 1]."""
        return cls(guess, *score(victim, guess), **more)

    def training(self) -> dict[str, Any]:
        """How the training went, as a record says it: all None where the attack does not tell."""
        fit = self.fit
        return {
            "plateau": None if fit is None else fit.plateau,
            "epochs": None if fit is None else len(fit.history),
            "extensions": None if fit is None else fit.extensions,
            "best_epoch": None if fit is None else fit.best_epoch,
            "held_out_loss": None if fit is None else _finite(fit.best_loss),
            "gradient_norm": None if fit is None else _finite(fit.gradient_norm),
            "chosen": None if fit is None else _in_words(fit.chosen),
        }


@torch.enable_grad()  # and what an attack of the caller's own changes of it is not left behind
def carried_out(
    factory: Factory,
    seed: int,
    warm_start: Attack | None,
    known: Knowledge,
    z_victim: Tensor,
    victim: Tensor,
    mean_image: Tensor,
) -> Outcome:
    """Fit one attack and judge what it rebuilds of the victim's images.

    Everything that a caller's own attack hands back is looked at in here, so that whoever catches
    what is raised has all that it can break.
    """
    own = factory.box is None
    attack = factory.make(seed, warm_start)
    box = box_of(attack)
    if own:  # it may change what it gets
        known, z_victim = known.copied(), z_victim.clone()
        if box == "none":  # it has no more than it says
            known = dataclasses.replace(known, z=None, edge=None)
    fit = attack.fit(known)
    if own and fit is not None:
        fit = _plain(fit)
    guess = attack.reconstruct(z_victim)
    if not isinstance(guess, Tensor):
        raise TypeError("expected a tensor [N, C, H, W] from reconstruct(z), came "
                        f"{type(guess).__name__}")
    guess = guess.detach().float().cpu()
    guess = guess.clone() if own else guess
    check_guess(guess, victim, factory.name)
    made = Outcome.of(
        victim, guess, box=box_of(attack) if own else box, attack=attack, fit=fit,
        flags=[] if fit is None else check_fit(fit),
        doubts=check_reconstructions(victim, guess, mean_image),
    )
    made.training()  # raises here what a record of the caller's own cannot say
    return made


def broken_off(error: Exception, factory: Factory) -> Flag:
    """The flag of an attack that raised; what one of ours should not raise is raised again."""
    if isinstance(error, TrainingError):
        return ATTACK_FAILED
    if factory.box is not None:  # what is wrong is the caller's to know
        raise error
    return dataclasses.replace(
        ATTACK_FAILED,
        meaning=f"The attack raised {told(error)}. It has no score.",
        advice='Mend the attack. (One that says box = "none" gets neither known.z nor known.edge.)',
    )


def untested(cannot: Flag, error: Exception, size: str) -> Flag:
    """The flag of a self-test in which a caller's own attack raised: it tells that, and no more."""
    return dataclasses.replace(
        cannot,
        meaning=f"The attack broke off on the self-test's own pictures of {size} pixels: "
                f"{told(error)}. Whether it can reconstruct them is not known.",
        advice="Where it is built for pictures of another size, let it take theirs from "
               "known.pixels, or pass this flag over; else mend the attack.",
    )


def changes(to: Changes) -> list[Flag]:
    """The flag of an attack while which the split changed."""
    if not to.found:
        return []
    after = "That was put back before the next."
    if to.lost:
        after = (f"What could not be put back before the next: {'; '.join(to.lost)}. Attacks after "
                 "this one are of another split.")
    return [dataclasses.replace(CHANGED_MODEL, meaning=(
        f"While the attack ran, the split that it attacked changed: {'; '.join(to.found)}. "
        f"{after}"))]


@torch.enable_grad()
def shown(
    observer: Observer | None, subject: str, factory: Factory, made: Outcome,
    record: Mapping[str, Any],
) -> list[Flag]:
    """Call the observer; one that fails on a caller's own attack is flagged."""
    if observer is None or made.attack is None:
        return []
    try:
        more = {"record": dict(record)} if _takes_record(observer) else {}
        observer(subject, factory.name, made.attack, made.guess, **more)
    except Exception as error:
        if factory.box is not None:
            raise
        return [dataclasses.replace(OBSERVER_FAILED, meaning=(
            f"The observer raised {told(error)} when it was shown this attack."))]
    return []


def _takes_record(observer: Observer) -> bool:
    try:
        asked = inspect.signature(observer).parameters.get("record")
    except (TypeError, ValueError):  # some written in C do not say
        return False
    return asked is not None and asked.kind is asked.KEYWORD_ONLY and asked.default is asked.empty


def told(error: BaseException | None) -> str:
    """An error with the place where it was raised, without a full stop."""
    if error is None:
        return "no reason"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).rstrip('.')}{place}"


def _plain(fit: object) -> FitRecord:
    """A caller's own record with Python's numbers, which JSON has words for; else a TypeError."""
    if not isinstance(fit, FitRecord):
        raise TypeError(f"expected a FitRecord or None from fit(known), came {type(fit).__name__}")
    return FitRecord(
        tuple(map(float, fit.history)), tuple(map(float, fit.train_history)),
        float(fit.initial_loss), float(fit.mean_image_loss), int(fit.best_epoch),
        bool(fit.plateau), int(fit.extensions), float(fit.seconds),
        None if fit.gradient_norm is None else float(fit.gradient_norm),
        None if fit.chosen is None else dict(fit.chosen),
        None if fit.start_loss is None else float(fit.start_loss),
    )


def _finite(value: float | None) -> float | None:
    """None for what JSON has no word for; a flag tells of it."""
    return value if value is not None and math.isfinite(value) else None


def _in_words(chosen: dict[str, Any] | None) -> str | None:
    """The scalars among the settings that an attack chose, `"loss mse, lambda_tv 0.1"`."""
    if chosen is None:
        return None
    return ", ".join(f"{k} {v}" for k, v in chosen.items() if isinstance(v, str | int | float))
