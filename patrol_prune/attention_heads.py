"""Attention whose heads can be removed one by one.

    a_h = softmax(s_h q_h k_h^T + b_h),    y = sum_h W_o,h a_h v_h + c

Head h enters the output through its own columns of `W_o`: a zero mask on what `W_o` reads from it
equals its removal, and its rows of `W_q`, `W_k` and `W_v` go along. PyTorch's and torchvision's
attention packs q, k and v into one weight and takes the width of a head from that of the stream,
so that no head can go. Here q, k, v and the output are linear layers, and a core without weights
of its own multiplies; the width that is left says how many heads there are.

Channel `i H + h` of q, k and v is dimension i of head h, for H heads: the heads lie side by side in
every dimension. Head h is then the channels `{h, h + H, h + 2 H, ...}`, tied as the channels of a
grouped convolution are (`ChannelGroup.tie`), and everything that knows such ties scores, masks and
removes whole heads.

Or dimension i of every head is the unit, and the heads are as many as before. Channel `h d + i` is
dimension i of head h then, so that `{i, i + d, i + 2 d, ...}` are tied. A zero mask has to take the
dimension out of the products as well: it multiplies q, and what `W_o` reads. Where q and k are of
unit length each (Swin V2) the root of it multiplies both, so that the lengths are those of the live
dimensions. The scale s stays what it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from patrol_prune.errors import InputError

__all__ = [
    "UNITS", "HeadLinear", "HeadProduct", "OpenAttention", "OpenPartitionAttention",
    "OpenSelfAttention", "OpenTokenAttention", "OpenWindowAttention", "channel_order",
    "channels_followed", "check_unit",
]  # fmt: skip

UNITS = ("heads", "dimensions")
"""What opened attention may lose: whole heads, or the same dimensions of every head."""
_LARGEST_LOGIT_SCALE = math.log(100.0)
_following: ContextVar[bool] = ContextVar("following", default=False)


@contextmanager
def channels_followed(model: nn.Module) -> Iterator[None]:
    """Inside, the product of the heads is a sum: the same channels meet, and nothing is mixed.

    For whoever follows channels through operators, and cannot through a matrix product; so that
    `head_of` is found among the operators, it has a gradient inside.
    """
    frozen = [m.head_of for m in model.modules()
              if isinstance(m, HeadProduct) and not m.head_of.requires_grad]
    token = _following.set(True)
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        _following.reset(token)
        for p in frozen:
            p.requires_grad_(False)


def check_unit(unit: str) -> None:
    """Refuse what is none of `UNITS`."""
    if unit not in UNITS:
        raise InputError(
            f"Expected what attention may lose (unit=, score.head_unit) out of {', '.join(UNITS)}, "
            f"came {unit!r}. Take 'heads' for whole ones."
        )


def channel_order(heads: int, head_dim: int, unit: str) -> Tensor:
    """`[heads * head_dim]`: where a unit's channels are if each head's are in one piece.

    For heads, channel `i H + h` of the new order is the old `h d + i`; for dimensions the order
    stays.
    """
    order = torch.arange(heads * head_dim)
    return order.view(heads, head_dim).T.reshape(-1) if unit == "heads" else order


def _own(tensor: Tensor, order: Tensor, dim: int = 0) -> nn.Parameter:
    """A parameter of its own with another order, trainable where the tensor is."""
    return nn.Parameter(tensor.detach().index_select(dim, order), tensor.requires_grad)


class HeadLinear(nn.Linear):
    """The projection to q, k or v: its outputs belong to heads.

    Args:
        weight: `[heads * head_dim, width]`.
        bias: `[heads * head_dim]` or None.
        tied: as many outputs go together, those of a head or of one dimension of all heads;
            Torch-Pruning's `out_channel_groups` of the layer.
        order: of the rows.
        mask_power: the outputs are multiplied by this power of the mask; 0 where what reads them
            carries it all.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, tied: int, order: Tensor,
        mask_power: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.weight = _own(weight, order)
        if bias is not None:
            self.bias = _own(bias, order)
        self.tied, self.mask_power = tied, mask_power


class HeadProduct(nn.Module):
    """`softmax(scale q k^T + bias) v`, head by head; which heads are left, `head_of` says.

    Args:
        heads: H, at first.
        head_dim: d, at first.
        scale: of the products.
        dropout: of the attention, in training mode.
        cosine: q and k are of unit length, and every head has a scale of its own (Swin V2).
        unit: what may go, see `UNITS`.

    Shapes: q, k, v `[..., N, d H']` for the `H'` heads that are left, or `[..., N, H d']` for the
    dimensions; bias `[1, H, N, N]` for all heads that there were, logit_scale `[H, 1, 1]`, mask
    `[W, N, N]` where the first dimension holds W windows of each image. The result is shaped as q.
    """

    head_of: nn.Parameter

    def __init__(
        self, heads: int, head_dim: int, *, scale: float, dropout: float = 0.0,
        cosine: bool = False, unit: str = "heads",
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale, self.dropout, self.cosine, self.unit = scale, dropout, cosine, unit
        self._fixed = head_dim if unit == "heads" else heads
        order = channel_order(heads, head_dim, unit)
        # A parameter, so that it is pruned with the channels; it is never trained.
        self.head_of = nn.Parameter((order // head_dim).float(), False)

    @property
    def heads(self) -> int:
        """Heads that are left."""
        return self.head_of.numel() // self._fixed if self.unit == "heads" else self._fixed

    @property
    def head_dim(self) -> int:
        """Dimensions of each head that are left."""
        return self._fixed if self.unit == "heads" else self.head_of.numel() // self._fixed

    @property
    def tied(self) -> int:
        """Channels that go together."""
        return self._fixed

    def kept(self) -> Tensor:
        """`[H']` the numbers that the heads that are left had at first."""
        if self.unit == "heads":
            return self.head_of.detach()[: self.heads].round().long()
        return torch.arange(self.heads, device=self.head_of.device)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None,
        mask: Tensor | None = None, logit_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See the class."""
        if q.shape[-1] != self.head_of.numel():
            raise InputError(
                f"Expected q of {self.head_of.numel()} channels, came {q.shape[-1]}: something "
                "pruned a projection and not the heads. Prune opened attention by PatrolPruner, or "
                "by Torch-Pruning with every projection's tied as out_channel_groups."
            )
        if _following.get():
            return (q + k + v) * self.head_of
        q, k, v = self._by_head(q), self._by_head(k), self._by_head(v)
        if logit_scale is not None:
            scale = logit_scale.clamp(max=_LARGEST_LOGIT_SCALE).exp()[self.kept()]
            logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
        else:
            logits = (q * self.scale) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias[:, self.kept()]
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        attention = F.dropout(logits.softmax(-1), self.dropout, self.training)
        place = -1 if self.unit == "heads" else -2
        return (attention @ v).movedim(-3, place).flatten(-2)

    def _by_head(self, x: Tensor) -> Tensor:
        """`[..., N, d H']` or `[..., N, H d']` -> `[..., heads, N, dimensions]`."""
        return x.unflatten(-1, (self._fixed, -1)).movedim(-1 if self.unit == "heads" else -2, -3)

    def extra_repr(self) -> str:
        """For printing the model."""
        return f"heads={self.heads}, head_dim={self.head_dim}"


class OpenAttention(nn.Module):
    """q, k, v, their product and the projection of what comes out.

    Args:
        weights: of q, k and v, each `[heads * head_dim, width]`, every head's rows in one piece.
        biases: likewise, or None.
        out: the projection; its input columns in the same order.
        core: the product.
    """

    def __init__(
        self, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], out: nn.Linear,
        core: HeadProduct,
    ) -> None:  # fmt: skip
        super().__init__()
        order = channel_order(core.heads, core.head_dim, core.unit).to(out.weight.device)
        powers = (0.0, 0.0) if core.unit == "heads" else (0.5, 0.5) if core.cosine else (1.0, 0.0)
        self.q, self.k, self.v = (
            HeadLinear(w, b, core.tied, order, power)
            for w, b, power in zip(weights, biases, (*powers, 0.0), strict=True)
        )
        self.core = core.to(out.weight)
        self.out = nn.Linear(out.in_features, out.out_features, out.bias is not None, device="meta")
        self.out.weight = _own(out.weight, order, dim=1)
        if out.bias is not None:
            self.out.bias = nn.Parameter(out.bias.detach().clone(), out.bias.requires_grad)

    @property
    def num_heads(self) -> int:
        """Heads that are left."""
        return self.core.heads

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Self-attention over `[..., N, width]`."""
        value: Tensor = self.out(self.core(self.q(x), self.k(x), self.v(x), **kwargs))
        return value


class OpenSelfAttention(OpenAttention):
    """In the place of `nn.MultiheadAttention` over one sequence, without masks.

    Args:
        batch_first: the shape is `[B, N, width]`, not `[N, B, width]`.
    """

    def __init__(self, *args: Any, batch_first: bool) -> None:
        super().__init__(*args)
        self.batch_first = batch_first

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """`(y, None)`, as with `need_weights=False`.

        Raises:
            InputError: keys or values of their own, a mask, or weights that are asked for.
        """
        if key is not query or value is not query:
            raise InputError("Opened attention is of a sequence to itself, came other keys.")
        _refuse_masks(key_padding_mask, attn_mask, is_causal)
        if need_weights:
            raise InputError(
                "Opened attention gives no weights back, came need_weights=True, which is the "
                "default. Call it with need_weights=False."
            )
        if self.batch_first or query.dim() == 2:
            return self.attend(query), None
        return self.attend(query.transpose(0, 1)).transpose(0, 1), None


def _refuse_masks(*masks: Any) -> None:
    if any(mask is not None and mask is not False for mask in masks):
        raise InputError("Opened attention knows no masks, came one.")


class OpenTokenAttention(OpenAttention):
    """In the place of timm's `Attention`, over `[B, N, width]`.

    Args:
        dropout: of what comes out.
    """

    def __init__(self, *args: Any, dropout: float) -> None:
        super().__init__(*args)
        self.proj_drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """`[B, N, width]` to the same; a mask is an InputError."""
        _refuse_masks(attn_mask, is_causal)
        value: Tensor = self.proj_drop(self.attend(x))
        return value


class OpenPartitionAttention(OpenAttention):
    """In the place of MaxViT's attention over `[B, G, P, width]`.

    Args:
        source: the layer as it was, without its projections: the bias of positions is still its.
    """

    def __init__(self, *args: Any, source: Any) -> None:
        super().__init__(*args)
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        """`[B, G, P, width]` to the same."""
        return self.attend(x, bias=self.source.get_relative_positional_bias())


class OpenWindowAttention(OpenAttention):
    """In the place of Swin's attention over windows of `[B, H, W, width]`.

    Args:
        source: the layer as it was, without its projections: the bias of positions is still its.
    """

    def __init__(self, *args: Any, source: Any) -> None:
        super().__init__(*args)
        self.source = source
        self.window, self.shift = tuple(source.window_size), tuple(source.shift_size)
        self.proj_drop = nn.Dropout(source.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, width]` to the same."""
        given = {"bias": self.source.get_relative_position_bias()}
        if self.core.cosine:
            given["logit_scale"] = self.source.logit_scale
        if any(self.shift):
            given["mask"] = shift_mask(x, self.window, self.shift)
        windows = to_windows(x, self.window, self.shift)
        value = self.proj_drop(self.attend(windows, **given))
        return from_windows(value, x, self.window, self.shift)


def to_windows(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """`[B, H, W, C]`, padded and rolled -> `[B * windows, positions of a window, C]`."""
    (height, width), moved = _padded(x, window), _moved(x, window, shift)
    x = F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    if any(moved):
        x = x.roll((-moved[0], -moved[1]), (1, 2))
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(
    windows: Tensor, like: Tensor, window: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """What `to_windows` made, in place again, cut to the size of `like`."""
    (height, width), moved = _padded(like, window), _moved(like, window, shift)
    rows, columns = height // window[0], width // window[1]
    x = windows.unflatten(1, window).unflatten(0, (-1, rows, columns))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if any(moved):
        x = x.roll(moved, (1, 2))
    return x[:, : like.shape[1], : like.shape[2]].contiguous()


def shift_mask(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """`[windows, N, N]`: -100 between positions that the roll alone made neighbours, else 0."""
    (height, width), moved = _padded(x, window), _moved(x, window, shift)
    region = x.new_zeros(1, height, width, 1)
    for axis, (size, whole) in enumerate(zip((height, width), window, strict=True), start=1):
        if moved[axis - 1]:
            place = x.new_zeros(size)
            place[size - whole :] = 1.0
            place[size - moved[axis - 1] :] = 2.0
            region += place.view([-1 if i == axis else 1 for i in range(4)]) * 3 ** (axis - 1)
    region = to_windows(region, window, (0, 0)).squeeze(-1)
    apart = region[:, None, :] != region[:, :, None]
    return apart.to(x.dtype) * -100.0


for _name in ("to_windows", "from_windows", "shift_mask"):
    fx.wrap(_name)


def _padded(x: Tensor, window: tuple[int, int]) -> tuple[int, int]:
    height, width = (-(-x.shape[i + 1] // window[i]) * window[i] for i in range(2))
    return height, width


def _moved(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> tuple[int, int]:
    """The roll; none along an axis that a single window covers."""
    height, width = _padded(x, window)
    return shift[0] * (window[0] < height), shift[1] * (window[1] < width)
