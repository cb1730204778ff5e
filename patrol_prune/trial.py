"""Whether removing channels is what zeros in their place are, tried on a copy of a model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Container
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from patrol_prune._tp import (
    bounded_enumeration,
    leaves,
    pruning_group,
    run_part,
    traced,
    width_of,
)
from patrol_prune.attention_heads import HeadLinear
from patrol_prune.channel_norms import Normalises, channel_norm
from patrol_prune.errors import UnsupportedModelError
from patrol_prune.groups import CHANNEL_NORMS, ChannelGroup, normalises
from patrol_prune.plain_groups import to_plain
from patrol_prune.prunable import follow_widths

__all__ = ["CHANGES", "Forward", "changing_more", "removed"]

Forward = Callable[[nn.Module, Any], Any]
Removal = tuple[ChannelGroup, Tensor, Tensor]
"""A group, its channels that are gone after a round, and those that were gone before it."""
CHANGES = "removing channels changes more than these channels"
_UNDECIDED = "too many trials were needed to tell whether removing channels changes more than these"
_MOST_TRIALS = 32
_TOLERANCE = 1e-4
_ROUNDING = 3e-6
_NUMBERS = 65_537  # drawn once and repeated; a prime, so that no two rows of a weight are alike


def changing_more(
    model: nn.Module, example_inputs: Any, forward_fn: Forward, traced_by: Forward
) -> dict[str, str]:
    """The groups whose removal changes more than their channels -> why they stay, by trying.

    All are removed from a copy of the model; where that goes wrong, halves are tried alone.

    Args:
        model: left as found.
        example_inputs: what it takes.
        forward_fn: `forward_fn(model, example_inputs)`.
        traced_by: likewise, for Torch-Pruning's graph.

    Raises:
        UnsupportedModelError: the model gives something else each time, or nothing to compare.
    """
    trials = itertools.count()

    def right(names: list[str] | None) -> tuple[list[str], bool]:
        return removed(model, example_inputs, names, run=traced_by, call=forward_fn,
                       counting=True)

    def search(names: list[str]) -> dict[str, str]:
        if len(names) <= 1:
            return dict.fromkeys(names, CHANGES)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        found: dict[str, str] = {}
        for half in halves:
            if next(trials) >= _MOST_TRIALS:
                found |= dict.fromkeys(half, _UNDECIDED)
            elif not right(half)[1]:
                found |= search(half)
        # each half alone is right, and both together are not
        return found or dict.fromkeys(names, CHANGES)

    names, fine = right(None)
    return {} if fine else search(names)


def _call(part: nn.Module, x: Tensor) -> Any:
    return part(x)


def removed(
    part: nn.Module, inputs: Any, names: Container[str] | None, *, run: Forward = run_part,
    call: Forward = _call, counting: bool = False,
) -> tuple[list[str], bool]:
    """The groups removed from a copy, and whether that gave what zeros at their consumers give.

    Args:
        names: only these groups, or all that neither leave the part nor are blocked.
        run: the forward that Torch-Pruning traces.
        call: the forward that is compared.
        counting: try the groups of layers that normalise over channels too, with the statistics
            of these layers left out.

    Raises:
        UnsupportedModelError: the part gives something else each time, or nothing to compare.
    """
    attempt = partial(_attempt, part, inputs, run=run, call=call, counting=counting)
    tried, fine = attempt(names, _turns)
    few = {name for name, turns in tried.items() if turns == 1}
    if fine and few:  # of these the last unit has stayed
        fine = attempt(few, _last_alone)[1]
    return [*tried], fine


def _attempt(
    part: nn.Module, inputs: Any, names: Container[str] | None,
    plan: Callable[[ChannelGroup, torch.Generator], list[Tensor]],
    *, run: Forward, call: Forward, counting: bool,
) -> tuple[dict[str, int], bool]:
    """The groups with the number of their turns, and whether all was right; see `removed`.

    Args:
        plan: a group's turns: the channels that are gone after each of them.
    """
    twin, inputs = _twin(part), tree_map(_as_float, inputs)
    graph = traced(twin, tree_map(_copied, inputs), run)
    draws = torch.Generator().manual_seed(0)
    plans = [(g, plan(g, draws)) for g in _open_groups(twin, graph, names, counting)]
    tried = {g.name: len(turns) for g, turns in plans}
    rounds = [[(g, turns[i], turns[i - 1] if i else turns[i][:0])
               for g, turns in plans if i < len(turns)]
              for i in range(max(tried.values(), default=1))]

    def output(other: bool = False) -> list[Tensor]:
        given = tree_map(_moved if other else _copied, inputs)
        return [v for v in tree_leaves(call(twin, given)) if isinstance(v, Tensor)]

    with torch.no_grad():
        wanted = _with_zeros(twin, rounds, output)
        if not any(v.is_floating_point() for v in wanted[0][0]):
            raise UnsupportedModelError("its output holds no numbers to compare")
        for removals, (expected, other) in zip(rounds, wanted, strict=True):
            try:
                for group, gone, before in removals:
                    new = gone[~torch.isin(gone, before)]
                    now = new - torch.searchsorted(before, new)  # by the numbers they have left
                    pruning_group(graph, group.members[0].module, now.tolist()).prune()
                follow_widths(twin)
                got, of_other = output(), output(True)
            except Exception:  # whatever a forward does with widths that it did not expect
                return tried, False
            narrow = all(width_of(g.members[0].module, g.members[0].direction, graph)
                         == g.channels - len(gone) for g, gone, _ in removals)  # fmt: skip
            same = _alike(got, expected, other) and _alike(of_other, other, expected)
            if not (narrow and same):
                if not _alike(output(), got, got):
                    raise UnsupportedModelError("it gives something else each time")
                return tried, False
    return tried, True


def _open_groups(
    twin: nn.Module, graph: Any, names: Container[str] | None, counting: bool
) -> list[ChannelGroup]:
    """The groups that are to be removed; where `counting`, statistics are left out of `twin`."""
    layers: dict[Any, str] = {m: n for n, m in twin.named_modules()}
    with bounded_enumeration(twin):
        found = [
            (to_plain(raw, graph, layers), leaves(raw))
            for raw in graph.get_all_groups(ignored_layers=[])
        ]
    if counting:
        for module in twin.modules():
            norm = channel_norm(module) if isinstance(module, CHANNEL_NORMS) else None
            if norm is not None:
                module.register_forward_hook(partial(_without_statistics, norm.dim))
    return [
        g for g, outside in found
        if not outside and g.blocked is None and not _is_normalised(g, counting)
        and (names is None or g.name in names)
    ]  # fmt: skip


def _with_zeros(
    twin: nn.Module, rounds: list[list[Removal]], output: Callable[[bool], list[Tensor]]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """What zeros at the consumers give after each round, and what of another input; the weights
    come back."""
    weights = [(p, p.clone()) for p in twin.parameters()]
    found = []
    for removals in rounds:
        for group, gone, _ in removals:
            _zero_consumers(group, gone)
        found.append((output(False), output(True)))
    for parameter, weight in weights:
        parameter.copy_(weight)
    return found


def _is_normalised(group: ChannelGroup, counting: bool) -> bool:
    """Whether zeros are no removal of a group, by what its layers divide by or do to it."""
    others = (m for m in group.members
              if not (counting and isinstance(m.module, CHANNEL_NORMS)))
    return bool(group.inexact) or any(normalises(m) for m in others)


def _without_statistics(
    dim: int, module: Normalises, args: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """Forward hook: what a normalisation over channels, at `dim`, makes of each channel alone."""
    if module.weight is None:
        return args[0]
    shape = [1] * output.dim()
    shape[dim] = -1
    bias = 0.0 if module.bias is None else module.bias.view(shape)
    return args[0] * module.weight.view(shape) + bias


def _as_float(value: Any) -> Any:
    return value.detach().float() if _is_feature(value) else value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _moved(value: Any) -> Any:
    """Another input, to see how much the output varies."""
    if not _is_feature(value):
        return value
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(value.shape, generator=generator).to(value)
    return value + noise * (value.abs().mean() + 1e-3)


def _is_feature(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _alike(got: list[Tensor], expected: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two outputs are the same up to rounding and to little of what another input does."""
    if [v.shape for v in got] != [v.shape for v in expected]:
        return False
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if not _is_feature(b):
            continue  # an index or a flag may hang on the last bit
        finite = b[b.isfinite()]
        size = float(finite.abs().max()) if finite.numel() else 0.0
        varies = 0.0
        if i < len(other) and other[i].shape == b.shape and finite.numel():
            varies = float((other[i] - b).nan_to_num(0.0, 0.0, 0.0).abs().max())
        within = _ROUNDING * size + _TOLERANCE * min(varies, size) + 1e-9
        if not torch.allclose(a, b, rtol=0.0, atol=within, equal_nan=True):
            return False
    return True


def _twin(part: nn.Module) -> nn.Module:
    """A float32 copy in evaluation mode without hooks, its weights drawn anew so that neither a
    zero nor a signal that dies on the way hides an error."""
    twin = copy.deepcopy(part).float().eval()
    numbers = torch.randn(_NUMBERS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in (p for p in twin.parameters() if p.is_floating_point()):
            repeated = numbers.to(p.device).repeat(p.numel() // _NUMBERS + 1)
            noise = repeated[: p.numel()].view(p.shape)
            if p.dim() > 1:  # twice He's variance, as half of the inputs go
                p.copy_(noise * (4.0 / p[0].numel()) ** 0.5)
            else:
                p.add_(0.05 * noise)
        for m in twin.modules():
            m._forward_hooks.clear()
            m._forward_pre_hooks.clear()
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.reset_running_stats()
    return twin


def _turns(group: ChannelGroup, draws: torch.Generator) -> list[Tensor]:
    """The channels of a group that are gone after each of two turns, in whole units.

    First the first, by which all others move up; then half of all, the last among them, a quarter
    side by side, so that the rest is not evenly spread, and others drawn at random, so that no
    pattern passes by luck. As many stay as have to, but of two units one goes.
    """
    units = group.channels // group.tie
    beside = units // 4
    drawn = torch.randperm(max(0, units - 2 - beside), generator=draws) + 1 + beside
    order = torch.cat([torch.tensor([0, units - 1]), torch.arange(1, 1 + beside), drawn])
    most = units - min(group.fewest_units, units - 1)
    counts = sorted({min(count, most) for count in (1, max(2, units // 2))})
    return [group.units(order[:count]) for count in counts]


def _last_alone(group: ChannelGroup, draws: torch.Generator) -> list[Tensor]:
    """One turn, in which the last unit goes."""
    return [group.units(torch.tensor([group.channels // group.tie - 1]))]


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
