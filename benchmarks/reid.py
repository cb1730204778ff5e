"""Vehicle re-identification: dense, Taylor-pruned and PATROL, and what their uploads give away.

    python benchmarks/reid.py                                           # rendered vehicles
    python benchmarks/reid.py --photographs ~/.cache/patrol_prune/grocery128

Runs `integrations/vehicle_reid/run.py` in `--work`, on from where it was stopped, and puts its
rows into `results/reid.json`; those of another run that stand there stay, each with its commit,
command and versions.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from PIL import Image
from record import ROOT, command, commit, cpu_name, versions, write
from reid_figures import largest_uploads, run_of

sys.path.insert(0, str(ROOT.parent / "integrations" / "vehicle_reid"))

import run as vehicle_reid
from settings import Attackers, ReidRun
from uploads import DIRECT

from patrol_prune.attacks import InverseNetworkConfig
from patrol_prune.errors import InputError
from patrol_prune.finetune import FinetuneConfig

KEPT = ("attack", "attack_seed", "attacker_images", "victim_images", "ssim", "ssim_worst5", "psnr",
        "mse", "plateau")
KINDS = ("plates", "characters", "scenes")


@dataclass(frozen=True)
class Reid:
    """Arguments.

    Attributes:
        work: folder of the runs.
        photographs: an image folder to measure instead of the rendered vehicles, a class as an
            identity.
        at: where to cut.
        beta: weight of PATROL's adversarial term.
        edge_macs: the device's budget: a fraction of the dense edge at the cut, or a count, which
            can be the same at several cuts.
        epochs: of fine-tuning; 8, as the record began with, or 5 for photographs where None.
        upload_channels: that the pruned models send, where not all.
        bits: of an uploaded value of the pruned models, which are then fine-tuned once more so.
        rounded_epochs: of that further fine-tuning, where not the usual 24.
        dropout: share of PATROL's upload that is dropped at random.
        uploads: of each picture that attackers put together, where PATROL's are dropped.
        swap_plates: train the pruned models on pictures that carry other vehicles' plates.
        private_plates: share of the attackers' error inside that is counted on plates; another
            attack, on all three models, counts them as much.
        teacher: let the pruned models learn from the dense one as well, before uploads are rounded.
        decoder: width, residual blocks and epochs of the learned attacks, where not the usual
            32, 3 and 10: after layer3 that many channels hold half of an upload.
        attacks: by name, where not the usual ones.
        methods: whose rows go into the record; of all where empty.
        surrogates: the attackers inside: "usual", on half of a batch with 2 steps for each of the
            model's; or "large", which see all of it and take 4.
        pictures: where to draw some originals and what is rebuilt of them, a method in a row.
        threads: of torch.
        seed: of everything.
    """

    work: Path = Path("runs")
    photographs: Path | None = None
    at: str = "layer2"
    beta: float = 40.0
    edge_macs: str = "0.5"
    epochs: int | None = None
    upload_channels: int | None = None
    bits: int | None = None
    rounded_epochs: int | None = None
    dropout: float = 0.0
    uploads: int = 1
    swap_plates: bool = False
    private_plates: float = 0.0
    teacher: bool = True
    decoder: tuple[int, int, int] | None = None
    attacks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    surrogates: Literal["usual", "large"] = "usual"
    pictures: Path | None = None
    threads: int = 1
    seed: int = 0


def config_of(args: Reid) -> ReidRun:
    """The settings of the run.

    Raises:
        InputError: settings that go with another one alone.
    """
    if args.rounded_epochs is not None and args.bits is None:
        raise InputError("Expected --bits beside --rounded_epochs, came none. Give the bits of an "
                         "uploaded value, or leave it out.")
    work = str(args.work.expanduser())
    large = args.surrogates == "large"
    budget = "" if args.edge_macs == Reid.edge_macs else f"-{args.edge_macs}"
    budget += "" if args.epochs is None else f"-{args.epochs}-epochs"
    channels = args.upload_channels
    budget += "" if channels is None else f"-{channels}-channels"
    budget += "" if args.bits is None else f"-{args.bits}-bits"
    budget += "" if args.rounded_epochs is None else f"-{args.rounded_epochs}-rounded"
    budget += "" if not args.dropout else f"-dropout-{args.dropout:g}"
    budget += "" if args.uploads == 1 else f"-{args.uploads}-uploads"
    budget += "-swapped-plates" * args.swap_plates
    budget += f"-private-plates-{args.private_plates:g}" if args.private_plates else ""
    budget += "" if args.teacher else "-no-teacher"
    if args.decoder is not None:
        budget += "-decoder-" + "-".join(map(str, args.decoder))
    budget += "-large-surrogates" * large
    budget += "".join(f"-{attack}" for attack in args.attacks)
    other = ("" if usual(args) else f"-{args.at}-beta-{args.beta:g}") + budget
    plain = ReidRun(runs=work, name=f"reid-rendered{other}", seed=args.seed, at=args.at,
                    edge_macs=args.edge_macs, bits=args.bits, upload_channels=channels)
    terms = replace(plain.privacy, beta=args.beta, dropout=args.dropout)
    plain = replace(plain, privacy=terms, finetune=replace(
        plain.finetune, epochs=args.epochs or 8))
    if args.rounded_epochs is not None:
        plain = replace(plain, rounded=replace(plain.rounded, epochs=args.rounded_epochs))
    if not args.teacher:
        plain = replace(plain, finetune=replace(plain.finetune, distill_weight=0.0))
    plain = replace(plain, swap_plates=args.swap_plates, private_plates=args.private_plates)
    if large:
        plain = replace(plain, batch=replace(plain.batch, adversarial_images=None),
                        privacy=replace(plain.privacy, surrogates="large"),
                        finetune=replace(plain.finetune, inner_steps=4),
                        rounded=replace(plain.rounded, inner_steps=4))
    plain = replace(plain, attacker=attacker_of(args, plain.attacker),
                    attackers=attackers_of(args, plain.attackers))
    if args.photographs is None:
        return plain
    small = replace(
        plain, data=str(args.photographs.expanduser()), layout="folder",
        name=f"reid-photographs{other}",
        attackers=attackers_of(args, Attackers(victims=81, share=0.4)),
    )
    return replace(
        small, train=FinetuneConfig(epochs=15, distill_weight=0.0),
        finetune=replace(small.finetune, epochs=args.epochs or 5),
        attacker=attacker_of(args, InverseNetworkConfig(width=32, depth=3, epochs=8, batch_size=32,
                                                        max_extensions=1)),
    )


def attacker_of(args: Reid, usual: InverseNetworkConfig) -> InverseNetworkConfig:
    """The settings of the learned attacks."""
    width, depth, epochs = args.decoder or (usual.width, usual.depth, usual.epochs)
    return replace(usual, width=width, depth=depth, epochs=epochs)


def attackers_of(args: Reid, usual: Attackers) -> Attackers:
    """Who attacks."""
    return replace(usual, attacks=args.attacks or usual.attacks, uploads=args.uploads)


def usual(args: Reid) -> bool:
    """Whether this is the cut and the strength that the record began with."""
    return (args.at, args.beta) == (Reid.at, Reid.beta)


def rows(result: dict[str, Any], dataset: str) -> list[dict[str, Any]]:
    """One flat row for each method."""
    made = []
    originals = result["originals"]
    for method, about in result["methods"].items():
        audit = about["audit"]
        row = {
            "dataset": dataset, "model": result["settings"]["model"], "method": method,
            "split": result["plan"]["at"], "beta": result["settings"]["privacy"]["beta"],
            "train_seed": result["settings"]["seed"],
            "closed": result["data"].get("closed"),
            **{k: about[k] for k in ("edge_macs", "edge_params", "feature_bytes")},
            **about["retrieval"], **{k: audit["strongest"].get(k) for k in KEPT},
            "floor_ssim": audit["floor"]["ssim"], "floor_mse": audit["floor"]["mse"],
            "flags": audit["flags"],
        } | on_plates(audit.get("records", ()))
        for kind in KINDS:
            found = audit["leaks"].get(kind)
            row |= {f"{kind}_{k}": None if found is None else found["strongest"][k]
                    for k in ("rate", "chance", "count", "attack", "reader")}
            row[f"{kind}_likest"] = likest(audit, kind)
            row[f"{kind}_original"] = (None if found is None
                                       else originals[kind]["strongest"]["rate"])
        named, of_original = audit["leaks"]["identification"], originals["identification"]
        row |= {f"named_{k}": named["strongest"][k] for k in ("map", "rank1", "attack")}
        rebuilt = [r["map"] for r in named["rows"] if not r["attack"].startswith(DIRECT)]
        row["named_rebuilt_map"] = max(rebuilt)
        row["uploads_read"] = len(rebuilt) < len(named["rows"])
        for kind in KINDS:
            direct = [r["rate"] for r in audit["leaks"].get(kind, {}).get("rows", [])
                      if r["attack"] == DIRECT]
            row[f"{kind}_upload"] = direct[0] if direct else None
        row |= {f"named_{k}_original": of_original["strongest"][k] for k in ("map", "rank1")}
        row |= {f"named_{k}_chance": of_original["chance"][k] for k in ("map", "rank1")}
        made.append(row)
    return made


def on_plates(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The highest SSIM on plates that an attack reached, and the floor's, where it was asked for.
    """
    found = [r for r in records if r["subject"] == "edge" and "private_ssim" in r]
    if not found:
        return {}
    best = max(found, key=lambda r: float(r["private_ssim"]))
    floor = max(r["private_ssim"] for r in records if r["subject"] == "floor")
    return {"on_plates_ssim": best["private_ssim"], "on_plates_attack": best["attack"],
            "on_plates_plateau": best["plateau"], "on_plates_floor_ssim": floor}


def likest(audit: dict[str, Any], kind: str) -> float | None:
    """The best rate from what the attack with the highest SSIM rebuilt; None where nothing is read.
    """
    attack = audit["strongest"].get("attack")
    rates = [r["rate"] for r in audit["leaks"].get(kind, {}).get("rows", [])
             if r["attack"].partition(",")[0] == attack]
    return max(rates, default=None)


def draw(folder: Path, methods: Sequence[str], target: Path, *, count: int = 8) -> None:
    """A row of originals, and for each method a row of what the strongest attack makes of them."""
    first = folder / "audits" / f"{methods[0]}_examples" / "originals.png"
    strips = [first, *(folder / "audits" / f"{method}_examples" / "edge.png" for method in methods)]
    side = Image.open(first).height
    page = Image.new("RGB", (count * side, len(strips) * side))
    for row, strip in enumerate(strips):
        page.paste(Image.open(strip).crop((0, 0, count * side, side)), (0, row * side))
    page = page.resize((2 * page.width, 2 * page.height), Image.Resampling.NEAREST)
    page.quantize(256).save(target, optimize=True)


def minutes(folder: Path) -> float:
    """That the stages took, by the clock, pauses between two starts left out; each stage once."""
    began: dict[str, float] = {}
    taken: dict[str, float] = {}
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "stage begins":
            began[event["stage"]] = event["time"]
        elif event["event"] == "stage done" and event["stage"] in began:
            taken[event["stage"]] = event["time"] - began.pop(event["stage"])
    return sum(taken.values()) / 60


def merged(before: dict[str, Any], mine: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The record's rows with those of one run, which replace an earlier turn of the same run.

    Rows that do not tell their versions were measured with those of the record they stand in.
    """
    this = run_of(mine[0])
    kept = [row if "versions" in row else {**row, "versions": before["versions"]}
            for row in before["rows"] if run_of(row) != this]
    largest = largest_uploads(kept + mine)
    return sorted(kept + mine, key=lambda row: (not row["dataset"].startswith("rendered"),
                                                -largest[run_of(row)]))


def main(args: Reid) -> None:
    torch.set_num_threads(args.threads)
    measured_at = os.environ.setdefault("BENCHMARK_COMMIT", commit())
    config = config_of(args)
    result = vehicle_reid.run(config, progress=lambda stage, sentence: print(
        f"{datetime.now():%H:%M} {stage}: {sentence}", flush=True))
    counts = result["data"]["counts"]
    dataset = ("rendered vehicles, 64x64" if args.photographs is None
               else f"photographs ({args.photographs.name}), 64x64")
    mine = [{**row, "counts": counts, "commit": measured_at, "date": date.today().isoformat(),
             "device": cpu_name(), "command": command(), "versions": versions(),
             "minutes": round(minutes(Path(config.runs) / config.name), 1),
             "budget": args.edge_macs,
             "epochs": [config.train.epochs, config.finetune.epochs],
             **({} if args.bits is None else
                {"bits": args.bits, "rounded_epochs": config.rounded.epochs}),
             **({} if args.upload_channels is None else
                {"upload_channels": args.upload_channels}),
             **({} if args.teacher else {"teacher": False}),
             **({"dropout": args.dropout} if args.dropout else {}),
             **({"uploads": args.uploads} if args.uploads > 1 else {}),
             **({"swapped_plates": True} if args.swap_plates else {}),
             **({"private_plates": args.private_plates} if args.private_plates else {}),
             **({} if args.decoder is None else {"decoder": list(args.decoder)}),
             **({"attacks": list(args.attacks)} if args.attacks else {}),
             **({} if args.surrogates == Reid.surrogates else {"surrogates": args.surrogates})}
            for row in rows(result, dataset) if row["method"] in args.methods or not args.methods]
    if args.pictures is not None:
        draw(Path(config.runs) / config.name, list(result["methods"]), args.pictures)
    target = ROOT / "results" / "reid.json"
    before = json.loads(target.read_text()) if target.exists() else {"rows": []}
    settings = {k: v for k, v in asdict(config).items() if k not in ("data", "runs")}
    print(write("reid", merged(before, mine), settings=settings))


if __name__ == "__main__":
    main(auto_cli(Reid, as_positional=False))
