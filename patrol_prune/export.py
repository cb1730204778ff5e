"""Both halves as files for machines without this package: ONNX, and programs of `torch.export`.

    export/  edge.onnx, edge.pt2     what the device runs; no layer of the cloud is in it
             cloud.onnx, cloud.pt2   what the server runs, on any number of uploads at once
             about.json              what goes in and comes out: names, shapes, types, costs
             manifest.json           the sha256 of every file
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from patrol_prune._onnx import require_onnx, write_onnx
from patrol_prune._programs import (
    LYING_DRAWS,
    answers_of,
    cloud_program,
    draws_in,
    first_line,
    name_of,
    program_of,
    takes_any,
)
from patrol_prune.cost import count_params, edge_macs, feature_bytes
from patrol_prune.defences import RandomUpload
from patrol_prune.defences.quantisation import Quantiser
from patrol_prune.errors import InputError, UnsupportedModelError
from patrol_prune.exported import ABOUT, FORMATS, ExportedHalf
from patrol_prune.given import check_among, check_count, check_normalization, check_split
from patrol_prune.packing import UploadFormat
from patrol_prune.pixels import Normalization
from patrol_prune.split import Split
from patrol_prune.storage import MANIFEST, atomic_directory, to_json
from patrol_prune.versions import version_of

TOLERANCE = 1e-4
"""Largest difference of a file's answers, in shares of the half's largest; 1e-6 is usual."""
_COARSE = 2e-2
"""The same in half precision."""
_RUNS = 16


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: the folder.
        differences: name of a file -> largest difference between what it and the half computed, in
            shares of the half's largest absolute value; None for what draws, which cannot be
            compared.
        about: what `about.json` says: of each half `input` and `output`, of the edge its
            multiply-adds (`macs`) and `parameters`. `bytes` are those of the file's numbers; where
            the edge rounds them last, `rounded` says how they pack: `UploadFormat.from_about`.
    """

    path: Path
    differences: dict[str, float | None]
    about: dict[str, Any]


class _FromPixels(nn.Module):
    """An edge that takes pixels on [0, 1]."""

    def __init__(self, edge: nn.Module, normalization: Normalization) -> None:
        super().__init__()
        self.edge, self.normalization = edge, normalization

    def forward(self, pixels: Tensor) -> Tensor:
        z: Tensor = self.edge(self.normalization.to_input(pixels))
        return z


@torch.random.fork_rng([])  # what is drawn here is not missing afterwards
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

    Every file is run on random inputs and compared with the half that it was made of, but for
    halves that draw, before the folder is put in its place. Of an edge that rounds, a thousandth
    of the values may lie a step apart. The split stays as it is, and where it is.

    Args:
        split: cut, pruned and trained; a defence behind the edge is written with it.
        path: a folder; an earlier export there is replaced, whole or not at all.
        formats: "onnx", for ONNX Runtime and what converts from it; "pt2", `torch.export.load`.
        normalization: from pixels on [0, 1] to the model's input; it is written into the edge,
            which then takes pixels. Without it the edge takes what the model takes.
        any_batch: let the edge take any number of pictures at once; one without. The cloud takes
            any number of uploads where its layers can.
        opset: of ONNX, at least 18; the exporter's choice where None.
        classes: names of the answers, for `about.json`.

    Raises:
        InputError: an unknown format, a folder that holds something else, or an edge that draws
            random numbers as ONNX.
        MissingPackageError: ONNX is asked for, and a package for it is not installed.
        UnsupportedModelError: a half cannot be exported, a file computes something else, or what
            an edge draws lies in its file.
    """
    folder = Path(path)
    _check(split, folder, formats, normalization, opset)
    _check_classes(classes)
    x = _random_like(split)
    edge = _standing(split.edge)
    if normalization is not None:
        edge = _FromPixels(edge, normalization).eval()
    z = _uploads(edge, x, any_batch)
    cloud = _standing(split.cloud)
    single = x if any_batch else x[:1]
    varying = _varies(edge, single)
    if varying:  # told before torch.export, which may not follow what it draws from
        _refuse_onnx(formats)
    programs = {"edge": program_of("edge", edge, single, any_batch),
                "cloud": cloud_program(cloud, z)}
    inputs = {"edge": single, "cloud": z if takes_any(programs["cloud"]) else z[:1]}
    draws = {"edge": varying or _draws(edge, programs["edge"]),
             "cloud": _draws(cloud, programs["cloud"]) or _varies(cloud, inputs["cloud"])}
    if draws["edge"]:
        _refuse_onnx(formats)
        _check_draws(edge, programs["edge"], single)
    differences: dict[str, float | None] = {}
    with atomic_directory(folder) as directory:
        for name, half in (("edge", edge), ("cloud", cloud)):
            for kind in formats:
                file = directory / f"{name}.{kind}"
                opset = _write(programs[name], file, opset)
                differences[file.name] = (None if draws[name]
                                          else _difference(half, file, inputs[name]))
        about = _about(split, programs, inputs, normalization, classes)
        if "onnx" in formats:
            about["opset"] = opset
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
    ours = {ABOUT, MANIFEST, *(f"{name}.{kind}" for name in ("edge", "cloud") for kind in FORMATS)}
    there = [p.name for p in folder.iterdir()] if folder.is_dir() else [folder.name]
    others = sorted({*there} - ours) if folder.exists() else []
    if others:
        raise InputError(f"{folder} holds something else than an earlier export, "
                         f"{', '.join(others[:3])}, which would be replaced by this one. Give a "
                         "folder of its own.")
    if "onnx" in formats:
        require_onnx()


def _check_classes(classes: Sequence[str]) -> None:
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"Expected classes as a list of names, came {classes!s:.60}. Write "
                         "[\"cat\", \"dog\"], say.")


def _draws(half: nn.Module, program: ExportedProgram) -> bool:
    """Whether it is made to draw random numbers."""
    return draws_in(program) or any(
        isinstance(m, RandomUpload) and not m.silent for m in half.modules())


def _refuse_onnx(formats: Sequence[str]) -> None:
    if "onnx" in formats:
        raise InputError(
            "Expected an edge that computes the same each time for ONNX, came one that draws "
            "random numbers: ONNX Runtime seeds its generator by 32 bits, which whoever sees "
            "uploads can try out. Export to \"pt2\", or take the split before the defence and "
            "draw on the device by the system's entropy.")


@torch.no_grad()
def _varies(run: Callable[[Tensor], Any], x: Tensor, seed: int | None = None) -> bool:
    """Whether the same input does not always give the same, but for rounding; where there is a
    `seed`, from the same place of torch's global generator.
    """
    first: list[Tensor] = []
    for _ in range(_RUNS):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        found = _outputs(run(x.clone()))
        first = first or found
        if not all(torch.allclose(a, b, rtol=1e-5, equal_nan=True)
                   for a, b in zip(first, found, strict=True)):
            return True
    return False


def _check_draws(edge: nn.Module, program: ExportedProgram, x: Tensor) -> None:
    """That what an edge draws is not in its file, where whoever has the file would find it."""
    ours = [m for m in edge.modules() if isinstance(m, RandomUpload) and not m.silent]
    for module in ours:  # which draw from torch's generator in the file
        module.silent = True
    elsewhere = _varies(edge, x, seed=0)
    for module in ours:
        module.silent = False
    if elsewhere or not draws_in(program) or draws_in(program, own=True):
        raise UnsupportedModelError(LYING_DRAWS)


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


def _uploads(edge: nn.Module, x: Tensor, any_batch: bool) -> Tensor:
    """Of both inputs; of one, twice, where the edge takes no two."""

    def run(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            z: Tensor = edge(inputs.clone())
        return z

    try:
        z = run(x)
    except (RuntimeError, ValueError):
        z = run(x[:1])
    if len(z) == len(x):
        return z
    if any_batch:
        raise UnsupportedModelError("The edge cannot be exported for any number of pictures: it "
                                    "takes one at a time. Leave any_batch out.")
    return torch.cat([run(x[:1])] * 2)


def _outputs(answer: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(answer) if isinstance(value, Tensor)]


def _write(program: ExportedProgram, file: Path, opset: int | None) -> int | None:
    """Write one file; the opset that counts from here on."""
    name, _, kind = file.name.partition(".")
    if kind == "pt2":
        torch.export.save(program, file)
        return opset
    takes, gives = ("image", "feature") if name == "edge" else ("feature", "answer")
    try:
        return write_onnx(program, file, takes=takes, opset=opset,
                          gives=[given["name"] for given in answers_of(program, gives)])
    except Exception as error:  # whatever the exporter raises for what ONNX lacks
        raise UnsupportedModelError(
            f"The {name} cannot be written as ONNX: {first_line(error)} Try another opset, or "
            "the format \"pt2\"."
        ) from error


def _difference(half: nn.Module, file: Path, x: Tensor) -> float:
    """How far the file's answers are from the half's; an UnsupportedModelError where too far."""
    with torch.no_grad():
        mine = _outputs(half(x.clone()))  # it may write into its input
        try:
            theirs = _outputs(ExportedHalf(file.read_bytes(), file.suffix[1:])(x.clone()))
        except Exception as error:  # whatever ONNX Runtime raises for what it has no code for
            raise UnsupportedModelError(
                f"{file.name} cannot be run to compare it: {first_line(error)} Export a model in "
                "float32, or to \"pt2\"."
            ) from error
    if [t.shape for t in mine] != [t.shape for t in theirs]:
        raise UnsupportedModelError(
            f"{file.name} gives shapes {[tuple(t.shape) for t in theirs]}, the half "
            f"{[tuple(t.shape) for t in mine]}. Export to another format.")
    steps = [float(m.scale.max()) for m in half.modules() if isinstance(m, Quantiser)]
    if steps and len(mine) == 1 and _a_step_apart(mine[0], theirs[0], max(steps)):
        return _relative(mine[0].double(), theirs[0].double())
    found = max((_relative(a.double(), b.double()) for a, b in zip(mine, theirs, strict=True)),
                default=0.0)
    coarse = any(t.dtype in (torch.float16, torch.bfloat16) for t in (x, *mine))
    if not found <= (_COARSE if coarse else TOLERANCE):
        raise UnsupportedModelError(
            f"{file.name} computes something else than the half that it was made of: {found:.1e} "
            f"of its largest value apart. A layer that the format lacks does that; export to "
            "another format, or take the layer out.")
    return found


def _a_step_apart(mine: Tensor, theirs: Tensor, step: float) -> bool:
    """Whether a thousandth of the values at most differ, none by more than the step to which an
    edge rounds: what lies half-way between two may go either way."""
    apart = (mine.double() - theirs.double()).abs()
    differ = apart > TOLERANCE * mine.abs().max()
    return int(differ.sum()) <= max(1, mine.numel() // 1000) and bool(
        (apart <= 1.001 * step).all())


def _relative(mine: Tensor, theirs: Tensor) -> float:
    if not mine.numel():
        return 0.0
    largest = float(mine.abs().max())
    return float((mine - theirs).abs().max()) / (largest or 1.0)


def _rounded(split: Split) -> dict[str, Any]:
    """How the edge rounds what it uploads, where that is the last that it does."""
    if not isinstance(split.behind.get("upload"), Quantiser):
        return {}
    try:
        return {"rounded": UploadFormat.of(split).to_dict()}
    except InputError:  # steps that the feature's type cannot tell apart
        return {}


def _about(
    split: Split, programs: dict[str, ExportedProgram], inputs: dict[str, Tensor],
    normalization: Normalization | None, classes: Sequence[str],
) -> dict[str, Any]:
    z = inputs["cloud"]
    pixels = "the model's input" if normalization is None else "pixels on [0, 1]"
    batch = {name: "any" if takes_any(program) else 1 for name, program in programs.items()}
    image = {"name": "image", "shape": [batch["edge"], *inputs["edge"].shape[1:]],
             "dtype": name_of(inputs["edge"].dtype), "holds": pixels}
    feature = {"name": "feature", "shape": [batch["edge"], *z.shape[1:]], "dtype": name_of(z.dtype),
               "bytes": feature_bytes(z.shape[1:], z.dtype), **_rounded(split)}
    answers = answers_of(programs["cloud"], "answer")
    about: dict[str, Any] = {
        "at": getattr(split, "at", "") or "",
        "edge": {"input": image, "output": feature, "macs": edge_macs(split),
                 "parameters": count_params(split.edge)},
        "cloud": {"input": {**feature, "shape": [batch["cloud"], *z.shape[1:]]},
                  "output": answers[0] if len(answers) == 1 else answers,
                  "parameters": count_params(split.cloud)},
        "versions": {name: version_of(name) for name in ("torch", "patrol-prune")},
    }
    if classes:
        about["classes"] = list(classes)
    return about
