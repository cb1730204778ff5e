"""Settings of a search: checked, kept in a file, and turned into runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from patrol_prune import tune_space
from patrol_prune.errors import BudgetError, InputError
from patrol_prune.finetune import FinetuneConfig
from patrol_prune.models import build_model
from patrol_prune.settings import AuditConfig, PrivacyConfig, RunConfig, ScoreConfig
from patrol_prune.tune_settings import (
    Point,
    TuneConfig,
    dense_config,
    full_config,
    trial_config,
)
from patrol_prune.tune_space import Candidate, Space, search_space

CHANGED = TuneConfig(
    data="photos", edge_macs="200M", trials=7, timeout=60.0, storage="sqlite:///study.db",
    splits=("layer1", "layer2"), beta_range=(1.0, 10.0), alpha_choices=(0.1,), min_accuracy=0.8,
    max_feature_bytes=4096, trial_attacks=("linear_inverse",), seed=3,
)
UPLOADS = TuneConfig("photos", "9.9M", boundary="prune", feature_channels_choices=(None, 16, 8),
                     bits_choices=(None, 4, 2), alpha_choices=(0.0,))


@pytest.mark.parametrize("config", [TuneConfig("photos", "9.9M"), CHANGED, UPLOADS])
def test_a_file_gives_the_same_settings_back(tmp_path: Path, config: TuneConfig) -> None:
    config.to_yaml(tmp_path / "c.yaml")
    assert TuneConfig.from_yaml(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 0}, "at least one trial"),
        ({"feature_channels_choices": [8]}, "boundary to let channels"),
        ({"boundary": "prune", "feature_channels_choices": [8, 0]}, "at least 1 or None, came 0"),
        ({"boundary": "prune", "feature_channels": 8, "feature_channels_choices": [4]},
         "feature_channels left out beside them, came \\(4,\\) and 8"),
        ({"bits": 2}, "alpha_choices of 0 alone beside bits"),
        ({"bits_choices": [None, 2]}, "alpha_choices of 0 alone beside bits"),
        ({"bits_choices": None}, "bits_choices as a list, came None"),
        ({"bits_choices": [2, 2], "alpha_choices": [0.0]}, "different numbers"),
        ({"bits_choices": [17], "alpha_choices": [0.0]}, "from 1 to 16, came 17"),
        ({"timeout": 0}, "more than 0 seconds"),
        ({"storage": " "}, "URL or a path"),
        ({"splits": ["auto", "layer1"]}, "auto alone"),
        ({"splits": []}, "different names"),
        ({"most_splits": 0}, "most_splits"),
        ({"max_channel_ratio": 1.0}, "max_channel_ratio"),
        ({"beta_range": [0, 1]}, "0 < least <= largest, came"),
        ({"beta_range": [5]}, "beta_range"),
        ({"beta_range": [5, float("inf")]}, "beta_range"),
        ({"budget_range": [0.5, 1.5]}, "largest <= 1"),
        ({"alpha_choices": []}, "alpha_choices"),
        ({"alpha_choices": [-1.0]}, "alpha_choices"),
        ({"privacy": {"dropout": 0.5}}, "alpha_choices of 0 alone"),
        ({"alpha_choices": [float("nan")]}, "alpha_choices"),
        ({"min_accuracy": 80}, "0.8 is 80%"),
        ({"max_accuracy_drop": -0.1}, "max_accuracy_drop"),
        ({"min_accuracy": 0.5, "max_accuracy_drop": 0.1}, "came both"),
        ({"max_feature_bytes": 0}, "max_feature_bytes"),
        ({"trial_attacks": ["rmel"]}, "Did you mean: rmle"),
        ({"trial_attacks": []}, "an attack to rank by"),
        ({"trial_victims": 1}, "2 victims"),
        ({"trial_epochs": -1}, "trial_epochs"),
        ({"trial_attack_epochs": 0}, "trial_attack_epochs"),
        ({"batch_size": 1}, "at least 2, for BatchNorm"),
        ({"trails": 3}, "Did you mean: trials"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": "x", "edge_macs": "1M", **change}))
    with pytest.raises(InputError, match=message):
        TuneConfig.from_yaml(tmp_path / "c.yaml")


def test_a_weight_that_is_searched_all_the_same_is_named_with_what_fixes_it() -> None:
    assert CHANGED.unused() == []
    given = replace(CHANGED, privacy=PrivacyConfig(alpha=0.5, beta=40.0))
    fixed = replace(given, alpha_choices=(0.5,), beta_range=(40.0, 40.0))
    assert fixed.unused() == [], "these values alone are tried"
    (none,) = replace(CHANGED, privacy=PrivacyConfig(beta=0.0)).unused()
    assert "--beta-range" not in none, "which the search would refuse"
    alpha, beta = given.unused()
    assert "privacy.alpha 0.5 is not used" in alpha and "[0.1]" in alpha
    assert "privacy.beta 40 is not used" in beta and "[1.0, 10.0]" in beta
    for sentence, name in ((alpha, "alpha_choices"), (beta, "beta_range")):
        value = yaml.safe_load(sentence.split(f"--{name.replace('_', '-')} ")[1].strip("'."))
        fixed = replace(given, **{name: tuple(map(float, value))})
        assert set(getattr(fixed, name)) == {getattr(given.privacy, name.partition("_")[0])}


def test_a_trial_is_the_full_run_made_short() -> None:
    config = TuneConfig(
        "photos", "9.9M", seed=4, batch_size=16, trial_epochs=2, trial_victims=30,
        audit=AuditConfig(seeds=(5, 6), attacker_images=(50,), attacker_share=0.2),
    )
    point = Point("layer2", 1234, beta=9.0, alpha=0.5)
    trial = trial_config(config, point, Path("d.safetensors"), Path("runs/tune/trials/0003"))
    assert type(trial) is RunConfig
    assert (trial.runs, trial.name) == ("runs/tune/trials", "0003")
    assert (trial.at, trial.edge_macs, trial.weights) == ("layer2", "1234", "d.safetensors")
    assert (trial.privacy.beta, trial.privacy.alpha) == (9.0, 0.5)
    assert (trial.finetune.epochs, trial.attacker.epochs) == (2, config.trial_attack_epochs)
    assert trial.audit.seeds == (5,) and not trial.audit.undefended
    assert (trial.audit.victims, trial.audit.attacker_images) == (30, ())
    # Who owns which image depends on these.
    assert (trial.seed, trial.batch_size, trial.audit.attacker_share) == (4, 16, 0.2)
    # The pixels are normalised as the dense model was trained, not as ImageNet's.
    assert trial.normalization == "dataset"
    assert (trial.bits, trial.feature_channels) == (None, None)


def test_what_is_uploaded_is_the_points_and_never_the_dense_model_s() -> None:
    config = replace(UPLOADS, trial_epochs=2, rounded=FinetuneConfig(epochs=7))
    point = Point("layer2", 1234, beta=9.0, alpha=0.0, bits=2, feature_channels=8)
    dense, folder = Path("d.safetensors"), Path("runs/tune/trials/0003")
    trial = trial_config(config, point, dense, folder)
    assert (trial.bits, trial.feature_channels, trial.rounded.epochs) == (2, 8, 2)
    full = full_config(config, point, dense, "x")
    assert (full.bits, full.feature_channels, full.rounded.epochs) == (2, 8, 7)
    fixed = replace(UPLOADS, feature_channels_choices=(), bits_choices=(), bits=4,
                    feature_channels=16)
    assert (fixed.tried_bits, fixed.tried_channels) == ((4,), (16,))
    first = dense_config(fixed, point, Path("runs/tune"))
    assert (first.bits, first.feature_channels) == (None, None)


def test_every_setting_of_a_run_is_one_of_a_search() -> None:
    assert {f.name for f in fields(RunConfig)} <= {f.name for f in fields(TuneConfig)}
    assert CHANGED.run_config(name="x") == RunConfig("photos", "200M", name="x", seed=3)


@pytest.fixture(scope="module", autouse=True)
def planned_once() -> Iterator[None]:
    """Every search here is over one model: what is asked of it twice is worked out once."""
    known: dict[Any, Any] = {}

    def once(made: Callable[..., Any]) -> Callable[..., Any]:
        def call(model: nn.Module, example: torch.Tensor, **asked: Any) -> Any:
            key = (made, *sorted(asked.items()))
            if key not in known:
                known[key] = made(model, example, **asked)
            return known[key]

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_space, "plan", once(tune_space.plan))
        patch.setattr(tune_space, "split_points", once(tune_space.split_points))
        yield


def space(**settings: Any) -> Space:
    torch.manual_seed(0)
    config = TuneConfig("photos", **{"edge_macs": "layer2", "model": "small_resnet", **settings})
    return search_space(config, build_model("small_resnet", 3, image_size=16),
                        torch.rand(1, 3, 16, 16))


def test_auto_takes_the_deepest_places_that_fit_moderately() -> None:
    found = space()
    names = [c.name for c in found.candidates]
    assert names == ["layer1", "layer2", "layer3", "layer4"]
    assert found == space(splits=tuple(names))
    for candidate in found.candidates:
        assert candidate.least_edge_macs < candidate.most_edge_macs <= found.budget_edge_macs
    assert [c.name for c in space(most_splits=2).candidates] == names[-2:]
    with_parts = [c.name for c in space(most_splits=6).candidates]
    assert set(names) < set(with_parts) and len(with_parts) == 6
    assert "layer4" not in [c.name for c in space(max_channel_ratio=0.2).candidates]
    assert [c.name for c in space(at="layer1").candidates] == ["layer1"]
    assert space(edge_macs="0.5", at="layer2").budget_edge_macs == found.budget_edge_macs // 2


def test_a_place_has_to_send_each_of_the_widths_that_are_tried() -> None:
    wide = space(boundary="prune")
    assert not wide.narrowed and wide.edge_macs("layer2", 0.1) == wide["layer2"].edge_macs(0.1)
    found = space(boundary="prune", feature_channels_choices=(None, 16, 32))
    names = [place.name for place in found.candidates]
    # Of layer4's a quarter has to stay, and layer1 has fewer.
    assert names[-1] == "layer3" and not {"layer1", "layer4"} & set(names)
    assert [c.name for c in space(boundary="prune", feature_channels=16, most_splits=1).candidates
            ] == ["layer3"], "left out before they are counted"
    for place in found.candidates:
        few, more = (found.narrowed[place.name, n] for n in (16, 32))
        assert place.least_edge_macs <= few < more <= place.most_edge_macs
        assert found.edge_macs(place.name, 0.01, 32) == more
        assert found.edge_macs(place.name, 0.01) == place.least_edge_macs
        assert found.edge_macs(place.name, 1.0, 16) == place.most_edge_macs
    with_blocks = space(boundary="prune", feature_channels=16, splits=("layer3",),
                        score=ScoreConfig(structures="both"))
    assert with_blocks.narrowed["layer3", 16] < found.narrowed["layer3", 16]
    with pytest.raises(InputError, match=r"after layer4, .* 16 channels: .* 32 and 33"):
        space(boundary="prune", splits=("layer3", "layer4"), feature_channels=16)
    with pytest.raises(InputError, match="after layer3, it cannot send each of 32 channels"):
        space(boundary="prune", at="layer3", edge_macs="500000", feature_channels=32)


def test_a_width_that_is_not_there_or_sends_too_much_is_refused() -> None:
    with pytest.raises(InputError, match="after layer1, .* at most the 16 channels"):
        space(boundary="prune", splits=("layer1",), feature_channels=17)
    few = {"boundary": "prune", "splits": ("layer2",), "feature_channels": 8}
    least = 8 * 8 * 8 * 4
    assert space(max_feature_bytes=least, **few).candidates
    with pytest.raises(InputError, match=f"at least {least:,}, which 8 channels take with 32"):
        space(max_feature_bytes=least - 1, **few)
    with pytest.raises(InputError, match="at least 128, .* with 2 bits"):
        space(max_feature_bytes=127, bits_choices=(4, 2), alpha_choices=(0.0,), **few)


def test_the_limit_of_bytes_is_that_of_the_fewest_bits() -> None:
    with pytest.raises(InputError, match="layer1, 16,384 bytes"):
        space(splits=("layer1",), max_feature_bytes=2000)
    few = {"alpha_choices": (0.0,), "bits_choices": (None, 2), "splits": ("layer1",)}
    assert space(max_feature_bytes=2000, **few).candidates
    with pytest.raises(InputError, match="layer1, 1,024 bytes"):
        space(max_feature_bytes=1000, **few)


def test_shares_of_the_budget_are_counts_that_can_be_reached() -> None:
    candidate = Candidate("layer2", least_edge_macs=40, most_edge_macs=101)
    assert [candidate.edge_macs(share) for share in (1.0, 0.5, 0.1)] == [101, 50, 40]


def test_places_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="Did you mean: layer2"):
        space(splits=("layer1", "layr2"))
    with pytest.raises(InputError, match="Did you mean: layer2"):
        space(edge_macs="0.5", at="layr2")
    with pytest.raises(BudgetError, match="the least is"):
        space(max_feature_bytes=4)
    with pytest.raises(InputError, match="are uploaded, more than the 4"):
        space(splits=("layer1",), max_feature_bytes=4)
    with pytest.raises(BudgetError):
        space(edge_macs="10")
