"""Attack an edge with fresh attackers, between its floor and its ceiling.

Every attacker is trained from scratch, after the defence is finished, on the attacker's own
images, and judged on the victim's. Beside it stand the floor (the attacker's mean image, which
needs no feature at all) and, if given, the ceiling: the undefended split under the same attacks
and seeds.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from patrol_prune.attacks import (
    Attack,
    FitRecord,
    Flag,
    InverseNetworkConfig,
    check_features,
    check_fit,
    check_reconstructions,
    make_attack,
    self_test,
)
from patrol_prune.audit_report import AuditReport
from patrol_prune.cost import evaluating
from patrol_prune.errors import InputError
from patrol_prune.metrics import check_pixels, mse, psnr, ssim
from patrol_prune.pixels import Normalization

logger = logging.getLogger(__name__)

WORST_SHARE = 0.05
LARGEST_PSNR = 100.0
_SMALLEST_SIDE = 11


class HasEdge(Protocol):
    """What an audit needs of a split: the half that runs on the device."""

    @property
    def edge(self) -> nn.Module:
        """Model input `[N, C, H, W]` to the transmitted feature `[N, ...]`."""


AttackChoice = str | Attack | Callable[[int], Attack]
"""A name, an instance (copied before each fit, and run once), or a function of the seed."""


def audit(
    split: HasEdge,
    attacker_data: Tensor,
    victim_data: Tensor,
    *,
    attacks: Sequence[AttackChoice] | Mapping[str, AttackChoice] = ("inverse_network",),
    seeds: Sequence[int] = (0,),
    normalization: Normalization | None = None,
    undefended: HasEdge | None = None,
    config: InverseNetworkConfig | None = None,
    device: str = "cpu",
    examples: int = 8,
    batch_size: int = 128,
    check_attacks: bool = False,
    progress: Callable[[str], None] | None = None,
) -> AuditReport:
    """Reconstruct the victim's images from what the edge sends, and measure how well that went.

    The edge runs in evaluation mode, in float32, where its weights are; its modes come back as
    they were. Global random generators are untouched.

    Args:
        split: anything with an `edge`.
        attacker_data: images `[N, C, H, W]` on [0, 1], or uint8, that the attacker owns. For a
            fair audit the defender did not train on them.
        victim_data: images to be reconstructed, none of them among the attacker's.
        attacks: names (`patrol_prune.attacks.ATTACKS`), your own attacks (an object with `fit` and
            `reconstruct`) or functions `seed -> attack`; a mapping names them.
        seeds: one fresh attacker for each; an instance, which takes no seed, runs once.
        normalization: from pixels to the model's input; by default none.
        undefended: the split before any defence, at the same place: the ceiling.
        config: settings of the attacks that are given by name; its seed is replaced.
        device: where attackers train.
        examples: how many reconstructions to keep as images.
        batch_size: images per forward pass of the edge.
        check_attacks: also let every attack invert an identity edge first (`self_test`).
        progress: called with one sentence before each step; they are logged in any case.

    Raises:
        InputError: before any work, on data that is not on [0, 1], differs in shape, is too small
            for SSIM (11 pixels) or shared between attacker and victim; on an unknown attack, no
            attack, no seed or a repeated seed.
    """
    factories = _factories(attacks, config or InverseNetworkConfig(), seeds, device)
    known, victim = _pixels(attacker_data, "attacker_data"), _pixels(victim_data, "victim_data")
    _check_data(known, victim)
    run = _Audit(known, victim, normalization or Normalization(), batch_size, progress)
    if check_attacks:
        run.self_tests(factories)
    run.floor()
    subjects = {"edge": split} | ({} if undefended is None else {"undefended": undefended})
    for subject, half in subjects.items():
        run.subject(subject, half.edge, factories)
    return run.report(examples)


def compute_features(
    edge: nn.Module, pixels: Tensor, normalization: Normalization, *, batch_size: int = 128
) -> Tensor:
    """What `edge` sends for `pixels [N, C, H, W]`: float32 `[N, *feature_shape]` on the CPU.

    Evaluation mode, no gradients, no autocast; the edge's modes come back as they were.
    """
    tensor = next(edge.parameters(), next(edge.buffers(), torch.empty(0)))
    parts = []
    with evaluating(edge), torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        for batch in torch.split(pixels, batch_size):
            parts.append(edge(normalization.to_input(batch.to(tensor.device))).float().cpu())
    return torch.cat(parts)


@dataclasses.dataclass(frozen=True)
class _Factory:
    """One attack of the audit: its name, how to make it, and the seeds it runs with."""

    name: str
    make: Callable[[int], Attack]
    seeds: tuple[int, ...]


class _Audit:
    """Collects the records of one audit."""

    def __init__(
        self,
        known: Tensor,
        victim: Tensor,
        normalization: Normalization,
        batch_size: int,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.known, self.victim = known, victim
        self.normalization, self.batch_size, self.progress = normalization, batch_size, progress
        self.mean_image = known.mean(dim=0)
        self.result = AuditReport(records=[])
        self.best: dict[str, tuple[float, Tensor]] = {}

    def say(self, sentence: str) -> None:
        logger.info(sentence)
        if self.progress is not None:
            self.progress(sentence)

    def self_tests(self, factories: list[_Factory]) -> None:
        channels = self.known.shape[1]
        for factory in factories:
            self.say(f"Checking that {factory.name} inverts an identity edge.")
            attack = factory.make(factory.seeds[0])
            flags = self_test(attack, image_shape=(channels, 16, 16), images=512)
            self.flag(flags, "identity", factory.name, factory.seeds[0])

    def floor(self) -> None:
        start = time.perf_counter()
        guess = self.mean_image.expand_as(self.victim)
        self.record("floor", "mean_image", None, guess, None, start)

    def subject(self, subject: str, edge: nn.Module, factories: list[_Factory]) -> None:
        """Attack one edge with every attack and seed."""
        self.say(f"Computing what the {subject} sends.")
        z_known, z_victim = (
            compute_features(edge, data, self.normalization, batch_size=self.batch_size)
            for data in (self.known, self.victim)
        )
        self.flag(check_features(z_known), subject, None, None)
        for factory in factories:
            for seed in factory.seeds:
                self.say(f"Attacking the {subject} with {factory.name}, seed {seed}.")
                start = time.perf_counter()
                attack = factory.make(seed)
                fit = attack.fit(z_known, self.known)
                guess = attack.reconstruct(z_victim).detach().float().cpu()
                if fit is not None:
                    self.flag(check_fit(fit), subject, factory.name, seed)
                flags = check_reconstructions(self.victim, guess, self.mean_image)
                self.flag(flags, subject, factory.name, seed)
                self.record(subject, factory.name, seed, guess, fit, start)

    def flag(self, flags: list[Flag], subject: str, attack: str | None, seed: int | None) -> None:
        for flag in flags:
            where = {"subject": subject, "attack": attack, "attack_seed": seed}
            self.result.flags.append(where | dataclasses.asdict(flag))
            logger.warning("%s, %s, seed %s: %s", subject, attack, seed, flag.meaning)

    def record(
        self,
        subject: str,
        attack: str,
        seed: int | None,
        guess: Tensor,
        fit: FitRecord | None,
        start: float,
    ) -> None:
        scores = {
            "ssim": ssim(self.victim, guess),
            "psnr": psnr(self.victim, guess).clamp(max=LARGEST_PSNR),
            "mse": mse(self.victim, guess),
        }
        means = {name: float(values.double().mean()) for name, values in scores.items()}
        worst = max(1, round(WORST_SHARE * len(self.victim)))
        self.result.records.append({
            "subject": subject,
            "attack": attack,
            "attack_seed": seed,
            "attacker_images": len(self.known),
            "victim_images": len(self.victim),
            **means,
            "ssim_worst5": float(scores["ssim"].topk(worst).values.double().mean()),
            "plateau": None if fit is None else fit.plateau,
            "epochs": None if fit is None else len(fit.history),
            "extensions": None if fit is None else fit.extensions,
            "best_epoch": None if fit is None else fit.best_epoch,
            "held_out_loss": None if fit is None else fit.best_loss,
            "seconds": time.perf_counter() - start,
        })
        key = "/".join((subject, attack, str(seed)))
        self.result.per_image[key] = {name: values.tolist() for name, values in scores.items()}
        if subject not in self.best or means["ssim"] > self.best[subject][0]:
            self.best[subject] = (means["ssim"], guess)

    def report(self, examples: int) -> AuditReport:
        """The finished report, with evenly spaced examples of each subject's strongest attack."""
        count = min(examples, len(self.victim))
        if count > 0:
            index = torch.linspace(0, len(self.victim) - 1, count).round().long()
            self.result.example_indices = index.tolist()
            images = {"originals": self.victim} | {s: g for s, (_, g) in self.best.items()}
            for name, pixels in images.items():
                shown = (pixels[index] * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
                self.result.examples[name] = np.ascontiguousarray(shown.numpy())
        return self.result


def _factories(
    attacks: Sequence[AttackChoice] | Mapping[str, AttackChoice],
    config: InverseNetworkConfig,
    seeds: Sequence[int],
    device: str,
) -> list[_Factory]:
    seeds = tuple(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"Expected one or more different seeds, came {seeds}.")
    if isinstance(attacks, str):
        attacks = (attacks,)
    named = attacks if isinstance(attacks, Mapping) else {_name(a): a for a in attacks}
    if not named or len(named) != len(attacks):
        raise InputError(
            f"Expected one or more attacks of different names, came {[_name(a) for a in attacks]}."
            " Give a mapping from names to attacks."
        )
    return [_factory(name, choice, config, seeds, device) for name, choice in named.items()]


def _factory(
    name: str,
    choice: AttackChoice,
    config: InverseNetworkConfig,
    seeds: tuple[int, ...],
    device: str,
) -> _Factory:
    if isinstance(choice, str):
        kind = choice
        make_attack(kind, config, device=device)  # an unknown name is refused before any work

        def make(seed: int) -> Attack:
            return make_attack(kind, dataclasses.replace(config, seed=seed), device=device)

        return _Factory(name, make, seeds)
    if isinstance(choice, Attack):
        instance = choice
        return _Factory(name, lambda seed: copy.deepcopy(instance), seeds[:1])
    if callable(choice):
        return _Factory(name, choice, seeds)
    raise InputError(
        "Expected an attack as a name, an object with fit and reconstruct, or a function of the "
        f"seed, came {choice!r}."
    )


def _name(attack: AttackChoice) -> str:
    if isinstance(attack, str):
        return attack
    return str(getattr(attack, "__name__", type(attack).__name__))


def _pixels(data: Tensor, name: str) -> Tensor:
    """Images `[N, C, H, W]` as float32 on [0, 1] on the CPU, checked."""
    if not isinstance(data, Tensor) or data.dim() != 4 or len(data) == 0:
        came = tuple(data.shape) if isinstance(data, Tensor) else type(data).__name__
        raise InputError(f"Expected {name} as a tensor [N, C, H, W] with N >= 1, came {came}.")
    if data.dtype == torch.uint8:
        return data.detach().cpu().float() / 255.0
    check_pixels(data, name)
    return data.detach().cpu().float()


def _check_data(known: Tensor, victim: Tensor) -> None:
    if known.shape[1:] != victim.shape[1:]:
        raise InputError(
            "Expected attacker and victim images of one size, came "
            f"{tuple(known.shape[1:])} and {tuple(victim.shape[1:])}. Resize one of them."
        )
    if min(known.shape[2:]) < _SMALLEST_SIDE:
        raise InputError(
            f"SSIM takes images of at least {_SMALLEST_SIDE} pixels a side, came "
            f"{tuple(known.shape[2:])}. Use larger images."
        )
    seen = set(_fingerprints(known))
    shared = [i for i, print_ in enumerate(_fingerprints(victim)) if print_ in seen]
    if shared:
        raise InputError(
            f"Expected victim images that the attacker does not own, came {len(shared)} of "
            f"{len(victim)} that are also in attacker_data (victim_data[{shared[0]}] is the "
            "first). Remove them from one of the two: an attacker who knows the image proves "
            "nothing."
        )


def _fingerprints(pixels: Tensor) -> list[bytes]:
    images = (pixels * 255).round().to(torch.uint8).numpy()
    return [hashlib.sha256(image.tobytes()).digest() for image in images]
