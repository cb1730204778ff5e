"""Which arithmetic a device is good at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from patrol_prune.errors import InputError

PRECISIONS = ("auto", "fp32", "bf16")

_FEWEST_STRIDED = 8


def has_native_bf16(device: torch.device | str) -> bool:
    """Whether bfloat16 is computed by the device itself rather than emulated."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind == "cpu":
        return any(
            bool(getattr(torch.cpu, name, bool)())
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    return False


def channels_last_is_safe(model: nn.Module) -> bool:
    """Whether training `model` in the channels-last layout computes within its own memory.

    On processors without AVX-512, the gradient of a 1x1 convolution of stride above 1 on fewer
    than 8 channels, as pruning leaves them, writes past its buffers there and ends the process
    (torch 2.14, "double free or corruption"; 8 channels and more, and the contiguous layout, were
    clean under a checking allocator). Weights of volumes, `[O, I, T, H, W]`, have no such layout.
    """
    if any(tensor.dim() > 4 for _, tensor in _tensors(model)):
        return False
    return not any(
        isinstance(m, nn.Conv2d)
        and max(m.kernel_size) == 1
        and max(m.stride) > 1
        and m.in_channels < _FEWEST_STRIDED
        for m in model.modules()
    )


def channels_last_names(model: nn.Module) -> set[str]:
    """The parameters and buffers of `model` that lie in the channels-last layout alone."""
    return {
        name for name, tensor in _tensors(model)
        if tensor.dim() == 4 and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    }


def restore_layout(model: nn.Module, channels_last: set[str]) -> None:
    """Lay `model` out contiguously, but for these tensors, which lay otherwise before."""
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for name, tensor in _tensors(model):
        if name in channels_last:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def in_float32(answers: Any) -> Any:
    """A model's answers in full precision, also where they are several in a tuple or a dict."""
    return tree_map(lambda part: part.float() if isinstance(part, Tensor)
                    and part.is_floating_point() else part, answers)


def autocast(device: torch.device | str, precision: str = "auto") -> torch.autocast:
    """Mixed precision as a context: bfloat16 where the device has it, under "auto" or "bf16".

    Raises:
        InputError: an unknown precision, or "bf16" on a device that does not have it.
    """
    if precision not in PRECISIONS:
        raise InputError(f"Expected a precision among {PRECISIONS}, came {precision!r}.")
    native = has_native_bf16(device)
    if precision == "bf16" and not native:
        raise InputError(
            f'precision="bf16" needs a device with native bfloat16, which {device} is not. '
            'Use "auto" or "fp32".'
        )
    enabled = native and precision != "fp32"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)
