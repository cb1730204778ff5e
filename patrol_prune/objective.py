"""PATROL's objective. Every sign of the method stands in this file, and nowhere else.

    J(theta, m) = L(theta, m) + sum_i alpha_i k_i - beta * min_s L_adv,s

The model minimises `J`; the surrogates minimise their own `L_adv`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from patrol_prune.cost import evaluating
from patrol_prune.errors import InputError
from patrol_prune.given import (
    check_among,
    check_count,
    check_full_precision,
    check_loss_value,
    check_normalization,
    check_number,
    check_split,
    check_targets,
    check_task_loss,
    image_shape,
    input_and_target,
    share_outside,
    told_if_unlike,
)
from patrol_prune.lipschitz import (
    LipschitzForm,
    Reduction,
    block_lipschitz,
    frozen_statistics,
    lipschitz_loss,
)
from patrol_prune.pixels import Normalization
from patrol_prune.precision import PRECISIONS, autocast, in_float32
from patrol_prune.regions import PrivateRegions, check_regions
from patrol_prune.spectral import SpectralBounds
from patrol_prune.split import Split
from patrol_prune.surrogate import (
    DEFAULT_SURROGATES,
    FEW_OUTSIDE,
    SurrogateEnsemble,
    SurrogateSpec,
    checked_specs,
)

if TYPE_CHECKING:
    from patrol_prune.masks import SoftMasks

TaskLoss = Callable[[Tensor, Tensor], Tensor]


def _numbers(alpha: float | Sequence[float]) -> list[float]:
    """Weights as a list."""
    try:
        return [float(v) for v in torch.as_tensor(alpha, dtype=torch.double).flatten()]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Expected alpha as a number or one for each edge block, came {alpha!r}.") from error


@dataclass
class ObjectiveTerms:
    """The parts of the objective for one batch, scalars with a graph behind them.

    `lipschitz` is `sum_i alpha_i k_i`, weights included; `adversarial` is the mean over images of
    `L_adv`, without `beta`. Either is None where its weight is 0.
    `total = task + lipschitz - beta * adversarial`.
    """

    task: Tensor
    lipschitz: Tensor | None
    adversarial: Tensor | None
    total: Tensor
    block_lipschitz: Tensor | None
    z: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Belief:
    """What the attackers inside reconstruct: means over images of the best surrogate's figures.

    `mse` on [0, 1] pixels; `ssim` is NaN for images of under 11 pixels a side.
    """

    mse: float
    ssim: float


class PatrolObjective:
    """Task loss, Lipschitz term and adversarial-reconstruction term over a split.

    `J = L + sum_i alpha_i k_i - beta L_adv`. The model minimises `J`, the surrogates their own
    error; `L_adv` is that of the best of them on each image, see `SurrogateEnsemble`.

    Args:
        split: the cut model. Pruning it changes what the objective sees, as it should.
        task_loss: `task_loss(logits, y) -> scalar`; only the model's parameters are trained.
        alpha: weight of the block-wise Lipschitz constants `k_i`, one or one per block; 0 leaves
            them out.
        beta: weight of the adversarial reconstruction error; 0 leaves it out.
        noise_std: standard deviation of the Lipschitz perturbation, in input units.
        lipschitz_form: "paper" or "scale_free", see `block_lipschitz`; or "spectral", an upper
            bound from the layers' spectral norms, which looks at no image and no noise.
        lipschitz_reduction: "max" or "mean" over the batch.
        lipschitz_images: the first so many images of a batch are perturbed; the term is computed
            in full precision, where the rest may be mixed.
        adversarial_images: the adversarial term and the surrogates' steps take the first so many
            images of a batch; all of them where None. Fewer are cheaper and noisier.
        surrogates: architectures of the attackers inside; or "usual", the default's two, or
            "large", three stronger ones that cost several times as much.
        surrogate_lr: learning rate of the attackers inside.
        surrogate_loss: what they minimise and the model maximises: "mse" is the paper's form,
            "mse+ssim" (`MSE + 0.1 (1 - SSIM)`) decodes far more near the mean image, "auto" is the
            latter where the images have at least 11 pixels a side.
        private: where pictures are private: both terms of an image's error, for the model and for
            the attackers inside, count more there; None counts every pixel the same.
        normalization: the map from pixels on [0, 1] to the model's input.
        precision: "auto", "fp32" or "bf16" arithmetic of the edge, the cloud and the surrogates;
            in training, "auto" leaves it to the training's own setting.
        seed: of the perturbations, the surrogates' initial weights and the spectral form's vectors.

    Raises:
        InputError: a setting out of its range; `beta` with inputs that are no images.
        UnsupportedModelError: the spectral form does not know an operator of the edge.
    """

    def __init__(
        self,
        split: Split,
        task_loss: TaskLoss,
        *,
        alpha: float | Sequence[float] = 0.0,
        beta: float = 0.0,
        noise_std: float = 0.1,
        lipschitz_form: LipschitzForm = "scale_free",
        lipschitz_reduction: Reduction = "max",
        lipschitz_images: int = 32,
        adversarial_images: int | None = None,
        surrogates: Sequence[SurrogateSpec] | str = DEFAULT_SURROGATES,
        surrogate_lr: float = 2e-3, surrogate_loss: str = "auto",
        private: PrivateRegions | None = None,
        normalization: Normalization | None = None,
        precision: str = "auto",
        seed: int = 0,
    ) -> None:
        check_split(split)
        check_task_loss(task_loss)
        check_normalization(normalization)
        check_number(beta, "beta")
        check_count(lipschitz_images, "lipschitz_images", 1)
        check_count(adversarial_images, "adversarial_images", 2, optional=True)
        check_among(lipschitz_form, "lipschitz_form", get_args(LipschitzForm))
        check_among(lipschitz_reduction, "lipschitz_reduction", get_args(Reduction))
        check_among(precision, "precision", PRECISIONS)
        check_regions(private)
        specs = checked_specs(surrogates, surrogate_lr, surrogate_loss)
        alphas = _numbers(alpha)
        weights = [*alphas, beta]
        if (not alphas or not all(0 <= w < math.inf for w in weights) or not noise_std > 0
                or lipschitz_images < 1):
            raise InputError(
                "Expected finite alpha >= 0, beta >= 0, noise_std > 0 and lipschitz_images >= 1, "
                f"came alpha={alpha}, beta={beta}, noise_std={noise_std}, "
                f"lipschitz_images={lipschitz_images}. The signs are the objective's business."
            )
        self.split, self.task_loss = split, task_loss
        self.alpha, self.beta, self.noise_std = alpha, float(beta), float(noise_std)
        self.uses_lipschitz = max(alphas) > 0
        self.lipschitz_form, self.lipschitz_reduction = lipschitz_form, lipschitz_reduction
        self.lipschitz_images = int(lipschitz_images)
        self.adversarial_images = None if adversarial_images is None else int(adversarial_images)
        self.normalization = normalization or Normalization()
        self.precision = precision
        self.specs, self.surrogate_lr, self.seed = specs, float(surrogate_lr), seed
        self.surrogate_loss, self.private = surrogate_loss, private
        self.generator = torch.Generator().manual_seed(seed)
        self._looked = False
        self._surrogates: SurrogateEnsemble | None = None
        self._spectral: SpectralBounds | None = None
        if self.beta > 0:
            self.example_shape  # noqa: B018  inputs that are no images are refused here
        if self.uses_spectral:
            self.spectral  # noqa: B018  an edge it cannot read is refused here

    @property
    def uses_spectral(self) -> bool:
        """Whether the Lipschitz term is the bound from spectral norms."""
        return self.uses_lipschitz and self.lipschitz_form == "spectral"

    @property
    def spectral(self) -> SpectralBounds:
        """The bounds of the edge's blocks; called, they give `k`, `[N]`. Fresh after pruning."""
        if self._spectral is None or not self._spectral.fits(self.split.blocks):
            self._spectral = SpectralBounds(self.split.blocks, self.split.example_inputs,
                                            seed=self.seed)
        return self._spectral

    def state(self) -> dict[str, Tensor]:
        """What training carries from step to step, but for the weights and the surrogates."""
        tensors = {"generator": self.generator.get_state()}
        if self.uses_spectral:
            tensors |= {f"spectral.{k}": v for k, v in self.spectral.state().items()}
        return tensors

    def settings(self) -> dict[str, Any]:
        """What the terms depend on, as JSON; a training goes on with the same only. A subclass adds
        what its own terms depend on.
        """
        alphas = torch.as_tensor(self.alpha, dtype=torch.double).tolist()
        pixels = self.normalization
        pixels_as = {"mean": [float(v) for v in pixels.mean], "std": [float(v) for v in pixels.std]}
        private = {} if self.private is None else {"private_share": self.private.share}
        return {"alpha": alphas, **pixels_as, **private, **{name: getattr(self, name) for name in (
            "beta", "noise_std", "lipschitz_form", "lipschitz_reduction", "lipschitz_images",
            "adversarial_images", "surrogate_loss", "surrogate_lr")}}

    def load_state(self, tensors: Mapping[str, Tensor], path: str) -> None:
        """Put back what `state` gave, from among `tensors`.

        Raises:
            CheckpointError: the edge or the Lipschitz form is another one; `path` is named.
        """
        self.generator.set_state(tensors["generator"])
        if self.uses_spectral:
            prefix = "spectral."
            vectors = {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}
            self.spectral.load_state(vectors, path)

    @property
    def surrogates(self) -> SurrogateEnsemble:
        """The attackers inside; fresh ones when the transmitted feature has changed its shape."""
        shape = tuple(self.split.feature_shape)
        if self._surrogates is None or self._surrogates.feature_shape != shape:
            _, channels, height, width = self.example_shape
            self._surrogates = SurrogateEnsemble(
                shape, (channels, height, width), self.specs, lr=self.surrogate_lr,
                loss=self.surrogate_loss, seed=self.seed, private=self.private,
            )
        device = next(self.split.model.parameters()).device
        self._surrogates.move(device)
        return self._surrogates

    @property
    def example_shape(self) -> tuple[int, int, int, int]:
        """`(1, channels, height, width)` of the model's input."""
        inputs = self.split.example_inputs
        x = inputs if isinstance(inputs, Tensor) else inputs[0]
        return (1, *image_shape(x, " The attackers inside rebuild images: leave beta at 0 here. A "
                                "subclass with attackers of its own overrides example_shape."))

    def pixels(self, x: Tensor) -> Tensor:
        """The pixels behind model inputs, on [0, 1]: what the surrogates reconstruct.

        The first time, it warns where many of them lie outside, as without `normalization=`.
        """
        if not self._looked:
            self._looked = True
            share = share_outside(self.normalization.to_pixels(x, clamp=False).float())
            if share > FEW_OUTSIDE:
                warnings.warn(
                    f"{100 * share:.0f}% of the pixels behind the model's inputs lie outside of "
                    "[0, 1] and are clamped: the attackers inside learn other pictures than the "
                    "model sees. Give normalization= the mean and std that the inputs were made "
                    "with, of pixels on [0, 1].", stacklevel=2,
                )
        return self.normalization.to_pixels(x).float()

    def terms(
        self, x: Tensor, y: Tensor, *, masks: SoftMasks | None = None, beta_scale: float = 1.0
    ) -> ObjectiveTerms:
        """All terms for one batch.

        Args:
            x: model input `[B, C, H, W]`.
            y: what the task loss compares with.
            masks: soft masks through which everything is computed, where structures are scored.
            beta_scale: a factor on `beta`, for a warm-up.

        Returns:
            scalars with their graph, `task`, `lipschitz` (weighted) and `adversarial` (without
            `beta`), the two None where their weight is 0, and `total`; then `block_lipschitz`,
            `k` as `[N]`, the features `z` and the answers `logits`, in float32.

        Raises:
            InputError: images or labels that do not fit the model, or a loss that is no scalar.
        """
        attached = contextlib.nullcontext() if masks is None else masks.attached()
        with attached:
            with (told_if_unlike(x, self.split.example_inputs),
                  autocast(x.device, self.precision)):
                if masks is None:
                    z = self.split.edge(x)
                    logits = self.split.cloud(z)
                else:
                    z, logits = masks.split_forward(x)
            z = z.float()
            logits = in_float32(logits)
            if self.task_loss is F.cross_entropy and isinstance(logits, Tensor):
                check_targets(logits, y)
            task = self.task_loss(logits, y)
            check_loss_value(task)
            constants = self._block_lipschitz(x) if self.uses_lipschitz else None
        total = task
        lipschitz = None
        if constants is not None:
            lipschitz = lipschitz_loss(constants, self.alpha)
            total = total + lipschitz
        adversarial = None
        if self.beta > 0:
            adversarial = self._adversarial(z, x)
            total = total - beta_scale * self.beta * adversarial
        return ObjectiveTerms(task, lipschitz, adversarial, total, constants, z, logits)

    def update_surrogates(self, z: Tensor, x: Tensor) -> Tensor:
        """One inner step on features that the edge gave for `x`; mean error of each, `[S]`."""
        z, x = z[: self.adversarial_images], x[: self.adversarial_images]
        pixels = self.pixels(x)
        return self.surrogates.step(z.detach(), pixels, precision=self.precision)

    def fit_surrogates(self, batches: Iterable[tuple[Tensor, Tensor]], steps: int) -> float:
        """Train the surrogates alone for `steps` batches; returns the last best mean error.

        Too few batches are read again. The model's mode and statistics are left as they are.

        Raises:
            InputError: no batch, or too few that cannot be read again.
        """
        check_count(steps, "steps", 1)
        check_full_precision(self.split.model, self.split.example_inputs, but=(torch.bfloat16,))
        self.split.refresh()  # a pruner may have been at work
        edge = self.split.edge
        device = next(self.split.model.parameters()).device
        done, error = 0, float("nan")
        with evaluating(edge):
            while done < steps:
                before = done
                for batch in itertools.islice(batches, steps - done):
                    x = input_and_target(batch)[0].to(device)
                    with torch.no_grad(), autocast(device, self.precision):
                        z = edge(x).float()
                    self.surrogates.observe(z, self.pixels(x))
                    error = float(self.update_surrogates(z, x).min())
                    done += 1
                if done == before:
                    raise InputError(f"Expected batches for {steps} steps, came {done or 'none'}. "
                                     "Give some that can be read again, as a DataLoader or a list.")
        return error

    @torch.no_grad()
    def belief(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Belief:
        """What the surrogates get out of these images, the best of them on each; nothing learns.

        Gives `mse` and `ssim`, means over images; SSIM is NaN under 11 pixels a side. The edge runs
        in evaluation mode, as deployed. Give images that neither the model nor the surrogates were
        trained on: what a fresh, stronger attacker gets beyond it is the surrogate gap.

        Raises:
            InputError: no batch.
        """
        device = next(self.split.model.parameters()).device
        found: list[tuple[Tensor, Tensor]] = []
        with evaluating(self.split.edge):
            for batch in batches:
                x = input_and_target(batch)[0]
                pixels = self.pixels(x.to(device))
                found.append(self.surrogates.believed(self.split.edge(x.to(device)), pixels))
        if not found:
            raise InputError("Expected batches to measure the surrogates on, came none.")
        mse, ssim = (torch.cat(values) for values in zip(*found, strict=True))
        return Belief(float(mse.mean()), float(ssim.mean()))

    def _adversarial(self, z: Tensor, x: Tensor) -> Tensor:
        z, x = z[: self.adversarial_images], x[: self.adversarial_images]
        pixels = self.pixels(x)
        return self.surrogates.strongest(z, pixels, precision=self.precision).mean()

    def _block_lipschitz(self, x: Tensor) -> Tensor:
        if self.lipschitz_form == "spectral":
            with autocast(x.device, "fp32"):
                return self.spectral()
        part = x[: self.lipschitz_images]
        noise = torch.randn(part.shape, generator=self.generator) * self.noise_std
        with autocast(x.device, "fp32"), frozen_statistics(self.split.edge):
            return block_lipschitz(self.split.blocks, part, noise.to(x.device),
                                   form=self.lipschitz_form, reduction=self.lipschitz_reduction)
