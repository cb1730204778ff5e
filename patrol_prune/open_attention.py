"""Putting attention with heads that can go in the place of attention with heads that cannot."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from patrol_prune._trace import run_on
from patrol_prune.attention_heads import (
    HeadProduct,
    OpenAttention,
    OpenPartitionAttention,
    OpenSelfAttention,
    OpenTokenAttention,
    OpenWindowAttention,
)
from patrol_prune.cost import as_single_tensor, device_of, evaluating, no_fused_attention
from patrol_prune.errors import InputError, UnsupportedModelError, nearest

__all__ = ["OpenedAttention", "open_attention", "opened_attention"]

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class OpenedAttention:
    """What `open_attention` did.

    Attributes:
        opened: the layers that were replaced, by name.
        left: attention layers that stay as they are -> why.
    """

    opened: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)


def open_attention(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    names: Iterable[str] | None = None,
) -> OpenedAttention:
    """Replace attention layers by equal ones whose heads are channel groups of their own.

    `nn.MultiheadAttention` over one sequence, torchvision's attention of Swin, Swin V2 and MaxViT,
    and timm's `Attention` are known. The new layers hold the same weights in another order, cost
    the same multiply-adds and give the same outputs up to rounding. That is checked for each of
    them on what it is given while the model runs on the example; where it does not hold, the old
    layer stays. From then on one channel group holds the heads of each layer (its q, k and v, and
    what reads them); they are scored, masked and removed whole, and one of them stays.

    Call it before anything else is made from the model: splits that exist need `refresh()`, and
    optimisers hold parameters that are no longer there. `save` and `load` know about it.

    Args:
        model: changed in place; hooks on a replaced layer are lost.
        example_inputs: a batch `[N, ...]` that the model takes, or a tuple with one.
        names: the layers to replace; all that can be, by default.

    Returns:
        what was replaced, and what stays as it is, with the reason.

    Raises:
        InputError: a name that is no attention layer, or the model cannot run on the example.
        UnsupportedModelError: a named layer cannot be replaced.

    Example:
        >>> from torchvision.models import VisionTransformer
        >>> net = VisionTransformer(32, 16, 1, 4, 32, 64)
        >>> open_attention(net, torch.zeros(1, 3, 32, 32)).opened
        ('encoder.layers.encoder_layer_0.self_attention',)
    """
    x = as_single_tensor(example_inputs)[:1].detach().to(device_of(model, example_inputs))
    x = x if bool(x.count_nonzero()) else torch.rand_like(x)  # zeros would hide a wrong order
    known = {name: m for name, m in model.named_modules() if _opener(m) is not None}
    wanted = list(known if names is None else names)
    for name in wanted:
        if name not in known:
            raise InputError(f"Expected an attention layer, came {name!r}. {nearest(name, known)}")
    if not wanted:
        return OpenedAttention()
    training = {name: known[name].training for name in wanted}
    with evaluating(model), torch.no_grad():
        left = _replace(model, {n: known[n] for n in wanted}, x)
    for name in training.keys() - left.keys():
        model.get_submodule(name).train(training[name])
    if names is not None and left:
        name, why = next(iter(left.items()))
        raise UnsupportedModelError(f"The attention layer {name!r} cannot be replaced: {why}.")
    for name, why in left.items():
        logger.info("Attention %s keeps its heads: %s.", name, why)
    return OpenedAttention(tuple(n for n in wanted if n not in left), left)


def opened_attention(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's attention layers with heads of their own."""
    return tuple(name for name, m in model.named_modules() if isinstance(m, OpenAttention))


def _replace(model: nn.Module, layers: dict[str, nn.Module], x: Tensor) -> dict[str, str]:
    """Replace what can be; name -> why not for the others."""
    calls = _calls(model, layers, x)
    left: dict[str, str] = {}
    made: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        opener = _opener(layer)
        assert opener is not None
        opened = opener(layer)
        why = opened if isinstance(opened, str) else _differs(opened.eval(), calls.get(name, []))
        if why is None and isinstance(opened, nn.Module):
            made[name] = opened
        else:
            left[name] = str(why)
    for name in made:
        _put(model, name, made[name])
    if made and _fails(model, x) is not None:
        for name in made:
            _put(model, name, layers[name])
        for name in made:
            _put(model, name, made[name])
            if (why := _fails(model, x)) is not None:
                _put(model, name, layers[name])
                left[name] = why
    return left


@dataclass(frozen=True)
class _Call:
    """One call of a layer, and what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Tensor


def _calls(
    model: nn.Module, layers: dict[str, nn.Module], x: Tensor
) -> dict[str, list[_Call]]:
    found: dict[str, list[_Call]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            found.setdefault(name, []).append(_Call(args, kwargs, value.clone()))

        return hook

    handles = [m.register_forward_hook(record(name), with_kwargs=True)
               for name, m in layers.items()]
    try:
        with no_fused_attention():  # the fused layer around it does not call it
            run_on(model, x.clone())
    finally:
        for handle in handles:
            handle.remove()
    return found


def _differs(opened: nn.Module, calls: list[_Call]) -> str | None:
    """Why a new layer is not the old one, by the calls of that one."""
    if not calls:
        return "the model does not call it"
    for call in calls:
        given = opened(*call.args, **call.kwargs)
        got = given[0] if isinstance(given, tuple) else given
        within = _TOLERANCE * float(call.value.abs().max()) + 1e-9
        if got.shape != call.value.shape or not torch.allclose(
            got, call.value, rtol=0.0, atol=within
        ):
            return "it is called with a mask, or with keys or values of its own"
    return None


def _fails(model: nn.Module, x: Tensor) -> str | None:
    """Why the model does not run, where a module around a new layer reads what it has not."""
    try:
        model(x.clone())
    except Exception as error:
        return f"the model does not run with another layer there ({type(error).__name__}: {error})"
    return None


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


Opener = Callable[[Any], OpenAttention | str]


def _opener(module: nn.Module) -> Opener | None:
    """What replaces a layer, by the names of its class and its bases (torchvision's, timm's)."""
    if isinstance(module, nn.MultiheadAttention):
        return _multihead
    kinds = {(c.__module__.split(".")[0], c.__name__) for c in type(module).__mro__}
    return next((opener for kind, opener in _OPENERS.items() if kind in kinds), None)


def _multihead(layer: nn.MultiheadAttention) -> OpenAttention | str:
    if not layer._qkv_same_embed_dim or layer.in_proj_weight is None:
        return "its keys or values are of another width"
    if layer.bias_k is not None or layer.bias_v is not None or layer.add_zero_attn:
        return "it adds keys and values of its own"
    weights, biases = _thirds(layer.in_proj_weight, layer.in_proj_bias)
    core = HeadProduct(layer.num_heads, layer.head_dim, scale=layer.head_dim**-0.5,
                       dropout=layer.dropout)
    return OpenSelfAttention(weights, biases, layer.out_proj, core, batch_first=layer.batch_first)


def _windows(layer: Any) -> OpenAttention | str:
    cosine = hasattr(layer, "logit_scale")
    weights, biases = _thirds(layer.qkv.weight, layer.qkv.bias)
    if cosine:  # its forward takes keys without a bias
        biases = (biases[0], None, biases[2])
    head_dim = weights[0].shape[0] // layer.num_heads
    core = HeadProduct(layer.num_heads, head_dim, scale=head_dim**-0.5,
                       dropout=layer.attention_dropout, cosine=cosine)
    source = _without(layer, "qkv", "proj")
    return OpenWindowAttention(weights, biases, layer.proj, core, source=source)


def _partitions(layer: Any) -> OpenAttention | str:
    weights, biases = _thirds(layer.to_qkv.weight, layer.to_qkv.bias)
    core = HeadProduct(layer.n_heads, layer.head_dim, scale=layer.scale_factor)
    source = _without(layer, "to_qkv", "merge")
    return OpenPartitionAttention(weights, biases, layer.merge, core, source=source)


def _tokens(layer: Any) -> OpenAttention | str:
    plain = all(isinstance(getattr(layer, name, nn.Identity()), nn.Identity)
                for name in ("q_norm", "k_norm", "norm"))
    if not plain or getattr(layer, "gate", None) is not None:
        return "it normalises or gates its heads"
    weights, biases = _thirds(layer.qkv.weight, layer.qkv.bias)
    head_dim = weights[0].shape[0] // layer.num_heads
    core = HeadProduct(layer.num_heads, head_dim, scale=layer.scale, dropout=layer.attn_drop.p)
    return OpenTokenAttention(weights, biases, layer.proj, core, dropout=layer.proj_drop.p)


_OPENERS: dict[tuple[str, str], Opener] = {
    ("torchvision", "ShiftedWindowAttention"): _windows,
    ("torchvision", "RelativePositionalMultiHeadAttention"): _partitions,
    ("timm", "Attention"): _tokens,
}


def _thirds(
    weight: Tensor, bias: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    weights = weight.detach().chunk(3)
    return weights, (None,) * 3 if bias is None else bias.detach().chunk(3)


def _without(layer: Any, *children: str) -> Any:
    """A shallow copy that shares everything but these layers, which it lacks."""
    rest = copy.copy(layer)
    rest._modules = {k: v for k, v in layer._modules.items() if k not in children}
    return rest
