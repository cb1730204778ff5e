"""Audit any cut model on a folder of images: no run, no pruning, nothing is trained but attackers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from patrol_prune.attacks import InverseNetworkConfig
from patrol_prune.attacks.rmle import RMLEConfig
from patrol_prune.audit import audit
from patrol_prune.audit_report import AuditReport
from patrol_prune.data import load_image_folder
from patrol_prune.errors import InputError
from patrol_prune.preparation import Images, incoming_model, private_regions, read_images
from patrol_prune.settings import AuditConfig, RunConfig, resolve_device
from patrol_prune.split import Split
from patrol_prune.storage import check_replaceable


@dataclass(frozen=True)
class ModelAudit:
    """What is attacked, on which images, by whom.

    Attributes:
        model: a torchvision classifier, small_resnet, or module:function of your own.
        at: where it is cut, the last layer on the device.
        data: folder with train/ and val/ or test/, each with one folder of images per class.
            Attackers own a share of the first, victims are of the second.
        weights: safetensors file of the model; a function of your own may load its own.
        undefended: safetensors file of the same model before its defence: the ceiling.
        shifted: folder of other images (one folder per class) of a second attacker.
        image_size: side of the square images, in pixels.
        normalization: of pixels; "auto" is ImageNet's statistics with weights for a torchvision
            model, the training images' own otherwise.
        private: module:function of a detector of your own: pixels on [0, 1] to 1 where a picture is
            private, 0 elsewhere; see `PrivateRegions`.
        private_share: of the loss of the attack on those regions.
        out: where the report goes.
        device: cpu, cuda, cuda:1, mps, or auto.
        seed: of the division of the images.
        audit: who attacks.
        attacker: the attacker's network; attacks by other names take its size and schedule.
        rmle: the attack that optimises pixels.
    """

    model: str
    at: str
    data: str
    weights: str | None = None
    undefended: str | None = None
    shifted: str | None = None
    image_size: int = 128
    normalization: Literal["auto", "dataset", "imagenet", "none"] = "auto"
    private: str | None = None
    private_share: float = 0.5
    out: str = "audit.json"
    device: str = "auto"
    seed: int = 0
    audit: AuditConfig = field(default_factory=lambda: AuditConfig(attacker_share=0.5))
    attacker: InverseNetworkConfig = field(
        default_factory=lambda: InverseNetworkConfig(width=48, depth=4, epochs=20)
    )
    rmle: RMLEConfig = field(default_factory=RMLEConfig)

    def __post_init__(self) -> None:
        if self.weights is None and ":" not in self.model:
            raise InputError(
                f"The model {self.model} has no trained weights of its own, and an edge that was "
                "never trained says nothing. Give --weights FILE.safetensors, or module:function "
                "of a function that loads them."
            )
        if not self.out.endswith(".json"):
            raise InputError(f"Expected --out as a .json file, came {self.out}.")
        self.run_config()  # refuses what it refuses

    def run_config(self) -> RunConfig:
        """The settings that decide who owns which image and which model it is."""
        return RunConfig(
            data=self.data, edge_macs="1.0", model=self.model, weights=self.weights, at=self.at,
            image_size=self.image_size, batch_size=2, normalization=self.normalization,
            private=self.private, private_share=self.private_share, device=self.device,
            seed=self.seed, audit=self.audit, attacker=self.attacker, rmle=self.rmle,
        )


def audit_model(
    config: ModelAudit, *, progress: Callable[[str], None] | None = None
) -> AuditReport:
    """Cut the model, attack its edge and write the report to `config.out`, with its examples.

    Raises:
        InputError: whatever is wrong with the model, the cut, the weights, the images or the
            place of the report, before any attack.
    """
    device = resolve_device(config.device)
    run = config.run_config()
    images = read_images(run)
    splits = [_split(run, images)]
    if config.undefended is not None:
        splits.append(_split(replace(run, weights=config.undefended), images))
    for split in splits:
        split.model.to(device)
    shifted = None
    if config.shifted is not None:
        shifted = load_image_folder(config.shifted, config.image_size).images
    private = private_regions(run)
    _check_place(Path(config.out))
    found = audit(
        splits[0], images.attacker, images.victims,
        attacks=config.audit.attacks, seeds=config.audit.seeds,
        normalization=images.normalization, undefended=splits[1] if len(splits) > 1 else None,
        config=config.attacker, settings={"rmle": config.rmle},
        attacker_labels=images.attacker_labels,
        attacker_images=(None, *config.audit.attacker_images), shifted_data=shifted,
        check_attacks=config.audit.check_attacks, uploads=config.audit.uploads, private=private,
        device=str(device), examples=config.audit.examples, progress=progress,
    )
    found.to_json(config.out)
    return found


def _check_place(out: Path) -> None:
    """Refuse a place where the report cannot be written now, not after hours of attacks."""
    examples = out.with_name(f"{out.stem}_examples")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
        check_replaceable(examples, [f"{name}.png" for name in ("originals", "edge", "undefended")])
        if out.is_dir() or (examples.exists() and not examples.is_dir()):
            raise FileExistsError(f"{out if out.is_dir() else examples} is in the way")
    except OSError as error:
        raise InputError(
            f"Expected --out as a file that can be written, came {out} ({error}). Give another "
            "place."
        ) from error


def _split(run: RunConfig, images: Images) -> Split:
    model, fresh = incoming_model(run, len(images.classes))
    if fresh and run.weights is not None:
        raise InputError(
            f"The weights in {run.weights} are of a model with other classes than the "
            f"{len(images.classes)} in {run.data}: its last layer would stay untrained. Give the "
            "images it was trained for."
        )
    assert run.at is not None
    return Split(model.eval(), images.example(), at=run.at)
