"""What people compare with: published defences of an upload, under one interface.

    defence = make_defence("gaussian_noise", 0.5)
    split = defence.apply(split, calibration=x)
    finetune(split, batches, objective=defence.objective(split, normalization=n, seed=0))
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from patrol_prune.defences.base import Adversary, Defence
from patrol_prune.defences.bottleneck import Bottleneck
from patrol_prune.defences.cem_patrol import CemPatrol
from patrol_prune.defences.combined import Combined
from patrol_prune.defences.disco import Disco
from patrol_prune.defences.dropout import FeatureDropout
from patrol_prune.defences.noise import GaussianNoise, LaplacianNoise
from patrol_prune.defences.nopeek import NoPeek, distance_correlation
from patrol_prune.defences.quantisation import Quantisation
from patrol_prune.defences.randomness import RandomUpload
from patrol_prune.defences.trained import AdversarialOnly, Patrol, Trained
from patrol_prune.errors import InputError, nearest
from patrol_prune.given import is_number

DEFENCES: dict[str, type[Defence]] = {
    defence.name: defence
    for defence in (Trained, Patrol, AdversarialOnly, CemPatrol, GaussianNoise, LaplacianNoise,
                    FeatureDropout, Quantisation, NoPeek, Bottleneck, Disco)
}
"""Name of each defence to its class."""


def make_defence(name: str, strength: float | None = None, **settings: Any) -> Defence:
    """The defence of that name at that strength.

    Args:
        name: "none" (no strength), "patrol", "adversarial_only", "cem_patrol" (strength `beta`),
            "gaussian_noise", "laplacian_noise" (`sigma`, in RMS of the feature), "feature_dropout"
            (`p`), "quantisation" (`bits`), "nopeek" (`weight`), "bottleneck" (`channels`) or
            "disco" (`ratio`); docs/audit.md says what they do.
        strength: value of the field that the defence is swept over (`swept`); its default
            where None. A whole number for those that take one.
        **settings: the defence's other fields, those of its class in `patrol_prune.defences`.

    Raises:
        InputError: an unknown name, a setting that it does not have, a value out of range.
    """
    if not isinstance(name, str) or name not in DEFENCES:
        raise InputError(
            f"Expected a defence out of {', '.join(DEFENCES)}, came {name!r}. "
            f"{nearest(str(name), DEFENCES)}"
        )
    kind = DEFENCES[name]
    types = {field.name: field.type for field in fields(kind)}
    if strength is not None:
        if not kind.swept:
            raise InputError(f"The defence {name!r} has no strength; leave it out.")
        if not is_number(strength):
            raise InputError(f"Expected the strength as a number ({kind.swept} of {name!r}), came "
                             f"{strength!r}.")
        if kind.swept in settings:
            raise InputError(f"Came {kind.swept} of {name!r} twice: {strength} as its strength and "
                             f"{settings[kind.swept]!r} by name. Give one of them.")
        whole = types[kind.swept] in ("int", int) and float(strength).is_integer()
        settings = {**settings, kind.swept: int(strength) if whole else strength}
    unknown = sorted(settings.keys() - types.keys())
    if unknown:
        raise InputError(
            f"The defence {name!r} has no setting {unknown[0]!r}, but {', '.join(types) or 'none'}."
        )
    return kind(**settings)


__all__ = [
    "DEFENCES",
    "AdversarialOnly",
    "Adversary",
    "Bottleneck",
    "CemPatrol",
    "Combined",
    "Defence",
    "Disco",
    "FeatureDropout",
    "GaussianNoise",
    "LaplacianNoise",
    "NoPeek",
    "Patrol",
    "Quantisation",
    "RandomUpload",
    "Trained",
    "distance_correlation",
    "make_defence",
]
