"""A run that is told where its images are private: pruned, trained and attacked for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from patrol_prune.attacks import InverseNetworkConfig
from patrol_prune.cli import main
from patrol_prune.errors import InputError
from patrol_prune.finetune import FinetuneConfig
from patrol_prune.pipeline import RunResult, run
from patrol_prune.preparation import fresh_model, private_regions, read_images
from patrol_prune.reaudit import audit_again
from patrol_prune.run_objectives import scoring_objective, training_objective
from patrol_prune.settings import AuditConfig, RunConfig, ScoreConfig
from patrol_prune.split import Split

CORNER = "private_run_for_test:corner"
DETECTORS = """
import torch
def corner(pixels):
    mask = torch.zeros_like(pixels[:, :1])
    mask[..., :5, :7] = 1.0
    return mask
def blind(pixels):
    return torch.zeros_like(pixels[:, :1])
def logits(pixels):
    return pixels[:, :1] - 0.5
"""


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, write_folder: Callable[..., Path]
) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"), parts=("train", "val"), count=18)


@pytest.fixture(autouse=True)
def detectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "private_run_for_test.py").write_text(DETECTORS)
    monkeypatch.syspath_prepend(str(tmp_path))


def tiny(folder: Path, runs: Path, **more: object) -> RunConfig:
    config = RunConfig(
        data=str(folder), edge_macs="0.5", at="layer2", model="small_resnet", image_size=16,
        name="a", runs=str(runs), batch_size=8, device="cpu", private=CORNER, private_share=0.75,
        train=FinetuneConfig(epochs=1, distill_weight=0.0),
        score=ScoreConfig(batches=1, surrogate_steps=1),
        finetune=FinetuneConfig(epochs=1, surrogate_warmup_steps=1, inner_steps=1),
        audit=AuditConfig(attacks=("linear_inverse",), victims=8, attacker_share=0.5, examples=2),
        attacker=InverseNetworkConfig(width=4, depth=0, epochs=1, max_extensions=0),
    )
    return replace(config, **more)


@pytest.fixture
def finished(folder: Path, tmp_path: Path) -> RunResult:
    return run(tiny(folder, tmp_path / "runs"))


def test_a_run_tells_what_is_seen_of_private_regions(
    finished: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [r for r in finished.audit.records if r["subject"] == "edge"]
    assert {r["attack"] for r in rows} == {"linear_inverse", "aimed_ssim"}
    assert finished.audit.setup["private_share"] == 0.75
    page = finished.report.read_text()
    assert "SSIM within private regions" in page and ">private</th>" in page
    # the folder's detector is imported where it is named alone
    with pytest.raises(InputError, match=r"detector of the run in .*say so: --private private_run"):
        audit_again(finished.directory)
    assert main(["audit", str(finished.directory), "--private", "other:corner"]) == 2
    assert "the detector of the run" in capsys.readouterr().err
    again = audit_again(finished.directory, private=CORNER, seeds=(1,))
    assert {r["attack_seed"] for r in again.audit.records if r["attack"] == "aimed_ssim"} == {1}
    assert any(f"--private {CORNER}" in note for note in again.summary.notes)


def test_scores_and_training_count_them_more(folder: Path, tmp_path: Path) -> None:
    config = tiny(folder, tmp_path)
    images = read_images(config)
    split = Split(fresh_model(config, 3), images.example(), at="layer2")
    made = [scoring_objective(config, split, images.normalization),
            training_objective(config, split, images.normalization, "fp32")]
    pixels = images.defender.pixels([0, 1])
    for objective in made:
        assert objective.private is not None and objective.private.share == 0.75
        weights = objective.private.weights(pixels)
        assert weights[..., :5, :7].sum((1, 2, 3)).tolist() == pytest.approx(
            [256 * (0.75 + 0.25 * 35 / 256)] * 2)
    assert private_regions(replace(config, private=None, private_share=0.5)) is None


@pytest.mark.parametrize(("more", "told"), [
    ({"private": "private_run_for_test:blind"}, "private regions in some of the 8 victims"),
    ({"private": "private_run_for_test:logits"}, "no logits"),
    ({"private": "private_run_for_test:none"}, "has no function 'none'"),
    ({"private": "corner"}, "a detector of your own as module:function"),
])
def test_a_detector_of_no_use_costs_no_run(
    folder: Path, tmp_path: Path, more: dict[str, str], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        run(tiny(folder, tmp_path / "runs", **more))
    assert not (tmp_path / "runs").exists()


def test_a_detector_that_is_blind_on_training_images_costs_no_run(
    folder: Path, tmp_path: Path
) -> None:
    config = tiny(folder, tmp_path / "runs")
    victims = read_images(config).victims.float().mean((1, 2, 3)) / 255.0
    (tmp_path / "victims_for_test.py").write_text(
        f"import torch\nmeans = {victims.tolist()}\ndef find(pixels):\n"
        "    far = (pixels.mean((1, 2, 3)).view(-1, 1) - torch.tensor(means)).abs()\n"
        "    known = (far.min(1).values < 1e-5).float()\n"
        "    return known.view(-1, 1, 1, 1).expand_as(pixels[:, :1])\n")
    with pytest.raises(InputError, match="in some of 27 training images, came none"):
        run(replace(config, private="victims_for_test:find"))


def test_shares_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--private beside --private-share"):
        tiny(folder, tmp_path, private=None)
    with pytest.raises(InputError, match="share as a number above 0 and up to 1, came 0"):
        tiny(folder, tmp_path, private_share=0.0)
