"""The linear decoder is exact where the edge is linear, and the least-squares answer elsewhere."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from patrol_prune.attacks.base import Knowledge
from patrol_prune.attacks.checks import smooth_images
from patrol_prune.attacks.linear_inverse import LinearInverse, LinearInverseConfig
from patrol_prune.errors import InputError
from patrol_prune.metrics import mse, psnr

IMAGES = (smooth_images(160, (3, 16, 16), seed=3)
          + 0.2 * torch.rand(160, 3, 16, 16, generator=torch.Generator().manual_seed(1))).div(1.2)
KNOWN, VICTIM = IMAGES[:120], IMAGES[120:]


def convolution(x: Tensor, *, channels: int = 40, stride: int = 1) -> Tensor:
    weight = torch.randn(channels, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return functional.conv2d(x, weight, stride=stride, padding=1)


def test_one_wide_convolution_is_undone_to_the_last_digits() -> None:
    attack = LinearInverse()
    attack.fit(Knowledge(KNOWN, z=convolution(KNOWN)))
    assert float(psnr(VICTIM, attack.reconstruct(convolution(VICTIM))).min()) > 80


@pytest.mark.parametrize("shape", ["map", "odd map", "large map", "tokens", "vector"])
def test_every_shape_of_feature_is_inverted_when_it_is_the_image_itself(shape: str) -> None:
    def edge(x: Tensor) -> Tensor:
        if shape == "map":
            return functional.pixel_unshuffle(x, 4)
        if shape == "odd map":
            return functional.interpolate(x, size=(15, 15), mode="bilinear")
        if shape == "large map":
            return functional.interpolate(x, size=(32, 32))
        if shape == "tokens":
            return functional.pixel_unshuffle(x, 8).flatten(2).transpose(1, 2)
        return functional.avg_pool2d(x, 2).flatten(1)

    known = smooth_images(600, (3, 16, 16), seed=4)
    victim = smooth_images(40, (3, 16, 16), seed=5)
    attack = LinearInverse()
    attack.fit(Knowledge(known, z=edge(known)))
    floor = mse(victim, known.mean(0).expand_as(victim)).mean()
    assert mse(victim, attack.reconstruct(edge(victim))).mean() < 0.02 * floor


def test_it_is_the_ridge_solution_that_scikit_learn_finds() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    z = functional.pixel_unshuffle(KNOWN, 8).mean(1).flatten(1)
    config = LinearInverseConfig(decades=(-1.0,), holdout=0.1)
    attack = LinearInverse(config)
    attack.fit(Knowledge(KNOWN, z=z))
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))[12:]
    inputs, targets = z[order].double().numpy(), KNOWN[order].flatten(1).double().numpy()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(z[order].double().T, correction=0))
    oracle = linear_model.Ridge(alpha=108 * 0.1 * float(eigenvalues.mean())).fit(inputs, targets)
    expected = torch.from_numpy(oracle.predict(z[:5].double().numpy())).clamp(0, 1)
    torch.testing.assert_close(attack.reconstruct(z[:5]).flatten(1).double(), expected,
                               rtol=0, atol=1e-5)


def test_noise_on_the_features_is_answered_with_more_regularisation() -> None:
    generator = torch.Generator().manual_seed(2)

    def noisy(x: Tensor) -> Tensor:
        z = convolution(x)
        return z + 3.0 * z.std() * torch.randn(z.shape, generator=generator)

    attack = LinearInverse()
    known = Knowledge(KNOWN, edge=noisy, random_edge=True)
    record = attack.fit(known)
    assert record.best_loss < record.mean_image_loss
    assert record.best_loss == min(record.history)
    clean = LinearInverse().fit(Knowledge(KNOWN, z=convolution(KNOWN)))
    assert record.chosen is not None and clean.chosen is not None
    assert record.chosen["ridge_decade"] > clean.chosen["ridge_decade"]


@pytest.mark.parametrize("shape", ["vector", "map of one position"])
def test_inputs_that_never_change_leave_it_as_it_is(shape: str) -> None:
    """Dead channels, and the padding around a map of one position."""
    def edge(x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 4).flatten(1)

    def with_dead(x: Tensor) -> Tensor:
        z = torch.cat([torch.full((len(x), 2), 0.1), edge(x), torch.zeros(len(x), 3)], 1)
        return z if shape == "vector" else z[:, :, None, None]

    plain, other = LinearInverse(), LinearInverse()
    plain.fit(Knowledge(KNOWN, z=edge(KNOWN)))
    other.fit(Knowledge(KNOWN, z=with_dead(KNOWN)))
    torch.testing.assert_close(other.reconstruct(with_dead(VICTIM)),
                               plain.reconstruct(edge(VICTIM)), rtol=0, atol=1e-5)


def test_a_constant_feature_gives_the_mean_image() -> None:
    z = torch.ones(len(KNOWN), 4)
    attack = LinearInverse(LinearInverseConfig(holdout=0.1))
    attack.fit(Knowledge(KNOWN, z=z))
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))[12:]
    expected = KNOWN[order].mean(0).expand(2, 3, 16, 16)
    torch.testing.assert_close(attack.reconstruct(z[:2]), expected, rtol=0, atol=1e-5)


def test_a_factorisation_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK gives up on some matrices of many like eigenvalues."""
    expected = LinearInverse()
    first = expected.fit(Knowledge(KNOWN, z=convolution(KNOWN, stride=4)))

    def fails(matrix: Tensor) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    attack = LinearInverse()
    second = attack.fit(Knowledge(KNOWN, z=convolution(KNOWN, stride=4)))
    assert second.history == pytest.approx(first.history, rel=1e-3)
    z = convolution(VICTIM, stride=4)
    torch.testing.assert_close(attack.reconstruct(z), expected.reconstruct(z), rtol=0, atol=1e-4)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="odd kernel"):
        LinearInverseConfig(kernel=2)
    with pytest.raises(InputError, match="at least 20"):
        LinearInverse().fit(Knowledge(KNOWN[:5], z=KNOWN[:5]))
    with pytest.raises(InputError, match="finite features"):
        LinearInverse().fit(Knowledge(KNOWN, z=torch.full((len(KNOWN), 4), float("nan"))))
    with pytest.raises(InputError, match="got none"):
        LinearInverse().fit(Knowledge(KNOWN))
    with pytest.raises(InputError, match="not been trained"):
        LinearInverse().reconstruct(KNOWN)
