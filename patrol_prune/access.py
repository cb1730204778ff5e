"""What an attacker gets of a split: its edge as a function of pixels, features, a fresh twin."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from patrol_prune.attacks import EdgeFunction
from patrol_prune.cost import evaluating
from patrol_prune.pixels import Normalization

_SHADOW_STD = 0.02


class Repeated(nn.Module):
    """What an attacker has who puts several uploads of the same picture together.

        z_i = sum_k f_e(x)_i,k / max(1, #{k: f_e(x)_i,k != 0}), k = 1 ... K, each with its own draw

    Under noise that is the mean. Where values are dropped, those that came through show the rest as
    it is, up to one factor, which decoders learn. Of noise that a ReLU clips at 0 it forgets how
    often it was clipped.

    Args:
        edge: one that draws; its weights are shared. It runs `K` times for each call.
        uploads: `K`, at least 1.
    """

    def __init__(self, edge: nn.Module, uploads: int) -> None:
        super().__init__()
        self.edge, self.uploads = edge, uploads

    def forward(self, x: Tensor) -> Tensor:
        """Model inputs `[N, ...]` to features `[N, ...]`."""
        z: Tensor = self.edge(x)
        total, seen = z, (z != 0).to(z.dtype)
        for _ in range(self.uploads - 1):
            z = self.edge(x)
            total, seen = total + z, seen + (z != 0)
        return total / seen.clamp_min(1.0)


def edge_function(edge: nn.Module, normalization: Normalization) -> EdgeFunction:
    """Pixels `[N, C, H, W]` on [0, 1] to what `edge` sends for them, float32, on their device.

    `edge(normalization.to_input(pixels))` without autocast, with gradients where they are enabled;
    the mode is the edge's own (see `lent`).
    """
    device = _device(edge)

    def query(pixels: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            z: Tensor = edge(normalization.to_input(pixels.to(device)))
        return z.float().to(pixels.device)

    return query


def compute_features(
    edge: nn.Module, pixels: Tensor, normalization: Normalization, *, batch_size: int = 128
) -> Tensor:
    """What `edge` sends for `pixels [N, C, H, W]`: float32 `[N, *feature_shape]` on the CPU.

    Evaluation mode, no gradients, no autocast; the edge's modes come back as they were.
    """
    query = edge_function(edge, normalization)
    with evaluating(edge), torch.no_grad():
        return torch.cat([query(batch).cpu() for batch in torch.split(pixels, batch_size)])


@contextmanager
def lent(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient to any parameter inside; afterwards all is as it was.

    That includes the state of every `torch.Generator` that a module holds as an attribute, so
    that a second audit of a random edge sees the same draws.
    """
    held = nn.ModuleList(modules)
    flags = [(p, p.requires_grad) for p in held.parameters()]
    generators = [
        g for m in held.modules() for g in vars(m).values() if isinstance(g, torch.Generator)
    ]
    states = [g.get_state() for g in generators]
    with evaluating(held):
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def fresh_twin(edge: nn.Module, seed: int) -> nn.Module:
    """A copy of `edge` with new weights and statistics, trainable, in training mode.

    Layers are drawn anew by their own `reset_parameters`; of parameters outside of such layers,
    vectors become zeros where they are called a bias and ones elsewhere, all others are drawn from
    a normal of standard deviation 0.02. Modules with an attribute `silent` (those that add noise)
    are silenced; quantisation stays. The global generators are left untouched.
    """
    twin = copy.deepcopy(edge)
    drawn: set[int] = set()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for module in twin.modules():
            if hasattr(module, "silent"):
                setattr(module, "silent", True)  # noqa: B010  a Module's attributes are unknown
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                on = {p.device for p in module.parameters(recurse=False)} - {torch.device("cpu")}
                module.cpu()
                reset()
                if on:
                    module.to(on.pop())
                drawn.update(id(p) for p in module.parameters(recurse=False))
        for name, parameter in twin.named_parameters():
            if id(parameter) in drawn:
                continue
            if parameter.dim() > 1:
                values = torch.randn(parameter.shape) * _SHADOW_STD
            else:
                values = torch.full(parameter.shape, 0.0 if "bias" in name else 1.0)
            parameter.copy_(values)
    return twin.requires_grad_(True).train()


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters(), next(module.buffers(), torch.empty(0))).device
