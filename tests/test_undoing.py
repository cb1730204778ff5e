"""An order of places, a layout, or a scale of each picture's own hides nothing from the audit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import patrol_prune as pp
from patrol_prune.access import edge_function
from patrol_prune.arrangement import ChannelsFirst, Order, arranged, channels_last
from patrol_prune.attacks.checks import smooth_images
from patrol_prune.decoders import channel_dim, either_layout
from patrol_prune.per_picture import PerPicture, per_picture, same_way_round
from patrol_prune.pixels import Normalization
from patrol_prune.received import Prepared, Restored
from patrol_prune.undoing import undone

IMAGES = (smooth_images(180, (3, 16, 16), seed=5)
          + 0.2 * torch.rand(180, 3, 16, 16, generator=torch.Generator().manual_seed(1))).div(1.2)
KNOWN, VICTIM = IMAGES[:150], IMAGES[150:]
PLAIN = Normalization()
Change = Callable[[Tensor], Tensor]
PLACES = torch.randperm(64, generator=torch.Generator().manual_seed(3))
NEW = {"levelled_per_image", "turned_per_image", "layout_guessed", "scrambled_layout"}


class Edge(nn.Module):
    """What `change` makes of the picture."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


class Cut:
    def __init__(self, change: Change) -> None:
        self.edge = Edge(change)


def audit(change: Change, attack: str = "linear_inverse", **more: object) -> tuple[float, set[str]]:
    report = pp.audit(Cut(change), KNOWN, VICTIM, attacks=(attack,), examples=0, **more)  # type: ignore[arg-type]
    return report.strongest()["ssim"], {flag["name"] for flag in report.flags}


def folded(x: Tensor) -> Tensor:
    """12 channels of 8x8 that hold the picture."""
    return functional.pixel_unshuffle(x, 2)


def own(x: Tensor) -> Tensor:
    """A number on [0, 1] for each picture, which depends on all of it, `[N, 1, 1, 1]`."""
    return torch.frac(x.double().sum((1, 2, 3), keepdim=True) * 997.7)


def tokens(x: Tensor) -> Tensor:
    return functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("change", [
    lambda x: folded(x).flatten(2)[:, :, PLACES].unflatten(2, (8, 8)),
    lambda x: x.flip(2),
    lambda x: folded(x).transpose(2, 3),
    lambda x: tokens(x)[:, PLACES],
    lambda x: torch.cat([torch.zeros(len(x), 4, 12), tokens(x)[:, PLACES]], 1),
    lambda x: tokens(x)[:, PLACES].unflatten(1, (8, 8)).repeat(1, 1, 1, 2),  # channels last
])
def test_places_are_put_in_order(change: Change) -> None:
    ssim, flags = audit(change)
    assert ssim > 0.99 and flags & NEW == {"scrambled_layout"}


def test_a_map_of_many_places_is_mirrored_back() -> None:
    some = functional.interpolate(KNOWN[:80], scale_factor=4)
    order, flag = arranged(Edge(lambda x: x.transpose(2, 3).flip(2)), some, PLAIN)
    assert order is not None and flag is not None
    assert torch.equal(order(some.transpose(2, 3).flip(2)), some)
    mixed = torch.randperm(4096, generator=torch.Generator().manual_seed(0))
    order, flag = arranged(Edge(lambda x: x.flatten(2)[:, :, mixed].reshape(x.shape)), some, PLAIN)
    assert order is None and flag is not None and "no order was found" in flag.meaning


@pytest.mark.parametrize("layers", [
    "c1,2", "c5,1 c5,1 p", "c3,2 c3,1 c3,1 c3,1 c3,1 c3,1 c3,1", "a9,2", "k2,1 k2,1 k2,1",
    "c9,2 c9,2",
])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_convolutions_send_stays_as_it_is(layers: str, seed: int) -> None:
    made: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        width = 3
        for layer in layers.split():
            kind, side, stride = layer[0], *(int(v) for v in (layer[1:] or "2,2").split(","))
            if kind in "ap":
                made.append(nn.AvgPool2d(side, stride, side // 2) if kind == "a"
                            else nn.MaxPool2d(side, stride))
                continue
            padding = side // 2 if kind == "c" and side != 5 else 0
            made += [nn.Conv2d(width, 16, side, stride, padding), nn.BatchNorm2d(16, momentum=None),
                     nn.ReLU()]
            width = 16
    edge = nn.Sequential(*made)
    edge(KNOWN)
    edge.eval()
    found = undone(edge, None, KNOWN[:32], KNOWN, PLAIN)
    assert found.edge is edge and found.flags == []


@pytest.mark.parametrize(("shape", "either"), [
    ((16, 16, 12), True), ((96, 96, 128), True), ((8, 8, 8), True), ((8, 8, 96), False),
    ((96, 8, 8), False), ((64, 12), False), ((12, 8, 8), False),
])
def test_shapes_that_allow_both_layouts(shape: tuple[int, ...], either: bool) -> None:
    assert either_layout(shape, (3, 32, 32)) is either
    assert not either or channel_dim(shape, (3, 32, 32)) == 1


def test_where_the_channels_stand_is_decided_by_what_is_seen() -> None:
    ssim, flags = audit(lambda x: folded(x).movedim(1, 3))
    assert ssim > 0.99 and not flags & NEW
    wide = lambda x: folded(x)[:, :8]  # noqa: E731  8 channels of 8x8
    assert channels_last(Edge(wide), KNOWN, PLAIN) is False
    assert channels_last(Edge(lambda x: wide(x).movedim(1, 3)), KNOWN, PLAIN) is True
    assert channels_last(Edge(lambda x: wide(x).movedim(1, 3)), KNOWN[:32], PLAIN) is True
    assert channels_last(Edge(wide), KNOWN[:19], PLAIN) is None
    noise = torch.randn(150, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    assert channels_last(Edge(lambda x: noise[: len(x)]), KNOWN, PLAIN) is None
    assert "layout_guessed" in audit(lambda x: noise[: len(x)])[1]


@pytest.mark.parametrize("change", [
    lambda x: folded(x) * 10 ** (4 * own(x) - 2).float(),
    lambda x: folded(x).double() + 1e9 * (2 * own(x).round() - 1),
    lambda x: (folded(x) + 1e8 * own(x)) * 10 ** (6 * own(2 * x)),
])
def test_each_picture_gets_one_level(change: Change) -> None:
    ssim, flags = audit(change)
    assert ssim > 0.9 and flags & NEW == {"levelled_per_image"}


@pytest.mark.parametrize("sign", [
    lambda x: 2 * own(x).round() - 1,
    lambda x: torch.randint(0, 2, (len(x), 1, 1, 1)) * 2 - 1,
])
def test_each_picture_is_brought_the_same_way_round(sign: Change) -> None:
    ssim, flags = audit(lambda x: folded(x) * sign(x))
    assert ssim > 0.9 and flags & NEW == {"turned_per_image"} and "noise_only" not in flags


def test_signs_that_are_drawn_do_not_cancel_in_several_uploads() -> None:
    ssim, flags = audit(lambda x: folded(x) * (torch.randint(0, 2, (len(x), 1, 1, 1)) * 2 - 1),
                        uploads=4)
    assert ssim > 0.9 and flags & NEW == {"turned_per_image"}


def test_a_sign_and_a_scale_are_both_undone() -> None:
    ssim, flags = audit(lambda x: folded(x) * torch.randn(len(x), 1, 1, 1))
    assert ssim > 0.9 and flags & NEW == {"turned_per_image", "levelled_per_image"}


def test_most_uploads_keep_their_way_round() -> None:
    few = lambda x: folded(x) * torch.where(own(x) < 0.8, 1.0, -1.0)  # noqa: E731
    known = KNOWN[own(KNOWN).flatten().argsort(descending=True)]  # a turned one comes first
    way = same_way_round(Edge(few), known, PLAIN)
    assert way is not None
    torch.testing.assert_close(way(folded(VICTIM)), folded(VICTIM), rtol=0, atol=0)


def test_uploads_around_zero_are_not_turned() -> None:
    for change in (folded, lambda x: folded(x) - folded(KNOWN).mean(0)):
        assert same_way_round(Edge(change), KNOWN, PLAIN) is None
    way = same_way_round(Edge(lambda x: folded(x) * (2 * own(x).round() - 1)), KNOWN, PLAIN)
    assert way is not None
    z = folded(VICTIM)
    torch.testing.assert_close(way(-z), way(z), rtol=0, atol=0)
    torch.testing.assert_close(way(z).abs(), z.abs(), rtol=0, atol=0)
    torch.testing.assert_close(way.undone(z), z, rtol=0, atol=0)


def test_what_is_dropped_is_not_scaled() -> None:
    edge = Edge(lambda x: functional.dropout(folded(x) * 10 ** (4 * own(x) - 2).float(), 0.5, True))
    assert per_picture(edge, KNOWN, PLAIN) is not None
    assert per_picture(edge, KNOWN, PLAIN, draws=True) is None


def test_a_level_of_each_picture() -> None:
    z = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    factors, summands = (v.view(-1, 1, 1, 1) for v in (torch.logspace(-3, 3, 5), torch.arange(5)))
    alike = PerPicture(2.0, True)
    changed = alike(z.double() * factors + summands)
    torch.testing.assert_close(changed, alike(z), rtol=1e-4, atol=1e-4)
    sizes = PerPicture(2.0, False)(z * factors).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(sizes, torch.full((5,), 2.0))
    assert torch.equal(PerPicture(2.0, False)(torch.zeros(2, 7)), torch.zeros(2, 7))


def test_steps_are_undone_for_the_cloud() -> None:
    z = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(0))
    places = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    sequence = torch.cat([torch.arange(2), 2 + places[places < 10]])
    for sent, step in ((z, Order(places, 1)), (z.movedim(1, 3), ChannelsFirst()),
                       (z.movedim(1, 3), Order(places, 3)), (z.flatten(2).mT, Order(sequence, 2))):
        again = Restored(nn.Identity(), step)(Prepared(nn.Identity(), step)(sent))
        assert torch.equal(again, sent) and not torch.equal(step(sent), sent)
    assert torch.equal(Order(places, 1)(z).flatten(2), z.flatten(2)[:, :, places])
    assert torch.equal(Order(places, 3)(z.movedim(1, 3)).flatten(1, 2), z.flatten(2).mT[:, places])


def test_a_twin_sends_what_the_attacker_has_of_the_edge() -> None:
    """Attacks without queries compare the two, channel by channel and place by place."""
    places = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    edge = nn.Sequential(
        nn.Conv2d(3, 16, 2, 2), Edge(lambda z: z.flatten(2)[:, :, places].mT.unflatten(1, (8, 8))))
    found = undone(edge, nn.Flatten(), KNOWN[:32], KNOWN, PLAIN)
    assert [flag.name for flag in found.flags] == ["scrambled_layout"]
    twin = found.twin(0)
    twin.load_state_dict({name: value for (name, _), value in zip(
        twin.state_dict().items(), edge.state_dict().values(), strict=True)})
    sent = edge_function(found.edge, PLAIN)(KNOWN[:5])
    torch.testing.assert_close(twin(KNOWN[:5]), sent)
    torch.testing.assert_close(sent.movedim(3, 1), edge[0](KNOWN[:5]))
    assert found.cloud is not None
    assert torch.equal(found.cloud(sent), edge(KNOWN[:5]).flatten(1))
