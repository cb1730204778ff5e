"""Attacks that judge an edge. They know nothing of the defence and check themselves.

An attack is any object with the two methods of `Attack`; `make_attack` builds by name the ones
that ship here.
"""

from __future__ import annotations

from collections.abc import Callable

from patrol_prune.attacks.base import Attack, FitRecord
from patrol_prune.attacks.checks import (
    Flag,
    check_features,
    check_fit,
    check_reconstructions,
    self_test,
)
from patrol_prune.attacks.inverse_network import InverseNetwork, InverseNetworkConfig
from patrol_prune.errors import InputError, nearest

ATTACKS: dict[str, Callable[[InverseNetworkConfig, str], Attack]] = {
    "inverse_network": lambda config, device: InverseNetwork(config, device=device),
}
"""Name of each attack to the function that makes it."""


def make_attack(name: str, config: InverseNetworkConfig, *, device: str = "cpu") -> Attack:
    """The attack of that name, untrained; an unknown name is an InputError with the nearest."""
    if name not in ATTACKS:
        raise InputError(
            f"Expected an attack out of {', '.join(ATTACKS)}, came {name!r}. "
            f"{nearest(name, ATTACKS)}"
        )
    return ATTACKS[name](config, device)


__all__ = [
    "ATTACKS",
    "Attack",
    "FitRecord",
    "Flag",
    "InverseNetwork",
    "InverseNetworkConfig",
    "check_features",
    "check_fit",
    "check_reconstructions",
    "make_attack",
    "self_test",
]
