"""The vehicle re-identification script: parts by hand, and the whole path on a tiny drawn set."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import save_file

import patrol_prune as pp
from patrol_prune.audit_report import AuditReport
from patrol_prune.checkpoint import read_info
from patrol_prune.data import ImageSet
from patrol_prune.errors import InputError, RunDirectoryError
from patrol_prune.leaks import PlateReader
from patrol_prune.models import build_model
from patrol_prune.reid_layout import ReidImage, read_reid
from patrol_prune.rundir import RunDirectory
from patrol_prune.settings import PrivacyConfig
from patrol_prune.vehicle_identities import write_vehicle_reid
from patrol_prune.vehicle_truth import VehicleTruth, drawn_with
from patrol_prune.vehicles import write_vehicles

FOLDER = Path(__file__).resolve().parent.parent / "integrations" / "vehicle_reid"
MODULES = ("beginning", "leak_checks", "page", "pictures", "plates", "rounding", "run", "settings",
           "stages", "uploads")
TINY = [
    "--data", "rendered", "--rendered.identities", "32", "--rendered.cameras", "3",
    "--rendered.images-per-camera", "2", "--model", "small_resnet", "--name", "tiny",
    "--batch.identities", "4", "--batch.images-each", "3", "--attackers.victims", "8",
    "--train.epochs", "1", "--finetune.epochs", "1", "--finetune.surrogate-warmup-steps", "1",
    "--finetune.inner-steps", "1", "--score.batches", "1", "--score.surrogate-steps", "1",
    "--attackers.reader-share", "0.4", "--attackers.attacks",
    '["linear_inverse", "inverse_network"]', "--attacker.epochs", "1", "--attacker.width", "8",
    "--attacker.depth", "1", "--attacker.max-extensions", "0", "--attackers.examples", "3",
]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The modules of the script, imported as it imports them."""
    sys.path.insert(0, str(FOLDER))
    try:
        import leak_checks
        import page
        import pictures
        import rounding
        import run
        import stages
        import uploads

        yield {"run": run, "pictures": pictures, "page": page, "leak_checks": leak_checks,
               "rounding": rounding, "stages": stages, "uploads": uploads}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


def _pictures(script: Any, count: int) -> Any:
    truth = VehicleTruth(
        tuple("AB0"[i % 3] * 3 for i in range(count)), torch.zeros(count, 4, 2),
        tuple("city" if i % 2 else "coast" for i in range(count)),
        torch.arange(count) % 4 == 3,
    )
    images = torch.arange(count).view(-1, 1, 1, 1).expand(count, 3, 16, 16).to(torch.uint8)
    return script["pictures"].Pictures(images, torch.arange(count) // 4, torch.arange(count) % 2,
                                       truth)


def test_what_a_stage_draws_hangs_on_the_seed_and_the_stage_alone(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, float]] = [{}, {}]
    stages = sys.modules["stages"]
    for first, into in enumerate(drawn):
        def draw(work: Any, *_: Any, into: dict[str, float] = into) -> None:
            into[work.stage] = float(torch.rand(()))

        for name in ("data", "plan", "dense", "pruned", "audit", "result"):
            monkeypatch.setattr(stages.Work, f"do_{name}", draw)
        monkeypatch.setattr(stages.Work, "result", lambda work: {})
        monkeypatch.setattr(stages.Work, "check_incoming", lambda work: None)
        config = sys.modules["settings"].ReidRun(data="rendered", device="cpu")
        with RunDirectory(tmp_path / str(first), {}) as folder:
            if first:  # stopped before, and in another process
                for stage in ("data", "plan", "dense"):
                    folder.finish(stage)
            torch.manual_seed(first)
            stages.Work(config, folder, lambda *_: None, object()).go()
    whole, resumed = drawn
    assert len(resumed) > 2 and resumed == {stage: whole[stage] for stage in resumed}
    assert len(set(whole.values())) == len(whole)


def test_pictures_keep_their_truth_when_parted_and_joined(script: Any) -> None:
    every = _pictures(script, 12)
    again = every.subset([0, 5, 7]).and_then(every.subset([11]))
    assert again.images[:, 0, 0, 0].tolist() == [0, 5, 7, 11]
    assert again.truth.plates == tuple(every.truth.plates[i] for i in (0, 5, 7, 11))
    assert again.truth.hidden.tolist() == [False, False, True, True]
    assert again.identities.tolist() == [0, 1, 1, 2]


def test_an_attacker_owns_identities_or_in_a_closed_set_pictures(script: Any) -> None:
    every = _pictures(script, 40)
    generator = torch.Generator().manual_seed(0)
    apart = script["pictures"]._attackers(every, 0.5, False, generator)
    theirs, ours = (set(every.identities[m].tolist()) for m in (apart, ~apart))
    assert len(theirs) == 5 and not theirs & ours
    mixed = script["pictures"]._attackers(every, 0.5, True, generator)
    assert int(mixed.sum()) == 20
    assert set(every.identities[mixed].tolist()) & set(every.identities[~mixed].tolist())


def _noisy(script: Any, count: int, seed: int) -> Any:
    """Pictures that are told apart by their identity's own pattern, plates by the first rows."""
    g = torch.Generator().manual_seed(seed)
    patterns = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    identities = torch.arange(count) // 4
    images = patterns[identities] + 0.3 * torch.randn(count, 3, 16, 16, generator=g)
    letters = torch.randint(0, 3, (count,), generator=g)
    images[:, 0, :8] += letters.view(-1, 1, 1)
    plates = tuple("AB0"[i] * 2 for i in letters.tolist())
    truth = VehicleTruth(plates, torch.tensor([[0.0, 0], [16, 0], [16, 8], [0, 8]]).repeat(
        count, 1, 1), tuple("city" if i % 2 else "coast" for i in range(count)),
        torch.arange(count) % 4 == 3)
    pixels = (images * 50 + 100).clamp(0, 255).to(torch.uint8)
    return script["pictures"].Pictures(pixels, identities, torch.arange(count) % 4, truth)


@pytest.mark.parametrize("layout", ["map", "vector"])
def test_an_upload_is_compared_and_read_without_a_picture(script: Any, layout: str) -> None:
    """Whoever has the uploads needs no decoder to see who is who, and what a plate says."""
    uploads = script["uploads"]

    def edge(images: torch.Tensor) -> torch.Tensor:
        z = torch.nn.functional.avg_pool2d(images.float() / 255.0, 2)
        return z if layout == "map" else z.flatten(1)

    asked, gallery, known = (uploads.Owned(_noisy(script, 160, seed), edge) for seed in range(3))
    victims = uploads.Owned(asked.pictures.subset(range(0, 160, 4)), edge)
    ways = uploads.embeddings(victims, gallery, known)
    assert len(ways) == 4 and all(name.startswith(uploads.DIRECT) for name in ways)
    best = max(
        float(((q @ g.T).argmax(1) // 4 == torch.arange(40)).double().mean())
        for q, g in ((torch.nn.functional.normalize(a.double()) for a in pair)
                     for pair in ways.values()))
    assert best > 0.9
    found = uploads.read_uploads(asked, known)
    assert set(found) == {"plates", "characters", "scenes"}
    assert found["characters"]["rate"] > 0.9 and found["characters"]["count"] == 240
    assert found["plates"]["rate"] > 0.9 and found["plates"]["count"] == 120
    assert abs(found["scenes"]["rate"] - 0.5) < 0.2  # the place is not in it
    assert {row["attack"] for row in found.values()} == {uploads.DIRECT}


def test_readers_meet_other_vehicles_than_the_inverter(script: Any) -> None:
    every = _pictures(script, 80)
    mask = script["pictures"]._attackers(every, 0.25, False, torch.Generator().manual_seed(0))
    reader, inverter = (set(every.identities[m].tolist()) for m in (mask, ~mask))
    assert reader and inverter and not reader & inverter


def test_rows_of_another_seed_carry_it(script: Any) -> None:
    name = script["leak_checks"].row_name
    assert (name("rmle", 3, (3, 7)), name("rmle", 7, (3, 7))) == ("rmle", "rmle, seed 7")


def test_what_a_reader_reads_is_counted_where_nothing_is_in_front(script: Any) -> None:
    class Plates(PlateReader):
        def __init__(self) -> None:
            super().__init__()
            self._places, self._network = (Counter("A"),) * 3, torch.nn.Identity()

        def read(self, images: torch.Tensor, boxes: torch.Tensor) -> list[str]:
            return ["AAA"] * len(images)

    class Scenes:
        def accuracy(self, images: torch.Tensor, scenes: Any) -> str:
            return f"{len(images)} {len(scenes)}"

    victims = _pictures(script, 12)
    found = script["leak_checks"].read((Plates(), Scenes()), victims, victims.pixels())
    # of 12 plates 3 are hidden; 0, 6 and 9 of the others say AAA
    assert (found["plates"].rate, found["plates"].count) == (3 / 9, 9)
    assert (found["characters"].rate, found["characters"].count) == (3 / 9, 27)
    assert found["characters"].chance == pytest.approx(3 / 9)
    assert found["plates"].chance == pytest.approx((3 / 9) ** 3)
    assert found["scenes"] == "12 12"


def test_settings_and_folders_that_do_not_fit_are_refused(script: Any, tmp_path: Path,
                                                          capsys: Any) -> None:
    main = script["run"].main
    assert main(["--data", str(tmp_path), "--runs", str(tmp_path / "runs")]) == 2
    assert "image_train" in capsys.readouterr().err
    assert main(["--layout", "folder"]) == 2
    assert "rendered set" in capsys.readouterr().err
    assert main(["--attackers.attacks", '["inverse"]']) == 2


@pytest.fixture
def photos(tmp_path: Path, write_folder: Callable[..., Path]) -> Path:
    """An image folder of three classes, which are trained and tested on."""
    write_folder(tmp_path / "photos", parts=("train",), count=60)
    return write_folder(tmp_path / "photos", parts=("test",), count=4)


def _options(photos: Path, **more: str) -> list[str]:
    given = {"data": str(photos), "layout": "folder", "image_size": "16", "at": "layer1",
             "batch.identities": "3", "runs": str(photos.parent / "runs"), **more}
    return [word for key, value in given.items() for word in (f"--{key}", value)]


def _config(script: Any, photos: Path, **more: Any) -> Any:
    return script["run"].build(script["run"].ReidRun, {
        "data": str(photos), "layout": "folder", "image_size": 16, "at": "layer1",
        "batch": {"identities": 3}, "runs": str(photos.parent / "runs"), **more}, "the test")


@pytest.mark.parametrize(("key", "value", "told"), [
    ("data", "nowhere", "does not exist"), ("at", "layer9", "layer9"),
    ("weights", "nowhere.safetensors", "no file of weights"), ("device", "cuda:99", "cuda:99"),
])
def test_a_mistake_in_the_first_call_leaves_no_run(
    script: Any, photos: Path, capsys: Any, key: str, value: str, told: str
) -> None:
    assert script["run"].main(_options(photos, **{key: value})) == 2
    assert told in capsys.readouterr().err
    assert not (photos.parent / "runs").exists()


def test_a_full_disk_is_told_in_a_sentence(
    script: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script["run"], "everybody", full)
    assert script["run"].main(["--runs", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "error: [Errno 28] No space left on device. What was finished before is kept" in told


def test_weights_that_changed_are_refused_and_may_be_gone_once_they_were_learnt(
    script: Any, photos: Path
) -> None:
    stages, weights = script["stages"], photos.parent / "a.safetensors"
    config = _config(script, photos, weights=str(weights))
    people = script["pictures"].everybody(config)
    states = [build_model("small_resnet", 3, image_size=16, seed=seed).state_dict()
              for seed in (1, 2)]
    save_file(states[0], weights)
    with RunDirectory(photos.parent / "run", {}) as folder:
        work = stages.Work(config, folder, lambda *_: None, people)
        work.do_data()
        save_file(states[1], weights)
        with pytest.raises(RunDirectoryError, match=r"a\.safetensors are not those"):
            work.go()
        save_file(states[0], weights)
        work.check_incoming()
        split = pp.Split(stages.model_of(config, people), people.example(), at="layer1")
        work.save(split, "dense")
        weights.unlink()
        work.check_incoming()
        found = work.load("dense").model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in split.model.state_dict().items())
    with pytest.raises(InputError, match="no file of weights"):  # to train the dense model
        stages.model_of(config, people)


def test_test_pictures_that_were_trained_on_are_counted(
    script: Any, photos: Path, tmp_path: Path
) -> None:
    config, everybody = _config(script, photos), script["pictures"].everybody
    assert (everybody(config).copies, everybody(config).notes) == (0, [])
    for part in ("blue", "green"):
        for picture in sorted((photos / "train" / part).iterdir())[:30]:
            shutil.copy(picture, photos / "test" / part / f"copy-{picture.name}")
    people = everybody(config)
    own = {image.numpy().tobytes() for image in people.defender.images}
    copies = sum(image.numpy().tobytes() in own
                 for part in (people.query, people.gallery) for image in part.images)
    assert 0 < copies == people.copies < 60  # the others are the attacker's
    assert people.notes[0].startswith(f"{copies} of the 72 query and gallery pictures are also")
    folder = RunDirectory(tmp_path / "run", {})
    told: list[str] = []
    script["stages"].Work(config, folder, lambda _, text: told.append(text), people).do_data()
    folder.close()
    assert people.notes[0] in told


def test_pictures_are_read_as_others_are_and_broken_ones_named(
    script: Any, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = ReidImage(photos / "grey.png", 0, 0, None)
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    Image.fromarray(grey.astype(np.uint16) * 257).save(image.path, exif=exif)
    found = script["pictures"].read([image], photos, 16).images[0]
    assert (found.numpy() == grey[::-1, ::-1]).all()
    content = image.path.read_bytes()
    image.path.write_bytes(content.replace(b"IDAT", b"ID\0T"))
    with pytest.raises(InputError, match=r"grey\.png cannot be read"):
        script["pictures"].read([image], photos, 16)
    image.path.write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(InputError, match=r"grey\.png cannot be read"):
        script["pictures"].read([image], photos, 16)


def test_plates_are_read_of_rendered_identities_alone(script: Any, tmp_path: Path) -> None:
    pictures = script["pictures"]
    demo = write_vehicles(tmp_path / "demo", train=10, test=10, size=64)
    config = script["run"].ReidRun(data=str(demo), layout="folder", image_size=64)
    found = pictures.read_set(config, demo)
    assert pictures.read(found.query, demo, 64).truth is None
    for content in ("[]", "no JSON", '{"parameters": 3}'):
        (demo / "attributes.json").write_text(content)
        assert pictures.read(found.query, demo, 64).truth is None
    drawn = write_vehicle_reid(tmp_path / "drawn", identities=4, cameras=2, images_per_camera=1)
    read = pictures.read(read_reid(drawn).query, drawn, 64)
    assert read.truth is not None and len(read.truth.plates) == len(read)


def test_labels_have_a_digest_beside_that_of_the_pictures(script: Any, tmp_path: Path) -> None:
    pictures, every = script["pictures"], _pictures(script, 8)
    plain = pictures.labels_digest([every], [[1]])
    assert pictures.labels_digest([_pictures(script, 8)], ((1,),)) == plain
    truth = every.truth
    changed = [
        replace(every, cameras=every.cameras + 1),
        replace(every, truth=None),
        replace(every, truth=replace(truth, plates=("ZZZ", *truth.plates[1:]))),
        replace(every, truth=replace(truth, boxes=truth.boxes + 1)),
        replace(every, truth=replace(truth, scenes=truth.scenes[::-1])),
        replace(every, truth=replace(truth, hidden=~truth.hidden)),
    ]
    found = [pictures.labels_digest([one], [[1]]) for one in changed]
    assert len({plain, pictures.labels_digest([every], [[2]]), *found}) == 2 + len(changed)

    root = write_vehicle_reid(tmp_path / "set", identities=32, cameras=3, images_per_camera=2)
    config = script["run"].build(script["run"].ReidRun, {
        "data": str(root), "batch": {"identities": 4}, "attackers": {"reader_share": 0.4}},
        "the test")
    before = pictures.everybody(config)
    matches = root / "gt_index.txt"
    matches.write_text(matches.read_text().split(" ", 1)[1])
    after = pictures.everybody(config)
    assert after.digest == before.digest  # what runs of earlier releases noted
    assert after.labels_digest != before.labels_digest


@pytest.mark.slow
def test_what_cannot_be_had_costs_no_finished_run(script: Any, tmp_path: Path, capsys: Any) -> None:
    """`--overwrite` with a slip in it: the earlier run stays as it is."""
    run = tmp_path / "tiny"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "result.json", "checkpoints/dense"):
        (run / name).write_text("earlier: run")
    wrong = {
        "not one": ["--data", str(tmp_path / "nowhere")],
        "at least 40 pictures": ["--rendered.identities", "8"],
        "from 4 to": ["--rendered.identities", "1"],
        "resnt18": ["--model", "resnt18"],
        "nowhere": ["--weights", str(tmp_path / "nowhere")],
        "cuda:99": ["--device", "cuda:99"],
        "layer7": ["--at", "layer7"],
        "budget": ["--edge_macs", "1"],
    }
    for told, arguments in wrong.items():
        assert script["run"].main([*TINY, "--runs", str(tmp_path), "--overwrite", *arguments]) == 2
        assert told in capsys.readouterr().err
        assert sorted(p.name for p in run.rglob("*") if p.is_file()) == [
            "config.yaml", "dense", "result.json"]


def test_vehicles_of_another_seed_or_size_lie_beside_the_first(script: Any, tmp_path: Path) -> None:
    pictures = script["pictures"]
    drawn = {"identities": 4, "cameras": 2, "images_per_camera": 1}

    def folder(**more: Any) -> Path:
        return pictures.set_folder(script["run"].build(script["run"].ReidRun, {
            "runs": str(tmp_path), "name": "a", "rendered": drawn, **more}, "the test"))

    first, second, third = folder(), folder(seed=1), folder(image_size=72)
    assert first == tmp_path / "a-vehicles"  # where earlier releases drew it
    assert len({first, second, third}) == 3
    assert (folder(), folder(seed=1), folder(image_size=72)) == (first, second, third)
    assert [drawn_with(f)["seed"] for f in (first, second, third)] == [0, 1, 0]
    assert [drawn_with(f)["size"] for f in (first, second, third)] == [64, 64, 72]
    (tmp_path / "b-vehicles").mkdir()
    (tmp_path / "b-vehicles" / "letter.txt").touch()
    with pytest.raises(InputError, match="something else"):
        folder(name="b")


def _result(script: Any) -> dict[str, Any]:
    """As `result.json` has it, with numbers that tell where each of them went."""

    def leak(rate: float) -> dict[str, Any]:
        row = {"rate": rate, "chance": 0.05, "count": 9, "attack": "rmle", "reader": "own"}
        return {"rows": [row, {**row, "rate": 0.0}], "strongest": row}

    def about(k: float) -> dict[str, Any]:
        record = {"subject": "edge", "attack": "rmle", "attack_seed": 0, "ssim": k,
                  "ssim_worst5": k + 0.01}
        named = {"map": k / 2, "rank1": k / 3, "attack": "rmle"}
        direct = {"map": k / 4, "rank1": k / 5, "attack": "the upload itself, pooled"}
        return {
            "retrieval": {"map": 0.9 - k / 10, "rank1": 0.95, "minp": 0.5},
            "edge_macs": 36_500_000, "feature_bytes": 131_072,
            "audit": {"strongest": record, "floor": {"ssim": 0.1, "ssim_worst5": 0.2},
                      "records": [record, {**record, "subject": "floor"}], "flags": ["odd"],
                      "leaks": {"plates": leak(k), "characters": leak(k), "scenes": leak(k),
                                "identification": {"rows": [named, direct], "strongest": named}}},
        }

    best = {"map": 0.97, "rank1": 0.98}
    read = {"strongest": {"rate": 0.99}}
    return {
        "methods": {"dense": about(0.8), "taylor": about(0.7), "patrol": about(0.3)},
        "originals": {"plates": read, "characters": read, "scenes": read,
                      "identification": {"strongest": best,
                                         "chance": {"map": 0.02, "rank1": 0.01}}},
        "settings": {"name": "<b>", "model": "small_resnet", "attackers": {"examples": 2,
                                                                           "seeds": [0]}},
        "plan": {"at": "layer2"},
        "data": {"layout": "veri-776", "counts": {
            "query": 3, "gallery": 6, "test_identities": 3, "victims": 3, "inverter": 9,
            "reader": 3}},
    }


def test_the_page_shows_each_row_with_its_plates_and_numbers(script: Any, tmp_path: Path) -> None:
    page, result = script["page"], _result(script)
    victims = _pictures(script, 3)
    victims.truth.boxes[:] = torch.tensor([[2.0, 3.0], [9.0, 3.0], [9.0, 6.0], [2.0, 6.0]])
    shown = victims.images.permute(0, 2, 3, 1).numpy()
    audits = {m: AuditReport([], examples={"edge": shown}) for m in result["methods"]}
    page.write_page(result, audits, victims, tmp_path / "index.html")
    html = (tmp_path / "index.html").read_text()
    assert html.count("data:image/png") == 2 * 2 * 4  # two pictures and plates in four rows
    assert "never saw in training" in html
    assert "<b>" not in html.split("<style>")[0] and "odd" in html
    assert "-4.0 points" not in page.headline(result)
    assert "+4.0 points of mAP" in page.headline(result)
    assert "30.0% instead of 70.0%" in page.headline(result)
    cells = {row["label"]: row["cells"] for row in page.comparison(result)}
    assert cells["Plates read, whole"] == ["80.0%", "70.0%", "30.0%", "99.0%", "5.0%"]
    assert cells["Likeness of rebuilt pictures, SSIM"] == [
        "0.800", "0.700", "0.300", "1.000", "0.100"]
    on_plates = "… on the plates alone"
    assert on_plates not in cells  # nobody asked
    for about in result["methods"].values():
        for record in about["audit"]["records"]:
            record["private_ssim"] = record["ssim"] / 2
    cells = {row["label"]: row["cells"] for row in page.comparison(result)}
    assert cells[on_plates] == ["0.400", "0.350", "0.150", "1.000", "0.400"]
    shown = page.attack_rows(result)
    assert [r["plates"] for r in shown[::2]] == [0.8, 0.7, 0.3]
    assert [r["named"] for r in shown] == [0.4, 0.2, 0.35, 0.175, 0.15, 0.075]
    assert shown[1]["attack"] == "the upload itself" and shown[1]["ssim"] is None
    assert "nothing to find" not in html and "Note" not in html
    assert script["run"].table(result).caption is None
    result["data"]["closed"] = True
    page.write_page(result, audits, victims, tmp_path / "index.html")
    assert "never saw" not in (tmp_path / "index.html").read_text()
    assert "with other pictures" in (tmp_path / "index.html").read_text()
    result["data"]["copies"], result["notes"] = 4, ["4 of the 9 pictures."]
    for about in result["methods"].values():
        about["retrieval"].update(queries=2, without_match=1)
    page.write_page(result, audits, victims, tmp_path / "index.html")
    html = (tmp_path / "index.html").read_text()
    assert "with other pictures" not in html and "trained on 4 of these" in html
    assert "<li>4 of the 9 pictures.</li>" in html
    told = "mAP over 2 queries; 1 have nothing to find."
    assert told in html and script["run"].table(result).caption == told
    for kind in ("plates", "characters", "scenes"):  # a set without plates has no such rows
        for about in result["methods"].values():
            del about["audit"]["leaks"][kind]
    assert "Plates read, whole" not in {row["label"] for row in page.comparison(result)}
    assert "plates" not in page.headline(result)
    assert page.plate_box([[2, 3], [12, 3], [12, 8], [2, 8]]) == pytest.approx(
        (0.8, 2.4, 13.2, 8.6))


def test_uploads_below_ten_kib_have_three_digits(script: Any) -> None:
    told = [script["page"].kib(count) for count in (512, 3, 1536, 9_999, 10_240, 131_072)]
    assert told == ["0.5 KiB", "0.00293 KiB", "1.5 KiB", "9.76 KiB", "10 KiB", "128 KiB"]


@pytest.mark.slow
def test_the_whole_path_and_again_from_where_it_stopped(script: Any, tmp_path: Path,
                                                        capsys: Any) -> None:
    main, runs = script["run"].main, ["--runs", str(tmp_path)]
    assert main([*TINY, *runs]) == 0
    told = capsys.readouterr().out
    assert "Plates read, whole" in told and "PATROL" in told
    run = tmp_path / "tiny"
    result = json.loads((run / "result.json").read_text())
    budget = result["plan"]["budget"]
    assert list(result["methods"]) == ["dense", "taylor", "patrol"]
    for method, about in result["methods"].items():
        assert 0 <= about["retrieval"]["map"] <= 1
        assert (about["edge_macs"] <= budget) is (method != "dense")
        for kind in ("plates", "characters", "scenes"):
            rows = about["audit"]["leaks"][kind]["rows"]
            assert len(rows) == 2 * 5 + 1  # two attacks, five readers, and the upload
            best = about["audit"]["leaks"][kind]["strongest"]
            assert best["rate"] == max(row["rate"] for row in rows)
    assert result["originals"]["identification"]["chance"]["map"] < 1
    page = (run / "index.html").read_text()
    assert page.count("data:image/png") == 2 * 3 * 4  # picture and plate, three of each row
    before = (run / "manifest.json").read_text()
    (run / "index.html").unlink()
    assert main([*TINY, *runs]) == 0  # the last stage alone
    assert (run / "index.html").read_text() == page
    assert json.loads(before)["stages"].keys() == json.loads(
        (run / "manifest.json").read_text())["stages"].keys()
    assert main([*TINY, *runs, "--seed", "1"]) == 2
    assert "another run" in capsys.readouterr().err
    assert main([*TINY, *runs, "--seed", "1", "--overwrite"]) == 0
    anew = json.loads((run / "result.json").read_text())
    assert (anew["settings"]["seed"], anew["data"]["digest"] == result["data"]["digest"]) == (
        1, False)


@pytest.mark.slow
def test_dropout_stands_behind_patrols_edge_alone(script: Any, tmp_path: Path) -> None:
    more = ["--privacy.dropout", "0.5", "--attackers.uploads", "3", "--compare", "false"]
    assert script["run"].main([*TINY, *more, "--runs", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "tiny" / "result.json").read_text())
    uploads = {method: about["audit"]["strongest"]["uploads"]
               for method, about in result["methods"].items()}
    assert uploads == {"dense": 1, "patrol": 3}
    page = (tmp_path / "tiny" / "index.html").read_text()
    assert "50% of its upload dropped" in page and "3 uploads of every picture" in page


@pytest.mark.parametrize(("more", "told"), [
    (("--bits", "0"), "bits from 1 to 16"), (("--bits", "17"), "bits from 1 to 16"),
])
def test_bits_that_cannot_be_are_refused(script: Any, tmp_path: Path, capsys: Any,
                                         more: tuple[str, ...], told: str) -> None:
    assert script["run"].main([*TINY, *more, "--runs", str(tmp_path / "runs")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@dataclass
class Folder:
    """As much of a run's folder as keeps a split."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name


def test_dropout_stands_behind_the_rounding_of_patrols_edge_alone(
    script: Any, tmp_path: Path
) -> None:
    model = build_model("small_resnet", 3, image_size=32).eval()
    split = pp.Split(model, torch.zeros(1, 3, 32, 32), at="layer1")
    x = torch.rand(8, 3, 32, 32)
    sending = pp.make_defence("quantisation", 2).apply(split, calibration=x)
    config = script["stages"].ReidRun(bits=2, privacy=PrivacyConfig(dropout=0.5))
    work = script["stages"].Work(config, Folder(tmp_path), lambda *_: None,
                                 SimpleNamespace(normalization=pp.Normalization.imagenet()))
    work.factory = lambda: build_model("small_resnet", 3, image_size=32)
    for method in ("dense", "taylor", "patrol"):
        work.save(work.dropping(split if method == "dense" else sending, method), method)
    whole = sending.edge(x)
    assert torch.equal(work.finished("taylor").edge(x), whole)
    assert torch.equal(work.finished("dense").edge(x), split.edge(x))
    dropped = work.finished("patrol").edge(x)
    assert bool(((dropped == 0) | (dropped == 2 * whole)).all())
    kept = (dropped != 0).float().mean() / (whole != 0).float().mean()
    assert float(kept) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("bits", "dropout", "kept"), [
    (2, 0.0, ("quantisation",)), (2, 0.5, ("quantisation", "feature_dropout")),
    (None, 0.5, ("feature_dropout",)), (None, 0.0, ()),
])
def test_what_was_trained_is_what_is_saved(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int | None, dropout: float,
    kept: tuple[str, ...],
) -> None:
    stages, trained = script["stages"], []
    split = pp.Split(build_model("small_resnet", 3, image_size=32).eval(),
                     torch.zeros(1, 3, 32, 32), at="layer1")
    monkeypatch.setattr(stages, "pruned", lambda *_: ({}, []))
    monkeypatch.setattr(stages.pp, "recalibrate_batchnorm", lambda *_, **more: None)
    monkeypatch.setattr(stages.Work, "load", lambda *_: split)
    monkeypatch.setattr(stages.Work, "batches", lambda *_, **more: None)
    monkeypatch.setattr(stages.Work, "measure", lambda *_: {
        "retrieval": {"map": 0.5, "rank1": 0.5}})
    monkeypatch.setattr(stages.Work, "train", lambda _, sending, *more, **terms: (
        trained.append(sending.defence) or []))
    config = stages.ReidRun(bits=bits, privacy=PrivacyConfig(dropout=dropout))
    folder = Folder(tmp_path)
    folder.notes = lambda stage: {"budget": 1}
    folder.finish = lambda *_, **more: None
    defender = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4), ("a",))
    work = stages.Work(config, folder, lambda *_: None, SimpleNamespace(
        normalization=pp.Normalization.imagenet(), defender=defender))
    work.do_pruned("patrol")
    assert read_info(tmp_path / "checkpoints/patrol").defences == kept
    assert [getattr(d, "name", None) for d in trained[-1:]] == [*(kept or (None,))][-1:]


@pytest.mark.parametrize(("bits", "dropout", "refused"), [
    (2, 0.0, {"taylor", "patrol"}), (None, 0.5, {"patrol"}), (None, 0.0, set()),
])
def test_a_model_that_an_earlier_release_saved_without_its_rounding_is_not_attacked(
    script: Any, tmp_path: Path, bits: int | None, dropout: float, refused: set[str],
) -> None:
    split = pp.Split(build_model("small_resnet", 3, image_size=32), torch.zeros(1, 3, 32, 32),
                     at="layer1")
    config = script["stages"].ReidRun(bits=bits, privacy=PrivacyConfig(dropout=dropout))
    work = script["stages"].Work(config, Folder(tmp_path), lambda *_: None,
                                 SimpleNamespace(normalization=pp.Normalization.imagenet()))
    work.factory = lambda: build_model("small_resnet", 3, image_size=32)
    for method in ("dense", "taylor", "patrol"):
        work.save(split, method)
        if method in refused:
            with pytest.raises(RunDirectoryError, match=f"a model of {method} that rounds or"):
                work.finished(method)
        else:
            assert work.finished(method).defence is None


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_both_pruned_models_send_few_bits_and_are_trained_and_attacked_so(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    package, attacked = script["stages"].pp, []
    audit = package.audit

    def watched(split: Any, images: Any, *rest: Any, **more: Any) -> Any:
        z = split.edge.eval()(torch.rand(4, 3, 64, 64)).transpose(0, 1).flatten(1)
        attacked.append(max(len(channel.unique()) for channel in z))
        return audit(split, images, *rest, **more)

    monkeypatch.setattr(package, "audit", watched)
    more = ["--bits", "2", "--rounded.epochs", "1", "--rounded.surrogate_warmup_steps", "2",
            "--swap-plates", "true", "--finetune.distill-weight", "0",
            "--privacy.dropout", str(dropout)]
    assert script["run"].main([*TINY, *more, "--runs", str(tmp_path)]) == 0
    run = tmp_path / "tiny"
    result = json.loads((run / "result.json").read_text())
    assert attacked[0] > 4 and max(attacked[1:]) <= 4 and len(attacked) == 3
    sizes = {method: about["feature_bytes"] for method, about in result["methods"].items()}
    assert sizes["dense"] == 16 * sizes["taylor"] == 16 * sizes["patrol"]
    page = (run / "index.html").read_text()
    assert "send 2 bits for every value" in page and "carry other vehicles" in page
    assert ("dropout stands behind that" in page) is (dropout > 0)
    for method in ("taylor", "patrol"):
        about = result["methods"][method]
        assert len(about["history_rounded"]) == 1
        split = pp.load(run / "checkpoints" / method, lambda: pp.build_reid_model(
            "small_resnet", identities=result["data"]["counts"]["identities"], image_size=64))
        names = read_info(run / "checkpoints" / method).defences
        drops = method == "patrol" and dropout > 0
        assert names == ("quantisation", "feature_dropout")[: 1 + drops]
        x = torch.rand(4, 3, 64, 64)
        z = split.edge(x)
        assert all(len(channel.unique()) <= 4 + drops for channel in z.transpose(0, 1).flatten(1))
        plain = split if not drops else split.undefended
        assert torch.equal(plain.edge.upload(plain.undefended.edge(x)), plain.edge(x))
