"""Frozen dataclasses from plain data, as it stands in a file or came from a command line."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from patrol_prune.errors import InputError, nearest

Config = TypeVar("Config")
_PATHS = ("data", "runs", "weights", "out", "undefended", "shifted", "storage")


def build(
    kind: type[Config], values: Mapping[str, Any], where: str, group: str = ""
) -> Config:
    """A (nested) dataclass from plain data, `~` expanded in paths.

    Args:
        kind: the dataclass.
        values: its fields.
        where: they come from.
        group: the dotted setting that they are the fields of, for errors.

    Raises:
        InputError: an unknown key, a missing one, or a value of the wrong type; `where` is named.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise InputError(f"{where} has an unknown setting {key!r}. {nearest(key, fields)}")
    required = [
        n for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [n for n in required if n not in values]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}.")
    typed = {k: _typed(hints[k], v, f"{where}: {k}") for k, v in values.items()}
    for name in _PATHS:
        if isinstance(typed.get(name), str):
            typed[name] = os.path.expanduser(typed[name])
    try:
        return kind(**typed)
    except InputError as error:
        named = set(re.findall(rf"\b({'|'.join(fields)})\b", str(error))) if group else set()
        if not named or f"{group}." in str(error):
            raise
        whose = f"{group}.{named.pop()}" if len(named) == 1 else group
        raise InputError(f"{whose}: {error}") from error


def _typed(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, where, where.rpartition(": ")[2])  # type: ignore[arg-type]
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _typed(next(a for a in get_args(hint) if a is not type(None)), value, where)
    if origin is Literal:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(get_args(hint)[0], v, where) for v in value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.I):
        return float(value)  # YAML takes 1e-3, without a point, for text
    if hint is bool and isinstance(value, bool):
        return value
    if isinstance(hint, type) and (not isinstance(value, hint) or isinstance(value, bool)):
        raise InputError(f"{where}: expected {hint.__name__}, came {value!r}.")
    return value


def as_plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {k: as_plain(v) for k, v in value.items()}
    return [as_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
