"""The settings of one training stage, and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from patrol_prune.errors import InputError
from patrol_prune.given import check_count, check_number
from patrol_prune.precision import PRECISIONS

_COUNTS = ("epochs", "inner_steps", "surrogate_warmup_steps", "renew_every", "seed")


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of one training stage.

    Attributes:
        epochs: passes over the data.
        lr: peak learning rate of SGD with Nesterov momentum; rises linearly, then falls as a
            cosine.
        momentum: of SGD.
        weight_decay: of SGD.
        warmup: share of all steps over which the learning rate rises.
        beta_warmup: share of all steps over which the adversarial weight rises from 0.
        clip_norm: largest gradient norm.
        distill_weight: share of the task loss that is distillation from the teacher, in [0, 1].
        distill_temperature: of the distillation.
        feature_weight: weight of the distance to the teacher's features before its last linear
            layer, relative to their size; both need as many.
        inner_steps: surrogate steps for each step of the model.
        surrogate_warmup_steps: steps of the surrogates alone before the first epoch.
        renew_every: after so many steps of the model the weakest surrogate starts anew; 0 never.
        precision: "auto", "fp32" or "bf16" arithmetic; where it is "auto", the objective's, and
            where that is "auto" too, bf16 where the device computes it natively.
        seed: recorded with the run; the batches carry their own, and dropout draws from torch's
            generator (`torch.manual_seed`).

    Raises:
        InputError: a value out of its range.
    """

    epochs: int = 10
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    beta_warmup: float = 0.1
    clip_norm: float = 5.0
    distill_weight: float = 0.7
    distill_temperature: float = 4.0
    feature_weight: float = 0.0
    inner_steps: int = 2
    surrogate_warmup_steps: int = 100
    renew_every: int = 0
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for each in fields(FinetuneConfig):
            name, value = f"{type(self).__name__}.{each.name}", getattr(self, each.name)
            if each.name in _COUNTS:
                check_count(value, name, 0)
            elif each.name != "precision":
                check_number(value, name)
        positive = {"lr": self.lr, "clip_norm": self.clip_norm,
                    "distill_temperature": self.distill_temperature}
        bad = [name for name, value in positive.items() if not value > 0]
        shares = {"warmup": self.warmup, "beta_warmup": self.beta_warmup,
                  "distill_weight": self.distill_weight, "momentum": self.momentum}
        bad += [name for name, value in shares.items() if not 0 <= value <= 1]
        counts = {"epochs": self.epochs, "inner_steps": self.inner_steps,
                  "surrogate_warmup_steps": self.surrogate_warmup_steps,
                  "renew_every": self.renew_every, "feature_weight": self.feature_weight,
                  "weight_decay": self.weight_decay}
        bad += [name for name, value in counts.items() if not value >= 0]
        bad += [] if self.precision in PRECISIONS else ["precision"]
        if bad:
            raise InputError(
                f"{type(self).__name__}: out of range: {', '.join(bad)}. Rates are positive, "
                f"shares lie in [0, 1], counts are at least 0, precision is one of {PRECISIONS}."
            )


def learning_rate(step: int, total_steps: int, config: FinetuneConfig) -> float:
    """Linear rise over `warmup`, then a cosine to zero; a function of the step alone."""
    rise = config.warmup * total_steps
    if step < rise:
        return config.lr * (step + 1) / (rise + 1)
    progress = (step - rise) / max(1.0, total_steps - rise)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
