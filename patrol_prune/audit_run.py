"""The state of one audit: what every attacker got, what he made of it, and what was flagged."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from patrol_prune.access import Draws, compute_features, edge_function
from patrol_prune.attacks import (
    Attack,
    Flag,
    Knowledge,
    NearestImage,
    check_boxes,
    check_draws,
    check_features,
    check_more_data,
    check_owned,
    check_slopes,
    self_test,
)
from patrol_prune.attacks.checks import NO_GRADIENT, SELF_TESTS
from patrol_prune.attacks.registry import box_of
from patrol_prune.audit_attack import (
    Observer,
    Outcome,
    broken_off,
    carried_out,
    changes,
    shown,
    told,
    untested,
)
from patrol_prune.audit_choice import Factory, Owned
from patrol_prune.audit_report import AuditReport, mean_and_std
from patrol_prune.audit_scores import RegionScore, thumbnails
from patrol_prune.data import near_duplicates
from patrol_prune.errors import InputError, TrainingError
from patrol_prune.jacobian import blocked_outputs
from patrol_prune.pixels import Normalization
from patrol_prune.received import OUTLYING_FEATURES, not_outlying
from patrol_prune.undoing import Undone, undone
from patrol_prune.unharmed import put_back
from patrol_prune.warm_start import WarmStarts

logger = logging.getLogger("patrol_prune.audit")

_CHECKED = 128
_THUMBNAIL_PIXELS = 5_000_000
_ASKED = 32
"""Images of each side that tell how the edge answers."""


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
        regions: RegionScore | None = None,
    ) -> None:
        self.regions = regions
        self.attackers, self.victim = attackers, victim
        self.normalization, self.batch_size, self.progress = normalization, batch_size, progress
        self.largest_feature_bytes, self.observer = largest_feature_bytes, observer
        self.uploads = self.used = uploads
        self.begun = torch.get_rng_state()
        self.draws: Draws | None = None
        self.halves: list[nn.Module] = []
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
            try:
                attack = factory.make(factory.seeds[0], None)
                if (factory.box or box_of(attack)) == "none":
                    continue  # without a query, what it finds is one edge of many that would do
            except Exception:
                if factory.box is not None:  # as `broken_off`
                    raise
                continue  # what is wrong is told when its turn comes
            self.say(f"Checking that {factory.name} inverts trivial edges.")
            for edge, (_, cannot) in SELF_TESTS.items():
                try:
                    flags = self_test(
                        attack, image_shape=(channels, 16, 16), images=512, edges=(edge,)
                    )
                except Exception as error:
                    if factory.box is not None:  # as `broken_off`
                        raise
                    self.say(f"{factory.name} broke off: {error}")
                    flags = [untested(cannot, error, f"{channels}x16x16")]
                self.flag(flags, "identity", factory.name, factory.seeds[0])

    def floor(self) -> None:
        for own in self.attackers:
            if own.data == "shifted" or own is self.attackers[0]:
                guess = own.mean_image.expand_as(self.victim)
                self.record("floor", "mean_image", None, Outcome.of(self.victim, guess), own,
                            time.perf_counter())

    def data(self) -> None:
        """Flag victims' pictures that an attacker owns but for little."""
        for own in self.attackers:
            if own.data == "shifted" or own is self.attackers[0]:
                near = near_duplicates(self.victim, own.pixels).tolist()
                self.flag(check_owned(near, len(self.victim)), "edge", None, None, own)

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
        got = undone(edge, cloud, some, self.attackers[0].pixels, self.normalization, self.uploads)
        self.used = got.uploads
        self.halves = [m for m in (got.edge, got.cloud) if isinstance(m, nn.Module)]
        self.flag(got.flags, subject, None, None)
        z_victim = compute_features(
            got.edge, self.victim, self.normalization, batch_size=self.batch_size
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
                whole[own.data] = self.knowledge(subject, own, got, z_victim)
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
                    whose = "" if own.whole else f" ({own.count} {own.data} images)"
                    self.say(f"Attacking the {subject} with {factory.name}, seed {seed}{whose}.")
                    own_draws.apart(own.data, own.count, factory.name, seed)
                    fitted = self.attack(subject, factory, seed, warm, known, z_victim, own)
                    if factory.learned and fitted is not None:
                        own_draws.apart(own.data, own.count, "held out")
                        warm.offer(seed, fitted)
        if all(r["subject"] != subject for r in self.result.records):
            last = self.last_error
            advice = ("Lower the learning rates or use fp32."
                      if any(factory.box is not None for factory in made) else "Mend them.")
            raise TrainingError(
                f"Every attack on the {subject} broke off, so nothing is known of it; the last "
                f"with {told(last)}. {advice}", step=0, term="reconstruction",
            ) from last
        self.compare(subject)

    def attack(
        self,
        subject: str,
        factory: Factory,
        seed: int,
        warm: WarmStarts,
        known: Knowledge,
        z_victim: Tensor,
        own: Owned,
    ) -> Attack | None:
        """Fit one attack, reconstruct, check and record; one that breaks off is flagged, and None.
        """
        start, made = time.perf_counter(), None
        with put_back(*(self.halves if factory.box is None else ())) as changed:
            try:
                made = carried_out(factory, seed, warm.of(seed), known, z_victim, self.victim,
                                   own.mean_image)
            except Exception as error:
                self.say(f"{factory.name} broke off: {error}")
                self.flag([broken_off(error, factory)], subject, factory.name, seed, own)
                self.last_error = error
        self.flag(changes(changed), subject, factory.name, seed, own)
        if made is None:
            return None
        flags = list(made.flags)
        if made.box == "white" and NO_GRADIENT not in flags:
            flags += self.slopes(subject, known)
        self.flag([*flags, *made.doubts], subject, factory.name, seed, own)
        self.record(subject, factory.name, seed, made, own, start, random_edge=known.random_edge)
        told_of = shown(self.observer, subject, factory, made, self.result.records[-1])
        self.flag(told_of, subject, factory.name, seed, own)
        return made.attack

    def slopes(self, subject: str, known: Knowledge) -> list[Flag]:
        """Flag an edge that blocks the gradient of some outputs; asked once of each subject."""
        if subject not in self.blocked:
            assert known.edge is not None and self.draws is not None
            draws, some = self.draws, _spread(known.pixels)  # the same draws for each of them
            self.blocked[subject] = check_slopes(*blocked_outputs(
                known.edge, some, prepare=lambda: draws.apart("slopes")))
        return self.blocked[subject]

    def knowledge(self, subject: str, own: Owned, got: Undone, z_victim: Tensor) -> Knowledge:
        """What this attacker may have, with all of his images."""
        query = edge_function(got.edge, self.normalization)
        fits = z_victim[:1].numel() * 4 * len(own.pixels) <= self.largest_feature_bytes
        pixels, labels, z = own.pixels, own.labels, None
        if fits:
            z = compute_features(got.edge, pixels, self.normalization, batch_size=self.batch_size)
            near = not_outlying(z) if bool(torch.isfinite(z).all()) else None
            if near is not None:
                self.flag([OUTLYING_FEATURES], subject, None, None)
                pixels, z = pixels[near], z[near]
                labels = None if labels is None else labels[near]
        return Knowledge(
            pixels=pixels,
            z=z,
            edge=query,
            cloud=got.cloud,
            labels=labels,
            observed=z_victim,
            shadow_edge=got.twin,
            random_edge=got.draws,
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
        made = Outcome.of(self.victim, floor.reconstruct(z_victim), box="black")
        self.record("floor", "nearest_image", None, made, own, start,
                    random_edge=known.random_edge)

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
            whose = [subject, attack, None if seed is None else f"seed {seed}"]
            logger.warning("%s: %s", ", ".join(filter(None, whose)), flag.meaning)

    def record(
        self,
        subject: str,
        attack: str,
        seed: int | None,
        made: Outcome,
        own: Owned,
        start: float,
        *,
        random_edge: bool | None = None,
    ) -> None:
        self.result.records.append({
            "subject": subject,
            "attack": attack,
            "attack_seed": seed,
            "box": made.box,
            "attacker_data": own.data,
            "attacker_images": own.count,
            "victim_images": len(self.victim),
            "random_edge": random_edge,
            "uploads": None if subject == "floor" and random_edge is None else self.used,
            **made.numbers,
            **({} if self.regions is None else self.regions.of(made.guess)),
            **made.training(),
            "seconds": time.perf_counter() - start,
        })
        key = "/".join((subject, attack, str(seed)))
        if own is not self.attackers[0]:
            key += f"/{own.data}-{own.count}"
        self.result.per_image[key] = {
            name: values.tolist() for name, values in made.per_image.items()}
        reached = made.numbers["ssim"]
        assert reached is not None
        if subject not in self.best or reached > self.best[subject][0]:
            self.best[subject] = (reached, made.guess)

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
                rows = (pixels[index] * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
                self.result.examples[name] = np.ascontiguousarray(rows.numpy())
        return self.result


def _spread(images: Tensor) -> Tensor:
    """A few of them, from the first to the last."""
    return images[torch.linspace(0, len(images) - 1, min(_ASKED, len(images))).long()]
