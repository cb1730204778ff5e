"""Who owns which image, and the model as it comes in: what a run starts from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from patrol_prune._tp import GroupMagnitudeImportance
from patrol_prune.audit_scores import RegionScore
from patrol_prune.cost import feature_bytes
from patrol_prune.data import Batches, ImageSet, find_parts, fingerprints, load_image_folder
from patrol_prune.defences import FeatureDropout, Quantisation
from patrol_prune.errors import InputError, RunDirectoryError
from patrol_prune.models import SMALL_RESNET, build_model, load_weights, own_function
from patrol_prune.open_attention import open_attention
from patrol_prune.pixels import Normalization
from patrol_prune.plan import Plan, plan
from patrol_prune.pruner import PatrolPruner
from patrol_prune.regions import PrivateRegions
from patrol_prune.settings import PrivacyConfig, RunConfig
from patrol_prune.spectral_rules import read_blocks
from patrol_prune.split import Split
from patrol_prune.storage import sha256_of

logger = logging.getLogger(__name__)

_CALIBRATING, _CHUNK = 500, 128
_ANEW = "give the run another --name, or start it anew with --overwrite."


@dataclass(frozen=True)
class Images:
    """The images of a run, divided.

    Attributes:
        defender: what the model is trained, scored and fine-tuned on.
        attacker: what the attacker owns, uint8 `[N, 3, H, W]`, in no order; nobody else sees it.
        attacker_labels: the classes of these, `[N]`.
        test: what accuracy is measured on.
        victims: the part of `test` that is to be reconstructed, uint8 `[N, 3, H, W]`.
        normalization: from pixels to the model's input.
        digest: of every image and label; the same images, the same digest.
        notes: what a reader of the report should know, in sentences.
    """

    defender: ImageSet
    attacker: Tensor
    attacker_labels: Tensor
    test: ImageSet
    victims: Tensor
    normalization: Normalization
    digest: str
    notes: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.defender.classes

    def example(self) -> Tensor:
        """One image as model input, `[1, 3, H, W]`."""
        return self.normalization.to_input(self.defender.pixels([0]))


def read_images(config: RunConfig) -> Images:
    """Read the folder, and divide its training part between the defender and the attacker.

    Images that the attacker owns and that are also among the victims, byte for byte, are taken
    from the attacker, and a note says so.

    Raises:
        InputError: no image, one class, an unreadable image, too few images for everybody, or for
            what `audit.attacker_images` asks.
    """
    train_folder, test_folder = find_parts(config.data)
    train = load_image_folder(train_folder, config.image_size)
    test = load_image_folder(test_folder, config.image_size, classes=train.classes)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed))
    attackers = round(config.audit.attacker_share * len(train))
    defender = train.subset(order[attackers:].sort().values)
    count = min(config.audit.victims, len(test))
    victims = test.images[torch.linspace(0, len(test) - 1, count).round().long()]
    attacker, notes = _without(train.subset(order[:attackers]), victims)
    if len(attacker) < 20 or len(defender) < 2 * config.batch_size:
        raise InputError(
            f"Expected at least 20 training images for the attacker and {2 * config.batch_size} "
            f"(two batches) for the defender, came {len(attacker)} and {len(defender)} of the "
            f"{len(train)} in {train_folder}. Add images, or change --audit.attacker-share or "
            "--batch-size."
        )
    most = max(config.audit.attacker_images, default=0)
    if most >= len(attacker):
        raise InputError(
            f"Expected audit.attacker_images below the {len(attacker)} images that the attacker "
            f"owns, all of which are taken anyhow, came {most}. Give smaller numbers, or raise "
            "--audit.attacker-share."
        )
    notes += _notes_on_the_test(defender, test)
    for note in notes:
        logger.warning(note)
    return Images(
        defender, attacker.images, attacker.labels, test, victims,
        _normalization(config, defender), _digest(train, test), notes,
    )


def images_of(config: RunConfig, path: Path) -> Images:
    """`read_images` of the run in `path`; a RunDirectoryError where they are gone."""
    if not Path(config.data).exists():
        raise RunDirectoryError(
            f"Expected the images of the run in {path} in {config.data}, which does not exist. Put "
            "them back, or say where they lie now: --data FOLDER."
        )
    return read_images(config)


def _notes_on_the_test(defender: ImageSet, test: ImageSet) -> tuple[str, ...]:
    """What makes the test part no test: images that were trained on, classes that are not there."""
    notes = []
    trained = set(fingerprints(defender.images))
    both = sum(known in trained for known in fingerprints(test.images))
    if both:
        notes.append(
            f"{both} of the {len(test)} test images are also among those that the model is trained "
            "on, byte for byte: accuracy and privacy look better on them than on new ones."
        )
    there = set(test.labels.tolist())
    missing = [name for i, name in enumerate(test.classes) if i not in there]
    if missing:
        notes.append(f"The test part has no image of {', '.join(missing[:5])}"
                     f"{' and others' if len(missing) > 5 else ''}: the accuracy is over the "
                     "other classes.")
    return tuple(notes)


def _without(attacker: ImageSet, victims: Tensor) -> tuple[ImageSet, tuple[str, ...]]:
    seen = set(fingerprints(victims))
    keep = [i for i, known in enumerate(fingerprints(attacker.images)) if known not in seen]
    if len(keep) == len(attacker):
        return attacker, ()
    note = (
        f"{len(attacker) - len(keep)} of the attacker's images are also among the victims, byte "
        "for byte; they were taken from him."
    )
    return attacker.subset(keep), (note,)


def normalization_kind(config: RunConfig) -> Literal["dataset", "imagenet", "none"]:
    """The kind of normalization that is meant, also where the settings say "auto"."""
    if config.normalization != "auto":
        return config.normalization
    stock = (config.weights is not None and ":" not in config.model
             and config.model != SMALL_RESNET)  # its weights come from no one but the user
    return "imagenet" if stock else "dataset"


def _normalization(config: RunConfig, defender: ImageSet) -> Normalization:
    kind = normalization_kind(config)
    if kind == "imagenet":
        return Normalization.imagenet()
    if kind == "none":
        return Normalization()
    some = defender.pixels(torch.linspace(0, len(defender) - 1, min(2000, len(defender))).long())
    mean = some.double().mean(dim=(0, 2, 3))
    std = some.double().std(dim=(0, 2, 3)).clamp(min=1e-3)
    return Normalization(
        tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())
    )


def _digest(*sets: ImageSet) -> str:
    digest = hashlib.sha256()
    for images in sets:
        digest.update(images.images.numpy().tobytes())
        digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()


def fresh_model(config: RunConfig, classes: int) -> nn.Module:
    """The dense model with initial weights: the factory of everything that is saved in a run."""
    return build_model(config.model, classes, image_size=config.image_size, seed=config.seed)


def incoming_model(config: RunConfig, classes: int) -> tuple[nn.Module, bool]:
    """The dense model with the user's weights, and whether it still has to be trained."""
    model = fresh_model(config, classes)
    if config.weights is None:
        return model, True
    return model, bool(load_weights(model, config.weights))


def private_regions(config: RunConfig) -> PrivateRegions | None:
    """Where the images are private; the user's module is imported."""
    if config.private is None:
        return None
    find: Any = own_function(config.private, "detector", "mydetectors:faces")
    return PrivateRegions(find, config.private_share)


def check_own(config: RunConfig, images: Images) -> None:
    """Refuse a model, weights and a detector of the user's own that a run could not go with.

    Raises:
        InputError: one of them is not there or not what it should be, or the detector finds
            nothing in the pictures that the model is trained on, or in the victims'.
    """
    incoming_model(config, len(images.classes))
    private = private_regions(config)
    if private is None:
        return
    RegionScore(images.victims.float() / 255.0, private)
    some = images.defender.pixels(_some_of(images.defender))
    if not any((private.masks(part).sum((1, 2, 3)) >= 1.0).any() for part in some.split(_CHUNK)):
        raise InputError(
            f"Expected private regions in some of {len(some)} training images, came none. Look at "
            f"what {config.private} gives for them: 1 where a pixel is private.")


def open_heads(config: RunConfig, images: Images, model: nn.Module) -> tuple[str, ...]:
    """Give the attention heads of its own, where they may go; the layers that were replaced."""
    score = config.score
    if not score.heads:
        return ()
    return open_attention(model, images.example(), unit=score.head_unit).opened


def planned(config: RunConfig, images: Images) -> Plan:
    """Where the model is cut and how far its edge is pruned.

    Raises:
        PatrolError: no such place, a budget that cannot be met, an edge that cannot be trained as
            the settings say.
    """
    model = fresh_model(config, len(images.classes))
    opened = open_heads(config, images, model)
    made = plan(
        model, images.example(), edge_macs=config.edge_macs, at=config.at,
        boundary=config.boundary, max_pruning_ratio=config.score.max_pruning_ratio,
        min_channels=config.score.min_channels, round_to=config.score.round_to,
        structures=config.score.structures,
    )
    if config.feature_channels is not None:  # what cannot stay, or fit with it, is refused here
        cost = made[made.recommended].edge_macs
        blocks = config.score.structures != "channels"  # which may make room
        PatrolPruner(model, images.example(), GroupMagnitudeImportance(),
                     edge_macs=cost if blocks else min(made.budget_edge_macs, cost),
                     split=Split(model, images.example(), at=made.recommended),
                     boundary=config.boundary, feature_channels=config.feature_channels,
                     max_pruning_ratio=config.score.max_pruning_ratio,
                     min_channels=config.score.min_channels, round_to=config.score.round_to)
    if opened:  # the dense model is cut before its heads are opened
        Split(fresh_model(config, len(images.classes)), images.example(), at=made.recommended)
    if config.privacy.lipschitz_form == "spectral" and (
        config.privacy.alpha or config.score.lip_weight
    ):  # an edge that form cannot read is refused before any training
        chosen = Split(model, images.example(), at=made.recommended)
        read_blocks(chosen.blocks, chosen.example_inputs)
    return made


def incoming_digests(config: RunConfig, images: Images) -> dict[str, str | None]:
    """What a run notes of its images and of its file of weights."""
    weights = None if config.weights is None else sha256_of(config.weights)
    return {"digest": images.digest, "weights_sha256": weights}


def refuse_changed(
    config: RunConfig, images: Images, began: Mapping[str, Any], path: Path
) -> None:
    """Refuse other images and weights than those that the run in `path` began with; a file of
    weights that is gone is for the stage that reads it to miss.

    Raises:
        RunDirectoryError: they differ from `began`, what `incoming_digests` gave then.
    """
    if began["digest"] != images.digest:
        raise RunDirectoryError(
            f"The images in {config.data} are not those that the run in {path} began with. Put "
            f"those back, say where they lie now with --data, {_ANEW}"
        )
    if config.weights is not None and Path(config.weights).is_file():
        refuse_changed_weights(config.weights, began, path,
                               f"say where they lie now with --weights, {_ANEW}")


def refuse_changed_weights(
    weights: str | None, began: Mapping[str, Any], path: Path, advice: str = _ANEW
) -> None:
    """Refuse another file of weights than the one that the run in `path` began with.

    Raises:
        RunDirectoryError: its sha256 is not the `weights_sha256` of `began`.
    """
    noted = began.get("weights_sha256")  # an earlier release did not note it
    if weights is not None and noted is not None and noted != sha256_of(weights):
        raise RunDirectoryError(
            f"The weights in {weights} are not those that the run in {path} began with. Put those "
            f"back, {advice}"
        )


def budget_of(made: Plan) -> int:
    """What the pruner is asked for: a split that fits as it is has nothing to lose."""
    return min(made.budget_edge_macs, made[made.recommended].edge_macs)


def with_dropout(privacy: PrivacyConfig, split: Split, seed: int) -> Split:
    """The split as it uploads, `privacy.dropout` behind the edge; it shares the layers.

    The split itself where that is there already, as in one that was saved so.
    """
    if not privacy.dropout or isinstance(split.defence, FeatureDropout):
        return split
    return FeatureDropout(privacy.dropout, seed).apply(split)


def rounding(split: Split, bits: int, defender: ImageSet, normalization: Normalization) -> Split:
    """The split whose uploads are rounded to `bits`, each channel over the range that it takes on
    some of the defender's pictures; it shares the layers."""
    some = defender.pixels(_some_of(defender))
    return Quantisation(bits).apply(split, calibration=normalization.to_input(some))


def _some_of(images: ImageSet) -> Tensor:
    """Indices of up to 500, spread over all."""
    count = min(_CALIBRATING, len(images))
    return torch.linspace(0, len(images) - 1, count).round().long()


def sent_bytes(split: Split, bits: int | None) -> int:
    """Bytes of one upload, its values packed where they are rounded."""
    shape = split.feature_shape
    return feature_bytes(shape) if bits is None else Quantisation(bits).upload_bytes(shape)


def rounding_notes(bits: int | None, dropout: float) -> list[str]:
    """What whoever deploys an edge that rounds, and drops that share behind it, has to know."""
    where, value, packed = "edge.upload", "value", " (pp.UploadFormat packs them)"
    if dropout:
        where, value, packed = "edge.features.upload", f"{1.0 - dropout:g} * value", ""
    return [] if bits is None else [
        f"The edge rounds every value that it uploads to {bits} bits, and was trained and attacked "
        f"so; it hands the rounded numbers on as floating point{packed}. What is to be sent of "
        f"each is round({value} / scale) + zero_point, by the buffers of the saved "
        f"split's {where}."]


def dropout_notes(privacy: PrivacyConfig, uploads: int) -> list[str]:
    """What whoever deploys the edge, or reads what attackers with `uploads` of each picture saw of
    it, has to know."""
    p = privacy.dropout
    if not p:
        return []
    told = [f"The edge was trained and attacked with {100 * p:g}% of its upload dropped at random, "
            "anew for every upload. The saved split does that too, by the draws in its file (one "
            "that an earlier release saved does not, its split.defence is None: put "
            f'pp.make_defence("feature_dropout", {p}) behind it). On every device call '
            "split.edge.upload.reseed() before it sends."]
    each = "one upload" if uploads == 1 else f"{uploads} uploads"
    told.append(f"The attackers had {each} of every picture.")
    if uploads == 1:
        told[-1] += " Whoever sees more of them sees more: an audit with 8 uploads says what."
    return told


def training_batches(config: RunConfig, images: Images, *, augment: bool, offset: int) -> Batches:
    """The defender's images, shuffled; stages differ by `offset`."""
    return Batches(
        images.defender, config.batch_size, normalization=images.normalization, augment=augment,
        shuffle=True, seed=config.seed + offset,
    )


def held_out_batches(config: RunConfig, images: Images) -> Batches:
    """The test images in order."""
    return Batches(images.test, 2 * config.batch_size, normalization=images.normalization)
