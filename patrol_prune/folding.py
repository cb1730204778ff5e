"""Hardening without a jump: masks become part of the weights next to them.

A channel's mask goes into the weights that read the channel, that of a dimension of attention's
heads into q's as well, a block's into the last layer of its branch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patrol_prune.attention_heads import HeadLinear
from patrol_prune.errors import InputError, UnsupportedModelError
from patrol_prune.given import check_kind
from patrol_prune.groups import CONV, Member
from patrol_prune.masks import SoftMasks

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def fold_masks(masks: SoftMasks) -> None:
    """Multiply every mask into the input weights of its consumers, or its branch's end; exact::

        w[:, idxs] <- w[:, idxs] * m[root_idxs],        of a block:  w, b <- m w, m b
        w_q[idxs], b_q[idxs] <- m[root_idxs] (w_q, b_q)[idxs],    of dimensions of heads

    Afterwards the model alone gives what the masked model gave, and a channel whose mask is zero
    is read by nobody, so that its removal changes nothing either. The masks are then 1 where they
    were not zero and 0 where they were: attached again, they change nothing.

    Where a group crosses the split (`boundary="prune"`), the cloud's consumers take the mask. The
    feature itself is then uploaded without it: its channels differ from the masked ones by one
    constant factor each. From an upload without noise that takes nothing away, because an attacker
    who standardises every channel first, as ours and the surrogates do, divides that factor out.
    But a channel with the mask 0, which was hidden, is uploaded until it is removed, and behind
    an edge with noise or rounding a channel whose mask was below 1 stands out of it more.

    Args:
        masks: of the model in its present shape, not attached.

    Raises:
        InputError: the model was pruned since the masks were made, or they are attached.
        UnsupportedModelError: two consumers share one weight but not one mask, a layer normalises
            over channels whose masks differ, or a block's mask is not 1 and its branch ends in a
            layer that cannot take it: no convolution, linear layer or norm with weights, or one
            that shares its weights.
    """
    check_kind(masks, "masks", SoftMasks, "Give SoftMasks, of learned masks their .masks.")
    if masks.is_attached:
        raise InputError("Expected masks that are not attached: they would act twice. Leave "
                         "`with masks.attached()` first.")
    if not masks.table.is_current():
        raise InputError(
            "Expected the model these masks were made for, came one that was pruned since. Fold "
            "before pruning."
        )
    scaled = {n: float(m.detach()) for n, m in masks.blocks.items() if bool(m != 1)}
    refused = {n: why for n, why in cannot_fold(masks).items() if n in scaled}
    if refused:
        name, why = next(iter(refused.items()))
        raise UnsupportedModelError(
            f"The mask {scaled[name]} of block {name!r} cannot be folded: {why}. Remove the block "
            "if its mask is 0, or set it to 1."
        )
    _check_statistics(masks)
    factors, rows = _factors(masks), _rows_of_q(masks)
    with torch.no_grad():
        for module, factor in factors.values():
            weight = _weight(module)
            weight.mul_(_as_weight(module, factor).to(weight.device, weight.dtype))
        for parameter, factor in rows.values():
            shape = (-1,) + (1,) * (parameter.dim() - 1)
            parameter.mul_(factor.view(shape).to(parameter.device, parameter.dtype))
        for mask in masks.channels.values():
            mask.copy_((mask != 0).to(mask.dtype))
        for name, scale in scaled.items():
            for parameter in masks.scaled_layer(name).parameters(recurse=False):
                parameter.mul_(scale)
            masks.blocks[name].fill_(float(scale != 0))


def _rows_of_q(masks: SoftMasks) -> dict[int, tuple[nn.Parameter, Tensor]]:
    """Parameter -> (itself, `[C_out]` factor), where dimensions of heads are masked in q too."""
    found: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for name, mask in masks.channels.items():
        for m in masks.table.groups[name].members:
            if not (isinstance(m.module, HeadLinear) and m.direction == "out"
                    and m.module.mask_power == 1):  # fmt: skip
                continue
            factor = torch.ones(m.width, device=mask.device)
            _multiply(factor, m, mask.detach())
            for parameter in m.module.parameters():
                known = found.setdefault(id(parameter), (parameter, factor))
                _require_same(known[1], factor, m.module)
    return found


def cannot_fold(masks: SoftMasks) -> dict[str, str]:
    """Masked block -> why the last layer of its branch cannot take a factor; empty if all can."""
    owners: dict[int, int] = {}
    for module in masks.model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {}
    for name in masks.blocks:
        layer = masks.scaled_layer(name)
        affine = isinstance(layer, (CONV, nn.Linear)) or (
            isinstance(layer, _NORMS) and layer.weight is not None)
        if not affine:
            found[name] = f"its branch ends in a {type(layer).__name__}"
        elif any(owners[id(p)] > 1 for p in layer.parameters(recurse=False)):
            found[name] = "the last layer of its branch shares its weights"
    return found


def _check_statistics(masks: SoftMasks) -> None:
    """A mask that a layer's mean and variance depend on is no factor of a weight."""
    for name, layers in masks.normalised.items():
        mask = masks.channels[name].detach()
        if not bool((mask == mask[0]).all()) or float(mask[0]) <= 0:
            raise UnsupportedModelError(
                f"{layers[0]!r} normalises over the channels of {name!r}, with their masks as "
                "weights: they cannot be folded. Remove the channels whose mask is 0, and set the "
                "others of that group to 1."
            )


def _factors(masks: SoftMasks) -> dict[int, tuple[nn.Module, Tensor]]:
    """Weight -> (a layer that holds it, `[C_in]` factor), once per weight."""
    layers: dict[int, tuple[nn.Module, Tensor]] = {}
    for name, mask in masks.channels.items():
        for member in masks.table.groups[name].consumers:
            fresh = (member.module, torch.ones(member.width, device=mask.device))
            _multiply(layers.setdefault(id(member.module), fresh)[1], member, mask.detach())
    by_weight: dict[int, tuple[nn.Module, Tensor]] = {}
    for module, factor in layers.values():
        known = by_weight.setdefault(id(_weight(module)), (module, factor))
        _require_same(known[1], factor, module)
    return by_weight


def _require_same(known: Tensor, factor: Tensor, module: nn.Module) -> None:
    if not torch.equal(known, factor):
        raise UnsupportedModelError(
            f"Two layers share the weight of a {type(module).__name__} and its channels have "
            "different masks: it cannot be folded. Give each layer its own weight."
        )


def _multiply(factor: Tensor, member: Member, mask: Tensor) -> None:
    factor[member.idxs] = factor[member.idxs] * mask[member.root_idxs].to(factor.dtype)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _as_weight(module: nn.Module, factor: Tensor) -> Tensor:
    """`[C_in]` factors in the shape that multiplies the layer's weight."""
    if isinstance(module, nn.Linear):
        return factor
    assert isinstance(module, CONV)
    spatial = (1,) * len(module.kernel_size)
    if module.transposed:
        return factor.view(-1, 1, *spatial)
    per_group = factor.view(module.groups, -1)
    rows = per_group.repeat_interleave(module.out_channels // module.groups, dim=0)
    return rows.view(*rows.shape, *spatial)
