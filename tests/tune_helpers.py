"""Trials out of thin air, for the tests of the search."""

from __future__ import annotations

from typing import Any

from patrol_prune.tune_result import Limits, TuneTrial


def made(number: int = 0, accuracy: float = 0.8, ssim: float = 0.5, **more: Any) -> TuneTrial:
    """A trial with these figures; it keeps to its limits unless others are given."""
    values: dict[str, Any] = {
        "split": "layer2", "edge_macs_asked": 100, "beta": 40.0, "alpha": 0.0,
        "attack": "inverse_network_ssim", "edge_macs": 99, "feature_bytes": 64,
        "dense_accuracy": 0.9, "limits": Limits(edge_macs=100),
    }
    return TuneTrial(number=number, accuracy=accuracy, ssim=ssim, **{**values, **more})
