"""Which arithmetic a device is good at."""

from __future__ import annotations

import torch

from patrol_prune.errors import InputError

PRECISIONS = ("auto", "fp32", "bf16")


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
