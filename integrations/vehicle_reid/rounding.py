"""Uploads of few bits."""

from __future__ import annotations

from pictures import Everybody
from settings import ReidRun

import patrol_prune as pp
from patrol_prune.defences import Quantisation

_CALIBRATING = 500


def rounding(split: pp.Split, bits: int, people: Everybody) -> pp.Split:
    """The split whose uploads are rounded to `bits`, over the range that the defender's first
    pictures take in each channel; it shares the layers."""
    some = people.defender.pixels(range(min(_CALIBRATING, len(people.defender))))
    return Quantisation(bits).apply(split, calibration=people.normalization.to_input(some))


def notes(config: ReidRun) -> list[str]:
    """What whoever deploys an edge that was trained so has to know."""
    bits = config.bits
    if bits is None:
        return []
    return [f"The pruned models send {bits} bits for every value, the dense one float32. The saved "
            "splits round so." + " PATROL's dropout stands behind that." * (
                config.privacy.dropout > 0)]


def packed_bytes(sending: pp.Split, bits: int) -> int:
    """Bytes of one upload, its values packed."""
    return Quantisation(bits).upload_bytes(sending.feature_shape)
