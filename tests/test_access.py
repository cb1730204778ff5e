"""What an attacker gets of an edge that draws: uploads of one picture put together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from patrol_prune.access import Repeated

IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Drawing(nn.Module):
    """Values around 0 behind noise, dropout, a ReLU or a quantiser, in the order named."""

    def __init__(self, *steps: str, sigma: float = 0.5, start: int = 0) -> None:
        super().__init__()
        self.steps, self.sigma = steps, sigma
        self.generator = torch.Generator().manual_seed(start)

    def forward(self, x: Tensor) -> Tensor:
        z = 3.0 * (x - 0.4)
        for step in self.steps:
            if step == "noise":
                z = z + self.sigma * torch.randn(z.shape, generator=self.generator)
            elif step == "dropout":
                z = 2.0 * z * (torch.rand(z.shape, generator=self.generator) < 0.5)
            elif step == "relu":
                z = z.relu()
            else:
                z = (z / 0.5).round() * 0.5
        return z


@pytest.mark.parametrize("uploads", [2, 4, 8, 64])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 3.0])
@pytest.mark.parametrize(
    "steps", [("noise",), ("noise", "relu"), ("noise", "quantise"), ("noise", "relu", "quantise")]
)
def test_uploads_under_noise_are_averaged(
    steps: tuple[str, ...], sigma: float, uploads: int
) -> None:
    """How often a value is clipped or rounded to 0 tells what it is."""
    found = Repeated(Drawing(*steps, sigma=sigma), uploads)(IMAGES)
    alike = Drawing(*steps, sigma=sigma)
    expected = torch.stack([alike(IMAGES) for _ in range(uploads)]).mean(0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("uploads", [2, 8, 64])
@pytest.mark.parametrize(
    "steps", [("dropout",), ("relu", "dropout"), ("dropout", "relu"), ("dropout", "quantise"),
              ("noise", "dropout"), ("noise", "relu", "dropout")]
)
def test_of_values_that_are_dropped_those_are_averaged_that_came_through(
    steps: tuple[str, ...], uploads: int
) -> None:
    found = Repeated(Drawing(*steps, sigma=0.2), uploads)(IMAGES)
    alike = Drawing(*steps, sigma=0.2)
    draws = torch.stack([alike(IMAGES) for _ in range(uploads)])
    expected = draws.sum(0) / (draws != 0).sum(0).clamp_min(1)
    torch.testing.assert_close(found, expected)


def test_what_was_seen_once_holds_for_every_picture() -> None:
    """One picture may not show it, and all have to be treated alike."""
    edge = Repeated(Drawing("dropout"), 4)
    black = torch.full((1, 3, 8, 8), 0.4)
    assert torch.count_nonzero(edge(black)) == 0 and edge.dropped is None
    edge(IMAGES)
    assert edge.dropped is True
    noisy = Repeated(Drawing("noise", "relu"), 4)
    noisy(IMAGES)
    assert noisy.dropped is False


def test_gradients_pass() -> None:
    x = IMAGES.clone().requires_grad_()
    Repeated(Drawing("dropout"), 8)(x).sum().backward()
    assert x.grad is not None
    # Twice the value wherever it came through at all.
    torch.testing.assert_close(x.grad[x.grad != 0], torch.full_like(x.grad[x.grad != 0], 6.0))
