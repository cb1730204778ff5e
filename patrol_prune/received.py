"""What reaches the attacker: one picture's upload at a time, as real numbers on one scale.

An attacker undoes what costs him nothing to undo. A constant that is added to some values of an
upload, or a factor by which some are multiplied, hides nothing from him, yet attacks that read a
map channel by channel overlook what is left beside them; so they get the upload without both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patrol_prune.access import edge_function, real
from patrol_prune.attacks import (
    EdgeFunction,
    Flag,
    Knowledge,
    LinearInverse,
    LinearInverseConfig,
    draws_differ,
)
from patrol_prune.decoders import channel_dim
from patrol_prune.pixels import Normalization

_ALIKE = 1e-2
_ALONE = 4
_SAMPLE, _NUMBERS = 512, 1 << 25
_FAR, _ROUNDED, _FAINT = 30.0, 1e4, 0.1
_FEW_ODD = 0.015
_HELPS = 0.9
_PROXY = 1_000
_OUTLYING, _MOST_OUTLYING = 10.0, 0.2
_FEWEST = 20

MIXES_IMAGES = Flag(
    "mixes_images",
    "What the edge sends for a picture depends on the others in its batch, and a device sends one "
    "at a time. Every picture was sent alone here, which is slow.",
    "Look for a generator that is seeded in every call, or for statistics of the batch. What is "
    "the same in every call hides nothing.",
)
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


class Alone(nn.Module):
    """The edge with one picture in each call."""

    def __init__(self, edge: nn.Module) -> None:
        super().__init__()
        self.edge = edge

    def forward(self, x: Tensor) -> Tensor:
        """Model inputs `[N, ...]` to features `[N, ...]`."""
        return torch.cat([self.edge(part).clone() for part in x.split(1)])


@dataclass(frozen=True)
class Level:
    """`(z - shift) * gain`, each as large as a feature, in float64."""

    shift: Tensor
    gain: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        shift, gain = self.shift.to(z.device), self.gain.to(z.device)
        return ((z.double() - shift) * gain).float()

    def undone(self, z: Tensor) -> Tensor:
        """What was sent."""
        shift, gain = self.shift.to(z.device), self.gain.to(z.device)
        return (z.double() / gain + shift).float()


class Levelled(nn.Module):
    """The edge behind which the attacker evens out what he gets."""

    def __init__(self, edge: nn.Module, level: Level) -> None:
        super().__init__()
        self.edge, self.level = edge, level

    def forward(self, x: Tensor) -> Tensor:
        """Model inputs `[N, ...]` to features `[N, ...]`, float32."""
        return self.level(real(self.edge(x)))


class Restored(nn.Module):
    """The cloud in front of which the upload is put back as it was sent."""

    def __init__(self, cloud: nn.Module, level: Level) -> None:
        super().__init__()
        self.cloud, self.level = cloud, level

    def forward(self, z: Tensor) -> Tensor:
        """Levelled features to logits."""
        logits: Tensor = self.cloud(self.level.undone(z))
        return logits


def one_at_a_time(
    edge: nn.Module, pixels: Tensor, normalization: Normalization
) -> tuple[nn.Module, bool, list[Flag]]:
    """The edge as a device runs it, whether it draws at random, and a flag where that differs.

    Args:
        edge: as it came.
        pixels: some images of both sides.
        normalization: of the edge's inputs.
    """
    query = edge_function(edge, normalization)
    if draws_differ(query, pixels):
        return edge, True, []
    if not mixes_images(query, pixels):
        return edge, False, []
    edge = Alone(edge)
    return edge, draws_differ(edge_function(edge, normalization), pixels), [MIXES_IMAGES]


@torch.no_grad()
def mixes_images(edge: EdgeFunction, pixels: Tensor) -> bool:
    """Whether what a fixed edge sends for a picture depends on the others beside it."""
    together = edge(pixels)
    spread = float(together.double().std(0).square().mean().sqrt())
    places = torch.linspace(0, len(pixels) - 1, min(_ALONE, len(pixels))).long().tolist()
    apart = [edge(pixels[i : i + 1])[0] - together[i] for i in places]
    turned = edge(pixels.flip(0)).flip(0) - together
    far = max(float(d.double().square().mean().sqrt()) for d in (*apart, *turned[places]))
    return far > _ALIKE * spread


def evened(
    edge: nn.Module, cloud: nn.Module | None, pixels: Tensor, normalization: Normalization
) -> tuple[nn.Module, nn.Module | None, list[Flag]]:
    """Both with the feature evened out between them where some values stand far from others; and a
    flag that tells of it.

    Args:
        edge: as it is attacked.
        cloud: what reads its feature.
        pixels: the attacker's images.
        normalization: of the edge's inputs.
    """
    query = edge_function(edge, normalization, wide=True)
    level = level_of(query, pixels)
    level = level and worth_it(level, query, pixels)
    if level is None:
        return edge, cloud, []
    return Levelled(edge, level), cloud and Restored(cloud, level), [UNEVEN_FEATURE]


@torch.no_grad()
def level_of(edge: EdgeFunction, pixels: Tensor) -> Level | None:
    """How a sample of features is evened out; None where there is nothing to even out.

    A value whose mean lies 30 times as far from the middle of its channel as the channel varies is
    shifted to it; so is one that is 10,000 times as far from 0, which float32 would round. A value
    that varies 30 times as much as half of its channel, or never gets as far as a tenth of that, is
    scaled to it. Only where that are many may they be scaled: in every feature a few hardly vary.

    Args:
        edge: as it is attacked, in the precision in which it sends.
        pixels: the attacker's images.
    """
    z = _sample(edge, pixels)
    near = not_outlying(z)
    z = z if near is None else z[near]
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
        return None
    shift = torch.where(shifted | scaled | ~varies, mean, 0.0)
    gain = torch.where(scaled, usual / std.clamp_min(1e-300), 1.0)
    faint = usual.masked_select(usual > 0)
    if len(faint) and float(mean.abs().max()) > _ROUNDED * float(faint.median()):
        gain = gain / float(faint.median())

    def back(values: Tensor) -> Tensor:
        if len(shape) == 1:
            return values[:, 0]
        order = z.movedim(channel, 1).shape[2:]
        return values.unflatten(1, order).movedim(0, channel - 1)

    return Level(back(shift), back(gain))


def _sample(edge: EdgeFunction, pixels: Tensor) -> Tensor:
    """Features of some images, float64 on the CPU, as many as fit."""
    count = max(32, min(_SAMPLE, _NUMBERS // max(1, edge(pixels[:1])[0].numel())))
    index = torch.linspace(0, len(pixels) - 1, min(count, len(pixels))).long().unique()
    return torch.cat([edge(part).double().cpu() for part in pixels[index].split(32)])


@torch.no_grad()
def worth_it(level: Level, edge: EdgeFunction, pixels: Tensor) -> Level | None:
    """As much of the level as helps: its gain only where a linear decoder rebuilds held-out images
    better with it; None where nothing is left.

    Args:
        level: what `level_of` found.
        edge: as there.
        pixels: the attacker's images.
    """
    shift_alone = Level(level.shift, torch.full_like(level.gain, float(level.gain.median())))
    shifts = bool(level.shift.any())
    if bool((level.gain == level.gain.flatten()[0]).all()):
        return level
    some = pixels[torch.linspace(0, len(pixels) - 1, min(_PROXY, len(pixels))).long()]
    if len(some) < 20:
        return shift_alone if shifts else None
    z = torch.cat([edge(part).cpu() for part in some.split(64)])
    near = not_outlying(z)
    if near is not None:
        z, some = z[near], some[near]
    losses = [LinearInverse(LinearInverseConfig()).fit(Knowledge(some, made(z))).best_loss
              for made in (shift_alone, level)]
    if losses[1] < _HELPS * losses[0]:
        return level
    return shift_alone if shifts else None


def not_outlying(z: Tensor) -> Tensor | None:
    """Indices of the images whose features are not far out; None where (almost) none are, or many.

    Args:
        z: features `[N, ...]` of the attacker's images.
    """
    some = z[torch.linspace(0, len(z) - 1, min(len(z), 101)).long()]
    middle = some.median(0).values
    away = torch.cat([(part - middle).flatten(1).double().square().mean(1).sqrt()
                      for part in z.split(256)])
    near = away <= _OUTLYING * away.median()
    gone = float((~near).double().mean())
    found = near.nonzero().flatten()
    return found if 0 < gone <= _MOST_OUTLYING and len(found) >= _FEWEST else None
