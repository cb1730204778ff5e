"""Settings of the learned attack, and its kinds by name."""

from __future__ import annotations

from dataclasses import dataclass

from patrol_prune.decoders import FAMILIES
from patrol_prune.errors import InputError, nearest
from patrol_prune.precision import PRECISIONS

LOSSES: tuple[str, ...] = ("mse", "mse+ssim")


@dataclass(frozen=True)
class InverseNetworkConfig:
    """Settings of `InverseNetwork`.

    Args:
        family: of the decoder, out of "residual", "transposed", "unet" (`make_decoder`).
        width: channels of the decoder; more see more, and take longer.
        depth: residual blocks of the decoder; the transposed family has none.
        loss: `"mse"`, or `"mse+ssim"` which favours structure over the exact shade.
        whiten: read channels that are made uncorrelated (ZCA) instead of standardised ones: faint
            directions of a feature are learnt sooner.
        epochs: length of the schedule (linear warm-up, then cosine).
        lr: peak learning rate of AdamW; extensions restart at half of it.
        weight_decay: of AdamW.
        batch_size: images per step.
        patience: epochs without a better held-out loss after which the fit stops early.
        holdout: share of the attacker's images that only chooses the epoch and detects the plateau.
        plateau_tolerance: the fit has reached its plateau when prolonging it lowered the best
            held-out loss by less than this share, when patience ran out, or when the loss is under
            a thousandth of the mean image's. A loss that stands still at the end of a schedule
            says nothing: the learning rate is next to zero there. Neither does prolonging it by
            under 10 steps, nor patience that ran out while the training loss rose by half.
        max_extensions: how often the schedule is prolonged by half its length, from half the peak
            learning rate; without any, only patience can tell a plateau.
        seed: of the initial weights, the held-out choice and the order of the batches.
        mirror: learn from the attacker's images mirrored too, asking the edge for their features.
            None tries both where the images are few, under 5,000, and goes on with what the
            held-out images prefer: of 1,000 of CIFAR-10, after layer4 of an undefended model, SSIM
            was 0.365 with and 0.334 without, in as many steps; of writing, which nobody mirrors,
            0.77 with and 0.82 without.
        recompute: query the edge for every batch even though its answers are at hand: slower, and
            features are never kept. A random edge is always queried anew.
        precision: `"bf16"` trains under autocast, `"fp32"` does not, `"auto"` takes bf16 where the
            device computes it natively. The loss, the held-out loss and reconstructions are
            always float32.
        dropout: share of what the decoder reads that is zeroed at random, in training alone, the
            rest scaled up: an attacker with few images learns less of them by heart.

    Raises:
        InputError: a value out of its range.
    """

    family: str = "residual"
    width: int = 64
    depth: int = 8
    loss: str = "mse"
    whiten: bool = False
    epochs: int = 30
    lr: float = 2e-3
    weight_decay: float = 1e-4
    batch_size: int = 64
    patience: int = 12
    holdout: float = 0.1
    plateau_tolerance: float = 0.02
    max_extensions: int = 2
    seed: int = 0
    mirror: bool | None = None
    recompute: bool = False
    precision: str = "auto"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("family", FAMILIES), ("loss", LOSSES), ("precision", PRECISIONS)):
            came = getattr(self, name)
            if came not in known:
                raise InputError(
                    f"Expected {name} out of {', '.join(known)}, came {came!r}. "
                    f"{nearest(str(came), known)}"
                )
        smallest = {"width": 1, "depth": 0, "epochs": 1, "batch_size": 2, "patience": 1}
        smallest |= {"lr": 0, "weight_decay": 0, "max_extensions": 0, "plateau_tolerance": 0}
        for name, least in smallest.items():
            if not getattr(self, name) >= least:
                raise InputError(f"Expected {name} >= {least}, came {getattr(self, name)}.")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"Expected 0 <= dropout < 1, came {self.dropout}.")
        if not 0.0 < self.holdout < 1.0:
            raise InputError(f"Expected 0 < holdout < 1, came {self.holdout}.")


SUITE: dict[str, InverseNetworkConfig] = {
    "inverse_network": InverseNetworkConfig(),
    "inverse_network_ssim": InverseNetworkConfig(loss="mse+ssim"),
    "transposed": InverseNetworkConfig(family="transposed"),
    "transposed_ssim": InverseNetworkConfig(family="transposed", loss="mse+ssim"),
    "unet": InverseNetworkConfig(family="unet"),
    "unet_ssim": InverseNetworkConfig(family="unet", loss="mse+ssim"),
    "whitened_ssim": InverseNetworkConfig(loss="mse+ssim", whiten=True),
    "dropped_ssim": InverseNetworkConfig(loss="mse+ssim", dropout=0.5),
}
"""Every family with every loss, one that whitens and one that learns with dropout, by name: none is
the strongest everywhere."""
