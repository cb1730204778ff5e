"""The tables of the re-identification comparison."""

from __future__ import annotations

from typing import Any

from audit_figures import STILL, UNFINISHED, improving
from row_names import ATTACKS, PRESSED_TEXT, pressed

from patrol_prune.report import render_table

NAMES = {"dense": "dense, not pruned", "taylor": "Taylor pruning", "patrol": "**PATROL**"}
USUAL_DECODER = (32, 3)
LEGIBLE = 0.8
"""Where the dense model's upload gives away no more of the characters, no goal is set for them."""
KINDS = {"plates": "plates read", "characters": "characters", "scenes": "places"}


UPLOADS_UNREAD = (
    " Rebuilt pictures alone were read here, the uploads themselves were not: which vehicle it is, "
    "and what its plate says, may leak more."
)


def reid(record: dict[str, Any]) -> str:
    """For each run: a sentence, what it costs, and what the uploads give away."""
    blocks = []
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    sets: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        runs.setdefault(run_of(row), []).append(row)
        sets.setdefault(row["dataset"], []).append(row)
    blocks += [overview(list(runs.values())), *map(same_budget, sets.values())]
    for rows in runs.values():
        blocks += [about(rows), verdict(rows) + seen_elsewhere(rows, record["rows"]), costs(rows),
                   STILL * any(map(improving, rows)), leaks(rows), measured(record, rows)]
    return "\n\n".join(block for block in blocks if block)


def run_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What the rows of one run have in common, and those of another have not."""
    return (*training_of(row), tuple(row.get("decoder", ())), tuple(row.get("attacks", ())),
            row.get("uploads", 1))


def training_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What the rows about models of one training have in common."""
    return (row["dataset"], row["split"], row["beta"], row.get("budget", "0.5"),
            row["train_seed"], tuple(row["epochs"]), surrogates_of(row), row.get("bits"),
            row.get("rounded_epochs"), *differently(row))


def largest_uploads(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], int]:
    """Of each run the bytes of its largest upload, that of the dense model: by it the runs are put
    in an order in which a run with uploads of few bits stays together, and where its cut belongs.
    """
    found: dict[tuple[Any, ...], int] = {}
    for row in rows:
        found[run_of(row)] = max(row["feature_bytes"], found.get(run_of(row), 0))
    return found


def overview(runs: list[list[dict[str, Any]]]) -> str:
    """A line for each run: what PATROL costs and hides beside the dense model and Taylor's."""
    table = []
    for rows in runs if len(runs) > 1 else []:
        found, first = {row["method"]: row for row in rows}, rows[0]
        width, blocks, *epochs = first.get("decoder", USUAL_DECODER)
        size = ", ".join([f"{width} channels, {blocks} blocks", *(f"{n} epochs" for n in epochs),
                          *families(first),
                          *[f"{n} uploads" for n in (first.get("uploads", 1),) if n > 1]])
        line = {"set": first["dataset"].split(",")[0], "split": first["split"] + budget_of(first),
                "seed": str(first["train_seed"]), "epochs": epochs_of(first),
                "bits": str(first.get("bits", 32)),
                "beta": f"{first['beta']:g}", "surrogates": surrogates_of(first), "decoder": size}
        for name, of in (("map", lambda row: percent(row["map"])),
                         ("ssim", lambda row: f"{row['ssim']:.3f}" + UNFINISHED * improving(row)),
                         ("characters", lambda row: percent(row["characters_rate"]) or "–")):
            line[name] = " / ".join(of(found[m]) if m in found else "–" for m in NAMES)
        table.append(line)
    if not table:
        return ""
    several = len({line["seed"] for line in table}) > 1
    others = ({"surrogates": "surrogates"} if len({line["surrogates"] for line in table}) > 1
              else {})
    rounded = {"bits": "bits of a value"} if len({line["bits"] for line in table}) > 1 else {}
    return "\n\n".join([
        "**Every run in one line**, dense / Taylor pruning / PATROL. Each stands below with its "
        "circumstances and what else was read.",
        render_table(table, {
            "set": "set", "split": "cut after", **({"seed": "seed"} if several else {}),
            "epochs": "fine-tuned, epochs", "beta": "β", **others, **rounded,
            "decoder": "attackers' decoders", "map": "mAP",
            "ssim": "SSIM under the strongest attack", "characters": "characters read",
        }).strip(),
    ])


def same_budget(rows: list[dict[str, Any]]) -> str:
    """Pruned edges of one set that cost as much (within 2%) at different cuts, shallow ones first.

    What each lost is counted from the dense model of its own run.
    """
    pruned = [row for row in rows if row["method"] != "dense"]
    counts = {row["edge_macs"] for row in pruned if row.get("budget", "0.5") != "0.5"}
    alike = [row for row in pruned
             if any(abs(row["edge_macs"] / count - 1) <= 0.02 for count in counts)]
    if len({row["split"] for row in alike}) < 2:
        return ""
    largest = largest_uploads(rows)
    alike.sort(key=lambda row: (-largest[run_of(row)], row["split"], -(row.get("bits") or 32),
                                row["method"] != "taylor"))
    dense = {run_of(row): row["map"] for row in rows if row["method"] == "dense"}
    kinds = {k: v for k, v in KINDS.items() if alike[0][f"{k}_rate"] is not None}
    chance = (f" Characters by chance {percent(alike[0]['characters_chance'])}."
              if "characters" in kinds else "")
    table = [{
        "split": row["split"], "method": called(row, alike),
        "macs": f"{row['edge_macs'] / 1e6:.2f} M",
        "bytes": f"{row['feature_bytes'] / 1024:.3g} KiB", "map": percent(row["map"]),
        "lost": f"{100 * (dense[run_of(row)] - row['map']):.1f}",
        "ssim": row["ssim"], "floor": row["floor_ssim"],
        **{k: percent(row[f"{k}_rate"]) for k in kinds},
        "rank1": percent(row["named_rank1"]),
    } for row in alike]
    return "\n\n".join([
        f"**The same device at several cuts**: {alike[0]['dataset']}, edges of "
        f"{min(r['edge_macs'] for r in alike) / 1e6:.1f} to "
        f"{max(r['edge_macs'] for r in alike) / 1e6:.1f} M multiply-adds.{chance} The runs "
        "stand below with what is not here.",
        render_table(table, {
            "split": "cut after", "method": "method", "macs": "edge MACs", "bytes": "uploaded",
            "map": "mAP", "lost": "points below dense", "ssim": "SSIM under the strongest attack",
            "floor": "floor", **kinds, "rank1": "vehicle named, rank 1",
        }).strip(),
    ])


def called(row: dict[str, Any], beside: list[dict[str, Any]]) -> str:
    """The row's method, with what tells it from the same method in other runs of one table."""
    name = NAMES[row["method"]]
    strengths = {r["beta"] for r in beside if r["method"] == "patrol"}
    if row["method"] == "patrol" and len(strengths) > 1:
        name += f", β {row['beta']:g}"
    if row["method"] == "patrol" and len({surrogates_of(r) for r in beside}) > 1:
        name += f", {surrogates_of(row)} surrogates"
    if len({r.get("bits") for r in beside}) > 1:
        name += f", {row.get('bits') or 32} bits"
    if len({tuple(differently(r)) for r in beside}) > 1:
        name = ", ".join([name, *differently(row)])
    if len({r.get("rounded_epochs") for r in beside if r.get("bits")}) > 1 and row.get("bits"):
        name += f", {epochs_of(row).partition(',')[0]} epochs"
    if len({r["train_seed"] for r in beside}) > 1:
        name += f", seed {row['train_seed']}"
    return name


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def about(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    counts = first["counts"]
    seed = f" ({first['train_seed']})" if first["train_seed"] else ""
    closed = (" The set is closed: identities of the test were trained on, with other pictures, "
              "and the attacker's pictures are of the same identities."
              if first.get("closed") else "")
    return (
        f"**{first['dataset'][0].upper()}{first['dataset'][1:]}**: {first['model']} with a BNNeck, "
        f"cut after {first['split']}{budget_of(first)}, trained for {first['epochs'][0]} epochs on "
        f"{counts['defender']:,} pictures of {counts['identities']} identities and fine-tuned for "
        f"{first['epochs'][1]}, PATROL at β {first['beta']:g}{inside(first)}{rounding_of(first)}; "
        f"{counts['query']} queries in a gallery of {counts['gallery']} pictures of "
        f"{counts['test_identities']} identities.{closed}{otherwise(first)} The attacker owns "
        f"{counts['inverter'] + counts['reader']:,} pictures, {counts['victims']} queries are "
        "attacked. Floor: the mean image or the attacker's picture with the nearest upload, "
        f"whichever is closer.{decoder_of(first)}"
        + f" Of the models of that training {NAMES[first['method']]} alone met this attack."
        * (len(rows) == 1) + f" One training seed{seed}, one attack seed."
        + UPLOADS_UNREAD * (not first.get("uploads_read"))
        + f" {PRESSED_TEXT.removeprefix('§ ').capitalize()}" * pressed(first)
    )


def surrogates_of(row: dict[str, Any]) -> str:
    """The name of the ensemble inside PATROL's training."""
    return str(row.get("surrogates", "usual"))


def inside(row: dict[str, Any]) -> str:
    """How the attackers inside training were, where not as usual here."""
    return (" against the large set of surrogates, on whole batches and with four steps of theirs "
            "for each of the model's" if surrogates_of(row) == "large" else "")


def epochs_of(row: dict[str, Any]) -> str:
    """How long the pruned models were fine-tuned, and how long once more with rounded uploads."""
    epochs = f"{row['epochs'][1]}" + (f" + {row['rounded_epochs']}" if row.get("bits") else "")
    return ", ".join([epochs, *differently(row)])


def differently(row: dict[str, Any]) -> list[str]:
    """How the pruned models were trained, where not as usual here."""
    return ([f"{row.get('upload_channels')} channels sent"] * bool(row.get("upload_channels"))
            + ["no teacher"] * (not row.get("teacher", True))
            + ["swapped plates"] * bool(row.get("swapped_plates"))
            + [f"PATROL's aimed at plates, {100 * row.get('private_plates', 0):g}%"]
            * bool(row.get("private_plates"))
            + [f"PATROL's with dropout {row.get('dropout', 0):g}"] * bool(row.get("dropout")))


def otherwise(row: dict[str, Any]) -> str:
    """What `differently` tells, in sentences."""
    told = ""
    if row.get("upload_channels"):
        told += (f" The pruned models send {row['upload_channels']} channels, those of the highest "
                 "scores, the dense one all of its own.")
    if not row.get("teacher", True):
        plates = ", which tell plates," * (row.get("plates_rate") is not None)
        told += (f" The pruned models had no teacher: the dense model's answers{plates} were kept "
                 "from them.")
    if row.get("swapped_plates"):
        told += (" The pruned models were pruned and trained on pictures that carry other "
                 "vehicles' plates, drawn anew each time; what is uploaded and attacked is the "
                 "pictures as they are.")
    if row.get("private_plates"):
        told += (f" {100 * row['private_plates']:g}% of the error of the attackers inside is "
                 "counted on plates, which a detector finds that was trained on the defender's "
                 "pictures; a fresh decoder whose loss counts them as much attacks all models.")
    if row.get("dropout"):
        told += (f" {100 * row['dropout']:g}% of each of PATROL's uploads is zeroed at random, "
                 "anew each time, " + "from the further training on" * bool(row.get("bits"))
                 + "in training and after it" * (not row.get("bits"))
                 + "; attackers had " + (f"{row['uploads']} uploads of every picture."
                                         if row.get("uploads", 1) > 1 else
                                         "one upload of every picture."))
    return told


def rounding_of(row: dict[str, Any]) -> str:
    """How the pruned models' uploads are rounded, where they are."""
    return "" if not row.get("bits") else (
        f", and for {row['rounded_epochs']} more with {row['bits']} bits of every value that a "
        "pruned model uploads")


def decoder_of(row: dict[str, Any]) -> str:
    """What the attackers' decoders are, where not as usual here."""
    others = f" The attacks were: {' and '.join(families(row))}." if row.get("attacks") else ""
    if "decoder" not in row:
        return others
    width, blocks, epochs = row["decoder"]
    larger = "larger " * (width > USUAL_DECODER[0])
    return (f" Attacked by {larger}decoders, of {width} channels and {blocks} residual blocks, "
            f"trained for {epochs} epochs and half as many more.{others}")


def families(row: dict[str, Any]) -> list[str]:
    """The attacks by name, where not the usual ones."""
    return [ATTACKS[name].removesuffix(", MSE + SSIM") for name in row.get("attacks", ())]


def budget_of(row: dict[str, Any]) -> str:
    """What the device may compute, where that is not half of the dense edge."""
    budget = row.get("budget", "0.5")
    return "" if budget == "0.5" else f", {budget} multiply-adds on the device"


def verdict(rows: list[dict[str, Any]]) -> str:
    """PATROL beside Taylor pruning in one sentence, from the rows."""
    found = {row["method"]: row for row in rows}
    if "taylor" not in found or "patrol" not in found:
        return ""
    one, two = found["taylor"], found["patrol"]
    text = (f"PATROL against Taylor pruning at equal edge MACs: "
            f"{100 * (two['map'] - one['map']):+.1f} points of mAP, SSIM of the strongest attack "
            f"{two['ssim'] / one['ssim']:.2f} times")
    if two["plates_rate"] is not None:
        text += (f", plates read {percent(two['plates_rate'])} instead of "
                 f"{percent(one['plates_rate'])}")
    return f"{text}. {goals(found)}".strip()


def seen_elsewhere(rows: list[dict[str, Any]], every: list[dict[str, Any]]) -> str:
    """What stronger attackers of other runs saw of the same PATROL model, beside the verdict."""
    mine = next((row for row in rows if row["method"] == "patrol"), None)
    if mine is None or len(rows) == 1:
        return ""
    same = [row for row in every if row["method"] == "patrol"
            and training_of(row) == training_of(mine) and row["map"] == mine["map"]]
    most = max(same, key=lambda row: float(row["ssim"]))
    told = [f"SSIM {most['ssim']:.3f}"] * (most["ssim"] > mine["ssim"])
    if mine["characters_rate"] is not None:
        rate = max(row["characters_rate"] for row in same)
        told += [f"{percent(rate)} of the characters"] * (rate > mine["characters_rate"])
    return (f" Other attackers got more out of the same PATROL model: {', '.join(told)} "
            "(below)." if told else "")


def goals(found: dict[str, dict[str, Any]]) -> str:
    """Which of the three goals the PATROL row meets, where the set tells plates."""
    one, two = found["taylor"], found["patrol"]
    if "dense" not in found or two["characters_rate"] is None:
        return ""
    half = one["ssim"] / 2
    below = ", which lies below the floor" * (half < two["floor_ssim"])
    dense = found["dense"]
    anyway = ""
    if dense["characters_rate"] <= 2 * two["characters_chance"]:
        anyway = ", which meets it too"
    elif dense["characters_rate"] <= LEGIBLE:
        anyway = f"; asked for where it is more than {percent(LEGIBLE)}"
    each = {
        f"mAP within 2 points of the dense model ({100 * (two['map'] - dense['map']):+.1f})":
            two["map"] >= dense["map"] - 0.02,
        "characters read at most twice as often as by chance "
        f"({percent(dense['characters_rate'])} from the dense model's upload{anyway}{likest(two)})":
            two["characters_rate"] <= 2 * two["characters_chance"],
        f"SSIM at most half of Taylor pruning's ({half:.3f}{below})": two["ssim"] <= half,
    }
    return "Goals: " + "; ".join(f"{goal}: {'met' if met else 'not met'}"
                                 for goal, met in each.items()) + "."


def likest(row: dict[str, Any]) -> str:
    """What is read of the pictures of the attack with the highest SSIM, where that is less."""
    rate = row.get("characters_likest")
    return "" if rate is None or rate >= row["characters_rate"] else (
        f"; {percent(row['characters_rate'])} from PATROL's by the best of all attacks and "
        f"readers, {percent(rate)} from what the attack of the highest SSIM rebuilds, chance "
        f"{percent(row['characters_chance'])}")


def costs(rows: list[dict[str, Any]]) -> str:
    table = [{
        "method": NAMES[row["method"]], "macs": f"{row['edge_macs'] / 1e6:.2f} M",
        "bytes": f"{row['feature_bytes'] / 1024:.3g} KiB",
        **{k: percent(row[k]) for k in ("map", "rank1", "rank5", "minp")},
        "ssim": f"{row['ssim']:.3f}" + UNFINISHED * improving(row), "floor": row["floor_ssim"],
        "attack": row["attack"],
        "ssim_worst5": row["ssim_worst5"],
        "mse": row["mse"],
    } for row in rows]
    return render_table(table, {
        "method": "method", "macs": "edge MACs", "bytes": "uploaded", "map": "mAP",
        "rank1": "rank 1", "rank5": "rank 5", "minp": "mINP",
        "ssim": "SSIM under the strongest attack", "floor": "floor", "attack": "which attack",
        "ssim_worst5": "worst 5%", "mse": "its MSE",
    }).strip()


def leaks(rows: list[dict[str, Any]]) -> str:
    """What could be read at best; the originals and chance in the last lines."""
    kinds = {k: v for k, v in KINDS.items() if rows[0][f"{k}_rate"] is not None}
    direct = bool(rows[0].get("uploads_read"))
    table = [{
        "of": NAMES[row["method"]], **{k: percent(row[f"{k}_rate"]) for k in kinds},
        "map": percent(row["named_map"]), "rank1": percent(row["named_rank1"]),
        "rebuilt": percent(row.get("named_rebuilt_map")),
        "upload": percent(row.get("characters_upload")),
        "plates_ssim": on_plates(row),
    } for row in rows]
    first = rows[0]
    table.append({
        "of": "the originals themselves", **{k: percent(first[f"{k}_original"]) for k in kinds},
        "map": percent(first["named_map_original"]),
        "rank1": percent(first["named_rank1_original"]),
    })
    table.append({
        "of": "by chance", **{k: percent(first[f"{k}_chance"]) for k in kinds},
        "map": percent(first["named_map_chance"]), "rank1": percent(first["named_rank1_chance"]),
        "plates_ssim": f"{floor:.3f}" if (floor := first.get("on_plates_floor_ssim")) else "",
    })
    alone = {"upload": "characters from the upload alone"} if kinds and direct else {}
    return render_table(table, {
        "of": "read at best from uploads of" if direct else "rebuilt from", **kinds,
        **({"plates_ssim": "SSIM on plates (by chance: the floor)"} if floor else {}),
        **alone, "map": "vehicle named, mAP", "rank1": "rank 1",
        **({"rebuilt": "mAP from rebuilt pictures alone"} if direct else {}),
    }).strip()


def on_plates(row: dict[str, Any]) -> str:
    """The highest SSIM on plates of any attack."""
    if "on_plates_ssim" not in row:
        return ""
    return f"{row['on_plates_ssim']:.3f}" + UNFINISHED * (row["on_plates_plateau"] is False)


def measured(record: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    versions = first.get("versions", record["versions"])
    command = first.get("command", "python benchmarks/reid.py")
    return (
        f"Measured {first['date']} at {first['commit']} on {first['device']}, one thread beside "
        f"other work, {first['minutes']:.0f} minutes; torch {versions['torch']}, torch-pruning "
        f"{versions['torch-pruning']}; `{command}`."
    )
