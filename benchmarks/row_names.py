"""How tables call what the frontier's rows are about."""

from __future__ import annotations

from typing import Any

from frontier_recipes import RECIPES

from patrol_prune.defences import FeatureDropout

Row = dict[str, Any]



def dropout_name(behind: FeatureDropout) -> str:
    share = f" (of {1 - behind.spared:.0%} of each training batch)" if behind.spared else ""
    return f"and dropout, p {behind.p:g}{share}"


BEHIND = {name: dropout_name(recipe.behind)
          for name, recipe in RECIPES.items() if recipe.behind is not None}
"""Of recipes with dropout behind the edge."""
READ_WHOLE = {name for name in RECIPES if "whole" in name} | {"half-long"}
"""Recipes with attackers inside that read the whole of a small map."""
METHODS = {
    "dense": "dense, not pruned",
    "taylor": "Taylor pruning",
    "patrol": "**PATROL**",
    "lighter": "**Taylor pruning, then PATROL's fine-tuning, β 10**",
    "patrol-adversarial": "PATROL, adversarial term only",
    "patrol-masks": "PATROL, learned masks",
    "magnitude": "pruned by magnitude",
    "control": "trained on without attackers, cut deeper",
    "deeper": "**PATROL, cut deeper**",
}
ATTACKS = {
    "inverse_network": "residual decoder",
    "inverse_network_ssim": "residual decoder, MSE + SSIM",
    "transposed": "transposed-convolution decoder",
    "transposed_ssim": "transposed-convolution decoder, MSE + SSIM",
    "unet": "U-shaped decoder",
    "unet_ssim": "U-shaped decoder, MSE + SSIM",
    "dropped_ssim": "residual decoder trained with dropout, MSE + SSIM",
    "whitened_ssim": "residual decoder on whitened features, MSE + SSIM",
    "aimed_ssim": "residual decoder whose loss counts plates more, MSE + SSIM",
    "linear_inverse": "linear decoder, closed form",
    "nearest_image": "nearest of the attacker's images",
    "rmle": "rMLE, white box, warm-started",
    "rmle_published": "rMLE with the published settings",
    "image_prior": "image prior, white box",
    "query_free": "query-free, same architecture",
    "query_free_same": "query-free, same architecture",
    "query_free_other": "query-free, other architecture",
    "query_free_match": "query-free, without labels",
}
DEFENCES = {
    "with-none": "none (trained on)",
    "with-patrol": "PATROL's fine-tuning",
    "patrol-more": "PATROL on its own pruned model",
    "with-adversarial_only": "adversarial training",
    "with-gaussian_noise": "Gaussian noise",
    "with-laplacian_noise": "Laplacian noise",
    "with-feature_dropout": "dropout on features",
    "with-quantisation": "quantisation",
    "with-nopeek": "NoPeek",
    "with-bottleneck": "bottleneck, no adversary",
    "with-disco": "DISCO-style dropping, β 10",
    "with-cem_patrol": "CEM's \"PATROL\" baseline",
}
INSIDE = {
    "mse": "surrogates of MSE alone", "large": "three larger surrogates on whole batches",
    "renewed": "larger surrogates, the weakest renewed",
    "pool": "larger surrogates with images of their own",
    "features": "larger surrogates, features distilled",
    "narrow-16": "upload pruned to 16 channels first",
    "narrow-8": "upload pruned to 8 channels first",
    "longer": "three times as long", "longest": "six times as long",
    "longer-dropout": f"{BEHIND['longer-dropout']}, three times as long",
    "longer-spared-dropout": f"{BEHIND['longer-spared-dropout']}, three times as long",
    "longer-light-dropout": f"{BEHIND['longer-light-dropout']}, three times as long",
    "half": "with a larger budget", "half-longer": "with a larger budget, three times as long",
    "half-longer-light-dropout":
        f"{BEHIND['half-longer-light-dropout']}, with a larger budget, three times as long",
    "longer-whole": "attackers inside that read it whole, three times as long",
    "half-longer-whole":
        "attackers inside that read it whole, with a larger budget, three times as long",
    "half-longest-whole":
        "attackers inside that read it whole, with a larger budget, six times as long",
    "half-longer-whole-light-dropout":
        f"{BEHIND['half-longer-whole-light-dropout']}, attackers inside that read it whole, with a "
        "larger budget, three times as long",
    "taylor": "on Taylor pruning",
    "long": "larger surrogates, three times as long",
    "half-long": "larger surrogates, with a larger budget, three times as long",
}
STRENGTHS = {
    "patrol": "β {:g}", "adversarial_only": "β {:g}", "gaussian_noise": "σ {:g} of the RMS",
    "laplacian_noise": "σ {:g} of the RMS", "feature_dropout": "p {:g}", "quantisation": "{:g} bit",
    "nopeek": "weight {:g}", "bottleneck": "{:g} channels", "disco": "{:.0%} dropped",
    "cem_patrol": "β {:g}",
}
PRESSED = frozenset([
    "013a083", "051da90", "07cdb51", "0c51218", "1321211", "28acad8", "520c817", "5d363a4",
    "5d363a4+changes", "5d3ca9e", "5d3ca9e+changes", "78e7abc", "8903350", "8903350+changes",
    "8cea7bd", "8dac763", "9ecb9fb", "9ecb9fb+changes", "a5b241c", "a5fbf63", "b9677e0",
    "b9677e0+changes", "ee199dd", "fe8a581", "ff89036",
])
"""Commits at which decoders pressed the 128 channels of a map of 4x4 or 1x1 positions, as after the
last layer, through the 64 of their trunk; later ones hold all of it."""
SMALL = ("layer4.0", "layer4", "avgpool")
"""Splits with such a map."""
PRESSED_MARK = " §"
PRESSED_TEXT = (
    "§ measured while decoders, attackers' and surrogates', pressed such a small map through half "
    "of its values or less: today's attackers see more there, and the figure is too low."
)
AGAINST_PRESSED_MARK = " ‡"
AGAINST_PRESSED_TEXT = (
    "‡ trained against surrogates whose decoders pressed such a small map through half of its "
    "values or less. Without ‡ PATROL's surrogates read all of it, as they do today."
)
DRAWING = ("gaussian_noise", "laplacian_noise", "feature_dropout")


def attack_name(row: Row) -> str:
    """The attack's name as tables say it, with the attacker's data where it is not the usual."""
    name = ATTACKS.get(row["attack"], row["attack"])
    if not seen_once(row):
        name += ", any number of uploads of each picture"
    if row.get("began_with") == "inverse_network_ssim":
        return f"{name} by the MSE + SSIM decoder"
    if row.get("attacker_data") == "shifted":
        return f"{name}, {row['attacker_images']:,} images of another kind"
    if row.get("times_as_long", 1) > 1:
        return f"{name}, {row['times_as_long']} times as long"
    if row["attacker_images"] < 10_000:
        return f"{name}, {row['attacker_images']:,} images"
    return name


def seen_once(row: Row) -> bool:
    """Whether the attacker had one upload of each picture, of an edge that draws."""
    return not row.get("silenced")


def draws(row: Row) -> bool:
    """Whether the edge draws at random for every upload."""
    return row.get("defence") in DRAWING or row.get("recipe") in BEHIND


def pressed(row: Row) -> bool:
    """Whether a small map was attacked by decoders that could not hold all of it."""
    commit = row.get("commit") or row.get("made_with", {}).get("commit")
    return row["split"] in SMALL and commit in PRESSED


def against_pressed(row: Row) -> bool:
    """Whether the model was trained against surrogates that could not hold all of a small map."""
    return (row.get("defence") == "patrol" and row["split"] in SMALL
            and row.get("recipe") not in READ_WHOLE)


def key_of(row: Row) -> str:
    """The key of the defended model that a row is about."""
    recipe = f"@{row['recipe']}" if row.get("recipe") else ""
    return f"{row['method']}{recipe}-{row.get('strength') or 0:g}-{row['split']}"


def has_key(row: Row, key: str) -> bool:
    """Whether a row is about the defended model of this key."""
    return key_of(row) == key
