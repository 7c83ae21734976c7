"""Rotary positions: how many dimensions of a head rotate, and where they lie in a head of another size."""

from collections.abc import Mapping
from typing import Any

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.config import CONFIG_HINT
from surgeon.errors import CheckpointError

# Rope types whose frequencies in a head n times as wide contain the old ones, pair i at n * i.
EXTENSIBLE_ROPE = frozenset({"default", "linear", "llama3"})


def rope_types(config: Mapping[str, Any]) -> set[str]:
    """Return the rope types in a config, old or new, one for each kind of layer."""
    entries = [config.get("rope_parameters"), config.get("rope_scaling")]
    entries += [value for entry in entries if isinstance(entry, Mapping) for value in entry.values()]
    groups = [entry for entry in entries if isinstance(entry, Mapping)]
    return {str(group[key]) for group in groups for key in ("rope_type", "type") if group.get(key)}


def rotary_dims(anatomy: Anatomy, head_dim: int) -> int:
    """Return how many dimensions of a head of `head_dim` rotate: the first ones.

    Where the config gives their number, as many more of a wider head. Raises CheckpointError for a share of them that
    is none.
    """
    config = anatomy.config
    if config.get(anatomy.require_family().rotary_off_flag or ""):
        return 0
    if "rotary" in anatomy.sizes:
        return anatomy.sizes["rotary"] * head_dim // anatomy.sizes["head_dim"]
    rope = config.get("rope_parameters")
    for group, key in ((rope, "partial_rotary_factor"), (config, "partial_rotary_factor"), (config, "rotary_pct")):
        if isinstance(group, Mapping) and isinstance(group.get(key), (int, float)):
            if not 0 <= group[key] <= 1:
                raise CheckpointError(f"config.json says {key} = {group[key]!r}, not between 0 and 1", hint=CONFIG_HINT)
            return int(head_dim * float(group[key]))
    return int(head_dim * anatomy.require_family().rotary_share)


def wider_head(head_dim: int, rotary_dim: int, times: int, style: str) -> tuple[int, ...]:
    """Return, for each dimension of a head `times` as wide, the old dimension that goes there, -1 where it is new.

    Old pair i becomes pair `times` * i, whose frequency in the wider head is the old one, bit for bit. `style` says how
    pairs lie: "halves" (i and i + rotary_dim / 2) or "pairs" (2i and 2i + 1). Dimensions that do not rotate follow in
    order.
    """
    index = [-1] * (head_dim * times)
    half = rotary_dim // 2
    for i in range(half):
        if style == "halves":
            index[times * i], index[times * i + times * half] = i, i + half
        else:
            index[2 * times * i], index[2 * times * i + 1] = 2 * i, 2 * i + 1
    for k in range(head_dim - rotary_dim):
        index[times * rotary_dim + k] = rotary_dim + k
    return tuple(index)
