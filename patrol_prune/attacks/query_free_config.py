"""Settings of the attack without queries, and what each of its modes needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from patrol_prune.attacks.base import Knowledge
from patrol_prune.attacks.inverse_network_config import InverseNetworkConfig
from patrol_prune.attacks.rmle import RMLEConfig
from patrol_prune.attacks.training_pairs import SMALLEST_TRAINING_SET
from patrol_prune.errors import InputError, nearest
from patrol_prune.metrics import check_pixels
from patrol_prune.precision import PRECISIONS

MODES: tuple[str, ...] = ("shadow_same", "shadow_other", "match")
RECONSTRUCTIONS: tuple[str, ...] = ("decoder", "linear", "rmle")
LEAST_HELD_OUT = 2
SMALLEST_QUERY_FREE_SET = SMALLEST_TRAINING_SET + LEAST_HELD_OUT
"""What a reconstruction learns from, and what measures it."""

_STARTS = 4


@dataclass(frozen=True)
class QueryFreeConfig:
    """Settings of `QueryFree`.

    Args:
        mode: `"shadow_same"` knows the edge's architecture and has labels and the cloud;
            `"shadow_other"` has labels and the cloud and builds a network of its own; `"match"`
            has no labels: its shadow's features, and what the cloud makes of them, only have to be
            distributed like the observed ones (of the edge's architecture where that is known).
        epochs: of every shadow's training.
        moment_epochs: epochs before these in which the cloud takes no part, which are cheap
            where the edge is small.
        lr: peak learning rate of Adam, linear warm-up, then cosine.
        batch_size: images per step.
        task_weight: of the cross-entropy through the cloud; none in `"match"`.
        moment_weight: of the distance between the moments of the shadow's features and of the
            uploads, where some were observed.
        output_weight: of the same distance of the cloud's outputs, where uploads were observed.
        entropy_weight: of the mean entropy of the cloud's answers, in `"match"`.
        width: channels of the network of its own, where it is not of the edge's architecture.
        shadows: how many are kept; what they reconstruct is averaged.
        starts: how many are trained, each from weights of its own; those with the smallest
            held-out loss are kept, and the next one stands for the edge when reconstructions are
            compared. By default one more than are kept, and 4 at least in `"match"`, where no label
            tells an image from its negative, and a shadow may settle on that.
        reconstruct: what is tried, out of `"decoder"`, `"linear"` and `"rmle"`. The attacker's own
            held-out images choose one: their features come from a shadow that it does not know,
            or from the only one, which favours rMLE, where `starts` is 1.
        decoder: settings of the decoder; by default narrow and short (width 32, depth 2, 5 epochs).
        rmle: settings of rMLE; by default 500 steps at 0.1, total variation weighted 2.
        mean, std: what the model's input is standardised with; by default the statistics of the
            attacker's own pixels, since he does not know.
        holdout: share of the images that only measure.
        plateau_tolerance: as in `InverseNetworkConfig`, of the shadow's held-out loss.
        seed: of everything that is drawn.
        precision: `"auto"`, `"fp32"` or `"bf16"`, of the shadow's training.

    Raises:
        InputError: a value out of its range.
    """

    mode: str = "shadow_same"
    epochs: int = 4
    moment_epochs: int = 0
    lr: float = 2e-3
    batch_size: int = 64
    task_weight: float = 1.0
    moment_weight: float = 1.0
    output_weight: float = 0.1
    entropy_weight: float = 0.1
    width: int = 32
    shadows: int = 1
    starts: int | None = None
    reconstruct: tuple[str, ...] = ("decoder", "linear")
    decoder: InverseNetworkConfig | None = None
    rmle: RMLEConfig | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    holdout: float = 0.1
    plateau_tolerance: float = 0.05
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self) -> None:
        choices = [("mode", self.mode, MODES), ("precision", self.precision, PRECISIONS)]
        choices += [("reconstruct", name, RECONSTRUCTIONS) for name in self.reconstruct]
        for name, came, known in choices:
            if came not in known:
                raise InputError(
                    f"Expected {name} out of {', '.join(known)}, came {came!r}. "
                    f"{nearest(str(came), known)}"
                )
        least = {"epochs": 1, "batch_size": 4, "width": 1, "shadows": 1}
        least |= dict.fromkeys(("moment_epochs", "lr", "task_weight", "moment_weight",
                                "output_weight", "entropy_weight", "plateau_tolerance"), 0)
        if self.starts is not None:
            least["starts"] = self.shadows
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:
                raise InputError(f"Expected {name} >= {smallest}, came {getattr(self, name)}.")
        if not self.reconstruct:
            raise InputError(f"Expected reconstruct out of {', '.join(RECONSTRUCTIONS)}, came ().")
        if not 0.0 < self.holdout < 1.0:
            raise InputError(f"Expected 0 < holdout < 1, came {self.holdout}.")
        if (self.mean is None) != (self.std is None) or min(self.std or (1.0,)) <= 0.0:
            raise InputError(
                "Expected mean and std together, one positive std per channel, came "
                f"mean={self.mean}, std={self.std}."
            )

    @property
    def attempts(self) -> int:
        """How many shadows are trained."""
        if self.starts is not None:
            return self.starts
        return max(self.shadows + 1, _STARTS if self.mode == "match" else 1)


def check_knowledge(known: Knowledge, config: QueryFreeConfig) -> None:
    """Refuse what the mode cannot work with (InputError)."""
    pixels, mode = known.pixels, config.mode
    if pixels.dim() != 4 or len(pixels) < SMALLEST_QUERY_FREE_SET:
        raise InputError(
            f"A query-free attack learns from at least {SMALLEST_QUERY_FREE_SET} images "
            f"[N, C, H, W], came {tuple(pixels.shape)}. Give the attacker more data."
        )
    if pixels.dtype != torch.uint8:
        check_pixels(pixels, "pixels")
    missing = []
    if mode != "match":
        missing += [name for name in ("cloud", "labels") if getattr(known, name) is None]
    if mode == "shadow_same" and known.shadow_edge is None:
        missing.append("shadow_edge")
    if mode != "shadow_same" and known.observed is None:
        missing.append("observed")
    if missing:
        raise InputError(
            f'The mode "{mode}" needs {", ".join(missing)}, which came as None. Give '
            f"Knowledge({missing[0]}=...), or another mode out of {', '.join(MODES)}."
        )
    if known.observed is not None and not bool(torch.isfinite(known.observed).all()):
        raise InputError(
            "Expected finite observed uploads, came NaN or infinity. Look at the edge: its weights "
            "or normalisation are broken, and an attack on it would say nothing."
        )
    if known.labels is not None and len(known.labels) != len(pixels):
        raise InputError(
            f"Expected one label per image, came {len(known.labels)} for {len(pixels)} images."
        )
