"""Whether documents in one row stay apart in a model, behind a mask or by their lengths: tried on the model itself.

Kernels that read lengths run on a GPU in 16 bits only, and a model is tried before it is there. So what stands for them
here is `varlen_attention` on the CPU, which takes the same lengths.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from surgeon.anatomy.config import attention_kinds, size_of
from surgeon.anatomy.layer_rules import FULL_ATTENTION, SLIDING_ATTENTION
from surgeon.errors import PlanError
from surgeon.models.device import wide, without_autocast
from surgeon.models.split import in_mode
from surgeon.models.varlen import (
    ANYWHERE,
    UNKNOWN,
    attending_by,
    kernel_fault,
    lengths_of,
    reads_lengths,
    standing_in,
    varlen_attention,
)

# The relative change of a state that rounding may cause. Measured: 1e-7 in float64 in families that attend in float32,
# 1e-6 in float32; another visible document changes some state by its own length. 16 bits have units of 2^-8.
APART = {torch.float64: 1e-5, torch.float32: 1e-4}
APART_HALF = 0.1
PROBE_LENGTHS = (5, 7)  # of the two documents that are packed
RECORDED = "varlen-recorded"  # the name of `varlen_attention` in a trial
FAILURES = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)  # of code that needs the mask it did not get


def keeps_documents_apart(model: Any) -> bool:
    """Return whether documents in one row, whose positions restart, do not see each other.

    Measured on the model: the states of two documents of random tokens, in one row and each in a row of its own. For an
    attention that reads lengths the row comes with them. False for a kernel that reads none and does not run here:
    nothing can stand for it, for which masks it is given and follows is known of it alone.
    """
    attention = model.config._attn_implementation
    if reads_lengths(attention):
        return _refusal(model) is None
    if attention in ANYWHERE:
        return _apart(model, attention)
    try:
        return _apart(model, attention)
    except FAILURES:
        return False


def without_lengths(model: Any, device: str, dtype: torch.dtype) -> str | None:
    """Return why a model cannot attend by the lengths of documents on a device in `dtype`, None where it can."""
    calls = _Calls()
    if (reason := _refusal(model, calls)) is not None:
        return reason
    if device == "cpu":
        return None
    faults = [kernel_fault(width, value_width, dtype) for width, value_width in calls.widths]
    return next((f"the kernel does not know {fault}" for fault in faults if fault), None)


def breaks_graph(model: Any) -> bool:
    """Return whether torch cannot compile a decoder that attends by lengths as one graph; nothing is generated."""
    embedding = model.get_input_embeddings().weight
    given = {
        "input_ids": torch.full((1, 4), len(embedding) - 1, device=embedding.device),
        "position_ids": torch.tensor([[0, 1, 0, 1]], device=embedding.device),
        **lengths_of(torch.tensor([0, 2, 4], dtype=torch.int32, device=embedding.device)),
    }
    compiled: Any = torch.compile(model.get_decoder(), fullgraph=True, backend="eager")
    try:
        with torch.no_grad(), in_mode(model, training=False), without_autocast(embedding.device.type):
            compiled(**given, use_cache=False)
    except (torch._dynamo.exc.TorchDynamoException, *FAILURES):
        return True
    finally:
        torch._dynamo.reset()
    return False


def _refusal(model: Any, calls: "_Calls | None" = None) -> str | None:
    """Return why lengths do not keep documents apart in a model, None where they do.

    Every layer must attend through `varlen_attention`, with the window that config.json gives it.
    """
    calls = calls or _Calls(drops=UNKNOWN if "flash" in model.config._attn_implementation else ())
    AttentionInterface.register(RECORDED, calls)
    try:
        is_apart = _apart(model, RECORDED)
        _train_mode(model)
    except PlanError as error:
        return str(error)
    except FAILURES as error:
        return f"{type(model).__name__} cannot do without a mask ({type(error).__name__})"
    text = model.config.get_text_config()
    depth, values = int(text.num_hidden_layers), text.to_dict()
    kinds = attention_kinds(values, depth)
    if unknown := sorted(set(kinds) - SLIDING_ATTENTION - FULL_ATTENTION):
        return f"{type(model).__name__} has layers of the kind {unknown[0]}"
    if len(calls.windows) != 2 * depth:
        return f"not every layer of {type(model).__name__} attends through the interface of transformers"
    window = size_of(values, "window")
    if calls.windows != 2 * [window if kind in SLIDING_ATTENTION else None for kind in kinds]:
        return f"the layers of {type(model).__name__} do not hand on the windows that config.json gives them"
    return None if is_apart else f"documents in one row of {type(model).__name__} would see each other"


def _apart(model: Any, implementation: str) -> bool:
    """Return whether two documents in one row have the states that each has alone, by the model's own attention."""
    decoder = model.get_decoder()
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return False
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    total = sum(PROBE_LENGTHS)
    tokens = torch.randint(0, embedding.shape[0], (1, total), generator=generator).to(embedding.device)
    parts = [torch.arange(length, device=embedding.device)[None] for length in PROBE_LENGTHS]
    lengths = {}
    own = model.config._attn_implementation
    if implementation == RECORDED:
        own = standing_in(own)
        lengths = lengths_of(torch.tensor([0, PROBE_LENGTHS[0], total], dtype=torch.int32, device=embedding.device))
    with torch.no_grad(), in_mode(model, training=False), without_autocast(embedding.device.type):
        with attending_by(model, implementation):
            packed = decoder(input_ids=tokens, position_ids=torch.cat(parts, 1), use_cache=False, **lengths)[0]
        with attending_by(model, own):
            documents = zip(torch.split(tokens, list(PROBE_LENGTHS), 1), parts, strict=True)
            alone = [decoder(input_ids=ids, position_ids=places, use_cache=False)[0] for ids, places in documents]
    apart = torch.cat(alone, 1)
    moved = wide(packed - apart).norm(dim=-1) / wide(apart).norm(dim=-1)
    return float(moved.max()) <= APART.get(packed.dtype, APART_HALF)


def _train_mode(model: Any) -> None:
    """Run a decoder on a few tokens as in training. Raises PlanError where that needs more, such as dropout."""
    embedding = model.get_input_embeddings().weight
    device = embedding.device
    tokens = torch.full((1, 4), len(embedding) - 1, device=device)  # not the padding, of which transformers warns
    with (
        torch.no_grad(),
        in_mode(model, training=True),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        without_autocast(device.type),
        attending_by(model, RECORDED),
    ):
        model.get_decoder()(input_ids=tokens, use_cache=False)


class _Calls:
    """`varlen_attention` that records the window and the widths of heads of each call.

    It `drops` what it does not know where a kernel knows it: documents stay apart with it or without.
    """

    def __init__(self, drops: Sequence[str] = ()) -> None:
        self.drops = drops
        self.windows: list[int | None] = []
        self.widths: set[tuple[int, int]] = set()

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        *,
        sliding_window: int | None = None,
        **options: Any,
    ) -> Any:
        self.windows.append(sliding_window)
        self.widths.add((query.shape[-1], value.shape[-1]))
        known = {name: option for name, option in options.items() if name not in self.drops}
        return varlen_attention(module, query, key, value, mask, sliding_window=sliding_window, **known)
