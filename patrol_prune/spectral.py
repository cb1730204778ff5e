"""A bound of every edge block from its layers' spectral norms: `lipschitz_form="spectral"`.

The sampled constants of `lipschitz.py` say how one perturbation of some images fares. This bound
holds for every input and every perturbation, and is looser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from patrol_prune.errors import CheckpointError
from patrol_prune.spectral_rules import BlockSteps, LinearMap, Rule, read_blocks

TINY = 1e-20
WARM_UP = 15
_MOST_ROUNDS = 100
_STILL = 1e-6
"""The norm of a fixed map has converged where a round of iterations adds no more than this."""


class PowerIteration:
    """The largest singular value of a linear map `A`, by `v <- A^T A v / ||A^T A v||`.

        sigma = ||A v||,    d sigma / d theta = u^T (dA / d theta) v    with    u = A v / sigma

    `A^T` is the backward pass of `A`, so that stride, padding, dilation and groups are the map's
    own, on inputs of the very size it sees. `sigma` rises to the norm from below as `v`, which is
    kept from call to call, converges.

    Args:
        apply: the map, of a batch of one.
        start: the first `v`, `[1, ...]`, not zero.
    """

    def __init__(self, apply: Callable[[Tensor], Tensor], start: Tensor) -> None:
        self.apply = apply
        self.vector = start / torch.linalg.vector_norm(start)

    def iterate(self) -> None:
        """One step of the vector; it stays where the map gives zero."""
        v = self.vector.detach().requires_grad_()
        with torch.enable_grad():
            y = self.apply(v)
            (back,) = torch.autograd.grad(y, v, y.detach())
        size = torch.linalg.vector_norm(back)
        step = torch.where(size > TINY, back / size.clamp_min(TINY), v.detach())
        # One layout whatever came: the same bits after a resume.
        self.vector = step.clone(memory_format=torch.contiguous_format)

    def sigma(self) -> Tensor:
        """The present estimate, a scalar, differentiable in what the map is made of."""
        return torch.linalg.vector_norm(self.apply(self.vector))


class SpectralBounds:
    """Upper bounds `k_i` of the Lipschitz constants of a chain of blocks.

    Along a block's graph, with `k(input) = 1`,

        k(f(a)) = ||f|| k(a),    k(a + b) = k(a) + k(b),    k([a, b]) = sqrt(k(a)^2 + k(b)^2)

    so that a chain's bound is the product of its layers' norms, and a residual block's is its
    shortcut's (1 where that is the identity) plus its branch's. `||f||` is the operator norm of a
    convolution, a linear layer or an average (by power iteration), `max |gamma| / sqrt(var + eps)`
    of a BatchNorm with its running variance, the largest slope of an activation, and the square
    root of the number of windows that share an input of a max-pool. Norms are Euclidean over
    everything but the batch.

    It bounds the blocks in evaluation mode, once the power iterations have converged. Like the
    paper's form it can be gamed by scale: a convolution shrinks, the running variance behind it
    follows, and nothing has changed. Soft masks count where they sit, at the inputs of
    convolutions and linear layers; that a removal also narrows the layer before is not seen.

    Args:
        blocks: the chain `f_1 .. f_N`.
        example: an input `[B, ...]` of the first block; its size is the size that counts.
        seed: of the starting vectors.
        iterations: power iterations for each evaluation, on top of 15 at the start.

    Raises:
        UnsupportedModelError: a block has an operator whose Lipschitz constant is unknown or
            infinite; it is named.

    Example:
        >>> doubling = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
        >>> _ = nn.init.eye_(doubling[0].weight).data.mul_(2.0)
        >>> [round(float(k), 4) for k in SpectralBounds([doubling], torch.zeros(1, 4))()]
        [2.0]
    """

    def __init__(
        self, blocks: Sequence[nn.Module], example: Tensor, *, seed: int = 0, iterations: int = 1
    ) -> None:
        self.iterations = iterations
        self._blocks = tuple(blocks)
        self._made_for = _identity(self._blocks)
        self._operators: list[PowerIteration] = []
        generator = torch.Generator().manual_seed(seed)
        read = read_blocks(self._blocks, example[:1].detach())
        self._programs = [
            (block, [self._rule(step.effect, generator, example) for step in block.steps])
            for block in read
        ]
        self.converge(WARM_UP)

    def __call__(self) -> Tensor:
        """The bounds `k`, shape `[N]`, differentiable in the blocks' weights and masks."""
        self.converge(self.iterations)
        return torch.stack([self._bound(block, rules) for block, rules in self._programs])

    def converge(self, iterations: int) -> None:
        """Iterate every vector so many times, on the weights as they are."""
        device = self._device()
        for operator in self._operators:
            operator.vector = operator.vector.to(device)
            for _ in range(iterations):
                operator.iterate()

    def fits(self, blocks: Sequence[nn.Module]) -> bool:
        """Whether these are still the blocks that were read, at their widths."""
        now = _identity(blocks)
        return len(now) == len(self._made_for) and all(
            a is b or (isinstance(a, tuple) and a == b)
            for a, b in zip(now, self._made_for, strict=True)
        )

    def state(self) -> dict[str, Tensor]:
        """The vectors, by number: with the weights, all that the next bounds depend on."""
        return {str(i): operator.vector for i, operator in enumerate(self._operators)}

    def load_state(self, state: Mapping[str, Tensor], path: str) -> None:
        """Put back what `state` gave.

        Raises:
            CheckpointError: it is of other blocks; `path` is named.
        """
        mine = {name: vector.shape for name, vector in self.state().items()}
        theirs = {name: vector.shape for name, vector in state.items()}
        if mine != theirs:
            raise CheckpointError(
                f"Expected {len(mine)} vectors of power iterations for these blocks in {path}, "
                f"came {len(theirs)} or others. Resume with the edge and the Lipschitz form that "
                "wrote it.",
                path=path,
            )
        for name, vector in state.items():
            self._operators[int(name)].vector = vector.clone()

    def _device(self) -> torch.device:
        return next((p.device for b in self._blocks for p in b.parameters()), torch.device("cpu"))

    def _bound(self, block: BlockSteps, rules: Sequence[Rule]) -> Tensor:
        known = {block.first: torch.ones((), device=self._device())}
        for step, rule in zip(block.steps, rules, strict=True):
            known[step.node] = rule(*(known[source] for source in step.sources))
        return known[block.last]

    def _rule(self, effect: Rule | LinearMap, generator: torch.Generator, like: Tensor) -> Rule:
        if not isinstance(effect, LinearMap):
            return effect
        start = torch.randn(effect.shape, generator=generator).to(like)
        if effect.trainable:
            operator = PowerIteration(effect.apply, start)
            self._operators.append(operator)
            return lambda k: operator.sigma() * k
        fixed = _converged(PowerIteration(effect.apply, start.abs()))
        return lambda k: fixed * k


def _converged(operator: PowerIteration) -> float:
    """The norm of a map that stays as it is: an average, a resizing."""
    sigma = 0.0
    for _ in range(_MOST_ROUNDS):
        for _ in range(WARM_UP):
            operator.iterate()
        before, sigma = sigma, float(operator.sigma())
        if sigma - before <= _STILL * sigma:
            break
    return sigma


def _identity(blocks: Sequence[nn.Module]) -> list[Any]:
    """What changes when a chain is pruned or cut anew: its graphs and its weights' shapes."""
    return [
        part for block in blocks
        for part in (
            block.graph if isinstance(block, fx.GraphModule) else block,
            tuple(tuple(p.shape) for p in block.parameters()),
        )
    ]
