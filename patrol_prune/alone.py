"""One picture's upload at a time, where an edge's answer depends on the others of its batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patrol_prune.access import Draws, edge_function
from patrol_prune.attacks import EdgeFunction, Flag, draws_differ
from patrol_prune.pixels import Normalization

_ALIKE = 1e-2
_ALONE = 4
_DRAWS = 16
_AMONG, _VALUES = 16, 1 << 16
_SURE = 7.0
_STILL = 0.1
_COPIED, _COPIES = 8, 4
_IN_COMMON, _SURELY, _NOTHING = 0.1, 5.0, 1e-6

MIXES_IMAGES = Flag(
    "mixes_images",
    "What the edge sends for a picture depends on the others in its batch, or is drawn once for "
    "all of them, and a device sends one at a time. Every picture was sent alone here, which is "
    "slow.",
    "Look for a generator that is seeded in every call, for statistics of the batch, or for noise "
    "and masks without a draw for each picture (`torch.rand_like(z)` has one). What is the same "
    "in every call hides nothing.",
)


class Alone(nn.Module):
    """The edge with one picture in each call; a batch's dimension that it drops then comes back."""

    def __init__(self, edge: nn.Module) -> None:
        super().__init__()
        self.edge = edge

    def forward(self, x: Tensor) -> Tensor:
        """Model inputs `[N, ...]` to features `[N, ...]`."""
        parts = [self.edge(part).clone() for part in x.split(1)]
        return torch.cat([z if z.dim() and len(z) == 1 else z[None] for z in parts])


class Paired(nn.Module):
    """An edge that cannot be asked for a single picture: it is asked for that twice."""

    def __init__(self, edge: nn.Module) -> None:
        super().__init__()
        self.edge = edge

    def forward(self, x: Tensor) -> Tensor:
        """Model inputs `[N, ...]` to features `[N, ...]`."""
        z: Tensor = self.edge(x if len(x) > 1 else torch.cat([x, x]))
        return z[: len(x)]


def one_at_a_time(
    edge: nn.Module, pixels: Tensor, normalization: Normalization
) -> tuple[nn.Module, bool, list[Flag]]:
    """The edge as a device runs it, whether it draws at random, and a flag where that differs.

    Args:
        edge: as it came.
        pixels: some images of both sides.
        normalization: of the edge's inputs.
    """
    query = edge_function(edge, normalization)
    draws = draws_differ(query, pixels)
    with Draws(edge).kept():
        if not _takes_one(query, pixels):
            return Paired(edge), draws, []
        if not (draws_mix_images if draws else mixes_images)(query, pixels):
            return edge, draws, []
        edge = Alone(edge)
        return edge, draws_differ(edge_function(edge, normalization), pixels), [MIXES_IMAGES]


@torch.no_grad()
def _takes_one(edge: EdgeFunction, pixels: Tensor) -> bool:
    """Whether a single picture may be asked for, and gives a feature like those of others."""
    try:
        return edge(pixels[:1]).shape[1:] == edge(pixels[:2]).shape[1:]
    except Exception:  # it runs on two: `audit` tried
        return False


@torch.no_grad()
def mixes_images(edge: EdgeFunction, pixels: Tensor) -> bool:
    """Whether what a fixed edge sends for a picture depends on the others beside it."""
    together = edge(pixels)
    spread = float(together.double().std(0).square().mean().sqrt())
    places = _places(pixels)
    apart = [edge(pixels[i : i + 1])[0] - together[i] for i in places]
    turned = edge(pixels.flip(0)).flip(0) - together
    far = max(float(d.double().square().mean().sqrt()) for d in (*apart, *turned[places]))
    return far > _ALIKE * spread


@torch.no_grad()
def draws_mix_images(edge: EdgeFunction, pixels: Tensor) -> bool:
    """The same of an edge that draws, whose answers are never twice the same.

    Some pictures are sent 16 times each, alone and among the others; `d_k` is the difference
    between the two at the k-th time. The squared length of its mean, `sum_{k != l} <d_k, d_l>`
    without what the draws themselves add, is 0 on average where the others play no part, and is
    held against what random signs of the `d_k` would give. Nor may draws all but vanish, in
    variance, for pictures that are sent alone, or be the same for several of one call.
    """
    pixels = pixels[torch.linspace(0, len(pixels) - 1, min(_AMONG, len(pixels))).long()]
    places = _places(pixels)
    count = edge(pixels[:2])[0].numel()
    some = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:_VALUES]
    if _draws_in_common(edge, pixels[:_COPIED], some):
        return True
    apart, together, spread = [], [], 0.0
    for _ in range(_DRAWS):
        sent = edge(pixels).flatten(1)[:, some].double()
        spread += float(sent.var(0).mean()) / _DRAWS
        together.append(sent[places].flatten())
        one = [edge(pixels[i : i + 1]).flatten(1)[:, some] for i in places]
        apart.append(torch.cat(one).double().flatten())
    alone, beside = torch.stack(apart), torch.stack(together)
    least = _ALIKE**2 * spread
    # by the median over the draws: a whole upload that is dropped now and then is no mixing
    varies, among = (float(z.diff(dim=0).square().mean(1).median()) / 2 for z in (alone, beside))
    if among > least and varies < _STILL * among:
        return True
    difference = (alone - beside) / alone.shape[1] ** 0.5
    products = difference @ difference.T
    products.fill_diagonal_(0.0)
    shift = float(products.sum()) / (_DRAWS * (_DRAWS - 1))
    by_chance = float((2.0 * products.square().sum()).sqrt())
    return shift > least and float(products.sum()) > _SURE * by_chance


def _draws_in_common(edge: EdgeFunction, pixels: Tensor, some: Tensor) -> bool:
    """Whether pictures of one call share draws: an attacker would learn from far fewer of them.

    Four copies of each picture are sent together, 16 times; `r` is how far each value of an upload
    is from its mean, in its own standard deviations. `sum_{a != b} <r_a, r_b>` over copies is 0 on
    average where each has draws of its own, and is held against the draws' size and against what
    random signs of each sum would give.
    """
    sent = torch.cat([_copies_apart(edge, part, some) for part in pixels.split(_AMONG // _COPIES)],
                     1)
    deviation = sent.square().mean((0, 2), keepdim=True).sqrt()
    sent = (sent / deviation).where(deviation > _NOTHING * deviation.max(), 0.0)
    sums = (sent.sum(2).square() - sent.square().sum(2)).sum(2)
    common, size = abs(float(sums.sum())), (_COPIES - 1) * float(sent.square().sum())
    by_chance = float(sums.square().sum().sqrt())
    return common > _IN_COMMON * size and common > _SURELY * by_chance


def _copies_apart(edge: EdgeFunction, pixels: Tensor, some: Tensor) -> Tensor:
    """`[draws, pictures, copies, values]`: uploads of one call, in random order, from their means.
    """
    copies = pixels.repeat_interleave(_COPIES, 0)
    order = torch.randperm(len(copies), generator=torch.Generator().manual_seed(0))
    sent = torch.stack([edge(copies[order]).flatten(1)[:, some].double() for _ in range(_DRAWS)])
    sent = sent - sent.mean(0)
    return sent[:, order.argsort()].view(_DRAWS, len(pixels), _COPIES, -1)


def _places(pixels: Tensor) -> list[int]:
    """Some of them, by number."""
    return torch.linspace(0, len(pixels) - 1, min(_ALONE, len(pixels))).long().tolist()
