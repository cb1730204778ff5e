"""Taking residual blocks out of the edge, so that they cost nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from patrol_prune.blocks import ResidualBlock, residual_blocks
from patrol_prune.cost import evaluating
from patrol_prune.errors import InputError, UnsupportedModelError, nearest
from patrol_prune.given import check_split
from patrol_prune.lineage import take_out

if TYPE_CHECKING:
    from patrol_prune.split import Split

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-4


def remove_blocks(split: Split, names: Iterable[str]) -> tuple[str, ...]:
    """Replace blocks of the edge by their shortcuts, for good.

    The model equals the one whose blocks' masks are 0; that is checked on the example. The split
    is refreshed, and its `removed_blocks` tell `save` what went. A dependency graph, masks and
    pruners that were made before are stale; parameters that remain are the same objects.

    Args:
        split: the cut model; changed in place, and left as it was if an error is raised.
        names: of `residual_blocks(split.model, split.example_inputs, split=split)`.

    Returns:
        the names of the removed blocks, those inside other ones left out.

    Raises:
        InputError: no such block, one that is not on the edge or has to stay, or nothing with
            weights would be left on the edge.
        UnsupportedModelError: the model does not run without the block, or computes something
            else than it should.
    """
    check_split(split)
    wanted = list(dict.fromkeys([names] if isinstance(names, str) else names))
    if not wanted:
        return ()
    known = residual_blocks(split.model, split.example_inputs, split=split)
    blocks = [_checked(known, name) for name in wanted]
    blocks = [b for b in blocks if not set(b.within) & set(wanted)]
    gone = tuple(b.name for b in blocks)
    substitutes = {path: module for b in blocks for path, module in b.substitutes.items()}
    expected = _without(split, blocks)
    before = {path: split.model.get_submodule(path) for path in substitutes}
    try:
        _put(split.model, substitutes)
        _check(split, gone, expected)
    except BaseException:
        _put(split.model, before)
        split.refresh()
        raise
    live = {id(parameter) for parameter in split.model.parameters()}
    take_out(p for module in before.values() for p in module.parameters() if id(p) not in live)
    at = len(split.pruning_history)
    split.removed_blocks = [*split.removed_blocks, *((name, at) for name in gone)]
    logger.info("removed %d blocks: %s", len(gone), ", ".join(gone))
    return gone


def _checked(known: dict[str, ResidualBlock], name: str) -> ResidualBlock:
    free = [n for n, b in known.items() if b.blocked is None and b.location == "edge"]
    if name not in known:
        raise InputError(f"There is no residual block {name!r}. {nearest(name, free)}")
    block = known[name]
    if block.blocked is not None or block.location != "edge":
        reason = block.blocked or "it is in the cloud"
        raise InputError(
            f"Block {name!r} cannot be removed: {reason}. Removable are "
            f"{', '.join(free) or 'none'}."
        )
    return block


def _put(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
        module.train(model.training)


def _without(split: Split, blocks: list[ResidualBlock]) -> Tensor | None:
    """The edge's feature with these blocks' branches scaled by 0; None if one has no such layer."""
    layers = [b.scaled for b in blocks]
    handles = []
    try:
        for path in layers:
            if path is None:
                return None
            layer = split.model.get_submodule(path)
            handles.append(layer.register_forward_hook(_zeroed))
        return _feature(split)
    finally:
        for handle in handles:
            handle.remove()


def _zeroed(module: nn.Module, args: object, output: object) -> object:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    assert isinstance(output, Tensor)
    return torch.zeros_like(output)


def _feature(split: Split) -> Tensor:
    with evaluating(split.model), evaluating(split.edge), torch.no_grad():
        feature: Tensor = split.edge(split.example_inputs[:1])
    return feature


def _check(split: Split, gone: tuple[str, ...], expected: Tensor | None) -> None:
    """The model runs without the blocks, has an edge, and computes what was expected."""
    try:
        split.refresh()
        got = _feature(split)
    except Exception as error:  # the user's own forward may need what is gone
        raise UnsupportedModelError(
            f"{type(split.model).__name__} does not run without {', '.join(gone)}: {error}"
        ) from error
    weights = [p for m in split.edge_layers.values() for p in m.parameters() if p.dim() > 1]
    if not weights:
        raise InputError(
            f"Nothing with weights would be left on the edge without {', '.join(gone)}. Keep one "
            "of these blocks."
        )
    scale = 1.0 if expected is None else max(1.0, float(expected.abs().max()))
    if expected is not None and not torch.allclose(
        got, expected, rtol=0.0, atol=_TOLERANCE * scale, equal_nan=True
    ):
        raise UnsupportedModelError(
            f"Without {', '.join(gone)} the model computes something else than with these "
            "branches scaled by 0 (a forward that asks what its modules are does this, or "
            "arithmetic in place on a shared value). Leave these blocks in."
        )
