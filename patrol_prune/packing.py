"""A rounded upload as the bytes that are sent, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patrol_prune._programs import name_of
from patrol_prune.defences.quantisation import Quantiser
from patrol_prune.errors import InputError
from patrol_prune.given import check_count, check_split
from patrol_prune.split import Split

_MOST_BITS = {"bfloat16": 6, "float16": 9}
_OFF, _OFF_IN_HALF = 0.01, 0.25
"""How far from a whole step a value may lie, in steps; 16-bit numbers are rounded too."""


@dataclass(frozen=True)
class UploadFormat:
    """How the values of an edge that rounds what it uploads become bytes::

        q = round(z / scale) + zero_point,   z = (q - zero_point) * scale

    `q` has `bits` bits. An upload is its values in the order of the flattened feature, each from
    its highest bit on, without gaps, and zeros up to a whole byte at the end.

    Args:
        bits: of a value, 1 to 16.
        shape: of the feature of one picture.
        dimension: which of `[N, *shape]` holds the channels.
        scale: the step of each channel.
        zero_point: what stands for 0 in each.
        dtype: of the feature; bfloat16 tells 6 bits apart, float16 9.

    Raises:
        InputError: numbers that do not fit each other.
    """

    bits: int
    shape: tuple[int, ...]
    dimension: int
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_count(self.bits, "bits", 1)
        check_count(self.dimension, "dimension", 1)
        for name in ("shape", "scale", "zero_point"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        channels = dict(enumerate(self.shape, 1)).get(self.dimension)
        if self.bits > 16 or not len(self.scale) == len(self.zero_point) == channels:
            raise InputError(
                "Expected at most 16 bits, and a scale and a zero_point for each index of the "
                f"dimension, came {self.bits} bits, dimension {self.dimension} of {self.shape}, "
                f"{len(self.scale)} scales and {len(self.zero_point)} zero points.")
        if self.bits > _MOST_BITS.get(self.dtype, 16):
            raise InputError(f"Expected at most {_MOST_BITS[self.dtype]} bits in {self.dtype}, "
                             f"which cannot hold {self.bits}. Round to fewer, or give the model "
                             "in float32.")
        if not all(0 < step < math.inf for step in self.scale):
            raise InputError("Expected finite scales above 0, came others. A defence has to be "
                             "applied with calibration=, or a saved split loaded.")

    @classmethod
    def of(cls, split: Split) -> UploadFormat:
        """That of a split whose edge rounds last of all.

        Raises:
            InputError: it does not.
        """
        check_split(split)
        last = split.behind.get("upload")
        if not isinstance(last, Quantiser):
            raise InputError(
                "Expected a split whose edge rounds what it uploads, last of all, came one whose "
                f"defence is {getattr(split.defence, 'name', None)!r}. Apply "
                'pp.make_defence("quantisation", 4), or load a split that was saved with it.')
        return cls(last.levels.bit_length(), tuple(split.feature_shape), last.dim,
                   tuple(last.scale.tolist()), tuple(last.zero_point.tolist()),
                   name_of(split.example_inputs.dtype))

    @classmethod
    def from_about(cls, about: Mapping[str, Any]) -> UploadFormat:
        """That of an export, from its `about.json`.

        Raises:
            InputError: the edge there does not round what it uploads.
        """
        try:
            sent = about["edge"]["output"]
            told = sent["rounded"]
            return cls(told["bits"], tuple(sent["shape"][1:]), told["dimension"], told["scale"],
                       told["zero_point"], sent["dtype"])
        except (KeyError, TypeError) as error:
            raise InputError(
                "Expected what about.json says of an edge that rounds what it uploads, with "
                f"edge.output.rounded, came something without ({error}). Export such a split "
                "again, if an earlier release wrote the folder.") from error

    @property
    def upload_bytes(self) -> int:
        """Of one upload."""
        return math.ceil(math.prod(self.shape) * self.bits / 8)

    def to_dict(self) -> dict[str, Any]:
        """As `about.json` has it, but for shape and type, which stand beside it there."""
        plain = {name: list(value) if isinstance(value, tuple) else value
                 for name, value in asdict(self).items() if name not in ("shape", "dtype")}
        return {**plain, "bytes": self.upload_bytes}

    def pack(self, z: Tensor) -> list[bytes]:
        """Features `[N, *shape]` of such an edge, as the bytes of each.

        Raises:
            InputError: another shape, or values that such an edge does not send.
        """
        if not isinstance(z, Tensor) or tuple(z.shape[1:]) != self.shape:
            came = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise InputError(f"Expected features [N, {', '.join(map(str, self.shape))}] as a "
                             f"tensor, came {came}.")
        scale, zero = self._each()
        steps = z.detach().cpu().double() / scale + zero
        whole = steps.round()
        most = _OFF_IN_HALF if z.dtype in (torch.float16, torch.bfloat16) else _OFF
        if not bool(((steps - whole).abs() <= most).all() and (whole >= 0).all()
                    and (whole < 2**self.bits).all()):
            raise InputError(
                f"Expected features that were rounded to {self.bits} bits as this format says, "
                "came others. Pack what the edge itself uploads, with the format of that edge.")
        places = np.arange(self.bits, dtype=np.int32)[::-1]
        bits = (whole.flatten(1).numpy().astype(np.int32)[..., None] >> places) & 1
        flat = bits.astype(np.uint8).reshape(len(z), math.prod(self.shape) * self.bits)
        packed = np.packbits(flat, axis=1)
        return [row.tobytes() for row in packed]

    def unpack(self, uploads: Sequence[bytes]) -> Tensor:
        """What the edge uploaded, `[N, *shape]` of its type, from the bytes of each.

        Raises:
            InputError: no upload, or one of another length.
        """
        if isinstance(uploads, bytes | bytearray | str) or not uploads or any(
                len(upload) != self.upload_bytes for upload in uploads):
            raise InputError(f"Expected a list of uploads of {self.upload_bytes} bytes each, came "
                             "something else. Give [upload] for one alone.")
        count = math.prod(self.shape)
        rows = np.frombuffer(b"".join(uploads), np.uint8).reshape(len(uploads), -1)
        bits = np.unpackbits(rows, axis=1, count=count * self.bits)
        weights = 1 << np.arange(self.bits, dtype=np.int32)[::-1]
        whole = torch.from_numpy(bits.reshape(len(uploads), count, self.bits) @ weights)
        scale, zero = self._each()
        return ((whole.view(-1, *self.shape) - zero) * scale).to(getattr(torch, self.dtype))

    def _each(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, to stand beside features, in float64."""
        shape = [-1 if i == self.dimension else 1 for i in range(len(self.shape) + 1)]
        scale, zero = (torch.tensor(values, dtype=torch.float64).view(shape)
                       for values in (self.scale, self.zero_point))
        return scale, zero
