"""Both halves as files for machines without this package: ONNX, and programs of `torch.export`.

    export/  edge.onnx, edge.pt2     what the device runs; no layer of the cloud is in it
             cloud.onnx, cloud.pt2   what the server runs, on any number of uploads at once
             about.json              what goes in and comes out: names, shapes, types, costs
             manifest.json           the sha256 of every file
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from patrol_prune._onnx import onnx_runner, require_onnx, write_onnx
from patrol_prune.cost import count_params, edge_macs, feature_bytes
from patrol_prune.defences import RandomUpload
from patrol_prune.errors import CheckpointError, InputError, UnsupportedModelError
from patrol_prune.given import check_among, check_count, check_normalization, check_split
from patrol_prune.pixels import Normalization
from patrol_prune.split import Split
from patrol_prune.storage import atomic_directory, read_whole, to_json

logger = logging.getLogger(__name__)

FORMATS = ("onnx", "pt2")
ABOUT = "about.json"
TOLERANCE = 1e-4
"""Largest difference of a file's answers, in shares of the half's largest; 1e-6 is usual."""
_COARSE = 2e-2
"""The same in half precision."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: the folder.
        differences: name of a file -> largest difference between what it and the half computed, in
            shares of the half's largest absolute value; None for what draws, which cannot be
            compared.
        about: what `about.json` says: of each half `input` and `output`, of the edge its
            multiply-adds (`macs`) and `parameters`.
    """

    path: Path
    differences: dict[str, float | None]
    about: dict[str, Any]


class ExportedHalf(nn.Module):
    """One file as a module, run on the CPU: picture by picture, where it takes one at a time.

    Args:
        content: of the file.
        kind: its format. "pt2" passes gradients on, for white-box attacks; "onnx" has none.
        single: it takes one picture at a time.
    """

    def __init__(self, content: bytes, kind: str, single: bool) -> None:
        super().__init__()
        self.single = single
        if kind == "pt2":  # in a tuple: a program has no train() and eval()
            self._run: tuple[Any] = (torch.export.load(io.BytesIO(content)).module(),)
        else:
            require_onnx()
            self._run = (onnx_runner(content),)

    def forward(self, x: Tensor) -> Any:
        """What the half gives: a tensor, or, of several outputs, as many as the file has."""
        if not self.single or len(x) < 2:
            return self._once(x)
        return torch.cat([self._once(one) for one in x.split(1)])

    def _once(self, x: Tensor) -> Any:
        found = pytree.tree_map_only(Tensor, lambda t: t.to(x.device), self._run[0](x.cpu()))
        return found[0] if isinstance(found, list) and len(found) == 1 else found


@dataclass(frozen=True)
class ExportedSplit:
    """What `load_exported` gives: halves that run files, for `audit` and for comparison.

    Attributes:
        edge: an `ExportedHalf`.
        cloud: another.
        about: what `about.json` says; `about["edge"]["input"]["holds"]` says what the edge takes.
    """

    edge: ExportedHalf
    cloud: ExportedHalf
    about: dict[str, Any]


def load_exported(path: str | os.PathLike[str], kind: str | None = None) -> ExportedSplit:
    """Both halves as `export` wrote them, to run or to audit what is deployed.

    An edge that takes pixels is audited without `normalization`.

    Args:
        path: the folder.
        kind: "onnx" or "pt2"; where None the latter, if it is there.

    Raises:
        InputError: there is no such format in the folder.
        CheckpointError: the folder is no export, or a file was changed.
        MissingPackageError: ONNX Runtime is needed, and not installed.
    """
    folder = Path(path)
    files = read_whole(folder)
    if ABOUT not in files:
        raise CheckpointError(f"{folder} is no export: it has no {ABOUT}. Give a folder that "
                              "patrol_prune.export wrote.", path=str(folder / ABOUT))
    there = [k for k in reversed(FORMATS) if f"edge.{k}" in files]
    chosen = there[0] if kind is None else kind
    check_among(chosen, f"kind of the files in {folder}", there)
    about = json.loads(files[ABOUT])
    edge, cloud = (
        ExportedHalf(files[f"{name}.{chosen}"], chosen, about[name]["input"]["shape"][0] == 1)
        for name in ("edge", "cloud"))
    return ExportedSplit(edge, cloud, about)


class _FromPixels(nn.Module):
    """An edge that takes pixels on [0, 1]."""

    def __init__(self, edge: nn.Module, normalization: Normalization) -> None:
        super().__init__()
        self.edge, self.normalization = edge, normalization

    def forward(self, pixels: Tensor) -> Tensor:
        z: Tensor = self.edge(self.normalization.to_input(pixels))
        return z


def export(
    split: Split,
    path: str | os.PathLike[str],
    *,
    formats: Sequence[str] = ("onnx",),
    normalization: Normalization | None = None,
    any_batch: bool = False,
    opset: int | None = None,
    classes: Sequence[str] = (),
) -> Exported:
    """Write both halves, as they run in evaluation mode, and check what the files compute.

    Every file is run once on random inputs and compared with the half that it was made of, before
    the folder is put in its place. The split stays as it is, and where it is.

    Args:
        split: cut, pruned and trained; a defence behind the edge is written with it.
        path: a folder; an earlier export there is replaced, whole or not at all.
        formats: "onnx", for ONNX Runtime and what converts from it; "pt2", `torch.export.load`.
        normalization: from pixels on [0, 1] to the model's input; it is written into the edge,
            which then takes pixels. Without it the edge takes what the model takes.
        any_batch: let the edge take any number of pictures at once; one without. The cloud takes
            any number of uploads where its layers can.
        opset: of ONNX; the exporter's choice where None.
        classes: names of the answers, for `about.json`.

    Raises:
        InputError: an unknown format, a folder that holds something else, or an edge that draws
            random numbers as ONNX.
        MissingPackageError: ONNX is asked for, and a package for it is not installed.
        UnsupportedModelError: a half cannot be exported, or a file computes something else.
    """
    folder = Path(path)
    _check(split, folder, formats, normalization, opset)
    x = _random_like(split)
    edge = _standing(split.edge)
    with torch.no_grad():
        z = edge(x if normalization is None else normalization.to_input(x))
    if normalization is not None:
        edge = _FromPixels(edge, normalization).eval()
    cloud = _standing(split.cloud)
    single = x if any_batch else x[:1]
    programs = {"edge": _program("edge", edge, single, any_batch),
                "cloud": _cloud_program(cloud, z)}
    inputs = {"edge": single, "cloud": z if _takes_any(programs["cloud"]) else z[:1]}
    differences: dict[str, float | None] = {}
    with atomic_directory(folder) as directory:
        for name, half in (("edge", edge), ("cloud", cloud)):
            for kind in formats:
                file = directory / f"{name}.{kind}"
                opset = _write(programs[name], file, opset)
                differences[file.name] = _difference(half, file, inputs[name])
        about = _about(split, programs, inputs, normalization, opset, classes)
        (directory / ABOUT).write_text(to_json({**about, "differences": differences}, ABOUT),
                                       encoding="utf-8")
    return Exported(folder, differences, about)


def _check(
    split: Split, folder: Path, formats: Sequence[str], normalization: Normalization | None,
    opset: int | None,
) -> None:
    check_split(split)
    if isinstance(formats, str) or not formats:
        raise InputError(f"Expected formats as a list out of {', '.join(FORMATS)}, came "
                         f"{formats!r}. Write [\"onnx\"], say.")
    for kind in formats:
        check_among(kind, "each of formats", FORMATS)
    if normalization is not None:
        check_normalization(normalization)
    check_count(opset, "opset", 18, optional=True)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ABOUT).is_file():
        raise InputError(f"{folder} holds something else than an earlier export, which would be "
                         "replaced by this one. Give a folder of its own.")
    if "onnx" in formats:
        if _draws(split.edge):
            raise InputError(
                "Expected an edge that computes the same each time for ONNX, came one that draws "
                "random numbers: ONNX Runtime seeds its generator by 32 bits, which whoever sees "
                "uploads can try out. Export to \"pt2\", or take the split before the defence and "
                "draw on the device by the system's entropy.")
        require_onnx()


def _draws(half: nn.Module) -> bool:
    return any(isinstance(m, RandomUpload) and not m.silent for m in half.modules())


def _standing(half: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode, whose weights ask for no gradient."""
    return copy.deepcopy(half).cpu().eval().requires_grad_(False)


def _random_like(split: Split) -> Tensor:
    """Two inputs for the model; on [0, 1], and so fine as pixels too."""
    example = split.example_inputs
    if not example.is_floating_point():
        return example[:1].cpu().repeat(2, *[1] * (example.dim() - 1))
    drawn = torch.rand(2, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    return drawn.to(example.dtype)


def _program(name: str, half: nn.Module, x: Tensor, any_batch: bool) -> ExportedProgram:
    try:
        with torch.no_grad():
            program = torch.export.export(
                half, (x,), dynamic_shapes=({0: Dim.DYNAMIC},) if any_batch else None)
    except Exception as error:  # whatever torch.export raises for what it cannot follow
        many = "any number of pictures" if any_batch else "one picture"
        advice = "Leave any_batch out" if any_batch and name == "edge" else (
            "Its layers have to be ones that torch.export can follow")
        raise UnsupportedModelError(
            f"The {name} cannot be exported for {many}: {_first_line(error)} {advice}."
        ) from error
    for node in program.graph.nodes:  # lines and paths of code on this machine
        node.meta.pop("stack_trace", None)
    return program


def _cloud_program(cloud: nn.Module, z: Tensor) -> ExportedProgram:
    """For any number of uploads, or for one where the layers fix their number."""
    try:
        return _program("cloud", cloud, z, True)
    except UnsupportedModelError as error:
        logger.warning("The cloud takes one upload at a time, since its layers fix the number: %s",
                       error)
        return _program("cloud", cloud, z[:1], False)


def _first_line(error: BaseException) -> str:
    """Of what was at the bottom of it: exporters wrap it in advice for their own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."


def _takes_any(program: ExportedProgram) -> bool:
    return bool(program.range_constraints)


def _outputs(answer: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(answer) if isinstance(value, Tensor)]


def _write(program: ExportedProgram, file: Path, opset: int | None) -> int | None:
    """Write one file; the opset that counts from here on."""
    name, _, kind = file.name.partition(".")
    if kind == "pt2":
        torch.export.save(program, file)
        return opset
    takes, gives = ("image", "feature") if name == "edge" else ("feature", "answer")
    several = len(program.graph_signature.user_outputs) != 1
    try:
        return write_onnx(program, file, takes=takes, gives=None if several else gives,
                          opset=opset)
    except Exception as error:  # whatever the exporter raises for what ONNX lacks
        raise UnsupportedModelError(
            f"The {name} cannot be written as ONNX: {_first_line(error)} Try another opset, or "
            "the format \"pt2\"."
        ) from error


def _difference(half: nn.Module, file: Path, x: Tensor) -> float | None:
    """How far the file's answers are from the half's; an UnsupportedModelError where too far."""
    with torch.no_grad():
        if _draws(half):
            return None
        mine = _outputs(half(x))
        theirs = _outputs(ExportedHalf(file.read_bytes(), file.suffix[1:], False)(x))
    if [t.shape for t in mine] != [t.shape for t in theirs]:
        raise UnsupportedModelError(
            f"{file.name} gives shapes {[tuple(t.shape) for t in theirs]}, the half "
            f"{[tuple(t.shape) for t in mine]}. Export to another format.")
    found = max((_relative(a.double(), b.double()) for a, b in zip(mine, theirs, strict=True)),
                default=0.0)
    coarse = x.dtype in (torch.float16, torch.bfloat16)
    if not found <= (_COARSE if coarse else TOLERANCE):
        raise UnsupportedModelError(
            f"{file.name} computes something else than the half that it was made of: {found:.1e} "
            f"of its largest value apart. A layer that draws, or one that the format lacks, does "
            "that; export to another format, or take the layer out.")
    return found


def _relative(mine: Tensor, theirs: Tensor) -> float:
    if not mine.numel():
        return 0.0
    largest = float(mine.abs().max())
    return float((mine - theirs).abs().max()) / (largest or 1.0)


def _about(
    split: Split, programs: dict[str, ExportedProgram], inputs: dict[str, Tensor],
    normalization: Normalization | None, opset: int | None, classes: Sequence[str],
) -> dict[str, Any]:
    z = inputs["cloud"]
    pixels = "the model's input" if normalization is None else "pixels on [0, 1]"
    batch = {name: "any" if _takes_any(program) else 1 for name, program in programs.items()}
    image = {"name": "image", "shape": [batch["edge"], *inputs["edge"].shape[1:]],
             "dtype": _named(inputs["edge"]), "holds": pixels}
    feature = {"name": "feature", "shape": [batch["edge"], *z.shape[1:]], "dtype": _named(z),
               "bytes": feature_bytes(z.shape[1:], z.dtype)}
    about: dict[str, Any] = {
        "at": getattr(split, "at", "") or "",
        "edge": {"input": image, "output": feature, "macs": edge_macs(split),
                 "parameters": count_params(split.edge)},
        "cloud": {"input": {**feature, "shape": [batch["cloud"], *z.shape[1:]]},
                  "output": {"name": "answer"}, "parameters": count_params(split.cloud)},
        "versions": {name: metadata.version(name) for name in ("torch", "patrol-prune")},
    }
    if opset is not None:
        about["opset"] = opset
    if classes:
        about["classes"] = list(classes)
    json.dumps(about)
    return about


def _named(tensor: Tensor) -> str:
    return str(tensor.dtype).rpartition(".")[2]
