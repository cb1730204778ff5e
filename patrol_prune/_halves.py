"""What two halves are made of that share a model: halves that were given, and reading it again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from patrol_prune._trace import attribute_of
from patrol_prune.errors import InputError


class Composed(nn.Module):
    """Two halves handed over by the user, as one model."""

    def __init__(self, edge: nn.Module, cloud: nn.Module) -> None:
        super().__init__()
        if not (isinstance(edge, nn.Module) and isinstance(cloud, nn.Module)):
            raise InputError(
                "Expected edge and cloud as two nn.Modules, came "
                f"{type(edge).__name__} and {type(cloud).__name__}."
            )
        self.edge, self.cloud = edge, cloud
        self.training = edge.training or cloud.training

    def forward(self, x: Tensor) -> Any:
        return self.cloud(self.edge(x))


class OnCopy(nn.Module):
    """Runs a module that would write into its input on a copy of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, z: Tensor) -> Any:
        return self.module(z.clone())


class Follow:
    """Forward pre-hook: a half reads again the parameters that were replaced in the model.

    Layers are shared and need none of this; parameters that the graph reads directly (a layer
    scale, a class token) are references, which pruning leaves stale. A copied or pickled half
    stands alone and follows no model.
    """

    def __init__(
        self, model: nn.Module | None, graph: fx.Graph | None, constants: dict[str, Tensor]
    ) -> None:
        self.model = model
        nodes = () if graph is None else graph.nodes
        paths = {str(node.target) for node in nodes if node.op == "get_attr"}
        self.constants = sorted(paths & set(constants))
        self.seen: dict[str, Any] = {}
        if model is not None:
            self.seen = {p: attribute_of(model, p) for p in sorted(paths - set(constants))}

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for path, seen in self.seen.items():
            assert self.model is not None
            current = attribute_of(self.model, path)
            if current is not seen:
                _assign(module, path, current)
                self.seen[path] = current
        for path in self.constants:
            constant = attribute_of(module, path)
            if constant.device != args[0].device:
                _assign(module, path, constant.to(args[0].device))

    def __reduce__(self) -> tuple[Any, ...]:
        return Follow, (None, None, {})


def _assign(module: nn.Module, path: str, value: Any) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)
