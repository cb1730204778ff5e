"""The one module that knows onnxscript and ONNX Runtime: programs to files, and files that run."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from patrol_prune.errors import InputError, MissingPackageError


def require_onnx(*names: str) -> None:
    """See that ONNX can be written, and be read back to compare, or that `names` are there.

    Raises:
        MissingPackageError: one of the packages is not installed.
    """
    for name in names or ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingPackageError(
                f"ONNX is written with onnxscript and checked with ONNX Runtime; {name} is not "
                "installed here. Type: pip install 'onnxscript>=0.6' 'onnxruntime>=1.23'"
            ) from error


def write_onnx(
    program: ExportedProgram, file: Path, *, takes: str, gives: Sequence[str], opset: int | None
) -> int:
    """Write the program as one file; the opset that it is in.

    Args:
        program: is written.
        file: where.
        takes: name of its input.
        gives: names of its outputs.
        opset: what the runtime on the device understands; the exporter's choice where None.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=FutureWarning)  # of the exporter, at itself
        warnings.simplefilter("ignore", category=DeprecationWarning)
        written = torch.onnx.export(
            program, (), dynamo=True, verbose=False, opset_version=opset, input_names=[takes],
            output_names=list(gives),
        )
    assert written is not None
    model: Any = written.model
    came = int(model.opset_imports[""])
    if opset not in (None, came):
        raise InputError(f"opset {opset} cannot be had, the model stayed in {came}.")
    written.save(str(file), include_initializers=True, external_data=False)
    return came


def onnx_runner(content: bytes) -> Callable[[Tensor], list[Tensor]]:
    """A file's content as a function: ONNX Runtime on the CPU, all outputs of one input."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    takes = session.get_inputs()[0].name

    def run(x: Tensor) -> list[Tensor]:
        found = session.run(None, {takes: x.detach().cpu().numpy()})
        return [torch.from_numpy(np.asarray(value)) for value in found]

    return run
