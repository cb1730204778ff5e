"""What an attacker gets of a split: its edge as a function of pixels, features, a fresh twin."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from patrol_prune.attacks import EdgeFunction
from patrol_prune.cost import draws_restored, evaluating, generators_of
from patrol_prune.given import real
from patrol_prune.pixels import Normalization

_SHADOW_STD = 0.02
_DRAWS = 32
_LOOKED = 32
_GAP = 4.0
_GAPPED = 0.05


class Repeated(nn.Module):
    """What an attacker has who puts several uploads of the same picture together.

        z_i = sum_k f_e(x)_i,k / K                                  k = 1 ... K, each a draw
        z_i = sum_k f_e(x)_i,k / max(1, #{k: f_e(x)_i,k != 0})      where values are dropped

    Under noise the mean is all that can be had, also of noise that a ReLU clips at 0 or a quantiser
    rounds to it: how often that happened tells what is under it. Where values are dropped, a zero
    tells nothing, and those that came through show the rest as it is, up to one factor, which
    decoders learn.

    Which it is, is seen in the first call in which a value is 0 in some draws and not in others,
    by at least 32 draws of a few pictures, and kept from then on. Values are dropped if two things
    hold. Of those that are 0 at times, one in twenty is four standard deviations from 0 at the
    others: clipped and rounded noise leaves no such gap. And the tenth that is largest is 0 at
    least half as often as all are: large values are neither clipped nor rounded to 0.

    Args:
        edge: one that draws; its weights are shared. It runs `K` times for each call.
        uploads: `K`, at least 1.
        dropped: whether values are dropped; None to see.
    """

    def __init__(self, edge: nn.Module, uploads: int, dropped: bool | None = None) -> None:
        super().__init__()
        self.edge, self.uploads, self.dropped = edge, uploads, dropped

    def forward(self, x: Tensor) -> Tensor:
        """Model inputs `[N, ...]` to features `[N, ...]`."""
        z = self._sent(x)
        total, seen = z, (z != 0).to(z.dtype)
        for _ in range(self.uploads - 1):
            z = self._sent(x)
            total, seen = total + z, seen + (z != 0)
        if self.dropped is None:
            self.dropped = self._look(x[:_LOOKED])
        return total / (seen.clamp_min(1.0) if self.dropped else float(self.uploads))

    def _sent(self, x: Tensor) -> Tensor:
        """One upload; whole numbers as float32, whose sums do not run over."""
        z: Tensor = self.edge(x)
        return z if z.is_floating_point() or z.is_complex() else z.float()

    @torch.no_grad()
    def _look(self, x: Tensor) -> bool | None:
        """Whether values are dropped, by draws of these pictures alone; None if they do not tell.
        """
        count = max(_DRAWS, self.uploads)
        z = self._sent(x)
        total, seen, squares = z, (z != 0).to(z.dtype), z**2
        for _ in range(count - 1):
            z = self._sent(x)
            total, seen, squares = total + z, seen + (z != 0), squares + z**2
        return _dropped(seen, total, squares, count)


def _dropped(seen: Tensor, total: Tensor, squares: Tensor, draws: int) -> bool | None:
    """Whether values were dropped; None where none was 0 in some draws alone (see `Repeated`)."""
    if bool((seen == draws).all()):
        return False
    mean_square = (total / seen.clamp_min(1.0)) ** 2
    variance = (squares - seen * mean_square) / (seen - 1.0).clamp_min(1.0)
    mixed = (seen >= draws // 4) & (seen < draws)
    if not bool(mixed.any()):
        return None
    gap = mixed & (mean_square > _GAP**2 * variance)
    if float(gap.sum()) < _GAPPED * float(mixed.sum()):
        return False
    live = seen > 0
    size, zero = mean_square[live], 1.0 - seen[live] / draws
    largest = zero[size.topk(max(1, len(size) // 10)).indices]
    return bool(largest.mean() > 0.5 * zero.mean())


def edge_function(
    edge: nn.Module, normalization: Normalization, *, wide: bool = False
) -> EdgeFunction:
    """Pixels `[N, C, H, W]` on [0, 1] to what `edge` sends for them, on their device.

    `edge(normalization.to_input(pixels))` without autocast, with gradients where they are enabled,
    as `real` has it, float32, or float64 where `wide`; the mode is the edge's own (see `lent`).
    """
    device = _device(edge)
    kind = next((p.dtype for p in edge.parameters() if p.is_floating_point()), torch.float32)

    def query(pixels: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            z = real(edge(normalization.to_input(pixels.to(device)).to(kind)))
        if wide:  # on the CPU: not every accelerator has float64
            return z.cpu().double().to(pixels.device)
        return z.float().clone().to(pixels.device)  # some edges send the same buffer each time

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
    with evaluating(held), draws_restored(held):
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


class Draws:
    """Draws of a module that are set apart for each who asks.

    What somebody gets is the same whatever was drawn before him, and unlike what others get. It
    follows from the state in which the generators were, those that the module holds as attributes
    and the CPU's global one.
    """

    def __init__(self, module: nn.Module) -> None:
        self._generators = [torch.default_generator, *generators_of(module)]
        self._states = [g.get_state().numpy().tobytes() for g in self._generators]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What is drawn inside is not missing afterwards."""
        states = [g.get_state() for g in self._generators]
        try:
            yield
        finally:
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)

    def apart(self, *who: object) -> None:
        """From here on the module draws for `who`."""
        for number, (generator, state) in enumerate(
            zip(self._generators, self._states, strict=True)
        ):
            digest = hashlib.sha256(state + repr((number, *who)).encode()).digest()
            generator.manual_seed(int.from_bytes(digest[:7], "big"))


def trainable(edge: nn.Module) -> bool:
    """Whether `fresh_twin` can make another of it: all of its weights are ordinary parameters."""
    kinds = [type(module).__module__ for module in edge.modules()]
    whole = any(kind.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")) for kind in kinds)
    return not whole and any(p.is_floating_point() for p in edge.parameters())


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
