"""The attacks by name: what each knows, which settings it takes, and how it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from patrol_prune.attacks.base import Attack
from patrol_prune.attacks.image_prior import ImagePrior, ImagePriorConfig
from patrol_prune.attacks.inverse_network import InverseNetwork
from patrol_prune.attacks.inverse_network_config import SUITE, InverseNetworkConfig
from patrol_prune.attacks.linear_inverse import LinearInverse, LinearInverseConfig
from patrol_prune.attacks.nearest_image import NearestImage, NearestImageConfig
from patrol_prune.attacks.query_free import QueryFree
from patrol_prune.attacks.query_free_config import QueryFreeConfig
from patrol_prune.attacks.rmle import RMLE, RMLEConfig
from patrol_prune.errors import InputError, nearest

Box = Literal["black", "white", "none"]
"""What an attacker may do with the edge: query it, differentiate through it, or neither."""


@dataclass(frozen=True)
class AttackKind:
    """One attack that can be asked for by name.

    Attributes:
        box: what the attacker may do with the edge.
        config: the settings it has without any given; a frozen dataclass.
        make: `(config, device, warm_start) -> attack`, untrained.
        seeded: whether another seed gives another attacker.
        warm_starts: whether it can begin at a black-box attack's answer.
        needs: fields of `Knowledge` that it cannot do without, beyond images and features.
    """

    box: Box
    config: Any
    make: Callable[[Any, str, Attack | None], Attack]
    seeded: bool = True
    warm_starts: bool = False
    needs: tuple[str, ...] = ()


def _learned(name: str) -> AttackKind:
    """A decoder: the name gives its family, loss and input, except where it is the plain one's."""
    named = SUITE[name]

    def make(config: InverseNetworkConfig, device: str, _: Attack | None) -> Attack:
        if name != "inverse_network":
            config = dataclasses.replace(config, family=named.family, loss=named.loss,
                                         whiten=config.whiten or named.whiten,
                                         dropout=config.dropout or named.dropout)
        return InverseNetwork(config, device=device)

    return AttackKind("black", named, make)


def _query_free(mode: str, *needs: str) -> AttackKind:
    def make(config: QueryFreeConfig, device: str, _: Attack | None) -> Attack:
        return QueryFree(dataclasses.replace(config, mode=mode), device=device)

    return AttackKind("none", QueryFreeConfig(mode=mode), make, needs=needs)


ATTACKS: dict[str, AttackKind] = {
    **{name: _learned(name) for name in SUITE},
    "linear_inverse": AttackKind(
        "black", LinearInverseConfig(), lambda c, device, _: LinearInverse(c, device=device)
    ),
    "nearest_image": AttackKind(
        "black", NearestImageConfig(), lambda c, device, _: NearestImage(c, device=device),
        seeded=False,
    ),
    "rmle": AttackKind(
        "white", RMLEConfig(), lambda c, device, warm: RMLE(c, device=device, warm_start=warm),
        warm_starts=True,
    ),
    "image_prior": AttackKind(
        "white", ImagePriorConfig(), lambda c, device, _: ImagePrior(c, device=device)
    ),
    "query_free_same": _query_free("shadow_same", "cloud", "labels", "weights"),
    "query_free_other": _query_free("shadow_other", "cloud", "labels"),
    "query_free_match": _query_free("match"),
}
"""Name of each attack to what it is."""

DEFAULT_ATTACKS: tuple[str, ...] = ("linear_inverse", "inverse_network_ssim", "rmle")
"""What an audit runs unless asked otherwise: two that learn, one through the edge's weights.

The decoder is trained with MSE and SSIM: against features that were trained against decoders, MSE
alone settles on pictures next to the mean image, and a defence looks better than it is.
"""

_BOXES: dict[type, Box] = {
    InverseNetwork: "black", LinearInverse: "black", NearestImage: "black", RMLE: "white",
    ImagePrior: "white", QueryFree: "none",
}


def box_of(attack: Attack) -> str | None:
    """What an attack does to the edge: by its class, by its own attribute `box`, or unknown.

    An attribute that names none of them is an InputError.
    """
    own = getattr(attack, "box", None)
    if own is not None and not (isinstance(own, str) and own in get_args(Box)):
        raise InputError(
            f"Expected the attribute box of the attack {type(attack).__name__} as one of "
            f"{', '.join(get_args(Box))}, or none at all, came {own!r}."
        )
    return _BOXES.get(type(attack), own)


def kind_of(name: str) -> AttackKind:
    """The attack of that name; an unknown one is an InputError with the nearest."""
    if name not in ATTACKS:
        raise InputError(
            f"Expected an attack out of {', '.join(ATTACKS)}, came {name!r}. "
            f"{nearest(name, ATTACKS)}"
        )
    return ATTACKS[name]


def make_attack(
    name: str,
    config: Any = None,
    *,
    device: str = "cpu",
    seed: int | None = None,
    warm_start: Attack | None = None,
) -> Attack:
    """The attack of that name, untrained.

    Args:
        name: one of `ATTACKS`.
        config: its settings, of the type of `ATTACKS[name].config`; that one without.
        device: where it works.
        seed: replaces the one in `config`.
        warm_start: a trained attack whose answer this one may begin at, if it can.

    Raises:
        InputError: an unknown name, or settings of another attack.
    """
    kind = kind_of(name)
    chosen = kind.config if config is None else config
    if not isinstance(chosen, type(kind.config)):
        raise InputError(
            f"Expected the settings of {name} as {type(kind.config).__name__}, came "
            f"{type(chosen).__name__}. Give each attack its own: settings={{{name!r}: ...}}."
        )
    if seed is not None:
        chosen = dataclasses.replace(chosen, seed=seed)
    return kind.make(chosen, device, warm_start)


def settings_for(
    name: str, config: InverseNetworkConfig | None, settings: Mapping[str, Any]
) -> Any:
    """The settings of the attack `name`: its own if given, else `config` where it is a decoder.

    A name that says family and loss overrules both in either. None where nothing is said.
    """
    own = kind_of(name).config
    return settings.get(name, config if isinstance(own, InverseNetworkConfig) else None)
