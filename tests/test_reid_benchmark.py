"""Records of whole runs: whose rows replace whose, and what they say of how they were measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from patrol_prune.errors import InputError

FOLDER = Path(__file__).resolve().parent.parent / "integrations" / "vehicle_reid"


@pytest.fixture(scope="module")
def reid(import_benchmark: Callable[[str], ModuleType]) -> Iterator[ModuleType]:
    before = set(sys.modules)
    yield import_benchmark("reid")
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(FOLDER)):
            del sys.modules[name]


def row(**more: Any) -> dict[str, Any]:
    return {"dataset": "rendered", "split": "layer4", "beta": 10.0, "train_seed": 0,
            "epochs": [20, 8], "method": "patrol", "feature_bytes": 32, **more}


@pytest.mark.parametrize("other", [
    {"train_seed": 1}, {"epochs": [20, 3]}, {"decoder": [64, 6, 12]}, {"budget": "36.4M"},
    {"beta": 40.0}, {"bits": 2, "rounded_epochs": 24}, {"teacher": False},
    {"swapped_plates": True}, {"dropout": 0.5}, {"upload_channels": 16}, {"private_plates": 0.5},
    {"split": "layer2"}, {"dataset": "photographs"},
])
def test_rows_of_another_run_stay(reid: ModuleType, other: dict[str, Any]) -> None:
    before = {"versions": {"torch": "1"}, "rows": [row(map=0.1), row(map=0.2, **other)]}
    mine = row(map=0.3, budget="0.5", versions={"torch": "2"})
    found = reid.merged(before, [mine])
    assert sorted(r["map"] for r in found) == [0.2, 0.3]
    # an earlier row keeps the versions of the record that it stood in
    assert {r["map"]: r["versions"]["torch"] for r in found} == {0.2: "1", 0.3: "2"}


def test_rows_of_another_length_of_the_rounded_training_stay(reid: ModuleType) -> None:
    mine, other = (row(bits=2, rounded_epochs=n, map=n) for n in (24, 48))
    assert len(reid.merged({"versions": {}, "rows": [other]}, [mine])) == 2


def test_each_option_is_a_setting_of_the_run_and_part_of_its_name(reid: ModuleType) -> None:
    usual = reid.config_of(reid.Reid(bits=2))
    options = ({"teacher": False}, {"teacher": False, "swap_plates": True},
               {"rounded_epochs": 48}, {"dropout": 0.5}, {"uploads": 8}, {"bits": 3},
               {"upload_channels": 16}, {"private_plates": 0.5})
    made = [reid.config_of(reid.Reid(**{"bits": 2, **more})) for more in options]
    assert len({config.name for config in (usual, *made)}) == len(made) + 1
    assert usual.finetune.distill_weight > 0 and usual.rounded.distill_weight == 0
    assert made[0].finetune.distill_weight == 0 and not made[0].swap_plates
    assert made[1].swap_plates and made[2].rounded.epochs == 48
    assert made[3].privacy.dropout == 0.5 and made[4].attackers.uploads == 8
    assert made[5].bits == 3 and made[6].upload_channels == 16
    assert made[7].private_plates == 0.5 and not usual.private_plates
    with pytest.raises(InputError, match="--bits beside"):
        reid.config_of(reid.Reid(rounded_epochs=48))


def test_the_most_that_is_seen_of_plates_is_told(reid: ModuleType) -> None:
    def record(subject: str, attack: str, ssim: float) -> dict[str, Any]:
        return {"subject": subject, "attack": attack, "plateau": True, "private_ssim": ssim}

    found = reid.on_plates([record("floor", "mean_image", 0.2), record("floor", "nearest", 0.3),
                            record("edge", "rmle", 0.4), record("edge", "aimed_ssim", 0.5)])
    assert found == {"on_plates_ssim": 0.5, "on_plates_attack": "aimed_ssim",
                     "on_plates_plateau": True, "on_plates_floor_ssim": 0.3}
    assert reid.on_plates([{"subject": "edge", "ssim": 0.4}]) == {}


def test_pictures_stand_in_rows_of_a_method_each(reid: ModuleType, tmp_path: Path) -> None:
    for shade, method in enumerate(("dense", "patrol"), 1):
        folder = tmp_path / "audits" / f"{method}_examples"
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 4), (shade, 0, 0)).save(folder / "edge.png")
        Image.new("RGB", (40, 4), (9, 0, 0)).save(folder / "originals.png")
    reid.draw(tmp_path, ["dense", "patrol"], tmp_path / "page.png", count=3)
    page = Image.open(tmp_path / "page.png").convert("RGB")
    assert page.size == (2 * 3 * 4, 2 * 3 * 4)
    assert [page.getpixel((20, y))[0] for y in (7, 8, 15, 16)] == [9, 1, 1, 2]


def test_rendered_rows_come_first(reid: ModuleType) -> None:
    before = {"versions": {}, "rows": [row(dataset="photographs")]}
    assert [r["dataset"] for r in reid.merged(before, [row()])] == ["rendered", "photographs"]
    assert reid.merged({"rows": []}, [row()]) == [row()]
    deeper = row(split="avgpool", feature_bytes=2)
    found = reid.merged({"versions": {}, "rows": [deeper]}, [row()])
    assert [r["split"] for r in found] == ["layer4", "avgpool"]


def test_a_row_says_whether_the_set_is_closed(reid: ModuleType) -> None:
    named = {"map": 0.5, "rank1": 0.5, "attack": "rmle"}
    about = {
        "edge_macs": 1, "edge_params": 1, "feature_bytes": 1, "retrieval": {"map": 0.5},
        "audit": {"strongest": {}, "floor": {"ssim": 0.1, "mse": 0.1}, "flags": [],
                  "leaks": {"identification": {"strongest": named, "rows": [named]}}},
    }
    result = {
        "settings": {"model": "m", "seed": 0, "privacy": {"beta": 1.0}},
        "plan": {"at": "layer4"}, "data": {"closed": True}, "methods": {"patrol": about},
        "originals": {"identification": {"strongest": named, "chance": named}},
    }
    row = reid.rows(result, "photographs")[0]
    assert row["closed"] is True and row["uploads_read"] is False
    direct = {"map": 0.9, "rank1": 0.9, "attack": f"{reid.DIRECT}, pooled"}
    about["audit"]["leaks"] = {
        "identification": {"strongest": direct, "rows": [named, direct]},
        "characters": {"strongest": {"rate": 0.4, "chance": 0.1, "count": 9, "attack": "rmle",
                                     "reader": "own"},
                       "rows": [{"attack": "rmle", "rate": 0.4},
                                {"attack": reid.DIRECT, "rate": 0.3}]},
    }
    result["originals"]["characters"] = {"strongest": {"rate": 1.0}}
    row = reid.rows(result, "photographs")[0]
    assert (row["named_map"], row["named_rebuilt_map"], row["uploads_read"]) == (0.9, 0.5, True)
    assert (row["characters_upload"], row["plates_upload"]) == (0.3, None)
    result["data"] = {}
    assert reid.rows(result, "photographs")[0]["closed"] is None


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run that was made on another day and another machine."""
    numbers = {"edge_macs": 8, "edge_params": 4, "feature_bytes": 2, "accuracy": 0.4}
    score = {"attack": "inverse_network", "attack_seed": 0, "attacker_images": 9,
             "victim_images": 3, "ssim": 0.2, "ssim_worst5": 0.3, "psnr": 14.0, "mse": 0.04,
             "plateau": True, "trivial": False}
    summary = {
        "model": "small_resnet", "split": "layer2", "seed": 0, "dense": numbers,
        "pruned": numbers, "device": "cuda:7", "versions": {"torch": "1.0", "python": "3.9"},
        "config": {"data": "/photos", "runs": "/runs", "model": "small_resnet",
                   "privacy": {"alpha": 0.0}, "score": {"lip_weight": 0.0}},
    }
    audit = {
        "version": 1, "flags": [], "per_image": {}, "example_indices": [], "examples": {},
        "records": [{"subject": s, **score} for s in ("edge", "undefended", "floor")],
    }
    events = [{"time": 1_000_000_000.0, "event": "a"}, {"time": 1_000_000_120.0, "event": "b"}]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return tmp_path


def test_a_copied_record_tells_of_the_run_and_not_of_who_copies_it(
    import_benchmark: Callable[[str], ModuleType], finished: Path
) -> None:
    found = import_benchmark("grocery").content(finished)
    assert found["date"].startswith("2001-09-0") and found["minutes"] == 2.0
    assert (found["device"], found["versions"]) == ("cuda:7", {"torch": "1.0", "python": "3.9"})
    assert not {"commit", "threads"} & found.keys()
    assert not {"data", "runs"} & found["settings"].keys()
    assert [r["method"] for r in found["rows"]] == ["dense", "patrol-adversarial"]
    told = import_benchmark("figures").circumstances({**found, "command": "python x --run r"})
    assert told == f"Measured {found['date']} on cuda:7, torch 1.0; `python x`."

    summary = json.loads((finished / "summary.json").read_text())
    del summary["device"], summary["versions"]
    (finished / "summary.json").write_text(json.dumps(summary))
    found = import_benchmark("grocery").content(finished)
    assert not {"commit", "device", "versions"} & found.keys()
    told = import_benchmark("figures").circumstances({**found, "command": "python x --run r"})
    assert told == f"Measured {found['date']}; `python x`."
