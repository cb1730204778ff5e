"""A half as a program of `torch.export`, which tells of its layers and of nothing else."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from patrol_prune.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

LYING_DRAWS = (
    "The edge draws from a generator of its own or NumPy's, which would lie in its file: "
    "the same numbers whenever it is loaded, and whoever has the file takes them off every "
    "upload. Draw from torch's global generator (torch.randn_like(z), say).")


def program_of(name: str, half: nn.Module, x: Tensor, any_batch: bool) -> ExportedProgram:
    """Trace it; neither `x` nor lines and paths of code on this machine stay in the program.

    Raises:
        UnsupportedModelError: torch.export cannot follow it, or cannot put the generator into the
            program that an edge draws from.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(
                half, (x,), dynamic_shapes=({0: Dim.DYNAMIC},) if any_batch else None)
    except Exception as error:  # whatever torch.export raises for what it cannot follow
        if name == "edge" and "torch._C.Generator" in str(error):  # what torch 2.10 says of one
            raise UnsupportedModelError(LYING_DRAWS) from error
        many = "any number of pictures" if any_batch else "one picture"
        advice = "Leave any_batch out" if any_batch and name == "edge" else (
            "Its layers have to be ones that torch.export can follow")
        raise UnsupportedModelError(
            f"The {name} cannot be exported for {many}: {first_line(error)} {advice}."
        ) from error
    program.example_inputs = None
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def cloud_program(cloud: nn.Module, z: Tensor) -> ExportedProgram:
    """For any number of uploads, or for one where the layers fix their number."""
    try:
        return program_of("cloud", cloud, z, True)
    except UnsupportedModelError as error:
        logger.warning("The cloud takes one upload at a time, since its layers fix the number: %s",
                       first_line(error))
        return program_of("cloud", cloud, z[:1], False)


def first_line(error: BaseException) -> str:
    """Of what was at the bottom of it: exporters wrap it in advice for their own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip(" -\t") for line in str(error).splitlines() if line.strip()]
    told = " ".join(lines[:1 + lines[0].rstrip(".").endswith(":")]) if lines else ""
    return (told or type(error).__name__).rstrip(".") + "."


def takes_any(program: ExportedProgram) -> bool:
    """Whether it takes any number of inputs at once."""
    return bool(program.range_constraints)


def draws_in(program: ExportedProgram, own: bool = False) -> bool:
    """Whether it holds an operator that draws random numbers, or, `own`, one that does so from a
    generator that lies in the program. Dropout that is off does not draw.
    """
    return any(_draws(node) and (not own or node.kwargs.get("generator") is not None)
               for graph in program.graph_module.modules() if isinstance(graph, fx.GraphModule)
               for node in graph.graph.nodes)


def _draws(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or (
            torch.Tag.nondeterministic_seeded not in target.tags):
        return False
    for place, argument in enumerate(target._schema.arguments):
        if argument.name in ("train", "training", "dropout_p"):
            given = node.kwargs.get(argument.name, argument.default_value)
            return bool(node.args[place] if place < len(node.args) else given)
    return True


def answers_of(program: ExportedProgram, name: str) -> list[dict[str, Any]]:
    """Name, shape and type of each tensor that it gives, in their order.

    One alone is called `name`; others by their keys as well: `answer.logits`, `answer.aux.0`.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    spec = program.call_spec.out_spec
    assert spec is not None
    paths, _ = pytree.tree_flatten_with_path(
        pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    found = []
    for (path, _), output in zip(paths, program.graph_signature.user_outputs, strict=True):
        value = values.get(output) if isinstance(output, str) else None
        if isinstance(value, Tensor):
            key = re.sub(r"\W+", ".", pytree.keystr(path)).strip(".")
            shape = [n if isinstance(n, int) else "any" for n in value.shape]
            found.append({"name": f"{name}.{key}", "shape": shape, "dtype": name_of(value.dtype)})
    return [{**found[0], "name": name}] if len(found) == 1 else found


def name_of(dtype: torch.dtype) -> str:
    """As numpy calls it."""
    return str(dtype).rpartition(".")[2]
