"""Uploads of few bits: how a finished split rounds what it sends, kept beside its weights."""

from __future__ import annotations

import torch
from pictures import Everybody
from settings import ReidRun

import patrol_prune as pp
from patrol_prune.defences import Quantisation

_CALIBRATING = 500
Steps = dict[str, list[float]]


def rounding(split: pp.Split, bits: int, people: Everybody) -> pp.Split:
    """The split whose uploads are rounded to `bits`, over the range that the defender's first
    pictures take in each channel; it shares the layers."""
    some = people.defender.pixels(range(min(_CALIBRATING, len(people.defender))))
    return Quantisation(bits).apply(split, calibration=people.normalization.to_input(some))


def rounding_as(split: pp.Split, bits: int, steps: Steps) -> pp.Split:
    """The split whose uploads are rounded as `steps_of` told of another one."""
    sending = Quantisation(bits).apply(split)
    for name, buffer in sending.edge.upload.named_buffers():
        buffer.copy_(torch.tensor(steps[name]))
    return sending


def steps_of(sending: pp.Split) -> Steps:
    """By which steps each channel is rounded."""
    return {name: value.tolist() for name, value in sending.edge.upload.named_buffers()}


def notes(config: ReidRun) -> list[str]:
    """What whoever deploys an edge that was trained so has to know."""
    bits = config.bits
    if bits is None:
        return []
    return [f"The pruned models send {bits} bits for every value, the dense one float32. The saved "
            f'splits do not hold that: apply pp.make_defence("quantisation", {bits}) to what '
            'pp.load gives, and copy "steps" of the method in result.json into the buffers of its '
            "edge.upload." + " PATROL's dropout stands behind that." * (config.privacy.dropout > 0)]


def packed_bytes(sending: pp.Split, bits: int) -> int:
    """Bytes of one upload, its values packed."""
    return Quantisation(bits).upload_bytes(sending.feature_shape)
