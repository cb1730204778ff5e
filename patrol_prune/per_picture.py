"""Uploads that differ in sign, scale or a constant between pictures, brought to one level each.

A factor or a summand that an edge draws from the picture itself is the same for all values of an
upload. What is left without it is the rest of the picture, and no attack that reads values one by
one finds it behind such a factor. What the edge's own scale said of the picture goes with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.access import edge_function
from patrol_prune.attacks import Flag, Knowledge
from patrol_prune.attacks.white_box import drops_values
from patrol_prune.pixels import Normalization
from patrol_prune.received import PROXY, helps, sample

_ROUNDED, _SCALES = 1e4, 3.0
_TURNED, _APART, _ITERATIONS = 0.1, 0.5, 10

LEVELLED_PER_IMAGE = Flag(
    "levelled_per_image",
    "The uploads differ between pictures by a factor, or by a constant that is far larger than all "
    "else in them. The attacks got each on one level, as any attacker would bring them to; those "
    "through the cloud read other logits there than the cloud gives.",
    "Nothing, if that is meant. It hides no more than how bright a picture is.",
)
TURNED_PER_IMAGE = Flag(
    "turned_per_image",
    "The uploads of some pictures are turned around, all signs at once. The attacks got each the "
    "same way round, as any attacker would bring them to; those through the cloud read other "
    "logits there than the cloud gives.",
    "Nothing, if that is meant. It hides nothing.",
)


@dataclass(frozen=True)
class PerPicture:
    """`(z - m) * usual / r`, with `m` the mean of a picture's upload and `r` the RMS of `z - m`.

    Attributes:
        usual: the RMS that each upload gets; None to leave it as it is.
        centred: whether `m` is subtracted, in float64.
    """

    usual: float | None
    centred: bool

    def __call__(self, z: Tensor) -> Tensor:
        if z.device.type != "mps":
            z = z.double()
        over = tuple(range(1, z.dim()))
        if self.centred:
            z = z - z.mean(over, keepdim=True)
        if self.usual is not None:
            size = z.square().mean(over, keepdim=True).sqrt()
            z = z * (self.usual / size.clamp_min(torch.finfo(torch.float32).tiny))
        return z.float()

    def undone(self, z: Tensor) -> Tensor:
        """The upload as it is: what was sent with it is lost."""
        return z


@torch.no_grad()
def per_picture(
    edge: nn.Module, pixels: Tensor, normalization: Normalization, *, draws: bool = False
) -> PerPicture | None:
    """How uploads are brought to one level each; None where they are on one already.

    They are centred where their means differ by 10,000 times as much as all else between pictures,
    which float32 would round; and scaled where one in ten is three times as large as one in ten
    others, and a linear decoder sees more for it.

    Args:
        edge: as it is attacked.
        pixels: the attacker's images.
        normalization: of the edge's inputs.
        draws: whether the edge draws. Uploads of one that drops values stay on their scale, by
            which white boxes see what was dropped.
    """
    query = edge_function(edge, normalization, wide=True)
    z, _ = sample(query, pixels)
    flat = z.flatten(1)
    if flat.shape[1] < 2 or len(flat) < 2:
        return None
    rest = (flat - flat.mean(0)).std(1).median()
    centred = bool(flat.mean(1).std() > _ROUNDED * rest) and bool(rest > 0)
    if centred:
        flat = flat - flat.mean(1, keepdim=True)
    sizes = flat.square().mean(1).sqrt()
    usual = float(sizes.median())
    low, high = (float(sizes.quantile(q)) for q in (0.1, 0.9))
    alone = PerPicture(None, True) if centred else None
    if not 0 < _SCALES * low < high:
        return alone
    if draws and drops_values(
            Knowledge(pixels, edge=edge_function(edge, normalization)), pixels.device):
        return alone
    scaled = PerPicture(usual, centred)
    z, some = sample(query, pixels, PROXY)
    plain = z.float() if alone is None else alone(z)
    return scaled if helps(plain, scaled(z), some) else alone


@dataclass(frozen=True)
class SameWayRound:
    """`sign(<z, v>) z`, with `v` the direction in which uploads are largest, `[D]`, float64."""

    direction: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        kind = torch.float32 if z.device.type == "mps" else torch.float64
        along = z.flatten(1).to(kind) @ self.direction.to(z.device, kind)
        return z * torch.where(along < 0, -1.0, 1.0).to(z.dtype).view(-1, *[1] * (z.dim() - 1))

    def undone(self, z: Tensor) -> Tensor:
        """The upload as it is: which way round it was is lost."""
        return z


@torch.no_grad()
def same_way_round(
    edge: nn.Module, pixels: Tensor, normalization: Normalization
) -> SameWayRound | None:
    """How uploads are brought the same way round; None where they are.

    One in ten has to lie on the other side of 0 than the others in the direction in which uploads
    are largest, all of them clearly off 0, and a linear decoder has to see more for it. Uploads of
    one size each are judged: a scale of a picture's own is undone behind this.

    Args:
        edge: as it is attacked.
        pixels: the attacker's images.
        normalization: of the edge's inputs.
    """
    query = edge_function(edge, normalization)
    z, some = sample(query, pixels)
    sizes = z.float().flatten(1).square().mean(1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    z = z / sizes.to(z.dtype).view(-1, *[1] * (z.dim() - 1))
    flat = z.flatten(1).cpu().double()
    direction = flat[flat.norm(dim=1).argmax()]
    for _ in range(_ITERATIONS):
        direction = flat.T @ (flat @ functional.normalize(direction, dim=0))
    direction = functional.normalize(direction, dim=0)
    if float((flat @ direction).sign().mean()) < 0:
        direction = -direction  # as most of them lie
    step, along = SameWayRound(direction), flat @ direction
    turned, away = float((along < 0).double().mean()), along.abs()
    if not _TURNED < turned < 1 - _TURNED or not away.std() < _APART * away.mean():
        return None
    return step if helps(z, step(z), some) else None
