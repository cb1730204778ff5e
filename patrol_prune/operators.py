"""What Torch-Pruning's graph does not know of its operators.

It takes every operator that it has no rule for as one that treats channels apart, as a ReLU does. A
flip of the channels, a maximum over them or a norm of them is none, and the wrong channels would be
tied, or more would change than those that go.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["doubtful", "has_shuffle"]

_APART = re.compile(
    r"(Relu|Hardtanh|Hardswish|Hardsigmoid|Silu|Gelu|Sigmoid|LogSigmoid|Tanh|Elu|LeakyRelu|"
    r"PreluKernel|Softplus|Softshrink|Mish|Exp|Log|Sqrt|Rsqrt|Pow|Abs|Neg|Clamp|ClampMin|ClampMax|"
    r"Add|Sub|Rsub|Mul|Div|Addcmul|Clone|ToCopy|Alias|AsStrided|Permute|Transpose|T|Unsqueeze|"
    r"Squeeze|Expand|NativeDropout|NativeLayerNorm|NativeGroupNorm|\w*BatchNorm|Convolution|"
    r"Mm|Addmm|Split|SplitWithSizes|Cat|(Max|Avg|AdaptiveAvg|AdaptiveMax)Pool\w*|Upsample\w*|"
    r"(ConstantPad|ReflectionPad|ReplicationPad)\w*)Backward\d*"
)
"""Operators of autograd that leave channels apart, and those that Torch-Pruning has a rule for."""
_OVER_POSITIONS = re.compile(r"(Mean|Sum|Amax|Amin|Var|Std)Backward\d*")
_RESHAPE = re.compile(r"(View|UnsafeView|ReshapeAlias)Backward\d*")


def has_shuffle(graph: Any) -> bool:
    """Whether PyTorch's own channel shuffle is in the graph."""
    return any(name.startswith("ChannelShuffle") for name, _ in _operators(graph))


def doubtful(graph: Any) -> tuple[str, ...]:
    """The names of operators in the graph that may do more with channels than keep them apart."""
    return tuple(dict.fromkeys(name for name, grad_fn in _operators(graph)
                               if not _keeps_apart(name, grad_fn)))


def _operators(graph: Any) -> list[tuple[str, Any]]:
    """(autograd's name, its function) of every node that is no layer and no parameter."""
    found = []
    for node in graph.module2node.values():
        operator = type(node.module).__module__.startswith("torch_pruning")
        if operator and node.grad_fn is not None:
            found.append((str(node.grad_fn.name()), node.grad_fn))
    return found


def _keeps_apart(name: str, grad_fn: Any) -> bool:
    if _APART.fullmatch(name):
        return True
    shape = tuple(getattr(grad_fn, "_saved_self_sym_sizes", ()))
    if _RESHAPE.fullmatch(name):  # behind a split of the channels there are more dimensions
        return len(shape) <= 4
    dims = getattr(grad_fn, "_saved_dim", None)
    if _OVER_POSITIONS.fullmatch(name) and isinstance(dims, (tuple, list)):
        return len(shape) == 4 and {_signed(d) % 4 for d in dims} <= {2, 3}
    if name.startswith("SelectBackward"):  # a token out of `[N, L, C]`
        return len(shape) == 3 and dims == 1
    return False


def _signed(dim: int) -> int:
    """Autograd keeps -1 as the largest number of 64 bits."""
    return dim - 2**64 if dim >= 2**63 else dim
