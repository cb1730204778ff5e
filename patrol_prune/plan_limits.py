"""What a device and its link allow besides multiply-adds, and what a place to cut takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from patrol_prune.errors import InputError
from patrol_prune.given import is_number


@dataclass(frozen=True)
class PlanLimits:
    """The most that the edge may take; None is no limit.

    Attributes:
        edge_params: parameters on the device.
        feature_bytes: bytes uploaded per image, as float32.
        latency_ms: milliseconds of the edge on this device, for a batch of the size measured.

    Raises:
        InputError: a limit that is not a positive number.
    """

    edge_params: int | None = None
    feature_bytes: int | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None:
                continue
            if not is_number(value) or not 0 < value < math.inf:
                raise InputError(
                    f"Expected a positive limit of {each.name}, or None, came {value!r}."
                )

    @property
    def is_none(self) -> bool:
        """Whether nothing is limited."""
        return self == PlanLimits()


@dataclass(frozen=True)
class EdgeCost:
    """What an edge takes: multiply-adds at batch 1, parameters, bytes uploaded as float32."""

    edge_macs: int
    edge_params: int
    feature_bytes: int

    def within(self, edge_macs: int, limits: PlanLimits) -> bool:
        """Whether it keeps to a budget and to these limits, latency aside."""
        pairs = (
            (self.edge_macs, edge_macs),
            (self.edge_params, limits.edge_params),
            (self.feature_bytes, limits.feature_bytes),
        )
        return all(most is None or value <= most for value, most in pairs)
