"""What each operator of an edge block does to a Lipschitz constant, read from the block's graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from patrol_prune._trace import attribute_of, trace
from patrol_prune.cost import evaluating
from patrol_prune.errors import UnsupportedModelError

Rule = Callable[..., Tensor]
"""From the constants of an operator's inputs to that of its output."""


@dataclass(frozen=True)
class LinearMap:
    """A linear operator on inputs of one shape, whose norm is not known in closed form."""

    apply: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    trainable: bool


@dataclass(frozen=True)
class Step:
    """One operator: the node, the nodes it builds on, and what it does to their constants."""

    node: fx.Node
    sources: tuple[fx.Node, ...]
    effect: Rule | LinearMap


@dataclass(frozen=True)
class BlockSteps:
    """A block's operators in order, from its input to its output."""

    first: fx.Node
    steps: tuple[Step, ...]
    last: fx.Node


def read_blocks(blocks: Sequence[nn.Module], x: Tensor) -> list[BlockSteps]:
    """The operators of a chain of blocks, each run once on what the one before gives for `x`.

    Args:
        blocks: modules that take one tensor; an `fx.GraphModule` is read as it is, others are
            traced. Left as found.
        x: one input `[1, ...]` of the first block.

    Raises:
        UnsupportedModelError: an operator whose Lipschitz constant is unknown or infinite.
    """
    read = []
    for index, block in enumerate(blocks):
        if type(block).__module__.startswith("torch.nn.modules."):
            block = nn.Sequential(block)  # so that a layer is called, not looked into
        traced = None if isinstance(block, fx.GraphModule) else trace(block, x)
        graph: Any = block.graph if traced is None else traced.graph
        constants = {} if traced is None else traced.constants
        with evaluating(block), torch.no_grad():
            after = block(x.clone())  # its hooks put stale constants right
            run = _Interpreter(block, graph, constants)
            run.run(x.clone())
        read.append(_read(_Reader(block, index, run), graph))
        x = after
    return read


def _read(reader: _Reader, graph: fx.Graph) -> BlockSteps:
    first = last = next(iter(graph.nodes))
    known = {first}
    now: dict[fx.Node, fx.Node] = {}  # a value that was written into -> the node that did
    steps = []
    for node in graph.nodes:
        leaves = tree_leaves((node.args, node.kwargs))  # a node as often as it is used
        sources = tuple(leaf for leaf in leaves if isinstance(leaf, fx.Node) and leaf in known)
        if node.op == "output":
            last = now.get(sources[0], sources[0])
        elif sources and reader.is_tensor(node):
            given = tuple(now.get(source, source) for source in sources)
            steps.append(Step(node, given, reader.effect(node, sources)))
            known.add(node)
            now |= dict.fromkeys(reader.overwritten(node), node)
    return BlockSteps(first, tuple(steps), last)


class _Interpreter(fx.Interpreter):
    """Runs a block's graph, keeps all values and remembers what each node wrote into.

    Args:
        constants: tensors that the trace found and that are no attribute of the block.
    """

    def __init__(self, block: nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor]) -> None:
        super().__init__(block, garbage_collect_values=False, graph=graph)
        self.constants = constants
        self.written: dict[fx.Node, set[fx.Node]] = {}

    def fetch_attr(self, target: str) -> Any:
        return self.constants[target] if target in self.constants else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        versions = {node: _version(value) for node, value in self.env.items()}
        result = super().run_node(n)
        self.written[n] = {node for node, version in versions.items()
                           if _version(self.env[node]) != version}
        return result


def _is_one_tensor(a: Any, b: Any) -> bool:
    return (isinstance(a, Tensor) and isinstance(b, Tensor) and a.data_ptr() == b.data_ptr()
            and a.shape == b.shape and a.stride() == b.stride())


def _version(value: Any) -> tuple[int, ...]:
    return tuple(v._version for v in tree_leaves(value) if isinstance(v, Tensor))


class _Reader:
    """Effects of the nodes of one block; `values` are those of one run."""

    def __init__(self, block: nn.Module, index: int, run: _Interpreter) -> None:
        self.block, self.index, self.run, self.values = block, index, run, run.env
        self.order = {node: i for i, node in enumerate(run.graph.nodes)}

    def overwritten(self, node: fx.Node) -> list[fx.Node]:
        """The values that are the node's own from here on, as it wrote into them and they are read
        again; where one is but a part of it, or more, the node is refused."""
        found = [old for old in self.run.written[node]
                 if any(self.order[user] > self.order[node] for user in old.users)]
        if not all(_is_one_tensor(self.values[old], self.values[node]) for old in found):
            raise self._unknown(node)
        return found

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether the value is one or several floating-point tensors, not a size."""
        leaves = tree_leaves(self.values.get(node))
        return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)

    def effect(self, node: fx.Node, sources: tuple[fx.Node, ...]) -> Rule | LinearMap:
        found: Rule | LinearMap | None = None
        if node.op == "call_module":
            found = self._layer(self.block.get_submodule(str(node.target)), sources[0])
        elif node.target in _SUMS:
            found = None if node.kwargs else self._summed(node, sources)
        elif node.target in _PRODUCTS and len(sources) == 1:
            found = self._scaled(node, sources[0])
        elif node.target in _JOINS:
            found = lambda *inputs: torch.linalg.vector_norm(torch.stack(inputs))  # noqa: E731
        elif len(sources) == 1:
            found = self._function(node, sources[0])
        if found is None:
            raise self._unknown(node)
        return found

    def _unknown(self, node: fx.Node) -> UnsupportedModelError:
        return UnsupportedModelError(
            f'lipschitz_form="spectral" knows no Lipschitz constant of {self._name(node)} in '
            f"edge block {self.index}. Use \"scale_free\" or \"paper\", which sample it, or "
            "another split point."
        )

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{type(self.block.get_submodule(str(node.target))).__name__} ({node.target})"
        return f"{getattr(node.target, '__name__', node.target)} ({node.name})"

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.values[node].shape)

    def _layer(self, layer: Any, source: fx.Node) -> Rule | LinearMap | None:
        kind = type(layer)  # a subclass may compute something else
        if kind in _LINEAR_LAYERS:
            trainable = any(True for _ in layer.parameters())
            return LinearMap(_without_bias(layer), self._shape(source), trainable)
        if kind in _BATCH_NORMS and layer.running_var is not None:
            return lambda k: batchnorm_gain(layer) * k
        if kind in _MAX_POOLS:
            return _times(max_pool_gain(
                layer.kernel_size, layer.stride, layer.dilation, len(self._shape(source)) - 2
            ))
        if kind is nn.PReLU:
            return lambda k: layer.weight.abs().max().clamp_min(1.0) * k
        if kind is nn.LeakyReLU:
            return _times(max(1.0, abs(layer.negative_slope)))
        if kind is nn.ELU:
            return _times(max(1.0, layer.alpha))
        gain = _LAYERS.get(kind)
        return None if gain is None else _times(gain)

    def _function(self, node: fx.Node, source: fx.Node) -> Rule | LinearMap | None:
        """Functions and methods of one tensor, all other arguments fixed."""
        if any(isinstance(leaf, fx.Node) and leaf is not source and self.is_tensor(leaf)
               for leaf in tree_leaves((node.args, node.kwargs))):
            return None
        target = node.target
        if target is operator.getitem and not _picks_each_once(
            fx.node.map_arg(node.args[1], lambda n: self.values[n])
        ):
            return None
        if target in _LINEAR_FUNCTIONS:
            return LinearMap(self._call(node, source), self._shape(source), trainable=False)
        if target in (F.max_pool1d, F.max_pool2d, F.max_pool3d):
            given: dict[str, Any] = dict(zip(_POOL_ARGUMENTS, node.args, strict=False))
            given.update(node.kwargs)
            return _times(max_pool_gain(
                given["kernel_size"], given.get("stride"), given.get("dilation", 1),
                len(self._shape(source)) - 2,
            ))
        if target is F.leaky_relu:
            slope: Any = node.kwargs.get("negative_slope", (*node.args, 0.01)[1])
            return _times(max(1.0, abs(slope)))
        gain = (_METHODS if node.op == "call_method" else _FUNCTIONS).get(target)
        return None if gain is None else _times(gain)

    def _call(self, node: fx.Node, source: fx.Node) -> Callable[[Tensor], Tensor]:
        def apply(v: Tensor) -> Tensor:
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda n: v if n is source else self.values[n]
            )
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)

        return apply

    def _spread(self, node: fx.Node, source: fx.Node) -> float:
        """By how much broadcasting lengthens a source: each of its values stands there as often."""
        return math.sqrt(self.values[node].numel() / max(1, self.values[source].numel()))

    def _summed(self, node: fx.Node, sources: tuple[fx.Node, ...]) -> Rule:
        spreads = [self._spread(node, source) for source in sources]
        return lambda *inputs: sum(s * k for s, k in zip(spreads, inputs, strict=True))

    def _scaled(self, node: fx.Node, source: fx.Node) -> Rule | None:
        """`c * x`, or `x / c` for a number `c`; `c` is a number or a tensor of the block's own."""
        divides = node.target in _QUOTIENTS
        if node.kwargs or len(node.args) != 2 or (divides and node.args[0] is not source):
            return None
        other = next((a for a in node.args if a is not source), None)
        spread = self._spread(node, source)
        if isinstance(other, (int, float)) and not (divides and other == 0):
            return _times(abs(1.0 / other if divides else other) * spread)
        if isinstance(other, fx.Node) and other.op == "get_attr" and not divides:
            path = str(other.target)
            if path in self.run.constants:
                return _times(float(self.run.constants[path].abs().max()) * spread)
            return lambda k: attribute_of(self.block, path).abs().max() * spread * k
        return None


def batchnorm_gain(layer: Any) -> Tensor:
    """`max_c |gamma_c| / sqrt(var_c + eps)` with the running variance, a scalar."""
    gain = torch.rsqrt(layer.running_var + layer.eps)
    if layer.weight is not None:
        gain = gain * layer.weight.abs()
    return gain.max()


def max_pool_gain(kernel: Any, stride: Any, dilation: Any, dims: int) -> float:
    """Square root of the most windows that one input is in; 1 where windows do not overlap.

    `||max_pool(a) - max_pool(b)||^2 <= sum over windows of max |a - b|^2`, in which every input
    counts once for each of its windows: `ceil(kernel gcd(stride, dilation) / stride)` in each
    dimension.
    """
    kernels, dilations = _each(kernel, dims), _each(dilation, dims)
    strides = kernels if stride in (None, ()) else _each(stride, dims)
    return math.sqrt(math.prod(
        math.ceil(k * math.gcd(s, d) / s)
        for k, s, d in zip(kernels, strides, dilations, strict=True)
    ))


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (int(value),) * dims


def _picks_each_once(index: Any) -> bool:
    """Whether an index takes no value twice, as a list or a tensor of places may."""
    places = index if isinstance(index, tuple) else (index,)
    return all(place is None or place is Ellipsis or isinstance(place, (int, slice))
               or (isinstance(place, Tensor) and place.dtype == torch.bool)
               for place in places)


def _times(gain: float) -> Rule:
    return (lambda k: k) if gain == 1.0 else (lambda k: gain * k)


def _without_bias(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The layer as it is called, its hooks (soft masks) included, with a bias of zeros."""

    def apply(v: Tensor) -> Tensor:
        bias = getattr(layer, "bias", None)
        if bias is None:
            return layer(v)
        return functional_call(layer, {"bias": torch.zeros_like(bias)}, (v,))

    return apply


def _named(where: Sequence[Any], gains: dict[str, float]) -> dict[Any, float]:
    return {getattr(w, name): gain for name, gain in gains.items() for w in where
            if hasattr(w, name)}


# The largest slope, rounded up in the last digit where it has no closed form.
_SLOPES = {
    "relu": 1.0, "relu_": 1.0, "relu6": 1.0, "hardtanh": 1.0, "tanh": 1.0, "sigmoid": 0.25,
    "softplus": 1.0, "softsign": 1.0, "silu": 1.0999, "gelu": 1.1291, "mish": 1.0886,
    "hardswish": 1.5, "hardsigmoid": 1 / 6, "selu": 1.7581, "celu": 1.0, "logsigmoid": 1.0,
    "abs": 1.0, "neg": 1.0, "clamp": 1.0, "clamp_min": 1.0, "clamp_max": 1.0,
}  # fmt: skip
# They move values about, or leave them out, and change none; dropout is that of evaluation mode.
_MOVES = dict.fromkeys(
    ("flatten", "unflatten", "reshape", "view", "permute", "transpose", "movedim", "squeeze",
     "unsqueeze", "clone", "contiguous", "detach", "float", "chunk", "split", "unbind", "narrow",
     "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "dropout", "dropout1d", "dropout2d",
     "dropout3d", "alpha_dropout"), 1.0,
)  # fmt: skip
_METHODS: dict[Any, float] = {**_SLOPES, **_MOVES}
_FUNCTIONS = {**_named((torch, F), _METHODS), operator.getitem: 1.0, operator.neg: 1.0}
_LAYERS = _named((nn,), {
    "ReLU": 1.0, "ReLU6": 1.0, "Hardtanh": 1.0, "Tanh": 1.0, "Sigmoid": 0.25, "Softplus": 1.0,
    "Softsign": 1.0, "SiLU": 1.0999, "GELU": 1.1291, "Mish": 1.0886, "Hardswish": 1.5,
    "Hardsigmoid": 1 / 6, "SELU": 1.7581, "CELU": 1.0, "LogSigmoid": 1.0, "Identity": 1.0,
    "Dropout": 1.0, "Dropout1d": 1.0, "Dropout2d": 1.0, "Dropout3d": 1.0, "AlphaDropout": 1.0,
    "Flatten": 1.0, "Unflatten": 1.0, "PixelShuffle": 1.0, "PixelUnshuffle": 1.0,
    "ChannelShuffle": 1.0, "ZeroPad2d": 1.0,
})  # fmt: skip
_LINEAR_LAYERS = {
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Upsample,
}  # fmt: skip
_LINEAR_FUNCTIONS = {
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d, F.interpolate, torch.mean, torch.sum, "mean", "sum",
}  # fmt: skip
_BATCH_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}
_MAX_POOLS = {nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d}
_POOL_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation")
_SUMS = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub,
         "add", "add_", "sub", "sub_"}
_QUOTIENTS = {operator.truediv, operator.itruediv, torch.div, "div", "div_"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"} | _QUOTIENTS
_JOINS = {torch.cat, torch.concat, torch.stack}
