"""What was exported, as modules again: to run, to compare and to audit."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from patrol_prune._onnx import onnx_runner, require_onnx
from patrol_prune.errors import CheckpointError
from patrol_prune.given import check_among
from patrol_prune.storage import read_whole

FORMATS = ("onnx", "pt2")
ABOUT = "about.json"


class ExportedHalf(nn.Module):
    """One file as a module, run on the CPU: picture by picture, where it takes one at a time.

    Args:
        content: of the file.
        kind: its format. "pt2" passes gradients on, for white-box attacks; "onnx" has none.
        single: it takes one picture at a time.
        dtype: what it takes; real numbers of another type become of this one.
    """

    def __init__(
        self, content: bytes, kind: str, *, single: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.single, self.dtype = single, dtype
        if kind == "pt2":  # in a tuple: a program has no train() and eval()
            self._run: tuple[Any] = (torch.export.load(io.BytesIO(content)).module(),)
        else:
            require_onnx("onnxruntime")
            self._run = (onnx_runner(content),)

    def forward(self, x: Tensor) -> Any:
        """What the half gives: a tensor, or, of several outputs, as many as the file has."""
        if self.dtype is not None and self.dtype.is_floating_point and x.is_floating_point():
            x = x.to(self.dtype)
        if not self.single or len(x) < 2:
            return self._once(x)
        return pytree.tree_map(lambda *parts: torch.cat(parts),
                               *(self._once(one) for one in x.split(1)))

    def _once(self, x: Tensor) -> Any:
        found = pytree.tree_map_only(Tensor, lambda t: t.to(x.device), self._run[0](x.cpu()))
        return found[0] if isinstance(found, list) and len(found) == 1 else found


@dataclass(frozen=True)
class ExportedSplit:
    """What `load_exported` gives: halves that run files, for `audit` and for comparison.

    Attributes:
        edge: a module that runs the edge's file on the CPU, picture by picture where it takes one
            at a time. "pt2" passes gradients on, for white-box attacks; "onnx" has none.
        cloud: likewise.
        about: what `about.json` says; `about["edge"]["input"]["holds"]` says what the edge takes.
    """

    edge: ExportedHalf
    cloud: ExportedHalf
    about: dict[str, Any]


def load_exported(path: str | os.PathLike[str], kind: str | None = None) -> ExportedSplit:
    """Both halves as `export` wrote them, to run or to audit what is deployed.

    An edge that takes pixels is audited without `normalization`. A "pt2" file is read by
    `torch.export.load`, which runs what is pickled inside: load none of a stranger.

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
    takes = (about[name]["input"] for name in ("edge", "cloud"))
    edge, cloud = (
        ExportedHalf(files[f"{name}.{chosen}"], chosen, single=taken["shape"][0] == 1,
                     dtype=getattr(torch, taken["dtype"]))
        for name, taken in zip(("edge", "cloud"), takes, strict=True))
    return ExportedSplit(edge, cloud, about)
