"""How many channels the pruned models send, in the vehicles' script."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

import patrol_prune as pp
from patrol_prune.errors import InputError

FOLDER = Path(__file__).resolve().parent.parent / "integrations" / "vehicle_reid"
X = torch.zeros(1, 3, 32, 32)


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The modules of the script, imported as it imports them."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        import beginning
        import pruning
        import run
        import settings

        yield {"run": run, "pruning": pruning, "beginning": beginning, "settings": settings}
    finally:
        sys.path.remove(str(FOLDER))
        for name in {path.stem for path in FOLDER.glob("*.py")} - before:
            sys.modules.pop(name, None)


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


def test_those_of_the_highest_scores_are_sent(script: Any) -> None:
    config = script["settings"].ReidRun(at="layer3", upload_channels=3)
    split = pp.Split(model(), X, at="layer3")
    best = [5, 20, 41]
    layers = dict(split.model.named_modules())
    producers = [layer for name, layer in layers.items() if isinstance(layer, nn.Conv2d)
                 and name.startswith("layer3") and layer.out_channels == 64]
    for layer in producers:
        layer.weight.data[best] *= 100.0
    before = [layer.weight.detach().clone() for layer in producers]
    pruner = script["pruning"].pruner_of(
        config, split, pp.edge_macs(split), magnitude(split), boundary="prune")
    assert script["pruning"].narrow(split, pruner, 3) == {"layer3.0.downsample.0": (3, 64)}
    sent = [(was, layer.weight) for was, layer in zip(before, producers, strict=True)
            if layer.out_channels == 3]
    assert len(sent) == 3  # the shortcut and each block's last convolution write what is sent
    for was, now in sent:
        assert torch.equal(now, was[best])


def test_without_it_every_channel_is_sent(script: Any) -> None:
    config = script["settings"].ReidRun(at="layer3")
    split = pp.Split(model(), X, at="layer3")
    kept, _ = script["pruning"].pruned(config, split, pp.edge_macs(split) // 2, magnitude)
    assert split.feature_shape == (64, 8, 8) and "layer3.0.downsample.0" not in kept


@pytest.mark.parametrize(("channels", "told"), [(64, "fewer upload_channels than the 64"),
                                                (999, "Give fewer")])
def test_a_number_that_leaves_all_is_refused_before_any_training(script: Any, channels: int,
                                                                 told: str) -> None:
    config = script["settings"].ReidRun(at="layer3", upload_channels=channels)
    with pytest.raises(InputError, match=told):
        script["pruning"].check_upload_channels(config, model(), X, "layer3")
    with pytest.raises(InputError, match="at least 1"):
        script["settings"].ReidRun(upload_channels=0)
