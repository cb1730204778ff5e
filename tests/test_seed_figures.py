"""The table of training seeds: means that can be done by hand, and directories that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def modules(import_benchmark: Callable[[str], ModuleType]) -> tuple[ModuleType, ModuleType]:
    return import_benchmark("seeds"), import_benchmark("seed_figures")


def row(defence: str, seed: int, ssim: float, accuracy: float, times: int = 1) -> dict[str, Any]:
    return {
        "method": f"with-{defence}", "defence": defence, "strength": 10.0, "train_seed": seed,
        "recipe": "longer-whole" if defence == "patrol" else "longer",
        "dense_accuracy": 0.9, "accuracy": accuracy, "ssim": ssim, "ssim_worst5": 0.6,
        "floor_ssim": 0.2, "edge_macs": 10_000_000, "feature_bytes": 1024, "split": "layer4",
        "victim_images": 10, "rank1": 0.25, "chance1": 0.1, "attack": "inverse_network_ssim",
        "times_as_long": times,
        "plateau": times > 1,
        "made_with": {"commit": "abc"},
    }


def test_means_spreads_and_pairs(modules: tuple[ModuleType, ModuleType]) -> None:
    rows = [row("none", 0, 0.40, 0.88), row("none", 1, 0.50, 0.86),
            row("patrol", 0, 0.20, 0.87), row("patrol", 1, 0.30, 0.84),
            row("patrol", 1, 0.34, 0.84, times=3)]
    page = modules[1].seeds({"rows": rows}, "measured here")
    lines = [line for line in page.splitlines() if line.startswith("| mean")]
    assert len(lines) == 2
    assert "0.450 ± 0.071" in lines[0] and "3.00 ± 1.41" in lines[0]
    assert "0.250 ± 0.071" in lines[1] and "| 0.340 [1] |" in lines[1]
    assert "0.50 to 0.60 times the SSIM, for 1.00 to 2.00 points" in page
    assert "0.68 times" in page  # 0.34 / 0.50, of the one seed that was attacked for longer
    assert page.count("| no |") == 4 and page.count("| yes |") == 1
    assert page.endswith("measured here")
    assert "| 25.0 ± 0.0% |" in lines[0] and "by chance 10%" in page


def test_a_row_says_what_was_inside(modules: tuple[ModuleType, ModuleType]) -> None:
    """The large attackers stand in the name, and read all of a small map, as "whole" says."""
    usual = {**row("patrol", 0, 0.2, 0.87), "recipe": "half-longest-whole"}
    large = {**usual, "recipe": "half-long"}
    assert modules[1].name_of(usual) == "PATROL's fine-tuning, β 10, six times as long"
    assert modules[1].name_of(large) == "PATROL's fine-tuning, β 10, large attackers inside"
    pressed = {**usual, "recipe": "half-longer"}
    assert modules[1].name_of(pressed).endswith(modules[1].AGAINST_PRESSED_MARK)


def test_means_of_attacks_that_still_got_better_are_marked(
    modules: tuple[ModuleType, ModuleType]
) -> None:
    rows = [row("none", 0, 0.40, 0.88), {**row("none", 1, 0.50, 0.86), "plateau": True},
            {**row("patrol", 0, 0.20, 0.87), "plateau": True},
            row("patrol", 0, 0.34, 0.84, times=3),
            {**row("feature_dropout", 0, 0.3, 0.87), "plateau": True},
            {**row("feature_dropout", 0, 0.41, 0.87), "silenced": True}]
    page = modules[1].means({"rows": rows}, "here")
    assert "| 0.450 ± 0.071 * |" in page and "| 0.200 | 0.340 |" in page
    assert "| 0.300 | – | 0.410 * |" in page and modules[1].STILL in page
    reached = [{**each, "plateau": True} for each in rows]
    page = modules[1].means({"rows": reached}, "here")
    assert " * |" not in page and modules[1].STILL not in page


def test_other_defences_stand_beside_the_best_one(
    modules: tuple[ModuleType, ModuleType]
) -> None:
    rows = [row("none", 0, 0.40, 0.88), row("patrol", 0, 0.20, 0.87),
            row("patrol", 0, 0.25, 0.87, times=3), row("feature_dropout", 0, 0.30, 0.88)]
    page = modules[1].seeds({"rows": rows}, "here")
    assert "0.75 times the SSIM, for 0.00 points" in page  # 0.30 / 0.40
    assert "of usual length on both: 1.50 times the SSIM, 1.00 points" in page  # 0.30 / 0.20
    rows.append(row("feature_dropout", 0, 0.35, 0.88, times=3))
    page = modules[1].seeds({"rows": rows}, "here")
    assert "three times as long on both: 1.40 times the SSIM" in page  # 0.35 / 0.25
    assert page.index("| nothing |") < page.index("| PATROL") < page.index("| dropout")


def test_a_figure_of_some_seeds_says_of_how_many(
    modules: tuple[ModuleType, ModuleType]
) -> None:
    rows = [row("patrol", seed, 0.2, 0.8) for seed in range(3)]
    rows += [{**row("patrol", 1, 0.3, 0.8, times=3), "ssim_worst5": 0.9}]
    for render in (modules[1].seeds, modules[1].means):
        page = render({"rows": rows}, "here")
        assert "| 0.300 [1] |" in page and "| 0.600 ± 0.000 |" in page


def test_the_goal_is_judged_by_the_longer_attack_within_a_point(
    modules: tuple[ModuleType, ModuleType]
) -> None:
    rows = [row("none", 0, 0.4, 0.895), row("patrol", 0, 0.2, 0.88)]

    def page() -> str:
        return str(modules[1].seeds({"rows": rows}, "here"))

    usual, goal = "under the attack of usual length; the goal of 0.22 is", "not met under"
    assert f"is nothing: SSIM 0.400 {usual} {goal}" in page()
    rows[1]["accuracy"] = 0.895
    assert f"β 10: SSIM 0.200 {usual} met under" in page()
    rows.append(row("patrol", 0, 0.23, 0.895, times=3))
    assert f"β 10: SSIM 0.230 {usual.replace('of usual length', 'three times as long')} {goal}" in (
        page())
    rows = [row("none", 0, 0.4, 0.85)]
    assert "No mean is within a point" in page()


def test_what_holds_for_any_number_of_uploads_is_told_beside_what_draws(
    modules: tuple[ModuleType, ModuleType]
) -> None:
    drops = {**row("feature_dropout", 0, 0.20, 0.895), "plateau": True}
    often = {**drops, "silenced": True, "ssim": 0.35}
    rows = [row("patrol", 0, 0.21, 0.895), drops, often]
    told = "times it is PATROL's fine-tuning, β 10, under the longest attack on it: SSIM {} (1"
    for ssim, verdict in (("0.210", "met there"), ("0.230", "not met there")):
        page = modules[1].seeds({"rows": rows}, "here")
        assert told.format(ssim) in page and f"the goal is {verdict}" in page
        rows.append(row("patrol", 0, 0.23, 0.895, times=3))
    page = modules[1].seeds({"rows": rows[:1]}, "here")
    assert "any number of times it is" not in page


def test_many_uploads_of_a_picture_stand_beside_one(
    modules: tuple[ModuleType, ModuleType]
) -> None:
    drops = {**row("feature_dropout", 0, 0.30, 0.88), "plateau": True}
    rows = [row("none", 0, 0.40, 0.88), drops, {**drops, "silenced": True, "ssim": 0.39}]
    for render in (modules[1].seeds, modules[1].means):
        lines = [line for line in render({"rows": rows}, "here").splitlines()
                 if "| dropout" in line]
        assert lines and all("| 0.300 |" in line and "| 0.390 |" in line for line in lines)


def test_combined_defences_have_lines_of_their_own(
    modules: tuple[ModuleType, ModuleType]
) -> None:
    alone = row("patrol", 0, 0.25, 0.87)
    both = {**row("patrol", 0, 0.20, 0.86), "recipe": "longer-dropout"}
    deeper = {**row("patrol", 0, 0.19, 0.85), "split": "avgpool", "feature_bytes": 512}
    wider = {**deeper, "recipe": "half-longer-whole"}
    rows = [row("none", 0, 0.5, 0.88), both, alone, deeper, wider]
    page = modules[1].seeds({"rows": rows}, "here")
    assert "β 10 and dropout, p 0.5 ‡ against PATROL's fine-tuning, β 10, under" in page
    assert "0.80 times the SSIM, -1.00 points of accuracy more" in page  # 0.20 / 0.25
    assert page.index("After layer4, 1 KiB") < page.index("After avgpool, 0.5 KiB") < page.index(
        "After avgpool, half of the dense edge's multiply-adds, 0.5 KiB")


def test_what_was_trained_against_weaker_surrogates_is_marked(
    modules: tuple[ModuleType, ModuleType]
) -> None:
    old = {**row("patrol", 0, 0.28, 0.87), "recipe": "longer"}
    rows = [row("none", 0, 0.5, 0.88), old]
    for render in (modules[1].seeds, modules[1].means):
        page = render({"rows": [*rows, row("patrol", 0, 0.25, 0.87)]}, "here")
        assert "β 10 ‡ |" in page and "β 10 |" in page and "‡ trained against" in page
        assert "‡" not in render({"rows": [rows[0], row("patrol", 0, 0.25, 0.87)]}, "here")
    page = modules[1].seeds({"rows": [*rows, row("patrol", 0, 0.25, 0.87)]}, "here")
    assert "β 10 ‡ against PATROL's fine-tuning, β 10, under" in page


def test_means_leave_out_what_only_weaker_decoders_attacked(
    modules: tuple[ModuleType, ModuleType]
) -> None:
    old = {"made_with": {"commit": "28acad8"}}
    rows = [row("none", 0, 0.44, 0.88), {**row("none", 1, 0.33, 0.88), **old}]
    page = modules[1].means({"rows": rows}, "here")
    assert "0.440" in page and "0.330" not in page
    assert "Not in this table: training seeds 1 after layer4" in page
    assert "0.330" in modules[1].means({"rows": rows[1:]}, "here")
    assert "0.330" in modules[1].seeds({"rows": rows}, "here")


def test_other_attacks_are_told_beside_the_decoder(
    modules: tuple[ModuleType, ModuleType]
) -> None:
    ours = {**row("patrol", 0, 0.25, 0.87), "first_ssim": 0.26, "attacker_images": 10_000}
    few = {**ours, "victim_images": 4, "ssim": 0.27}
    other = {**few, "attack": "rmle", "began_with": "inverse_network_ssim", "ssim": 0.31,
             "plateau": None}
    linear = {**ours, "attack": "linear_inverse", "ssim": 0.21, "plateau": False}
    rows = [row("none", 0, 0.5, 0.88), ours, few, other, linear]
    page = modules[1].seeds({"rows": rows}, "here")
    assert ("where the decoder has 0.250: rMLE, white box, warm-started by the MSE + SSIM decoder "
            "0.310 over 4 images, where the decoder has 0.260; linear decoder, closed form 0.210, "
            "still improving.") in page
    assert page.count("| 0.250 |") == 1 == page.count("| 0.250 * |")  # its line, and its mean
    assert "0.270" not in page


def test_other_training_seeds_of_the_record_stay(
    modules: tuple[ModuleType, ModuleType]
) -> None:
    old = {"device": "another", "rows": [row("none", 0, 0.4, 0.8), row("none", 1, 0.4, 0.8)]}
    new = [row("none", 1, 0.5, 0.8)]
    rows = modules[0].with_earlier(new, old)
    assert [(r["train_seed"], r["ssim"]) for r in rows] == [(0, 0.4), (1, 0.5)]
    assert modules[1].elsewhere(rows) == ["Training seed 0: on another."]
    assert modules[1].elsewhere(rows, "another") == []
    again = modules[0].with_earlier(new, {"device": "third", "rows": rows})
    assert again[0]["device"] == "another"


def test_a_directory_without_its_rows_or_with_a_seed_twice_is_refused(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    seeds = modules[0]
    for name in ("first", "again"):
        (tmp_path / name / "rows").mkdir(parents=True)
        for step in seeds.CONTROLS[1:]:
            made = json.dumps([row("none", 0, 0.4, 0.8)])
            (tmp_path / name / "rows" / f"{step}.json").write_text(made)
    assert len(seeds.gathered((tmp_path / "first",))) == 1
    with pytest.raises(SystemExit, match="each once"):
        seeds.gathered((tmp_path / "first", tmp_path / "again"))
    with pytest.raises(SystemExit, match="came none"):
        seeds.gathered((tmp_path / "missing",))
