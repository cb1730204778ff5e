"""What Torch-Pruning's graph does not know of its operators.

It takes every operator that it has no rule for as one that treats channels apart, as a ReLU does. A
flip of the channels, a maximum over them or a norm of them is none, and the wrong channels would be
tied, or more would change than those that go.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from patrol_prune._tp import signed
from patrol_prune.groups import CONV

__all__ = ["doubtful", "has_shuffle"]

_APART = re.compile(
    r"(Relu|Hardtanh|Hardswish|Hardsigmoid|Silu|Gelu|Sigmoid|LogSigmoid|Tanh|Elu|LeakyRelu|"
    r"PreluKernel|Softplus|Softshrink|Mish|Exp|Log|Sqrt|Rsqrt|Pow|Abs|Neg|Clamp|ClampMin|ClampMax|"
    r"Add|Sub|Mul|Div|Addcmul|Clone|ToCopy|Alias|AsStrided|T|Expand|NativeDropout|Cat)Backward\d*"
)
"""Operators of autograd that leave channels apart, and those that Torch-Pruning has a rule for. One
that moves or makes dimensions is not among them: behind it nobody knows where the channels are. Nor
is one that parts channels: where the halves meet again, Torch-Pruning ties the wrong ones."""
_ARITHMETIC = re.compile(r"(Add|Sub|Mul|Div)Backward\d*")
_OVER_MAPS = re.compile(
    r"((Max|Avg|AdaptiveAvg|AdaptiveMax)Pool2D\w*|Upsample\w+2D|"
    r"(ConstantPadNd|ReflectionPad2D|ReplicationPad2D))Backward\d*"
)
_OF_LAYERS = re.compile(
    r"(NativeLayerNorm|NativeGroupNorm|\w*BatchNorm|Convolution|Mm|Addmm)Backward\d*"
)
_OVER_POSITIONS = re.compile(r"(Mean|Sum|Amax|Amin|Var|Std)Backward\d*")
_COLOURS = 4
_RESHAPE = re.compile(r"(View|UnsafeView|ReshapeAlias)Backward\d*")


def has_shuffle(graph: Any) -> bool:
    """Whether PyTorch's own channel shuffle is in the graph."""
    return any(name.startswith("ChannelShuffle") for name, _ in _operators(graph))


def doubtful(graph: Any) -> tuple[str, ...]:
    """The names of operators in the graph that may do more with channels than keep them apart, of
    convolutions and linear layers with a forward of their own, and of tensors as wide as channels
    that no layer owns: Torch-Pruning does not narrow these."""
    layers = [node.module for node in graph.module2node.values()
              if isinstance(node.module, (CONV, nn.Linear))]
    weights = {id(p) for node in graph.module2node.values()
               if isinstance(node.module, nn.Module) for p in node.module.parameters()}
    convolves = any(isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) for layer in layers)
    found = [name for name, grad_fn in _operators(graph)
             if not _keeps_apart(name, grad_fn, weights, convolves)]
    found += [type(layer).__name__ for layer in layers if not _is_plain(layer)]
    found += _wide_tensors(graph.model, _widths(layers))
    return tuple(dict.fromkeys(found))


def _operators(graph: Any) -> list[tuple[str, Any]]:
    """(autograd's name, its function) of every node that is no layer and no parameter."""
    found = []
    for node in graph.module2node.values():
        operator = type(node.module).__module__.startswith("torch_pruning")
        if operator and node.grad_fn is not None:
            found.append((str(node.grad_fn.name()), node.grad_fn))
    return found


def _keeps_apart(name: str, grad_fn: Any, weights: set[int], convolves: bool) -> bool:
    if _ARITHMETIC.fullmatch(name) and _has_a_number(grad_fn):
        return False
    if _APART.fullmatch(name):
        return True
    if _OVER_MAPS.fullmatch(name):
        return convolves and _gives_a_map(grad_fn) and len(getattr(grad_fn, "_saved_pad", ())) <= 4
    if _OF_LAYERS.fullmatch(name):
        return _reads(grad_fn, weights)
    shape = tuple(getattr(grad_fn, "_saved_self_sym_sizes", ()))
    if _RESHAPE.fullmatch(name):  # behind a split of the channels there are more dimensions
        given = grad_fn._input_metadata[0].shape
        return len(shape) in (2, 4) and given[0] == shape[0]
    dims = getattr(grad_fn, "_saved_dim", None)
    if _OVER_POSITIONS.fullmatch(name) and isinstance(dims, (tuple, list)):
        return convolves and len(shape) == 4 and {signed(d) % 4 for d in dims} <= {2, 3}
    return False


def _has_a_number(grad_fn: Any) -> bool:
    """Whether arithmetic takes a number or a tensor that does not learn: the channels' number may
    be in it."""
    return any(source is None for source, _ in grad_fn.next_functions)


def _gives_a_map(grad_fn: Any) -> bool:
    return [len(given.shape) for given in grad_fn._input_metadata] == [4]


def _reads(grad_fn: Any, weights: set[int], depth: int = 3) -> bool:
    """Whether one of these parameters is among what an operator was given."""
    for source, _ in getattr(grad_fn, "next_functions", ()):
        if source is None:
            continue
        if id(getattr(source, "variable", None)) in weights:
            return True
        if depth and re.match("(T|View|AsStrided)Backward", source.name()) and _reads(
                source, weights, depth - 1):  # fmt: skip
            return True
    return False


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer's forward is PyTorch's, which takes its weight as it is."""
    return all(getattr(type(layer), name, None) is None
               or getattr(type(layer), name).__module__.startswith("torch.nn.")
               for name in ("forward", "_conv_forward"))


def _widths(layers: list[Any]) -> set[int]:
    """What layers give, and what they read where that is more than an image's colours."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    others = [layer for layer in layers if not isinstance(layer, nn.Linear)]
    read = {m.in_features for m in linear} | {m.in_channels for m in others}
    return ({m.out_features for m in linear} | {m.out_channels for m in others}
            | {width for width in read if width > _COLOURS})


def _wide_tensors(model: nn.Module, widths: set[int]) -> list[str]:
    """Buffers and plain tensors, also in lists and dicts, of modules with a forward of their own,
    with a side of such a width; batch norms have theirs narrowed."""
    found = []
    for prefix, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.") or isinstance(module, _BatchNorm):
            continue
        own = dict(module.named_buffers(recurse=False))
        own |= {k: v for k, v in vars(module).items() if not k.startswith("_")}
        found += [f"{prefix}.{name}".lstrip(".") for name, value in own.items()
                  if any(isinstance(t, Tensor) and widths & set(t.shape)
                         for t in tree_leaves(value))]
    return found
