"""Distillation from the dense model: its answers, and the features its last layer reads.

Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015; features as
in Romero et al., FitNets, ICLR 2015, at the last linear layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patrol_prune.errors import InputError


def logit_distance(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """`T^2 * KL(softmax(target / T) || softmax(logits / T))` of class logits `[B, K, ...]`.

    Mean over the batch, and over the positions of answers that have some, as a mask's pixels.
    """
    distance = temperature**2 * F.kl_div(
        F.log_softmax(logits / temperature, 1),
        F.log_softmax(target / temperature, 1),
        log_target=True,
        reduction="batchmean",
    )
    return distance if logits.dim() == 2 else distance / logits[0, 0].numel()


def feature_distance(features: Tensor, target: Tensor) -> Tensor:
    """`||h - t||^2 / ||t||^2` over the whole batch, of features `[B, ...]`; 0 for equal ones."""
    return (features - target).square().sum() / target.square().sum().clamp_min(1e-12)


_LAST_LAYERS = 3
"""An auxiliary head may run behind the classifier, in training alone."""


class _Tap:
    """Forward pre-hook of a model's linear layers: keeps what the last few that ran were given.

    What it has seen at the end of a pass is `kept`, though parts of the model may run again.
    """

    def __init__(self, model: nn.Module, ends: Sequence[nn.Module]) -> None:
        self.names: dict[nn.Module, str] = {
            m: n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.layers = list(self.names)
        self.ends = ends
        self.seen: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        if not self.layers:
            raise InputError(
                f"Expected a model with a linear layer to compare features before, came "
                f"{type(model).__name__} with none. Set feature_weight to 0."
            )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self.names[module]
        self.seen.pop(name, None)
        self.seen[name] = args[0] if args else kwargs["input"]
        if len(self.seen) > _LAST_LAYERS:
            del self.seen[next(iter(self.seen))]

    def keep(self, *_: Any) -> None:
        """Forward hook of what ends a pass."""
        self.kept = dict(self.seen)


class Distiller:
    """Both distances between a model in training and a teacher that stands still.

    With `features`, its hooks stand on both models from `attach` to `close`.

    Args:
        model: the one that learns.
        teacher: the dense model.
        temperature: of the softened answers.
        features: compare the inputs of the last linear layers that run too.
        cloud: the half of the model with which its pass ends, where the halves run by themselves.
        answers: compare the answers, which must be class logits `[B, K, ...]`.

    Raises:
        InputError: with `features`, a model or a teacher without a linear layer, or layers that
            read different numbers of features.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module, temperature: float, *, features: bool = False,
        cloud: nn.Module | None = None, answers: bool = True,
    ) -> None:
        self.teacher, self.temperature, self.answers = teacher, temperature, answers
        self.taps: tuple[_Tap, _Tap] | None = None
        self._handles: list[Any] = []
        if features:
            ends = (model,) if cloud is None else (model, cloud)
            self.taps = _Tap(model, ends), _Tap(teacher, (teacher,))

    def __call__(self, x: Tensor, logits: Any) -> tuple[Tensor | None, Tensor | None]:
        """`(logit distance, feature distance)`, None for what is not compared; call it after the
        model ran on `x`.
        """
        with torch.no_grad():
            target = self.teacher(x)
        distance = self._between(logits, target) if self.answers else None
        if self.taps is None:
            return distance, None
        mine, dense = (tap.kept for tap in self.taps)
        same = next((name for name in reversed(mine) if name in dense), None)
        own, theirs = (None, None) if same is None else (mine[same], dense[same])
        if own is None or theirs is None or own.shape != theirs.shape:
            came = [None if seen is None else tuple(seen.shape) for seen in (own, theirs)]
            raise InputError(
                f"Expected last linear layers that read as many features, came {came[0]} and the "
                f"teacher's {came[1]}. Set feature_weight to 0."
            )
        return distance, feature_distance(own.float(), theirs.float())

    def _between(self, logits: Any, target: Any) -> Tensor:
        """The distance of both answers, once they are known to be logits of the same classes."""
        if not (isinstance(target, Tensor) and isinstance(logits, Tensor)):
            raise InputError("Expected a model and a teacher that return logits as tensors, to "
                             f"distil them, came a {type(target).__name__}. Set distill_weight "
                             "to 0, or give no teacher.")
        if target.shape != logits.shape:
            raise InputError(
                f"Expected a teacher with the model's answers {tuple(logits.shape)}, came "
                f"{tuple(target.shape)}. Give one that knows the same classes."
            )
        if logits.dim() < 2 or logits.shape[1] < 2:
            raise InputError(
                "Expected logits [B, K, ...] of two classes or more, to distil them, came "
                f"{tuple(logits.shape)}: a softmax says nothing of one. Set distill_weight to 0."
            )
        return logit_distance(logits, target.float(), self.temperature)

    def attach(self) -> None:
        """Put the hooks on both models."""
        for tap in self.taps or ():
            self._handles += [layer.register_forward_pre_hook(tap, with_kwargs=True)
                              for layer in tap.layers]
            self._handles += [end.register_forward_hook(tap.keep) for end in tap.ends]

    def close(self) -> None:
        """Take the hooks off both models, and let go of what they saw."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for tap in self.taps or ():
            tap.seen, tap.kept = {}, {}
