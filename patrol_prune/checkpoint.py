"""Save and load a cut and pruned model: safetensors and JSON, no pickle.

    edge.patrol/  weights.safetensors   every parameter and buffer of the whole model
                  architecture.json     Torch-Pruning's pruning history, the residual blocks that
                                        were removed, the attention whose heads were opened, and
                                        the sizes that led to
                  split.json            where the model is cut, and what goes in
                  manifest.json         the sha256 of the three

`load` builds the dense model from the caller's factory, prunes it and removes blocks in the order
in which that was done, checks every tensor's shape against the file, and only then fills in the
weights. Where no history was recorded, or none that leads there, the layers take the sizes in the
file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from patrol_prune._tp import replay
from patrol_prune.errors import CheckpointError, InputError, PatrolError, UnsupportedModelError
from patrol_prune.given import built_by, check_split
from patrol_prune.group_table import build_graph
from patrol_prune.open_attention import open_as_recorded, opened_attention
from patrol_prune.pixels import Normalization
from patrol_prune.prunable import follow_widths, preserved
from patrol_prune.removal import remove_blocks
from patrol_prune.saved_description import (
    ARCHITECTURE,
    FORMAT,
    SPLIT,
    example_of,
    lay_out,
    normalization_of,
    read_about,
    read_architecture,
    refusal,
)
from patrol_prune.saved_sizes import (
    cast,
    first_answers,
    fits,
    layer_sizes,
    modes,
    put_modes,
    resize,
    same_answers,
    unusual_strides,
)
from patrol_prune.split import Split
from patrol_prune.storage import (
    atomic_directory,
    atomic_write_json,
    atomic_write_text,
    load_state,
    newest_whole,
    read_tensors,
    read_whole,
    save_state,
    to_json,
)

__all__ = [
    "SplitInfo",
    "atomic_directory",
    "atomic_write_json",
    "atomic_write_text",
    "load",
    "load_state",
    "newest_whole",
    "read_info",
    "save",
    "save_state",
]

logger = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
History = list[tuple[str, bool, list[int]]]
ModelFactory = Callable[[], nn.Module | tuple[nn.Module, nn.Module]]


@dataclass(frozen=True)
class SplitInfo:
    """What a saved split says of itself.

    Attributes:
        at: the split point; empty when the halves were handed over as two modules.
        example_shape: of the example input, batch included.
        example_dtype: of the example input, as torch names it (`float32`).
        normalization: between pixels and input, where it was given.
        extra: whatever the caller saved along.
    """

    at: str
    example_shape: tuple[int, ...]
    example_dtype: str
    normalization: Normalization | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def save(
    split: Split,
    path: str | os.PathLike[str],
    *,
    history: Iterable[Sequence[Any]] | None = None,
    normalization: Normalization | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `split` to the directory `path`, whole or not at all; an earlier save is replaced.

    Args:
        split: the model, pruned or not, with its cut.
        path: a directory, `edge.patrol` by custom; a link to one stays a link.
        history: how the model was pruned since it was built, as `pruner.DG.pruning_history()` of
            any Torch-Pruning pruner tells it. Without it, and without one that `PatrolPruner` or
            `load` left on the split, only the sizes of the layers are recorded, which is enough to
            load them.
        normalization: kept for whoever loads, `patrol_prune.checkpoint.read_info(path)` tells it.
        extra: any JSON, likewise.

    Raises:
        InputError: `path` is a file or holds other files, which would go, or `extra` is no JSON.
        UnsupportedModelError: the model's state holds more than tensors.
    """
    check_split(split)
    tensors = _state(split.model)
    steps = history if history is not None else getattr(split, "pruning_history", None) or []
    architecture = {
        "pruning_history": [
            [str(name), bool(is_out), [int(i) for i in indices]] for name, is_out, indices in steps
        ],
        "removed_blocks": [
            [str(name), int(after)] for name, after in getattr(split, "removed_blocks", ())
        ],
        "opened_attention": opened_attention(split.model),
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "layers": layer_sizes(split.model),
        "strides": unusual_strides(split.model),
        "answers": first_answers(split),
    }
    example = _example(split)
    about = {
        "format": FORMAT,
        "at": getattr(split, "at", "") or "",
        "two_modules": _is_pair(split),
        **modes(split.model),
        "example": {"shape": list(example.shape), "dtype": str(example.dtype).rpartition(".")[2]},
        "normalization": None if normalization is None else
        {"mean": list(normalization.mean), "std": list(normalization.std)},
        "extra": dict(extra or {}),
    }
    texts = {ARCHITECTURE: to_json(architecture, ARCHITECTURE), SPLIT: to_json(about, SPLIT)}
    with atomic_directory(path) as directory:
        save_file(tensors, str(directory / WEIGHTS))
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")


def load(
    path: str | os.PathLike[str], model_factory: ModelFactory, *, device: str | torch.device = "cpu"
) -> Split:
    """The split that `save` wrote to `path`, giving the same outputs bit for bit.

    Args:
        path: the directory.
        model_factory: builds the model as it was before any pruning, with any weights; or the
            pair `(edge, cloud)` when the split was made from two modules, or by a defence.
        device: where the weights go.

    Raises:
        InputError: `model_factory` is no function, or builds neither a model nor a pair.
        CheckpointError: a file is missing, torn, changed or odd, or the factory's model is not the
            one that was saved; `path` names the file.
    """
    built = [built_by(model_factory)]
    path = Path(path)
    files = _files(path)
    about = read_about(files[SPLIT], path / SPLIT)
    architecture = read_architecture(files[ARCHITECTURE], path / ARCHITECTURE)
    tensors = read_tensors(files[WEIGHTS], path / WEIGHTS)
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
    put_modes(split.model, about)
    split.model.to(device)
    return split


def read_info(path: str | os.PathLike[str]) -> SplitInfo:
    """What a saved split says of itself, without building a model."""
    place = Path(path) / SPLIT
    about = read_about(_files(Path(path))[SPLIT], place)
    return SplitInfo(
        at=about["at"],
        example_shape=tuple(about["example"]["shape"]),
        example_dtype=about["example"]["dtype"],
        normalization=normalization_of(about, place),
        extra=about["extra"],
    )


def _files(path: Path) -> dict[str, bytes]:
    files = read_whole(path)
    for name in (SPLIT, ARCHITECTURE, WEIGHTS):
        if name not in files:
            raise CheckpointError(
                f"{path} is a checkpoint of another kind: it holds no {name}. Give a directory "
                "written by patrol_prune.save.",
                path=str(path / name),
            )
    return files


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise UnsupportedModelError(
            f"Expected a model whose state is tensors alone, came {odd[0]}, which is "
            f"{type(state[odd[0]]).__name__}. Only tensors are saved; move it to the factory."
        )
    return {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}


def _example(split: Split) -> Tensor:
    example = split.example_inputs
    return example if isinstance(example, Tensor) else example[0]


def _is_pair(split: Split) -> bool:
    return split.edge is getattr(split.model, "edge", None)


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
