"""The arguments of Torch-Pruning's pruner that a budget leaves open."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from patrol_prune._tp import BasePruner
from patrol_prune.errors import InputError
from patrol_prune.given import (
    check_among,
    check_count,
    check_model,
    check_number,
    check_readable,
    check_split,
    is_number,
)

_DECIDED_BY_THE_BUDGET = ("pruning_ratio", "ch_sparsity", "isomorphic", "global_pruning")
_NOT_SUPPORTED = (
    "pruning_ratio_dict",
    "ch_sparsity_dict",
    "prune_num_heads",
    "head_pruning_ratio",
    "head_pruning_ratio_dict",
)


def check_pruner(
    model: object, split: object, importance: object, boundary: object, steps: object, reg: object
) -> None:
    """Refuse a pruner's arguments that are something else.

    Raises:
        InputError: see `PatrolPruner`.
    """
    check_split(split)
    check_model(model, "model")
    check_readable(model)  # type: ignore[arg-type]
    if getattr(split, "model", None) is not model:
        raise InputError(
            "Expected a split of this model, came one of another model. Give split.model, which is "
            "the model without a wrapper such as DataParallel."
        )
    check_among(boundary, "boundary", ("keep", "prune"))
    if isinstance(importance, type) or not callable(importance):
        raise InputError(
            f"Expected importance as an object that scores groups, came {importance!r}. Make one: "
            "PatrolImportance(objective), or torch_pruning.importance.GroupTaylorImportance()."
        )
    check_count(steps, "iterative_steps", 1)
    check_number(reg, "reg")


def checked_score(importance: Any, scored: Callable[[], Any]) -> Tensor | None:
    """The scores of one group, `[C]`, or None where the importance has none.

    Raises:
        InputError: the importance failed, or gave something else.
    """
    name = type(importance).__name__
    try:
        score = scored()
    except (AttributeError, KeyError, TypeError, ArithmeticError, IndexError) as error:
        raise InputError(
            f"The importance {name} failed on a group ({type(error).__name__}: {error}). One that "
            "reads gradients needs loss.backward() before the step, one that reads activations or "
            "covariances what its documentation says."
        ) from error
    if score is None or (isinstance(score, Tensor) and score.dim() == 1):
        return score
    came = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
    raise InputError(f"Expected of the importance {name} a tensor [C] of scores for a group, or "
                     f"None, came {came}. Give one number per channel of group[0].")


def check_schedule(ratios: Any, steps: int, target: float) -> list[float]:
    """What a schedule of pruning ratios gave: the start and one for every step.

    It is followed as it is up to the last step, which goes to the `target` by itself.
    """
    values = list(ratios) if isinstance(ratios, Iterable) else []
    used = values[: steps + 1]
    if len(used) <= steps or not all(is_number(r) and math.isfinite(r) for r in used):
        raise InputError(
            f"Expected of iterative_pruning_ratio_scheduler {steps + 1} finite numbers, the start "
            f"and one for each of {steps} steps, came {ratios!r}."
        )
    beyond = [float(r) for r in used[1:-1] if float(r) > target + 1e-6]
    if beyond:
        warnings.warn(
            f"iterative_pruning_ratio_scheduler goes to {max(beyond):.4g} before the last step, "
            f"and the budget takes {target:.4g} of the edge's MACs: the edge ends below it. Stay "
            "within the ratio that it is called with.", stacklevel=3)
    return [float(r) for r in used]


def with_owners(layers: Sequence[nn.Module | nn.Parameter], model: nn.Module) -> set[int]:
    """The ids of the layers, and of those that hold one of the parameters: pruning makes new ones.
    """
    ids = {id(layer) for layer in layers}
    return ids | {id(m) for m in model.modules() for p in m.parameters(recurse=False)
                  if id(p) in ids}


def layers_to_keep(layers: Iterable[object] | None) -> list[nn.Module | nn.Parameter]:
    """`ignored_layers` as a list.

    Raises:
        InputError: something in it is neither a module nor a parameter.
    """
    found = [layers] if isinstance(layers, str) else list(layers or [])
    kept: list[nn.Module | nn.Parameter] = []
    for layer in found:
        if not isinstance(layer, (nn.Module, nn.Parameter)):
            named = f" Give model.get_submodule({layer!r})." * isinstance(layer, str)
            raise InputError(
                f"Expected modules or parameters in ignored_layers, came {layer!r}.{named}")
        kept.append(layer)
    return kept


def _check_kinds(kwargs: dict[str, Any]) -> None:
    roots = kwargs.get("root_module_types")
    if roots is not None and not (isinstance(roots, (list, tuple)) and roots
                                  and all(isinstance(r, type) for r in roots)):
        raise InputError(f"Expected root_module_types as a list of classes, came {roots!r}. Give "
                         "[nn.Conv2d], say.")
    for owner, given in dict(kwargs.get("customized_pruners") or {}).items():
        if not callable(getattr(given, "prune_out_channels", None)):
            raise InputError(f"Expected customized_pruners to map {owner!r} to an object with "
                             f"prune_out_channels, as Torch-Pruning's pruners, came {given!r}.")
    unwrapped = kwargs.get("unwrapped_parameters") or ()
    pairs = _pairs(unwrapped)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise InputError("Expected unwrapped_parameters as pairs of a parameter and the dimension "
                         f"that is pruned, came {type(unwrapped).__name__}. Give "
                         "[(model.scale, 0)], say.")


def _pairs(unwrapped: Any) -> list[Any]:
    """Parameters with the dimension that is pruned; Torch-Pruning tells of a dictionary of them."""
    return list(unwrapped.items() if isinstance(unwrapped, dict) else unwrapped)


def host_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`BasePruner`'s arguments, with copies of the dictionaries it would write into."""
    known = [*inspect.signature(BasePruner.__init__).parameters, *_DECIDED_BY_THE_BUDGET,
             *_NOT_SUPPORTED]
    for name in kwargs:
        check_among(name, "further arguments", known)
    for name in _NOT_SUPPORTED:
        if kwargs.get(name):
            raise InputError(
                f"{name} has no meaning beside a budget of edge MACs. Leave it out, or name layers "
                "to keep in ignored_layers."
            )
    for name in _DECIDED_BY_THE_BUDGET:
        is_given = kwargs.get(name) is False if name == "global_pruning" else kwargs.get(name)
        if is_given:
            warnings.warn(f"{name} is not used: edge_macs decides.", stacklevel=3)
    _check_kinds(kwargs)
    dropped = (*_DECIDED_BY_THE_BUDGET, *_NOT_SUPPORTED)
    options = {k: v for k, v in kwargs.items() if k not in dropped}
    if options.get("root_module_types") is None:
        options.pop("root_module_types", None)
    if options.get("unwrapped_parameters"):
        options["unwrapped_parameters"] = _pairs(options["unwrapped_parameters"])
    for name in ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups"):
        options[name] = dict(options.get(name) or {})
    return {"forward_fn": None, **options}
