"""How many channels the pruned models send, in the vehicles' script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

import patrol_prune as pp
from patrol_prune.errors import InputError

X = torch.zeros(1, 3, 32, 32)


@pytest.fixture(scope="module")
def script(import_vehicles: Callable[[str], ModuleType]) -> dict[str, Any]:
    """Modules of the script."""
    return {name: import_vehicles(name) for name in ("pruning", "settings", "stages")}


def model() -> nn.Module:
    return pp.build_reid_model("small_resnet", 7, image_size=32, seed=0)


def magnitude(split: pp.Split) -> Any:
    return tp.importance.GroupMagnitudeImportance(p=2)


def test_so_many_channels_are_sent_and_the_edge_meets_the_budget(script: Any,
                                                                tmp_path: Path) -> None:
    config = script["settings"].ReidRun(at="layer3", upload_channels=16)
    split = pp.Split(model(), X, at="layer3")
    budget = pp.edge_macs(split) // 2
    kept, history = script["pruning"].pruned(config, split, budget, magnitude)
    assert split.feature_shape == (16, 8, 8) and pp.edge_macs(split) <= budget
    assert kept["layer3.0.downsample.0"] == (16, 64)
    pp.save(split, tmp_path / "narrow", history=history)
    again = pp.load(tmp_path / "narrow", model)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.model.eval()(x), split.model.eval()(x))
    assert again.feature_shape == split.feature_shape
    assert len(history) == len(again.pruning_history)


def test_narrowing_alone_may_meet_the_budget(script: Any) -> None:
    config = script["settings"].ReidRun(at="layer3", upload_channels=2)
    split = pp.Split(model(), X, at="layer3")
    budget = int(0.9 * pp.edge_macs(split))
    kept, _ = script["pruning"].pruned(config, split, budget, magnitude)
    assert pp.edge_macs(split) < budget and split.feature_shape == (2, 8, 8)
    assert all(now == before for name, (now, before) in kept.items() if "layer3.0.d" not in name)


def test_taylor_scores_the_narrowed_model_by_its_own_gradients(script: Any) -> None:
    config = script["settings"].ReidRun(at="layer3", upload_channels=16)
    split = pp.Split(model(), X, at="layer3")
    generator = torch.Generator().manual_seed(0)
    batch = torch.rand(8, 3, 32, 32, generator=generator), torch.arange(8) // 2

    class Scoring(script["stages"].Work):
        def __init__(self) -> None:
            self.config, self.device = config, torch.device("cpu")

        def scoring_batches(self) -> Any:
            return iter([batch])

    work, seen = Scoring(), []

    def score(split: pp.Split) -> Any:
        importance = work.taylor(split)
        seen.append(split.model.layer1[0].conv1.weight.grad.clone())
        return importance

    script["pruning"].narrowing(config, split, score(split)).step()
    score(split)
    split.model.zero_grad(set_to_none=True)
    score(split)
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1])


def test_without_it_every_channel_is_sent(script: Any) -> None:
    config = script["settings"].ReidRun(at="layer3")
    split = pp.Split(model(), X, at="layer3")
    kept, _ = script["pruning"].pruned(config, split, pp.edge_macs(split) // 2, magnitude)
    assert split.feature_shape == (64, 8, 8) and "layer3.0.downsample.0" not in kept


def test_a_number_of_none_is_refused_before_the_run(script: Any) -> None:
    for wrong in (0, True, "16"):
        with pytest.raises(InputError, match="upload_channels as a whole number of at least 1"):
            script["settings"].ReidRun(upload_channels=wrong)


def test_a_cut_where_nothing_can_be_narrowed_is_refused_before_any_training(script: Any) -> None:
    class Raw(nn.Module):
        """Sends the picture itself, whose channels no layer gives."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = nn.Identity(), nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(self.first(x))

    config = script["settings"].ReidRun(upload_channels=2)
    with pytest.raises(InputError, match="feature_channels=2"):
        script["pruning"].check_upload_channels(config, Raw(), X, "first")
    script["pruning"].check_upload_channels(config, model(), X, "layer3")
