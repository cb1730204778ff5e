"""Accuracy against what an attacker reconstructs, at equal edge MACs, on CIFAR-10.

    python benchmarks/frontier.py --data ~/data/cifar10 --work ~/frontier

The training images are parted once, by seed: the defender trains on the first part, every
attacker on another. One dense model is trained, then each method cuts it, prunes its edge to the
multiply-adds of the dense edge after `layer1` and fine-tunes it for the same number of epochs with
the same distillation from the dense model. Every defence is then put on top of the Taylor-pruned
model, swept over its own strength and trained for the same few epochs more; PATROL's model gets as
many. All are attacked by freshly trained decoders, and the few models that matter by every attack
there is. Every step is kept in the working directory, so that an interrupted run goes on where it
stopped; several workers may share the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from frontier_methods import (
    ATTACKED_LONGER,
    DATASET,
    DEEPER_BEST,
    MET_BY_OTHERS,
    SEEN_OFTEN,
    Frontier,
    Method,
    methods,
)
from frontier_models import NORMALIZATION, Data, defended, dense_model
from jsonargparse import auto_cli
from record import commit, write

import patrol_prune as pp
from patrol_prune.attacks.rmle import RMLEConfig
from patrol_prune.data import load_image_folder
from patrol_prune.defences import RandomUpload
from patrol_prune.storage import save_state

BLACK = "inverse_network"
STRONG = "inverse_network_ssim"
"""The attack that every point of the sweep meets: the same decoder trained with MSE alone settles
far below it on adversarially trained features."""
WHITE = ("inverse_network", "rmle")
LEARNED = ("linear_inverse", "unet", "inverse_network_ssim")
OTHER_FAMILIES = ("linear_inverse", "unet_ssim", "transposed_ssim", "whitened_ssim")
MORE_LEARNED = ("nearest_image", "transposed", "unet_ssim", "transposed_ssim", "whitened_ssim")
WITHOUT_QUERIES = ("query_free_same", "query_free_other", "query_free_match")
QUERY_FREE_IMAGES = 4_000
FEWER = (100, 1_000)
LONG = 3
EARLIER = "earlier"
"""The base of rows whose models were trained before this working directory."""
OF_A_RECORD = ("date", "commit", "device", "versions", "command")
LEARNT_MSE = ("patrol", "disco", "adversarial_only", "cem_patrol")
KEPT_OF_A_RECORD = (
    "attack", "attacker_data", "attacker_images", "victim_images", "box", "ssim", "ssim_worst5",
    "psnr", "mse", "gmsd", "rank1", "rank5", "chance1", "chance5", "epochs", "plateau",
)


@dataclass(frozen=True)
class Step:
    """One audit: a method, the attacks that run in it, and the attackers' seed."""

    method: Method
    group: str
    attacks: tuple[str, ...] = (BLACK,)
    seed: int = 0
    fewer: int | None = None
    shifted: bool = False
    optimised: bool = False
    silenced: bool = False

    @property
    def key(self) -> str:
        return "-".join(filter(None, (self.method.key, self.group, str(self.seed))))

    @property
    def times_as_long(self) -> int:
        return LONG if self.group.endswith("long") else 1


def steps(args: Frontier) -> list[Step]:
    """Everything that is attacked: what the bar compares first, then the rest of it."""
    rows = methods(args)
    plain = [Step(m, "ssim", (STRONG,), seed) if m.defence else Step(m, "", seed=seed)
             for m in rows for seed in m.attack_seeds]
    first = [step for step in plain if step.seed == 0]
    thorough: list[Step] = []
    for m in (m for m in rows if m.every_attack):
        thorough += [Step(m, "white", WHITE, optimised=True)]
        thorough += [Step(m, name, (name,)) for name in LEARNED
                     if not (m.defence and name == STRONG)]
        thorough += [Step(m, "white_strong", (STRONG, "rmle"), optimised=True)]
        if m.name == "dense":  # a ceiling, not a competitor
            continue
        thorough += [Step(m, "long", (STRONG,))]
        thorough += [Step(m, "image_prior", ("image_prior",), optimised=True)]
        thorough += [Step(m, name, (name,), fewer=QUERY_FREE_IMAGES)
                     for name in WITHOUT_QUERIES[:1]]
        thorough += [Step(m, str(count), fewer=count) for count in FEWER]
        thorough += [Step(m, "shifted", shifted=True)] * (args.shifted is not None)
        thorough += [Step(m, name, (name,)) for name in MORE_LEARNED]
        thorough += [Step(m, name, (name,), fewer=QUERY_FREE_IMAGES)
                     for name in WITHOUT_QUERIES[1:]]
    thorough += [Step(m, "long", (STRONG,)) for m in rows if m.key in ATTACKED_LONGER]
    thorough += [Step(m, f"{name}_long", (f"{name}_ssim",)) for name in ("whitened", "unet")
                 for m in rows if m.key == DEEPER_BEST]
    thorough += [Step(m, "white_strong", (STRONG, "rmle"), optimised=True)
                 for m in rows if m.key in MET_BY_OTHERS]
    thorough += [Step(m, name, (name,)) for m in rows if m.key in MET_BY_OTHERS
                 for name in OTHER_FAMILIES]
    thorough += [Step(m, "silenced", (STRONG,), silenced=True)
                 for m in rows if m.key in SEEN_OFTEN]
    # The models that matter meet each attack in turn, so that an interrupted run compares them.
    groups = list(dict.fromkeys(step.group for step in thorough))
    thorough.sort(key=lambda step: groups.index(step.group))
    return [*first, *thorough, *[step for step in plain if step.seed]]


def row_path(args: Frontier, step: Step) -> Path:
    return args.work / "rows" / f"{step.key}.json"


def attack_config(args: Frontier, step: Step) -> pp.InverseNetworkConfig:
    """The strong decoder. A feature of 16x16 or more costs four times as much, and converges
    sooner; fewer images are seen as often as many.
    """
    shallow = step.method.split in ("layer1", "layer2")
    epochs = max(1, args.attack_epochs // 2) if shallow else args.attack_epochs
    epochs *= step.times_as_long
    if step.fewer is not None or step.shifted:
        images = step.fewer or 2_640
        epochs = min(100, epochs * args.attacker_images // images)
    return pp.InverseNetworkConfig(epochs=epochs, max_extensions=1)


def attacked(args: Frontier, data: Data, step: Step) -> list[dict[str, Any]]:
    """The rows of one step: the method's split under freshly trained attackers."""
    path = row_path(args, step)
    if path.exists():
        content = json.loads(path.read_text())
        return content if isinstance(content, list) else [content]
    split, known = defended(args, data, step.method)
    split.model.to(args.device)
    if step.silenced:  # what as many uploads of each picture as one likes come to
        for module in split.edge.modules():
            if isinstance(module, RandomUpload):
                module.silent = True
    start = time.perf_counter()
    images, labels = data.attacker.images[: step.fewer], data.attacker.labels[: step.fewer]
    if step.shifted:
        assert args.shifted is not None
        other = load_image_folder(args.shifted / "train", 32)
        images, labels = other.images, None
    count = args.optimised_images
    victims = data.victims.images[: count if step.optimised else None]
    report = pp.audit(split, images, victims, attacks=step.attacks, seeds=(1000 + step.seed,),
                      attacker_labels=labels, normalization=NORMALIZATION, device=args.device,
                      config=attack_config(args, step), examples=8,
                      settings={"rmle": RMLEConfig(steps=400, tuning_images=8, tuning_steps=60)})
    floor = next(r for r in report.records if r["subject"] == "floor")
    rows = []
    for record in report.records:
        # The floor of nearest images is asked for here as an attack.
        if record["subject"] != "edge" and record["attack"] not in step.attacks:
            continue
        key = f"{record['subject']}/{record['attack']}/{record['attack_seed']}"
        each = {name: report.per_image[key][name][:count] for name in ("ssim", "mse")}
        rows.append({**row_of(args, step, split, known, record, floor), **first_images(each)})
    for row in rows:
        row["attack_seconds"] = time.perf_counter() - start
        row["flags"] = sorted({f["name"] for f in report.flags
                               if f["attack"] in (None, row["attack"])})
        print(f"{step.key} {row['attack']}: accuracy {row['accuracy']:.4f} ssim {row['ssim']:.3f} "
              f"mse {row['mse']:.4f} plateau {row['plateau']}", flush=True)
    save_state(args.work / "examples" / step.key,
               {k: torch.from_numpy(v).contiguous() for k, v in report.examples.items()}, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(rows))
    temporary.replace(path)
    return rows


def first_images(each: dict[str, list[float]]) -> dict[str, float | int]:
    """The same figures over the images that every attack met, optimising ones included."""
    ssim = sorted(each["ssim"], reverse=True)
    worst = max(1, round(0.05 * len(ssim)))
    return {"first_images": len(ssim), "first_ssim": sum(ssim) / len(ssim),
            "first_ssim_worst5": sum(ssim[:worst]) / worst,
            "first_mse": sum(each["mse"]) / len(each["mse"])}


def row_of(args: Frontier, step: Step, split: pp.Split, known: dict[str, Any],
           record: dict[str, Any], floor: dict[str, Any]) -> dict[str, Any]:
    method = step.method
    base_of = next((m for m in methods(replace(args, only=())) if m.key == method.start), method)
    return {
        "dataset": DATASET, "model": f"resnet18-cifar-w{args.width}", "method": method.name,
        "defence": method.defence or None, "strength": method.strength if method.defence else None,
        "recipe": method.recipe or None, "base": base(args),
        "split": method.split, "train_seed": args.seed, "start": method.start or None,
        "finetune_epochs": base_of.epochs, "max_pruning_ratio": base_of.max_pruning_ratio,
        "edge_macs": pp.edge_macs(split), "edge_params": pp.count_params(split.edge),
        "feature_bytes": known["feature_bytes"],
        "attack_seed": step.seed, "floor_ssim": floor["ssim"], "floor_mse": floor["mse"],
        "floor_ssim_worst5": floor["ssim_worst5"],
        **{k: record.get(k) for k in KEPT_OF_A_RECORD},
        "attacker_data": "shifted" if step.shifted else "same",
        "began_with": step.attacks[0] if record["attack"] == "rmle" else None,
        "times_as_long": step.times_as_long, "silenced": step.silenced,
        **{k: known.get(k) for k in ("accuracy", "accuracy_before_finetuning", "surrogate_mse",
                                     "surrogate_ssim", "kept")},
        "dense_accuracy": dense_accuracy(args), "train_seconds": known["seconds"],
        "made_with": made_with(args),
    }


def dense_accuracy(args: Frontier) -> float:
    """Of the model that every method began with."""
    return float(json.loads((args.work / "baseline" / "meta.json").read_text())["accuracy"])


def base(args: Frontier) -> str:
    """Which training of the dense model the row goes back to: the same settings on another
    machine give other weights.
    """
    return hashlib.sha256((args.work / "baseline" / "manifest.json").read_bytes()).hexdigest()[:8]


def made_with(args: Frontier) -> dict[str, Any]:
    """The settings that a row depends on, and the commit that measured it."""
    free = ("data", "work", "models", "shifted", "workers", "threads", "collect", "only",
            "earlier", "record")
    settings = {k: v for k, v in asdict(args).items() if k not in free}
    return {**settings, "commit": os.environ.get("BENCHMARK_COMMIT") or commit()}


def work(args: Frontier) -> None:
    """Take steps that nobody has taken until none is left; a claim of a dead process is void."""
    data = Data(args)
    dense_model(args, data)
    claims = args.work / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    for step in steps(args):
        if not row_path(args, step).exists() and claim_is_ours(claims / step.key):
            attacked(args, data, step)


def claim_is_ours(claim: Path) -> bool:
    """Whether this process may take the step: first come, or the claimant has died."""
    try:
        with open(claim, "x") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        owner = claim.read_text().strip()
        alive = owner.isdigit() and Path(f"/proc/{owner}").exists()
        if not alive:
            claim.write_text(str(os.getpid()))
        return not alive or owner == str(os.getpid())


def collected(args: Frontier) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows that are done, each once, and the steps that are not.

    Rows of the earlier record follow where this working directory has none of the kind.
    """
    rows: list[dict[str, Any]] = []
    for step in steps(replace(args, only=())):
        if row_path(args, step).exists():
            content = json.loads(row_path(args, step).read_text())
            rows += content if isinstance(content, list) else [content]
    rows += [of_earlier(row) for row in earlier_record(args)["rows"]]
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        kinds.setdefault(kind_of(args, row), row)
    missing = [step.key for step in steps(replace(args, only=()))
               if not kinds_of(args, step) <= kinds.keys()]
    return list(kinds.values()), missing


def earlier_record(args: Frontier) -> dict[str, Any]:
    """The record whose rows are kept; one without rows where none is named."""
    return {"rows": []} if args.earlier is None else json.loads(args.earlier.read_text())


def kinds_of(args: Frontier, step: Step) -> set[tuple[Any, ...]]:
    """The kinds of row that a step makes."""
    method = step.method
    images = step.fewer or (2_640 if step.shifted else args.attacker_images)
    return {kind_of(args, {
        "method": method.name, "recipe": method.recipe or None,
        "strength": method.strength if method.defence else None, "split": method.split,
        "attack_seed": step.seed, "attack": attack, "attacker_images": images,
        "attacker_data": "shifted" if step.shifted else "same",
        "victim_images": args.optimised_images if step.optimised else args.test_images,
        "times_as_long": step.times_as_long,
        "began_with": step.attacks[0] if attack == "rmle" else None,
        "silenced": step.silenced,
    }) for attack in step.attacks}


def of_earlier(row: dict[str, Any]) -> dict[str, Any]:
    """A row of an earlier record, with what such rows did not say yet: the surrogates of that
    time learnt MSE alone.
    """
    learnt_mse = row.get("defence") in LEARNT_MSE and "recipe" not in row
    return {"base": EARLIER, "recipe": "mse" if learnt_mse else None, **row}


def kind_of(args: Frontier, row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row from another: the method and who attacked it with what."""
    return (row["method"], row.get("recipe"), row.get("strength"), row["split"],
            row["attack_seed"], row["attack"], row["attacker_images"],
            row.get("attacker_data") or "same", row.get("victim_images", args.test_images),
            row.get("times_as_long") or 1, row.get("began_with") or BLACK,
            bool(row.get("silenced")))


def take_over(args: Frontier) -> None:
    """Bring finished models and rows into the working directory, each whole or not at all.

    Nothing is taken where the directory has a dense model of its own that is another one: what was
    made from two dense models is not compared.
    """
    if args.models is None:
        return
    if not (args.models / "baseline").is_dir():
        raise SystemExit(f"{args.models}: no finished models; expected a folder with baseline/, "
                         "models/ and rows/")
    own = args.work / "baseline" / "manifest.json"
    theirs = args.models / "baseline" / "manifest.json"
    if own.exists() and own.read_bytes() != theirs.read_bytes():
        raise SystemExit(f"{args.work} has a dense model of its own; give another --work")
    finished = [source for name in ("models", "rows") for source in args.models.glob(f"{name}/*")]
    for source in [args.models / "baseline", *finished]:  # first what says whose they are
        target = args.work / source.relative_to(args.models)
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}")
        (shutil.copytree if source.is_dir() else shutil.copy)(source, temporary)
        temporary.replace(target)


def main(args: Frontier) -> None:
    args = replace(args, work=args.work.expanduser(), data=args.data.expanduser(),
                   models=args.models and args.models.expanduser(),
                   shifted=args.shifted and args.shifted.expanduser())
    if os.environ.get("FRONTIER_WORKER"):
        torch.set_num_threads(args.threads)
        work(args)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    take_over(args)
    codes: list[int] = []
    if not args.collect:
        dense_model(args, Data(args))
        environment = {**os.environ, "FRONTIER_WORKER": "1", "OMP_NUM_THREADS": str(args.threads)}
        workers = [subprocess.Popen([sys.executable, *sys.argv], env=environment)
                   for _ in range(args.workers)]
        codes = [worker.wait() for worker in workers]
    rows, missing = collected(args)
    settings = {k: v for k, v in made_with(args).items() if k != "commit"}
    odd = sorted({row["method"] + "-" + row["split"] for row in rows
                  if {**settings, **row.get("made_with", {"seed": None})} != {
                      **settings, "commit": row.get("made_with", {}).get("commit")}})
    first = earlier_record(args)  # of rows kept from record to record, the oldest tells
    before = {k: v for k, v in (first.get("earlier") or first).items() if k in OF_A_RECORD}
    commits = dict.fromkeys(row["made_with"]["commit"] for row in rows if row["base"] != EARLIER)
    print(write(args.record, rows, settings=settings, workers_threads=args.threads, earlier=before,
                commit=", ".join(commits) or commit(),
                shifted=args.shifted and args.shifted.name, missing=missing,
                with_other_settings=odd))
    asked = [step.key for step in steps(args) if step.key in missing]
    if any(codes) or asked:
        raise SystemExit(f"not done: {', '.join(asked)}; exit codes {codes}")


if __name__ == "__main__":
    main(auto_cli(Frontier, as_positional=False))
