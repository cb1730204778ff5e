"""Attacks of an audit that had finished before it was interrupted."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patrol_prune.attacks import Attack, Knowledge
from patrol_prune.audit_choice import Factory, Owned
from patrol_prune.audit_run import AuditRun
from patrol_prune.errors import CheckpointError
from patrol_prune.storage import discard, load_state, save_state, to_json
from patrol_prune.warm_start import WarmStarts

logger = logging.getLogger("patrol_prune.audit")

_OURS = re.compile("[0-9a-f]{16}")


class KeptAttacks:
    """A folder for what each attack came to: a later audit of the same takes it from there.

    Args:
        folder: made with the first attack that ends.
        same: everything that the outcome hangs on, as JSON. What was kept under something else is
            not used, and thrown away when there is something new to keep.
    """

    def __init__(self, folder: Path, same: Mapping[str, Any]) -> None:
        self.folder = folder
        self.place = folder / hashlib.sha256(to_json(same, folder).encode()).hexdigest()[:16]

    def get(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept by this name; None where nothing was, or it was harmed since."""
        path = self.place / name
        if not path.is_dir():
            return None
        try:
            return load_state(path)
        except CheckpointError as error:
            logger.warning("%s The attack is made again.", error)
            return None

    def put(self, name: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Keep it, whole or not at all."""
        for other in self.folder.iterdir() if self.folder.is_dir() else ():
            if other != self.place and other.is_dir() and _OURS.fullmatch(other.name):
                discard(other)
        save_state(self.place / name, tensors, content)


class KeptAudit(AuditRun):
    """An audit that keeps each of its attacks by name once it has ended, and makes none again.

    A learned one is trained again where another attack that is still to come may start at its
    answer; it comes to the same.
    """

    def __init__(self, *arguments: Any, kept: KeptAttacks, examples: int) -> None:
        super().__init__(*arguments)
        self.kept, self.examples = kept, examples
        self.made: list[Factory] = []

    def subject(
        self, subject: str, edge: nn.Module, cloud: nn.Module | None, made: list[Factory]
    ) -> None:
        """See `AuditRun.subject`."""
        self.made = made
        super().subject(subject, edge, cloud, made)

    def attack(
        self, subject: str, factory: Factory, seed: int, warm: WarmStarts, known: Knowledge,
        z_victim: Tensor, own: Owned,
    ) -> Attack | None:
        """See `AuditRun.attack`; None of an attack that is not made again."""
        name = _name(subject, factory, seed, own)
        found = None if self.is_start(subject, factory, own) else self.kept.get(name)
        if found is not None and len(found[0]["shown"]) == len(self.index):
            self.say(f"{factory.name} had ended before: its outcome is taken.")
            self.take(subject, *found)
            return None
        flags = len(self.result.flags)
        before, rows = self.best.pop(subject, None), set(self.result.per_image)
        attack = super().attack(subject, factory, seed, warm, known, z_victim, own)
        made = self.best.get(subject)
        if before is not None and (made is None or made[0] <= before[0]):
            self.best[subject] = before
        if factory.box is None or made is None:
            return attack  # nobody knows what one's own hangs on; one that broke off may not again
        shown = {"shown": (made[1][self.index] * 255).round().to(torch.uint8)}
        self.kept.put(name, shown, {
            "record": self.result.records[-1], "flags": self.result.flags[flags:],
            "per_image": {k: v for k, v in self.result.per_image.items() if k not in rows},
        })
        return attack

    def is_start(self, subject: str, factory: Factory, own: Owned) -> bool:
        """Whether an attack that is still to come may start at the answer of this one."""
        return factory.learned and any(
            self.kept.get(_name(subject, later, seed, own)) is None
            for later in self.made if later.warm_starts for seed in later.seeds
        )

    @property
    def index(self) -> Tensor:
        """Which images are shown, as `AuditRun.report` has it."""
        count = min(self.examples, len(self.victim))
        return torch.linspace(0, len(self.victim) - 1, count).round().long()

    def take(self, subject: str, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
        """As if the attack had been made."""
        self.result.records.append(content["record"])
        self.result.flags += content["flags"]
        self.result.per_image.update(content["per_image"])
        reached = float(content["record"]["ssim"])
        if subject not in self.best or reached > self.best[subject][0]:
            guess = torch.zeros_like(self.victim)
            guess[self.index] = tensors["shown"].float() / 255.0
            self.best[subject] = reached, guess


def _name(subject: str, factory: Factory, seed: int, own: Owned) -> str:
    said = re.sub(r"[^A-Za-z0-9_]", "_", factory.name)[:60]
    if said != factory.name:  # it has to be a file's name, and no two the same
        said += "-" + hashlib.sha256(factory.name.encode()).hexdigest()[:8]
    return f"{subject}-{said}-{seed}-{own.data}-{own.count}"
