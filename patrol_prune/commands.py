"""What the command line does: its options, and one function for each command."""

from __future__ import annotations

import itertools
import logging
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from patrol_prune import _export_command, _plan_command, _tune_command
from patrol_prune._audit_command import add_options, attack
from patrol_prune.attacks import InverseNetworkConfig
from patrol_prune.attacks.rmle import RMLEConfig
from patrol_prune.errors import InputError, PatrolError
from patrol_prune.finetune import FinetuneConfig
from patrol_prune.pipeline import RunResult, run
from patrol_prune.plain_settings import build
from patrol_prune.report import console_table
from patrol_prune.run_summary import rewrite_report
from patrol_prune.rundir import CONFIG, make_folder, run_command
from patrol_prune.settings import AuditConfig, PrivacyConfig, RunConfig, ScoreConfig
from patrol_prune.storage import WRITE_ERRORS
from patrol_prune.vehicles import write_vehicles

OK, BAD_INPUT, INTERRUPTED = 0, 2, 130

USAGE = {
    "plan": "patrol-prune plan --edge-macs BUDGET [--model NAME] [options]",
    "run": "patrol-prune run --data FOLDER --edge-macs BUDGET [--model NAME] [options]",
    "tune": "patrol-prune tune --data FOLDER --edge-macs BUDGET [--min-accuracy SHARE] [options]",
    "audit": "patrol-prune audit RUN [options] | --model NAME --at LAYER --data FOLDER [options]",
    "export": "patrol-prune export RUN [--formats onnx pt2] [options]",
    "report": "patrol-prune report RUN",
    "demo": "patrol-prune demo [options]",
}
ABOUT = """Prune the device side of a split network so that what it uploads gives the image away
as little as possible, and measure what an attacker still sees."""

EXAMPLES = {
    "": """Examples:
  patrol-prune demo
  patrol-prune plan --model resnet18 --image-size 128 --edge-macs 200M
  patrol-prune run --data photos --model resnet18 --edge-macs 200M --name photos
  patrol-prune tune --data photos --model resnet18 --edge-macs 200M --min-accuracy 0.8
  patrol-prune audit runs/photos --seeds 0 1 2
  patrol-prune export runs/photos
  patrol-prune report runs/photos

`patrol-prune COMMAND --help` explains each.""",
    "plan": """Where can the model be cut, what does each place cost, and how hard would it have to
be pruned to meet the budget? Nothing is trained.

Examples, 200 million multiply-adds on the device; the same, and how long it takes on this one:
  patrol-prune plan --model resnet50 --image-size 128 --edge-macs 200M
  patrol-prune plan --model resnet18 --image-size 128 --edge-macs 200M --latency --plot plan.png

The budget is a count (9.9M), a fraction of the dense edge (0.5, together with --at), or the name of
a split (layer1), whose dense edge's cost is meant.""",
    "run": """Train, cut, score, prune, fine-tune, attack and report. What is asked for:

  --data FOLDER     train/ and val/ or test/ inside, each with one folder of images per class
  --edge-macs N     the device's budget in multiply-adds (see `patrol-prune plan --help`)
  --model NAME      any torchvision classifier, or module:function of your own
  --weights FILE    safetensors; without it the model is trained first
  --private NAME    module:function of your own that finds what must not be seen above all

Example:
  patrol-prune run --data photos --model resnet18 --image-size 128 --edge-macs 200M --name photos

Every setting can stand in a file: `--print-config` writes one, `--config FILE` reads it, and
options after it change it. The same settings resume a run that was interrupted, after the last
epoch of a training, or in its audit after the attacks that had ended; --data and --weights may be
in another place by then. (A decoder is trained once more where rmle is still to come, which may
begin at its answer.)""",
    "tune": """Search beta, alpha, the split, how much of the budget to use and what is sent, for
your own model, images and limits. What is asked for is that of `run`, and limits:

  --min-accuracy SHARE        the least accuracy, or
  --max-accuracy-drop SHARE   how far below the dense model's it may lie
  --max-feature-bytes N       the most that is uploaded per image
  --trials N                  finished trials of the whole study
  --storage WHERE             a database's URL or a file, for workers on several machines

Example:
  patrol-prune tune --data photos --model resnet18 --edge-macs 200M --max-accuracy-drop 0.02

The same command started again goes on; started twice, both work on one study. What comes out is a
front of trials, each with settings for `patrol-prune run --config`. A trial's attack is short: it
ranks, and only the full run says what an attacker sees.

It needs Optuna: pip install 'optuna>=4'""",
    "audit": """Attack an edge with fresh attackers: the finished one of a run, whose report is
written anew, or that of any model, ours or not, cut where you say.

The same command goes on after the attacks on a run that had ended before it was interrupted. A run
of a module:function imports it only where --model (or --private) names it again.

Examples, three attackers; every kind of attack; a model of your own:
  patrol-prune audit runs/photos --seeds 0 1 2
  patrol-prune audit runs/photos --attacks linear_inverse inverse_network unet rmle
  patrol-prune audit --model resnet18 --weights photos.safetensors --at layer2 --data photos""",
    "export": """Write the finished edge of a run, and its cloud, as files that run without this
package, and check what they compute. The edge takes pixels on [0, 1].

Examples, for ONNX Runtime; for torch.export.load as well, many pictures at once:
  patrol-prune export runs/photos
  patrol-prune export runs/photos --formats onnx pt2 --any-batch

ONNX needs two packages: pip install onnxscript onnxruntime""",
    "report": """Write the report page of a finished run again from its records.

Example:
  patrol-prune report runs/photos""",
    "demo": """The whole path on rendered vehicles, offline, in ten to twenty minutes on two CPU
cores. The report shows whether an attacker can still read the number plates.

Example:
  patrol-prune demo --name demo""",
}


class _Parser(ArgumentParser):  # type: ignore[misc]
    """Options are spelt with dashes; the help begins with what the command is for."""

    teaching = ""

    def format_help(self) -> str:
        """The taught text first, then usage and options."""
        text = _dashed(super().format_help())
        return f"{self.teaching}\n\n{text}" if self.teaching else text

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Exit with 2 and one message."""
        command = self.prog.split()[-1]  # a group of settings may be called as a command is
        prefixes = command if command in USAGE else "|".join(USAGE)
        named = re.sub(rf"(?<!value: )(?<![\w./\\'-])(?:{prefixes})\.([a-z])", r"--\1", message)
        named = re.sub(r'Parser key "(?:--)?([a-z][\w.]*)"', r"--\1", named)
        named += " Write a list as [a,b]." * ("'tuple'" in named)
        see = self.prog.replace("[options] ", "")
        if named.endswith("arguments are required: --run"):  # of `report`, where it is no option
            named, see = named.replace("--run", "RUN, a run's folder"), f"{see} report"
        _complain(_dashed(named) + f"\nSee: {see} --help")
        raise SystemExit(BAD_INPUT)


def _dashed(text: str) -> str:
    return re.sub(r"--[A-Za-z][\w.]*", lambda m: m.group().replace("_", "-"), text)


def _underscored(arguments: Sequence[str]) -> list[str]:
    """`--image-size 64` as `--image_size 64`; values stay as they are."""
    changed = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and len(name) > 2:
            name = "--" + name[2:].replace("-", "_")
        changed.append(name + equals + value)
    return changed


def make_parser() -> ArgumentParser:
    """The command line."""
    parser = _Parser(prog="patrol-prune", description=ABOUT)
    parser.add_argument("--verbose", action="store_true", help="tell more while working")
    parser.add_argument("--version", action="version", version=version("patrol-prune"))
    commands = parser.add_subcommands(required=False, dest="command")
    made = {name: _Parser(usage=usage) for name, usage in USAGE.items()}
    for name, command in made.items():
        command.teaching = EXAMPLES[name]
    parser.teaching = EXAMPLES[""]
    _plan_command.add_options(made["plan"])
    made["run"].add_argument("--config", action="config", help="a YAML file of settings")
    made["run"].add_class_arguments(RunConfig)
    made["run"].add_argument("--overwrite", action="store_true",
                             help="start anew if the directory holds another run")
    add_options(made["audit"])
    _tune_command.add_options(made["tune"])
    _export_command.add_options(made["export"])
    made["report"].add_argument("run", type=str, help="a run's folder, as in runs/photos")
    made["demo"].add_argument("--name", type=str, default="demo", help="of the run")
    made["demo"].add_argument("--runs", type=str, default="runs", help="the folder of all runs")
    made["demo"].add_argument("--seed", type=int, default=0, help="of everything")
    made["demo"].add_argument("--device", type=str, default="cpu", help="cpu, cuda, mps or auto")
    made["demo"].add_argument("--overwrite", action="store_true", help="start anew")
    summaries = {
        "plan": "where to cut, and how hard to prune there", "run": "the whole path on your images",
        "tune": "search good settings for your images and limits",
        "audit": "attack a finished run again", "report": "write a run's page again",
        "export": "write both halves as files to deploy",
        "demo": "the whole path on rendered vehicles, offline",
    }
    for name, command in made.items():
        commands.add_subcommand(name, command, help=summaries[name])
    return parser


def execute(arguments: Sequence[str]) -> int:
    """Run one command; the exit code. See `cli.main`."""
    parser = make_parser()
    try:
        chosen = _parsed(parser, _underscored(arguments))
        if chosen.command is None:
            parser.print_help()
            return OK
        _log(chosen.verbose)
        COMMANDS[chosen.command](chosen[chosen.command])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else OK if stop.code is None else BAD_INPUT
    except PatrolError as error:
        _complain(_dashed(str(error)))
        return BAD_INPUT
    except WRITE_ERRORS as error:
        logging.getLogger("patrol_prune").debug("", exc_info=True)
        resumed = any(name in arguments for name in ("run", "tune", "demo"))
        _complain(f"{error}." + resumed * (" What was finished before is kept; the same command "
                                           "goes on from there once files can be written again."))
        return BAD_INPUT
    return OK


def _parsed(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    try:
        return parser.parse_args(arguments)
    except UnicodeDecodeError as error:
        files = [value for option, value in itertools.pairwise(arguments) if option == "--config"]
        files += [a.partition("=")[2] for a in arguments if a.startswith("--config=")]
        raise InputError(
            f"Expected --config as a file of UTF-8 text, came {' or '.join(files)} ({error}). Save "
            "it as UTF-8."
        ) from error


def _log(verbose: bool) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("patrol_prune").setLevel(level)


def _complain(message: str) -> None:
    Console(stderr=True).print(Text("error: ", style="bold red") + Text(message), soft_wrap=True)


def _tell(stage: str, sentence: str) -> None:
    told = Text(sentence.replace("\n", "\n" + 9 * " "))
    Console().print(Text(f"{stage:9}", style="bold") + told, soft_wrap=True)


def _plan(options: Namespace) -> None:
    _plan_command.show(options.as_dict(), print)


def _run(options: Namespace) -> None:
    values = options.as_dict()
    overwrite = bool(values.pop("overwrite", False))
    for key in ("config", "print_config"):
        values.pop(key, None)
    _whole_path(build(RunConfig, values, "the command line"), overwrite)


def _whole_path(config: RunConfig, overwrite: bool) -> None:
    try:
        result = run(config, overwrite=overwrite, progress=_tell, bars=sys.stderr.isatty())
    except KeyboardInterrupt:
        folder = Path(config.runs) / config.name
        if not (folder / CONFIG).is_file():
            raise
        _complain(
            f"Interrupted. What was finished is kept; go on with\n  {run_command(folder)}"
        )
        raise SystemExit(INTERRUPTED) from None
    _conclude(result)


def _conclude(result: RunResult) -> None:
    console = Console()
    console.print(console_table(result.summary, result.audit))
    console.print(Text(f"Report: {result.report.resolve()}"), soft_wrap=True)
    typed = ["patrol-prune", "export", str(result.directory)]
    typed += ["--model", result.summary.model] * (":" in result.summary.model)
    console.print(Text(f"To deploy it: {shlex.join(typed)}"), soft_wrap=True)


def _tune(options: Namespace) -> None:
    _tune_command.search(options.as_dict(), _tell, sys.stderr.isatty())


def _audit(options: Namespace) -> None:
    try:
        attack(options.as_dict(), _tell, _conclude)
    except KeyboardInterrupt:
        kept = ("The run's earlier audit counts until the new one is whole. Attacks that had ended "
                "are kept; the same command goes on from there.")
        _complain(f"Interrupted. {kept}" if options.run else
                  "Interrupted. No report was written; the same command begins anew.")
        raise SystemExit(INTERRUPTED) from None


def _export(options: Namespace) -> None:
    _export_command.write(options.as_dict(), _tell)


def _report(options: Namespace) -> None:
    Console().print(Text(f"Report: {rewrite_report(options.run).resolve()}"), soft_wrap=True)


def demo_config(name: str, runs: str, data: Path, *, seed: int, device: str) -> RunConfig:
    """Settings that finish within minutes on two CPU cores, and still show the leak."""
    return RunConfig(
        data=str(data), edge_macs="layer1", model="small_resnet", at="layer3", image_size=64,
        name=name, runs=runs, batch_size=32, device=device, seed=seed,
        train=FinetuneConfig(epochs=12, distill_weight=0.0),
        score=ScoreConfig(batches=10, surrogate_steps=60),
        privacy=PrivacyConfig(beta=20.0),
        finetune=FinetuneConfig(epochs=8, lr=0.03, inner_steps=3, surrogate_warmup_steps=60),
        audit=AuditConfig(victims=64, attacker_share=0.4),
        rmle=RMLEConfig(steps=50, tuning_images=3, tuning_steps=15, refine=False),
        attacker=InverseNetworkConfig(
            width=32, depth=3, epochs=12, batch_size=16, max_extensions=1
        ),
    )


def _demo(options: Namespace) -> None:
    runs = str(Path(options.runs).expanduser())
    images = Path(runs) / f"{options.name}-vehicles-{options.seed}"
    config = demo_config(options.name, runs, images, seed=options.seed, device=options.device)
    make_folder(runs)
    _tell("images", f"Drawing vehicles into {images}.")
    write_vehicles(images, train=1200, test=200, size=64, seed=options.seed)
    _whole_path(config, options.overwrite)


COMMANDS: dict[str, Callable[[Any], None]] = {
    "plan": _plan, "run": _run, "tune": _tune, "audit": _audit, "export": _export,
    "report": _report, "demo": _demo,
}
