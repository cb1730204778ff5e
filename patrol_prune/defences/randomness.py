"""Uploads that draw random numbers, also in evaluation mode."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import torch
from torch import Tensor, nn


class RandomUpload(nn.Module):
    """A module with a generator of its own; the global ones stay untouched.

    Every forward pass draws anew, in training and in evaluation mode. The generator's state is
    part of `state_dict` (a byte tensor), so that a resumed training draws what an uninterrupted
    one would have. A deep copy or a pickle starts a stream of its own: a copy never repeats the
    draws of the original, which would tell an attacker the victim's noise.

    Args:
        seed: of the generator.

    Attributes:
        silent: True switches the randomness off, for what the feature would be without it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.silent = False
        self._generator = torch.Generator().manual_seed(seed)
        self._copies = 0

    def generator(self, device: torch.device) -> torch.Generator:
        """The module's generator on the CPU; elsewhere one that it has seeded for this call."""
        if device.type == "cpu":
            return self._generator
        seed = int(torch.randint(2**62, (), generator=self._generator))
        return torch.Generator(device).manual_seed(seed)

    def reseed(self, seed: int | None = None) -> None:
        """Draw from here on by another seed, the system's own entropy where none is given.

        Devices that load one file draw alike, and whoever has the file knows what: call this on
        each before it sends.
        """
        self._generator.manual_seed(secrets.randbits(63) if seed is None else seed)

    def get_extra_state(self) -> Tensor:
        """The generator's state, uint8."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on drawing from a saved state."""
        self._generator.set_state(state.detach().cpu())

    def __getstate__(self) -> dict[str, Any]:
        self._copies += 1
        state = bytes(self._generator.get_state().tolist()) + self._copies.to_bytes(8, "big")
        seed = int.from_bytes(hashlib.sha256(state).digest()[:7], "big")
        fresh = {"_generator": torch.Generator().manual_seed(seed), "_copies": 0}
        return {**self.__dict__, **fresh}
