"""What an audit refuses or leaves out because an attacker lacks it, before hours of work."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from threading import Lock
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from patrol_prune.attacks import (
    FitRecord,
    InverseNetworkConfig,
    Knowledge,
    QueryFree,
    QueryFreeConfig,
)
from patrol_prune.attacks.base import some_of
from patrol_prune.attacks.checks import smooth_images
from patrol_prune.audit import audit
from patrol_prune.errors import InputError
from patrol_prune.metrics import mse

IMAGES = smooth_images(100, (3, 16, 16), seed=9)
KNOWN, VICTIM = IMAGES[:80], IMAGES[80:]
LABELS = torch.arange(80) % 3
SHADOW = QueryFreeConfig(epochs=1, reconstruct=("linear",))


def split() -> SimpleNamespace:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        edge = nn.Sequential(nn.Conv2d(3, 6, 2, stride=2), nn.ReLU())
        return SimpleNamespace(edge=edge, cloud=nn.Sequential(nn.Flatten(), nn.Linear(384, 3)))


class Untouched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the edge ran")


class Guess:
    """Takes a seed, as a class may that is given in place of a function."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, known: Knowledge) -> None:
        self.mean = known.pixels.mean(0)

    def reconstruct(self, z: Tensor) -> Tensor:
        return self.mean.expand(len(z), -1, -1, -1)


def test_shifted_images_have_no_labels_and_the_attacks_through_the_cloud_are_left_out() -> None:
    said: list[str] = []
    found = audit(
        split(), KNOWN, VICTIM, attacks=("query_free_same", "linear_inverse"), examples=0,
        settings={"query_free_same": SHADOW}, attacker_labels=LABELS, shifted_data=1 - KNOWN,
        progress=said.append,
    )
    rows = [(r["attack"], r["attacker_data"]) for r in found.records if r["subject"] == "edge"]
    assert rows == [
        ("query_free_same", "same"), ("linear_inverse", "same"), ("linear_inverse", "shifted")
    ]
    assert any("Leaving query_free_same out" in sentence for sentence in said)


@pytest.mark.parametrize("holdout", [0.1, 0.5])
def test_attacks_without_queries_run_with_as_few_images_as_they_ask_for(holdout: float) -> None:
    """Of which 20 are learnt from."""
    short = replace(SHADOW, holdout=holdout, reconstruct=("linear", "decoder"),
                    decoder=InverseNetworkConfig(width=4, depth=0, epochs=1, max_extensions=0))
    found = audit(split(), KNOWN, VICTIM, attacks=("query_free_same",), attacker_labels=LABELS,
                  settings={"query_free_same": short}, attacker_images=(22,), examples=0)
    assert found.records[-1]["attacker_images"] == 22


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacker_images": (None, 19), "attacks": ("linear_inverse",)}, "at least 20 .* 19"),
        ({"attacker_images": (1,), "attacks": ("rmle",)}, "at least 2 images, came 1"),
        ({"shifted_data": 1 - KNOWN[:5]}, r"came 5 \(shifted\)"),
        ({"attacker_images": (21,), "attacks": ("query_free_same",)}, "at least 22 .* 21"),
        (
            {"undefended": SimpleNamespace(edge=Untouched()), "attacks": ("query_free_same",)},
            "needs the other half",
        ),
        (
            {"undefended": SimpleNamespace(edge=Untouched(), cloud=nn.Identity()),
             "attacks": ("query_free_same",)},
            "needs an edge whose weights can be trained anew",
        ),
    ],
)
def test_what_one_attacker_lacks_is_refused_before_any_work(
    change: dict[str, object], message: str
) -> None:
    half = SimpleNamespace(edge=nn.Conv2d(3, 3, 1), cloud=nn.Identity())
    with pytest.raises(InputError, match=message):
        audit(half, KNOWN, VICTIM, attacker_labels=LABELS, **change)  # type: ignore[arg-type]


def test_both_floors_stand_below_an_attacker_with_a_part_of_the_images() -> None:
    found = audit(split(), KNOWN, VICTIM, attacks=(Guess(0),), attacker_images=(30, 20))
    floors = [(r["attack"], r["attacker_images"]) for r in found.records
              if r["subject"] == "floor"]
    assert floors == [("mean_image", 30), ("nearest_image", 30)]
    picked = some_of(80, 30)
    assert picked is not None and set(picked.tolist()) != set(range(30))
    mean = KNOWN[picked].mean(0).expand_as(VICTIM)
    assert found.records[0]["mse"] == pytest.approx(float(mse(VICTIM, mean).mean()))


def test_a_class_is_made_for_each_seed() -> None:
    found = audit(split(), KNOWN, VICTIM, attacks=(Guess,), seeds=(3, 4), examples=0)
    assert [r["attack_seed"] for r in found.records if r["attack"] == "Guess"] == [3, 4]


class Adds(Guess):
    """Answers with a level that rises with each fit."""

    level = 0.0

    def fit(self, known: Knowledge) -> None:
        super().fit(known)
        self.level += 0.1

    def reconstruct(self, z: Tensor) -> Tensor:
        return torch.full((len(z), 3, 16, 16), self.level)


def test_an_attack_that_a_function_hands_back_again_begins_afresh_each_time() -> None:
    """Whether one for all seeds, or one for each that is kept."""
    one, kept = Adds(0), {0: Adds(0), 1: Adds(1)}
    found = audit(
        split(), KNOWN, VICTIM, seeds=(0, 1), attacker_images=(None, 30), check_attacks=True,
        examples=0, attacks={"one": lambda seed: one, "kept": lambda seed: kept[seed], "new": Adds},
    )
    errors = [r["mse"] for r in found.records if r["subject"] == "edge"]
    assert len(errors) == 12 and len(set(errors)) == 1
    assert one.level == kept[0].level == kept[1].level == 0.0


class Locked(Adds):
    """Cannot be copied until it is fitted."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.lock: object = Lock()

    def fit(self, known: Knowledge) -> None:
        super().fit(known)
        self.lock = None


def test_one_that_is_handed_back_again_and_cannot_be_copied_is_fitted_once() -> None:
    one, kept = Locked(0), {0: Locked(0), 1: Locked(1)}
    found = audit(
        split(), KNOWN, VICTIM, examples=0, seeds=(0, 1),
        attacks={"one": lambda seed: one, "kept": lambda seed: kept[seed], "new": Adds})
    rows = [r for r in found.records if r["subject"] == "edge"]
    assert [(r["attack"], r["attack_seed"]) for r in rows] == [
        ("one", 0), ("kept", 0), ("kept", 1), ("new", 0), ("new", 1)]
    assert len({r["mse"] for r in rows}) == 1
    told = [(f["attack_seed"], f["meaning"]) for f in found.flags if f["attack"] == "one"]
    assert any(seed == 1 and "Make it inside the function" in meaning for seed, meaning in told)
    assert one.level == kept[0].level == kept[1].level == 0.1


def test_an_instance_without_queries_needs_not_invert_trivial_edges() -> None:
    attack = QueryFree(SHADOW)
    found = audit(
        split(), KNOWN, VICTIM, attacks=(attack,), attacker_labels=LABELS, check_attacks=True,
        examples=0,
    )
    assert found.records[-1]["box"] == "none"


def test_a_gradient_that_is_not_finite_is_flagged_and_can_be_written_down() -> None:
    class Broken(Guess):
        def fit(self, known: Knowledge) -> FitRecord:  # type: ignore[override]
            super().fit(known)
            return FitRecord((math.inf,), (1.0,), 1.0, 1.0, 0, True, 0, 0.0, math.nan)

    found = audit(split(), KNOWN, VICTIM, attacks=(Broken(0),), examples=0)
    assert {"no_gradient", "loss_did_not_fall"} <= {flag["name"] for flag in found.flags}
    row = json.loads(found.to_json())["records"][-1]
    assert row["gradient_norm"] is None and row["held_out_loss"] is None


def test_features_that_are_not_finite_are_refused_before_any_attack() -> None:
    broken = split()
    nn.init.constant_(broken.edge[0].weight, math.nan)
    with pytest.raises(InputError, match="NaN or infinity of the edge"):
        audit(broken, KNOWN, VICTIM, attacks=("linear_inverse",))
