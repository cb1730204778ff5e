"""The stages of a comparison; each leaves its outcome in the run's folder, and is done once."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from beginning import model_of, planned
from finder import notes as private_notes
from finder import regions
from leak_checks import LeakChecks, row_name
from page import write_page
from pictures import Everybody, Pictures, everybody
from plates import notes as plate_notes
from plates import training_batches
from pruning import notes as channel_notes
from pruning import pruned
from rounding import notes as rounding_notes
from settings import ReidRun
from torch import Tensor, nn

import patrol_prune as pp
from patrol_prune.access import Repeated, compute_features
from patrol_prune.audit_report import AuditReport
from patrol_prune.errors import RunDirectoryError
from patrol_prune.preparation import (
    dropout_notes,
    refuse_changed_weights,
    rounding,
    sent_bytes,
    with_dropout,
)
from patrol_prune.run_summary import versions
from patrol_prune.rundir import RunDirectory
from patrol_prune.settings import resolve_device
from patrol_prune.storage import atomic_write_json, sha256_of
from patrol_prune.training_state import draws_for

logger = logging.getLogger("vehicle_reid")

DENSE, TAYLOR, PATROL = "dense", "taylor", "patrol"
OPTIMISING = ("rmle", "image_prior")
RESULT, PAGE = "result.json", "index.html"
OUTPUTS = (RESULT, PAGE, "audits")
_CHUNK = 200


def methods(config: ReidRun) -> tuple[str, ...]:
    """What is compared."""
    return (DENSE, TAYLOR, PATROL) if config.compare else (DENSE, PATROL)


class Work:
    """One comparison; `go` does every stage that is not done yet."""

    def __init__(
        self, config: ReidRun, folder: RunDirectory, progress: Callable[[str, str], None],
        people: Everybody | None = None, made: pp.Plan | None = None,
    ) -> None:
        self.config, self.folder, self.progress, self.made = config, folder, progress, made
        self.device = resolve_device(config.device)
        self.stage = "data"
        if people is None:
            self.say("Reading the pictures.")
            people = everybody(config)
        self.people: Everybody = people
        self._checks: LeakChecks | None = None
        self._private: pp.PrivateRegions | None = None

    def go(self) -> dict[str, Any]:
        """The result, as it stands in `result.json`."""
        stages: list[tuple[str, Callable[[], None]]] = [
            ("data", self.do_data), ("plan", self.do_plan), (DENSE, self.do_dense)
        ]
        for method in methods(self.config)[1:]:
            stages.append((method, lambda method=method: self.do_pruned(method)))
        for method in methods(self.config):
            stages.append((f"audit {method}", lambda method=method: self.do_audit(method)))
        stages.append(("result", self.do_result))
        for number, (stage, do) in enumerate(stages):
            self.stage = stage
            if self.folder.done(stage):
                if stage == "data":
                    self.check_incoming()
                continue
            self.folder.forget(name for name, _ in stages[number:])
            for later, _ in stages[number + 1:]:  # they began with what this stage left before
                for training in (later, f"{later}-rounded"):
                    self.folder.remove(f"checkpoints/{training}-epochs")
            self.folder.event("stage begins", stage=stage)
            with draws_for(self.device, self.config.seed, stage):
                do()
        return self.result()

    def say(self, sentence: str) -> None:
        logger.info("%s: %s", self.stage, sentence)
        self.progress(self.stage, sentence)

    def check_incoming(self) -> None:
        """Refuse other pictures and weights than the run began with.

        Weights may be gone: only the training of the dense model misses them.
        """
        noted, labels = self.folder.notes("data"), self.people.labels_digest
        if noted["digest"] != self.people.digest or noted.get("labels_digest", labels) != labels:
            raise RunDirectoryError(
                f"The pictures in {self.config.data} are not those that the run in "
                f"{self.folder.path} began with. Give the run another --name, or --overwrite it.")
        weights = self.config.weights
        if weights is not None and Path(weights).is_file():
            refuse_changed_weights(weights, noted, self.folder.path)

    def do_data(self) -> None:
        people = self.people
        counts = {
            "defender": len(people.defender), "identities": len(people.defender.classes),
            "inverter": len(people.inverter), "reader": len(people.reader),
            "query": len(people.query), "gallery": len(people.gallery),
            "test_identities": len(people.query.identities.unique()),
            "cameras": len(people.gallery.cameras.unique()), "victims": len(people.victims),
        }
        self.say("; ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in counts.items()) + ".")
        for note in people.notes:
            self.say(note)
        weights = None if self.config.weights is None else sha256_of(self.config.weights)
        self.folder.finish(
            "data", digest=people.digest, labels_digest=people.labels_digest, counts=counts,
            layout=people.layout, closed=people.closed, weights_sha256=weights)

    def do_plan(self) -> None:
        made = planned(self.config, self.people) if self.made is None else self.made
        atomic_write_json(self.folder / "plan.json", made.to_json())
        self.say("\n".join([made.text, *channel_notes(self.config)]))
        dense = made[made.recommended].edge_macs
        self.folder.finish("plan", ["plan.json"], at=made.recommended, dense_edge_macs=dense,
                           budget=min(made.budget_edge_macs, dense))

    def factory(self) -> nn.Module:
        """The model, for a file that has all of its weights."""
        return model_of(replace(self.config, weights=None), self.people)

    def load(self, method: str) -> pp.Split:
        return pp.load(self.folder / "checkpoints" / method, self.factory, device=self.device)

    def save(self, split: pp.Split, name: str, **more: Any) -> str:
        split.model.cpu().eval()
        where = f"checkpoints/{name}"
        pp.save(split, self.folder / where, normalization=self.people.normalization, **more)
        return where

    def finished(self, method: str) -> pp.Split:
        """The finished split as it uploads; one that an earlier release saved is refused."""
        split, dropout = self.load(method), self.config.privacy.dropout * (method == PATROL)
        if split.defence is None and (dropout or (self.config.bits and method != DENSE)):
            raise RunDirectoryError(
                f"Expected in {self.folder.path} a model of {method} that rounds or drops what it "
                "uploads, came an earlier release's. Start the run anew with --overwrite.")
        return split

    def dropping(self, split: pp.Split, method: str) -> pp.Split:
        """PATROL's with `privacy.dropout` behind its edge; it shares the layers."""
        return split if method != PATROL else with_dropout(
            self.config.privacy, split, self.config.seed)

    def batches(self, offset: int, *, augment: bool = True) -> pp.PKBatches:
        swapped = self.config.swap_plates and self.stage != DENSE
        return training_batches(self.config, self.people, offset, augment=augment, swapped=swapped)

    @property
    def private(self) -> pp.PrivateRegions | None:
        """Where the plates are; learnt once, and kept."""
        if self._private is None and self.config.private_plates:
            file = self.folder.path / "checkpoints" / "finder.safetensors"
            if not file.is_file():
                self.say("Learning where plates are.")
            self._private = regions(self.config, self.people.defender.images, self.people.truth,
                                    file, self.device)
        return self._private

    def loss(self, model: nn.Module) -> pp.ReidLoss:
        batch = self.config.batch
        return pp.ReidLoss(model, smoothing=batch.smoothing, margin=batch.margin,
                           triplet_weight=batch.triplet_weight)

    def inputs(self, pixels: Tensor) -> Iterator[Tensor]:
        for part in pixels.split(_CHUNK):
            some = part.float() / 255.0 if part.dtype == torch.uint8 else part
            yield self.people.normalization.to_input(some)

    def embed(self, split: pp.Split, pixels: Tensor) -> Tensor:
        """Embeddings of pictures, uint8 or on [0, 1]."""
        return pp.embed(split.model, self.inputs(pixels), device=self.device)

    def measure(self, split: pp.Split) -> dict[str, Any]:
        """Cost of the edge, and how well the model finds the test vehicles again."""
        people = self.people
        split.model.to(self.device)
        found = pp.retrieval(
            self.embed(split, people.query.images), self.embed(split, people.gallery.images),
            people.query.identities, people.gallery.identities,
            people.query.cameras, people.gallery.cameras, junk=people.junk,
        )
        return {
            "edge_macs": pp.edge_macs(split), "edge_params": pp.count_params(split.edge),
            "feature_bytes": pp.feature_bytes(split.feature_shape), "retrieval": asdict(found),
        }

    def rounded(
        self, split: pp.Split, method: str, bits: int, **terms: Any
    ) -> tuple[pp.Split, dict[str, Any]]:
        """The split whose uploads are rounded to `bits`, trained so; what is to be noted of it."""
        before = self.measure(split)["retrieval"]["map"]
        whole = rounding(split, bits, self.people.defender, self.people.normalization)
        sending = self.dropping(whole, method)
        self.say(f"mAP {100 * before:.1f}%. Fine-tuning for {self.config.rounded.epochs} more "
                 f"epochs with {bits} bits of every uploaded value.")
        history = self.train(sending, self.config.rounded, f"{method}-rounded", offset=4, **terms)
        numbers = {**self.measure(sending), "feature_bytes": sent_bytes(sending, bits)}
        return sending, {**numbers, "map_before_rounding": before, "history_rounded": history}

    def train(
        self, split: pp.Split, config: pp.FinetuneConfig, name: str, *, beta: float = 0.0,
        alpha: float = 0.0, teacher: nn.Module | None = None, offset: int = 1,
    ) -> list[dict[str, float]]:
        privacy = self.config.privacy
        with self.loss(split.model) as loss:
            objective = pp.PatrolObjective(
                split, loss, alpha=alpha, beta=beta, noise_std=privacy.noise_std,
                lipschitz_form=privacy.lipschitz_form, surrogates=privacy.surrogates,
                surrogate_loss=privacy.surrogate_loss, private=self.private if beta else None,
                normalization=self.people.normalization, precision=config.precision,
                adversarial_images=self.config.batch.adversarial_images,
                seed=self.config.seed + 1,
            )
            return pp.finetune(
                split, self.batches(offset), objective=objective, config=config, teacher=teacher,
                checkpoint_dir=self.folder / "checkpoints" / f"{name}-epochs", resume=True,
                progress=False, device=self.device,
            ).history

    def do_dense(self) -> None:
        model = model_of(self.config, self.people)
        split = pp.Split(model, self.people.example(), at=str(self.folder.notes("plan")["at"]))
        self.say(f"Training {self.config.model} for {self.config.train.epochs} epochs.")
        history = self.train(split, self.config.train, DENSE)
        numbers = self.measure(split)
        self.say(f"Dense model: {_told(numbers)}.")
        self.folder.finish(DENSE, [self.save(split, DENSE)], history=history, **numbers)

    def do_pruned(self, method: str) -> None:
        config = self.config
        split, teacher = self.load(DENSE), self.load(DENSE).model
        self.say("Scoring the edge's channels.")
        kept, pruning = pruned(config, split, int(self.folder.notes("plan")["budget"]),
                               self.taylor if method == TAYLOR else self.patrol)
        pp.recalibrate_batchnorm(split.model, self.batches(3, augment=False), device=self.device)
        before = self.measure(split)["retrieval"]["map"]
        self.say(f"Pruned; mAP before fine-tuning {100 * before:.1f}%. Fine-tuning for "
                 f"{config.finetune.epochs} epochs.")
        on = method == PATROL
        sending = split if config.bits is not None else self.dropping(split, method)
        terms: dict[str, Any] = {"beta": config.privacy.beta * on,
                                 "alpha": config.privacy.alpha * on, "teacher": teacher}
        history = self.train(sending, config.finetune, method, offset=2, **terms)
        if config.bits is None:
            numbers = self.measure(sending)
        else:
            sending, numbers = self.rounded(split, method, config.bits, **terms)
        self.say(f"{method}: {_told(numbers)}.")
        self.folder.finish(method, [self.save(sending, method, history=pruning)], history=history,
                           kept=kept, map_before_finetuning=before, **numbers)

    def taylor(self, split: pp.Split) -> Any:
        """Torch-Pruning's Taylor importance, with gradients of the task loss."""
        split.model.eval()
        split.model.zero_grad(set_to_none=True)  # scores of before it was narrowed are in there
        with self.loss(split.model) as loss:
            for x, y in self.scoring_batches():
                loss(split.model(x.to(self.device)), y.to(self.device)).backward()
        return tp.importance.GroupTaylorImportance()

    def patrol(self, split: pp.Split) -> pp.PatrolImportance:
        score, privacy = self.config.score, self.config.privacy
        with self.loss(split.model) as loss:
            objective = pp.PatrolObjective(
                split, loss, alpha=(privacy.alpha or 1.0) if score.lip_weight else 0.0,
                beta=(privacy.beta or 1.0) if score.adv_weight else 0.0,
                noise_std=privacy.noise_std, lipschitz_form=privacy.lipschitz_form,
                surrogates=privacy.surrogates, surrogate_loss=privacy.surrogate_loss,
                private=self.private, normalization=self.people.normalization,
                seed=self.config.seed,
            )
            if score.adv_weight and score.surrogate_steps:
                objective.fit_surrogates(self.batches(10, augment=False), score.surrogate_steps)
            importance = pp.PatrolImportance(
                objective, task_weight=score.task_weight, lip_weight=score.lip_weight,
                adv_weight=score.adv_weight,
            )
            for x, y in self.scoring_batches():
                importance.accumulate(x.to(self.device), y.to(self.device))
        return importance

    def scoring_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """So many as the settings say, over several epochs where one is too short."""
        batches = self.batches(11, augment=False)
        epochs = range(-(-self.config.score.batches // len(batches)))
        every = itertools.chain.from_iterable(iter(batches) for _ in epochs)
        return itertools.islice(every, self.config.score.batches)

    @property
    def checks(self) -> LeakChecks:
        """What the attacker reads out of pictures; trained once on his own."""
        if self._checks is None:
            self.say("The attacker learns to read his own pictures.")
            split, people = self.load(DENSE), self.people
            self._checks = LeakChecks(
                people, self.attacker_pictures, seed=self.config.seed, device=str(self.device),
                embed=lambda pixels: self.embed(split, pixels),
            )
        return self._checks

    def do_audit(self, method: str) -> None:
        config, people = self.config, self.people
        victims = people.query.subset(people.victims)
        rebuilt: dict[str, tuple[Tensor, Tensor | None]] = {}
        split = self.finished(method)
        seen = split.edge
        if method == PATROL and config.privacy.dropout and config.attackers.uploads > 1:
            seen = Repeated(seen, config.attackers.uploads)
        known = self.attacker_pictures

        def edge(pixels: Tensor) -> Tensor:
            some = pixels.float() / 255.0 if pixels.dtype == torch.uint8 else pixels
            return compute_features(seen, some, people.normalization)

        def observer(subject: str, name: str, attack: Any, guess: Tensor) -> None:
            theirs = None
            if name not in OPTIMISING and known.truth is not None:  # who reads plates
                with torch.no_grad():
                    theirs = torch.cat([attack.reconstruct(edge(part)).detach().cpu()
                                        for part in known.images.split(_CHUNK)])
            seeds = config.attackers.seeds
            seed = attack.config.seed if getattr(attack.config, "seed", None) in seeds else seeds[0]
            rebuilt[row_name(name, seed, seeds)] = guess, theirs

        report = pp.audit(
            split, people.inverter.pixels(), victims.pixels(),
            attacks=config.attackers.attacks, private=self.private,
            seeds=config.attackers.seeds, normalization=people.normalization,
            config=config.attacker, settings={"rmle": config.rmle}, device=str(self.device),
            uploads=config.attackers.uploads, examples=len(victims), progress=self.say,
            observer=observer,
        )
        report.to_json(self.folder / "audits" / f"{method}.json")
        self.say("Reading plates, scenes and vehicles out of uploads and what was rebuilt.")
        leaks = self.checks.of(victims, rebuilt, edge)
        self.folder.finish(
            f"audit {method}", [f"audits/{method}.json", f"audits/{method}_examples"],
            strongest=dict(report.strongest("edge")), floor=dict(report.strongest("floor")),
            records=report.records, flags=sorted({str(f["name"]) for f in report.flags}),
            leaks=leaks,
        )

    @property
    def attacker_pictures(self) -> Pictures:
        """Those that readers learn from: first what no inversion attack saw, then the others."""
        return self.people.reader.and_then(self.people.inverter)

    def do_result(self) -> None:
        result = {
            "settings": asdict(self.config), "versions": versions(), "device": str(self.device),
            "data": {**self.folder.notes("data"), "copies": self.people.copies},
            "plan": self.folder.notes("plan"),
            "methods": {
                method: {**self.folder.notes(method), "audit": self.folder.notes(f"audit {method}")}
                for method in methods(self.config)
            },
            "notes": [*self.people.notes, *plate_notes(self.config.swap_plates),
                      *channel_notes(self.config), *rounding_notes(self.config),
                      *private_notes(self.config),
                      *(f"PATROL: {note}" for note in dropout_notes(
                          self.config.privacy, self.config.attackers.uploads))],
            "originals": self.checks.of_originals(self.people.query.subset(self.people.victims)),
        }
        atomic_write_json(self.folder / RESULT, _finite(result))
        audits = {m: AuditReport.from_json(self.folder / "audits" / f"{m}.json")
                  for m in methods(self.config)}
        victims = self.people.query.subset(self.people.victims)
        write_page(_finite(result), audits, victims, self.folder.path / PAGE)
        self.say(f"The page is {self.folder.path / PAGE}.")
        self.folder.finish("result", [RESULT, PAGE])

    def result(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(Path(self.folder / RESULT).read_text("utf-8"))
        return content


def _told(numbers: dict[str, Any]) -> str:
    found = numbers["retrieval"]
    return f"mAP {100 * found['map']:.1f}%, rank 1 {100 * found['rank1']:.1f}%"


def _finite(value: Any) -> Any:
    """NaN and infinities as None, tuples as lists: what JSON has words for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(v) for v in value]
    return value
