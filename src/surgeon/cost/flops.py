"""The floating-point operations that a token needs, and the peak of known devices.

Operations that are done twice to save memory count once, so a share of the peak is the MFU (model FLOPs utilisation).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.config import attention_kinds, size_of
from surgeon.anatomy.layer_rules import FULL_ATTENTION, SLIDING_ATTENTION

# Dense bfloat16 operations a second with float32 sums, without sparsity, from the vendors' data sheets. A name that
# is not here, or a slice of a device, has no known peak, and no MFU is shown.
PEAKS: Mapping[str, float] = {
    r"A(100|800)\b": 312e12,
    r"A10$": 125e12,
    r"A30$": 165e12,
    r"A40$": 149.7e12,
    r"H100 (PCIe|80GB HBM2e)$": 756e12,
    r"H[12]00 NVL$": 835e12,
    r"H100 80GB HBM3$": 989e12,
    r"(H200|H800|GH200 480GB)$": 989e12,
    r"H20\b": 148e12,
    r"B200$": 2250e12,
    r"L4$": 121e12,
    r"L40$": 181e12,
    r"L40S$": 362e12,
    r"RTX 3090$": 71e12,
    r"RTX 3090 Ti$": 80e12,
    r"RTX 4090$": 165e12,
    r"RTX 5090$": 209e12,
    r"RTX A6000$": 154.8e12,
    r"RTX 6000 Ada Generation$": 364e12,
    r"MI300X\b": 1307e12,
}


_LOOKUP = re.compile(
    r"(^|[._])(embed_tokens|embed_positions|wte|wpe|word_embeddings|position_embeddings|shared)\.weight$"
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")


def peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 peak of a device in operations a second, None where it is not known."""
    if " MIG " in device_name:
        return None
    return next((peak for pattern, peak in PEAKS.items() if re.search(rf"\b{pattern}", device_name)), None)


def multiplied_parameters(anatomy: Anatomy) -> int:
    """Return how many parameters a token is multiplied with: of experts only its own, and no embedding.

    A tied embedding counts once, as the head. Without a table, embedding and head are known by their usual names.
    """
    config, tensors = anatomy.spec.config, anatomy.spec.tensors
    looked_up = [name for name in tensors if _is_lookup(anatomy, name)]
    has_head = any(_is_head(anatomy, name) for name in tensors)
    multiplied = [name for name in tensors if name not in looked_up and not _is_buffer(anatomy, name)]
    multiplied += [name for name in looked_up if not has_head and tensors[name].shape[0] == size_of(config, "vocab")]
    return round(sum(tensors[name].num_parameters * _share(config, name, tensors[name].shape) for name in multiplied))


def body_parameters(anatomy: Anatomy) -> int:
    """Return how many parameters are neither of an embedding nor of a head. Experts count, whether a token sees them.

    Without a table, embedding and head are known by their usual names.
    """
    tensors = anatomy.spec.tensors
    return sum(
        tensors[name].num_parameters
        for name in tensors
        if not (_is_lookup(anatomy, name) or _is_head(anatomy, name) or _is_buffer(anatomy, name))
    )


def attention_flops(anatomy: Anatomy, sequence_length: int) -> float:
    """Return the operations of one token's attention, forward, in all layers: scores and sums of values.

    4 · heads · head_dim for every key that a token sees; in a causal row of T tokens that is T / 2 on average, in a
    sliding window of W at most W. Layers without softmax attention count as 0.
    """
    config = anatomy.spec.config
    head_dim, window = size_of(config, "head_dim"), size_of(config, "window")
    width = (size_of(config, "hidden") or 0) if head_dim is None else (size_of(config, "heads") or 0) * head_dim
    full = sequence_length / 2
    # the first W tokens of a row see half of W on average, the others all of it
    slid = window - window * window / (2 * sequence_length) if window and window < sequence_length else full
    keys = dict.fromkeys(FULL_ATTENTION, full) | dict.fromkeys(SLIDING_ATTENTION, slid)
    return sum(4 * width * keys.get(kind, 0.0) for kind in attention_kinds(config, anatomy.depth))


def flops_per_token(anatomy: Anatomy, sequence_length: int, *, trained: float = 1.0) -> float:
    """Return the operations that training on one token needs: 6 N + 6 · layers · heads · head_dim · T.

    N are the parameters that a token is multiplied with: two operations each in the forward pass, two for the gradient
    of the input, and two for that of the weight itself, which only the `trained` share of them has. The attention term
    is half of that in Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B), which counts the keys that a causal
    mask hides; 3 times `attention_flops`. T is a row's length, or a document's where rows are kept apart.
    """
    return (4 + 2 * trained) * multiplied_parameters(anatomy) + 3 * attention_flops(anatomy, sequence_length)


def _is_lookup(anatomy: Anatomy, name: str) -> bool:
    if anatomy.whole_family is None:
        return _LOOKUP.search(name) is not None
    return anatomy.row(name)[0].kind == "embedding"


def _is_head(anatomy: Anatomy, name: str) -> bool:
    if anatomy.whole_family is None:
        return _HEAD.search(name) is not None
    return anatomy.row(name)[0].kind == "head"


def _is_buffer(anatomy: Anatomy, name: str) -> bool:
    return anatomy.whole_family is not None and anatomy.row(name)[1] in ("buffer", "other")


def _share(config: Mapping[str, Any], name: str, shape: Sequence[int]) -> float:
    """Return the part of a tensor that one token is multiplied with: 2/8 of eight experts, of most tensors all."""
    experts, chosen = size_of(config, "experts"), size_of(config, "experts_per_token")
    if not experts or not chosen:
        return 1.0
    is_stacked = len(shape) == 3 and shape[0] == experts
    return min(1.0, chosen / experts) if is_stacked or ".experts." in name else 1.0
