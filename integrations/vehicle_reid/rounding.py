"""Uploads of few bits."""

from __future__ import annotations

from settings import ReidRun


def notes(config: ReidRun) -> list[str]:
    """What whoever deploys an edge that was trained so has to know."""
    bits = config.bits
    if bits is None:
        return []
    return [f"The pruned models send {bits} bits for every value, the dense one float32. The saved "
            "splits round so." + " PATROL's dropout stands behind that." * (
                config.privacy.dropout > 0)]
