"""What a module costs: multiply-adds, parameters, uploaded bytes.

The unit of work is one multiply-add (MAC) of a convolution, a linear layer or a matrix product,
attention included, at batch size 1. Normalisations, activations, pooling and element-wise
arithmetic are not counted; each such operator that occurred is listed in `MacCount.uncounted`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import conv_flop_count, einsum_flop_jit, get_shape
from torch import Tensor, nn

from patrol_prune.errors import InputError
from patrol_prune.given import check_uncompiled, does_not_run


@dataclass(frozen=True)
class MacCount:
    """Multiply-adds of one forward pass of a module at batch size 1.

    Args:
        total: multiply-adds of the whole module.
        by_module: multiply-adds by module name, a module's own and its children's together;
            `""` is the module itself. A module that is called twice is counted twice.
        uncounted: operators that ran and are not in `total`, with the number of times they ran.
    """

    total: int
    by_module: dict[str, int] = field(default_factory=dict)
    uncounted: dict[str, int] = field(default_factory=dict)


class HasEdge(Protocol):
    """What `edge_macs` needs of a split: the edge, and example inputs of it."""

    @property
    def edge(self) -> nn.Module: ...

    @property
    def example_inputs(self) -> Tensor: ...


def count_macs(module: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> MacCount:
    """Count the multiply-adds of `module` with fvcore, on the first sample of `example_inputs`.

    Convolutions cost `prod(weight.shape) * prod(output spatial)`, matrix products
    `prod(output.shape) * contracted`; attention is its projections and its two products. The
    module runs once in evaluation mode, with gradients enabled and without PyTorch's fused
    attention (both would hide work from the counter). Mode, buffers, gradients, hooks and the
    state of its own generators are left as they were, also after an exception.

    Args:
        module: any module that takes one tensor.
        example_inputs: a batch `[N, ...]`, or a tuple with one such batch.

    Returns:
        `total`, an int at batch 1; `by_module`, module name -> multiply-adds, its children's
        included; `uncounted`, operators that ran and are not in `total` -> how often.

    Raises:
        InputError: the module cannot run on `example_inputs`.
        UnsupportedModelError: `torch.compile` is around it.

    Example:
        >>> from torch import nn
        >>> count_macs(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.zeros(1, 3, 6, 6)).total
        3456
    """
    x = as_single_tensor(example_inputs)[:1].to(device_of(module, x_default=example_inputs))
    with (evaluating(module), hooks_restored(module), draws_restored(module),
          torch.enable_grad(), no_fused_attention()):
        counter = FlopCountAnalysis(module, (x,)).clear_op_handles().set_op_handle(**_HANDLES)
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counter.tracer_warnings("none")
        try:
            by_module = {name: int(macs) for name, macs in counter.by_module().items()}
        except RuntimeError as error:
            check_uncompiled(module)
            raise does_not_run(module, x, error) from error
        uncounted = {op.split("::")[-1]: n for op, n in counter.unsupported_ops().items()}
    return MacCount(by_module[""], by_module, uncounted)


def edge_macs(split: HasEdge) -> int:
    """Multiply-adds of the edge half of `split` at batch size 1, as `count_macs` counts.

    Args:
        split: a `Split`, or anything else with a module `edge` and its `example_inputs`.

    Raises:
        InputError, UnsupportedModelError: as `count_macs`.
    """
    return count_macs(split.edge, split.example_inputs).total


def count_params(module: nn.Module) -> int:
    """Number of parameters of `module`; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def feature_bytes(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
    """Bytes to upload one feature of `shape` (without the batch dimension) as `dtype`."""
    return math.prod(shape) * dtype.itemsize


def as_single_tensor(example_inputs: Tensor | Sequence[Tensor]) -> Tensor:
    """The one tensor in `example_inputs`; anything else is an `InputError`."""
    x = example_inputs
    if isinstance(x, (tuple, list)) and len(x) == 1:
        x = x[0]
    if not isinstance(x, Tensor):
        came = f"{type(x).__name__} of {len(x)}" if isinstance(x, (tuple, list)) else type(x)
        raise InputError(
            f"Expected example_inputs to be one tensor [N, ...] or a tuple with one, came {came}. "
            "Models with several inputs are not supported; fix the others inside a wrapper module."
        )
    if x.dim() < 2 or x.shape[0] < 1:
        raise InputError(
            f"Expected example_inputs with a batch dimension, [N, ...] with N of at least 1, came "
            f"shape {tuple(x.shape)}. For one image [C, H, W] pass image.unsqueeze(0)."
        )
    return x


def device_of(module: nn.Module, x_default: Tensor | Sequence[Tensor]) -> torch.device:
    """The device of the module's first parameter or buffer, else that of `x_default`."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return as_single_tensor(x_default).device


def home_of(module: nn.Module, device: str | torch.device | None) -> torch.device:
    """`device`, or, where it is None, the one that the module is on; the CPU without a tensor.

    Raises:
        InputError: no such device.
    """
    if device is None:
        return device_of(module, torch.empty(1, 1))
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"Expected a device of this machine, came {device!r} ({told}). Give 'cpu', 'cuda' "
            "where there is one, or a torch.device."
        ) from error
    return found


def generators_of(module: nn.Module) -> list[torch.Generator]:
    """The random generators that its submodules hold as attributes."""
    return [g for m in module.modules() for g in vars(m).values()
            if isinstance(g, torch.Generator)]


@contextmanager
def draws_restored(module: nn.Module) -> Iterator[None]:
    """Generators that its submodules hold stand afterwards where they stood before."""
    states = [(generator, generator.get_state()) for generator in generators_of(module)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every submodule's own `training` flag comes back."""
    training = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, flag in training:
            m.training = flag


@contextmanager
def hooks_restored(module: nn.Module) -> Iterator[None]:
    """Forward hooks that were added inside and not removed (after an exception) are removed."""
    tables = [t for m in module.modules() for t in (m._forward_hooks, m._forward_pre_hooks)]
    before = [set(table) for table in tables]
    try:
        yield
    finally:
        for table, keys in zip(tables, before, strict=True):
            for key in [k for k in table if k not in keys]:
                del table[key]


@contextmanager
def counted_positions(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Inside, every call of these convolutions and linear layers at batch 1 is counted.

    Yields:
        layer -> kernel elements times output positions, its multiply-adds per channel pair.
    """
    found = dict.fromkeys(layers, 0)

    def count(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, output: Tensor) -> None:
            weight: Tensor = layer.weight
            found[name] += output.numel() // weight.shape[0] * math.prod(weight.shape[2:])

        return hook

    handles = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def no_fused_attention() -> Iterator[None]:
    """`nn.MultiheadAttention` runs its plain path, in which every matrix product is visible."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def _product(first: int) -> Callable[[list[Any], list[Any]], int]:
    """MACs of a matrix product whose left factor is operand `first`: outputs times contracted."""

    def macs(inputs: list[Any], outputs: list[Any]) -> int:
        return math.prod(get_shape(outputs[0])) * get_shape(inputs[first])[-1]

    return macs


def _convolution(transposed_at: int | None) -> Callable[[list[Any], list[Any]], int]:
    def macs(inputs: list[Any], outputs: list[Any]) -> int:
        transposed = transposed_at is not None and bool(inputs[transposed_at].toIValue())
        x, weight, out = get_shape(inputs[0]), get_shape(inputs[1]), get_shape(outputs[0])
        return int(conv_flop_count(x, weight, out, transposed=transposed))

    return macs


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """The two products of attention, `q k^T` and `(q k^T) v`, for `[..., length, width]`."""
    q, k, v = (get_shape(value) for value in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    """One operand: nothing; two: the product of every index's size; more: fvcore's optimal path."""
    equation = inputs[0].toIValue().replace(" ", "")
    shapes = [get_shape(value) for value in inputs[1].node().inputs()]
    terms = equation.split("->")[0].split(",")
    if len(shapes) == 1:
        return 0
    if len(shapes) != 2 or "." in equation:
        return int(einsum_flop_jit(inputs, outputs))
    pairs = zip(terms, shapes, strict=True)
    sizes = {s: n for term, shape in pairs for s, n in zip(term, shape, strict=True)}
    return math.prod(sizes.values())


def _tensordot(inputs: list[Any], outputs: list[Any]) -> int:
    """`[A, K]` times `[K, B]` gives `[A, B]`, each of several dimensions: A K B."""
    sizes = (math.prod(get_shape(value)) for value in (*inputs[:2], *outputs))
    return math.isqrt(math.prod(sizes))


def _inner(inputs: list[Any], outputs: list[Any]) -> int:
    """Over the last dimensions of both; by a number it is no product of matrices."""
    return _product(0)(inputs, outputs) if all(map(get_shape, inputs[:2])) else 0


def _addbmm(inputs: list[Any], outputs: list[Any]) -> int:
    """A sum of matrix products: each is as large as the output."""
    count, _, contracted = get_shape(inputs[1])
    return math.prod(get_shape(outputs[0])) * count * contracted


def _bilinear(inputs: list[Any], outputs: list[Any]) -> int:
    """`sum_ij x_i W_kij y_j`, for every output as many products as pairs."""
    return math.prod(get_shape(outputs[0])) * math.prod(get_shape(inputs[2])[1:])


_HANDLES: dict[str, Callable[[list[Any], list[Any]], int]] = {
    "aten::_convolution": _convolution(6),
    "aten::_convolution_mode": _convolution(None),
    "aten::linear": _product(0),
    "aten::matmul": _product(0),
    "aten::mm": _product(0),
    "aten::bmm": _product(0),
    "aten::mv": _product(0),
    "aten::dot": _product(0),
    "aten::addmm": _product(1),
    "aten::addmv": _product(1),
    "aten::baddbmm": _product(1),
    "aten::addbmm": _addbmm,
    "aten::inner": _inner,
    "aten::tensordot": _tensordot,
    "aten::bilinear": _bilinear,
    "aten::einsum": _einsum,
    "aten::scaled_dot_product_attention": _attention,
}
