"""Modules that somebody else works with are put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from patrol_prune._halves import Follow

_REGISTERED = ("_parameters", "_buffers", "_modules")


@contextmanager
def put_back(*modules: nn.Module) -> Iterator[list[str]]:
    """Parameters, buffers, layers, hooks, modes and gradients stand afterwards as they stood.

    The list that is handed over says at the end, in words, what had changed; it is empty where
    nothing had. Values are cloned for as long as it takes; of tensors that are not plain ones in
    memory (sparse, lazy, of a type of their own), and of other attributes, nothing is kept.
    """
    held = [m for module in modules for m in module.modules()]
    modes = [(m, m.training) for m in held]
    tables = [(table, dict(table)) for m in held for table in _tables(m)]
    found = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers()) if _is_plain(t)}
    kept = [_Kept.of(tensor) for tensor in found.values()]
    changed: list[str] = []
    try:
        yield changed
    finally:
        counts = {
            "layers, tensors or hooks that were exchanged": sum(
                _refill(table, before) for table, before in tables),
            "modes of layers (training or evaluation)": sum(
                m.training != mode for m, mode in modes),
        }
        for module, mode in modes:
            module.training = mode
        frozen = [one.tensor.requires_grad != one.requires_grad for one in kept]
        counts["parameters by whether they want a gradient"] = sum(frozen)
        counts["parameters and buffers by their values"] = sum(one.put_back() for one in kept)
        changed += [f"{count} {what}" for what, count in counts.items() if count]


@dataclass(frozen=True)
class _Kept:
    """A tensor with what it held: its memory and the values in it, and the same of its gradient."""

    tensor: Tensor
    data: Tensor
    values: Tensor
    requires_grad: bool
    grad: _Kept | None

    @classmethod
    def of(cls, tensor: Tensor) -> _Kept:
        grad = tensor.grad if tensor.is_leaf else None
        return cls(tensor, tensor.data, tensor.data.clone(), tensor.requires_grad,
                   None if grad is None else cls.of(grad))

    @torch.no_grad()
    def put_back(self) -> bool:
        """Make it hold the same again; whether its own values had changed."""
        tensor, data = self.tensor, self.data
        moved = (tensor.device, tensor.dtype, tensor.data_ptr()) != (
            data.device, data.dtype, data.data_ptr())
        changed = moved or not _equal(data, self.values)
        if moved:
            tensor.data = data
        if changed:
            data.copy_(self.values)
        if tensor.is_leaf:
            tensor.requires_grad_(self.requires_grad)
            if self.grad is not None:
                self.grad.put_back()
            tensor.grad = None if self.grad is None else self.grad.tensor
        return changed


def _is_plain(tensor: Tensor) -> bool:
    return (not is_lazy(tensor) and type(tensor.data) is Tensor and not tensor.is_meta
            and tensor.layout == torch.strided)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: NaN is itself."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _tables(module: nn.Module) -> list[dict[Any, Any]]:
    """Where a module registers its tensors, layers and hooks, and what it reads again of a model.
    """
    return [table for name, table in vars(module).items()
            if isinstance(table, dict) and (name in _REGISTERED or name.endswith("_hooks"))] + [
        hook.seen for hook in module._forward_pre_hooks.values() if isinstance(hook, Follow)]


def _refill(table: dict[Any, Any], before: dict[Any, Any]) -> bool:
    """Make the table what it was; whether it was not."""
    same = list(table) == list(before) and all(table[key] is before[key] for key in before)
    if not same:
        table.clear()
        table.update(before)
    return not same
