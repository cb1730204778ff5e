"""What every defence offers, and the few things that several of them share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patrol_prune.cost import device_of, evaluating, feature_bytes
from patrol_prune.errors import InputError
from patrol_prune.given import is_number
from patrol_prune.lipschitz import LipschitzForm
from patrol_prune.objective import PatrolObjective, TaskLoss
from patrol_prune.pixels import Normalization
from patrol_prune.split import Split
from patrol_prune.surrogate import DEFAULT_SURROGATES, SurrogateSpec

_BATCH = 256


@dataclass(frozen=True)
class Defence:
    """One way to make uploads harder to invert, at one strength::

        split = defence.apply(split, calibration=x)
        finetune(split, batches, objective=defence.objective(split, normalization=n), ...)
        audit(split, ...)

    `split.model.state_dict()` then holds everything, calibrated values and the state of random
    draws included: `apply` on a fresh split, without calibration, and `load_state_dict` give the
    same edge, as `save` and `load` do. This base changes nothing; each defence overrides what it
    needs.

    Attributes:
        name: as `make_defence` takes it.
        swept: the field that is the defence's strength; empty for one without.
    """

    name: ClassVar[str]
    swept: ClassVar[str] = ""

    @property
    def strength(self) -> float:
        """The value of the field `swept`, 0 without one; which way is stronger, see the class."""
        return float(getattr(self, self.swept)) if self.swept else 0.0

    def apply(self, split: Split, *, calibration: Tensor | None = None) -> Split:
        """The split as it runs from now on.

        A new `Split` that shares the layers of the one given, which may go on being used; `split`
        itself where nothing is put behind the edge. Its `model` has the parts `edge.features`
        (the old edge), `edge.upload` (the defence) and `cloud`. Modes come back as they were.

        Args:
            split: pruned or not; prune and recalibrate BatchNorm before, as the values measured
                here are those of the edge as it is now.
            calibration: model inputs `[N, ...]`, of which features are measured where the
                defence needs it. Without them the upload is NaN until a state is loaded.

        Raises:
            InputError: calibration that the edge cannot run on, or features that are not finite.
        """
        return split

    def objective(
        self,
        split: Split,
        *,
        normalization: Normalization | None = None,
        seed: int = 0,
        task_loss: TaskLoss = F.cross_entropy,
    ) -> PatrolObjective | None:
        """What `finetune(split, objective=...)` takes; None where the task alone is trained.

        Args:
            split: what `apply` returned.
            normalization: from pixels on [0, 1] to the model's input.
            seed: of everything that the objective draws.
            task_loss: `task_loss(logits, y) -> scalar`.
        """
        return None

    def upload_bytes(self, feature_shape: Sequence[int]) -> int:
        """Bytes of one upload, as float32 where the defence does not say otherwise.

        Args:
            feature_shape: `feature_shape` of the split that `apply` returned, without the batch.
        """
        return feature_bytes(feature_shape)


@dataclass(frozen=True)
class Adversary:
    """The attackers inside training, for the defences that have an adversarial term.

    Attributes:
        images: the first so many images of a batch are attacked; all of them where None.
        surrogates: their architectures, or the name of a set, see `PatrolObjective`.
        lr: their learning rate.
        loss: "mse", "mse+ssim" or "auto", see `PatrolObjective`.
        precision: "auto", "fp32" or "bf16" arithmetic of edge, cloud and surrogates.
    """

    images: int | None = None
    surrogates: tuple[SurrogateSpec, ...] | str = DEFAULT_SURROGATES
    lr: float = 2e-3
    loss: str = "auto"
    precision: str = "auto"

    def objective(
        self,
        split: Split,
        task_loss: TaskLoss,
        *,
        beta: float,
        alpha: float = 0.0,
        lipschitz_form: LipschitzForm = "scale_free",
        normalization: Normalization | None,
        seed: int,
    ) -> PatrolObjective:
        """`L_task + alpha sum_i k_i - beta L_adv` with these attackers."""
        return PatrolObjective(
            split, task_loss, alpha=alpha, beta=beta, lipschitz_form=lipschitz_form,
            adversarial_images=self.images,
            surrogates=self.surrogates, surrogate_lr=self.lr, surrogate_loss=self.loss,
            normalization=normalization, precision=self.precision, seed=seed,
        )


def check_at_least(value: float, least: float, name: str, defence: str) -> None:
    """An InputError where `value` is under `least` or no number."""
    if not is_number(value) or not value >= least or value == float("inf"):
        raise InputError(f"{defence}: expected {name} of at least {least:g}, came {value}.")


def check_share(value: float, name: str, defence: str) -> None:
    """An InputError where `value` is outside [0, 1)."""
    if not is_number(value) or not 0 <= value < 1:
        raise InputError(f"{defence}: expected {name} in [0, 1), came {value!r}.")


def sent_dtype(z: Tensor) -> torch.dtype:
    """In which type what stands behind an edge, which computes in float32, hands `z` on: that of a
    model in half precision, so that its cloud can read it, and float32 under autocast.
    """
    return torch.float32 if torch.is_autocast_enabled(z.device.type) else z.dtype


def calibration_features(split: Split, calibration: Tensor) -> Tensor:
    """`edge(calibration)` in evaluation mode and full precision, float32 on the edge's device.

    Raises:
        InputError: no inputs, or features that are not finite.
    """
    if not isinstance(calibration, Tensor) or len(calibration) == 0:
        came = tuple(calibration.shape) if isinstance(calibration, Tensor) else type(calibration)
        raise InputError(f"Expected calibration as model inputs [N, ...] with N >= 1, came {came}.")
    device = device_of(split.edge, calibration)
    with evaluating(split.edge), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            z = torch.cat([split.edge(x.to(device)).float() for x in calibration.split(_BATCH)])
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"Expected calibration as inputs that the edge can run on, came "
                f"{calibration.dtype} of shape {tuple(calibration.shape)}: "
                f"{str(error).splitlines()[0]}. Give normalised images of the size and type the "
                "model takes."
            ) from error
    if not torch.isfinite(z).all():
        raise InputError("The edge's features of the calibration inputs hold NaN or infinite "
                         "values. Check the inputs and the edge's weights.")
    return z


def wrapped(
    split: Split, upload: nn.Module, receive: nn.Module | None = None, *,
    by: Defence | None = None,
) -> Split:
    """A split whose edge ends in `upload`, and whose cloud starts with `receive` if there is one.

    The layers are those of `split`; the new modules take its device and mode.

    Args:
        split: before.
        upload: from feature to feature.
        receive: from what comes to what the old cloud takes.
        by: the defence that puts them there, so that `save` can tell of it: its `name` and those
            of its fields that are numbers or words.
    """
    device = device_of(split.model, split.example_inputs)
    cloud = split.cloud
    if receive is not None:
        cloud = nn.Sequential(OrderedDict(receive=receive, rest=split.cloud))
    edge = nn.Sequential(OrderedDict(features=split.edge, upload=upload))
    for module in (upload, *(() if receive is None else (receive,))):
        module.to(device).train(split.model.training)
    made = Split.from_modules(edge, cloud, split.example_inputs)
    for module in (made.model, edge, cloud):
        module.training = split.model.training
    if by is not None:
        made.undefended, made.defence = split, by
        made.behind = {"upload": upload} | ({} if receive is None else {"receive": receive})
    return made
