"""What stands behind the edge of a saved split: which defences, and the numbers they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from patrol_prune._halves import Composed, Follow, OnCopy
from patrol_prune._trace import attribute_of
from patrol_prune.defences import DEFENCES, CemPatrol, Combined, Defence, make_defence
from patrol_prune.errors import CheckpointError, UnsupportedModelError
from patrol_prune.saved_description import refusal
from patrol_prune.saved_sizes import cast, fits, modes, put_modes
from patrol_prune.split import Split

_OURS = "patrol_prune"
_UNTOLD = ("training", "silent")
"""Attributes of a module that are no part of how it was made."""


def chain_of(split: Split) -> list[Split]:
    """The split without a defence, the one with the first defence behind it, and so on to `split`.

    `[split]` where that would not tell all of it: nothing stands behind the edge, what does was
    not put there by a `Defence` or was changed since, or the defended split itself was pruned.
    """
    chain = _all_of(split)
    kept = all(_is_as_made(outer, inner) for inner, outer in pairwise(chain))
    return chain if kept and _would_be_rebuilt(chain) else [split]


def _all_of(split: Split) -> list[Split]:
    """What stands one behind the other, from the split without a defence on."""
    inner = split.undefended
    return [split] if inner is None else [*_all_of(inner), split]


def described(defended: Sequence[Split]) -> list[dict[str, Any]]:
    """Name, settings, origin and modes of each defence of a chain, the one next to the edge first.
    """
    return [{"name": _name_of(one.defence), "settings": _settings_of(one.defence),
             "of": _OURS if _is_ours(one.defence) else type(one.defence).__qualname__,
             **modes(_parts(one))} for one in defended]


def numbers_of(defended: Sequence[Split]) -> dict[str, Tensor]:
    """Every tensor of the defences of a chain, `0.upload.scale` and the like.

    Raises:
        UnsupportedModelError: the state of one holds more than tensors.
    """
    found = {f"{place}.{name}": value for place, one in enumerate(defended)
             for name, value in _parts(one).state_dict().items()}
    odd = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if odd:
        raise UnsupportedModelError(
            f"Expected a defence whose state is tensors alone, came {odd[0]}, which is "
            f"{type(found[odd[0]]).__name__}. Only tensors are saved.")
    return {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}


def read_by_halves(split: Split) -> dict[str, Tensor]:
    """Parameters and buffers that the halves of a defended split read as they are, by their names
    in the model: where the whole was cast, the model's own may be those of before."""
    halves = [m for m in split.model.modules() if isinstance(m, fx.GraphModule)]
    for half in halves:
        for hook in half._forward_pre_hooks.values():
            if isinstance(hook, Follow):  # what was replaced since it ran
                hook(half, (split.example_inputs,))
    return {str(node.target): attribute_of(half, str(node.target)).detach().cpu().contiguous()
            for half in halves
            for node in half.graph.nodes if node.op == "get_attr"
            if isinstance(attribute_of(half, str(node.target)), Tensor)}


def put_behind(
    split: Split, told: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor],
    given: Defence | None, path: Path,
) -> Split:
    """The split with the defences behind its edge that `split.json` at `path` tells of.

    Args:
        split: without them.
        told: what `described` gave.
        tensors: what `numbers_of` gave.
        given: builds them all, where the package does not know them by name.
        path: of the file, for what is said of it.

    Raises:
        CheckpointError: a defence that is not known, other ones than the file's, or other numbers.
    """
    if given is None:
        made = _rebuilt(split, told, path)
    else:
        made = _as_given(split, told, given, path)
    try:
        _fill(made, told, tensors)
    except Exception as error:  # torch refuses numbers in many ways
        raise CheckpointError(
            f"What stands behind the edge is not what {path} and the numbers beside it tell of "
            f"({error}). Give the factory, and where it is your own the defence, that were there "
            "when the split was saved.", path=str(path)) from error
    return made


def _rebuilt(split: Split, told: Sequence[Mapping[str, Any]], path: Path) -> Split:
    for entry in told:
        name = entry["name"]
        if entry["of"] != _OURS or name not in DEFENCES:
            raise CheckpointError(
                f"The split in {path.parent} was saved with the defence {name!r}, which is none of "
                "this package. Give it as defence=, as it was applied (several as one Combined).",
                path=str(path))
        try:
            split = make_defence(name, **entry["settings"]).apply(split)
        except Exception as error:  # settings that nobody saved are refused in many ways
            raise refusal(path, f"no defence is set up so ({error})") from error
    return split


def _as_given(
    split: Split, told: Sequence[Mapping[str, Any]], given: Defence, path: Path
) -> Split:
    parts = given.parts if isinstance(given, Combined) else (given,)
    behind = tuple(p for p in parts if not isinstance(p, CemPatrol))  # that is in the history
    before = {name: value.clone() for name, value in split.model.state_dict().items()}
    made = Combined(behind).apply(split) if behind else split
    first, *defended = _all_of(made)
    came = [(_name_of(one.defence), _unseeded(_settings_of(one.defence))) for one in defended]
    expected = [(str(entry["name"]), _unseeded(entry["settings"])) for entry in told]
    same = fits(split.model, before)
    if same:  # what it did to the weights is in the file already
        split.model.load_state_dict(before)
    if first is not split or came != expected or not same:
        raise CheckpointError(
            f"Expected {_listed(expected)} behind the edge, as {path} tells, came {_listed(came)}. "
            "Give defence= as it was applied before the split was saved, or leave it out where "
            "the file has none.", path=str(path))
    return made


def _fill(made: Split, told: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    """Give the defences their numbers, types and modes; a ValueError where they are others'."""
    for place, (one, entry) in enumerate(zip(_all_of(made)[1:], told, strict=True)):
        parts, prefix = _parts(one), f"{place}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        now = parts.state_dict()
        if not fits(parts, own) or any(
            t.is_floating_point() != now[n].is_floating_point() for n, t in own.items()
        ):
            raise ValueError(f"the {entry['name']} holds other numbers")
        cast(parts, own)
        parts.load_state_dict(own)
        put_modes(parts, entry)
    places = {str(place) for place in range(len(told))}
    if unknown := [name for name in tensors if name.partition(".")[0] not in places]:
        raise ValueError(f"there is no place for {unknown[0]}")


def _is_as_made(split: Split, inner: Split) -> bool:
    """Whether `split` is `inner` with its defence behind it, and nothing else has changed."""
    if not isinstance(split.defence, Defence) or split.pruning_history or split.removed_blocks:
        return False
    edge = getattr(split.model, "edge", nn.Identity())
    cloud = getattr(split.model, "cloud", nn.Identity())
    if [name for name, _ in edge.named_children()] != ["features", "upload"] or (
        edge.upload is not split.behind.get("upload")
    ):
        return False
    if "receive" in split.behind and (
        [name for name, _ in cloud.named_children()] != ["receive", "rest"]
        or cloud.receive is not split.behind["receive"]
    ):
        return False
    if any(is_lazy(p) for p in inner.model.parameters()):  # of a layer that never runs
        return False
    parts = _parts(split)
    wholes = (inner.model, parts, inner.cloud)
    layers = {id(m) for whole in wholes for m in whole.modules()} | {
        id(m) for m in (split.model, edge, cloud) if type(m) in (Composed, nn.Sequential)}
    ours = {id(p) for whole in (inner.model, parts) for p in whole.parameters()}
    return all(id(p) in ours for p in split.model.parameters()) and all(
        id(m) in layers or isinstance(m, (fx.GraphModule, OnCopy)) or type(m) is nn.Module
        for m in split.model.modules())


@torch.no_grad()
def _would_be_rebuilt(chain: Sequence[Split]) -> bool:
    """Whether the settings make what stands there; one of the caller's own he builds himself."""
    modes = [(m, m.training) for m in chain[-1].model.modules()]
    try:
        return all(_makes(outer, inner) for inner, outer in pairwise(chain)
                   if _is_ours(outer.defence))
    finally:
        for module, training in modes:
            module.training = training


def _makes(outer: Split, inner: Split) -> bool:
    """Whether the defence of `outer`, by its settings alone, puts behind `inner` what is there."""
    try:
        made = make_defence(_name_of(outer.defence), **_settings_of(outer.defence)).apply(inner)
    except Exception:  # of settings that are no plain numbers
        return False
    return _alike(_parts(made), _parts(outer))


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether both are made alike, whatever numbers they hold."""
    here, there = dict(one.named_modules()), dict(other.named_modules())
    return here.keys() == there.keys() and fits(one, other.state_dict()) and all(
        type(here[n]) is type(there[n]) and _attributes(here[n]) == _attributes(there[n])
        for n in here)


def _attributes(module: nn.Module) -> dict[str, Any]:
    values = {name: _plain(value) for name, value in vars(module).items()
              if name not in _UNTOLD and not name.startswith("_")}
    return {name: value for name, value in values.items()
            if isinstance(value, (bool, int, float, str, tuple, type(None)))}


def _parts(split: Split) -> nn.ModuleDict:
    """What its own defence put behind the edge, and before the cloud."""
    return nn.ModuleDict(dict(split.behind))


def _is_ours(defence: object) -> bool:
    """Whether the class is one that `make_defence` builds, and not one derived from it."""
    return type(defence) is DEFENCES.get(_name_of(defence))


def _name_of(defence: object) -> str:
    return str(getattr(defence, "name", type(defence).__name__))


def _settings_of(defence: object) -> dict[str, Any]:
    """Those that are plain numbers and words; others, as surrogates, are of its training alone."""
    values = {f.name: _plain(getattr(defence, f.name)) for f in fields(defence)} if is_dataclass(
        defence) and not isinstance(defence, type) else {}
    return {name: v for name, v in values.items() if isinstance(v, (bool, int, float, str))}


def _plain(value: Any) -> Any:
    """NumPy's and torch's numbers as Python's."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _unseeded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Where draws stand is among the numbers; a seed depends on what stands before."""
    return {name: value for name, value in settings.items() if name != "seed"}


def _listed(defences: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    told = [f"{name}({', '.join(f'{k}={v}' for k, v in settings.items())})"
            for name, settings in defences]
    return " + ".join(told) or "no defence"
