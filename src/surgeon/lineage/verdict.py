"""What the differences of a child from a candidate look like, in words: cut, grown, trained, merged, quantized."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from surgeon.lineage.comparing import Comparison
from surgeon.lineage.grids import Grid
from surgeon.lineage.numbers import WORDS
from surgeon.lineage.parts import Difference

LORA_SHARE = 2  # a rank above this part of the rows that were looked at is no low rank
LORA_TAIL = 2.5  # times the effective rank: what training leaves has a long tail, an adapter ends at its rank
LORA_SPREAD = 0.25  # by how much the ranks of one adapter may vary from tensor to tensor
WIDTHS = ("ffn", "heads", "kv_heads", "hidden", "expert_ffn", "shared_ffn")


def structure(found: Comparison, owned: Sequence[bool]) -> list[str]:
    """Return what happened to layers and axes; `owned` says of each layer whether it is this candidate's."""
    layers = [layer for layer, is_own in zip(found.layers, owned, strict=True) if is_own]
    known, depth = [layer for layer in layers if layer is not None], len(found.parent.roles.layers)
    words = []
    if len(known) < len(found.layers) and all(owned):
        in_place = all(layer in (None, j) for j, layer in enumerate(found.layers))
        words.append("layers replaced" if in_place and len(layers) == depth else "new layers")
    if len(set(known)) < len(known):
        words.append("stacked" if _is_stacked(known) else "layers repeated")
    elif any(after < before for before, after in pairwise(known)):
        words.append("layers reordered")
    if len(set(known)) < depth and all(owned) and len(layers) < depth:
        words.append("depth cut")
    kinds = {axis: found.maps[axis].kind for axis in WIDTHS if axis in found.maps}
    words += ["width cut"] if "subset" in kinds.values() else []
    words += ["width grown"] if {"clone", "pad"} & set(kinds.values()) else []
    words += ["permuted"] if "permutation" in kinds.values() else []
    experts = found.maps.get("experts")
    words += ["experts cut"] if experts is not None and experts.kind == "subset" else []
    vocabulary = found.maps.get("vocab")
    if vocabulary is not None and vocabulary.kind != "identity":
        other = "vocabulary changed"
        words.append({"subset": "vocabulary cut", "pad": "tokens added"}.get(vocabulary.kind, other))
    return words


def _is_stacked(known: Sequence[int]) -> bool:
    """Return whether the layers are runs from the first one on, one after the other."""
    return all(after in (before + 1, 0) for before, after in pairwise(known))


def changes(found: Comparison, owned: Sequence[bool]) -> list[str]:
    """Return what happened to the numbers: nothing, a cast, a quantization, an adapter, or training."""
    seen = [each for each in found.differences if each.layer is None or owned[each.layer]]
    changed = [each for each in seen if each.status == "changed"]
    if not changed:
        casts = [each for each in seen if each.status == "cast"]
        if not casts:
            return []
        return [f"cast to {WORDS.get(found.child.samples.dtype(_name(found, casts[0])), 'another dtype')}"]
    if all(each.layer is None and each.equal > 0.5 for each in changed):
        return ["some tokens changed"]
    if found.child.samples.coded:
        return [_most(list({str(each.grid): each.grid for each in found.child.samples.coded.values()}.values()))]
    matrices = [each for each in changed if each.is_matrix]
    grids = [each.grid for each in matrices if each.grid is not None]
    if 2 * len(grids) > sum(each.layer is not None for each in matrices):
        return [_most(grids)]
    if any(abs(each.scale - 1) > 0 for each in matrices if each.layer is not None) and _is_wider(found):
        return []  # growth divides and adds noise; what training did beside that cannot be told
    if (rank := lora_rank(seen)) is not None:
        return [f"lora rank {rank}"]
    return ["finetune"]


def _name(found: Comparison, each: Difference) -> str:
    roles = found.child.roles
    return roles.outside[each.role] if each.layer is None else roles.layers[each.layer][each.role]


def _is_wider(found: Comparison) -> bool:
    return any(found.maps[axis].kind in ("clone", "pad") for axis in WIDTHS if axis in found.maps)


def _most(grids: Sequence[Grid]) -> str:
    return Counter(map(str, grids)).most_common(1)[0][0]


def lora_rank(seen: Sequence[Difference]) -> int | None:
    """Return the rank of a LoRA adapter that was merged, None where the differences are not those of one.

    A short training of all weights has a low effective rank too. So all else must be identical bit for bit, all gains
    among it; the ranks of all changed matrices must be nearly one number; and it must be far below what was looked at.
    """
    changed = [each for each in seen if each.status == "changed"]
    ranks = [each.rank for each in changed if each.rank is not None]
    same = [each for each in seen if each.status in ("identical", "cast", "scaled")]
    if not ranks or len(ranks) < len(changed) or not same:
        return None
    rank = round(float(np.median(ranks)))
    looked_at = min(min(each.shape) for each in changed)
    is_low = 0 < rank <= looked_at / LORA_SHARE
    is_one = all(abs(each - rank) <= max(1, LORA_SPREAD * rank) for each in ranks)
    is_short = all((each.rank or 0) <= LORA_TAIL * (each.effective or 0) + 2 for each in changed)
    return rank if is_low and is_one and is_short else None


def direction(found: Comparison, words: Sequence[str]) -> str:
    """Return what says which of the two was made from the other, or that nothing does."""
    if any(word.startswith(("int", "lora")) for word in words):
        return "the child was made from it: a base is no quantized copy, and no sum with an adapter"
    smaller = {"depth cut", "width cut", "experts cut", "vocabulary cut"} & set(words)
    larger = {"stacked", "layers repeated", "width grown", "tokens added"} & set(words)
    if smaller and not larger:
        return "the child holds a part of it: a cut is made from the whole"
    if larger and not smaller:
        return "the child holds all of it, and more"
    return "nothing in the weights says which of the two was first"
