"""The encoder of T5 with a cache: its stack would throw one away, its blocks take one."""

from collections.abc import Sequence
from typing import Any

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253
from transformers import DynamicCache  # noqa: TID253
from transformers.modeling_outputs import BaseModelOutput  # noqa: TID253

from surgeon.gist.states import GistStates, states_of


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


def last_states(model: Any, input_ids: Tensor, num_tokens: int) -> GistStates:
    """Return the encoder's states of the last tokens of a text, shape (1, S), with nothing behind it.

    Relative positions count from the cache's length: there they are where they were.
    """
    cache = DynamicCache()
    encoded = encode(model, input_ids, cache=cache)[:, -num_tokens:]
    return states_of(cache, num_tokens, offset=0, encoded=encoded.clone())


def written_from(states: Sequence[Tensor]) -> dict[str, Any]:
    """Return what `generate` takes for texts whose states in the encoder are these, (T, hidden) each."""
    padded = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True)
    lengths = torch.tensor([len(each) for each in states], device=padded.device)
    mask = (torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]).long()
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=padded), "attention_mask": mask}
