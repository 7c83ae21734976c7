"""The encoder of T5 with a cache: its stack would throw one away, its blocks take one."""

from typing import Any

from torch import Tensor  # noqa: TID253


def encode(model: Any, input_ids: Tensor, *, mask: Tensor | None = None, cache: Any = None) -> Tensor:
    """Return the encoder's last hidden states, shape (B, S, hidden).

    With a `cache` its keys and values are seen before those of `input_ids`, which are added to it. Relative positions
    count from the cache's length, so a gist that was cut out of one is where it was, next to what follows.
    """
    stack = model.encoder
    hidden, bias = stack.dropout(stack.embed_tokens(input_ids)), None
    for block in stack.block:
        hidden, bias, *_ = block(hidden, mask, bias, past_key_values=cache)
    states: Tensor = stack.dropout(stack.final_layer_norm(hidden))
    return states
