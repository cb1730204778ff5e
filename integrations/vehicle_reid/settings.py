"""Everything `run.py` can be told."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from patrol_prune.attacks import ATTACKS, DEFAULT_ATTACKS, InverseNetworkConfig
from patrol_prune.attacks.rmle import RMLEConfig
from patrol_prune.audit_choice import check_uploads
from patrol_prune.defences import Quantisation
from patrol_prune.errors import InputError, nearest
from patrol_prune.finetune import FinetuneConfig
from patrol_prune.given import check_count
from patrol_prune.settings import PrivacyConfig, ScoreConfig


@dataclass(frozen=True)
class Rendered:
    """The drawn set, for `--data rendered`.

    Attributes:
        identities: vehicles in all, in training and in test.
        cameras: that see each of them.
        images_per_camera: of each vehicle.
    """

    identities: int = 200
    cameras: int = 6
    images_per_camera: int = 2


@dataclass(frozen=True)
class Batch:
    """A training batch, and its loss.

    Attributes:
        identities: in a batch.
        images_each: of each identity.
        smoothing: of the labels in the cross-entropy.
        margin: of the triplets.
        triplet_weight: of the triplet loss beside the cross-entropy.
        adversarial_images: of a batch go to the attackers inside PATROL's training; None is all.
    """

    identities: int = 12
    images_each: int = 4
    smoothing: float = 0.1
    margin: float = 0.3
    triplet_weight: float = 1.0
    adversarial_images: int | None = 24


@dataclass(frozen=True)
class Attackers:
    """Who attacks the finished edges, and what he owns.

    Attributes:
        attacks: by name.
        seeds: one fresh attacker for each.
        share: of the training identities, which the attacker owns and the defender never sees.
        reader_share: of the attacker's identities (of his pictures in a closed set) that no
            inversion attack learns from, so that what is rebuilt of them looks as what is
            rebuilt of a victim's.
        victims: queries whose uploads are inverted.
        examples: pictures on the page.
        uploads: of each picture, which an attacker puts together where `privacy.dropout` draws.
    """

    attacks: tuple[str, ...] = DEFAULT_ATTACKS
    seeds: tuple[int, ...] = (0,)
    share: float = 0.5
    reader_share: float = 0.25
    victims: int = 150
    examples: int = 8
    uploads: int = 1

    def __post_init__(self) -> None:
        check_uploads(self.uploads, "attackers.uploads")
        for name in self.attacks:
            if name not in ATTACKS:
                raise InputError(f"There is no attack {name!r}. Known: {', '.join(ATTACKS)}. "
                                 f"{nearest(name, ATTACKS)}")
        if not self.attacks or not self.seeds or not (0 < self.share < 1):
            raise InputError("Expected an attack, a seed and attackers.share in (0, 1), came "
                             f"{self.attacks}, {self.seeds} and {self.share}.")
        if not 0 < self.reader_share < 1 or self.victims < 2 or self.examples < 1:
            raise InputError(
                "Expected attackers.reader_share in (0, 1), at least 2 victims and an example, "
                f"came {self.reader_share}, {self.victims} and {self.examples}."
            )


@dataclass(frozen=True)
class ReidRun:
    """One comparison, from pictures to a page.

    Attributes:
        data: "rendered" draws vehicles; else the folder of VeRi-776, of Market-1501, or an image
            folder.
        layout: "auto" tells VeRi-776 from Market-1501; "folder" reads train/<identity>/ and
            test/<identity>/ (or val/).
        compare: prune by Taylor scores as well, at the same split and budget, with as many epochs.
        model: a torchvision classifier, small_resnet, or module:function of your own.
        weights: safetensors file of that classifier to begin with; its last layer is replaced.
        image_size: side of the square that pictures are stretched to.
        at: where to cut, the last layer on the device.
        edge_macs: the device's budget: a count ("9.9M"), or a fraction of the dense edge.
        upload_channels: channels that both pruned models send, of each group that crosses the
            split, those of the highest scores, whatever the limits of `score`; None is all of
            them, and so is a larger number.
        bits: of an uploaded value, 1 to 16, for both pruned models, which are fine-tuned once more
            so; None sends the values as they are.
        swap_plates: prune and train the pruned models on pictures that carry other vehicles'
            plates, so that reading them teaches nothing; for sets that tell where plates are, and
            without a teacher, whose answers tell plates.
        private_plates: share of the attackers' error, in PATROL's scores and fine-tuning, that is
            counted on plates, which a detector finds that is trained first; and every model meets
            one more attack, `aimed_ssim`, whose loss counts them as much. 0 counts every pixel the
            same. For sets that tell where plates are.
        name: of the run.
        runs: the folder of all runs.
        device: cpu, cuda, cuda:1, mps, or auto.
        seed: of everything.
        rendered: the drawn set.
        batch: identities and pictures in a training batch, and the loss.
        train: training of the dense model.
        score: which channels PATROL removes.
        privacy: the terms that stay on while PATROL's model is fine-tuned; its dropout stands
            behind PATROL's edge alone, and with `bits` behind the rounding, from then on.
        finetune: training after pruning, with either score.
        rounded: the further training in which uploads are rounded to `bits`, with either score;
            without the dense model to learn from, as it reads plates.
        attackers: who attacks.
        attacker: the attacker's decoder.
        rmle: the attack that optimises pixels.
    """

    data: str = "rendered"
    layout: Literal["auto", "folder"] = "auto"
    compare: bool = True
    model: str = "small_resnet"
    weights: str | None = None
    image_size: int = 64
    at: str = "layer4"
    edge_macs: str | int | float = "0.5"
    upload_channels: int | None = None
    bits: int | None = None
    swap_plates: bool = False
    private_plates: float = 0.0
    name: str = "reid"
    runs: str = "runs"
    device: str = "cpu"
    seed: int = 0
    rendered: Rendered = field(default_factory=Rendered)
    batch: Batch = field(default_factory=Batch)
    train: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(
        epochs=20, distill_weight=0.0))
    score: ScoreConfig = field(default_factory=lambda: ScoreConfig(batches=10, surrogate_steps=60))
    privacy: PrivacyConfig = field(default_factory=lambda: PrivacyConfig(beta=10.0))
    finetune: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(
        epochs=24, lr=0.03, inner_steps=2, surrogate_warmup_steps=60))
    rounded: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(
        epochs=24, lr=0.02, distill_weight=0.0, inner_steps=2, surrogate_warmup_steps=200))
    attackers: Attackers = field(default_factory=Attackers)
    attacker: InverseNetworkConfig = field(default_factory=lambda: InverseNetworkConfig(
        width=32, depth=3, epochs=10, batch_size=32, max_extensions=1))
    rmle: RMLEConfig = field(default_factory=lambda: RMLEConfig(
        steps=60, tuning_images=4, tuning_steps=20, refine=False))

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or self.name != os.path.basename(self.name):
            raise InputError(f"Expected a run's name to be a plain folder name, came "
                             f"{self.name!r}. The folder around it is given as --runs.")
        if self.image_size < 16:
            raise InputError("Expected an image size of at least 16 pixels, came "
                             f"{self.image_size}; SSIM cannot judge smaller ones.")
        if self.swap_plates and any(config.distill_weight or config.feature_weight
                                    for config in (self.finetune, self.rounded)):
            raise InputError(
                "Expected no teacher beside swap_plates, came weights of its answers in finetune "
                "or rounded: it was trained with plates, and tells them. Give "
                "--finetune.distill-weight 0.")
        if not 0.0 <= self.private_plates <= 1.0:
            raise InputError("Expected private_plates as a share from 0 to 1, came "
                             f"{self.private_plates!r}.")
        check_count(self.upload_channels, "upload_channels", 1, optional=True)
        if self.bits is not None:
            Quantisation(self.bits)
        if self.layout not in ("auto", "folder"):
            raise InputError(f"Expected layout out of auto, folder, came {self.layout!r}.")
        if self.data == "rendered" and self.layout == "folder":
            raise InputError("The rendered set is laid out as VeRi-776: leave --layout out.")
