"""Attack an edge with fresh attackers, between its floor and its ceiling.

Every attacker is trained from scratch, after the defence is finished, on the attacker's own
images, and judged on the victim's. Beside it stand the floors (the attacker's mean image, which
needs no feature at all, and the attacker's image with the nearest feature) and, if given, the
ceiling: the undefended split under the same attacks and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from patrol_prune.access import compute_features, edge_function, lent, trainable
from patrol_prune.attacks import DEFAULT_ATTACKS, InverseNetworkConfig
from patrol_prune.audit_attack import Observer
from patrol_prune.audit_choice import (
    AttackChoice,
    check_counts,
    check_data,
    check_needs,
    check_uploads,
    factories,
    owned,
    pixels_of,
)
from patrol_prune.audit_kept import KeptAttacks, KeptAudit
from patrol_prune.audit_report import AuditReport
from patrol_prune.audit_run import AuditRun
from patrol_prune.audit_scores import RegionScore
from patrol_prune.audit_setup import setup_of
from patrol_prune.cost import home_of
from patrol_prune.errors import InputError
from patrol_prune.given import (
    check_callable,
    check_count,
    check_has_edge,
    check_normalization,
    check_number,
)
from patrol_prune.pixels import Normalization
from patrol_prune.regions import PrivateRegions, check_regions

__all__ = ["AttackChoice", "AuditReport", "HasEdge", "audit", "compute_features"]


class HasEdge(Protocol):
    """What an audit needs of a split: the half that runs on the device, and `cloud` if it has it.
    """

    @property
    def edge(self) -> nn.Module:
        """Model input `[N, C, H, W]` to the transmitted feature `[N, ...]`."""


@torch.inference_mode(False)
@torch.enable_grad()
def audit(
    split: HasEdge,
    attacker_data: Tensor,
    victim_data: Tensor,
    *,
    attacks: Sequence[AttackChoice] | Mapping[str, AttackChoice] = DEFAULT_ATTACKS,
    seeds: Sequence[int] = (0,),
    normalization: Normalization | None = None,
    undefended: HasEdge | None = None,
    config: InverseNetworkConfig | None = None,
    settings: Mapping[str, Any] | None = None,
    attacker_labels: Tensor | None = None,
    attacker_images: Sequence[int | None] = (None,),
    shifted_data: Tensor | None = None,
    device: str | None = None,
    examples: int = 8,
    batch_size: int = 128,
    check_attacks: bool = False,
    uploads: int = 1,
    private: PrivateRegions | None = None,
    largest_feature_bytes: int = 2 << 30,
    progress: Callable[[str], None] | None = None,
    observer: Observer | None = None,
    kept: KeptAttacks | None = None,
) -> AuditReport:
    """Reconstruct the victim's images from what the edge sends, and measure how well that went.

    The edge runs in evaluation mode, in float32, where its weights are; every attack gets the edge
    as it is, noise and quantisation included. The victim's images are sent once, or `uploads`
    times. Modes, gradients and generators that the split holds come back as they were; the global
    generator of the CPU is left untouched.

    Args:
        split: a `Split`, an `ExportedSplit`, or anything else with a module `edge`, and a `cloud`
            for attacks that go through it.
        attacker_data: images `[N, C, H, W]` on [0, 1], or uint8, that the attacker owns. For a
            fair audit the defender did not train on them.
        victim_data: images to be reconstructed, likewise, none of them among the attacker's.
        attacks: names (`patrol_prune.attacks.ATTACKS` has them, docs/audit.md says what they do),
            your own attacks (an object with `fit` and `reconstruct`, see `Attack`) or functions
            `seed -> attack`; a mapping names them. An attack of your own may say with an attribute
            `box` ("black", "white", "none") what it does to the edge; one that says "none" gets
            neither the edge nor what it sends for the attacker's images.
        seeds: one fresh attacker for each; an instance, which takes no seed, runs once.
        normalization: from pixels to the model's input; by default none.
        undefended: the split before any defence, at the same place: the ceiling.
        config: size and schedule of the decoders that are given by name; its seed is replaced.
        settings: settings of attacks by their name, `{"rmle": RMLEConfig(...)}`; seeds replaced.
        attacker_labels: classes `[N]` of `attacker_data`, for attacks through the cloud.
        attacker_images: attack with so many of the attacker's images, None for all; one row each.
            Fewer than all are picked at random, always the same, not the first.
        shifted_data: other images of the attacker's, unlike the victim's; one more row each, but
            for attacks that need labels, which these have not.
        device: where attackers train; where the edge is by default.
        examples: how many reconstructions to keep as images.
        batch_size: images per forward pass of the edge.
        check_attacks: also let every attack invert two trivial edges first; a flag says where one
            cannot.
        uploads: of each picture, by an edge that draws anew for every one (the frames of a video
            that hardly differ, a device that sends again): attackers are given, of their own
            pictures and of the victim's, the mean, or that of what was not dropped where values
            are. The edge runs so many times for every query; one that draws nothing runs once.
        private: where the images are private: every row tells `private_ssim` and `private_mse`
            there as well, and one more decoder attacks, `aimed_ssim`, whose loss counts the regions
            as `private.share` says. He finds them on his own images by `private.find`.
        largest_feature_bytes: of the attacker's features to keep in memory; of larger ones,
            attacks are given the edge alone and query it batch by batch.
        progress: called with one sentence before each step; they are logged in any case.
        observer: called after each attack with the subject, the attack's name, the fitted attack
            and its reconstructions of the victim's images, for measures of your own; one with a
            keyword-only parameter `record` that has no default gets by that name the attack's row
            of the report, with the seed and the attacker's images. What it raises on an attack of
            your own is a flag, on one of ours it ends the audit.
        kept: where each attack that has ended is kept, so that an audit of the same goes on where
            an earlier one was interrupted: a `patrol_prune.audit_kept.KeptAttacks(folder, same)`,
            with `same` all that the outcome hangs on, as JSON. Attacks of your own are not kept,
            and `observer` is not told of those that are taken from there.

    Raises:
        InputError: before any work, on a split without an edge; on data that is not on [0, 1],
            differs in shape, is too small for SSIM (11 pixels) or shared between attacker and
            victim; on an unknown attack, no attack, no seed or a repeated seed, settings of another
            attack, or an attack that needs a cloud, labels or more images than there are, or less
            than one upload; before any attack, on an edge that cannot run on the images, or
            features that are not finite.
        TrainingError: every attack on the edge, or on the undefended one, broke off, so that
            nothing is known of it.
    """
    check_uploads(uploads)
    check_normalization(normalization)
    check_count(examples, "examples", 0)
    check_count(batch_size, "batch_size", 1)
    check_number(largest_feature_bytes, "largest_feature_bytes")
    check_callable(progress, "progress", "a sentence")
    check_callable(observer, "observer", "subject, name, attack and reconstructions")
    subjects = {"edge": split} | ({} if undefended is None else {"undefended": undefended})
    for name, half in subjects.items():
        check_has_edge(half, "split" if name == "edge" else name)
    check_regions(private)
    made = factories(attacks, config, settings or {}, seeds, str(home_of(split.edge, device)),
                     private)
    known, victim = pixels_of(attacker_data, "attacker_data"), pixels_of(victim_data, "victim_data")
    check_data(known, victim)
    shifted = None if shifted_data is None else pixels_of(shifted_data, "shifted_data")
    if shifted is not None:
        check_data(shifted, victim, "shifted_data")
    for half in subjects.values():
        check_needs(made, {"cloud": getattr(half, "cloud", None), "labels": attacker_labels,
                           "weights": trainable(half.edge) or None})
    attackers = owned(known, shifted, attacker_labels, attacker_images)
    check_counts(made, attackers)
    regions = None if private is None else RegionScore(victim, private)
    kind = AuditRun if kept is None else partial(KeptAudit, kept=kept, examples=examples)
    normalization = normalization or Normalization()
    run = kind(attackers, victim, normalization, batch_size, largest_feature_bytes, progress,
               observer, uploads, regions)
    features = _check_runs(subjects, torch.cat([victim[:1], known[:1]]), normalization,
                           [factory.name for factory in made if factory.box == "white"])
    run.result.setup = setup_of(made, attackers, victim, normalization, uploads, features, private)
    with torch.random.fork_rng(devices=[]):
        if check_attacks:
            run.self_tests(made)
        run.data()
        run.floor()
        for subject, half in subjects.items():
            cloud = getattr(half, "cloud", None)
            with lent(half.edge, *([cloud] if isinstance(cloud, nn.Module) else [])):
                run.subject(subject, half.edge, cloud, made)
    return run.report(examples)


def _check_runs(subjects: Mapping[str, HasEdge], pixels: Tensor, normalization: Normalization,
                white: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Refuse an edge that cannot run on the images, or as the `white` attacks run it, before hours
    go into others (InputError); the shape of each subject's upload.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for subject, half in subjects.items():
        with torch.random.fork_rng(devices=[]), lent(half.edge):
            try:
                z = compute_features(half.edge, pixels, normalization)
                shapes[subject] = tuple(z.shape[1:])
            except InputError:
                raise
            except Exception as error:
                raise InputError(
                    f"Expected an edge of the {subject} that runs on images "
                    f"[N, {', '.join(map(str, pixels.shape[1:]))}], came {type(error).__name__}: "
                    f"{str(error).splitlines()[0] if str(error) else 'no reason'}. Give images as "
                    "its model takes them, and normalization= where it takes normalised ones."
                ) from error
            try:
                if white:
                    with torch.enable_grad():
                        edge_function(half.edge, normalization)(pixels.clone().requires_grad_())
            except Exception as error:
                raise InputError(
                    f"Expected an edge of the {subject} that runs on images whose gradient is "
                    f"asked for, as {' and '.join(white)} do, came {type(error).__name__}: "
                    f"{str(error).splitlines()[0] if str(error) else 'no reason'}. Call detach() "
                    "in the edge where it leaves torch, or name other attacks= than these."
                ) from error
    return shapes
