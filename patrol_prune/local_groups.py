"""Channel groups of the parts of a model, where those of the whole cannot be followed.

Torch-Pruning follows channels through the whole model. On some networks that fails: window
attention makes its index lists explode, say. Then the outermost sub-modules on which it works are
traced, each on the input it was seen to get, all in one graph. Channels that begin and end inside
such a part can be removed. Those that leave it, and layers in no part, stay whole and are listed.

Nothing is taken on trust: a part counts only if removing channels from a copy of it gives what
zeros in their place give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patrol_prune._tp import ExplodingGroupsError, run_part
from patrol_prune.errors import UnsupportedModelError
from patrol_prune.groups import CONV, ChannelGroup
from patrol_prune.prunable import preserved
from patrol_prune.trial import CHANGES, removed

_WEIGHTED = (CONV, nn.Linear)
_MOST_ALONE = 32


@dataclass(frozen=True)
class Parts:
    """The parts of a model that are followed, and what is not.

    Args:
        names: of the parts, sub-modules of the model; none holds another.
        blocked: root layer inside a part -> why its group stays whole.
        failures: module that cannot be followed as a whole -> why; "" is the model.
    """

    names: tuple[str, ...]
    blocked: Mapping[str, str]
    failures: Mapping[str, str]

    def reason_to_keep(self, group: ChannelGroup, leaves_part: bool) -> str | None:
        """Why a group of one of the parts stays whole, or None."""
        part = _ancestor(group.name, self.names)
        if leaves_part:
            return f"its channels leave {part!r}; {self._why(part or '')}"
        if group.normalised:
            return f"{group.normalised[0]!r} normalises over its channels"
        if group.crossing is not None:
            return f"it crosses the split inside {part!r}, and {self._why(part or '')}"
        return self.blocked.get(group.name)

    def left_out(self, model: nn.Module, groups: Iterable[ChannelGroup]) -> dict[str, str]:
        """Convolutions and linear layers whose output channels are in no group -> why."""
        held = {m.layer_name for g in groups for m in g.members if m.direction != "in"}
        return {
            name: self._why(name)
            for name, module in model.named_modules()
            if isinstance(module, _WEIGHTED) and name not in held
        }

    def _why(self, name: str) -> str:
        """The innermost module around `name` that cannot be followed, with its reason."""
        around = _ancestor(name, [n for n in self.failures if n != name]) or ""
        what = repr(around) if around else "the whole model"
        return f"{what} cannot be followed: {self.failures.get(around, 'unknown')}"


class RunParts:
    """Torch-Pruning's `forward_fn`: runs every part on the input it was seen to get."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self.inputs = dict(inputs)

    def __call__(self, model: nn.Module, example_inputs: Any) -> list[Tensor]:
        return [run_part(model.get_submodule(name), x) for name, x in self.inputs.items()]

    def transformed(self, transform: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Torch-Pruning's `output_transform`: none, as the model's own output is not there."""
        return list


def find_parts(
    model: nn.Module, run: Callable[[nn.Module], Any], failure: str
) -> tuple[Parts, RunParts]:
    """The outermost sub-modules that can be followed, and the forward that traces them.

    Args:
        model: left as found.
        run: calls the model on its example inputs.
        failure: why the whole model cannot be followed.
    """
    inputs = _inputs_of_modules(model, run)
    names: list[str] = []
    blocked: dict[str, str] = {}
    failures = {"": failure}
    exploded: dict[object, ExplodingGroupsError] = {}

    def attempt(name: str, child: nn.Module) -> dict[str, str]:
        if name not in inputs:
            raise UnsupportedModelError("it does not map one tensor to one, once")
        likeness = _likeness(child, inputs[name])
        if likeness in exploded:  # most blocks of a stage are alike, and each takes seconds
            raise exploded[likeness]
        innermost = all(_weighted(c) < 2 for c in child.children())
        try:
            return _try(child, inputs[name], one_by_one=innermost)
        except ExplodingGroupsError as error:
            exploded[likeness] = error
            raise

    def visit(prefix: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            name = f"{prefix}.{child_name}" if prefix else child_name
            if _weighted(child) < 2:
                continue
            try:
                found = attempt(name, child)
            except UnsupportedModelError as error:
                failures[name] = str(error)
                visit(name, child)
            else:
                names.append(name)
                blocked.update({f"{name}.{root}": why for root, why in found.items()})

    visit("", model)
    runner = RunParts({name: inputs[name] for name in names})
    return Parts(tuple(names), blocked, failures), runner


def _likeness(module: nn.Module, x: Tensor) -> object:
    """What two modules have in common whose channels are followed alike."""
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return repr(module), shapes, tuple(x.shape)


def _inputs_of_modules(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Input of every module that is called once, with one floating tensor, and returns one."""
    seen: dict[str, Tensor | None] = {}
    handles = []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            single = len(args) == 1 and not kwargs and isinstance(output, Tensor)
            plain = single and isinstance(args[0], Tensor) and args[0].is_floating_point()
            seen[name] = args[0].detach() if plain and name not in seen else None

        return hook

    for name, module in model.named_modules():
        if name and _weighted(module) >= 2:
            handles.append(module.register_forward_hook(record(name), with_kwargs=True))
    try:
        with preserved(model), torch.no_grad():
            model.eval()
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: x for name, x in seen.items() if x is not None}


def _try(part: nn.Module, x: Tensor, *, one_by_one: bool) -> dict[str, str]:
    """Groups of a part that cannot be removed -> why.

    Args:
        part: left as found.
        x: what it takes.
        one_by_one: where removing all groups together goes wrong, try each on its own.

    Raises:
        UnsupportedModelError: the part cannot be followed.
    """
    try:
        names, right = removed(part, x, None)
        if right and names:
            return {}
        if not names:
            raise UnsupportedModelError("none of its channels begin and end inside it")
        alone = names if one_by_one and len(names) <= _MOST_ALONE else []
        bad = {name: CHANGES for name in alone if not removed(part, x, {name})[1]}
        if not bad or len(bad) == len(names):
            raise UnsupportedModelError(CHANGES)
        return bad
    except UnsupportedModelError:
        raise
    except Exception as error:  # a graph that was read wrongly fails in many ways
        raise UnsupportedModelError(failed(error)) from error


def failed(error: Exception) -> str:
    """A reason that names an error from inside Torch-Pruning or the model."""
    line = (str(error).splitlines() or [""])[0]
    return f"Torch-Pruning fails on it ({type(error).__name__}: {line})"


def _weighted(module: nn.Module) -> int:
    return sum(isinstance(m, _WEIGHTED) for m in module.modules())


def _ancestor(name: str, names: Iterable[str]) -> str | None:
    """The longest of `names` that is `name` or a module around it."""
    around = [n for n in names if n == "" or name == n or name.startswith(f"{n}.")]
    return max(around, key=len, default=None)
