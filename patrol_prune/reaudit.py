"""The finished edge of a run under other attackers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from patrol_prune.errors import InputError, RunDirectoryError
from patrol_prune.pipeline import DENSE, Progress, RunResult, Work
from patrol_prune.preparation import images_of, refuse_changed
from patrol_prune.rundir import CONFIG, RunDirectory, place_of, read_config, run_command
from patrol_prune.settings import AuditConfig, RunConfig, resolve_device


def audit_again(
    directory: str | Path,
    *,
    model: str | None = None,
    private: str | None = None,
    attacks: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    attacker_images: Sequence[int] | None = None,
    check_attacks: bool | None = None,
    uploads: int | None = None,
    data: str | Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Attack the finished edge of a run once more, with other attackers, and report anew.

    Nothing is trained but attackers, and the edge stays as it is.

    Args:
        directory: of the run.
        model: of a run of the user's own model, the `module:function` in its settings: it is
            imported only where it is named here, because whoever wrote the folder chose it.
        private: the same of a run's detector of private regions.
        attacks: names; those of the run without.
        seeds: one fresh attacker for each; those of the run without.
        attacker_images: attack once more with only so many images each; as in the run without.
        check_attacks: let every attack invert trivial edges first; as in the run without.
        uploads: of each picture, for an edge with dropout; as in the run without.
        data: where the run's images lie now; where they did without.
        device: where; that of the run without.
        progress: called with each stage and what happens in it.

    Raises:
        InputError: the run's model or its detector is of a module of one's own, and `model` or
            `private` does not name it.
        RunDirectoryError: there is no run, it has no finished edge yet, the dense model that it
            is held against is gone, or the images are others.
    """
    path = Path(directory)
    config = config_of_run(path, model)
    _refuse_unnamed(path, config.private or "", private, "private", "detector")
    own = config.audit
    who = replace(
        own, attacks=tuple(attacks or own.attacks),
        seeds=tuple(own.seeds if seeds is None else seeds),
        attacker_images=tuple(own.attacker_images if attacker_images is None else attacker_images),
        check_attacks=own.check_attacks if check_attacks is None else check_attacks,
        uploads=own.uploads if uploads is None else uploads,
    )
    name, runs = place_of(path, config.to_dict())  # it may have been renamed since
    chosen = replace(config, name=name, runs=runs, device=device or config.device, audit=who,
                     data=str(Path(data or config.data).expanduser()))
    where, images = resolve_device(chosen.device), images_of(chosen, path)
    with RunDirectory(path, read_config(path / CONFIG)) as folder:
        refuse_unfinished(folder)
        if who.undefended and not folder.done("model"):
            raise RunDirectoryError(
                f"The dense model in {path / DENSE}, which the edge is held against "
                "(audit.undefended), is missing or was changed. Put it back, or let the run train "
                f"it again, and everything after it: {run_command(path)}"
            )
        work = Work(chosen, folder, images, where, progress, False)
        if who != own:
            work.notes = (f"The edge was attacked again: {_command(chosen, path, own)}",)
        # The dense model was saved: the file that its weights came from is not read again.
        refuse_changed(replace(chosen, weights=None), images, folder.notes("data"), path)
        folder.moved(chosen.data)
        return work.attack_again()


def config_of_run(path: Path, model: str | None) -> RunConfig:
    """The settings of the run in `path`; a model of the user's own has to be named by `model`.

    Raises:
        InputError: it is not.
        RunDirectoryError: there is no run.
    """
    if not (path / CONFIG).is_file():
        raise RunDirectoryError(f"{path} holds no run: it has no {CONFIG}. Give a run's folder.")
    config = RunConfig.from_yaml(path / CONFIG)
    _refuse_unnamed(path, config.model, model, "model", "model")
    return config


def refuse_unfinished(folder: RunDirectory) -> None:
    """A RunDirectoryError where the edge of the run is not there yet, or is another by now."""
    if not (folder.done("finetune") and folder.done("plan")):
        raise RunDirectoryError(
            f"The run in {folder.path} has no finished edge yet. Resume it first: "
            f"{run_command(folder.path)}"
        )


def _refuse_unnamed(path: Path, name: str, given: str | None, option: str, what: str) -> None:
    """Refuse to import a module that a run's folder names and the user does not."""
    type_it = f"--{option} {shlex.quote(name)} (in Python, {option}={name!r})"
    if given is None and ":" in name:
        raise InputError(
            f"The {what} of the run in {path} is {name!r}, a module that would be imported, which "
            f"runs its code. If you trust it, say so: {type_it}."
        )
    if given not in (None, name):
        advice = f"Give {type_it}" if ":" in name else "Leave it out"
        raise InputError(
            f"Expected the {what} of the run in {path}, which is {name or 'none'!r}, came "
            f"{given!r}. {advice}. Without a run's folder, --model of `patrol-prune audit` audits "
            "any model."
        )


def _command(config: RunConfig, path: Path, own: AuditConfig) -> str:
    """What to type to have the same attackers once more; in Python where no option says it."""
    who, named, private = config.audit, ":" in config.model, config.private is not None
    if own.check_attacks > who.check_attacks or (own.attacker_images and not who.attacker_images):
        return (
            f"patrol_prune.reaudit.audit_again({str(path)!r}, "
            + f"model={config.model!r}, " * named + f"private={config.private!r}, " * private
            + f"attacks={who.attacks}, "
            f"seeds={who.seeds}, attacker_images={who.attacker_images}, "
            f"check_attacks={who.check_attacks}, uploads={who.uploads})"
        )
    told = ["patrol-prune", "audit", str(path), *(["--model", config.model] * named),
            *(["--private", str(config.private)] * private), "--attacks", *who.attacks,
            "--seeds", *map(str, who.seeds), "--uploads", str(who.uploads)]
    if who.attacker_images:
        told += ["--attacker-images", *map(str, who.attacker_images)]
    return shlex.join(told) + " --check-attacks" * who.check_attacks
