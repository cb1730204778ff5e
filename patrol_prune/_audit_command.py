"""The command `audit`: of a run, or of any model that is cut somewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.text import Text

from patrol_prune.attacks import ATTACKS
from patrol_prune.audit_model import ModelAudit, audit_model
from patrol_prune.errors import InputError
from patrol_prune.pipeline import RunResult
from patrol_prune.plain_settings import build
from patrol_prune.reaudit import audit_again
from patrol_prune.tables import attack_table, flag_lines

_WHO = ("attacks", "seeds", "victims", "attacker_images", "check_attacks", "uploads")
_OF_A_RUN = ("model", "private", "attacks", "seeds", "attacker_images", "check_attacks", "uploads",
             "device", "data")


def add_options(parser: ArgumentParser) -> None:
    """The options of `patrol-prune audit`."""
    known = ", ".join(ATTACKS)
    for name, kind, about in (
        ("run", str, "a run's folder, as in runs/photos"),
        ("--model", str, "any torchvision classifier, or module:function of your own; beside "
                         "a run of your own model, the one in its settings, to have it imported"),
        ("--at", str, "where the model is cut, the last layer on the device"),
        ("--data", str, "images: train/ and val/ or test/, one folder per class in each; of a run, "
                        "where its images lie now"),
        ("--weights", str, "safetensors file of the model"),
        ("--undefended", str, "safetensors file of the same model before its defence"),
        ("--shifted", str, "a folder of other images, for one more attacker"),
        ("--image_size", int, "side of the square images, 128 without"),
        ("--normalization", str, "of pixels: auto, dataset, imagenet or none"),
        ("--private", str, "module:function of a detector of your own: pixels to 1 where a picture "
                           "is private, 0 elsewhere; what is seen there is told, and aimed at; "
                           "beside a run that has one, its own, to have it imported"),
        ("--private_share", float, "of the loss of the attack that aims there, 0.5 without"),
        ("--out", str, "the model's report, audit.json without"),
        ("--device", str, "where; that of the run without"),
        ("--victims", int, "images to be reconstructed"),
        ("--uploads", int, "of each picture, put together where the edge draws; 1, or as in the "
                          "run, without"),
        ("--epochs", int, "of an attacker's training"),
    ):
        more = {"nargs": "?"} if name == "run" else {}
        parser.add_argument(name, type=kind, help=about, **more)
    parser.add_argument("--seeds", type=int, nargs="+", help="one fresh attacker for each")
    parser.add_argument("--attacks", type=str, nargs="+", help=f"names of attacks: {known}")
    parser.add_argument("--attacker_images", type=int, nargs="+",
                        help="attack once more with only so many of the attacker's images, each")
    parser.add_argument("--check_attacks", action="store_true",
                        help="let every attack invert two trivial edges first")


def attack(
    options: dict[str, Any],
    tell: Callable[[str, str], None],
    conclude: Callable[[RunResult], None],
) -> None:
    """Carry the command out.

    Args:
        options: as the command line gave them, None or False where it did not.
        tell: called with a stage and a sentence.
        conclude: called with the run that was attacked again.

    Raises:
        PatrolError: options that do not go together, or whatever is wrong with the run or model.
    """
    given = {k: v for k, v in options.items() if v is not None and v is not False}
    if "run" not in given and "model" not in given:
        raise InputError(
            "Expected either a run's folder or --model with --at and --data, came neither."
        )
    if "run" not in given:
        _audit_model(given, tell)
        return
    run_folder = given.pop("run")
    odd = [f"--{name}" for name in given if name not in _OF_A_RUN]
    if odd:
        raise InputError(
            f"{', '.join(odd)} of a run cannot be changed: another audit would not compare. Leave "
            "it out, or audit the model by --model without the run."
        )
    conclude(audit_again(run_folder, progress=tell, **given))


def _audit_model(given: dict[str, Any], tell: Callable[[str, str], None]) -> None:
    config = dict(given)
    who = {k: config.pop(k) for k in _WHO if k in config}
    epochs = config.pop("epochs", None)
    for name in ("at", "data"):
        if name not in config:
            raise InputError(
                f"Expected --{name} beside --model, came none. See: patrol-prune audit --help"
            )
    chosen = build(ModelAudit, config, "the command line")
    chosen = replace(
        chosen, audit=replace(chosen.audit, **{k: _tupled(v) for k, v in who.items()}),
        attacker=replace(chosen.attacker, **({} if epochs is None else {"epochs": epochs})),
    )
    found = audit_model(chosen, progress=lambda sentence: tell("audit", sentence))
    console = Console()
    console.print(attack_table(found))
    for line in flag_lines(found.flags):
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"Report: {Path(chosen.out).resolve()}"), soft_wrap=True)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
