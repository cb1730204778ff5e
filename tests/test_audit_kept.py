"""An audit that was interrupted goes on where it was, to the same report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_audit import Oracle
from torch import nn

from patrol_prune.attacks.checks import smooth_images
from patrol_prune.attacks.rmle import RMLEConfig
from patrol_prune.audit import audit
from patrol_prune.audit_kept import KeptAttacks, _name
from patrol_prune.audit_report import AuditReport
from patrol_prune.defences.dropout import Dropper

IMAGES = smooth_images(60, (3, 12, 12), seed=9)
KNOWN, VICTIM = IMAGES[:50], IMAGES[50:]
ATTACKS = ("linear_inverse", "rmle")


def edge(drop: float) -> SimpleNamespace:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SimpleNamespace(edge=nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), Dropper(drop, seed=1)))


def attacked(kept: KeptAttacks | None, stop: str | None = None, **more: Any
             ) -> tuple[AuditReport, list[str]]:
    """The report and what was told; interrupted where `stop` is about to be told."""
    told: list[str] = []

    def progress(sentence: str) -> None:
        told.append(sentence)
        if stop is not None and stop in sentence:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    report = audit(edge(0.3), KNOWN, VICTIM, undefended=edge(0.0), examples=3, **{
        "attacks": ATTACKS, "seeds": (0, 1), "progress": progress, "kept": kept,
        "settings": {"rmle": RMLEConfig(steps=1, tuning_images=1, tuning_steps=1, refine=False)},
        **more})
    return report, told


def content(report: AuditReport) -> dict[str, Any]:
    whole = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    whole["records"] = [{k: v for k, v in r.items() if k != "seconds"} for r in report.records]
    whole["examples"] = {k: v.tolist() for k, v in report.examples.items()}
    return whole


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    return content(attacked(None)[0])


@pytest.mark.parametrize(("stop", "taken"), [
    # with rmle to come, what it may start at is trained again
    ("Attacking the edge with rmle, seed 1", ["rmle"]),
    ("Attacking the undefended with linear", ["linear_inverse", "linear_inverse", "rmle", "rmle"]),
])
def test_what_had_ended_is_taken_and_the_rest_is_as_it_would_have_been(
    uninterrupted: dict[str, Any], tmp_path: Path, stop: str, taken: list[str]
) -> None:
    kept = KeptAttacks(tmp_path / "kept", {"edge": "a"})
    with pytest.raises(KeyboardInterrupt):
        attacked(kept, stop)
    report, told = attacked(KeptAttacks(tmp_path / "kept", {"edge": "a"}))
    assert [s.split()[0] for s in told if "had ended before" in s] == taken
    assert content(report) == uninterrupted


def test_what_was_kept_of_another_audit_or_was_harmed_is_not_taken(tmp_path: Path) -> None:
    few: dict[str, Any] = {"attacks": {"linear_inverse": "linear_inverse", "own": Oracle()},
                           "seeds": (0,)}
    few["attacks"]["own"].reconstruct = lambda z: VICTIM.clone()
    first = KeptAttacks(tmp_path / "kept", {"edge": "a"})
    before, _ = attacked(first, **few)
    names = sorted(p.name for p in first.place.iterdir())
    assert names == ["edge-linear_inverse-0-same-50", "undefended-linear_inverse-0-same-50"]
    (first.place / names[0] / "meta.json").write_text("{}")
    _, told = attacked(first, **few)
    assert sum("had ended before" in s for s in told) == 1
    other = KeptAttacks(tmp_path / "kept", {"edge": "b"})
    assert other.get(names[1]) is None and first.get(names[1]) is not None
    after, told = attacked(other, **few)
    assert not any("had ended before" in s for s in told)
    assert content(after) == content(before)
    assert first.get(names[1]) is None  # thrown away


def test_only_folders_of_its_own_are_thrown_away_and_names_are_no_paths(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "note.txt").write_text("mine")
    kept = KeptAttacks(tmp_path, {"a": 1})
    kept.put("first", {}, {})
    again = KeptAttacks(tmp_path, {"a": 2})
    again.put("first", {}, {})
    assert {p.name for p in tmp_path.iterdir()} == {"thesis", "note.txt", again.place.name}
    factory = SimpleNamespace(name="x/../../y")
    assert "/" not in _name("edge", factory, 0, SimpleNamespace(data="same", count=3))
