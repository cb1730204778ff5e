"""How long a module takes on this device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Measurement, Timer

from patrol_prune.cost import as_single_tensor, device_of, draws_restored, evaluating
from patrol_prune.errors import InputError
from patrol_prune.given import check_count, check_kind, check_number

_FEWEST = 9


@dataclass(frozen=True)
class LatencyConfig:
    """How latency is measured.

    Attributes:
        batch: images that pass at once.
        threads: of torch while measuring; None for as many as torch has been given.
        min_run_time: seconds that one measurement takes at least, warm-up excluded.
        roundings: multiples of channels to compare for the pruned edge of a `plan`; None keeps any
            number.

    Raises:
        InputError: a value out of its range.
    """

    batch: int = 1
    threads: int | None = None
    min_run_time: float = 0.5
    roundings: tuple[int | None, ...] = (None, 4, 8, 16)

    def __post_init__(self) -> None:
        check_count(self.batch, "batch", 1)
        check_count(self.threads, "threads", 1, optional=True)
        check_number(self.min_run_time, "min_run_time")
        if not self.min_run_time > 0.0:
            raise InputError(f"Expected a positive min_run_time, came {self.min_run_time}.")
        if not isinstance(self.roundings, tuple | list) or not self.roundings:
            raise InputError("Expected roundings as one or more numbers, as in (None, 8), came "
                             f"{self.roundings!r}. None is any number.")
        for rounding in self.roundings:
            check_count(rounding, "roundings", 1, optional=True)


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass of a whole batch.

    Attributes:
        median_ms: median over the runs.
        iqr_ms: the third quartile less the first.
        runs: values that the two are taken over, each the mean of `passes` forward passes.
        passes: forward passes in each run.
        batch: images in a pass.
        threads: of torch.
        device: where it ran, cpu or cuda:0.
    """

    median_ms: float
    iqr_ms: float
    runs: int
    passes: int
    batch: int
    threads: int
    device: str

    @property
    def circumstances(self) -> str:
        """Under which it was measured, as in `batch 1, 1 thread, cpu`."""
        plural = "" if self.threads == 1 else "s"
        return f"batch {self.batch}, {self.threads} thread{plural}, {self.device}"

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ms (IQR {self.iqr_ms:.2g})"


def measure_latency(
    module: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    config: LatencyConfig | None = None,
) -> Latency:
    """Time forward passes of `module` in evaluation mode, without gradients.

    They run in the type of the module's weights and inputs, float32 as a rule.
    `torch.utils.benchmark.Timer.blocked_autorange` warms up, chooses how many passes make a run
    and waits for an accelerator. At least nine runs are taken, however slow the module is. A
    machine with other work to do shows in the interquartile range.

    Args:
        module: takes one tensor; mode and buffers are left as found.
        example_inputs: a batch `[N, ...]`, or a tuple with one; its first sample is repeated.
        config: batch, threads, time.

    Raises:
        InputError: the module cannot run on that batch.
    """
    config = config or LatencyConfig()
    check_kind(config, "config", LatencyConfig, "Make one: LatencyConfig(batch=1).")
    check_kind(module, "module", nn.Module, "Give a split's edge, say.")
    x = as_single_tensor(example_inputs)[:1]
    x = x.detach().to(device_of(module, x)).repeat(config.batch, *[1] * (x.dim() - 1))
    threads = config.threads or torch.get_num_threads()
    with evaluating(module), draws_restored(module), torch.no_grad():
        _run(module, x)
        timer = Timer("module(x)", globals={"module": module, "x": x}, num_threads=threads)
        measured = timer.blocked_autorange(min_run_time=config.min_run_time)
        passes, times = measured.number_per_run, list(measured.times)
        while len(times) < _FEWEST:
            times += timer.timeit(passes).times
    all_runs = Measurement(passes, [t * passes for t in times], measured.task_spec)
    return Latency(
        1e3 * all_runs.median, 1e3 * all_runs.iqr, len(times), passes, config.batch, threads,
        str(x.device),
    )  # fmt: skip


def _run(module: nn.Module, x: Tensor) -> None:
    try:
        module(x)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise InputError(
            f"The module cannot run on a batch of shape {tuple(x.shape)}: {error}. Give inputs of "
            "the shape that it takes."
        ) from error
