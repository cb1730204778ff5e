"""The layout that some processors cannot train a narrow strided shortcut in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from patrol_prune.attacks.shadow_training import layout_of
from patrol_prune.finetune import FinetuneConfig, finetune
from patrol_prune.precision import channels_last_is_safe


@pytest.mark.parametrize(
    "layer, safe",
    [
        (nn.Conv2d(6, 16, 1, stride=2), False),
        (nn.Conv2d(7, 16, 1, stride=(1, 2)), False),
        (nn.Conv2d(8, 16, 1, stride=2), True),
        (nn.Conv2d(6, 16, 1), True),
        (nn.Conv2d(6, 16, 3, stride=2), True),
    ],
)
def test_narrow_strided_pointwise_convolutions_stay_contiguous(
    layer: nn.Conv2d, safe: bool
) -> None:
    model = nn.Sequential(nn.Conv2d(3, layer.in_channels, 3), nn.ReLU(), layer)
    assert channels_last_is_safe(model) is safe
    expected = torch.channels_last if safe else torch.contiguous_format
    assert layout_of(model) is expected


def test_training_one_does_not_end_the_process() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3, padding=1)
            self.shortcut = nn.Conv2d(6, 16, 1, stride=2, bias=False)
            self.fc = nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.shortcut(torch.relu(self.stem(x)))
            return self.fc(h.mean((2, 3)))

    batches = [(torch.randn(16, 3, 16, 16), torch.arange(16) % 2) for _ in range(4)]
    result = finetune(Net(), batches, config=FinetuneConfig(epochs=3), progress=False)
    assert len(result.history) == 3
