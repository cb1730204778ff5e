"""The tables of every attack on the models that matter, from rows that can be read off."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def figures(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("audit_figures")


def row(method: str, attack: str, ssim: float, *, victims: int = 1_000, plateau: bool | None = True,
        **more: Any) -> dict[str, Any]:
    deeper = method.startswith("with-")
    return {
        "dataset": "A set", "method": method, "defence": method[5:] if deeper else None,
        "recipe": {"with-none": "longer", "with-patrol": "longer-whole"}.get(method),
        "strength": 10.0 if method == "with-patrol" else 0.0,
        "split": "layer4" if deeper else "layer3", "accuracy": 0.8, "edge_macs": 9_870_000,
        "feature_bytes": 8_192 if deeper else 16_384, "attack": attack, "attacker_images": 10_000,
        "victim_images": victims, "times_as_long": 1, "plateau": plateau, "began_with": None,
        "first_images": 256, "first_ssim": ssim, "first_ssim_worst5": ssim + 0.2,
        "first_mse": 0.1 - 0.1 * ssim, "floor_ssim": 0.2 if victims == 256 else 0.9,
        "floor_ssim_worst5": 0.4, "floor_mse": 0.07, **more,
    }


ROWS = [
    row("taylor", "rmle", 0.8, victims=256), row("taylor", "linear_inverse", 0.5),
    row("patrol", "unet_ssim", 0.6), row("patrol", "linear_inverse", 0.1),
    row("with-none", "unet_ssim", 0.5), row("with-none", "rmle", 0.3, victims=256),
    row("with-patrol", "unet_ssim", 0.2),
    row("with-patrol", "inverse_network_ssim", 0.25, times_as_long=3, plateau=False),
    row("with-feature_dropout", "unet_ssim", 0.9), row("with-feature_dropout", "rmle", 0.9),
]


def test_the_strongest_attack_on_each_model_is_the_one_compared(figures: ModuleType) -> None:
    text = figures.strongest({"rows": ROWS}, "measured here")
    assert "against the same pruned model trained on as long without attackers: **SSIM 0.250 " \
           "instead of 0.500 (0.50 times)" in text
    assert "against Taylor pruning cut after layer3: **SSIM 0.250 instead of 0.800 (0.31 times)" \
           in text
    assert "8 KiB uploaded instead of 16" in text
    assert "cut after layer3 itself, against Taylor pruning cut after layer3: **SSIM 0.600 " \
           "instead of 0.800" in text
    ours = next(line for line in text.splitlines() if "PATROL, cut deeper" in line)
    assert "3 times as long *" in ours and "| 0.250 |" in ours and ours.endswith("| 2 |")
    assert "Floor, the mean image: SSIM 0.200" in text, "over the images that all attacks met"
    assert "dropout" not in text
    assert text.endswith("measured here") and figures.STILL in text


def test_the_lighter_weight_stands_for_the_shallower_cut(figures: ModuleType) -> None:
    lighter = [row("with-patrol", attack, ssim, split="layer3", recipe=None, accuracy=0.85)
               for attack, ssim in (("unet_ssim", 0.55), ("linear_inverse", 0.2))]
    text = figures.strongest({"rows": ROWS + lighter}, "")
    assert "cut after layer3 itself, against Taylor pruning cut after layer3: **SSIM 0.550 " \
           "instead of 0.800 (0.69 times), +5.0 points of accuracy**" in text
    lines = [line for line in text.splitlines() if "PATROL" in line and line.startswith("|")]
    assert [line.split("|")[7].strip() for line in lines] == ["0.600", "0.550", "0.250"]


def test_weaker_attacks_that_still_got_better_are_named(figures: ModuleType) -> None:
    told = "still improving when they ended: PATROL: linear decoder, closed form."
    assert told not in figures.strongest({"rows": ROWS}, "")
    rows = [{**r, "plateau": False} if (r["method"], r["attack"]) == ("patrol", "linear_inverse")
            else r for r in ROWS]
    assert told in figures.strongest({"rows": rows}, "")
    longer = row("patrol", "linear_inverse", 0.1, times_as_long=3)
    assert told not in figures.strongest({"rows": [*rows, longer]}, "")


def test_every_attack_stands_in_a_row_of_its_own(figures: ModuleType) -> None:
    text = figures.every_attack({"rows": ROWS}, "measured here")
    lines = text.splitlines()
    assert lines[0].startswith("| SSIM under | Taylor pruning, layer3 | PATROL, layer3 |")
    assert [line.split(" | ")[0][2:] for line in lines[2:6]] == [
        "rMLE, white box, warm-started", "U-shaped decoder, MSE + SSIM",
        "linear decoder, closed form", "residual decoder, MSE + SSIM, 3 times as long"]
    assert lines[2].split(" | ")[1] == "0.800" and "0.300" in lines[2]
    assert "0.250 *" in lines[5]


def test_unequal_training_is_told(figures: ModuleType) -> None:
    made = {"train_images": 100, "finetune_epochs": 5, "sweep_epochs": 2, "sweep_images": 50}
    rows = [{**r, "made_with": made} for r in ROWS]
    # 8 epochs of 100 before, and thrice 2 of 50 with the defence, beside 5 of 100.
    assert [figures.tuned_on(r) for r in (rows[0], rows[4], rows[6])] == [500, 1100, 1100]
    text = figures.strongest({"rows": rows}, "here")
    told = "fine-tuned on 1,100 images instead of 500 (2.2 times)"
    assert text.count(told) == 1 and "fine-tuned on, thousand images" in text
    against = next(line for line in text.splitlines() if told in line)
    assert against.startswith("- against Taylor pruning cut after layer3")
    assert told not in figures.strongest({"rows": ROWS}, "here")


def test_a_model_under_one_attack_alone_is_left_out(figures: ModuleType) -> None:
    text = figures.strongest({"rows": [*ROWS[:2], ROWS[2]]}, "here")
    assert "Taylor pruning" in text and "PATROL" not in text
    assert figures.strongest({"rows": ROWS[2:3]}, "here") == "Not measured yet."


def test_rows_of_weaker_attackers_are_not_set_beside_those_of_today(figures: ModuleType) -> None:
    rows = [{**r, "base": "earlier" if r["split"] == "layer4" else "today",
             "dense_accuracy": 0.842 if r["split"] == "layer4" else 0.85} for r in ROWS]
    text = figures.strongest({"rows": rows}, "measured here")
    assert "trained on as long without attackers: **SSIM 0.250" in text
    assert "not beside Taylor pruning cut after layer3" in text and "instead of 16" not in text
    assert "earlier training of the dense model, to 84.2%; the others from one to 85.0%" in text


def test_models_of_the_newest_record_replace_the_frontiers(
    import_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    made = import_benchmark("figures")
    about = {"date": "2026-01-01", "command": "python x --y"}
    records = {"frontier": {**about, "rows": ROWS},
               "strongest": {**about, "date": "2026-02-02",
                             "rows": [row("taylor", "rmle", 0.9, victims=256)]}}
    monkeypatch.setattr(made, "load", records.__getitem__)
    monkeypatch.setattr(made, "RESULTS", tmp_path)
    assert len(made.of_every_attack()[0]["rows"]) == len(ROWS)
    (tmp_path / "strongest.json").touch()
    record, told = made.of_every_attack()
    taylor = [r for r in record["rows"] if r["method"] == "taylor"]
    assert [r["first_ssim"] for r in taylor] == [0.9] and "base" not in taylor[0]
    others = [r for r in record["rows"] if r["method"] != "taylor"]
    assert {r["method"] for r in others} == {"patrol", "with-none", "with-patrol"}
    assert all(r["base"] == "earlier" for r in others)
    assert told.index("2026-02-02") < told.index("Rows with †: measured 2026-01-01")
