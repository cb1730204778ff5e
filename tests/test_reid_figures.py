"""The goals of the vehicle tables, told from rows whose verdict can be seen by eye."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def figures(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("reid_figures")


def row(method: str, **more: Any) -> dict[str, Any]:
    return {"method": method, "map": 0.8, "ssim": 0.6, "floor_ssim": 0.2, "plates_rate": 0.1,
            "characters_rate": 0.5, "characters_chance": 0.05, **more}


def test_each_goal_is_told_by_its_own_number(figures: ModuleType) -> None:
    rows = [row("dense", characters_rate=0.9), row("taylor"),
            row("patrol", map=0.781, ssim=0.3, characters_rate=0.1)]
    assert figures.verdict(rows).count(": met") == 3
    for worse, name in (({"map": 0.779}, "mAP within"), ({"ssim": 0.31}, "SSIM at most"),
                        ({"characters_rate": 0.11}, "characters read")):
        rows[2] = row("patrol", **{"map": 0.781, "ssim": 0.3, "characters_rate": 0.1, **worse})
        goals = figures.verdict(rows).split("Goals: ")[1].split("; ")
        assert [name in goal for goal in goals] == [": not met" in goal for goal in goals]


def test_characters_that_nobody_could_read_before_are_no_goal(figures: ModuleType) -> None:
    rows = [row("dense", characters_rate=0.79), row("taylor"), row("patrol")]
    assert "asked for where it is more than 80.0%" in figures.verdict(rows)
    rows[0] = row("dense", characters_rate=0.81)
    assert "asked for" not in figures.verdict(rows)


def test_what_the_likest_pictures_give_away_stands_beside_the_most_that_is_read(
    figures: ModuleType
) -> None:
    rows = [row("dense", characters_rate=0.9), row("taylor"), row("patrol", characters_rate=0.13)]
    assert "highest SSIM" not in figures.verdict(rows)
    rows[2]["characters_likest"] = 0.1
    told = figures.verdict(rows)
    assert "13.0% from PATROL's" in told and "10.0% from what the attack" in told
    assert "not met; SSIM" in told.split("13.0%")[1]  # the most that is read decides
    rows[2]["characters_likest"] = 0.13
    assert "highest SSIM" not in figures.verdict(rows)


def test_larger_decoders_are_told(figures: ModuleType) -> None:
    assert "larger decoders" not in figures.about([measured("layer3", "dense")])
    told = figures.about([measured("layer3", "dense", decoder=[64, 6, 12])])
    assert "larger decoders, of 64 channels and 6 residual blocks, trained for 12 epochs" in told


def test_what_other_attackers_saw_of_the_same_model_stands_beside_the_goals(
    figures: ModuleType
) -> None:
    run = [measured("layer3", m, ssim=0.3, characters_rate=0.1) for m in ("taylor", "patrol")]
    other = measured("layer3", "patrol", ssim=0.35, attacks=["unet_ssim", "whitened_ssim"])
    assert figures.run_of(other) != figures.run_of(run[1])
    assert figures.seen_elsewhere(run, run) == ""
    told = figures.seen_elsewhere(run, [*run, other])
    assert "SSIM 0.350" in told and "characters" not in told
    trained_anew = {**other, "epochs": [20, 72]}
    assert figures.seen_elsewhere(run, [*run, trained_anew]) == ""
    assert figures.seen_elsewhere([other], [*run, other]) == ""
    assert "U-shaped decoder" in figures.about([other])
    assert "U-shaped decoder" in figures.overview([run, [other]])


def test_plates_as_private_regions_are_told(figures: ModuleType) -> None:
    plain = measured("layer3", "patrol")
    aimed = measured("layer3", "patrol", private_plates=0.5, on_plates_ssim=0.412,
                     on_plates_plateau=False, on_plates_floor_ssim=0.123)
    assert "counted on plates" not in figures.about([plain])
    assert "50% of the error of the attackers inside is counted on plates" in figures.about([aimed])
    assert figures.run_of(plain) != figures.run_of(aimed)
    assert "SSIM on plates" not in figures.leaks([plain])
    told = figures.leaks([aimed])
    assert "SSIM on plates" in told and f"| 0.412{figures.UNFINISHED} |" in told and "0.123" in told


def test_other_surrogates_inside_are_told(figures: ModuleType) -> None:
    usual, large = measured("layer3", "patrol"), measured("layer3", "patrol", surrogates="large")
    assert "surrogates" not in figures.about([usual]) + figures.overview([[usual], [usual]])
    assert "large set of surrogates" in figures.about([large])
    assert figures.run_of(usual) != figures.run_of(large)
    assert "| large |" in figures.overview([[usual], [large]])


def test_what_the_pruned_models_learnt_from_is_told_where_it_is_not_the_usual(
    figures: ModuleType
) -> None:
    usual = [measured("layer3", "patrol")]
    other = [{**row, "teacher": False, "swapped_plates": True} for row in usual]
    told = figures.overview([usual, other])
    assert "| 8 |" in told and "| 8, no teacher, swapped plates |" in told
    assert "had no teacher" in figures.about(other) and "other vehicles' plates" in (
        figures.about(other))
    assert "teacher" not in figures.about(usual) and "plates, drawn" not in figures.about(usual)
    assert figures.training_of(usual[0]) != figures.training_of(other[0])
    assert "no teacher, swapped plates" in figures.called(other[0], [*usual, *other])
    narrow = [{**row, "upload_channels": 16} for row in usual]
    assert "| 8, 16 channels sent |" in figures.overview([usual, narrow])
    assert "send 16 channels" in figures.about(narrow) and "channels," not in figures.about(usual)
    assert figures.training_of(usual[0]) != figures.training_of(narrow[0])
    dropped = [{**row, "dropout": 0.5} for row in usual]
    assert "50% of each of PATROL's uploads is zeroed" in figures.about(dropped)
    assert "had one upload of every picture" in figures.about(dropped)
    several = [{**row, "uploads": 8} for row in dropped]
    assert "had 8 uploads of every picture" in figures.about(several)
    assert "blocks, 8 uploads |" in figures.overview([dropped, several])
    assert figures.run_of(dropped[0]) != figures.run_of(several[0])
    assert "in training and after it" in figures.about(dropped)
    assert "from the further training on" in figures.about(
        [{**row, "bits": 2, "rounded_epochs": 3} for row in dropped])
    assert figures.training_of(usual[0]) != figures.training_of(dropped[0])


def test_uploads_of_few_bits_are_told_and_stand_with_their_dense_model(
    figures: ModuleType
) -> None:
    usual = [measured("layer3", method) for method in ("dense", "patrol")]
    rounded = [{**row, "bits": 2, "rounded_epochs": 10} for row in usual]
    rounded[1]["feature_bytes"] = usual[1]["feature_bytes"] // 16
    assert figures.run_of(usual[0]) != figures.run_of(rounded[0])
    sizes = figures.largest_uploads([*usual, *rounded])
    assert set(sizes.values()) == {usual[0]["feature_bytes"]} and len(sizes) == 2
    same = [measured("layer4", "taylor", feature_bytes=512), measured("layer4", "dense"),
            *usual, *rounded]
    order = figures.same_budget(same)
    assert order.index("32 bits") < order.index("2 bits") < order.index("| layer4 |")
    assert "bits" not in figures.overview([usual, usual]) + figures.about(usual)
    told = figures.overview([usual, rounded])
    assert "| bits of a value |" in told and "| 8 + 10 |" in told and "| 32 |" in told
    assert "for 10 more with 2 bits of every value" in figures.about(rounded)


def test_an_attack_that_was_still_improving_is_marked(figures: ModuleType) -> None:
    rows = [measured("layer3", "dense"), measured("layer3", "patrol", ssim=0.4, plateau=False)]
    told = figures.costs(rows)
    assert "0.400 *" in told and "0.500 |" in told


def test_a_goal_below_the_floor_is_called_so(figures: ModuleType) -> None:
    rows = [row("dense"), row("taylor", ssim=0.3), row("patrol", ssim=0.25)]
    assert "0.150, which lies below the floor" in figures.verdict(rows)
    rows = [row("dense"), row("taylor"), row("patrol")]
    assert "below the floor" not in figures.verdict(rows)


def test_sets_without_plates_have_no_goals(figures: ModuleType) -> None:
    rows = [row(m, plates_rate=None, characters_rate=None) for m in ("dense", "taylor", "patrol")]
    assert "Goals" not in figures.verdict(rows)


def measured(split: str, method: str, dataset: str = "rendered", **more: Any) -> dict[str, Any]:
    """A row with everything the page tells."""
    return {
        "dataset": dataset, "model": "small_resnet", "method": method, "split": split,
        "beta": 10.0, "budget": "36.4M", "train_seed": 0, "epochs": [20, 8],
        "edge_macs": 73_000_000 if method == "dense" else 36_400_000, "feature_bytes": 2048,
        "map": 0.9 if method == "dense" else 0.8, "ssim": 0.5, "floor_ssim": 0.2, "mse": 0.1,
        "plateau": True,
        "rank1": 0.9, "rank5": 0.9, "minp": 0.5, "attack": "rmle", "ssim_worst5": 0.6,
        "counts": {"defender": 9, "identities": 3, "inverter": 5, "reader": 4, "query": 3,
                   "gallery": 6, "test_identities": 3, "victims": 3},
        "commit": "abc", "date": "2026-01-01", "device": "a machine", "minutes": 1.0,
        **{f"{kind}_{k}": 0.1 for kind in ("plates", "characters", "scenes")
           for k in ("rate", "chance", "original")},
        **{f"named_{k}{which}": 0.1 for k in ("map", "rank1")
           for which in ("", "_original", "_chance")},
        **more,
    }


def test_every_run_has_a_line_with_its_three_models(figures: ModuleType) -> None:
    runs = [[measured("layer3", m, decoder=decoder, map=value, epochs=[20, epochs])
             for m, value in (("patrol", 0.7), ("taylor", 0.8), ("dense", 0.9))]
            for epochs, decoder in ((8, (32, 3, 10)), (24, (64, 6, 12)))]
    told = figures.overview(runs)
    lines = [line for line in told.splitlines() if "90.0% / 80.0% / 70.0%" in line]
    assert len(lines) == 2
    assert "| 24 |" in lines[1] and "64 channels, 6 blocks" in lines[1]
    assert figures.overview(runs[:1]) == ""  # the run itself follows
    assert "– / – / 70.0%" in figures.overview([runs[0], runs[1][:1]])
    assert "alone met" in figures.about(runs[1][:1]) and "alone met" not in figures.about(runs[1])


def lost(text: str) -> list[str]:
    """The column of points below the dense model."""
    cells = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    column = [c.strip() for c in cells[0]].index("points below dense")
    return [row[column].strip() for row in cells[2:]]


def test_the_same_device_is_compared_within_a_set(figures: ModuleType) -> None:
    cuts = [measured(split, "taylor") for split in ("layer2", "layer4")]
    dense = [measured(split, "dense", map=0.85) for split in ("layer2", "layer4")]
    elsewhere = [measured(split, method, "photographs", map=0.4)
                 for split in ("layer2", "layer4") for method in ("dense", "taylor")]
    record = {"rows": [*cuts, *dense, *elsewhere], "versions": {"torch": "1", "torch-pruning": "1"}}
    tables = figures.reid(record).split("**The same device")[1:]
    assert len(tables) == 2
    assert "rendered, edges" in tables[0] and "photographs, edges" in tables[1]
    table = tables[0].split("\n\n")[1]
    assert lost(table) == ["5.0", "5.0"]
    # one cut of each set is no comparison
    record["rows"] = [cuts[0], dense[0], *elsewhere[2:]]
    assert "The same device" not in figures.reid(record)


def test_points_are_lost_against_the_dense_model_of_the_same_run(figures: ModuleType) -> None:
    rows = [measured("layer4", "taylor"), measured("layer4", "dense", map=0.9),
            measured("layer2", "taylor"), measured("layer2", "dense", map=0.85),
            measured("layer2", "patrol", beta=40.0, map=0.7),
            measured("layer2", "dense", beta=40.0, map=0.95),
            measured("layer2", "dense", budget="0.5", map=0.5)]
    text = figures.same_budget(rows)
    assert lost(text) == ["5.0", "25.0", "10.0"]
    assert "β" not in text  # one strength of PATROL is told in the run's own sentence
    rows.append(measured("layer4", "patrol"))
    assert "PATROL**, β 40" in figures.same_budget(rows)
    assert "seed" not in figures.same_budget(rows)


def test_a_set_without_plates_is_compared_too(figures: ModuleType) -> None:
    none = {f"{kind}_{k}": None for kind in ("plates", "characters", "scenes")
            for k in ("rate", "chance", "original")}
    text = figures.same_budget([measured(split, method, **none) for split in ("layer2", "layer4")
                                for method in ("dense", "taylor")])
    assert "by chance" not in text and "plates" not in text and lost(text) == ["10.0", "10.0"]


def test_runs_of_other_seeds_and_epochs_are_told_apart(figures: ModuleType) -> None:
    rows = [measured("layer4", "taylor", **more)
            for more in ({}, {"train_seed": 1}, {"epochs": [20, 3]})]
    text = figures.reid({"rows": rows, "versions": {"torch": "1", "torch-pruning": "1"}})
    assert text.count("**Rendered**") == 3
    assert text.count("One training seed (1)") == 1 and "fine-tuned for 3" in text


def test_a_closed_set_is_called_so(figures: ModuleType) -> None:
    for closed in (False, None):
        assert "closed" not in figures.about([measured("layer4", "dense", closed=closed)])
    assert "closed" not in figures.about([measured("layer4", "dense")])
    assert "the same identities" in figures.about([measured("layer4", "dense", closed=True)])


def test_each_row_tells_its_own_command_and_versions(figures: ModuleType) -> None:
    record = {"versions": {"torch": "9.9", "torch-pruning": "8.8"}}
    told = figures.measured(record, [measured("layer4", "dense")])
    assert "torch 9.9, torch-pruning 8.8; `python benchmarks/reid.py`." in told
    own = measured("layer4", "dense", versions={"torch": "1.1", "torch-pruning": "2.2"},
                   command="python benchmarks/reid.py --at layer4")
    told = figures.measured(record, [own])
    assert "torch 1.1, torch-pruning 2.2; `python benchmarks/reid.py --at layer4`." in told


def test_a_goal_that_the_dense_model_meets_is_called_so(figures: ModuleType) -> None:
    rows = [row("dense", characters_rate=0.09), row("taylor"), row("patrol", characters_rate=0.08)]
    assert "9.0% from the dense model's upload, which meets it too): met" in figures.verdict(rows)
    rows[0]["characters_rate"] = 0.5
    assert "meets it too" not in figures.verdict(rows)


def test_rows_say_whether_uploads_themselves_were_read(figures: ModuleType) -> None:
    rows = [measured("layer4", m) for m in ("dense", "taylor", "patrol")]
    assert "uploads themselves were not" in figures.about(rows)
    assert "| rebuilt from |" in figures.leaks(rows)
    read = [{**r, "uploads_read": True, "named_rebuilt_map": 0.37, "characters_upload": 0.42}
            for r in rows]
    assert "uploads themselves" not in figures.about(read)
    table = figures.leaks(read)
    assert "mAP from rebuilt pictures alone" in table and "37.0%" in table and "42.0%" in table
