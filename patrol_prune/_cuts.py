"""Where a traced model can be cut, and the parts it falls into.

A value *crosses* a position when it is computed up to there and used after it. Values that do not
depend on the model's input (parameters, tables made from them) never cross: each part of a cut
graph reads them for itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from patrol_prune._trace import Traced, attribute_of, run_on, trace
from patrol_prune.cost import draws_restored, evaluating
from patrol_prune.errors import InputError, UnsupportedModelError, nearest

# Normalisations whose weights may have several dimensions and still mix no features.
_NORMS = (nn.LayerNorm, nn.RMSNorm)
# Torch's own modules of several layers, which a trace takes for one.
_TRANSFORMERS = (nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer,
                 nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# Layers whose multiply-adds are channel pairs times positions; modules of layers, and operators of
# several tensors, that have none.
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_WITHOUT = ("activation", "normalization", "batchnorm", "instancenorm", "pooling", "dropout",
            "padding", "flatten", "upsampling", "channelshuffle", "pixelshuffle")
_OTHERS_WITHOUT = ("LayerNorm2d", "Permute", "StochasticDepth")  # torchvision's
_ELEMENTWISE = ("add", "iadd", "sub", "isub", "mul", "imul", "cat", "concat")


@dataclass(frozen=True)
class Cut:
    """A position in `CutGraph.order` that one floating-point tensor alone crosses.

    Args:
        node: the node whose value crosses.
        position: index of the last node before the cut.
        names: names of the place, the canonical one first.
        feature_shape: shape of the value without the batch dimension.
    """

    node: fx.Node
    position: int
    names: tuple[str, ...]
    feature_shape: tuple[int, ...]


class CutGraph:
    """A traced model with its cuts, shallow to deep.

    Args:
        model: the module to trace; left as found.
        x: one sample `[1, ...]` on the model's device.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        traced: Traced = trace(model, x)
        self.model, self.constants = model, traced.constants
        self.facts, self.names, self.free = traced.facts, traced.names, traced.free
        self.owner, self.calls, self.likeness = traced.owner, traced.calls, traced.likeness
        self.order = list(traced.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.order)}
        self.end = len(self.order) - 1
        self.writers = [i for i, node in enumerate(self.order) if self.facts[node].mutates]
        self.crossings = self._crossings()
        self.cuts = self._cuts()

    def _crossings(self) -> list[list[fx.Node]]:
        """Per position, the values that cross it, oldest first."""
        alive: list[fx.Node] = []
        crossings = []
        last = {n: max((self.index[u] for u in n.users), default=-1) for n in self.order}
        for i, node in enumerate(self.order):
            alive = [n for n in alive if last[n] > i]
            if node not in self.free and last[node] > i:
                alive.append(node)
            crossings.append(alive)
        return crossings

    def _cuts(self) -> list[Cut]:
        cuts: dict[fx.Node, Cut] = {}
        work = [i for i, n in enumerate(self.order[:-1]) if i and n not in self.free]
        for i in work[:-1]:  # after the last one nothing is left to compute
            alive = self.crossings[i]
            if (len(alive) == 1 and alive[0] not in cuts and self._can_cross(alive[0])
                    and i >= self._settled(alive[0])):
                tensor = self.facts[alive[0]].tensor
                assert tensor is not None
                names = self.names[alive[0]]
                cuts[alive[0]] = Cut(alive[0], i, names, tuple(tensor.shape[1:]))
        return list(cuts.values())

    def _settled(self, node: fx.Node) -> int:
        """The position of the last operator that writes into a value inside a module that made and
        returns it; 0 without one."""
        made_in = self.owner.get(node, "")
        paths = {call.path for call in self.calls
                 if call.value is node and f"{made_in}.".startswith(f"{call.path}.")}
        start, last, shared = self.index[node], 0, {node}
        inside = [i for i in self.writers if i > start and any(
            f"{self.owner[self.order[i]]}.".startswith(f"{path}.") for path in paths)]
        for i in range(start + 1, max(inside, default=start) + 1):
            facts = self.facts[self.order[i]]
            if i in inside and facts.mutates & shared:
                last = i
            if facts.aliases & shared:
                shared.add(self.order[i])
        return last

    def _can_cross(self, node: fx.Node) -> bool:
        tensor = self.facts[node].tensor
        if tensor is None or node is self.order[0]:
            return False
        return tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[0] == 1

    def layers(self, start: int, stop: int) -> dict[str, nn.Module]:
        """The layers by name that nodes `start < i <= stop` call or read parameters of."""
        found: dict[str, nn.Module] = {}
        for node in self._needed(start, stop):
            path = str(node.target)
            if node.op == "get_attr" and path not in self.constants:
                path = path.rpartition(".")[0]
            elif node.op != "call_module":
                continue
            module = self.model.get_submodule(path)
            if isinstance(module, _TRANSFORMERS):
                found.update(childless(path, module))
            elif node.op == "call_module" or (path and not list(module.children())):
                found[path] = module
        return found

    def parameters(self, start: int, stop: int) -> dict[int, nn.Parameter]:
        """The distinct parameters that nodes `start < i <= stop` use, by identity."""
        found: dict[int, nn.Parameter] = {}
        for node in self._needed(start, stop):
            value = self.attribute(node) if node.op in ("call_module", "get_attr") else None
            if isinstance(value, nn.Parameter):
                found[id(value)] = value
            elif isinstance(value, nn.Module):
                found.update((id(p), p) for p in value.parameters())
        return found

    def attribute(self, node: fx.Node) -> Any:
        """The module or tensor that a `call_module` or `get_attr` node refers to."""
        path = str(node.target)
        return self.constants[path] if path in self.constants else attribute_of(self.model, path)

    def bears_weights(self, node: fx.Node) -> bool:
        """Whether a node is a layer that mixes features: convolution, linear, attention."""
        if self.facts[node].macs > 0:
            return True
        module = self.attribute(node) if node.op == "call_module" else None
        if not isinstance(module, nn.Module) or isinstance(module, _NORMS):
            return False
        return any(p.dim() > 1 for p in module.parameters())

    def positions(self, stop: int) -> dict[str, int] | None:
        """Layer -> kernel elements times output positions, its multiply-adds per channel pair.

        Of the convolutions and linear layers up to `stop`, where these are all that multiplies:
        None where anything else does, or might, and has to be counted by a run.
        """
        found: dict[str, int] = {}
        for node in self._needed(0, stop):
            module: Any = self.attribute(node) if node.op == "call_module" else None
            if type(module) in _PLAIN:
                pairs = math.prod(module.weight.shape[:2])
                name, macs = str(node.target), self.facts[node].macs
                if macs % pairs:
                    return None
                found[name] = found.get(name, 0) + macs // pairs
            elif self._may_multiply(node):
                return None
        return found

    def _may_multiply(self, node: fx.Node) -> bool:
        """Whether a node that is no plain layer may have multiply-adds; without a doubt, no."""
        if self.facts[node].macs > 0:
            return True
        if node.op in ("call_function", "call_method"):
            name = str(getattr(node.target, "__name__", node.target)).strip("_")
            given: list[fx.Node] = []  # one that is given twice counts twice
            fx.node.map_arg((node.args, node.kwargs), given.append)
            tensors = [n for n in given if self.facts[n].tensor is not None]
            return len(tensors) > 1 and name not in _ELEMENTWISE
        if node.op != "call_module":
            return False
        kind = type(self.attribute(node))
        family, _, module = kind.__module__.rpartition(".")
        known = family == "torch.nn.modules" and module in _WITHOUT
        ours = kind.__module__.startswith("torchvision.") and kind.__name__ in _OTHERS_WITHOUT
        return not (ours or kind is nn.Identity or (known and kind is not nn.MultiheadAttention))

    def chain(self, stop: int) -> list[Cut]:
        """The cuts before `stop` that end a block: the last ones before a weight-bearing layer."""
        ends: list[Cut] = []
        inside = [cut for cut in self.cuts if cut.position < stop]
        following = [*(cut.position for cut in inside[1:]), stop]
        start = 0
        for cut, after in zip(inside, following, strict=False):
            ends_here = self._any_weights(cut.position, after)
            if ends_here and self._any_weights(start, cut.position):
                ends.append(cut)
                start = cut.position
        return ends

    def _any_weights(self, start: int, stop: int) -> bool:
        return any(self.bears_weights(node) for node in self.order[start + 1 : stop + 1])

    def _needed(self, start: int, stop: int) -> list[fx.Node]:
        """Nodes `start < i <= stop` with the input-independent ones they use, and no others."""
        body = [n for n in self.order[start + 1 : stop + 1] if n not in self.free]
        needed, pending = set(body), list(body)
        while pending:
            for used in pending.pop().all_input_nodes:
                if used in self.free and used not in needed:
                    needed.add(used)
                    pending.append(used)
        return sorted(needed, key=self.index.__getitem__)

    def piece(self, start: Cut | None, stop: Cut | None, class_name: str) -> fx.GraphModule:
        """The part of the model from one cut (or its input) to another (or its output).

        It shares the model's layers and parameters. Where one of its operators would write into
        the tensor it is given, it works on a copy.
        """
        first = self.order[0] if start is None else start.node
        begin = 0 if start is None else start.position
        end = self.end if stop is None else stop.position
        graph = fx.Graph()
        env = {first: graph.placeholder(self.order[0].name if start is None else "feature")}
        nodes = self._needed(begin, end)
        if self.writes_into(first, nodes):
            env[first] = graph.call_method("clone", (env[first],))
        for node in nodes:
            env[node] = graph.node_copy(node, env.__getitem__)
        if stop is not None:
            graph.output(env[stop.node])
        root = {
            str(node.target): self.attribute(node)
            for node in nodes
            if node.op in ("call_module", "get_attr")
        }
        part = fx.GraphModule(root, graph, class_name)
        part.training = self.model.training
        return part

    def writes_into(self, value: fx.Node, nodes: Iterable[fx.Node]) -> bool:
        """Whether one of `nodes` writes into the memory of `value`, also through a view."""
        shared = {value}
        for node in nodes:
            facts = self.facts[node]
            if facts.mutates & shared:
                return True
            if facts.aliases & shared:
                shared.add(node)
        return False

    def find(self, at: str) -> Cut:
        """The cut called `at`; the error says what exists or what crosses there."""
        cuts = {name: cut for cut in self.cuts for name in cut.names}
        if at in cuts:
            return cuts[at]
        node = next((n for n, names in self.names.items() if at in names), None)
        canonical = [cut.names[0] for cut in self.cuts]
        if node is None:
            raise InputError(
                f"There is no split point {at!r} in {type(self.model).__name__}. "
                f"{nearest(at, cuts)} split_points(model, example_inputs) lists all "
                f"{len(canonical)}, from {canonical[:1]} to {canonical[-1:]}."
            )
        position = self.index[node]
        before = [c for c in self.cuts if c.position < position][-1:]
        after = [c for c in self.cuts if c.position > position][:1]
        near = " and ".join(repr(c.names[0]) for c in (*before, *after))
        crossing = self.crossings[position]
        what = ", ".join(self._describe(n) for n in crossing)
        if len(crossing) > 1:
            count = {2: "two", 3: "three"}.get(len(crossing), str(len(crossing)))
            reason = f"{count} tensors cross there ({what}), and only one can be uploaded"
        elif self.order[-2] is node or node in self.order[-1].all_input_nodes:
            reason = "it is the model's output, and nothing is left for the cloud"
        else:
            reason = f"no floating-point tensor [N, ...] crosses there ({what})"
        raise InputError(
            f"Cannot split {type(self.model).__name__} at {at!r}: {reason}. "
            + (f"The nearest split points are {near}." if near else "The model has no split point "
               "at all. Hand over halves of your own: Split.from_modules(edge, cloud, x).")
        )

    def _describe(self, node: fx.Node) -> str:
        name = self.names[node][0] if self.names[node] else "the input"
        tensor = self.facts[node].tensor
        return f"{name} {list(tensor.shape) if tensor is not None else '(no tensor)'}"


def childless(prefix: str, part: nn.Module) -> dict[str, nn.Module]:
    """Its layers; attention is one, as in a graph, and not the projection inside it."""
    whole = {m for m in part.modules() if isinstance(m, nn.MultiheadAttention)}
    inside = {child for m in whole for child in m.children()}
    return {
        f"{prefix}.{name}" if name else prefix: module
        for name, module in part.named_modules()
        if module in whole or (next(module.children(), None) is None and module not in inside)
    }


DEFENDED = ("features", "upload")
"""The children of an edge with a defence behind it."""
Parts = Sequence[tuple[nn.Module, CutGraph | None]]
"""Modules one behind the other, each with its cuts, or None where it cannot be traced."""


def parts_of(module: nn.Module, x: Tensor) -> Parts:
    """The module and its cuts; an edge with a defence that cannot be traced, part by part.

    Args:
        module: in the mode in which it is; left as found.
        x: one sample `[1, ...]` on the module's device.
    """
    parts: list[tuple[nn.Module, CutGraph | None]] = []
    with draws_restored(module):
        try:
            return [(module, CutGraph(module, x))]
        except UnsupportedModelError:
            if tuple(name for name, _ in module.named_children()) != DEFENDED:
                return [(module, None)]
        for part in module.children():
            parts += parts_of(part, x)
            with evaluating(part), torch.no_grad():
                x = run_on(part, x.clone())
            if not isinstance(x, Tensor):
                return [(module, None)]
    return parts
