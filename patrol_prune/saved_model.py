"""The factory's model, cut, opened, pruned and filled as the files of a saved split tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patrol_prune._tp import replay
from patrol_prune.errors import CheckpointError, InputError, PatrolError
from patrol_prune.given import built_by
from patrol_prune.group_table import build_graph
from patrol_prune.open_attention import open_as_recorded, opened_attention
from patrol_prune.prunable import follow_widths, preserved
from patrol_prune.removal import remove_blocks
from patrol_prune.saved_description import ARCHITECTURE, SPLIT, example_of, lay_out, refusal
from patrol_prune.saved_sizes import cast, fits, resize, same_answers
from patrol_prune.split import Split

WEIGHTS = "weights.safetensors"
History = list[tuple[str, bool, list[int]]]
Built = nn.Module | tuple[nn.Module, nn.Module]
ModelFactory = Callable[[], Built]


def rebuilt(
    first: Built, model_factory: ModelFactory, about: dict[str, Any],
    architecture: dict[str, Any], tensors: dict[str, Tensor], path: Path,
) -> Split:
    """The split that `save` wrote to `path`, of the factory's model.

    Args:
        first: what the factory built when it was asked whether it is one.
        model_factory: as `load` takes it.
        about: what `split.json` says.
        architecture: what `architecture.json` says.
        tensors: the weights.
        path: the directory.

    Raises:
        CheckpointError: the factory's model is not the one that was saved.
    """
    built = [first]
    removed = [(str(name), int(at)) for name, at in architecture.get("removed_blocks", [])]
    split = _pruned(
        lambda: _built(built.pop() if built else built_by(model_factory), about, architecture,
                       tensors, path),
        architecture, removed, tensors, path,
    )
    _fill(split.model, tensors, architecture["strides"], path / WEIGHTS)
    try:
        split.refresh()
    except PatrolError as error:
        raise refusal(path / ARCHITECTURE, f"no model runs with its sizes ({error})") from error
    split.pruning_history = architecture["pruning_history"]
    split.removed_blocks = removed
    return split


def _built(
    built: nn.Module | tuple[nn.Module, nn.Module], about: dict[str, Any],
    architecture: dict[str, Any], tensors: dict[str, Tensor], path: Path,
) -> Split:
    """The factory's model, cut, with the attention opened that the saved one had."""
    example = example_of(about, path / SPLIT)
    units = architecture.get("opened_attention", {})
    _open(built, units if isinstance(units, dict) else dict.fromkeys(units, "heads"), path)
    return _build(built, about, example, tensors, path)


def _pruned(
    make: Callable[[], Split], architecture: dict[str, Any], removed: list[tuple[str, int]],
    tensors: dict[str, Tensor], path: Path,
) -> Split:
    """The dense split brought to the saved shapes: as the history tells it, or by the sizes alone
    where that does not lead there, because another pruner took part that nobody recorded.
    """
    history: History = architecture["pruning_history"]
    failure: CheckpointError | None = None
    if history:
        split = make()
        try:
            _replay(split, history, removed, path)
        except CheckpointError as error:
            failure = error
        if failure is None and fits(split.model, tensors):
            return split
    split = make()
    if removed:
        _replay(split, [], [(name, 0) for name, _ in removed], path)
    resize(split.model, architecture["layers"], tensors)
    if history:
        same = fits(split.model, tensors)
        if same:
            _fill(split.model, tensors, architecture["strides"], path / WEIGHTS)
            same = same_answers(split, architecture.get("answers"))
        if not same:  # another model of the kind, or nobody can tell
            raise failure or CheckpointError(
                f"The factory's model, pruned as {path / ARCHITECTURE} says, is not the one that "
                "was saved. Give the factory of the very model that was saved, before any pruning.",
                path=str(path / ARCHITECTURE),
            )
    return split


def _build(
    built: nn.Module | tuple[nn.Module, nn.Module],
    about: dict[str, Any],
    example: Tensor,
    tensors: dict[str, Tensor],
    path: Path,
) -> Split:
    try:
        if isinstance(built, tuple) and about.get("defences") and not about["two_modules"]:
            raise InputError("Expected a factory that returns the model as it was before its "
                             "defence, which load puts there itself, came two halves.")
        if isinstance(built, tuple):
            for prefix, half in zip(("edge.", "cloud."), built, strict=True):
                cast(half, tensors, prefix)
            return Split.from_modules(*built, example)
        if about["two_modules"]:
            raise InputError(
                "The split was made from two modules: expected a factory that returns the pair "
                f"(edge, cloud), came {type(built).__name__}."
            )
        cast(built, tensors)
        return Split(built, example, at=about["at"])
    except PatrolError as error:
        raise CheckpointError(
            f"The factory's model cannot be cut as {path / SPLIT} says: {error} Give the factory "
            "of the very model that was saved.",
            path=str(path / SPLIT),
        ) from error


def _open(
    built: nn.Module | tuple[nn.Module, nn.Module], units: dict[str, str], path: Path
) -> None:
    """Put the attention with heads of its own where the saved model had it."""
    halves = (("", built),) if isinstance(built, nn.Module) else zip(
        ("edge.", "cloud."), built, strict=True)
    for prefix, half in halves:
        there = opened_attention(half)
        own = {n.removeprefix(prefix): u for n, u in units.items() if n.startswith(prefix)}
        other = next((n for n in own if n in there and there[n] != own[n]), None)
        if other is not None:
            raise CheckpointError(
                f"The factory's model has attention {other!r} that may lose {there[other]}, but "
                f"{path / ARCHITECTURE} tells of one that may lose {own[other]}. Open it with "
                f"unit={own[other]!r}, or leave it to load.", path=str(path / ARCHITECTURE),
            )
        try:
            open_as_recorded(half, {n: u for n, u in own.items() if n not in there})
        except PatrolError as error:
            raise CheckpointError(
                f"The factory's model has not the attention that {path / ARCHITECTURE} tells of: "
                f"{error} Give the factory of the very model that was saved.",
                path=str(path / ARCHITECTURE),
            ) from error


def _replay(split: Split, history: History, removed: list[tuple[str, int]], path: Path) -> None:
    """Prune channels and remove blocks in the order in which that was done."""
    try:
        done = 0
        for at, names in _stages(removed, len(history)):
            if history[done:at]:
                graph = build_graph(split.model, split.example_inputs, tried=False)
                with preserved(split.model), torch.no_grad():
                    replay(graph, history[done:at])
                follow_widths(split.model)
            if names:
                split.refresh()
                remove_blocks(split, names)
            done = at
    except Exception as error:  # a graph of another model fails in many ways
        raise CheckpointError(
            f"The factory's model cannot be pruned as {path / ARCHITECTURE} says "
            f"({type(error).__name__}: {error}). Give the factory of the very model that was "
            "saved, before any pruning.",
            path=str(path / ARCHITECTURE),
        ) from error


def _stages(removed: list[tuple[str, int]], steps: int) -> list[tuple[int, list[str]]]:
    """(length of the history so far, blocks that go then), in order; the whole history last."""
    places = sorted({at for _, at in removed} | {steps})
    return [(at, [name for name, when in removed if when == at]) for at in places]


def _fill(
    model: nn.Module, tensors: dict[str, Tensor], strides: dict[str, list[int]], path: Path
) -> None:
    """Copy the weights in, after names and shapes agree, laid out in memory as they were."""
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        here = tuple(own[name].shape) if name in own else "no such tensor"
        there = tuple(tensors[name].shape) if name in tensors else "no such tensor"
        if here != there:
            raise CheckpointError(
                f"{name}: {there} in {path}, but {here} in the factory's model after pruning. "
                "Give the factory of the very model that was saved.",
                path=str(path),
            )
    lay_out(model, tensors, strides, path.with_name(ARCHITECTURE))
    own.update(tensors)  # keeps the layers' versions, which some of them ask for
    model.load_state_dict(own)
