"""Putting attention with heads that can go in the place of attention with heads that cannot."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

from patrol_prune import _tp  # noqa: F401  (Torch-Pruning follows heads from here on)
from patrol_prune._trace import run_on
from patrol_prune.attention_heads import (
    HeadProduct,
    OpenAttention,
    OpenPartitionAttention,
    OpenSelfAttention,
    OpenTokenAttention,
    OpenWindowAttention,
    check_unit,
)
from patrol_prune.cost import as_single_tensor, device_of, evaluating, no_fused_attention
from patrol_prune.errors import InputError, UnsupportedModelError, nearest
from patrol_prune.given import check_model, check_readable

__all__ = ["OpenedAttention", "open_as_recorded", "open_attention", "opened_attention"]

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
    unit: str = "heads",
) -> OpenedAttention:
    """Replace attention layers by equal ones whose heads are channel groups of their own.

    `nn.MultiheadAttention` over one sequence, torchvision's attention of Swin, Swin V2 and MaxViT,
    and timm's `Attention` are known, not what inherits from them. The new layers hold the same
    weights in another order, cost the same multiply-adds and give the same outputs up to rounding.
    That is checked for each of them on what it is given while the model runs on the example, and
    for the model; where it does not hold, the old layer stays. Masks are refused when they come.
    From then on one channel group holds the heads of each layer (its q, k and v, and what reads
    them); they are scored, masked and removed whole, and one of them stays. With
    `unit="dimensions"` it holds the dimensions of the heads instead: the same ones go from every
    head of the layer, and the scale of the products stays.

    Call it before anything else is made from the model: splits that exist need `refresh()`, and
    optimisers hold parameters that are no longer there. `save` and `load` know about it.

    Args:
        model: changed in place.
        example_inputs: a batch `[N, ...]` that the model takes, or a tuple with one.
        names: the layers to replace; all that can be, by default.
        unit: what may go from them, `"heads"` or `"dimensions"`.

    Returns:
        what was replaced, and what stays as it is, with the reason.

    Raises:
        InputError: a name that is no attention layer, another unit, or the model cannot run on
            the example.
        UnsupportedModelError: a named layer cannot be replaced; the model is then as it was.

    Example:
        >>> from torchvision.models import VisionTransformer
        >>> net = VisionTransformer(32, 16, 1, 4, 32, 64)
        >>> open_attention(net, torch.zeros(1, 3, 32, 32)).opened
        ('encoder.layers.encoder_layer_0.self_attention',)
    """
    check_unit(unit)
    check_model(model, "model")
    check_readable(model)
    x = as_single_tensor(example_inputs)[:1].detach().to(device_of(model, example_inputs))
    if x.is_floating_point() and not bool(x.count_nonzero()):  # zeros would hide a wrong order
        x = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    known = {name: m for name, m in model.named_modules() if _opener(m) is not None}
    wanted = list(dict.fromkeys(known if names is None else names))
    for name in wanted:
        if name not in known:
            raise InputError(f"Expected an attention layer, came {name!r}. {nearest(name, known)}")
    if not wanted:
        return OpenedAttention()
    training = {name: known[name].training for name in wanted}
    with evaluating(model), torch.no_grad():
        left = _replace(model, {n: known[n] for n in wanted}, x, unit)
    if names is not None and left:
        for name in filter(None, wanted):
            _put(model, name, known[name])
            known[name].train(training[name])
        name, why = next(iter(left.items()))
        raise UnsupportedModelError(f"The attention layer {name!r} cannot be replaced: {why}.")
    for name in training.keys() - left.keys():
        model.get_submodule(name).train(training[name])
    for name, why in left.items():
        logger.info("Attention %s keeps its heads: %s.", name, why)
    return OpenedAttention(tuple(n for n in wanted if n not in left), left)


def open_as_recorded(model: nn.Module, units: Mapping[str, str]) -> None:
    """Replace these layers without running anything: `load` compares names and shapes later.

    Args:
        model: changed in place.
        units: name -> unit of each, as `opened_attention` told.

    Raises:
        InputError: another unit.
        UnsupportedModelError: a layer is not there, or is none that can be replaced.
    """
    there = dict(model.named_modules())
    for name, unit in units.items():
        check_unit(unit)
        opener = _opener(there.get(name))
        opened = opener(there[name], unit) if opener else "there is no attention to replace"
        if isinstance(opened, str):
            raise UnsupportedModelError(f"The attention layer {name!r} cannot be replaced: "
                                        f"{opened}.")  # fmt: skip
        _put(model, name, opened.train(there[name].training))


def opened_attention(model: nn.Module) -> dict[str, str]:
    """The names of a model's attention layers with heads of their own -> what they may lose."""
    return {name: m.core.unit for name, m in model.named_modules() if isinstance(m, OpenAttention)}


def _replace(
    model: nn.Module, layers: dict[str, nn.Module], x: Tensor, unit: str
) -> dict[str, str]:
    """Replace what can be; name -> why not for the others."""
    calls, expected = _calls(model, layers, x)
    left: dict[str, str] = {}
    made: dict[str, nn.Module] = {}
    shared = _shared(model)
    for name, layer in layers.items():
        opened = _opened(name, layer, shared, unit)
        why = opened if isinstance(opened, str) else _differs(opened.eval(), calls.get(name, []))
        if why is None and isinstance(opened, nn.Module):
            made[name] = opened
        else:
            left[name] = str(why)
    for name in made:
        _put(model, name, made[name])
    if made and _changes(model, x, expected) is not None:
        for name in made:
            _put(model, name, layers[name])
        for name in made:
            _put(model, name, made[name])
            if (why := _changes(model, x, expected)) is not None:
                _put(model, name, layers[name])
                left[name] = why
    return left


def _opened(
    name: str, layer: nn.Module, shared: set[int], unit: str
) -> OpenAttention | str:
    """What takes a layer's place, or why nothing can."""
    opener = _opener(layer)
    assert opener is not None
    if not name:
        return "it is the model itself; put it into a module"
    if any(id(p) in shared for p in layer.parameters()):
        return "it shares weights with another layer"
    if any(m._forward_hooks or m._forward_pre_hooks or is_parametrized(m)
           for m in layer.modules()):  # fmt: skip
        return "it has hooks or parametrised weights"
    try:
        return opener(layer, unit)
    except Exception as error:  # a layer of a release that is not known here
        return f"it is not what it was taken for ({type(error).__name__}: {error})"


def _shared(model: nn.Module) -> set[int]:
    """Parameters that are there under more than one name."""
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {p for p, count in names.items() if count > 1}


@dataclass(frozen=True)
class _Call:
    """One call of a layer, and what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Any


def _calls(
    model: nn.Module, layers: dict[str, nn.Module], x: Tensor
) -> tuple[dict[str, list[_Call]], Any]:
    """Every call of these layers, and the model's output."""
    found: dict[str, list[_Call]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            found.setdefault(name, []).append(_Call(args, kwargs, output))

        return hook

    handles = [m.register_forward_hook(record(name), with_kwargs=True)
               for name, m in layers.items()]
    try:
        with no_fused_attention():  # the fused layer around it does not call it
            output = run_on(model, x.clone())
    finally:
        for handle in handles:
            handle.remove()
    return found, output


def _differs(opened: nn.Module, calls: list[_Call]) -> str | None:
    """Why a new layer is not the old one, by the calls of that one."""
    if not calls:
        return "the model does not call it"
    for call in calls:
        try:
            got = opened(*call.args, **call.kwargs)
        except Exception as error:  # a mask, say, or keys of its own
            return f"with another layer there the call fails ({type(error).__name__}: {error})"
        if (apart := _apart(call.value, got)) is not None:
            return f"another layer there gives something else ({apart})"
    return None


def _changes(model: nn.Module, x: Tensor, expected: Any) -> str | None:
    """Why the model is not what it was: a module around a new layer may read what it has not."""
    try:
        got = model(x.clone())
    except Exception as error:
        return f"the model does not run with another layer there ({type(error).__name__}: {error})"
    apart = _apart(expected, got)
    return apart and f"the model gives something else with another layer there ({apart})"


def _apart(expected: Any, got: Any) -> str | None:
    """How two outputs differ by more than rounding, or None."""
    first, second = (
        [v for v in tree_leaves(value) if isinstance(v, Tensor) and v.is_floating_point()]
        for value in (expected, got)
    )
    if [v.shape for v in first] != [v.shape for v in second]:
        return "other shapes"
    for a, b in zip(first, second, strict=True):
        if not a.numel():
            continue
        scale = float(a.abs().max())
        if not scale < float("inf"):
            return "the model's own values are not finite"
        within = max(_TOLERANCE, 4.0 * torch.finfo(a.dtype).eps) * scale + 1e-9
        apart = float((a.float() - b.float()).abs().max())
        if not apart <= within:
            return f"by {apart:.2g}, of values up to {scale:.2g}"
    return None


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


Opener = Callable[[Any, str], OpenAttention | str]


def _opener(module: object) -> Opener | None:
    """What replaces a layer, by its exact class."""
    kind = type(module)
    if kind is nn.MultiheadAttention:
        return _multihead
    return _OPENERS.get(f"{kind.__module__}.{kind.__name__}")


def _multihead(layer: nn.MultiheadAttention, unit: str) -> OpenAttention | str:
    if not layer._qkv_same_embed_dim or layer.in_proj_weight is None:
        return "its keys or values are of another width"
    if layer.bias_k is not None or layer.bias_v is not None or layer.add_zero_attn:
        return "it adds keys and values of its own"
    weights, biases = _thirds(layer.in_proj_weight, layer.in_proj_bias)
    core = HeadProduct(layer.num_heads, layer.head_dim, scale=layer.head_dim**-0.5,
                       dropout=layer.dropout, unit=unit)
    return OpenSelfAttention(weights, biases, layer.out_proj, core, batch_first=layer.batch_first)


def _windows(layer: Any, unit: str) -> OpenAttention | str:
    cosine = hasattr(layer, "logit_scale")
    weights, biases = _thirds(layer.qkv.weight, layer.qkv.bias)
    if cosine:  # its forward takes keys without a bias
        biases = (biases[0], None, biases[2])
    head_dim = weights[0].shape[0] // layer.num_heads
    core = HeadProduct(layer.num_heads, head_dim, scale=head_dim**-0.5,
                       dropout=layer.attention_dropout, cosine=cosine, unit=unit)
    source = _without(layer, "qkv", "proj")
    return OpenWindowAttention(weights, biases, layer.proj, core, source=source)


def _partitions(layer: Any, unit: str) -> OpenAttention | str:
    weights, biases = _thirds(layer.to_qkv.weight, layer.to_qkv.bias)
    core = HeadProduct(layer.n_heads, layer.head_dim, scale=layer.scale_factor, unit=unit)
    source = _without(layer, "to_qkv", "merge")
    return OpenPartitionAttention(weights, biases, layer.merge, core, source=source)


def _tokens(layer: Any, unit: str) -> OpenAttention | str:
    plain = all(isinstance(getattr(layer, name, nn.Identity()), nn.Identity)
                for name in ("q_norm", "k_norm", "norm"))
    if not plain or getattr(layer, "gate", None) is not None:
        return "it normalises or gates its heads"
    weights, biases = _thirds(layer.qkv.weight, layer.qkv.bias)
    head_dim = weights[0].shape[0] // layer.num_heads
    core = HeadProduct(layer.num_heads, head_dim, scale=layer.scale, dropout=layer.attn_drop.p,
                       unit=unit)
    return OpenTokenAttention(weights, biases, layer.proj, core, dropout=layer.proj_drop.p)


_OPENERS: dict[str, Opener] = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _windows,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": _windows,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": _partitions,
    "timm.layers.attention.Attention": _tokens,
    "timm.models.vision_transformer.Attention": _tokens,
}


def _thirds(
    weight: Tensor, bias: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    with torch.enable_grad():  # so that they say whether they are trained
        return weight.chunk(3), (None,) * 3 if bias is None else bias.chunk(3)


def _without(layer: Any, *children: str) -> Any:
    """A shallow copy that shares everything but these layers, which it lacks."""
    rest = copy.copy(layer)
    rest._modules = {k: v for k, v in layer._modules.items() if k not in children}
    return rest
