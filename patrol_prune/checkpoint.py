"""Save and load a cut and pruned model: safetensors and JSON, no pickle.

    edge.patrol/  weights.safetensors   every parameter and buffer of the whole model
                  architecture.json     Torch-Pruning's pruning history, the residual blocks that
                                        were removed, the attention whose heads were opened, and
                                        the sizes that led to
                  split.json            where the model is cut, what goes in, and which defences
                                        stand behind the edge
                  defences.safetensors  where some do: their numbers, steps and draws for example
                  manifest.json         the sha256 of the others

`load` builds the dense model from the caller's factory, prunes it and removes blocks in the order
in which that was done, checks every tensor's shape against the file, and only then fills in the
weights. Where no history was recorded, or none that leads there, the layers take the sizes in the
file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from patrol_prune.defences import Defence
from patrol_prune.errors import CheckpointError, UnsupportedModelError
from patrol_prune.given import built_by, check_kind, check_split
from patrol_prune.open_attention import opened_attention
from patrol_prune.pixels import Normalization
from patrol_prune.saved_defence import (
    chain_of,
    described,
    numbers_of,
    put_behind,
    read_by_halves,
)
from patrol_prune.saved_description import (
    ARCHITECTURE,
    DEFENDED_FORMAT,
    FORMAT,
    SPLIT,
    normalization_of,
    read_about,
    read_architecture,
)
from patrol_prune.saved_model import WEIGHTS, ModelFactory, rebuilt
from patrol_prune.saved_sizes import (
    first_answers,
    layer_sizes,
    modes,
    put_modes,
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

DEFENCES = "defences.safetensors"


@dataclass(frozen=True)
class SplitInfo:
    """What a saved split says of itself.

    Attributes:
        at: the split point; empty when the halves were handed over as two modules.
        example_shape: of the example input, batch included.
        example_dtype: of the example input, as torch names it (`float32`).
        normalization: between pixels and input, where it was given.
        extra: whatever the caller saved along.
        defences: names of those behind the edge, the one next to it first.
    """

    at: str
    example_shape: tuple[int, ...]
    example_dtype: str
    normalization: Normalization | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    defences: tuple[str, ...] = ()


def save(
    split: Split,
    path: str | os.PathLike[str],
    *,
    history: Iterable[Sequence[Any]] | None = None,
    normalization: Normalization | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `split` to the directory `path`, whole or not at all; an earlier save is replaced.

    A defence behind the edge is written with it: how it was made, and its numbers. Where the
    defended split was pruned itself, or its parts were changed, `load` wants both halves.

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
    runs, (split, *defended) = split.model, chain_of(split)
    tensors = _state(split.model)
    for one in defended[:1]:
        tensors |= {k: v for k, v in read_by_halves(one).items() if k in tensors}
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
        "format": DEFENDED_FORMAT if defended else FORMAT,
        "defences": described(defended),
        "at": getattr(split, "at", "") or "",
        "two_modules": _is_pair(split),
        **modes(split.model, runs),
        "example": {"shape": list(example.shape), "dtype": str(example.dtype).rpartition(".")[2]},
        "normalization": None if normalization is None else
        {"mean": list(normalization.mean), "std": list(normalization.std)},
        "extra": dict(extra or {}),
    }
    texts = {ARCHITECTURE: to_json(architecture, ARCHITECTURE), SPLIT: to_json(about, SPLIT)}
    with atomic_directory(path) as directory:
        save_file(tensors, str(directory / WEIGHTS))
        if defended:
            save_file(numbers_of(defended), str(directory / DEFENCES))
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")


def load(
    path: str | os.PathLike[str], model_factory: ModelFactory, *,
    defence: Defence | None = None, device: str | torch.device = "cpu",
) -> Split:
    """The split that `save` wrote to `path`, giving the same outputs bit for bit.

    Its defences stand behind its edge again, `split.undefended` is without. What draws goes on
    where it was: see `RandomUpload.reseed` before a device sends.

    Args:
        path: the directory.
        model_factory: builds the model as it was before any pruning or defence, with any weights;
            or the pair `(edge, cloud)` when the split was made from two modules.
        defence: as it was applied, where it is none of `patrol_prune.defences`.
        device: where the weights go.

    Raises:
        InputError: `model_factory` is no function, or builds neither a model nor a pair.
        CheckpointError: a file is missing, torn, changed or odd, or the factory's model or the
            defence is not the one that was saved; `path` names the file.
    """
    if defence is not None:
        check_kind(defence, "defence", Defence, "Give it as it was applied, or leave it out.")
    first = built_by(model_factory)
    path = Path(path)
    files = _files(path)
    about = read_about(files[SPLIT], path / SPLIT)
    architecture = read_architecture(files[ARCHITECTURE], path / ARCHITECTURE)
    tensors = read_tensors(files[WEIGHTS], path / WEIGHTS)
    split = rebuilt(first, model_factory, about, architecture, tensors, path)
    put_modes(split.model, about)
    split.model.to(device)
    if not about.get("defences") and defence is None:
        return split
    return put_behind(split, about.get("defences", ()), _numbers(files, path), defence,
                      path / SPLIT)


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
        defences=tuple(str(entry["name"]) for entry in about.get("defences", ())),
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


def _numbers(files: dict[str, bytes], path: Path) -> dict[str, Tensor]:
    """Of the defences; none where none stand behind the edge."""
    return read_tensors(files[DEFENCES], path / DEFENCES) if DEFENCES in files else {}


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
