"""The table of training seeds, from `results/seeds.json`."""

from __future__ import annotations

import statistics
from typing import Any

from audit_figures import UNFINISHED, improving
from depth_figures import STRONG, trained_with
from frontier_recipes import LARGE, RECIPES
from row_names import (
    AGAINST_PRESSED_MARK,
    AGAINST_PRESSED_TEXT,
    BEHIND,
    PRESSED_MARK,
    PRESSED_TEXT,
    STRENGTHS,
    Row,
    against_pressed,
    attack_name,
    draws,
    pressed,
    seen_once,
)

from patrol_prune.report import render_table

YES_OR_NO = {True: "yes", False: "no"}
COLUMNS = {"seed": "training seed", "dense": "dense", "defence": "trained on with",
           "accuracy": "accuracy", "lost": "points below dense", "ssim": "attacker's SSIM",
           "plateau": "plateau", "long": "attacked 3 times as long",
           "long_plateau": "plateau there", "often": "any number of uploads of each",
           "worst": "worst 5%", "named": "original named", "floor": "floor",
           "macs": "edge MACs"}


UNMEASURED = "–"
STILL = "\\* a run behind it was still improving: a longer attack would see more."
GOAL = 0.22
"""For the SSIM at an accuracy within a point of the dense model."""
LEGEND = (
    "`worst 5%` is of the attack of usual length. ± is the sample deviation over the seeds; [n] "
    "says that so many of them have it, – that none has. `any number of uploads of each`: the "
    "attack of usual length on the edge without its draws, which is what many uploads of one "
    "picture come to. `original named`: how often a reconstruction is more like its own original "
    "than like any other of the test images, under the attack of usual length; by chance {chance}."
)


def seeds(record: dict[str, Any], measured: str) -> str:
    """At each split one line for each training seed and defence, and their means."""
    rows = under_the_decoder(record)
    places = places_of(rows)
    intro = (
        "Everything anew for each training seed: the parts of the images, the dense model, the "
        "pruned one, the defence, the attackers. Where no other length is named, a row is trained "
        f"three times as long as the sweep's; {rows[0]['victim_images']:,} test images; residual "
        f"decoder (MSE + SSIM). Floor: the mean image. {legend_of(rows)}"
    )
    more = [row for row in record["rows"] if row not in rows]
    return "\n\n".join([
        intro, *(at_place([row for row in rows if place(row) == where],
                          [row for row in more if place(row) == where]) for where in places),
        *marks(rows), " ".join([measured, *elsewhere(rows, record.get("device"))]),
    ])


def means(record: dict[str, Any], measured: str) -> str:
    """The means of `seeds` alone, and whether they reach the goal; of what the decoders of today
    attacked, where there is such a row.
    """
    every = under_the_decoder(record)
    rows = [row for row in every if not pressed(row)] or every
    places = places_of(rows)
    columns = {"split": "split after", "seed": "training seeds",
               **{key: COLUMNS[key] for key in ("defence", "accuracy", "lost", "ssim", "long",
                                                "often", "worst", "named", "floor", "macs")},
               "bytes": "uploaded"}
    lines = []
    texts = []
    for where in places:
        by_name, longer = grouped([row for row in rows if place(row) == where])
        lines += [{**line, "split": where, "seed": seeds_of(each),
                   "bytes": f"{each[0]['feature_bytes'] / 1024:.3g} KiB"}
                  for each, line in zip(by_name.values(), mean_lines(by_name, longer),
                                        strict=True)]
        texts.append(f"- After {where}: {within_a_point(by_name, longer)}")
    first = rows[0]
    legend = (f"Means over the training seeds; {first['victim_images']:,} test images, residual "
              f"decoder (MSE + SSIM); floor: the mean image. {legend_of(rows)}")
    return "\n\n".join([render_table(lines, columns).strip(), legend, "\n".join(texts),
                        *marks(rows), *left_out([row for row in every if row not in rows]),
                        " ".join([measured, *elsewhere(rows, record.get("device"))])])


def legend_of(rows: list[Row]) -> str:
    return LEGEND.format(chance=f"{100 * rows[0]['chance1']:.2g}%")


def marks(rows: list[Row]) -> list[str]:
    """What the marks mean that stand on some rows."""
    return [*[STILL] * any(map(improving, rows)), *[PRESSED_TEXT] * any(map(pressed, rows)),
            *[AGAINST_PRESSED_TEXT] * any(map(against_pressed, rows))]


def left_out(rows: list[Row]) -> list[str]:
    """That rows which only weaker decoders attacked are not in the table."""
    if not rows:
        return []
    seeds = ", ".join(str(seed) for seed in sorted({row["train_seed"] for row in rows}))
    splits = " and ".join(dict.fromkeys(row["split"] for row in rows))
    return [f"Not in this table: training seeds {seeds} after {splits}, which only earlier, weaker "
            "decoders attacked."]


def places_of(rows: list[Row]) -> list[str]:
    """The places of the rows; those that decoders of today attacked come first."""
    return sorted(dict.fromkeys(map(place, rows)), key=lambda where: PRESSED_MARK in where)


def seeds_of(rows: list[Row]) -> str:
    """Which training seeds a mean is over: `0-3`, `3, 4`."""
    seeds = sorted(row["train_seed"] for row in rows)
    whole = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]}-{seeds[-1]}" if whole else ", ".join(map(str, seeds))


def often(rows: list[Row]) -> str:
    """What any number of uploads come to: nothing new where the edge draws nothing."""
    if not draws(rows[0]):
        return "as one"
    return part_of(rows, [r["often"] for r in rows if r["often"]])


def place(row: Row) -> str:
    """The split, the device's budget where it is not the usual one, and whether decoders held all
    of the map: what a comparison shares.
    """
    larger = (row.get("recipe") or "").startswith("half")
    budget = ", half of the dense edge's multiply-adds" * larger
    return row["split"] + budget + PRESSED_MARK * pressed(row)


def under_the_decoder(record: dict[str, Any]) -> list[Row]:
    """The rows of the one attack that all models met, over all the images."""
    rows = [row for row in record["rows"] if row["attack"] == STRONG]
    most = max(row["victim_images"] for row in rows)
    return [row for row in rows if row["victim_images"] == most]


def other_attacks(more: list[Row], rows: list[Row]) -> list[str]:
    """One sentence for each model that met other attacks too; `rows` hold the decoder's."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in more:
        if row["attack"] != STRONG:
            found.setdefault((name_of(row), row["train_seed"]), []).append(row)
    sentences = []
    for (name, seed), each in found.items():
        usual = next(row for row in rows if (name_of(row), row["train_seed"]) == (name, seed)
                     and row["times_as_long"] == 1 and seen_once(row))
        told = []
        for row in sorted(each, key=lambda r: -r["ssim"]):
            few = "" if row["victim_images"] == usual["victim_images"] else (
                f" over {row['victim_images']} images, where the decoder has "
                f"{usual['first_ssim']:.3f}")
            told.append(f"{attack_name(row)} {row['ssim']:.3f}{few}"
                        + ", still improving" * (row["plateau"] is False))
        sentences.append(f"Other attacks on {name} (training seed {seed}), where the decoder has "
                         f"{usual['ssim']:.3f}: {'; '.join(told)}.")
    return sentences


def at_place(rows: list[Row], more: list[Row]) -> str:
    by_name, longer = grouped(rows)
    lines = [line(row, longer.get((name, row["train_seed"])))
             for name, each in by_name.items() for row in each]
    first = rows[0]
    return "\n\n".join([
        f"After {place(first)}, {first['feature_bytes'] / 1024:.3g} KiB uploaded:",
        render_table([*lines, *mean_lines(by_name, longer)], COLUMNS).strip(),
        f"On the same pruned models:\n\n{compared(by_name, longer)}",
        *("\n".join(f"- {sentence}" for sentence in found)
          for found in [other_attacks(more, rows)] if found),
    ])


def grouped(rows: list[Row]) -> tuple[dict[str, list[Row]], dict[tuple[str, int], Row]]:
    """Those of the usual attack by what they were trained with, and of the longer one by that and
    the training seed. `often` is the row of the same edge without its draws."""
    once = [row for row in rows if seen_once(row)]
    often = {(name_of(row), row["train_seed"]): row for row in rows if not seen_once(row)}
    rows = [{**row, "often": often.get((name_of(row), row["train_seed"]))} for row in once]
    usual = [row for row in rows if row["times_as_long"] == 1]
    by_name: dict[str, list[Row]] = {}
    for row in sorted(usual, key=lambda row: (rank(row), name_of(row), row["train_seed"])):
        by_name.setdefault(name_of(row), []).append(row)
    return by_name, {(name_of(row), row["train_seed"]): row for row in rows if row not in usual}


def mean_lines(by_name: dict[str, list[Row]], longer: dict[tuple[str, int], Row]
               ) -> list[dict[str, str]]:
    return [mean_line(each, [longer[key] for row in each
                             if (key := (name, row["train_seed"])) in longer])
            for name, each in by_name.items()]


def rank(row: Row) -> int:
    """What stands first in a table: nothing, then PATROL alone, then the others."""
    alone = row.get("recipe") not in BEHIND
    return ("none", "patrol").index(row["defence"]) if alone and row["defence"] in (
        "none", "patrol") else 2


def elsewhere(rows: list[Row], device: str | None = None) -> list[str]:
    """Which training seeds were measured on another machine than the record's last, the device."""
    seeds: dict[str, set[int]] = {}
    for row in rows:
        if row.get("device", device) != device:
            seeds.setdefault(row["device"], set()).add(row["train_seed"])
    return [f"Training seed{'s' * (len(each) > 1)} {', '.join(map(str, sorted(each)))}: on {other}."
            for other, each in seeds.items()]


def name_of(row: Row) -> str:
    strength = STRENGTHS.get(row["defence"], "").format(row["strength"])
    name = ", ".join(filter(None, (trained_with(row), strength)))
    recipe = row.get("recipe") or ""
    name = " ".join(filter(None, (name, BEHIND.get(recipe))))
    name += ", six times as long" * ("longest" in recipe)
    name += ", large attackers inside" * (RECIPES[recipe].surrogates == LARGE)
    return name + AGAINST_PRESSED_MARK * against_pressed(row)


def lost(row: Row) -> float:
    """Points of accuracy below the seed's own dense model."""
    return float(100 * (row["dense_accuracy"] - row["accuracy"]))


def line(row: Row, longer: Row | None) -> dict[str, str]:
    return {
        "seed": str(row["train_seed"]), "dense": f"{100 * row['dense_accuracy']:.1f}%",
        "defence": name_of(row),
        "accuracy": f"{100 * row['accuracy']:.1f}%",
        "lost": f"{lost(row):.2f}", "ssim": f"{row['ssim']:.3f}",
        "plateau": YES_OR_NO[row["plateau"]],
        "long": f"{longer['ssim']:.3f}" if longer else UNMEASURED,
        "often": often([row]),
        "long_plateau": YES_OR_NO[longer["plateau"]] if longer else "",
        "worst": f"{row['ssim_worst5']:.3f}", "named": percent([row["rank1"]]),
        "floor": f"{row['floor_ssim']:.3f}",
        "macs": f"{row['edge_macs'] / 1e6:.2f} M",
    }


def mean_and_deviation(values: list[float], digits: int) -> str:
    """`"0.419 ± 0.003"`, with the sample deviation where there is more than one value."""
    text = f"{statistics.mean(values):.{digits}f}" if values else ""
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def percent(values: list[float]) -> str:
    return mean_and_deviation([100 * value for value in values], 1) + "%"


def mean_line(rows: list[Row], longer: list[Row]) -> dict[str, str]:
    mean = mean_and_deviation
    return {
        "seed": "mean", "dense": mean([100 * r["dense_accuracy"] for r in rows], 1) + "%",
        "defence": name_of(rows[0]),
        "accuracy": mean([100 * r["accuracy"] for r in rows], 1) + "%",
        "lost": mean([lost(r) for r in rows], 2), "ssim": part_of(rows, rows),
        "long": part_of(rows, longer),
        "often": often(rows),
        "worst": mean([r["ssim_worst5"] for r in rows], 3),
        "named": percent([r["rank1"] for r in rows]),
        "floor": mean([r["floor_ssim"] for r in rows], 3),
        "macs": mean([r["edge_macs"] / 1e6 for r in rows], 2) + " M",
    }


def part_of(rows: list[Row], seen: list[Row]) -> str:
    """The mean SSIM of what was seen, how many that is where not every row has one, and whether
    one of these attacks was still improving.
    """
    if not seen:
        return UNMEASURED
    count = f" [{len(seen)}]" if len(seen) < len(rows) else ""
    mark = UNFINISHED * any(map(improving, seen))
    return mean_and_deviation([row["ssim"] for row in seen], 3) + count + mark


def compared(by_name: dict[str, list[Row]], longer: dict[tuple[str, int], Row]) -> str:
    """Each defence against nothing, and against PATROL alone, on the same pruned models."""
    parts = []
    plain, patrol = (next((rows for rows in by_name.values() if rank(rows[0]) == n), [])
                     for n in (0, 1))
    for name, rows in by_name.items():
        pairs = paired(rows, plain)
        if rows is plain or not pairs:
            continue
        control = "nothing" + " for half as many epochs" * (
            "longest" in (rows[0].get("recipe") or ""))
        careful = [longer[key]["ssim"] / other["ssim"] for row, other in pairs
                   if (key := (name, row["train_seed"])) in longer]
        ratios, costs = ratios_and_points(pairs)
        parts.append(
            f"{sentence_case(name)} against {control}, under the attack of usual length: "
            f"{span(ratios)} times the SSIM, for "
            f"{span([0.0 - cost for cost in costs])} points of accuracy."
            + (f" Its longest attack against the usual one on nothing: {span(careful)} times."
               if careful else ""))
    for name, rows in by_name.items():
        pairs = paired(rows, patrol)
        if rows is plain or rows is patrol or not pairs:
            continue
        both = [(a, b) for row, other in pairs
                if (a := longer.get((name, row["train_seed"])))
                and (b := longer.get((name_of(other), row["train_seed"])))]
        attack = "of usual length" if len(both) < len(pairs) else "three times as long"
        ratios, gains = ratios_and_points(pairs if len(both) < len(pairs) else both)
        parts.append(
            f"{sentence_case(name)} against {name_of(patrol[0])}, under the attack {attack} on "
            f"both: {span(ratios)} times the SSIM, {span(gains)} points of accuracy more (less "
            "where negative).")
    parts.append(sentence_case(within_a_point(by_name, longer)))
    return "\n".join(f"- {part}" for part in parts)


def within_a_point(by_name: dict[str, list[Row]], longer: dict[tuple[str, int], Row]) -> str:
    """The most private rows whose mean is within a point of their own dense models, and whether
    they reach the goal: under the longer attack where every seed has it."""
    near = {name: rows for name, rows in by_name.items()
            if statistics.mean(lost(row) for row in rows) <= 1.0}
    if not near:
        return f"no mean is within a point of the dense models' (the goal there: SSIM {GOAL})."
    name = min(near, key=lambda n: statistics.mean(row["ssim"] for row in near[n]))
    rows = near[name]
    long = [longer[key] for row in rows if (key := (name, row["train_seed"])) in longer]
    is_long = len(long) == len(rows)
    ssim = statistics.mean(row["ssim"] for row in (long if is_long else rows))
    attack = "three times as long" if is_long else "of usual length"
    once = ", each picture uploaded once" * draws(rows[0])
    more = [row["often"]["ssim"] for row in rows if row["often"]]
    if more:
        once += f" (any number of times: {statistics.mean(more):.3f})"
    verdict = "met" if ssim <= GOAL else "not met"
    return (f"within a point of the dense model the most private row is {name}: SSIM {ssim:.3f} "
            f"under the attack {attack}{once}; the goal of {GOAL} is {verdict} under this kind of "
            f"attack.{steady(near, longer) * draws(rows[0])}")


def steady(near: dict[str, list[Row]], longer: dict[tuple[str, int], Row]) -> str:
    """What is the most private where each picture may be uploaded any number of times, each under
    the longest attack on it."""
    known = {}
    for name, rows in near.items():
        seen = [row["often"] if draws(row) else longer.get((name, row["train_seed"]), row)
                for row in rows]
        if all(seen):
            known[name] = statistics.mean(row["ssim"] for row in seen if row)
    if not known:
        return ""
    name = min(known, key=lambda n: known[n])
    seeds = len(near[name])
    return (f" Uploaded any number of times it is {name}, under the longest attack on it: SSIM "
            f"{known[name]:.3f} ({seeds} training seed{'s' * (seeds > 1)}); the goal is "
            f"{'met' if known[name] <= GOAL else 'not met'} there.")


def sentence_case(text: str) -> str:
    return text[0].upper() + text[1:]


def ratios_and_points(pairs: list[tuple[Row, Row]]) -> tuple[list[float], list[float]]:
    """Of each pair the first's SSIM over the second's, and its points of accuracy above it."""
    return ([a["ssim"] / b["ssim"] for a, b in pairs],
            [100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs])


def paired(rows: list[Row], others: list[Row]) -> list[tuple[Row, Row]]:
    """The rows of two defences that share a training seed."""
    of_seed = {row["train_seed"]: row for row in others}
    return [(row, of_seed[row["train_seed"]]) for row in rows if row["train_seed"] in of_seed]


def span(values: list[float]) -> str:
    """`0.30 to 0.49`, or the one value that all of them round to."""
    return " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))
