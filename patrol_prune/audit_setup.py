"""What an audit was made with, so that two reports can be told to be comparable or not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from patrol_prune.audit_choice import Factory, Owned
from patrol_prune.pixels import Normalization
from patrol_prune.regions import PrivateRegions
from patrol_prune.versions import version_of

_EACH_RUN = ("seed", "device")


def setup_of(
    made: Sequence[Factory], attackers: Sequence[Owned], victim: Tensor,
    normalization: Normalization, uploads: int, features: Mapping[str, Sequence[int]],
    private: PrivateRegions | None = None,
) -> dict[str, Any]:
    """See `AuditReport.setup`; plain data."""
    found = {
        "attacks": {f.name: {"seeds": list(f.seeds), "settings": _settings(f)} for f in made},
        "attackers": [{"data": own.data, "images": own.count, "labels": own.labels is not None,
                       "sha256": _fingerprint(own.pixels)} for own in attackers],
        "victims": {"images": len(victim), "shape": list(victim.shape[1:]),
                    "sha256": _fingerprint(victim)},
        "features": {subject: list(shape) for subject, shape in features.items()},
        "normalization": {"mean": list(normalization.mean), "std": list(normalization.std)},
        "uploads": uploads,
        **({} if private is None else {"private_share": private.share}),
        "versions": {name: version_of(name) for name in ("torch", "patrol-prune")},
    }
    # tuples as a report from a file has them
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _settings(factory: Factory) -> dict[str, Any] | None:
    """Of one of our attacks, without seed and device; None of the caller's own."""
    if factory.box is None:
        return None
    config = {} if factory.config is None else asdict(factory.config)
    return {name: value for name, value in config.items() if name not in _EACH_RUN}


def _fingerprint(images: Tensor) -> str:
    """The same for the same images, as uint8 or as floats that come from them."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for part in images.split(256):
        digest.update((part * 255.0).round().byte().numpy().tobytes())
    return digest.hexdigest()[:16]
