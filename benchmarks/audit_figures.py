"""Tables about the attacks: the strongest on each model, all of them, and what noise proves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from frontier_methods import BEST_BEFORE, CONTROL, DEEPER_BEST, DEEPER_EPOCHS, SHALLOWER
from frontier_recipes import RECIPES
from row_names import (
    DEFENCES,
    METHODS,
    PRESSED_MARK,
    PRESSED_TEXT,
    Row,
    attack_name,
    has_key,
    pressed,
)

from patrol_prune.report import render_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
USUAL_SPLIT = "layer3"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def thorough(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Of each model of the table, the row of each attack that it met.

    Only rows that are known over the images that every attack met, so that attacks which optimise
    every image are compared with the others over the same ones.
    """
    groups: dict[str, dict[str, Row]] = {}
    today = any(has_key(row, DEEPER_BEST) for row in rows)
    for row in rows:
        name = None if today and has_key(row, BEST_BEFORE) else name_in_the_table(row)
        if name is None:
            continue
        if "first_ssim" not in row:
            if row.get("victim_images", 1_000) > 256:
                continue
            row = {**row, "first_ssim": row["ssim"], "first_mse": row["mse"],
                   "first_ssim_worst5": row["ssim_worst5"], "first_images": row["victim_images"]}
        groups.setdefault(name, {})[attack_name(row)] = row
    return {m: groups[m] for m in METHODS
            if len(groups.get(m, {})) > (m != "control")}


def name_in_the_table(row: Row) -> str | None:
    """The model's name in `METHODS`; None for one that is not in the table."""
    if has_key(row, DEEPER_BEST) or has_key(row, BEST_BEFORE):
        return "deeper"
    if has_key(row, CONTROL):
        return "control"
    if has_key(row, SHALLOWER):
        return "lighter"
    usual = row["split"] == USUAL_SPLIT and not row.get("defence") and row["method"] in METHODS
    return row["method"] if usual else None


def strongest(record: dict[str, Any], circumstances: str) -> str:
    """What stands beside what in sentences, then one line per model with its strongest attack."""
    groups = thorough(record["rows"])
    if not groups:
        return "Not measured yet."
    head = []
    for method, attacks in groups.items():
        best = max(attacks, key=lambda name: attacks[name]["first_ssim"])
        worst = max(attacks, key=lambda name: attacks[name]["first_ssim_worst5"])
        closest = min(attacks, key=lambda name: attacks[name]["first_mse"])
        row = attacks[best]
        head.append({
            "method": METHODS[method] + " †" * (row.get("base") == "earlier"),
            "split": row["split"] + PRESSED_MARK * pressed(row),
            "accuracy": f"{100 * row['accuracy']:.1f}%",
            "tuned": "" if tuned_on(row) is None else str(round((tuned_on(row) or 0) / 1000)),
            "macs": f"{row['edge_macs'] / 1e6:.2f} M",
            "bytes": f"{row['feature_bytes'] / 1024:.0f} KiB",
            "ssim": f"{row['first_ssim']:.3f}", "attack": best + UNFINISHED * improving(row),
            "worst": f"{attacks[worst]['first_ssim_worst5']:.3f}",
            "mse": f"{attacks[closest]['first_mse']:.4f}", "tried": str(len(attacks)),
        })
    first = next(iter(next(iter(groups.values())).values()))
    floor = next(row for each in groups.values() for row in each.values()
                 if row.get("victim_images") == first["first_images"])
    worst_floor = floor.get("floor_ssim_worst5")
    columns = {"method": "model", "split": "split after", "tuned": "fine-tuned on, thousand images",
               "accuracy": "accuracy",
               "macs": "edge MACs", "bytes": "uploaded", "ssim": "SSIM under the strongest attack",
               "attack": "which attack", "worst": "worst 5%", "mse": "smallest MSE",
               "tried": "attacks tried"}
    return "\n\n".join(filter(None, [
        verdict(groups),
        BEFORE * any(pressed(row) for each in groups.values() for row in each.values()),
        f"{first['dataset']}, one training seed, over the same {first['first_images']} test "
        f"images. Floor, the mean image: SSIM {floor['floor_ssim']:.3f}"
        + (f", worst 5% {worst_floor:.3f}" if worst_floor else "")
        + f", MSE {floor['floor_mse']:.4f}. The dense model is over "
        "the budget. `worst 5%` and `smallest MSE` are each under the attack that gets furthest "
        f"there.{earlier_training(groups)}",
        render_table(head, columns).strip(),
        STILL * any(UNFINISHED in line["attack"] for line in head),
        weaker_and_unfinished(groups),
        PRESSED_TEXT * any(pressed(row) for each in groups.values() for row in each.values()),
        circumstances,
    ]))


def weaker_and_unfinished(groups: dict[str, dict[str, Row]]) -> str:
    """Attacks that saw less than the strongest, but still got better: they may pass it."""
    found = []
    for method, attacks in groups.items():
        best = strongest_of(attacks)["name"]
        names = [name for name, row in attacks.items() if name != best and improving(row)
                 and f"{name}, 3 times as long" not in attacks]
        if names:
            found.append(f"{METHODS[method].strip('*')}: {'; '.join(names)}")
    return ("Below the strongest, but still improving when they ended: "
            + ". ".join(found) + ".") * bool(found)


def earlier_training(groups: dict[str, dict[str, Row]]) -> str:
    """What † means, where models of two trainings stand side by side."""
    rows = [row for attacks in groups.values() for row in attacks.values()]
    here = [row["dense_accuracy"] for row in rows
            if row.get("dense_accuracy") and row.get("base") != "earlier"]
    before = [row.get("dense_accuracy") or row["accuracy"] for row in rows
              if row.get("base") == "earlier"
              and (row["method"] == "dense" or row.get("dense_accuracy"))]
    if not (here and before):
        return ""
    return (f" Models with † come from an earlier training of the dense model, to "
            f"{100 * before[0]:.1f}%; the others from one to {100 * here[0]:.1f}%.")


BEFORE = (f"White boxes and the linear attack were weaker when the rows with{PRESSED_MARK} were "
          "measured than they are now, and may show more today.")


UNFINISHED = " *"
STILL = "\\* had not reached its plateau: a longer attack would see more."


def improving(row: Row) -> bool:
    """Whether the attack stopped while it still got better."""
    return row["plateau"] not in (True, None)


def every_attack(record: dict[str, Any], circumstances: str) -> str:
    """SSIM of every attack (rows) on every model (columns)."""
    groups = thorough(record["rows"])
    if not groups:
        return "Not measured yet."
    names = dict.fromkeys(name for attacks in groups.values() for name in attacks)
    table = []
    for name in names:
        line: Row = {"attack": name}
        for method, attacks in groups.items():
            row = attacks.get(name)
            line[method] = "" if row is None else (
                f"{row['first_ssim']:.3f}{UNFINISHED * improving(row)}")
        table.append(line)
    table.sort(key=lambda line: -max(float(v.split()[0]) for k, v in line.items()
                                     if k != "attack" and v))
    columns = {"attack": "SSIM under", **{m: f"{METHODS[m].replace('*', '')}, "
                                          + next(iter(each.values()))["split"]
                                          for m, each in groups.items()}}
    return "\n\n".join(filter(None, [
        render_table(table, columns).strip(),
        STILL * any(UNFINISHED in value for line in table for value in line.values()),
        circumstances,
    ]))


def not_measured(missing: list[str]) -> str:
    """How many points the benchmark knows of that nobody has waited for."""
    return (f"{len(missing)} points that the benchmark knows are not measured; `missing` in the "
            "record names them.") * bool(missing)


def verdict(groups: dict[str, dict[str, Row]]) -> str:
    """Whether PATROL's advantage stands: beside its own pruned model, and beside Taylor pruning."""
    if not {"taylor", "deeper"} <= groups.keys():
        return ""
    found = {name: {**next(iter(attacks.values())), **strongest_of(attacks)}
             for name, attacks in groups.items()}
    ours = found["deeper"]
    lines = []
    apart = "attackers have become stronger between the two."
    if control := found.get("control"):
        same_model = "the same pruned model trained on as long without attackers"
        lines.append(f"against {same_model}: {beside(ours, control)}."
                     if ours.get("base") == control.get("base")
                     else f"not beside {same_model}: {apart}")
    taylor = found["taylor"]
    cut = f"Taylor pruning cut after {taylor['split']}"
    if ours.get("base") == taylor.get("base"):
        lines.append(f"against {cut}: {beside(ours, taylor)}; "
                     f"{ours['feature_bytes'] / 1024:.3g} KiB uploaded instead of "
                     f"{taylor['feature_bytes'] / 1024:.3g}{training_beside(ours, taylor)}.")
    else:
        lines.append(f"not beside {cut}: {apart}")
    if same := found.get("lighter", found.get("patrol")):
        by = "Taylor pruning and PATROL's fine-tuning, " * ("lighter" in found)
        lines.append(f"{by}cut after {same['split']} itself, against {cut}: {beside(same, taylor)}"
                     f"{training_beside(same, taylor)}.")
    mark = PRESSED_MARK * pressed(ours)
    return (f"PATROL, cut after {ours['split']}{mark}, at equal edge MACs, each model under the "
            "strongest of the attacks on it:\n\n" + "\n".join(f"- {line}" for line in lines))


def strongest_of(attacks: dict[str, Row]) -> Row:
    """The name and the SSIM of the attack that sees most."""
    name = max(attacks, key=lambda n: attacks[n]["first_ssim"])
    return {"name": name, "ssim": attacks[name]["first_ssim"]}


def beside(ours: Row, other: Row) -> str:
    """How one row's SSIM and accuracy stand to another's."""
    return (f"**SSIM {ours['ssim']:.3f} instead of {other['ssim']:.3f} "
            f"({ours['ssim'] / other['ssim']:.2f} times), "
            f"{100 * (ours['accuracy'] - other['accuracy']):+.1f} points of accuracy**")


def tuned_on(row: Row) -> int | None:
    """Images, counted anew each time, that the model was trained on after it was pruned; None where
    the row does not name its settings.
    """
    made = row.get("made_with")
    if made is None or "train_images" not in made:
        return None
    if row["method"] == "dense":
        return 0
    if not row.get("defence"):
        return int(made["finetune_epochs"] * made["train_images"])
    before = DEEPER_EPOCHS if row["split"] != USUAL_SPLIT else made["finetune_epochs"]
    times = RECIPES[row["recipe"]].epochs if row.get("recipe") else 1
    return int(before * made["train_images"]
               + times * made["sweep_epochs"] * made["sweep_images"])


def training_beside(ours: Row, other: Row) -> str:
    """How much longer the one was trained after pruning, where it was."""
    mine, others = tuned_on(ours), tuned_on(other)
    if not mine or not others or mine == others:
        return ""
    return f"; fine-tuned on {mine:,} images instead of {others:,} ({mine / others:.1f} times)"


def bounds(circumstances: str) -> str:
    """What can be proved about the noisy models, beside what an attacker reached."""
    table = []
    for row in load("bounds")["rows"]:
        noisy = row.get("sigma") is not None
        unbiased = row.get("unbiased_mse_bound")
        void = noisy and unbiased > row["floor_mse"]
        table.append({
            "edge": DEFENCES.get(row["method"], METHODS.get(row["method"], row["method"]))
            + (f", σ {row['strength']:g} of the RMS" if noisy else ""),
            "accuracy": f"{100 * row['accuracy']:.1f}%",
            "attacker": f"{row['attacker_mse']:.4f}",
            "unbiased": (f"{unbiased:.4f}" + ", void" * void) if noisy else "",
            "bits": f"{row['information_nats'] / 0.693147:.0f}" if noisy else "",
            "factor": f"{row['entropy_power_factor']:.3f}" if noisy else "",
            "shrunk": f"{row['shrunk_entropy_power_factor']:.3f}" if noisy else "",
            "rank": f"{row['participation_ratio']:.1f}",
        })
    columns = {"edge": "edge", "accuracy": "accuracy", "attacker": "smallest MSE of an attack",
               "unbiased": "unbiased attackers' MSE at least", "bits": "information at most, bits",
               "factor": "entropy-power factor", "shrunk": "the same, shrunk covariance",
               "rank": "Jacobian's participation ratio"}
    return "\n\n".join([
        "Models with Gaussian noise on the upload, and others without. A bound for "
        "unbiased attackers above the mean image's error is void: a biased attacker does better. "
        "Information is an estimate of an upper bound, from the variances alone.",
        render_table(table, columns).strip(), circumstances,
    ])
