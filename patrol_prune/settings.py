"""Everything a run can be told: frozen dataclasses that check themselves and fit in a YAML file."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import yaml

from patrol_prune._block_pruning import check_structures
from patrol_prune.attacks import ATTACKS, DEFAULT_ATTACKS, InverseNetworkConfig
from patrol_prune.attacks.rmle import RMLEConfig
from patrol_prune.attention_heads import check_unit
from patrol_prune.audit_choice import check_uploads
from patrol_prune.choice import Limits
from patrol_prune.defences import Quantisation
from patrol_prune.errors import InputError, nearest
from patrol_prune.finetune import FinetuneConfig
from patrol_prune.given import check_among
from patrol_prune.importance import TaskChange
from patrol_prune.kept_whole import check_feature_channels
from patrol_prune.lipschitz import LipschitzForm
from patrol_prune.plain_settings import Config, as_plain, build
from patrol_prune.regions import check_share
from patrol_prune.rundir import read_config
from patrol_prune.storage import atomic_write_text
from patrol_prune.surrogate import SURROGATE_LOSSES, SURROGATE_SETS

FREE_KEYS = ("name", "runs", "device")  # may differ when a run is resumed
MOVABLE = {"data": ("data", "digest"), "weights": ("data", "weights_sha256")}
"""May lie elsewhere when a run is resumed -> the stage and the note that say what they held."""


@dataclass(frozen=True)
class ScoreConfig:
    """How channels and residual blocks are scored and removed.

    Attributes:
        structures: whether channels, residual blocks or both go, by one budget.
        task_weight: of what a channel's removal costs the task.
        lip_weight: of what it does to the edge's Lipschitz constants; off by default, because it
            cost accuracy and hid nothing where it was measured (docs/method.md).
        adv_weight: of what it does to the surrogate attackers.
        task_change: how the first is predicted: "second_order", or "absolute" to first order.
        batches: calibration batches.
        surrogate_steps: steps of the surrogate attackers before scoring.
        max_pruning_ratio: the largest share of a group's channels that may go; scores underrate
            the last channels of a layer, those of first order most (docs/method.md).
        min_channels: the fewest channels a group keeps.
        round_to: kept numbers are multiples of this.
        heads: attention may lose heads (`open_attention`).
        head_unit: whole ones, or "dimensions" of all heads of a layer.
        steps: prune in so many steps, scores refreshed between.
        between_epochs: epochs of fine-tuning, privacy terms on, between two steps.
    """

    structures: Literal["channels", "blocks", "both"] = "channels"
    task_weight: float = 1.0
    lip_weight: float = 0.0
    adv_weight: float = 1.0
    task_change: TaskChange = "second_order"
    batches: int = 20
    surrogate_steps: int = 150
    max_pruning_ratio: float = 0.75
    min_channels: int = 2
    round_to: int | None = None
    heads: bool = True
    head_unit: Literal["heads", "dimensions"] = "heads"
    steps: int = 1
    between_epochs: int = 0

    def __post_init__(self) -> None:
        check_structures(self.structures)
        weights = (self.task_weight, self.lip_weight, self.adv_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise InputError(
                f"Expected score weights of at least 0, one of them positive, came {weights}."
            )
        if self.task_change not in get_args(TaskChange):
            raise InputError(
                f"Expected score.task_change out of {', '.join(get_args(TaskChange))}, came "
                f"{self.task_change!r}."
            )
        check_unit(self.head_unit)
        Limits(self.min_channels, self.max_pruning_ratio, self.round_to)  # refuses what it refuses
        if self.batches < 1:
            raise InputError(
                f"Expected at least one calibration batch to score channels on, came "
                f"score.batches={self.batches}."
            )
        if min(self.surrogate_steps, self.between_epochs) < 0 or self.steps < 1:
            raise InputError(
                "Expected score.surrogate_steps and score.between_epochs of at least 0 and "
                f"score.steps of at least 1, came {self.surrogate_steps}, {self.between_epochs} "
                f"and {self.steps}."
            )


@dataclass(frozen=True)
class PrivacyConfig:
    """The privacy terms that stay on during fine-tuning.

    Attributes:
        alpha: weight of the block-wise Lipschitz constants.
        beta: weight of the surrogate attackers' reconstruction error.
        dropout: share of the uploaded values that is zeroed at random, anew for every upload, in
            training, under attack and in the saved edge (`defences.FeatureDropout`). Whoever
            sees several uploads of one picture sees the rest of it; see `audit.uploads`.
        surrogates: the attackers inside, "usual" or "large" (`surrogate.SURROGATE_SETS`).
        surrogate_loss: theirs: "mse+ssim" sees more than the paper's "mse"; "auto"
            takes it where the images have at least 11 pixels a side.
        noise_std: standard deviation of the Lipschitz perturbation, in input units.
        lipschitz_form: "scale_free"; or "paper", which scaling games can fool; or "spectral", a
            bound from the layers' norms, which they can fool as well.
    """

    alpha: float = 0.0
    beta: float = 10.0
    dropout: float = 0.0
    surrogates: Literal["usual", "large"] = "usual"
    surrogate_loss: Literal["auto", "mse", "mse+ssim"] = "auto"
    noise_std: float = 0.1
    lipschitz_form: LipschitzForm = "scale_free"

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0 or self.noise_std <= 0:
            raise InputError(
                "Expected privacy.alpha and privacy.beta of at least 0 and a positive "
                f"privacy.noise_std, came {self.alpha}, {self.beta} and {self.noise_std}."
            )
        if not 0.0 <= self.dropout < 1.0 or (self.dropout and self.alpha):
            raise InputError(
                "Expected privacy.dropout in [0, 1), and privacy.alpha=0 beside it (a run does not "
                f"train both), came {self.dropout} and {self.alpha}."
            )
        check_among(self.lipschitz_form, "privacy.lipschitz_form", get_args(LipschitzForm))
        check_among(self.surrogates, "privacy.surrogates", tuple(SURROGATE_SETS))
        check_among(self.surrogate_loss, "privacy.surrogate_loss", SURROGATE_LOSSES)


@dataclass(frozen=True)
class AuditConfig:
    """Who attacks the finished edge.

    Attributes:
        attacks: by name.
        seeds: one fresh attacker for each.
        victims: images to be reconstructed, from the test part.
        attacker_share: share of the training images that the attacker owns and the defender
            never sees.
        examples: reconstructions to show.
        attacker_images: attack once more with only so many of the attacker's images, each.
        check_attacks: let every attack invert two trivial edges first.
        uploads: of each picture, which an attacker puts together where the edge draws at random.
        undefended: attack the split before pruning as well: the ceiling.
    """

    attacks: tuple[str, ...] = DEFAULT_ATTACKS
    seeds: tuple[int, ...] = (0,)
    victims: int = 500
    attacker_share: float = 0.35
    examples: int = 8
    attacker_images: tuple[int, ...] = ()
    check_attacks: bool = False
    uploads: int = 1
    undefended: bool = True

    def __post_init__(self) -> None:
        for name in self.attacks:
            if name not in ATTACKS:
                raise InputError(
                    f"There is no attack {name!r}. Known: {', '.join(ATTACKS)}. "
                    f"{nearest(name, ATTACKS)}"
                )
        for name, values in (("attacks", self.attacks), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise InputError(f"Expected one or more different audit.{name}, came {values}.")
        for seed in self.seeds:
            check_seed(seed, "audit.seeds")
        check_uploads(self.uploads, "audit.uploads")
        if self.victims < 2 or self.examples < 1 or not 0.0 < self.attacker_share < 1.0:
            raise InputError(
                "Expected audit.victims of at least 2, audit.examples of at least 1 and "
                f"audit.attacker_share in (0, 1), came {self.victims}, {self.examples} and "
                f"{self.attacker_share}."
            )
        if min(self.attacker_images, default=20) < 20 or len(set(self.attacker_images)) < len(
            self.attacker_images
        ):
            raise InputError(
                "Expected different numbers of at least 20 as audit.attacker_images, came "
                f"{self.attacker_images}."
            )


@dataclass(frozen=True)
class RunConfig:
    """One run, from a folder of images to a report.

    Attributes:
        data: folder with train/ and val/ or test/, each with one folder of images per class.
        edge_macs: the budget of the device: a count ("9.9M"), a fraction in (0, 1] of the dense
            edge at `at`, or a split's name, whose dense edge's cost is meant.
        model: a torchvision classifier, small_resnet, or module:function of your own.
        weights: safetensors file; without it the model is trained first.
        image_size: side of the square images, in pixels.
        at: where to cut; without it the plan recommends.
        boundary: whether channels that cross the split are kept or pruned.
        feature_channels: with "prune", how many each group of them keeps; None is by the budget.
        bits: of every uploaded value, 1 to 16, to which the finished edge rounds it; None is
            float32. It costs a further training, `rounded`.
        name: of the run.
        runs: the folder of all runs.
        batch_size: images in a training batch.
        normalization: of pixels; "auto" is ImageNet's statistics with weights for a torchvision
            model, the training images' own otherwise.
        private: module:function of a detector of your own, pixels on [0, 1] to 1 where a picture is
            private and 0 elsewhere: what may not be seen above all (`regions.PrivateRegions`).
        private_share: of an image's error that is counted there, for the attackers inside, for the
            model against them, and for one more attack on it, `aimed_ssim`.
        device: cpu, cuda, cuda:1, mps, or auto.
        seed: of everything.
        train: training of the dense model.
        score: which channels go.
        privacy: the terms that stay on.
        finetune: training after pruning.
        rounded: training behind that, with uploads of `bits`.
        audit: who attacks.
        attacker: the attacker's network; attacks by other names take its size and schedule.
        rmle: the attack that optimises pixels.
    """

    data: str
    edge_macs: str | int | float
    model: str = "resnet18"
    weights: str | None = None
    image_size: int = 128
    at: str | None = None
    boundary: Literal["keep", "prune"] = "keep"
    feature_channels: int | None = None
    bits: int | None = None
    name: str = "run"
    runs: str = "runs"
    batch_size: int = 64
    normalization: Literal["auto", "dataset", "imagenet", "none"] = "auto"
    private: str | None = None
    private_share: float = 0.5
    device: str = "auto"
    seed: int = 0
    train: FinetuneConfig = field(
        default_factory=lambda: FinetuneConfig(epochs=25, distill_weight=0.0)
    )
    score: ScoreConfig = field(default_factory=ScoreConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    finetune: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(epochs=10, lr=0.02))
    rounded: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(epochs=4, lr=0.01))
    audit: AuditConfig = field(default_factory=AuditConfig)
    attacker: InverseNetworkConfig = field(
        default_factory=lambda: InverseNetworkConfig(width=48, depth=4, epochs=20)
    )
    rmle: RMLEConfig = field(default_factory=RMLEConfig)

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("Expected a folder of images, came none. Give --data FOLDER.")
        # As text, so that a number in a file and on the command line are the same settings.
        object.__setattr__(self, "edge_macs", str(self.edge_macs))
        if not str(self.edge_macs).strip():
            raise InputError("Expected a budget, came none. Give --edge-macs, as in 9.9M.")
        check_seed(self.seed, "seed")
        if self.image_size < 16:
            raise InputError(
                f"Expected an image size of at least 16 pixels, came {self.image_size}; SSIM "
                "cannot judge smaller ones."
            )
        if self.batch_size < 2:
            raise InputError(
                f"Expected a batch size of at least 2, for BatchNorm, came {self.batch_size}."
            )
        if self.name in ("", ".", "..") or self.name != os.path.basename(self.name):
            raise InputError(
                f"Expected a run's name to be a plain folder name, came {self.name!r}. The folder "
                "around it is given as --runs."
            )
        for key, options in (("boundary", ("keep", "prune")),
                             ("normalization", ("auto", "dataset", "imagenet", "none"))):
            check_among(getattr(self, key), key, options)
        check_feature_channels(self.feature_channels, self.boundary, self.score.structures)
        check_share(self.private_share)
        if self.private is None and self.private_share != RunConfig.private_share:
            raise InputError("Expected --private beside --private-share, came none. Name a "
                             "detector of your own as module:function.")
        if self.bits is not None:
            Quantisation(self.bits)  # refuses what it refuses
            if self.privacy.alpha:
                raise InputError("Expected privacy.alpha=0 beside bits (a rounded upload jumps), "
                                 f"came {self.privacy.alpha}. Leave one of them out.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data, tuples as lists."""
        plain: dict[str, Any] = as_plain(dataclasses.asdict(self))
        return plain

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write the settings, whole or not at all."""
        atomic_write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_yaml(cls: type[Config], path: str | os.PathLike[str]) -> Config:
        """The settings in a file; an unknown key or a wrong type is an `InputError`."""
        return build(cls, read_config(path), str(path))


def check_seed(seed: int, name: str) -> None:
    """An InputError for a seed that not every random generator takes."""
    if not 0 <= seed < 2**63:
        raise InputError(f"Expected {name} in [0, 2**63), came {seed}.")


def resolve_device(name: str) -> torch.device:
    """The device called `name`, shown to be there; "auto" is CUDA where there is one.

    Raises:
        InputError: no such kind of device, or none in this computer.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).sum().item()  # a device without memory is none
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            there.append("mps")
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"The device {name!r} is not there ({first}). Here are: {', '.join(there)}."
        ) from error
    return device
