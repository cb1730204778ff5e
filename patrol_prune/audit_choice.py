"""Which attackers an audit has and what they own, checked before any work."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from patrol_prune.attacks import Attack, InverseNetwork, InverseNetworkConfig
from patrol_prune.attacks.base import some_of
from patrol_prune.attacks.inverse_network_config import SUITE
from patrol_prune.attacks.query_free_config import SMALLEST_QUERY_FREE_SET
from patrol_prune.attacks.registry import ATTACKS, box_of, kind_of, make_attack, settings_for
from patrol_prune.attacks.training_pairs import SMALLEST_TRAINING_SET
from patrol_prune.data import fingerprints
from patrol_prune.errors import InputError, nearest
from patrol_prune.given import check_count, check_kind
from patrol_prune.metrics import check_pixels
from patrol_prune.regions import PrivateRegions

logger = logging.getLogger("patrol_prune.audit")
AttackChoice = str | Attack | Callable[[int], Attack]
"""A name, an instance (copied before each fit, and run once), or a function of the seed."""

AIMED = "aimed_ssim"
"""The name of the attack on private regions, in an audit that is told of some."""
_AIMED_LIKE = "inverse_network_ssim"
_SMALLEST_SIDE = 11
_FEWEST = {"white": 2, "black": SMALLEST_TRAINING_SET, "none": SMALLEST_QUERY_FREE_SET}


@dataclass(frozen=True)
class Factory:
    """One attack of the audit: its name, how to make it, and the seeds it runs with.

    `learned` says that others may start at its answer, `warm_starts` that it can do so, `fewest`
    how many images it has to own, `config` how it is set but for its seed.
    """

    name: str
    make: Callable[[int, Attack | None], Attack]
    seeds: tuple[int, ...]
    box: str | None = None
    learned: bool = False
    warm_starts: bool = False
    needs: tuple[str, ...] = ()
    fewest: int = 1
    config: Any = None


def aimed(
    config: InverseNetworkConfig | None, private: PrivateRegions, seeds: tuple[int, ...],
    device: str,
) -> Factory:
    """The decoder of `inverse_network_ssim`, set as those of this audit, after private regions."""
    settings = replace(config or SUITE[_AIMED_LIKE], family=SUITE[_AIMED_LIKE].family,
                       loss=SUITE[_AIMED_LIKE].loss)

    def make(seed: int, _: Attack | None) -> Attack:
        return InverseNetwork(replace(settings, seed=seed), device=device, private=private)

    return Factory(AIMED, make, seeds, "black", fewest=_FEWEST["black"], config=settings)


@dataclass(frozen=True)
class Owned:
    """What one attacker owns: `data` is "same" or "shifted", with `count` images (`some_of`)."""

    data: str
    pixels: Tensor
    labels: Tensor | None
    count: int
    mean_image: Tensor = field(repr=False)

    @property
    def whole(self) -> bool:
        """Whether it is all that there is of the same kind as the victims' images."""
        return self.data == "same" and self.count == len(self.pixels)


def factories(
    attacks: Sequence[AttackChoice] | Mapping[str, AttackChoice],
    config: InverseNetworkConfig | None,
    settings: Mapping[str, Any],
    seeds: Sequence[int],
    device: str,
    private: PrivateRegions | None = None,
) -> list[Factory]:
    """How to make each attack that was asked for, and with `private` one that is after it; those
    that can start warm come last.

    Raises:
        InputError: an unknown attack or none, names that repeat, settings of no attack that was
            asked for or of the wrong type, no seed or a repeated one, an own attack that is none or
            names an unknown box.
    """
    seeds = numbers(seeds, "seeds")
    for seed in seeds:
        check_count(seed, "seeds", 0)
    seeds = tuple(map(int, seeds))  # NumPy's own cannot be written as JSON
    if not isinstance(settings, Mapping):
        raise InputError(
            f"Expected settings as a mapping from attacks to theirs, came {type(settings).__name__}"
            ". Write settings={\"rmle\": RMLEConfig(...)}."
        )
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"Expected one or more different seeds, came {seeds}.")
    if isinstance(attacks, str):
        attacks = (attacks,)
    named = attacks if isinstance(attacks, Mapping) else {_name(a): a for a in attacks}
    if not named or len(named) != len(attacks):
        raise InputError(
            f"Expected one or more attacks of different names, came {[_name(a) for a in attacks]}."
            " Name each once; several of one kind take a mapping from names to attacks."
        )
    for name in named:
        check_kind(name, "the name of an attack", str, "It stands in the report.")
    for name in settings:
        if name not in named and name not in ATTACKS:
            raise InputError(
                f"Expected settings of an attack of this audit, came {name!r}. "
                f"{nearest(name, {*named, *ATTACKS})}"
            )
    made = [_factory(n, choice, config, settings, seeds, device) for n, choice in named.items()]
    if private is not None:
        if AIMED in named:
            raise InputError(f"Expected attacks of other names than {AIMED}, which the audit adds "
                             "for private regions. Give yours another.")
        made.append(aimed(config, private, seeds, device))
    return sorted(made, key=lambda factory: factory.warm_starts)


def _factory(
    name: str,
    choice: AttackChoice,
    config: InverseNetworkConfig | None,
    settings: Mapping[str, Any],
    seeds: tuple[int, ...],
    device: str,
) -> Factory:
    if isinstance(choice, str):
        kind, shown = kind_of(choice), choice
        own = settings[name] if name in settings else settings_for(choice, config, settings)
        first = make_attack(choice, own, device=device)  # wrong settings: before any work

        def make(seed: int, warm_start: Attack | None) -> Attack:
            return make_attack(shown, own, device=device, seed=seed, warm_start=warm_start)

        return Factory(
            name, make, seeds if kind.seeded else seeds[:1], kind.box,
            kind.box == "black" and kind.seeded, kind.warm_starts, kind.needs,
            _FEWEST[kind.box] if kind.seeded else 1, getattr(first, "config", None),
        )
    if isinstance(choice, Attack) and not isinstance(choice, type):
        instance = choice
        check_own(name, instance)
        return Factory(name, lambda seed, warm: copy.deepcopy(instance), seeds[:1])
    if isinstance(choice, type) and not inspect.signature(choice).parameters:
        raise InputError(
            f"Expected the attack {name!r} as an object, came its class, which takes no seed. Give "
            "an instance, or a function of the seed that makes one."
        )
    if callable(choice):
        return Factory(name, _fresh(name, choice, seeds[0]), seeds)
    raise InputError(
        "Expected an attack as a name, an object with fit and reconstruct, or a function of the "
        f"seed, came {choice!r}."
    )


def _fresh(
    name: str, choice: Callable[[int], Attack], seed: int
) -> Callable[[int, Attack | None], Attack]:
    """What a caller's function makes, tried once; of one that keeps what it made, copies of that.

    What it made for the trial was never fitted. If that comes again, so may all others, and fits
    that start at what earlier ones left would be no attackers of their own. What cannot be copied
    is handed out itself, once.
    """
    tried: Attack | None = None
    with torch.random.fork_rng(devices=[]):
        try:
            tried = choice(seed)
        except Exception as error:  # costs its own score alone, when its turn comes
            logger.warning("The attack %s cannot be made: %s", name, error)
        else:
            check_own(name, tried)
    keeps = False
    handed_out: list[tuple[Attack, Exception]] = []  # as it came, with why

    def make(seed: int, warm_start: Attack | None) -> Attack:
        nonlocal keeps
        made = choice(seed)
        keeps = keeps or (tried is not None and made is tried)
        if not keeps:
            return made
        why = next((error for earlier, error in handed_out if earlier is made), None)
        if why is None:
            try:
                return copy.deepcopy(made)
            except Exception as error:
                handed_out.append((made, error))
                return made
        raise InputError(
            f"Expected the function of the seed behind the attack {name!r} to make an object "
            f"each time, came the one that it made before, which cannot be copied ({why}). "
            "Make it inside the function."
        ) from why

    return make


def check_own(name: str, attack: object) -> None:
    """Refuse what a caller gave as an attack, or made, and is none (InputError)."""
    if not isinstance(attack, Attack):
        raise InputError(
            f"Expected the function of the seed behind the attack {name!r} to make an object with "
            f"fit and reconstruct, came {type(attack).__name__}."
        )
    try:
        box_of(attack)
    except InputError:
        raise
    except Exception as error:  # costs its own score alone, when its turn comes
        logger.warning("The box of the attack %s cannot be read: %s", name, error)


def numbers(values: Any, name: str) -> tuple[Any, ...]:
    """Several numbers as a tuple; an InputError where one came that stands alone."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise InputError(f"Expected {name} as a sequence of numbers, came {values!r}. Write "
                         f"{name}=({values},).")
    return tuple(values)


def _name(attack: AttackChoice) -> str:
    if isinstance(attack, str):
        return attack
    return str(getattr(attack, "__name__", type(attack).__name__))


def pixels_of(data: Tensor, name: str) -> Tensor:
    """Images `[N, C, H, W]` as float32 on [0, 1] on the CPU, checked."""
    if not isinstance(data, Tensor) or data.dim() != 4 or len(data) == 0:
        came = tuple(data.shape) if isinstance(data, Tensor) else type(data).__name__
        raise InputError(f"Expected {name} as a tensor [N, C, H, W] with N >= 1, came {came}.")
    data = data.clone() if data.is_inference() else data.detach()  # attacks train with them
    if data.dtype == torch.uint8:
        return data.cpu().float() / 255.0
    check_pixels(data, name)
    return data.cpu().float()


def owned(
    known: Tensor,
    shifted: Tensor | None,
    labels: Tensor | None,
    counts: Sequence[int | None],
) -> list[Owned]:
    """One attacker for each number of images, the most first, then one with shifted images.

    Fewer than all are the first of a fixed permutation: images often come sorted by class.

    Raises:
        InputError: labels of another length, no number, a repeated one or one out of range.
    """
    check_classes(labels, len(known))
    counts = numbers(counts, "attacker_images")
    for count in counts:
        check_count(count, "attacker_images", 1, optional=True)
    sizes = [len(known) if count is None else int(count) for count in counts]
    if not sizes or len(set(sizes)) < len(sizes) or not all(1 <= s <= len(known) for s in sizes):
        raise InputError(
            "Expected attacker_images as different numbers between 1 and the attacker's "
            f"{len(known)} images (None for all), came {tuple(counts)}."
        )
    made = []
    for size in sorted(sizes, reverse=True):
        index = some_of(len(known), size)
        mean_image = (known if index is None else known[index]).mean(dim=0)
        made.append(Owned("same", known, labels, size, mean_image))
    if shifted is not None:
        made.append(Owned("shifted", shifted, None, len(shifted), shifted.mean(dim=0)))
    return made


def check_classes(labels: object, images: int) -> None:
    """Refuse labels that are not one class, from 0 upwards, for each image (InputError)."""
    if labels is None:
        return
    came = type(labels).__name__
    if isinstance(labels, Tensor):
        came = f"{labels.dtype} of shape {tuple(labels.shape)}"
        whole = labels.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
        if whole and tuple(labels.shape) == (images,):
            if int(labels.min()) >= 0:
                return
            came = f"{int(labels.min())} among them"
    raise InputError(
        f"Expected attacker_labels as one class for each of the {images} images, whole numbers "
        f"from 0 upwards in a tensor [{images}], came {came}. Write torch.tensor(labels)."
    )


def check_data(known: Tensor, victim: Tensor, name: str = "attacker_data") -> None:
    """Refuse images of two sizes, too small for SSIM, or that both sides own (InputError)."""
    if known.shape[1:] != victim.shape[1:]:
        raise InputError(
            f"Expected {name} and victim images of one size, came "
            f"{tuple(known.shape[1:])} and {tuple(victim.shape[1:])}. Resize one of them."
        )
    if min(known.shape[2:]) < _SMALLEST_SIDE:
        raise InputError(
            f"SSIM takes images of at least {_SMALLEST_SIDE} pixels a side, came "
            f"{tuple(known.shape[2:])}. Use larger images."
        )
    seen = set(_fingerprints(known))
    shared = [i for i, print_ in enumerate(_fingerprints(victim)) if print_ in seen]
    if shared:
        raise InputError(
            f"Expected victim images that the attacker does not own, came {len(shared)} of "
            f"{len(victim)} that are also in {name} (victim_data[{shared[0]}] is the "
            "first). Remove them from one of the two: an attacker who knows the image proves "
            "nothing."
        )


def check_needs(made: Sequence[Factory], given: Mapping[str, Any]) -> None:
    """Refuse an attack that needs what `given` has None of (InputError)."""
    say = {
        "cloud": "the other half of the split (split.cloud)",
        "labels": "classes of the attacker's images (attacker_labels=)",
        "weights": "an edge whose weights can be trained anew, not a file or integers (the split "
                   "that it was made from, say)",
    }
    for factory in made:
        missing = [say.get(n, n) for n in factory.needs if n in given and given[n] is None]
        if missing:
            raise InputError(f"The attack {factory.name} needs {' and '.join(missing)}.")


def check_uploads(uploads: int, name: str = "uploads") -> None:
    """An InputError where it is no whole number of at least 1."""
    if isinstance(uploads, bool) or not isinstance(uploads, int) or uploads < 1:
        raise InputError(
            f"Expected {name} as a whole number of at least 1, the uploads of each picture that an "
            f"attacker sees, came {uploads!r}."
        )


def check_counts(made: Sequence[Factory], attackers: Sequence[Owned]) -> None:
    """Refuse an attack that needs more images than one of the attackers owns (InputError)."""
    for own in attackers:
        for factory in made:
            if own.count < factory.fewest:
                raise InputError(
                    f"The attack {factory.name} needs at least {factory.fewest} images, came "
                    f"{own.count} ({own.data}). Give the attacker more, or leave the attack out."
                )


def _fingerprints(pixels: Tensor) -> list[bytes]:
    return fingerprints((pixels * 255).round().to(torch.uint8))
