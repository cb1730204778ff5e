"""The state of one audit: what every attacker got, what he made of it, and what was flagged."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patrol_prune.access import Draws, Repeated, compute_features, edge_function, fresh_twin
from patrol_prune.attacks import (
    Attack,
    FitRecord,
    Flag,
    Knowledge,
    NearestImage,
    check_boxes,
    check_draws,
    check_features,
    check_fit,
    check_more_data,
    check_reconstructions,
    check_slopes,
    self_test,
)
from patrol_prune.attacks.checks import ATTACK_FAILED, NO_GRADIENT, SEEN_ONCE, SELF_TESTS
from patrol_prune.attacks.registry import box_of
from patrol_prune.audit_choice import Factory, Owned
from patrol_prune.audit_report import AuditReport, mean_and_std
from patrol_prune.audit_scores import check_guess, score, thumbnails
from patrol_prune.errors import InputError, TrainingError
from patrol_prune.jacobian import blocked_outputs
from patrol_prune.pixels import Normalization
from patrol_prune.received import OUTLYING_FEATURES, evened, not_outlying, one_at_a_time
from patrol_prune.warm_start import WarmStarts

logger = logging.getLogger("patrol_prune.audit")

_CHECKED = 128
_THUMBNAIL_PIXELS = 5_000_000
_ASKED = 32
"""Images of each side that tell whether the edge draws."""
Observer = Callable[[str, str, Attack, Tensor], None]
"""Called with a subject, an attack's name, the attack and its reconstructions `[N, C, H, W]`."""


class AuditRun:
    """Collects the records of one audit."""

    def __init__(
        self,
        attackers: list[Owned],
        victim: Tensor,
        normalization: Normalization,
        batch_size: int,
        largest_feature_bytes: int,
        progress: Callable[[str], None] | None,
        observer: Observer | None = None,
        uploads: int = 1,
    ) -> None:
        self.attackers, self.victim = attackers, victim
        self.normalization, self.batch_size, self.progress = normalization, batch_size, progress
        self.largest_feature_bytes, self.observer = largest_feature_bytes, observer
        self.uploads = self.used = uploads
        self.begun = torch.get_rng_state()
        self.draws: Draws | None = None
        self.blocked: dict[str, list[Flag]] = {}
        self.result = AuditReport(records=[])
        self.last_error: Exception | None = None
        self.best: dict[str, tuple[float, Tensor]] = {}

    def say(self, sentence: str) -> None:
        logger.info(sentence)
        if self.progress is not None:
            self.progress(sentence)

    def self_tests(self, made: list[Factory]) -> None:
        channels = self.victim.shape[1]
        for factory in made:
            attack = factory.make(factory.seeds[0], None)
            if (factory.box or box_of(attack)) == "none":
                continue  # without a query, what it finds is one edge of many that would do
            self.say(f"Checking that {factory.name} inverts trivial edges.")
            for edge, (_, cannot) in SELF_TESTS.items():
                try:
                    flags = self_test(
                        attack, image_shape=(channels, 16, 16), images=512, edges=(edge,)
                    )
                except Exception as error:
                    if factory.box is not None:  # as in `attack`
                        raise
                    self.say(f"{factory.name} broke off: {error}")
                    flags = [cannot]
                self.flag(flags, "identity", factory.name, factory.seeds[0])

    def floor(self) -> None:
        for own in self.attackers:
            if own.data == "shifted" or own is self.attackers[0]:
                guess = own.mean_image.expand_as(self.victim)
                self.record("floor", "mean_image", None, guess, own, time.perf_counter())

    def subject(
        self, subject: str, edge: nn.Module, cloud: nn.Module | None, made: list[Factory]
    ) -> None:
        """Attack one edge with every attack and seed, for every attacker.

        Each attack has draws of its own where the edge is random: what it scores does not depend
        on which others there are, and no attacker has the victim's draws.
        """
        self.say(f"Computing what the {subject} sends.")
        torch.set_rng_state(self.begun)
        self.draws = own_draws = Draws(edge)
        some = torch.cat([_spread(self.victim), _spread(self.attackers[0].pixels)])
        once, draws, flags = one_at_a_time(edge, some, self.normalization)
        self.used = self.uploads if draws else 1
        flags += [SEEN_ONCE] * (draws and self.uploads == 1)
        edge = once if self.used == 1 else Repeated(once, self.used)
        with own_draws.kept():
            edge, cloud, uneven = evened(edge, cloud, self.attackers[0].pixels, self.normalization,
                                         draws=draws)
        self.flag(flags + uneven, subject, None, None)
        z_victim = compute_features(
            edge, self.victim, self.normalization, batch_size=self.batch_size
        )
        if not bool(torch.isfinite(z_victim).all()):
            raise InputError(
                f"Expected finite features, came NaN or infinity of the {subject}. Look at its "
                "weights and the normalisation; a defence has to be applied with calibration=."
            )
        whole: dict[str, Knowledge] = {}
        for own in self.attackers:
            if own.data not in whole:
                own_draws.apart(own.data)
                whole[own.data] = self.knowledge(subject, own, edge, cloud, z_victim, once, draws)
                self.check_edge(whole[own.data], subject)
            known = whole[own.data].first(own.count)
            if subject == "edge" and own is self.attackers[0]:
                own_draws.apart(own.data, own.count, None)
                self.nearest(known, z_victim, own)
            warm = WarmStarts(known, own.mean_image)
            for factory in made:
                if "labels" in factory.needs and own.labels is None:
                    self.say(f"Leaving {factory.name} out: the {own.data} images have no labels.")
                    continue
                for seed in factory.seeds:
                    told = "" if own.whole else f" ({own.count} {own.data} images)"
                    self.say(f"Attacking the {subject} with {factory.name}, seed {seed}{told}.")
                    start = time.perf_counter()
                    own_draws.apart(own.data, own.count, factory.name, seed)
                    attack = factory.make(seed, warm.of(seed))
                    fit = self.attack(subject, factory, seed, attack, known, z_victim, own, start)
                    if factory.learned and fit is not None:
                        own_draws.apart(own.data, own.count, "held out")
                        warm.offer(seed, attack)
        if all(r["subject"] != subject for r in self.result.records):
            last = self.last_error
            advice = ("Lower the learning rates or use fp32."
                      if any(factory.box is not None for factory in made) else "Mend them.")
            raise TrainingError(
                f"Every attack on the {subject} broke off, so nothing is known of it; the last "
                f"with {_told(last)}. {advice}", step=0, term="reconstruction",
            ) from last
        self.compare(subject)

    def attack(
        self,
        subject: str,
        factory: Factory,
        seed: int,
        attack: Attack,
        known: Knowledge,
        z_victim: Tensor,
        own: Owned,
        start: float,
    ) -> FitRecord | None:
        """Fit one attack, reconstruct, check and record; one that breaks off is flagged."""
        if factory.box is None:  # the caller's own may change what it gets
            known, z_victim = known.copied(), z_victim.clone()
        try:
            fit = attack.fit(known)
            guess = attack.reconstruct(z_victim)
            if not isinstance(guess, Tensor):
                raise TypeError("expected a tensor [N, C, H, W] from reconstruct(z), came "
                                f"{type(guess).__name__}")
            guess = guess.detach().float().cpu()
            check_guess(guess, self.victim, factory.name)
        except TrainingError as error:
            self.broke_off(error, ATTACK_FAILED, subject, factory, seed, own)
            return None
        except Exception as error:
            if factory.box is not None:  # one of ours: what is wrong is the caller's to know
                raise
            told = dataclasses.replace(ATTACK_FAILED, advice="Mend the attack.", meaning=(
                f"The attack raised {_told(error)}. It has no score."))
            self.broke_off(error, told, subject, factory, seed, own)
            return None
        flags = [] if fit is None else check_fit(fit)
        if box_of(attack) == "white" and NO_GRADIENT not in flags:
            flags += self.slopes(subject, known)
        flags += check_reconstructions(self.victim, guess, own.mean_image)
        self.flag(flags, subject, factory.name, seed, own)
        self.record(
            subject, factory.name, seed, guess, own, start, fit=fit, box=box_of(attack),
            random_edge=known.random_edge,
        )
        if self.observer is not None:
            self.observer(subject, factory.name, attack, guess)
        return fit

    def slopes(self, subject: str, known: Knowledge) -> list[Flag]:
        """Flag an edge that blocks the gradient of some outputs; asked once of each subject."""
        if subject not in self.blocked:
            assert known.edge is not None and self.draws is not None
            draws, some = self.draws, _spread(known.pixels)  # the same draws for each of them
            self.blocked[subject] = check_slopes(*blocked_outputs(
                known.edge, some, prepare=lambda: draws.apart("slopes")))
        return self.blocked[subject]

    def broke_off(self, error: Exception, flag: Flag, subject: str, factory: Factory, seed: int,
                  own: Owned) -> None:
        """Tell it and go on: the other attacks have scores."""
        self.say(f"{factory.name} broke off: {error}")
        self.flag([flag], subject, factory.name, seed, own)
        self.last_error = error

    def knowledge(
        self, subject: str, own: Owned, edge: nn.Module, cloud: nn.Module | None, z_victim: Tensor,
        once: nn.Module, draws: bool,
    ) -> Knowledge:
        """What this attacker may have, with all of his images; `once` sends a picture once."""
        query = edge_function(edge, self.normalization)
        fits = z_victim[:1].numel() * 4 * len(own.pixels) <= self.largest_feature_bytes
        pixels, labels, z = own.pixels, own.labels, None
        if fits:
            z = compute_features(edge, pixels, self.normalization, batch_size=self.batch_size)
            near = not_outlying(z) if bool(torch.isfinite(z).all()) else None
            if near is not None:
                self.flag([OUTLYING_FEATURES], subject, None, None)
                pixels, z = pixels[near], z[near]
                labels = None if labels is None else labels[near]
        return Knowledge(
            pixels=pixels,
            z=z,
            edge=query,
            cloud=cloud,
            labels=labels,
            observed=z_victim,
            shadow_edge=lambda seed: fresh_twin(once, seed),
            random_edge=draws,
        )

    def check_edge(self, known: Knowledge, subject: str) -> None:
        """Flag an edge that sends the same for every image, or only noise."""
        assert known.edge is not None
        some = known.pixels[:_CHECKED]
        with torch.no_grad():
            z = known.edge(some) if known.z is None else known.z[:_CHECKED]
        flags = check_features(z) if len(some) > 1 else []
        if known.random_edge and not flags and len(some) >= 8:
            flags = check_draws(known.edge, some)
        self.flag(flags, subject, None, None)

    def compare(self, subject: str) -> None:
        """Flag what only shows between attacks: a weak white box, and data that still help."""
        records = [r for r in self.result.records
                   if r["subject"] == subject and r["attacker_data"] == "same"]
        most = [r for r in records if r["attacker_images"] == self.attackers[0].count]
        best = {box: [r["ssim"] for r in most if r["box"] == box] for box in ("white", "black")}
        whites = sorted((r for r in most if r["box"] == "white"), key=lambda r: -r["ssim"])
        if whites:
            where = whites[0]["attack"], whites[0]["attack_seed"]
            self.flag(check_boxes(best["white"], best["black"]), subject, *where)
        sizes = [own.count for own in self.attackers if own.data == "same"]
        if len(sizes) < 2:
            return
        for attack in dict.fromkeys(r["attack"] for r in most):
            more, fewer = (
                [r["mse"] for r in records
                 if r["attack"] == attack and r["attacker_images"] == size] for size in sizes[:2]
            )
            if more and fewer:  # an attack may have broken off with either
                means = mean_and_std(fewer)[0], mean_and_std(more)[0]
                self.flag(check_more_data(*means), subject, attack, None)

    def nearest(self, known: Knowledge, z_victim: Tensor, own: Owned) -> None:
        """The second floor: the attacker's own image whose feature is nearest."""
        start = time.perf_counter()
        floor = NearestImage()
        floor.fit(known)
        self.record("floor", "nearest_image", None, floor.reconstruct(z_victim), own, start,
                    box="black", random_edge=known.random_edge)

    def flag(
        self,
        flags: list[Flag],
        subject: str,
        attack: str | None,
        seed: int | None,
        own: Owned | None = None,
    ) -> None:
        for flag in flags:
            where = {"subject": subject, "attack": attack, "attack_seed": seed}
            if own is not None:
                where |= {"attacker_data": own.data, "attacker_images": own.count}
            self.result.flags.append(where | dataclasses.asdict(flag))
            logger.warning("%s, %s, seed %s: %s", subject, attack, seed, flag.meaning)

    def record(
        self,
        subject: str,
        attack: str,
        seed: int | None,
        guess: Tensor,
        own: Owned,
        start: float,
        *,
        fit: FitRecord | None = None,
        box: str | None = "none",
        random_edge: bool | None = None,
    ) -> None:
        numbers, per_image = score(self.victim, guess)
        self.result.records.append({
            "subject": subject,
            "attack": attack,
            "attack_seed": seed,
            "box": box,
            "attacker_data": own.data,
            "attacker_images": own.count,
            "victim_images": len(self.victim),
            "random_edge": random_edge,
            "uploads": None if subject == "floor" and random_edge is None else self.used,
            **numbers,
            "plateau": None if fit is None else fit.plateau,
            "epochs": None if fit is None else len(fit.history),
            "extensions": None if fit is None else fit.extensions,
            "best_epoch": None if fit is None else fit.best_epoch,
            "held_out_loss": None if fit is None else _finite(fit.best_loss),
            "gradient_norm": None if fit is None else _finite(fit.gradient_norm),
            "chosen": None if fit is None else _in_words(fit.chosen),
            "seconds": time.perf_counter() - start,
        })
        key = "/".join((subject, attack, str(seed)))
        if own is not self.attackers[0]:
            key += f"/{own.data}-{own.count}"
        self.result.per_image[key] = {name: values.tolist() for name, values in per_image.items()}
        reached = numbers["ssim"]
        assert reached is not None
        if subject not in self.best or reached > self.best[subject][0]:
            self.best[subject] = (reached, guess)

    def report(self, examples: int) -> AuditReport:
        """The finished report, with evenly spaced examples of each subject's strongest attack."""
        seen = [r["ssim"] for r in self.result.records if r["subject"] != "floor"]
        self.say("Looking for the thumbnails that show as much.")
        few = max(50, min(500, _THUMBNAIL_PIXELS // self.victim[0, 0].numel()))
        some = torch.linspace(0, len(self.victim) - 1, min(few, len(self.victim))).long()
        self.result.thumbnails = thumbnails(self.victim[some], max(seen, default=0.0))
        count = min(examples, len(self.victim))
        if count > 0:
            index = torch.linspace(0, len(self.victim) - 1, count).round().long()
            self.result.example_indices = index.tolist()
            images = {"originals": self.victim} | {s: g for s, (_, g) in self.best.items()}
            for name, pixels in images.items():
                shown = (pixels[index] * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
                self.result.examples[name] = np.ascontiguousarray(shown.numpy())
        return self.result


def _spread(images: Tensor) -> Tensor:
    """A few of them, from the first to the last."""
    return images[torch.linspace(0, len(images) - 1, min(_ASKED, len(images))).long()]


def _finite(value: float | None) -> float | None:
    """None for what JSON has no word for; a flag tells of it."""
    return value if value is not None and math.isfinite(value) else None


def _in_words(chosen: dict[str, Any] | None) -> str | None:
    """The scalars among the settings that an attack chose, `"loss mse, lambda_tv 0.1"`."""
    if chosen is None:
        return None
    return ", ".join(f"{k} {v}" for k, v in chosen.items() if isinstance(v, str | int | float))


def _told(error: BaseException | None) -> str:
    """An error with the place where it was raised, without a full stop."""
    if error is None:
        return "no reason"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).rstrip('.')}{place}"
