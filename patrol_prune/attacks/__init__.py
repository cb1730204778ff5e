"""Attacks that judge an edge. They know nothing of the defence and check themselves.

An attack is any object with the two methods of `Attack`; `make_attack` builds by name the ones
that ship here, and `ATTACKS` says what each of them needs.
"""

from __future__ import annotations

from patrol_prune.attacks.base import Attack, EdgeFunction, FitRecord, Knowledge, draws_differ
from patrol_prune.attacks.checks import (
    Flag,
    check_boxes,
    check_draws,
    check_features,
    check_fit,
    check_more_data,
    check_owned,
    check_reconstructions,
    check_slopes,
    self_test,
)
from patrol_prune.attacks.image_prior import ImagePrior, ImagePriorConfig
from patrol_prune.attacks.inverse_network import InverseNetwork
from patrol_prune.attacks.inverse_network_config import InverseNetworkConfig
from patrol_prune.attacks.linear_inverse import LinearInverse, LinearInverseConfig
from patrol_prune.attacks.nearest_image import NearestImage, NearestImageConfig
from patrol_prune.attacks.query_free import QueryFree
from patrol_prune.attacks.query_free_config import QueryFreeConfig
from patrol_prune.attacks.registry import (
    ATTACKS,
    DEFAULT_ATTACKS,
    AttackKind,
    kind_of,
    make_attack,
)
from patrol_prune.attacks.rmle import RMLE, RMLEConfig

__all__ = [
    "ATTACKS",
    "DEFAULT_ATTACKS",
    "RMLE",
    "Attack",
    "AttackKind",
    "EdgeFunction",
    "FitRecord",
    "Flag",
    "ImagePrior",
    "ImagePriorConfig",
    "InverseNetwork",
    "InverseNetworkConfig",
    "Knowledge",
    "LinearInverse",
    "LinearInverseConfig",
    "NearestImage",
    "NearestImageConfig",
    "QueryFree",
    "QueryFreeConfig",
    "RMLEConfig",
    "check_boxes",
    "check_draws",
    "check_features",
    "check_fit",
    "check_more_data",
    "check_owned",
    "check_reconstructions",
    "check_slopes",
    "draws_differ",
    "kind_of",
    "make_attack",
    "self_test",
]
