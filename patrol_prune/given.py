"""Easy mistakes with what a caller hands over, refused in words before any work."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from patrol_prune.errors import InputError, UnsupportedModelError, nearest

_QUANTISED = ("torch.ao.nn.quantized.modules", "torch.ao.nn.intrinsic.quantized.modules")
_HALVES = ("model", "edge", "cloud", "example_inputs")


def check_split(split: object, name: str = "split") -> None:
    """An InputError where it is no `Split`."""
    if not all(hasattr(split, part) for part in _HALVES):
        raise InputError(
            f"Expected {name} as a Split, came {type(split).__name__}. Cut the model first: "
            "Split(model, example_inputs, at=...)."
        )


def check_has_edge(half: object, name: str) -> None:
    """An InputError where it has no `edge` that is a module, and can be attacked as such."""
    edge = getattr(half, "edge", None)
    if edge is None:
        raise InputError(
            f"Expected {name} as a Split, or another object whose attribute `edge` is the half on "
            f"the device, came {type(half).__name__}. Cut the model first: Split(model, "
            "example_inputs, at=...)."
        )
    if not isinstance(edge, nn.Module):
        raise InputError(
            f"Expected {name} with an edge that is a torch.nn.Module, came a "
            f"{type(edge).__name__}. Wrap it in one whose forward calls it."
        )
    if any(tensor.is_inference() for tensor in [*edge.parameters(), *edge.buffers()]):
        raise InputError(
            f"Expected {name} with weights that gradients can go through, came some that were made "
            "under torch.inference_mode(). Build or load the model outside of it."
        )


def check_factory(factory: object) -> None:
    """An InputError where it is a model, or nothing that can be called."""
    if isinstance(factory, nn.Module) or not callable(factory):
        raise InputError(
            "Expected model_factory as a function without arguments that builds the model as it "
            f"was before pruning, came {type(factory).__name__}. Write lambda: build_model()."
        )


def built_by(factory: Callable[[], Any]) -> Any:
    """What the factory builds.

    Raises:
        InputError: it is no function without arguments, or builds neither a model nor two halves.
    """
    check_factory(factory)
    built = factory()
    halves = built if isinstance(built, tuple) else (built,)
    if len(halves) > 2 or not all(isinstance(half, nn.Module) for half in halves):
        raise InputError(
            "Expected model_factory to return a model, or a pair (edge, cloud), came "
            f"{type(built).__name__}."
        )
    return built


def check_model(model: object, name: str) -> None:
    """An InputError where it is no module."""
    if not isinstance(model, nn.Module):
        hint = " Give split.model." if hasattr(model, "model") else ""
        raise InputError(f"Expected {name} as an nn.Module, came {type(model).__name__}.{hint}")


def check_full_precision(
    model: nn.Module, example: Tensor | None = None, *, but: Sequence[torch.dtype] = ()
) -> None:
    """An UnsupportedModelError where a model that is to give gradients is of half precision, `but`
    one that is enough: in all of its parameters, or in some and in the input that it takes."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    half = {kind for kind in kinds if torch.finfo(kind).bits < 32 and kind not in but}
    if half and (half == kinds or (example is not None and example.dtype in half)):
        raise UnsupportedModelError(
            "Expected a model in float32 or float64 to train or to score, came "
            f"{type(model).__name__} in {', '.join(sorted(map(str, half)))}. Train in float32, "
            "model.float(), with precision='bf16', and cast it afterwards."
        )


def check_normalization(normalization: object) -> None:
    """An InputError where it is something other than a `Normalization` or None."""
    if normalization is not None and not hasattr(normalization, "to_input"):
        raise InputError(
            f"Expected normalization as a patrol_prune.Normalization(mean, std), came "
            f"{type(normalization).__name__}."
        )


def check_rereadable(batches: object, name: str) -> None:
    """An InputError where batches have no length, as a generator's, which one epoch would use up.
    """
    count = None
    if isinstance(batches, Sized):
        with contextlib.suppress(TypeError):  # a loader of a stream has a length in name only
            count = len(batches)
    if count is None:
        raise InputError(
            f"Expected {name} that have a length and can be read again for every epoch (a "
            f"DataLoader, a list), came {type(batches).__name__}."
        )
    if count == 0:
        raise InputError(f"Expected at least one batch in {name}, came none.")


def input_and_target(batch: Any) -> tuple[Tensor, Any]:
    """The two parts `(x, y)` of a batch, `x` a tensor and not of bytes; else an InputError."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        if isinstance(batch, dict):
            came = f"a dict of {', '.join(map(str, batch))}"
        elif isinstance(batch, (tuple, list)):
            came = f"a {type(batch).__name__} of {len(batch)}"
        else:
            came = f"a {type(batch).__name__}"
        raise InputError(f"Expected batches (x, y) of model inputs and targets, came {came}. Put "
                         "them into a list of pairs, or into a Dataset that gives pairs.")
    x, y = batch
    if not isinstance(x, Tensor) or x.dtype == torch.uint8:
        came = f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(
            "Expected batches (x, y) with x a tensor as the model takes it, came "
            f"{came}. Bytes become inputs by Normalization.to_input(pixels.float() / 255)."
        )
    return x, y


def check_count(value: object, name: str, least: int, *, optional: bool = False) -> None:
    """An InputError where it is no whole number of at least `least`, or None where it may be."""
    if optional and value is None:
        return
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or int(value) < least:  # type: ignore[call-overload]
        raise InputError(
            f"Expected {name} as a whole number of at least {least}{' or None' * optional}, came "
            f"{value!r}."
        )


def check_number(value: object, name: str, least: float = 0.0) -> None:
    """An InputError where it is no finite number of at least `least`."""
    if not is_number(value) or not least <= float(value) < math.inf:  # type: ignore[arg-type]
        raise InputError(f"Expected {name} as a number of at least {least:g}, came {value!r}.")


def is_number(value: object) -> bool:
    """Whether it is a real number, or a tensor of one."""
    scalar = isinstance(value, Tensor) and value.numel() == 1
    return scalar or (isinstance(value, Real) and not isinstance(value, bool))


def check_among(value: object, name: str, known: Sequence[str]) -> None:
    """An InputError where it is none of the names."""
    if value not in known:
        raise InputError(f"Expected {name} out of {', '.join(known)}, came {value!r}. "
                         f"{nearest(str(value), known)}")


def check_callable(value: object, name: str, called_with: str) -> None:
    """An InputError where it is neither None nor something that can be called."""
    if value is not None and not callable(value):
        raise InputError(f"Expected {name} as a function, called with {called_with}, or None, came "
                         f"{value!r}.")


def check_kind(value: object, name: str, kind: type, advice: str) -> None:
    """An InputError where it is of another type."""
    if not isinstance(value, kind):
        raise InputError(
            f"Expected {name} as a {kind.__name__}, came {type(value).__name__}. {advice}")


def warn_if_unfitted(objective: object) -> None:
    """A warning where the attackers inside, by whom something is scored, have learnt nothing."""
    surrogates = getattr(objective, "surrogates", None)
    if getattr(objective, "beta", 0.0) > 0 and not getattr(surrogates, "is_fitted", True):
        warnings.warn("The attackers inside have learnt nothing yet, and their term says nothing: "
                      "call objective.fit_surrogates(batches, steps=300) first.", stacklevel=3)


def check_objective(objective: object) -> None:
    """An InputError where it is no `PatrolObjective`."""
    if not all(hasattr(objective, part) for part in ("split", "terms")):
        raise InputError(
            f"Expected objective as a PatrolObjective, came {type(objective).__name__}. Make one: "
            "PatrolObjective(split, task_loss, beta=10.0)."
        )


def check_targets(logits: Tensor, y: object) -> None:
    """An InputError where cross-entropy over `logits [B, K]` cannot take the labels `y`."""
    if logits.dim() != 2 or not isinstance(y, Tensor):
        return
    if y.is_floating_point() and y.shape == logits.shape:  # probabilities
        return
    if y.dtype not in (torch.long, torch.uint8) or y.dim() != 1:
        raise InputError(
            f"Expected labels as int64 of shape [{len(logits)}], came {y.dtype} of shape "
            f"{tuple(y.shape)}. Give y.long(), and y.squeeze(1) where there is a dimension of 1."
        )
    least, most = (int(y.min()), int(y.max())) if y.numel() else (0, 0)
    if most >= logits.shape[1] or (least < 0 and bool(((y < 0) & (y != -100)).any())):
        raise InputError(
            f"Labels must lie in 0..{logits.shape[1] - 1}, as the model has {logits.shape[1]} "
            f"outputs; came {most if most >= logits.shape[1] else least}. Give the model as many "
            "outputs as there are classes."
        )


def check_readable(model: nn.Module) -> None:
    """Refuse by name the forms of a model that cannot be followed.

    Raises:
        UnsupportedModelError: a scripted or compiled model, or one on the meta device.
    """
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        check_uncompiled(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise _unreadable(model, "torch.jit.script around it", "Give it as it was before")
    if any(t.is_meta for t in _tensors_of(model)):
        raise _unreadable(model, "tensors on the meta device", "Load its weights first")


def check_uncompiled(model: nn.Module) -> None:
    """An UnsupportedModelError where torch.compile is around the model or a module inside."""
    for name, module in model.named_modules():
        is_around = isinstance(getattr(module, "_orig_mod", None), nn.Module)
        if is_around or module._compiled_call_impl is not None:
            at = f"its {name}" if name else "it"
            raise _unreadable(model, f"torch.compile around {at}", "Give the model as it was "
                              f"before torch.compile{', model._orig_mod' * (not name)}")


def check_changeable(model: nn.Module) -> None:
    """Refuse by name the forms of a model that cannot be pruned.

    Raises:
        UnsupportedModelError: as `check_readable`; statically quantised layers, inference tensors.
    """
    check_readable(model)
    if any(type(m).__module__.startswith(_QUANTISED) for m in model.modules()):
        raise _unreadable(model, "quantised layers", "Quantise it after it was pruned")
    if any(t.is_inference() for t in _tensors_of(model)):
        raise _unreadable(model, "tensors made under torch.inference_mode()",
                          "Make it outside, or under no_grad()")


def does_not_run(model: nn.Module, example_inputs: Any, error: Exception) -> InputError:
    """What to raise where a model fails on its example inputs."""
    came = ", ".join(f"shape {tuple(x.shape)} ({x.dtype})" if isinstance(x, Tensor)
                     else type(x).__name__ for x in tree_leaves(example_inputs))
    return InputError(
        f"Expected example_inputs that {type(model).__name__} can run on, came {came or 'none'} "
        f"and the forward pass failed: {error}. Give a batch of the size and type the model takes."
    )


def _tensors_of(model: nn.Module) -> list[Tensor]:
    lazy = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
    return [t for t in (*model.parameters(), *model.buffers()) if not isinstance(t, lazy)]


def _unreadable(model: nn.Module, came: str, advice: str) -> UnsupportedModelError:
    return UnsupportedModelError("Expected a model whose layers can be followed and changed, came "
                                 f"{type(model).__name__} with {came}. {advice}.")


def check_loss_value(value: object, name: str = "task_loss") -> None:
    """An InputError where a loss, or another term, is no scalar tensor."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"Expected {name} to give one number as a tensor, came {came}. Give "
                         "the mean over the batch, with its gradient.")


@contextlib.contextmanager
def told_if_unlike(x: Tensor, example: Tensor) -> Iterator[None]:
    """An InputError where a model fails inside on a batch that is unlike what it was cut with."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if x.shape[1:] == example.shape[1:] and x.dtype == example.dtype:
            raise
        raise InputError(
            f"Expected a batch like the split's example inputs, {tuple(example.shape)} "
            f"{example.dtype}, came {tuple(x.shape)} {x.dtype}, on which the model fails: "
            f"{(str(error).splitlines() or [''])[0]}. Give what the model takes."
        ) from error


def check_task_loss(task_loss: object) -> None:
    """An InputError where it cannot be called."""
    if not callable(task_loss) or isinstance(task_loss, type):
        raise InputError(
            "Expected task_loss as a function of logits and targets, came "
            f"{task_loss!r}. Give torch.nn.functional.cross_entropy, say."
        )


def image_shape(example: Tensor, advice: str = "") -> tuple[int, int, int]:
    """`(channels, height, width)` of a model's input; an InputError where it is no picture."""
    shape = tuple(example.shape[1:])
    if len(shape) != 3:
        raise InputError(f"Expected a model of images [N, C, H, W], came inputs {shape}.{advice}")
    return shape


def share_outside(pixels: Tensor, slack: float = 0.02) -> float:
    """The share of values that lie outside of [-slack, 1 + slack]."""
    with torch.no_grad():
        return float(((pixels < -slack) | (pixels > 1.0 + slack)).float().mean())


def real(z: Tensor) -> Tensor:
    """An upload as real numbers in one to three dimensions beside the batch.

    Real and imaginary parts become channels, and so do dimensions over three; one number for each
    picture becomes a vector.

    Raises:
        InputError: it is no tensor, or has no batch dimension.
    """
    if not isinstance(z, Tensor) or z.dim() == 0:
        came = "a number" if isinstance(z, Tensor) else type(z).__name__
        raise InputError(
            f"Expected an edge that sends one tensor [N, ...], came {came}. Wrap it in a module "
            "that returns the tensor that is uploaded."
        )
    if z.dim() == 1:
        z = z[:, None]
    if z.is_complex():
        z = torch.cat([z.real, z.imag], -1 if z.dim() == 3 else 1)
    return z.flatten(1, z.dim() - 3) if z.dim() > 4 else z
