"""What the two JSON files of a saved split say, refused in words where `save` never wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patrol_prune.errors import CheckpointError, InputError
from patrol_prune.pixels import Normalization
from patrol_prune.prunable import WIDTHS
from patrol_prune.saved_sizes import are_ints, live_tensors

FORMAT = "patrol-prune split, version 1"
DEFENDED_FORMAT = "patrol-prune split, version 2"
"""Of a split with defences, which a release that knows version 1 alone would leave out."""
ARCHITECTURE = "architecture.json"
SPLIT = "split.json"
_EARLIER_LACK = ("other_mode", "frozen", "removed_blocks", "opened_attention", "answers",
                 "defences")


def read_about(content: bytes, path: Path) -> dict[str, Any]:
    """What `split.json` says, of whose bytes `path` is the place.

    Raises:
        CheckpointError: it is of another format, or says what `save` does not write.
    """
    about = _parsed(content, path)
    if about.get("format") not in (FORMAT, DEFENDED_FORMAT):
        raise CheckpointError(
            f"Expected {path} to be a {FORMAT}, came {about.get('format')!r}. It was written by "
            "another version; load it there and save it again.",
            path=str(path),
        )
    if (about["format"] == DEFENDED_FORMAT) != bool(about.get("defences")):
        raise refusal(path, f"its format does not go with its defences, "
                            f"{about.get('defences')!r}")
    return _checked(about, _ABOUT, path)


def read_architecture(content: bytes, path: Path) -> dict[str, Any]:
    """What `architecture.json` says; errors as of `read_about`."""
    return _checked(_parsed(content, path), _ARCHITECTURE, path)


def example_of(about: Mapping[str, Any], path: Path) -> Tensor:
    """Zeros like the example input that `split.json` at `path` tells of."""
    example = about["example"]
    try:
        return torch.zeros(example["shape"], dtype=getattr(torch, example["dtype"]))
    except Exception as error:  # torch refuses sizes and types in many ways
        raise refusal(path, f"no tensor can be made of its example {example} ({error})") from error


def normalization_of(about: Mapping[str, Any], path: Path) -> Normalization | None:
    """The normalization that `split.json` at `path` tells of, if any."""
    stats = about["normalization"]
    try:
        return stats and Normalization(tuple(stats["mean"]), tuple(stats["std"]))
    except InputError as error:
        raise refusal(path, str(error)) from error


def lay_out(
    model: nn.Module, tensors: Mapping[str, Tensor], strides: Mapping[str, list[int]], path: Path
) -> None:
    """Have the model's tensors lie in memory as `architecture.json` at `path` says."""
    live = live_tensors(model)
    for name, stride in strides.items():
        try:
            like = tensors[name]
            _refuse_overlap(like.shape, stride)
            live[name].data = torch.empty_strided(like.shape, stride, dtype=like.dtype)
        except Exception as error:  # torch refuses layouts in many ways
            raise refusal(path, f"no {name!r} lies in memory in strides of {stride} ({error})"
                          ) from error


def _refuse_overlap(shape: Sequence[int], strides: Sequence[int]) -> None:
    """A ValueError for strides in which two elements would share their place in memory."""
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError("elements would lie on each other")
        reach += (size - 1) * stride


def _parsed(content: bytes, path: Path) -> dict[str, Any]:
    try:
        told = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise refusal(path, f"it is no JSON ({error})") from error
    if not isinstance(told, dict):
        raise refusal(path, f"it holds a {type(told).__name__} instead of names and values")
    return told


def _checked(
    told: dict[str, Any], checks: Mapping[str, Callable[[Any], bool]], path: Path
) -> dict[str, Any]:
    for key, is_fine in checks.items():
        if key not in told and key not in _EARLIER_LACK:
            raise refusal(path, f"it lacks {key!r}")
        if key in told and not is_fine(told[key]):
            came = repr(told[key])
            raise refusal(path, f"its {key!r} is {came[:80]}{'...' * (len(came) > 80)}")
    return told


def refusal(path: Path, why: str) -> CheckpointError:
    """What to raise where the file at `path` is not as `save` writes it."""
    return CheckpointError(
        f"Expected {path} as patrol_prune.save writes it, but {why}. It was changed; fetch or save "
        "it again.",
        path=str(path),
    )


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _list_of(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(v, kinds) for v in value)


def _rows_of(*columns: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(
        isinstance(row, list) and len(row) == len(columns)
        and all(is_fine(v) for is_fine, v in zip(columns, row, strict=True)) for row in value)


def _named(is_fine: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(is_fine(v) for v in value.values())


def _is_example(value: Any) -> bool:
    return (isinstance(value, dict) and are_ints(value.get("shape"))
            and isinstance(value.get("dtype"), str)
            and isinstance(getattr(torch, value["dtype"], None), torch.dtype))


def _is_normalization(value: Any) -> bool:
    are_numbers = _list_of(int, float)
    return value is None or (isinstance(value, dict) and are_numbers(value.get("mean"))
                             and are_numbers(value.get("std")))


def _are_widths(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key in WIDTHS and isinstance(v, (int, list)) for key, v in value.items())


def _are_defences(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str)
        and isinstance(entry.get("of"), str) and isinstance(entry.get("settings"), dict)
        and isinstance(entry.get("training"), bool)
        and all(_list_of(str)(entry.get(key)) for key in ("other_mode", "frozen"))
        for entry in value)


_ABOUT: dict[str, Callable[[Any], bool]] = {
    "at": _is(str), "two_modules": _is(bool), "training": _is(bool),
    "other_mode": _list_of(str), "frozen": _list_of(str), "example": _is_example,
    "normalization": _is_normalization, "extra": _is(dict), "defences": _are_defences,
}
_ARCHITECTURE: dict[str, Callable[[Any], bool]] = {
    "pruning_history": _rows_of(_is(str), _is(bool), are_ints),
    "removed_blocks": _rows_of(_is(str), _is(int)),
    "opened_attention": lambda value: _named(_is(str))(value) or _list_of(str)(value),
    "layers": _named(_are_widths), "strides": _named(are_ints),
    "answers": lambda value: value is None or _list_of(int, float)(value),
}
