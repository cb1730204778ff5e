"""Layers that normalise over channels, over the live ones alone.

LayerNorm and GroupNorm take mean and variance over channels, so a channel that is merely multiplied
by zero behind them still moves the others. With a mask `m` of the channels, `M = sum_c m_c`,

    mu = sum_c m_c x_c / M,    var = sum_c m_c (x_c - mu)^2 / M,    y = (x - mu) / sqrt(var + eps)

Derivation: removal leaves the set of channels `S`, whose mean is `sum_{c in S} x_c / |S|`. With
`m_c = 1` on S and 0 elsewhere `|S| = M`, the sum over S is `sum_c m_c x_c`, and likewise for the
variance: a mask of 0 and 1 gives the narrower layer's statistics, and a mask of ones the layer's
own. In between the formula is smooth: the moments of the distribution that gives channel c the
weight `m_c / M`. At `m = 1`, with C channels and `u = (x - mu) / sqrt(var + eps)`,

    d mu / d m_c = (x_c - mu) / C,    d var / d m_c = ((x_c - mu)^2 - var) / C,
    d y_k / d m_c = -(u_c + u_k (u_c^2 - var / (var + eps)) / 2) / C

which is what a first-order score sees of the layer. Weights are relative: a common factor of the
mask changes nothing. Negative masks count as 0. What the layer gives for a channel of mask 0 has no
meaning; the channel's consumers multiply it by 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patrol_prune.groups import Member, takes_evenly

__all__ = ["ChannelNorm", "Normalises", "channel_norm", "is_removal", "over_live_channels"]

Normalises = nn.LayerNorm | nn.GroupNorm
_LEAST_WEIGHT = 1e-12
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ChannelNorm:
    """How a layer normalises.

    Args:
        dim: the dimension of the channels in its input.
        groups: of channels that are normalised apart, together with all positions (GroupNorm);
            None where every position is normalised on its own (LayerNorm).
    """

    dim: int
    groups: int | None = None


def over_live_channels(layer: Normalises, norm: ChannelNorm, x: Tensor, mask: Tensor) -> Tensor:
    """What the layer gives for `x` when it normalises with the channels' weights `mask`.

    Args:
        layer: its `eps` and affine parameters are used.
        norm: how it normalises.
        x: its input; computed in float32 at least.
        mask: `[C]`, or `[B, C]` with one for each image; differentiable.
    """
    wide = x.float() if x.dtype in (torch.half, torch.bfloat16) else x
    weights = mask.to(wide.dtype).clamp_min(0.0)
    if norm.groups is None:
        last = wide.movedim(norm.dim, -1)[..., None]
        each = (*weights.shape[:-1], *(1,) * (last.dim() - 3)) if weights.dim() == 2 else ()
        y = _standardised(last, weights.view(*each, -1, 1), layer.eps)[..., 0]
    else:
        grouped = wide.reshape(len(wide), norm.groups, weights.shape[-1] // norm.groups, -1)
        each = weights.shape[:-1]
        y = _standardised(grouped, weights.view(*each, norm.groups, -1, 1), layer.eps)
        y = y.reshape(wide.shape).movedim(1, -1)
    if layer.weight is not None:
        y = y * layer.weight
    if layer.bias is not None:
        y = y + layer.bias
    return y.movedim(-1, norm.dim)


def _standardised(x: Tensor, weights: Tensor, eps: float) -> Tensor:
    """`x` `[..., K, P]` over its K channels at P positions, weighted `[..., K, 1]`."""
    total = (x.shape[-1] * weights.sum((-2, -1), keepdim=True)).clamp_min(_LEAST_WEIGHT)
    centred = x - (weights * x).sum((-2, -1), keepdim=True) / total
    variance = (weights * centred.square()).sum((-2, -1), keepdim=True) / total
    return centred * torch.rsqrt(variance + eps)


def channel_norm(layer: nn.Module) -> ChannelNorm | None:
    """How a layer normalises over channels; None where the formula above is not what it does.

    A subclass (torchvision's LayerNorm2d, say) may compute anything: it is run once on random
    numbers and compared.
    """
    candidates: tuple[ChannelNorm, ...]
    if isinstance(layer, nn.GroupNorm):
        width, candidates = layer.num_channels, (ChannelNorm(1, layer.num_groups),)
    elif isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
        width, candidates = layer.normalized_shape[0], (ChannelNorm(-1), ChannelNorm(1))
    else:
        return None
    if type(layer) in (nn.LayerNorm, nn.GroupNorm):
        return candidates[0]
    return next((norm for norm in candidates if _is_that(layer, norm, width)), None)


def _is_that(layer: Normalises, norm: ChannelNorm, width: int) -> bool:
    """Whether the layer computes on `[2, 3, 5, C]` (channels moved to their place) what we do."""
    like = next(layer.parameters(), torch.zeros(()))
    x = torch.randn((2, 3, 5, width), generator=torch.Generator().manual_seed(0))
    x = (2.0 * x + 0.5).to(like.device, like.dtype).movedim(-1, norm.dim)
    ones = torch.ones(width, device=like.device)
    with torch.no_grad():
        try:
            expected = layer(x)
        except (RuntimeError, TypeError, ValueError):  # its channels lie elsewhere
            return False
        got = over_live_channels(layer, norm, x, ones)
    return (
        isinstance(expected, Tensor) and expected.shape == got.shape
        and torch.allclose(expected.float(), got.float(), rtol=_TOLERANCE, atol=_TOLERANCE)
    )  # fmt: skip


def is_removal(member: Member, units: int) -> bool:
    """Whether removing whole units leaves the norm `member` what a zero mask makes of it.

    Not where two groups of the model lie side by side in one GroupNorm of several groups: removal
    from one of them moves channels from group to group.
    """
    norm = channel_norm(member.module)
    if norm is None or norm.groups is None:
        return norm is not None
    return takes_evenly(member, units, norm.groups)
