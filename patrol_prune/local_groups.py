"""Channel groups of the parts of a model, where those of the whole cannot be followed.

Torch-Pruning follows channels through the whole model. On some networks that fails: window
attention makes its index lists explode, say. Then the outermost sub-modules on which it works are
traced, each on the input it was seen to get, all in one graph. Channels that begin and end inside
such a part can be removed. Those that leave it, and layers in no part, stay whole and are listed.

Nothing is taken on trust: a part counts only if removing channels from a copy of it gives what
zeros in their place give.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from patrol_prune._tp import (
    ExplodingGroupsError,
    bounded_enumeration,
    leaves,
    pruning_group,
    run_part,
    to_plain,
    traced,
)
from patrol_prune.attention_heads import HeadLinear
from patrol_prune.errors import UnsupportedModelError
from patrol_prune.groups import CONV, ChannelGroup
from patrol_prune.prunable import follow_widths, preserved

_WEIGHTED = (CONV, nn.Linear)
_TOLERANCE = 1e-4
_MOST_ALONE = 32
_MOST_TRIALS = 32
Forward = Callable[[nn.Module, Any], Any]


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
        names, right = _removed(part, x, None)
        if right and names:
            return {}
        if not names:
            raise UnsupportedModelError("none of its channels begin and end inside it")
        alone = names if one_by_one and len(names) <= _MOST_ALONE else []
        bad = {name: CHANGES for name in alone if not _removed(part, x, {name})[1]}
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


CHANGES = "removing channels changes more than these channels"


def changing_more(
    model: nn.Module, example_inputs: Any, forward_fn: Forward, traced_by: Forward
) -> set[str]:
    """The groups whose removal changes more than their channels, found by trying.

    All are removed from a copy of the model; where that goes wrong, halves are tried alone. After
    many trials what is undecided counts as wrong.

    Args:
        model: left as found.
        example_inputs: what it takes.
        forward_fn: `forward_fn(model, example_inputs)`.
        traced_by: likewise, for Torch-Pruning's graph.
    """
    trials = itertools.count()

    def right(names: list[str] | None) -> tuple[list[str], bool]:
        return _removed(model, example_inputs, names, run=traced_by, call=forward_fn)

    def search(names: list[str]) -> set[str]:
        if len(names) <= 1 or next(trials) >= _MOST_TRIALS:
            return set(names)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        wrong = [half for half in halves if not right(half)[1]]
        found = {name for half in wrong for name in search(half)}
        return found or set(names)  # each half alone is right, and both together are not

    names, fine = right(None)
    return set() if fine else search(names)


def _call_with_a_copy(part: nn.Module, x: Tensor) -> Any:
    return part(x.clone())


def _removed(
    part: nn.Module, inputs: Any, names: Container[str] | None, *, run: Forward = run_part,
    call: Forward = _call_with_a_copy,
) -> tuple[list[str], bool]:
    """The groups removed from a copy, and whether that gave what zeros at their consumers give.

    Args:
        names: only these groups, or all that neither leave the part nor are blocked.
        run: the forward that Torch-Pruning traces.
        call: the forward that is compared.
    """
    twin, inputs = _twin(part), tree_map(_as_float, inputs)
    graph = traced(twin, inputs, run)
    layers: dict[Any, str] = {m: n for n, m in twin.named_modules()}
    with bounded_enumeration(twin):
        found = [
            (to_plain(raw, graph, layers), leaves(raw))
            for raw in graph.get_all_groups(ignored_layers=[])
        ]
    groups = [
        g for g, outside in found
        if not outside and g.blocked is None and not g.normalised
        and (names is None or g.name in names)
    ]  # fmt: skip
    tried = [g.name for g in groups]
    removals = [(g, gone) for g in groups if len(gone := _some_channels(g))]
    with torch.no_grad():
        for group, gone in removals:
            _zero_consumers(group, gone)
        expected = call(twin, inputs)
        try:
            for group, gone in removals:
                pruning_group(graph, group.members[0].module, gone.tolist()).prune()
            follow_widths(twin)
            got = call(twin, inputs)
        except (RuntimeError, IndexError, ValueError, AssertionError):
            return tried, False
    return tried, _alike(got, expected)


def _as_float(value: Any) -> Any:
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().float() if is_floating else value


def _alike(got: Any, expected: Any) -> bool:
    """Whether two outputs are the same up to rounding."""
    first, second = ([v for v in tree_leaves(value) if isinstance(v, Tensor)]
                     for value in (got, expected))
    return len(first) == len(second) and all(
        a.shape == b.shape
        and torch.allclose(a, b, rtol=0.0, atol=_TOLERANCE * float(b.abs().max()) + 1e-9)
        for a, b in zip(first, second, strict=True)
    )


def _twin(part: nn.Module) -> nn.Module:
    """A float32 copy in evaluation mode, its weights drawn anew so that neither a zero nor a
    signal that dies on the way hides an error."""
    twin = copy.deepcopy(part).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (p for p in twin.parameters() if p.is_floating_point()):
            noise = torch.randn(p.shape, generator=generator).to(p)
            if p.dim() > 1:
                p.copy_(noise * (2.0 / p[0].numel()) ** 0.5)
            else:
                p.add_(0.05 * noise)
        for m in twin.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.reset_running_stats()
    return twin


def _some_channels(group: ChannelGroup) -> Tensor:
    """About half of a group's channels, whole units drawn at random, so that no pattern (the first
    half, every second) passes by luck; at least two units of tied channels stay."""
    units = group.channels // group.tie
    count = units // 2 if group.tie == 1 else max(0, min(units // 2, units - 2))
    generator = torch.Generator().manual_seed(units)
    return group.units(torch.randperm(units, generator=generator)[:count])


def _zero_consumers(group: ChannelGroup, gone: Tensor) -> None:
    """Zero what the consumers' weights make of these channels, and q where it carries masks."""
    for member in group.members:
        if isinstance(member.module, HeadLinear) and member.module.mask_power:
            idxs = member.idxs[torch.isin(member.root_idxs, gone)]
            for parameter in member.module.parameters() if member.direction == "out" else ():
                parameter[idxs] = 0.0
    for member in group.consumers:
        idxs = member.idxs[torch.isin(member.root_idxs, gone)]
        weight, groups = member.module.weight, getattr(member.module, "groups", 1)
        if getattr(member.module, "transposed", False):
            weight[idxs] = 0.0
            continue
        each = member.width // groups
        view = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
        view[idxs // each, :, idxs % each] = 0.0


def _weighted(module: nn.Module) -> int:
    return sum(isinstance(m, _WEIGHTED) for m in module.modules())


def _ancestor(name: str, names: Iterable[str]) -> str | None:
    """The longest of `names` that is `name` or a module around it."""
    around = [n for n in names if n == "" or name == n or name.startswith(f"{n}.")]
    return max(around, key=len, default=None)
