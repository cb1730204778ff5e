"""Everything a training stage needs to go on, as named tensors and JSON; and what it draws."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patrol_prune.errors import CheckpointError
from patrol_prune.surrogate import SurrogateEnsemble


def pack_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, surrogates: SurrogateEnsemble | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, optimiser moments and surrogates as tensors; their scalars as JSON."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    meta: dict[str, Any] = {"optimizer": _pack_optimizer(optimizer, "optimizer", tensors)}
    if surrogates is not None:
        tensors.update({f"surrogates.{k}": v for k, v in surrogates.state_dict().items()})
        meta["surrogate_optimizer"] = _pack_optimizer(
            surrogates.optimizer, "surrogate_optimizer", tensors
        )
    return {k: v.detach().contiguous() for k, v in tensors.items()}, meta


def unpack_state(
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    surrogates: SurrogateEnsemble | None,
    path: str,
) -> None:
    """Put back what `pack_state` took; a checkpoint of another model is refused by name."""
    try:
        if surrogates is not None:
            surrogates.load_state_dict(_below(tensors, "surrogates"))
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint {path} holds surrogates of another architecture, of other settings or "
            f"an earlier release: {error}. Resume with what wrote it, or remove "
            f"{Path(path).parent} to begin this training anew.",
            path=path,
        ) from error
    try:
        model.load_state_dict(_below(tensors, "model"))
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint {path} is of another model: {error}. Resume with the model that "
            "wrote it.",
            path=path,
        ) from error
    _unpack_optimizer(optimizer, "optimizer", tensors, meta["optimizer"])
    if surrogates is not None:
        _unpack_optimizer(
            surrogates.optimizer, "surrogate_optimizer", tensors, meta["surrogate_optimizer"]
        )


def pack_draws(device: torch.device, loaders: Mapping[str, object]) -> dict[str, Tensor]:
    """Where torch's own generators stand, from which dropout and shuffled loaders draw, and those
    that the loaders were given."""
    states = {"draws.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["draws.cuda"] = torch.cuda.get_rng_state(device)
    own = _loader_generators(loaders)
    return {**states, **{f"draws.{name}": g.get_state() for name, g in own.items()}}


def unpack_draws(
    tensors: dict[str, Tensor], device: torch.device, loaders: Mapping[str, object]
) -> None:
    """Put back what `pack_draws` took, as far as it is there."""
    for name, generator in _loader_generators(loaders).items():
        if f"draws.{name}" in tensors:
            generator.set_state(tensors[f"draws.{name}"].cpu())
    if "draws.cpu" in tensors:
        torch.set_rng_state(tensors["draws.cpu"].cpu())
    if "draws.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["draws.cuda"].cpu(), device)


@contextlib.contextmanager
def draws_for(device: torch.device, *who: object) -> Iterator[None]:
    """Inside, torch's own generators draw for `who`, a seed and a name, whatever was drawn before;
    outside, nothing that is drawn inside is missing."""
    digest = hashlib.sha256(repr(who).encode()).digest()
    seed = int.from_bytes(digest[:7], "big")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _loader_generators(loaders: Mapping[str, object]) -> dict[str, torch.Generator]:
    """The generators of each loader and of its samplers, by where they are."""
    found = {}
    for name, loader in loaders.items():
        for path in ("", "sampler", "batch_sampler", "batch_sampler.sampler"):
            holder = loader
            for part in path.split(".") if path else ():
                holder = getattr(holder, part, None)
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                found[".".join(filter(None, (name, path)))] = generator
    return found


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + ".")}


def _pack_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    scalars: dict[str, dict[str, float]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}.{index}.{name}"] = value
            elif value is not None:
                scalars.setdefault(str(index), {})[name] = value
    return scalars


def _unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    prefix: str,
    tensors: dict[str, Tensor],
    scalars: dict[str, dict[str, float]],
) -> None:
    state: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in scalars.items()
    }
    for key, value in _below(tensors, prefix).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    whole = optimizer.state_dict()
    whole["state"] = state
    optimizer.load_state_dict(whole)
