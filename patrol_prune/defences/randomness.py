"""Uploads that draw random numbers, also in evaluation mode."""

from __future__ import annotations

import hashlib
import operator
import secrets
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patrol_prune.errors import InputError

_WORDS = 624
"""32-bit words of a Mersenne Twister's state."""
_OFFSET = 24
"""Bytes before them in the state of torch's generator, which holds each in 64 bits."""
_SEED_BITS = 32
"""What `Generator.manual_seed` looks at on the CPU."""


class RandomUpload(nn.Module):
    """A module with a generator of its own; the global ones stay untouched.

    Every forward pass draws anew, in training and in evaluation mode. The generator's state is
    part of `state_dict` (a byte tensor), so that a resumed training draws what an uninterrupted
    one would have. A deep copy or a pickle starts a stream of its own: a copy never repeats the
    draws of the original, which would tell an attacker the victim's noise.

    The generator is torch's, a Mersenne Twister: good noise, not a cipher. Who sees many of its
    numbers as they are can work out the rest.

    Args:
        seed: of the generator; a whole number of any size, all of it counts.

    Attributes:
        silent: True switches the randomness off, for what the feature would be without it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.silent = False
        self._generator = seeded(seed)
        self._copies = 0

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The module's generator on the CPU; elsewhere one that it has seeded for this call.

        None, torch's global one, for `torch.export`: a file would hold the state of this one, and
        everywhere and after each start draw the same.
        """
        if torch.compiler.is_exporting():
            warnings.warn(
                "The exported program draws from torch's global generator, which begins alike in "
                "every process: call torch.seed() on the device before it sends, or export the "
                "layers before the draw, split.edge.features, and draw there by the system's "
                "entropy.", stacklevel=2)
            return None
        if device.type == "cpu":
            return self._generator
        seed = int(torch.randint(2**62, (), generator=self._generator))
        return torch.Generator(device).manual_seed(seed)

    def reseed(self, seed: int | None = None) -> None:
        """Draw from here on by another seed, 256 bits of the system's entropy where none is given.

        Devices that load one file draw alike, and whoever has the file knows what: call this on
        each before it sends.
        """
        made = filled(secrets.token_bytes(32)) if seed is None else seeded(seed)
        self._generator.set_state(made.get_state())

    def get_extra_state(self) -> Tensor:
        """The generator's state, uint8."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on drawing from a saved state."""
        self._generator.set_state(state.detach().cpu())

    def __getstate__(self) -> dict[str, Any]:
        self._copies += 1
        state = self._generator.get_state().numpy().tobytes() + self._copies.to_bytes(8, "big")
        return {**self.__dict__, "_generator": filled(state), "_copies": 0}


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU: torch's for seeds of 32 bits, and one in which every bit of a longer
    seed counts, where torch's forgets all but 32.
    """
    try:
        seed = operator.index(seed)
    except TypeError:
        raise InputError(f"Expected a seed as a whole number, came {seed!r}.") from None
    if 0 <= seed < 2**_SEED_BITS:
        return torch.Generator().manual_seed(seed)
    return filled(f"seed {seed}".encode())


def filled(key: bytes) -> torch.Generator:
    """A generator on the CPU whose whole state comes from `key`, by SHAKE-256."""
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    words = np.frombuffer(hashlib.shake_256(key).digest(4 * _WORDS), dtype="<u4").astype("=u8")
    state[_OFFSET : _OFFSET + 8 * _WORDS] = torch.frombuffer(bytearray(words.tobytes()),
                                                             dtype=torch.uint8)
    return generator.set_state(state) or generator
