"""What reaches the attacker: a picture's upload as real numbers on one scale.

An attacker undoes what costs him nothing to undo. A constant that is added to some values of an
upload, or a factor by which some are multiplied, hides nothing from him, yet attacks that read a
map channel by channel overlook what is left beside them; so they get the upload without both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from patrol_prune.access import edge_function
from patrol_prune.attacks import (
    EdgeFunction,
    Flag,
    Knowledge,
    LinearInverse,
    LinearInverseConfig,
)
from patrol_prune.attacks.white_box import drops_values
from patrol_prune.decoders import channel_dim
from patrol_prune.given import real
from patrol_prune.pixels import Normalization

_SAMPLE, _LEAST, _NUMBERS = 512, 32, 1 << 24
_FAR, _ROUNDED, _FAINT = 30.0, 1e4, 0.1
_FEW_ODD = 0.015
HELPS = 0.9
PROXY = 1_000
_OUTLYING, _USUAL, _MOST_OUTLYING = 10.0, 0.8, 0.15
FEWEST = 20

UNEVEN_FEATURE = Flag(
    "uneven_feature",
    "Some values of the feature stand far from the others of their channel, or vary many times "
    "more or less. The attacks got the feature evened out, as any attacker would do.",
    "Nothing, if that is meant. It hides nothing.",
)
OUTLYING_FEATURES = Flag(
    "outlying_features",
    "Some of the attacker's images have features over ten times as far from the middle as usual. "
    "The attacks learnt without them.",
    "If the edge sends some pictures on another scale, audit those by themselves.",
)


@dataclass(frozen=True)
class Level:
    """`(z - shift) * gain`, each as large as a feature, in float64."""

    shift: Tensor
    gain: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        shift, gain = self._for(z)
        return ((z.to(shift.dtype) - shift) * gain).float()

    def undone(self, z: Tensor) -> Tensor:
        """What was sent."""
        shift, gain = self._for(z)
        return (z.to(shift.dtype) / gain + shift).float()

    @property
    def scales(self) -> bool:
        """Whether values are scaled unlike each other."""
        return bool((self.gain != self.gain.flatten()[0]).any())

    def _for(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Both where `z` is, in the widest arithmetic there."""
        kind = torch.float32 if z.device.type == "mps" else torch.float64
        return self.shift.to(z.device, kind), self.gain.to(z.device, kind)


class Step(Protocol):
    """Something that the attacker does to an upload `[N, ...]`."""

    def __call__(self, z: Tensor) -> Tensor: ...

    def undone(self, z: Tensor) -> Tensor:
        """What was sent."""


class Prepared(nn.Module):
    """The edge behind which the attacker does something to what he gets."""

    def __init__(self, edge: nn.Module, step: Step) -> None:
        super().__init__()
        self.edge, self.step = edge, step

    def forward(self, x: Tensor) -> Tensor:
        """Model inputs `[N, ...]` to features `[N, ...]`."""
        return self.step(real(self.edge(x)))


class Restored(nn.Module):
    """The cloud in front of which the upload is put back as it was sent."""

    def __init__(self, cloud: nn.Module, step: Step) -> None:
        super().__init__()
        self.cloud, self.step = cloud, step

    def forward(self, z: Tensor) -> Tensor:
        """Features as the attacker has them to logits."""
        logits: Tensor = self.cloud(self.step.undone(z))
        return logits


def evened(
    edge: nn.Module, pixels: Tensor, normalization: Normalization, *, draws: bool = False
) -> Level | None:
    """How its feature is evened out where some values stand far from others; None where none do.

    Args:
        edge: as it is attacked.
        pixels: the attacker's images.
        normalization: of the edge's inputs.
        draws: whether the edge draws. One that drops values sends zeros where it does: these stay
            zeros, so that white boxes see them.
    """
    query = edge_function(edge, normalization, wide=True)
    full, shifted = level_of(query, pixels)
    if draws and full is not None and drops_values(
            Knowledge(pixels, edge=edge_function(edge, normalization)), pixels.device):
        full = Level(torch.zeros_like(full.shift), full.gain) if full.scales else None
        shifted = None
    return shifted if full is None else worth_it(full, shifted, query, pixels)


@torch.no_grad()
def level_of(edge: EdgeFunction, pixels: Tensor) -> tuple[Level | None, Level | None]:
    """How a sample of features is evened out, and by shifts alone; None where nothing is to be.

    A value whose mean lies 30 times as far from the middle of its channel as the channel varies is
    shifted to it; so is one that is 10,000 times as far from 0, which float32 would round. A value
    that varies 30 times as much as half of its channel, or never gets as far as a tenth of that, is
    scaled to it. Only where that are many may they be scaled: in every feature a few hardly vary.

    Args:
        edge: as it is attacked, in float64.
        pixels: the attacker's images.
    """
    z = sample(edge, pixels)[0]
    near = not_outlying(z)
    z = z if near is None else z[near]
    if len(z) < 3:  # two say nothing of how much a value varies
        return None, None
    shape = tuple(z.shape[1:])
    channel = channel_dim(shape, tuple(pixels.shape[1:])) if len(shape) > 1 else 1
    grouped = z.movedim(channel, 1).flatten(2) if len(shape) > 1 else z[:, :, None]
    mean, std = grouped.mean(0), grouped.std(0)
    peak = (grouped - mean).abs().amax(0)
    varies = std > 0
    overall = std.square().mean(1, keepdim=True).sqrt()
    usual = torch.where(varies, std, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num()
    far = (mean - mean.median(1, keepdim=True).values).abs() > _FAR * overall
    shifted = varies & (far | (mean.abs() > _ROUNDED * std))
    scaled = varies & ((peak < _FAINT * usual) | (std > _FAR * usual))
    if float(scaled.double().mean()) < _FEW_ODD:
        scaled = torch.zeros_like(scaled)
    if not bool((shifted | scaled).any()):
        return None, None
    faint = usual.masked_select(usual > 0)
    rounded = len(faint) and float(mean.abs().max()) > _ROUNDED * float(faint.median())
    unit = 1.0 / float(faint.median()) if rounded else 1.0
    gain = torch.where(scaled, usual / std.clamp_min(1e-300), 1.0) * unit

    def back(values: Tensor) -> Tensor:
        if len(shape) == 1:
            return values[:, 0]
        order = z.movedim(channel, 1).shape[2:]
        return values.unflatten(1, order).movedim(0, channel - 1)

    full = Level(back(torch.where(shifted | scaled | ~varies, mean, 0.0)), back(gain))
    if not bool(shifted.any()):
        return full, None
    alone = torch.where(shifted | ~varies, mean, 0.0)
    return full, Level(back(alone), back(torch.full_like(gain, unit)))


@torch.no_grad()
def sample(edge: EdgeFunction, pixels: Tensor, most: int = _SAMPLE) -> tuple[Tensor, Tensor]:
    """Features of some images, as many as fit, and these images.

    Args:
        edge: as it is attacked.
        pixels: the attacker's images.
        most: how many at most; fewer where features are large.
    """
    count = max(_LEAST, min(most, _NUMBERS // max(1, edge(pixels[:32])[0].numel())))
    some = pixels[torch.linspace(0, len(pixels) - 1, min(count, len(pixels))).long().unique()]
    return torch.cat([edge(part) for part in some.split(32)]), some


@torch.no_grad()
def worth_it(
    full: Level, shifted: Level | None, edge: EdgeFunction, pixels: Tensor
) -> Level | None:
    """The full level only where a linear decoder rebuilds held-out images better with it.

    Args:
        full, shifted: what `level_of` found.
        edge: as there.
        pixels: the attacker's images.
    """
    if not full.scales:
        return full
    sent, some = sample(edge, pixels, PROXY)
    plain = sent.float() if shifted is None else shifted(sent)
    return full if helps(plain, full(sent), some) else shifted


def helps(plain: Tensor, changed: Tensor, pixels: Tensor) -> bool:
    """Whether a linear decoder rebuilds held-out images better by a tenth from the changed uploads.

    Args:
        plain, changed: what is sent for these images, `[N, ...]` each.
        pixels: the images.
    """
    if len(pixels) < FEWEST:
        return False
    near = not_outlying(plain)  # both are judged by the same images
    if near is not None:
        plain, changed, pixels = plain[near], changed[near], pixels[near]
    return linear_loss(changed, pixels) < HELPS * linear_loss(plain, pixels)


def linear_loss(z: Tensor, pixels: Tensor, kernel: int = 3) -> float:
    """A linear decoder's mean squared error on held-out images, of uploads read as a map is."""
    config = LinearInverseConfig(kernel=kernel, whole=False)
    return LinearInverse(config).fit(Knowledge(pixels, z)).best_loss


def not_outlying(z: Tensor) -> Tensor | None:
    """Indices of the images whose features are not far out; None where none are, or many.

    Far out is over ten times as far from the middle as four in five are.

    Args:
        z: features `[N, ...]` of the attacker's images.
    """
    some = z[torch.linspace(0, len(z) - 1, min(len(z), 101)).long()]
    middle = some.median(0).values
    away = torch.cat([(part - middle).flatten(1).double().square().mean(1).sqrt()
                      for part in z.split(256)])
    usual = away.quantile(_USUAL)
    if not usual > 0:
        return None
    near = away <= _OUTLYING * usual
    gone = float((~near).double().mean())
    found = near.nonzero().flatten()
    return found if 0 < gone <= _MOST_OUTLYING and len(found) >= FEWEST else None
