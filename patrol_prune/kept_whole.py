"""Which of the edge's groups a pruner leaves whole, and the width of those that are sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patrol_prune.errors import InputError
from patrol_prune.given import check_count
from patrol_prune.groups import ChannelGroup


def reason_to_keep(pruner: Any, group: ChannelGroup) -> str | None:
    """Why a `PatrolPruner` does not shrink this group; None where it may."""
    if group.blocked is not None:
        return group.blocked
    if group.crossing is not None and pruner.boundary == "keep":
        return f"it crosses the split ({group.crossing}) and boundary='keep'"
    ignored = {*pruner._ignored, *(id(m) for m in pruner.ignored_layers)}
    for member in group.members:
        if member.direction != "in" and id(member.module) in ignored:
            return f"{member.layer_name!r} is in ignored_layers"
        if member.layer_name in pruner._costs.opaque:
            return f"the multiply-adds of {member.layer_name!r} are not those of self-attention"
        if member.module in pruner.num_heads:
            return f"{member.layer_name!r} has attention heads"
    roots = tuple(pruner.root_module_types)
    if not any(m.direction != "in" and isinstance(m.module, roots) for m in group.members):
        return "no layer that gives these channels is of the root_module_types"
    return None


def fixed_widths(
    groups: Mapping[str, ChannelGroup], channels: int | None, whole: Mapping[str, str]
) -> dict[str, int]:
    """Group -> the channels it keeps, for every group that crosses the split.

    Args:
        groups: the model's, by name.
        channels: `feature_channels` of the pruner.
        whole: groups that stay whole -> why.

    Raises:
        InputError: one that is wider has to stay whole, or none crosses.
    """
    if channels is None:
        return {}
    sent = {name: group for name, group in groups.items() if group.crossing is not None}
    wide = {name: whole[name] for name, group in sent.items()
            if name in whole and group.channels > channels}
    if wide or not sent:
        told = "; ".join(f"{name}: {why}" for name, why in wide.items())
        raise InputError(
            "Expected channels that cross the split and can be removed, for feature_channels="
            f"{channels}, came {told or 'none'}. Score them, cut elsewhere, or leave it out.")
    return dict.fromkeys(sent, channels)


def check_feature_channels(channels: object, boundary: object, structures: object) -> None:
    """Refuse what is no number of channels, and one where no channel that crosses may go.

    Raises:
        InputError: see above.
    """
    check_count(channels, "feature_channels", 1, optional=True)
    for name, value in (("boundary", boundary), ("structures", structures)):
        if channels is not None and value in ("keep", "blocks"):
            raise InputError(
                f"Expected {name} to let channels that cross the split go, beside "
                f"feature_channels={channels}, came {value!r}. Give boundary='prune' and "
                "structures='channels' or 'both'.")
