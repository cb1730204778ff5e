"""Settings check themselves and survive a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from patrol_prune.audit_model import ModelAudit
from patrol_prune.errors import InputError
from patrol_prune.plain_settings import build
from patrol_prune.settings import (
    AuditConfig,
    PrivacyConfig,
    RunConfig,
    ScoreConfig,
    resolve_device,
)

CHANGED = RunConfig(
    data="photos", edge_macs="0.5", at="layer2", weights=None, image_size=64, seed=3,
    score=ScoreConfig(round_to=8, lip_weight=0.0),
    privacy=PrivacyConfig(alpha=0.1, lipschitz_form="spectral"),
    audit=AuditConfig(seeds=(0, 1, 2), attacker_images=(100, 1000), check_attacks=True),
)


@pytest.mark.parametrize("config", [RunConfig("photos", "9.9M"), CHANGED])
def test_a_file_gives_the_same_settings_back(tmp_path: Path, config: RunConfig) -> None:
    config.to_yaml(tmp_path / "c.yaml")
    assert RunConfig.from_yaml(tmp_path / "c.yaml") == config


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHANGED.seed = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_sise": 64}, r"unknown setting 'image_sise'.*Did you mean: image_size"),
        ({"score": {"batch": 1}}, r"score has an unknown setting 'batch'.*Did you mean: batches"),
        ({"image_size": "big"}, "image_size: expected int, came 'big'"),
        ({"seed": True}, "seed: expected int, came True"),
        ({"image_size": 8}, "at least 16 pixels, came 8"),
        ({"batch_size": 1}, "at least 2, for BatchNorm"),
        ({"name": "../elsewhere"}, "plain folder name"),
        ({"name": ""}, "plain folder name"),
        ({"boundary": "cut"}, "keep, prune, came 'cut'"),
        ({"feature_channels": 4}, "feature_channels=4, came 'keep'. Give boundary='prune'"),
        ({"boundary": "prune", "feature_channels": 0}, "feature_channels as a whole number"),
        ({"bits": 0}, "bits from 1 to 16, came 0"),
        ({"bits": 2.5}, "bits: expected int, came 2.5"),
        ({"bits": 2, "privacy": {"alpha": 0.1}}, r"privacy\.alpha=0 beside bits .* came 0\.1"),
        ({"normalization": "imagent"}, "came 'imagent'"),
        ({"score": {"batches": 0}}, "at least one calibration batch"),
        ({"score": {"task_weight": 0, "lip_weight": 0, "adv_weight": 0}}, "one of them positive"),
        ({"score": {"steps": 0}}, r"score\.steps"),
        ({"score": {"task_change": "third_order"}}, "second_order, absolute, came 'third_order'"),
        ({"score": {"head_unit": "rows"}}, "score.head_unit.* heads, dimensions, came 'rows'"),
        ({"score": {"round_to": 0}}, "round_to as a whole number of at least 1 or None, came 0"),
        ({"score": {"min_channels": 0}}, "min_channels as a whole number of at least 1"),
        ({"score": {"max_pruning_ratio": 1.5}}, r"max_pruning_ratio in \(0, 1\], came 1.5"),
        ({"score": {"max_pruning_ratio": 0.0}}, r"max_pruning_ratio in \(0, 1\]"),
        ({"privacy": {"surrogates": "larg"}}, "surrogates out of usual, large, came 'larg'"),
        ({"privacy": {"surrogate_loss": "ssim"}}, r"auto, mse, mse\+ssim, came 'ssim'"),
        ({"seed": -1}, r"seed in \[0, 2\*\*63\), came -1"),
        ({"seed": 2**63}, r"seed in \[0, 2\*\*63\)"),
        ({"audit": {"seeds": [0, -3]}}, r"audit\.seeds in .*came -3"),
        ({"privacy": {"beta": -1}}, r"privacy\.beta"),
        ({"privacy": {"dropout": 1.0}}, r"privacy\.dropout in \[0, 1\)"),
        ({"privacy": {"dropout": 0.5, "alpha": 0.1}}, r"privacy\.alpha=0 beside it"),
        ({"audit": {"uploads": 0}}, r"audit\.uploads as a whole number"),
        ({"privacy": {"lipschitz_form": "spectrl"}}, "paper, spectral, came 'spectrl'"),
        ({"audit": {"attacks": ["inverse_netwrk"]}}, "Did you mean: inverse_network"),
        ({"audit": {"seeds": [1, 1]}}, "different audit.seeds"),
        ({"audit": {"attacks": ["rmle", "rmle"]}}, "different audit.attacks"),
        ({"audit": {"victims": 1}}, "audit.victims of at least 2"),
        ({"audit": {"attacker_share": 1.0}}, "attacker_share"),
        ({"audit": {"attacker_images": [10]}}, r"at least 20 as audit\.attacker_images"),
        ({"audit": {"attacker_images": [50, 50]}}, "different numbers"),
        ({"audit": {"check_attacks": 1}}, "check_attacks: expected bool, came 1"),
        ({"finetune": {"lr": 0}}, "lr"),
        ({"attacker": {"family": "residul"}}, "Did you mean: residual"),
        ({"data": ""}, "Expected a folder of images"),
        ({"edge_macs": " "}, "Expected a budget"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = {"data": "photos", "edge_macs": "9.9M", **change}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=message):
        RunConfig.from_yaml(tmp_path / "c.yaml")


def test_missing_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: photos\n")
    with pytest.raises(InputError, match=r"c\.yaml lacks edge_macs"):
        RunConfig.from_yaml(tmp_path / "c.yaml")


def test_numbers_may_stand_for_words_and_whole_numbers_for_fractions(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: photos\nedge_macs: 0.5\nprivacy: {beta: 3}\n")
    config = RunConfig.from_yaml(tmp_path / "c.yaml")
    assert config.edge_macs == "0.5"
    assert config.privacy == PrivacyConfig(beta=3.0)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2E+1", 20.0), ("-0e1", 0.0)])
def test_exponents_are_numbers_though_yaml_takes_them_for_text(
    tmp_path: Path, text: str, value: float
) -> None:
    (tmp_path / "c.yaml").write_text(f"data: x\nedge_macs: 1M\nprivacy:\n  beta: {text}\n")
    assert RunConfig.from_yaml(tmp_path / "c.yaml").privacy.beta == value


def test_a_tilde_in_a_path_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "c.yaml").write_text(
        "data: ~/photos\nedge_macs: 0.5\nruns: ~/runs\nweights: ~/w.safetensors\nname: ~a\n")
    config = RunConfig.from_yaml(tmp_path / "c.yaml")
    assert (config.data, config.runs, config.weights, config.name) == (
        "/home/me/photos", "/home/me/runs", "/home/me/w.safetensors", "~a")
    audit = build(ModelAudit, {"model": "m:f", "at": "x", "data": "~", "out": "~/a.json"}, "here")
    assert (audit.data, audit.out) == ("/home/me", "/home/me/a.json")


@pytest.mark.parametrize(("group", "name", "value"), [
    ("attacker", "epochs", 0), ("attacker", "batch_size", 0), ("rmle", "steps", 0),
    ("finetune", "lr", 0.0), ("audit", "victims", 1), ("audit", "attacker_share", 2.0)])
def test_a_setting_out_of_range_is_named_with_its_group(
    group: str, name: str, value: float
) -> None:
    with pytest.raises(InputError, match=rf"\b{group}\.{name}\b|^{group}: .*\b{name}\b"):
        build(RunConfig, {"data": "x", "edge_macs": "1M", group: {name: value}}, "a: file")


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected


@pytest.mark.parametrize("name", ["banana", "cuda:99", "meta", "cpu:x", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match=r"is not there .*Here are: cpu"):
        resolve_device(name)


def test_structures_are_checked() -> None:
    assert ScoreConfig(structures="both").structures == "both"
    with pytest.raises(InputError, match="channels, blocks, both, came 'block'"):
        ScoreConfig(structures="block")  # type: ignore[arg-type]
