"""Attacks are made by name, and the decoder attack's failures are seen by the checks."""

import dataclasses

import pytest
import torch
from torch import Tensor

from patrol_prune.attacks import (
    ATTACKS,
    RMLE,
    Attack,
    FitRecord,
    ImagePrior,
    ImagePriorConfig,
    InverseNetwork,
    InverseNetworkConfig,
    Knowledge,
    LinearInverse,
    NearestImage,
    RMLEConfig,
    check_features,
    check_fit,
    check_reconstructions,
    draws_differ,
    make_attack,
    self_test,
)
from patrol_prune.attacks.checks import smooth_images
from patrol_prune.errors import InputError
from patrol_prune.metrics import mse

SMALL = InverseNetworkConfig(width=16, depth=1, epochs=10, batch_size=16, precision="fp32")
BROKEN = dataclasses.replace(SMALL, epochs=2, max_extensions=0, lr=0.0, weight_decay=0.0)
IMAGES = smooth_images(320, (3, 16, 16), seed=3)
KNOWN, VICTIM = IMAGES[:256], IMAGES[256:]


def test_every_attack_is_made_by_its_name() -> None:
    for name in ATTACKS:
        assert isinstance(make_attack(name), Attack)
    with pytest.raises(InputError, match="Did you mean: inverse_network"):
        make_attack("inverse_networ")


def test_self_test_passes_a_working_attack_and_flags_a_broken_one() -> None:
    assert self_test(InverseNetwork(SMALL), edges=("identity",)) == []
    flags = self_test(InverseNetwork(BROKEN), edges=("identity",))
    assert [f.name for f in flags] == ["cannot_invert_identity"]


def test_a_constant_edge_gives_the_mean_image_and_flags() -> None:
    z = torch.full((len(KNOWN), 4, 4, 4), 0.3)
    attack = InverseNetwork(dataclasses.replace(SMALL, epochs=6))
    attack.fit(Knowledge(KNOWN, z))
    guess = attack.reconstruct(z[: len(VICTIM)])
    floor = float(mse(VICTIM, KNOWN.mean(0).expand_as(VICTIM)).mean())
    assert 0.97 * floor < float(mse(VICTIM, guess).mean()) < 1.3 * floor
    assert [f.name for f in check_features(z)] == ["constant_features"]
    assert check_features(KNOWN) == []
    beside = torch.cat([torch.full((len(KNOWN), 1), 1e7), KNOWN.flatten(1)], 1)
    assert check_features(beside) == []
    names = [f.name for f in check_reconstructions(VICTIM, guess, KNOWN.mean(0))]
    assert names == ["not_better_than_mean_image", "contrast_collapsed"]
    assert check_reconstructions(VICTIM, 0.9 * VICTIM, KNOWN.mean(0)) == []


def test_reconstructions_less_like_than_the_mean_image_are_flagged_whatever_their_error() -> None:
    generator = torch.Generator().manual_seed(0)
    colours = 0.1 + 0.8 * torch.rand(32, 3, 1, 1, generator=generator)
    detail = 0.1 * (2.0 * torch.randint(0, 2, (32, 1, 16, 16), generator=generator) - 1.0)
    images, inverted = colours + detail, colours - detail
    mean = images.mean(0)
    assert mse(images, inverted).mean() < 0.9 * mse(images, mean.expand_as(images)).mean()
    flags = check_reconstructions(images, inverted, mean)
    assert [f.name for f in flags] == ["not_better_than_mean_image"]
    assert "SSIM" in flags[0].meaning
    near_tie = check_reconstructions(images, mean + 0.015 * (images - mean), mean)
    assert "not_better_than_mean_image" not in {f.name for f in near_tie}


def test_a_learning_rate_of_zero_is_flagged() -> None:
    flags = check_fit(InverseNetwork(BROKEN).fit(Knowledge(KNOWN, KNOWN)))
    assert "loss_did_not_fall" in [f.name for f in flags]
    assert all(f.meaning and f.advice for f in flags)


def record(history: list[float], plateau: bool = True) -> FitRecord:
    return FitRecord(tuple(history), tuple(history), 1.0, 1.0, len(history) - 1, plateau, 0, 0.0)


def test_check_fit_end_points() -> None:
    assert check_fit(record([0.5])) == []
    assert [f.name for f in check_fit(record([0.995]))] == ["loss_did_not_fall"]
    assert [f.name for f in check_fit(record([0.5], plateau=False))] == ["not_converged"]


def test_random_edges_are_told_from_fixed_ones() -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(pixels: Tensor) -> Tensor:
        return pixels + torch.randn(pixels.shape, generator=generator)

    assert draws_differ(noisy, KNOWN[:2]) and not draws_differ(torch.Tensor.clone, KNOWN[:2])


def test_the_nearest_image_is_found_among_many_of_its_kind() -> None:
    """Two kinds of images far apart, and the images of a kind a ten-thousandth of that."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(200).remainder(2).mul(2).sub(1).view(-1, 1)
    z = kind + 3e-4 * torch.randn(200, 512, generator=generator)
    pixels = torch.arange(200.0).view(200, 1, 1, 1) / 200
    attack = NearestImage()
    attack.fit(Knowledge(pixels, z=z))
    asked = z + 1e-4 * torch.randn(200, 512, generator=generator)
    assert torch.equal(attack.reconstruct(asked), pixels)


def test_fewer_images_are_picked_at_random_and_all_else_stays() -> None:
    known = Knowledge(KNOWN, 2 * KNOWN, torch.Tensor.clone, labels=torch.arange(256))
    few, more = known.first(5), known.first(100)
    assert few.labels is not None and more.labels is not None
    picked = few.labels
    assert torch.equal(few.pixels, KNOWN[picked]) and torch.equal(few.pairs()[0], 2 * KNOWN[picked])
    assert torch.equal(more.labels[:5], picked) and len(set(more.labels.tolist())) == 100
    # Of images sorted by class there are some of each.
    assert len(set((more.labels // 16).tolist())) == 16
    for count in (256, 1000):
        whole = known.first(count)
        assert torch.equal(whole.pixels, KNOWN) and whole.labels is known.labels
    assert few.white_box() is known.edge
    assert Knowledge(KNOWN).first(5).z is None


def _fitted(name: str) -> Attack:
    """The attack on an edge that halves the images, with next to no effort."""
    quick: dict[str, Attack] = {
        "inverse_network": InverseNetwork(BROKEN), "linear_inverse": LinearInverse(),
        "nearest_image": NearestImage(),
        "rmle": RMLE(RMLEConfig(steps=2, tuning_images=2, tuning_steps=2, refine=False)),
        "image_prior": ImagePrior(ImagePriorConfig(
            steps=2, check_every=2, tuning_images=2, width=8, losses=("mse",), lrs=(0.01,))),
    }
    edge = torch.nn.AvgPool2d(2)
    quick[name].fit(Knowledge(KNOWN, edge(KNOWN), edge=edge))
    return quick[name]


@pytest.mark.parametrize("name", ["inverse_network", "linear_inverse", "nearest_image", "rmle",
                                  "image_prior"])
def test_uploads_of_another_shape_are_refused_in_words(name: str) -> None:
    attack = _fitted(name)
    z = torch.rand(2, 3, 8, 8)
    assert attack.reconstruct(z).shape == (2, 3, 16, 16)
    for other in (z[0], z[:, :1], torch.rand(2, 3, 4, 4), torch.rand(2, 4, 8, 8), z.flatten(1)):
        with pytest.raises(InputError, match=r"uploads \[N, 3, 8, 8\], as this attack was fitted"):
            attack.reconstruct(other)
