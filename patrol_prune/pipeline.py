"""The whole path: images, plan, training, scores, pruning, fine-tuning, audit, report.

Every stage reads what the one before left on disk and leaves its own there, so that a run that was
killed goes on where it was, to the same result.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from patrol_prune import checkpoint
from patrol_prune._block_pruning import STRUCTURES
from patrol_prune.audit import audit
from patrol_prune.audit_report import AuditReport
from patrol_prune.cost import count_params, edge_macs
from patrol_prune.errors import RunDirectoryError
from patrol_prune.finetune import FinetuneConfig, accuracy, finetune, recalibrate_batchnorm
from patrol_prune.importance import PatrolImportance
from patrol_prune.plan import Plan, short
from patrol_prune.preparation import (
    Images,
    budget_of,
    check_own,
    fresh_model,
    held_out_batches,
    images_of,
    incoming_digests,
    incoming_model,
    open_heads,
    planned,
    private_regions,
    read_images,
    refuse_changed,
    rounding,
    sent_bytes,
    training_batches,
    with_dropout,
)
from patrol_prune.pruner import PatrolPruner
from patrol_prune.report import RunSummary
from patrol_prune.run_objectives import fine_tuned, scoring_objective
from patrol_prune.run_summary import AUDITING, audit_notes, kept_attacks, read_summary, write_page
from patrol_prune.rundir import CONFIG, RunDirectory
from patrol_prune.settings import FREE_KEYS, MOVABLE, RunConfig, resolve_device
from patrol_prune.split import Split
from patrol_prune.storage import atomic_write_json, keep_newest
from patrol_prune.training_state import draws_for

logger = logging.getLogger(__name__)

STAGES = ("data", "plan", "model", "prune", "finetune", "audit", "report")
EDGE, EXPORT = "edge.patrol", "export"
DENSE, PRUNED = "checkpoints/dense", "checkpoints/pruned"
TRAINING, FINETUNING, ROUNDING = (f"checkpoints/{n}" for n in ("train", "finetune", "rounded"))
STARTS_FROM = {TRAINING: ("data",), **dict.fromkeys((FINETUNING, ROUNDING), STAGES[:4]),
               **dict.fromkeys((AUDITING, EXPORT), STAGES[:STAGES.index("audit")])}
"""Folders that a stage keeps, or was made of -> the stages whose result they began with."""
Progress = Callable[[str, str], None]
"""Called with a stage's name and a sentence about it."""


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        directory: of the run.
        summary: its numbers.
        audit: what the attackers saw.
        report: path of the page.
    """

    directory: Path
    summary: RunSummary
    audit: AuditReport
    report: Path


def run(
    config: RunConfig,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    bars: bool = False,
    notes: Sequence[str] = (),
) -> RunResult:
    """The whole path, resumed where an earlier call with the same settings stopped.

    Args:
        config: everything the run is told.
        overwrite: start anew if the directory holds another run.
        progress: called with each stage and what happens in it.
        bars: show progress bars while training.
        notes: what the page has to say besides, a sentence each; kept with the audit and its page.

    Raises:
        PatrolError: whatever is wrong with the settings, the images, the model or the directory,
            as a sentence; as far as possible before any training.
    """
    with _opened(config, overwrite, progress, bars) as work:
        work.notes = (notes,) if isinstance(notes, str) else tuple(notes)
        return work.go()


def train_dense(
    config: RunConfig, *, progress: Progress | None = None, bars: bool = False
) -> Path:
    """The stages of `run` up to the dense model, and no further: the path of its weights.

    Runs with other settings after that stage may share them as their `weights`. Raises as `run`.
    """
    with _opened(config, False, progress, bars, free=tuple(MOVABLE)) as work:
        began = work.folder.notes("data") if work.folder.done("data") else {}
        if "weights_sha256" in began and (began["weights_sha256"] is None) != (
            config.weights is None
        ):
            raise RunDirectoryError(
                f"The dense model in {work.folder.path} was begun "
                f"{'without' if config.weights else 'with'} weights to start from, this one is "
                f"{'with' if config.weights else 'without'}. Give the search another --name."
            )
        work.do(STAGES[: STAGES.index("model") + 1])
        return work.folder / DENSE / checkpoint.WEIGHTS


@contextlib.contextmanager
def _opened(
    config: RunConfig, overwrite: bool, progress: Progress | None, bars: bool,
    free: tuple[str, ...] = (),
) -> Iterator[Work]:
    device = resolve_device(config.device)
    path = Path(config.runs) / config.name
    anew = overwrite or not (path / CONFIG).is_file()
    images = read_images(config) if anew else images_of(config, path)
    if anew:  # what cannot be had costs no earlier run, and leaves no folder
        check_own(config, images)
    made = planned(config, images) if anew else None
    defaults = RunConfig(config.data, config.edge_macs).to_dict()
    with RunDirectory(path, config.to_dict(), overwrite=overwrite, defaults=defaults,
                      free_keys=(*FREE_KEYS, *free), noted=MOVABLE) as folder:
        if not anew and not folder.done("model"):
            incoming_model(config, len(images.classes))
        yield Work(config, folder, images, device, progress, bars, made)


class Work:
    """One run; a method for each stage."""

    def __init__(
        self, config: RunConfig, folder: RunDirectory, images: Images, device: torch.device,
        progress: Progress | None, bars: bool, made: Plan | None = None,
    ) -> None:
        self.config, self.folder, self.images, self.device = config, folder, images, device
        self.progress, self.bars, self.made = progress, bars, made
        self.stage = ""
        self.notes: tuple[str, ...] = ()

    def go(self) -> RunResult:
        """Every stage that is not done yet."""
        self.do(STAGES)
        return self.result()

    def attack_again(self) -> RunResult:
        """A new audit and its report alone; the earlier ones count until the new audit is there."""
        for stage in ("audit", "report"):
            self.begin(stage)
        return self.result()

    def result(self) -> RunResult:
        """What the stages left."""
        result = AuditReport.from_json(self.folder / "audit.json")
        return RunResult(
            self.folder.path, read_summary(self.folder.path), result, self.folder / "report.html"
        )

    def do(self, stages: Sequence[str]) -> None:
        """These, in order; the first that is not done makes all later ones due as well.

        What began with what a stage left before, as epoch checkpoints, goes when it is done again:
        a later stage would go on from them, and the model would be a mixture of both.
        """
        for stage in stages:
            if self.folder.done(stage):
                if stage == "data":
                    self.check_incoming()
                continue
            self.folder.forget(STAGES[STAGES.index(stage):])
            for name, sources in STARTS_FROM.items():
                if stage in sources:
                    self.folder.remove(name)
            self.begin(stage)

    def begin(self, stage: str) -> None:
        """Do one stage."""
        self.stage = stage
        self.folder.event("stage begins", stage=stage)
        with draws_for(self.device, self.config.seed, stage):
            getattr(self, f"do_{stage}")()

    def say(self, sentence: str) -> None:
        logger.info("%s: %s", self.stage, sentence)
        if self.progress is not None:
            self.progress(self.stage, sentence)

    def check_incoming(self) -> None:
        """Refuse other images and weights than those that the run began with."""
        refuse_changed(self.config, self.images, self.folder.notes("data"), self.folder.path)
        self.folder.moved(self.config.data)

    def do_data(self) -> None:
        images = self.images
        counts = {
            "defender": len(images.defender), "attacker": len(images.attacker),
            "test": len(images.test), "victims": len(images.victims),
        }
        told = ", ".join(f"{count:,} {who}" for who, count in counts.items())
        self.say(f"{len(images.classes)} classes; images: {told}.")
        self.folder.finish("data", (), **incoming_digests(self.config, images), counts=counts)

    def do_plan(self) -> None:
        self.say("Looking for places to cut.")
        made = self.made or planned(self.config, self.images)
        atomic_write_json(self.folder / "plan.json", made.to_json())
        self.say(made.text)
        self.folder.finish("plan", ["plan.json"], at=made.recommended,
                           budget=budget_of(made), budget_asked=made.budget_edge_macs)

    @property
    def at(self) -> str:
        return str(self.folder.notes("plan")["at"])

    def factory(self) -> torch.nn.Module:
        return fresh_model(self.config, len(self.images.classes))

    def open_heads(self, model: torch.nn.Module) -> tuple[str, ...]:
        """See `preparation.open_heads`."""
        return open_heads(self.config, self.images, model)

    def load(self, name: str) -> Split:
        return checkpoint.load(self.folder / name, self.factory, device=self.device)

    def save(self, split: Split, name: str, **more: Any) -> None:
        split.model.cpu()
        checkpoint.save(split, self.folder / name, normalization=self.images.normalization, **more)

    def measure(self, split: Split, bits: int | None = None) -> dict[str, float]:
        """Cost of the edge, with so many bits a value, and accuracy of the whole on the tests."""
        return {
            "edge_macs": edge_macs(split),
            "edge_params": count_params(split.edge),
            "feature_bytes": sent_bytes(split, bits),
            "accuracy": accuracy(split.model.to(self.device), device=self.device,
                                 batches=held_out_batches(self.config, self.images)),
        }

    def do_model(self) -> None:
        model, to_train = incoming_model(self.config, len(self.images.classes))
        history: list[dict[str, float]] = []
        if to_train and self.config.train.epochs:
            self.say(f"Training {self.config.model} for {self.config.train.epochs} epochs.")
            directory = self.folder / TRAINING
            history = finetune(
                model, training_batches(self.config, self.images, augment=True, offset=1),
                config=self.config.train, checkpoint_dir=directory, resume=True,
                progress=self.bars, device=self.device,
            ).history
            keep_newest(directory)
        split = Split(model.eval(), self.images.example(), at=self.at)
        numbers = self.measure(split)
        self.say(f"Accuracy of the dense model: {100 * numbers['accuracy']:.1f}%.")
        self.save(split, DENSE)
        self.folder.finish("model", [DENSE], history=history, **numbers)

    def do_prune(self) -> None:
        config, notes = self.config, self.folder.notes("plan")
        split = self.load(DENSE)
        if self.open_heads(split.model):
            split.refresh()
        importance = PatrolImportance(
            scoring_objective(config, split, self.images.normalization),
            task_weight=config.score.task_weight, lip_weight=config.score.lip_weight,
            adv_weight=config.score.adv_weight,
            task_change=config.score.task_change, blocks=config.score.structures != "channels",
        )
        pruner = PatrolPruner(
            split.model, split.example_inputs, importance, split=split,
            edge_macs=int(notes["budget"]), boundary=config.boundary,
            feature_channels=config.feature_channels,
            max_pruning_ratio=config.score.max_pruning_ratio,
            min_channels=config.score.min_channels, round_to=config.score.round_to,
            iterative_steps=config.score.steps, structures=config.score.structures,
        )
        kept: dict[str, tuple[int, int]] = {}
        gone: list[str] = []
        for step in range(config.score.steps):
            self.score(importance, step)
            outcome = pruner.step()
            # A group whose first layer went with a block goes on under another name.
            kept = {name: (now, pruner.initial[name]) for name, (now, _) in outcome.kept.items()}
            gone += outcome.removed_blocks
            if config.score.between_epochs and step + 1 < config.score.steps:
                self.repair(split, step)
        recalibrate_batchnorm(
            split.model, training_batches(config, self.images, augment=False, offset=3),
            device=self.device,
        )
        numbers = self.measure(split)
        self.say(
            f"Edge MACs {short(pruner.dense_edge_macs)} -> {short(numbers['edge_macs'])}, accuracy "
            f"before fine-tuning {100 * numbers['accuracy']:.1f}%."
        )
        if gone:
            self.say(f"Residual blocks removed: {', '.join(gone)}.")
        self.save(split, PRUNED)
        self.folder.finish("prune", [PRUNED], kept=kept, removed_blocks=gone,
                           left_whole=outcome.left_whole, **numbers)

    def repair(self, split: Split, step: int) -> None:
        """Fine-tune between two pruning steps."""
        config, epochs = self.config, self.config.score.between_epochs
        self.say(f"Fine-tuning for {epochs} epochs before the next pruning step.")
        self.train(with_dropout(config.privacy, split, config.seed),
                   replace(config.finetune, epochs=epochs), offset=20 + step)

    def score(self, importance: PatrolImportance, step: int) -> None:
        score = self.config.score
        batches = training_batches(self.config, self.images, augment=False, offset=10 + step)
        importance.zero_grad()
        if score.adv_weight and score.surrogate_steps:
            self.say("Training the surrogate attackers.")
            importance.objective.fit_surrogates(batches, score.surrogate_steps)
        self.say(f"Scoring the edge's {STRUCTURES[score.structures]}.")
        for x, y in itertools.islice(batches, score.batches):
            importance.accumulate(x.to(self.device), y.to(self.device))

    def do_finetune(self) -> None:
        config, plain = self.config, self.load(PRUNED)
        split = with_dropout(config.privacy, plain, config.seed)
        self.say(f"Fine-tuning for {config.finetune.epochs} epochs with the privacy terms on.")
        history = self.train(split, config.finetune, FINETUNING, offset=2)
        rounded: list[dict[str, float]] = []
        if config.bits is not None:
            self.say(f"Fine-tuning for {config.rounded.epochs} more, with {config.bits} bits of "
                     "every uploaded value.")
            split = rounding(plain, config.bits, self.images.defender, self.images.normalization)
            split = with_dropout(config.privacy, split, config.seed)
            rounded = self.train(split, config.rounded, ROUNDING, offset=4)
        numbers = self.measure(split, config.bits)
        self.say(f"Accuracy after fine-tuning: {100 * numbers['accuracy']:.1f}%.")
        self.save(split, EDGE, extra={"classes": list(self.images.classes), **numbers,
                                      "dropout": config.privacy.dropout})
        for directory in (FINETUNING, ROUNDING):
            keep_newest(self.folder / directory)
        self.folder.finish("finetune", [EDGE], history=history, history_rounded=rounded, **numbers)

    def train(
        self, split: Split, config: FinetuneConfig, kept: str | None = None, *, offset: int
    ) -> list[dict[str, float]]:
        """Fine-tune with the privacy terms on, resumed from the epochs that are `kept`."""
        return fine_tuned(
            self.config, self.images, split, config, teacher=self.load(DENSE).model, offset=offset,
            kept=None if kept is None else self.folder / kept, bars=self.bars, device=self.device)

    def do_audit(self) -> None:
        config = self.config
        found = audit(
            with_dropout(config.privacy, self.load(EDGE), config.seed),
            self.images.attacker, self.images.victims,
            attacks=config.audit.attacks, seeds=config.audit.seeds,
            normalization=self.images.normalization,
            undefended=self.load(DENSE) if config.audit.undefended else None,
            config=config.attacker, settings={"rmle": config.rmle},
            attacker_labels=self.images.attacker_labels, private=private_regions(config),
            attacker_images=(None, *config.audit.attacker_images),
            check_attacks=config.audit.check_attacks, uploads=config.audit.uploads,
            device=str(self.device), examples=config.audit.examples, progress=self.say,
            kept=kept_attacks(config, self.folder, self.images, str(self.device)),
        )
        self.folder.forget(STAGES[STAGES.index("audit"):])
        found.to_json(self.folder / "audit.json")
        self.finish_audit()

    def finish_audit(self) -> None:
        """Record the audit with what a page on it has to say, whoever makes that page."""
        self.folder.finish("audit", ["audit.json", "audit_examples"], **audit_notes(
            self.config, device=str(self.device), notes=[*self.notes, *self.images.notes]))

    def do_report(self) -> None:
        if not self.folder.notes("audit"):  # an earlier release kept nothing with it
            self.finish_audit()
        self.say(f"The report is {write_page(self.config, self.folder, self.notes)}.")
        self.folder.remove(AUDITING)
