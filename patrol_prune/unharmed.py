"""Modules that somebody else works with are put back as they were."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from patrol_prune._halves import Follow

logger = logging.getLogger("patrol_prune.audit")
_REGISTERED = ("_parameters", "_buffers", "_modules")


@dataclass
class Changes:
    """What had changed, in words, and what of it could not be put back."""

    found: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


@contextmanager
def put_back(*modules: nn.Module) -> Iterator[Changes]:
    """Parameters, buffers, layers, hooks, modes and gradients stand afterwards as they stood.

    So does every other attribute of a module that was set anew (a dropout's `p`, a `forward`); one
    that was changed in place (a list) does not. What is handed over says at the end what had
    changed, and is empty where nothing had. Values are kept on the CPU meanwhile; of tensors that
    are not plain ones in memory (sparse, quantised, lazy, of a type of their own), and where there
    is no memory left, none are.
    """
    held = [m for module in modules for m in module.modules()]
    stood = [(m, type(m), m.training, dict(vars(m))) for m in held]
    tables = [(table, dict(table)) for m in held for table in _tables(m)]
    found = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers()) if _is_plain(t)}
    kept = [one for one in map(_Kept.of, found.values()) if one is not None]
    changes = Changes()
    try:
        yield changes
    finally:
        counts = {"modes of layers (training or evaluation)": sum(
            m.training != mode for m, _, mode, _ in stood)}
        counts["attributes of layers"] = sum(
            _attributes(m, kind, before) for m, kind, _, before in stood)
        counts["layers, tensors or hooks that were exchanged"] = sum(
            _refill(table, before) for table, before in tables)
        for module, _, mode, _ in stood:
            module.training = mode
        frozen = [one.tensor.requires_grad != one.requires_grad for one in kept]
        counts["parameters by whether they want a gradient"] = sum(frozen)
        counts["parameters and buffers by their values"] = sum(
            _put_back(one, changes.lost) for one in kept)
        changes.found += [f"{count} {what}" for what, count in counts.items() if count]


@dataclass(frozen=True)
class _Kept:
    """A tensor with what it held: its memory and the values in it, and the same of its gradient."""

    tensor: Tensor
    data: Tensor
    values: Tensor
    requires_grad: bool
    grad: Tensor | None
    grad_kept: _Kept | None

    @classmethod
    def of(cls, tensor: Tensor) -> _Kept | None:
        """None, and a warning in the log, where there is no memory for it."""
        grad = tensor.grad if tensor.is_leaf else None
        data = _once(tensor.data)
        try:
            values = data.cpu() if data.device.type != "cpu" else data.clone()
        except (RuntimeError, MemoryError) as error:
            logger.warning("A tensor %s is not put back if an attack changes it: %s",
                           tuple(tensor.shape), error)
            return None
        return cls(tensor, tensor.data, values, tensor.requires_grad, grad,
                   None if grad is None or not _is_plain(grad) else cls.of(grad))

    @torch.no_grad()
    def put_back(self) -> bool:
        """Make it hold the same again; whether its own values had changed."""
        tensor, data = self.tensor, self.data
        moved = _place(tensor) != _place(data)
        changed = moved or not _equal(_once(data), self.values)
        if moved:
            tensor.data = data
        if changed:
            with torch.inference_mode(data.is_inference()):
                _once(data).copy_(self.values)
        if tensor.is_leaf:
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if self.grad_kept is not None:
                self.grad_kept.put_back()
            if tensor.grad is not self.grad:
                tensor.grad = self.grad
        return changed


def _put_back(one: _Kept, lost: list[str]) -> bool:
    """Whether it had changed; what cannot be put back joins the `lost`, and ends nothing."""
    try:
        return one.put_back()
    except (RuntimeError, MemoryError) as error:
        shape = ", ".join(map(str, one.data.shape))
        lost.append(f"a tensor [{shape}] ({str(error).partition(chr(10))[0].rstrip('.')})")
        return True


def _is_plain(tensor: Tensor) -> bool:
    return (not is_lazy(tensor) and type(tensor.data) is Tensor and not tensor.is_meta
            and tensor.layout == torch.strided and not tensor.is_nested
            and not tensor.is_quantized)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride())


def _once(data: Tensor) -> Tensor:
    """Without the repetitions of an expanded tensor, which cannot be written to."""
    for dim, (size, stride) in enumerate(zip(data.shape, data.stride(), strict=True)):
        if size > 1 and stride == 0:
            data = data.narrow(dim, 0, 1)
    return data


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: NaN is itself."""
    return torch.equal(_bits(a.cpu()), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    whole = tensor.resolve_conj().resolve_neg().contiguous()
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)  # one number may lie anyhow


def _attributes(module: nn.Module, kind: type[nn.Module], before: dict[str, Any]) -> int:
    """Set a module's class and attributes as they were; how many were not, but for private ones,
    which torch and a deep copy change themselves.
    """
    held = vars(module)
    changed = [name for name in {**before, **held} if name != "training" and not (
        name in before and name in held and _same(held[name], before[name]))]
    if changed:
        held.clear()
        held.update(before)
    if type(module) is not kind:
        module.__class__ = kind
        changed.append("its class")
    return sum(not name.startswith("_") for name in changed)


def _same(now: Any, before: Any) -> bool:
    return now is before or (type(now) is type(before)
                             and isinstance(now, bool | int | float | str) and now == before)


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
