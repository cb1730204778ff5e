"""What stands behind the edge of a saved split: which defences, and the numbers they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from patrol_prune.defences import DEFENCES, Defence, make_defence
from patrol_prune.errors import CheckpointError, PatrolError
from patrol_prune.saved_description import refusal
from patrol_prune.saved_sizes import cast, fits, modes, put_modes
from patrol_prune.split import Split


def chain_of(split: Split) -> list[Split]:
    """The split without a defence, the one with the first defence behind it, and so on to `split`.

    `[split]` where that would not tell all of it: nothing stands behind the edge, what does was
    not put there by a `Defence` or was changed since, or the defended split itself was pruned.
    """
    splits = [split]
    while (inner := splits[-1].undefended) is not None:
        if not _is_as_made(splits[-1], inner):
            return [split]
        splits.append(inner)
    return splits[::-1]


def described(defended: Sequence[Split]) -> list[dict[str, Any]]:
    """Name, settings and modes of each defence of a chain, the one next to the edge first."""
    return [{"name": _name_of(split.defence), "settings": _settings_of(split.defence),
             **modes(_parts(split))} for split in defended]


def numbers_of(defended: Sequence[Split]) -> dict[str, Tensor]:
    """Every tensor of the defences of a chain, `0.upload.scale` and the like."""
    return {f"{place}.{name}": value.detach().cpu().contiguous().clone()
            for place, split in enumerate(defended)
            for name, value in _parts(split).state_dict().items()}


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
    names = [str(entry["name"]) for entry in told]
    if given is None:
        for entry in told:
            split = _rebuilt(entry, path).apply(split)
    else:
        split = given.apply(split)
    made = chain_of(split)[1:]
    came = [_name_of(one.defence) for one in made]
    if came != names:
        raise CheckpointError(
            f"Expected {' + '.join(names) or 'no defence'} behind the edge, as {path} tells, came "
            f"{' + '.join(came) or 'none'}. Give defence= as it was applied before the split was "
            "saved, or leave it out where the file has none.", path=str(path))
    for place, (one, entry) in enumerate(zip(made, told, strict=True)):
        parts, prefix = _parts(one), f"{place}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if not fits(parts, own):
            raise CheckpointError(
                f"The {names[place]} behind the edge holds other numbers than {path} tells of. "
                "Give the factory, and where it is your own the defence, that were there when the "
                "split was saved.", path=str(path))
        cast(parts, own)
        parts.load_state_dict(own)
        put_modes(parts, entry)
    return split


def _rebuilt(entry: Mapping[str, Any], path: Path) -> Defence:
    name = str(entry["name"])
    if name not in DEFENCES:
        raise CheckpointError(
            f"The split in {path.parent} was saved with the defence {name!r}, which is none of "
            "this package. Give it as defence=, as it was applied (several as one Combined).",
            path=str(path))
    try:
        return make_defence(name, **entry["settings"])
    except PatrolError as error:
        raise refusal(path, f"no defence is set up so ({error})") from error


def _is_as_made(split: Split, inner: Split) -> bool:
    """Whether `split` is `inner` with its defence behind it, and nothing else has changed."""
    if not isinstance(split.defence, Defence) or split.pruning_history or split.removed_blocks:
        return False
    upload = getattr(getattr(split.model, "edge", None), "upload", None)
    if upload is None or upload is not split.behind.get("upload"):
        return False
    ours = {id(p) for p in chain(inner.model.parameters(), _parts(split).parameters())}
    return all(id(p) in ours for p in split.model.parameters())


def _parts(split: Split) -> nn.ModuleDict:
    """What its own defence put behind the edge, and before the cloud."""
    return nn.ModuleDict(dict(split.behind))


def _name_of(defence: object) -> str:
    return str(getattr(defence, "name", type(defence).__name__))


def _settings_of(defence: object) -> dict[str, Any]:
    """Those that are plain numbers and words; others, as surrogates, are of its training alone."""
    values = {f.name: getattr(defence, f.name) for f in fields(defence)} if is_dataclass(
        defence) and not isinstance(defence, type) else {}
    return {name: v for name, v in values.items() if isinstance(v, (bool, int, float, str))}
