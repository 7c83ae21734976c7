"""Attention over documents of any length in one row, by where they begin: no mask is made, no other document is read.

On a GPU torch's own variable-length kernel computes it (torch.nn.attention.varlen, FlashAttention's), elsewhere a
product for each document. transformers knows it by the name VARLEN. Its models hand through `cu_seq_lens_q` and `_k`,
int32, shape (N + 1,): the begins of the N documents and the end of the last one; `max_length_q` and `_k` are the length
of the longest. Without them each row is one document.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from surgeon.errors import PlanError

VARLEN = "varlen"
MOST_HEAD_DIM = 256  # of the kernel
ANYWHERE = ("sdpa", "eager")  # attention that runs on every device, in every dtype
UNKNOWN = ("softcap", "s_aux", "sinks", "position_bias")  # what some models ask for, and the kernel does not know


def reads_lengths(implementation: str) -> bool:
    """Return whether an attention implementation of transformers takes the lengths of documents in place of a mask."""
    return implementation == VARLEN or "flash" in implementation


def standing_in(implementation: str) -> str:
    """Return the attention to try a model by before it is on its device, where that of a kernel may not run."""
    return implementation if implementation in ANYWHERE else "sdpa"


def lengths_of(ends: Tensor) -> dict[str, Any]:
    """Return the options of a decoder for documents in one row. `ends`, (N + 1,), int32, are their ends after a 0."""
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


@contextmanager
def attending_by(model: Any, implementation: str) -> Iterator[None]:
    """Return a context in which a model attends by another implementation of transformers."""
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    model.config._attn_implementation = implementation
    try:
        yield
    finally:
        for config, name in before:  # the outer one first, which sets those inside it
            config._attn_implementation = name


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    key_index: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return the values that each token of its document attends to, (B, S, H, E), and no weights.

    `query` has shape (B, H, S, D), `key` (B, K, S, D) and `value` (B, K, S, E), where K divides H. `key_index`, (N,),
    are the places whose keys and values `cu_seq_lens_k` counts, by default all in order; a document's last key is its
    last query's own. A mask of four dimensions is followed as sdpa follows it. Raises PlanError for what the kernel
    does not compute.
    """
    if attention_mask is not None:
        if attention_mask.ndim != 4:
            raise PlanError("varlen attention takes no padding mask", hint="Use --attention sdpa.")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    dtype = _dtype(query)
    if (fault := _fault(module, query, key, value, dtype, dropout, is_causal, options)) is not None:
        raise PlanError(f"varlen attention does not know {fault}", hint="Use --attention sdpa.")
    batch, _, length, _ = query.shape
    window = -1 if sliding_window is None else sliding_window - 1  # tokens before a token, -1 for all
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        cu_seq_lens_q = cu_seq_lens_k = torch.arange(
            0, batch * length + 1, length, dtype=torch.int32, device=query.device
        )
        max_length_q = max_length_k = length
    queries, keys, values = (states.transpose(1, 2).flatten(0, 1).to(dtype) for states in (query, key, value))
    if key_index is not None:
        keys, values = keys.index_select(0, key_index), values.index_select(0, key_index)
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        is_grouped = queries.shape[1] != keys.shape[1]
        out: Tensor = varlen_attn(  # type: ignore[assignment]
            queries,
            keys,
            values,
            cu_seq_lens_q,
            cu_seq_lens_k,
            int(max_length_q or length),
            int(max_length_k or length),
            scale=scaling,
            window_size=(window, 0),
            enable_gqa=is_grouped,
        )
    else:  # a loop over lengths would end the graph of a compiler
        attend = _masked if torch.compiler.is_compiling() else _by_document
        out = attend(queries, keys, values, cu_seq_lens_q, cu_seq_lens_k, scaling, window)
    return out.view(batch, length, *out.shape[1:]), None


def _fault(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dtype: torch.dtype,
    dropout: float,
    is_causal: bool,
    options: dict[str, Any],
) -> str | None:
    """Return what of a call the kernel does not compute, None where it computes all."""
    if given := next((name for name in UNKNOWN if options.get(name) is not None), None):
        return f"the {given} of {type(module).__name__}"
    if not is_causal:
        return f"attention to later tokens, which {type(module).__name__} has"
    if dropout:
        return "dropout of attention"
    if query.shape[2] != key.shape[2]:
        return "a cache"
    return kernel_fault(query.shape[-1], value.shape[-1], dtype) if query.is_cuda else None


def kernel_fault(width: int, value_width: int, dtype: torch.dtype) -> str | None:
    """Return what the kernel on a GPU does not compute of heads of these widths, None where it computes them."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"products of {str(dtype).removeprefix('torch.')} on a GPU"
    if width % 8 or width > MOST_HEAD_DIM or value_width != width:
        return f"heads of {width} dims, with values of {value_width}, on a GPU"
    return None


def _dtype(query: Tensor) -> torch.dtype:
    """Return the dtype to multiply in: that of autocast where it is on, else that of the queries."""
    kind = query.device.type
    if query.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return query.dtype


def _by_document(
    query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, scaling: float | None, window: int
) -> Tensor:
    """Return the attention of each document on its own; shapes (T, H, D), (T, K, D), (T, K, E) to (T, H, E)."""
    parts = []
    for (begin, end), (first, last) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
        one = (query[begin:end], key[first:last], value[first:last])
        is_plain = window < 0 or end - begin <= window + 1
        mask = None if is_plain and end - begin == last - first else _causal(end - begin, last - first, window, query)
        parts.append(_attend(*one, mask, scaling))
    return torch.cat(parts)


def _masked(
    query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, scaling: float | None, window: int
) -> Tensor:
    """Return the same as `_by_document` in one product behind a mask of all tokens."""
    place_q, place_k = (torch.arange(len(states), device=states.device) for states in (query, key))
    of_q = torch.searchsorted(ends_q, place_q.to(ends_q.dtype), right=True) - 1
    of_k = torch.searchsorted(ends_k, place_k.to(ends_k.dtype), right=True) - 1
    # Places count from the end of the document, at which queries and keys are aligned.
    back_q, back_k = ends_q[of_q + 1] - place_q, ends_k[of_k + 1] - place_k
    distance = back_k[None, :] - back_q[:, None]
    mask = (of_q[:, None] == of_k[None, :]) & (distance >= 0)
    if window >= 0:
        mask = mask & (distance <= window)
    return _attend(query, key, value, mask, scaling)


def _causal(num_queries: int, num_keys: int, window: int, like: Tensor) -> Tensor:
    """Return which keys a query sees, (Q, K), aligned at their ends: those before it, at most `window` back."""
    query = torch.arange(num_keys - num_queries, num_keys, device=like.device)[:, None]
    distance = query - torch.arange(num_keys, device=like.device)
    return (distance >= 0) & (distance <= (window if window >= 0 else num_keys))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Return sdpa of one sequence, (Q, H, D), (K, G, D), (K, G, E) to (Q, H, E); without a mask it is causal."""
    query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
    is_grouped = query.shape[1] != key.shape[1]
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=is_grouped
    )
    return out[0].transpose(0, 1)


AttentionInterface.register(VARLEN, varlen_attention)
