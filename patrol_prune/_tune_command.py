"""The command `tune`: search good settings, and show the front."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.text import Text

from patrol_prune.errors import UnmetLimitsError
from patrol_prune.plain_settings import build
from patrol_prune.tables import front_table
from patrol_prune.tune import tune
from patrol_prune.tune_result import ANEW, CAUTION, UNMEASURED, TuneResult
from patrol_prune.tune_settings import TuneConfig


def add_options(parser: ArgumentParser) -> None:
    """The options of `patrol-prune tune`."""
    parser.add_argument("--config", action="config", help="a YAML file of settings")
    parser.add_class_arguments(TuneConfig)


def search(options: dict[str, Any], tell: Callable[[str, str], None], bars: bool) -> None:
    """Carry the command out.

    Args:
        options: as the command line gave them.
        tell: called with a stage and a sentence.
        bars: show progress bars.

    Raises:
        PatrolError: whatever is wrong, or that no trial keeps to the limits.
    """
    values = {k: v for k, v in options.items() if k not in ("config", "print_config")}
    result = tune(build(TuneConfig, values, "the command line"), progress=tell, bars=bars)
    console = Console()
    if result.front:
        conclude(result, console)
    for name, label in (("plot", "Plot"), ("json", "Every trial")):
        if name in result.files:
            console.print(Text(f"{label}: {result.files[name].resolve()}"), soft_wrap=True)
    if result.why_empty is not None:
        raise UnmetLimitsError(result.why_empty)


def conclude(result: TuneResult, console: Console) -> None:
    """The front as a table, what it is worth, and how each point is trained in full."""
    front = result.front
    total = f"{len(result.trials)} finished trials"
    if result.failures:
        total += f" ({len(result.failures)} more failed)"
    guess = front[0].floor_ssim
    floor = "" if guess is None else f" Average picture, no upload needed: SSIM {guess:.3f}."
    console.print(front_table(
        [asdict(trial) for trial in front],
        title=f"The front: {len(front)} of {total}, not beaten in accuracy and SSIM at once",
        caption=f"Dense model: {100 * front[0].dense_accuracy:.1f}%.{floor} {CAUTION}",
    ))
    left_out = [str(trial.number) for trial in result.trials if not trial.sound]
    if left_out:
        console.print(Text(
            f"On no front and not in the plot, as {UNMEASURED}: trials {', '.join(left_out)}."
        ), soft_wrap=True)
    for line in flag_counts(result):
        console.print(Text(line), soft_wrap=True)
    console.print("Train and audit one in full:")
    for trial in front:
        file = result.files[f"trial {trial.number}"]
        console.print(Text(f"  patrol-prune run --config {shlex.quote(str(file))}"), soft_wrap=True)


def flag_counts(result: TuneResult) -> list[str]:
    """How often the attacks of the trials warned of themselves; a weak attack ranks badly."""
    counts = Counter(name for trial in result.trials for name in trial.flags)
    if not counts:
        return []
    told = ", ".join(f"{name} in {n}" for name, n in counts.most_common())
    return [
        f"Flags of the short attacks, of {len(result.trials)} trials: {told}. Where an attack is "
        "too weak, its SSIM says nothing: raise --trial-attack-epochs, or take other "
        f"--trial-attacks, {ANEW}."
    ]
