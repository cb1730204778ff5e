"""Block-wise Lipschitz constants against cases where they are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from patrol_prune.defences.dropout import Dropper
from patrol_prune.errors import InputError
from patrol_prune.lipschitz import block_lipschitz, frozen_statistics, lipschitz_loss


def _linear(matrix: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight.data = matrix
    return layer


def _inputs(seed: int = 0, batch: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 5, generator=g), 0.1 * torch.randn(batch, 5, generator=g)


def test_a_scaled_isometry_has_its_scale_as_constant() -> None:
    x, delta = _inputs()
    q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))[0]
    k = block_lipschitz([_linear(3.0 * q), _linear(0.5 * q)], x, delta)
    torch.testing.assert_close(k, torch.tensor([3.0, 0.5]))


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_constants_match_a_loop_over_images(reduction: str) -> None:
    x, delta = _inputs(2)
    blocks = [nn.Sequential(nn.Linear(5, 7), nn.ReLU()), nn.Linear(7, 3)]
    k = block_lipschitz(blocks, x, delta, reduction=reduction)  # type: ignore[arg-type]
    ratios = torch.empty(len(x), 2)
    for row in range(len(x)):
        h, g = x[row], x[row] + delta[row]
        for index, block in enumerate(blocks):
            before = torch.dist(g, h)
            h, g = block(h), block(g)
            ratios[row, index] = torch.dist(g, h) / before
    expected = ratios.max(0).values if reduction == "max" else ratios.mean(0)
    torch.testing.assert_close(k, expected)


def test_the_papers_ratios_multiply_to_the_whole_edges_ratio() -> None:
    x, delta = _inputs(3, batch=1)
    blocks = [nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4)]
    whole = nn.Sequential(*blocks)
    k = block_lipschitz(blocks, x, delta)
    expected = torch.dist(whole(x + delta), whole(x)) / delta.norm()
    torch.testing.assert_close(k.prod(), expected)


def test_scaling_the_feature_games_the_papers_form_and_not_the_scale_free_one() -> None:
    x, delta = _inputs(4)
    last = nn.Linear(5, 4, bias=False)
    scaled = _linear(last.weight.detach() * 0.01)
    paper = [block_lipschitz([b], x, delta, form="paper") for b in (last, scaled)]
    free = [block_lipschitz([b], x, delta, form="scale_free") for b in (last, scaled)]
    torch.testing.assert_close(paper[1], 0.01 * paper[0])
    torch.testing.assert_close(free[1], free[0])


def test_end_points() -> None:
    x, delta = _inputs(5)
    assert float(block_lipschitz([nn.Identity()], x, delta)) == pytest.approx(1.0)
    assert float(block_lipschitz([_linear(torch.zeros(2, 5))], x, delta)) == 0.0


def test_lipschitz_loss_weighs_blocks() -> None:
    k = torch.tensor([1.0, 2.0, 4.0])
    assert float(lipschitz_loss(k, 0.5)) == 3.5
    assert float(lipschitz_loss(k, [1.0, 0.0, 0.25])) == 2.0
    with pytest.raises(InputError, match="one for each of the 3 blocks, came 2"):
        lipschitz_loss(k, [1.0, 2.0])


def test_bad_arguments_are_refused() -> None:
    x, delta = _inputs()
    with pytest.raises(InputError, match="form"):
        block_lipschitz([nn.Identity()], x, delta, form="other")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="shape"):
        block_lipschitz([nn.Identity()], x, delta[:2])


@pytest.mark.parametrize("own", [False, True])
def test_a_block_that_draws_draws_the_same_for_both_inputs(own: bool) -> None:
    """Else the constant grows without bound as the perturbation shrinks."""
    x, delta = (part.repeat(1, 10) for part in _inputs())
    drop = Dropper(0.5, 0, 0.0).eval() if own else nn.Dropout(0.5).train()
    k = block_lipschitz([drop], x, 1e-3 * delta, reduction="mean")
    assert 0 < float(k) < 2.01  # what is kept is doubled, what is dropped is 0 for both


def test_a_frozen_layer_that_averages_over_all_batches_counts_no_more_of_them() -> None:
    norm = nn.BatchNorm1d(5, momentum=None).train()
    norm(torch.zeros(8, 5))
    with frozen_statistics(norm):
        norm(torch.randn(8, 5))
    norm(torch.ones(8, 5))
    assert torch.equal(norm.running_mean, torch.full((5,), 0.5))
    assert int(norm.num_batches_tracked) == 2


def test_frozen_statistics_leave_the_running_ones() -> None:
    norm = nn.BatchNorm1d(5).train()
    with frozen_statistics(norm):
        norm(torch.randn(8, 5) + 4.0)
    assert torch.equal(norm.running_mean, torch.zeros(5)) and norm.momentum == 0.1
    norm(torch.randn(8, 5) + 4.0)
    assert norm.running_mean is not None and float(norm.running_mean.min()) > 0.1


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_an_image_whose_feature_is_nothing_has_no_relative_constant(reduction: str) -> None:
    """Left in, its relative change is a division by nothing."""
    block = nn.ReLU()
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    x[0] = -1.0
    delta = torch.full_like(x, 0.1)
    delta[0] = 1.5
    found = block_lipschitz([block], x, delta, form="scale_free", reduction=reduction)
    others = block_lipschitz([block], x[1:], delta[1:], form="scale_free", reduction=reduction)
    assert float(found) == pytest.approx(float(others))
