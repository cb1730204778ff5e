"""Multi-head attention over the live channels alone.

Torch-Pruning removes a channel from `nn.MultiheadAttention` everywhere at once, from its input,
from q, k and v, and from its output, because the layer knows one width only, `embed_dim`. As many
go from each head, so that `head_dim` falls and `num_heads` stays. With a mask `m` of the channels,
head h with its d channels i of `embed_dim`, and `D_h = sum_{i in h} m_i`,

    a_h = softmax(sum_{i in h} m_i q_i k_i / sqrt(D_h)),    o_i = sum_t a_h(t) m_i v_i(t)
    q = W_q (m x) + b_q,  k = W_k (m x) + b_k,  v = W_v (m x) + b_v,    y = W_o o + b_o

Derivation: with `m_i = 1` on the channels that stay and 0 elsewhere, the products run over what
stays, `D_h` is the `head_dim` that is left, `m x` and `o` reach only weights that stay, and what is
left of y is the narrower layer's. The channels of y are masked where they are read. All of this is
the layer itself with other weights,

    W_q' = diag(m sqrt(d / D_h)) W_q diag(m),   W_k' = W_k diag(m),   W_v' = diag(m) W_v diag(m)

and likewise the biases, so that dropout, attention masks and need_weights are the layer's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["attention_over_live_channels"]

_LEAST_WEIGHT = 1e-12


def attention_over_live_channels(
    layer: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What the layer gives with the channels' weights `mask`, its hooks left out.

    Args:
        layer: with keys and values as wide as `embed_dim`.
        args: of its forward.
        kwargs: likewise.
        mask: `[embed_dim]`, differentiable.
    """
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    widths = mask.clamp_min(0.0).view(layer.num_heads, -1).sum(1).clamp_min(_LEAST_WEIGHT)
    gain = (layer.head_dim / widths).sqrt().repeat_interleave(layer.head_dim)
    rows = torch.cat([mask * gain, torch.ones_like(mask), mask]).to(weight.dtype)
    new = {"layer.in_proj_weight": rows[:, None] * weight * mask.to(weight.dtype)}
    if bias is not None:
        new["layer.in_proj_bias"] = rows * bias
    output: tuple[Tensor, Tensor | None] = functional_call(_Bare(layer), new, args, dict(kwargs))
    return output


class _Bare(nn.Module):
    """A layer's forward without the layer's hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.forward(*args, **kwargs)
