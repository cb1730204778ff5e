"""What a search for good settings can be told: everything a run can, and how to search."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from patrol_prune.attacks import ATTACKS
from patrol_prune.defences import Quantisation
from patrol_prune.errors import InputError, nearest
from patrol_prune.kept_whole import check_feature_channels
from patrol_prune.preparation import normalization_kind
from patrol_prune.settings import PrivacyConfig, RunConfig

AUTO = "auto"
FREE_IN_A_TUNE = ("trials", "timeout", "storage", "data", "weights", "device", "runs", "name")
"""May differ between the workers of one study, and when it is resumed; what images and weights hold
is compared."""


@dataclass(frozen=True)
class TuneConfig(RunConfig):
    """A search over beta, alpha, the split and the share of the budget that is used.

    The settings of a run say what is tuned, and how the chosen point is trained in full; `at`, if
    given without `splits`, is the only split tried, and `privacy.alpha` and `privacy.beta` are
    searched. `patrol-prune tune --help` explains those of a run that are not below, and their
    groups `score`, `privacy` and `audit`; `train` and `finetune` are a `FinetuneConfig`, `attacker`
    is an `InverseNetworkConfig`, `rmle` an `RMLEConfig`.

    Attributes:
        data: folder with train/ and val/ or test/, each with one folder of images per class.
        edge_macs: the budget, a count ("9.9M"), a fraction in (0, 1] of the dense edge at `at`, or
            a split's name, whose dense edge's multiply-adds are meant.
        model: a torchvision classifier, small_resnet, or module:function of your own.
        weights: safetensors file; without it the dense model is trained first.
        image_size: side of the square images, in pixels.
        boundary: whether channels that cross the split are kept or pruned ("keep" or "prune").
        runs: the folder that holds that of the study.
        batch_size: images in a training batch.
        normalization: of pixels, "auto", "dataset", "imagenet" or "none"; "auto" is ImageNet's with
            weights for a torchvision model, the training images' own otherwise.
        device: cpu, cuda, cuda:1, mps, or auto.
        seed: of everything.
        at: the one place to cut that is tried, unless `splits` names places; a fraction as budget
            is of its dense edge. Without it `splits` says what is tried.
        name: of the study, and of its folder.
        trials: finished trials of the whole study, whoever ran them.
        timeout: seconds after which this worker begins no further trial.
        storage: where the study is kept: a URL of a database (sqlite:///study.db), or a path for
            Optuna's journal; without it a journal in the study's folder.
        splits: places to cut that are tried, as in [layer2,layer3]; [auto] means the deepest whole
            modules of the plan that fit.
        most_splits: how many places auto tries.
        max_channel_ratio: auto leaves out a place where a larger share of channels has to go.
        budget_range: least and largest share of the budget that a trial's edge takes: [0.5,1].
        beta_range: least and largest weight of the surrogate attackers, as in [2,100]; on a log
            scale.
        alpha_choices: weights of the Lipschitz term that are tried, as in [0,0.01].
        bits_choices: bits of an uploaded value that are tried, as in [null,4,2], null for float32;
            without it `bits` alone.
        feature_channels_choices: how many channels that cross the split stay, as in [32,16], null
            for as many as the budget leaves; without it `feature_channels` alone.
        min_accuracy: the least accuracy, in [0, 1].
        max_accuracy_drop: how far below the dense model's the accuracy may lie, in [0, 1].
        max_feature_bytes: the most that may be uploaded per image, as float32 or packed bits.
        trial_epochs: epochs of fine-tuning in a trial, and, up to `rounded.epochs`, as many with
            rounded uploads.
        trial_attacks: the attacks of a trial; the strongest ranks it.
        trial_attack_epochs: epochs of an attacker's training in a trial.
        trial_victims: images to be reconstructed in a trial.

    Raises:
        InputError: a value out of its range, or a contradiction.
    """

    name: str = "tune"
    trials: int = 30
    timeout: float | None = None
    storage: str | None = None
    splits: tuple[str, ...] = (AUTO,)
    most_splits: int = 4
    max_channel_ratio: float = 0.6
    budget_range: tuple[float, float] = (0.5, 1.0)
    beta_range: tuple[float, float] = (2.0, 100.0)
    alpha_choices: tuple[float, ...] = (0.0, 0.01)
    bits_choices: tuple[int | None, ...] = ()
    feature_channels_choices: tuple[int | None, ...] = ()
    min_accuracy: float | None = None
    max_accuracy_drop: float | None = None
    max_feature_bytes: int | None = None
    trial_epochs: int = 3
    trial_attacks: tuple[str, ...] = ("inverse_network_ssim",)
    trial_attack_epochs: int = 8
    trial_victims: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_search()
        self._check_limits()
        self._check_trials()

    def _check_search(self) -> None:
        if self.trials < 1 or (self.timeout is not None and not self.timeout > 0):
            raise InputError(
                "Expected at least one trial and a timeout of more than 0 seconds, came "
                f"{self.trials} and {self.timeout}."
            )
        if self.storage is not None and not self.storage.strip():
            raise InputError("Expected a URL or a path as storage, came an empty one.")
        if not self.splits or len(set(self.splits)) < len(self.splits) or (
            AUTO in self.splits and len(self.splits) > 1
        ):
            raise InputError(
                f"Expected splits to be auto alone, or different names, came {self.splits}."
            )
        if self.most_splits < 1 or not 0.0 < self.max_channel_ratio < 1.0:
            raise InputError(
                "Expected most_splits of at least 1 and max_channel_ratio in (0, 1), came "
                f"{self.most_splits} and {self.max_channel_ratio}."
            )
        for name, most in (("beta_range", float("inf")), ("budget_range", 1.0)):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0.0 < pair[0] <= pair[1] <= most or pair[1] == float("inf"):
                bound = "" if most == float("inf") else f" <= {most:g}"
                raise InputError(f"Expected {name} as 0 < least <= largest{bound}, came {pair}.")
        alphas = self.alpha_choices
        good = [a for a in alphas if 0 <= a < float("inf")]
        if not alphas or len(set(good)) < len(alphas):
            raise InputError(
                f"Expected alpha_choices to be different numbers of at least 0, came {alphas}."
            )
        if self.privacy.dropout and max(alphas) > 0:
            raise InputError(
                "Expected alpha_choices of 0 alone beside privacy.dropout (a run does not train "
                f"both), came {alphas}. Give --alpha_choices '[0.0]'."
            )
        self._check_uploads()

    def _check_uploads(self) -> None:
        """What is tried of the width of the upload, and of the bits of its values."""
        for name in ("bits", "feature_channels"):
            given, choices = getattr(self, name), getattr(self, f"{name}_choices")
            if not isinstance(choices, tuple | list):
                raise InputError(f"Expected {name}_choices as a list, came {choices!r}. Write "
                                 "[8, 4], say, or leave it out.")
            if len(set(choices)) < len(choices) or (choices and given is not None):
                raise InputError(
                    f"Expected {name}_choices to be different numbers (or null), and {name} left "
                    f"out beside them, came {choices} and {given}.")
        for channels in self.tried_channels:
            check_feature_channels(channels, self.boundary, self.score.structures)
        for bits in self.tried_bits:
            if bits is not None:
                Quantisation(bits)  # refuses what it refuses
        if any(bits is not None for bits in self.tried_bits) and max(self.alpha_choices) > 0:
            raise InputError(
                "Expected alpha_choices of 0 alone beside bits (a rounded upload jumps), came "
                f"{self.alpha_choices}. Give --alpha_choices '[0.0]'.")

    @property
    def tried_bits(self) -> tuple[int | None, ...]:
        """Bits of an uploaded value; None stands for float32."""
        return self.bits_choices or (self.bits,)

    @property
    def tried_channels(self) -> tuple[int | None, ...]:
        """Channels that are sent; None stands for as many as the budget leaves."""
        return self.feature_channels_choices or (self.feature_channels,)

    def _check_limits(self) -> None:
        if self.min_accuracy is not None and self.max_accuracy_drop is not None:
            raise InputError(
                "Expected at most one floor of the accuracy, came both min_accuracy and "
                "max_accuracy_drop. Leave one out."
            )
        for name in ("min_accuracy", "max_accuracy_drop"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise InputError(
                    f"Expected {name} as a share in [0, 1] (0.8 is 80%), came {value}."
                )
        if self.max_feature_bytes is not None and self.max_feature_bytes < 4:
            raise InputError(
                f"Expected max_feature_bytes of at least 4, one number, came "
                f"{self.max_feature_bytes}."
            )

    def _check_trials(self) -> None:
        for name in self.trial_attacks:
            if name not in ATTACKS:
                raise InputError(
                    f"There is no attack {name!r}. Known: {', '.join(ATTACKS)}. "
                    f"{nearest(name, ATTACKS)}"
                )
        if not self.trial_attacks or self.trial_victims < 2 or (
            len(set(self.trial_attacks)) < len(self.trial_attacks)
        ):
            raise InputError(
                "Expected an attack to rank by, each once, and at least 2 victims, came "
                f"{self.trial_attacks} and {self.trial_victims}."
            )
        if self.trial_epochs < 0 or self.trial_attack_epochs < 1:
            raise InputError(
                "Expected trial_epochs of at least 0 and trial_attack_epochs of at least 1, came "
                f"{self.trial_epochs} and {self.trial_attack_epochs}."
            )

    def unused(self) -> list[str]:
        """A sentence for each weight that was given and is searched all the same."""
        usual, sentences = PrivacyConfig(), []
        for name, tried, option in (("alpha", self.alpha_choices, "--alpha-choices '[{0:g}]'"),
                                    ("beta", self.beta_range, "--beta-range '[{0:g},{0:g}]'")):
            given = getattr(self.privacy, name)
            if given == getattr(usual, name) or set(tried) == {given}:
                continue
            fixed = ("It searches no beta of 0: train that with patrol-prune run."
                     if (name, given) == ("beta", 0) else
                     f"For this value alone give {option.format(given)}.")
            sentences.append(f"privacy.{name} {given:g} is not used: the search takes it from "
                             f"{list(tried)}. {fixed}")
        return sentences

    def run_config(self, **changes: Any) -> RunConfig:
        """The settings of `patrol-prune run` alone, with some of them changed."""
        names = [field.name for field in fields(RunConfig)]
        return replace(RunConfig(**{name: getattr(self, name) for name in names}), **changes)


@dataclass(frozen=True)
class Point:
    """What a trial tries.

    Attributes:
        split: where the model is cut.
        edge_macs: what the pruner is asked for, in multiply-adds.
        beta: weight of the surrogate attackers.
        alpha: weight of the Lipschitz term.
        bits: of an uploaded value; None is float32.
        feature_channels: of each group that crosses; None is as many as the budget leaves.
    """

    split: str
    edge_macs: int
    beta: float
    alpha: float
    bits: int | None = None
    feature_channels: int | None = None


def full_config(config: TuneConfig, point: Point, dense: Path, name: str) -> RunConfig:
    """The run that trains a point in full, from the dense weights that the trials shared."""
    return config.run_config(
        name=name, at=point.split, edge_macs=str(point.edge_macs), weights=str(dense),
        normalization=normalization_kind(config),
        privacy=replace(config.privacy, alpha=point.alpha, beta=point.beta),
        bits=point.bits, feature_channels=point.feature_channels,
    )


def trial_config(config: TuneConfig, point: Point, dense: Path, folder: Path) -> RunConfig:
    """The same run with a short fine-tuning and a short attack, in `folder`.

    Seed, batch size and the attacker's share stay: they decide who owns which image.
    """
    full = full_config(config, point, dense, folder.name)
    return replace(
        full,
        runs=str(folder.parent),
        finetune=replace(full.finetune, epochs=min(config.trial_epochs, full.finetune.epochs)),
        rounded=replace(full.rounded, epochs=min(config.trial_epochs, full.rounded.epochs)),
        audit=replace(
            full.audit, attacks=config.trial_attacks, seeds=full.audit.seeds[:1],
            victims=min(config.trial_victims, full.audit.victims), attacker_images=(),
            check_attacks=False, undefended=False,
        ),
        attacker=replace(
            full.attacker, epochs=min(config.trial_attack_epochs, full.attacker.epochs),
            max_extensions=0,
        ),
    )


def dense_config(config: TuneConfig, point: Point, folder: Path) -> RunConfig:
    """The run whose first stages train the dense model for all trials; `point` is any that fits."""
    return config.run_config(
        name="dense", runs=str(folder), at=point.split, edge_macs=str(point.edge_macs),
        bits=None, feature_channels=None,
    )
