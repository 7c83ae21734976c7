"""The states of a gist: keys and values of each layer, and of an encoder also its output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput


@dataclass(frozen=True, eq=False, slots=True)
class GistStates:
    """Keys and values of each layer, shape (1, kv_heads, K, head_dim); `encoded` is (1, K, hidden) of an encoder.

    `offset` is the position of the first gist token: 0, or the length of the prompt where the gist cannot be moved.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    offset: int
    encoded: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.layers[0][0].shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values (and of an encoder's output), counted in the tensors."""
        tensors = [tensor for layer in self.layers for tensor in layer] + (
            [] if self.encoded is None else [self.encoded]
        )
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def is_uniform(self) -> bool:
        """Whether keys and values have one shape in all layers."""
        return len({tensor.shape for layer in self.layers for tensor in layer}) == 1

    def to(self, device: Any, dtype: torch.dtype) -> "GistStates":
        """Return the states on another device, in another dtype."""
        moved = [(key.to(device, dtype), value.to(device, dtype)) for key, value in self.layers]
        encoded = None if self.encoded is None else self.encoded.to(device, dtype)
        return GistStates(moved, self.offset, encoded)

    def cache(self, config: Any = None, *, rows: int = 1) -> DynamicCache:
        """Return a new cache that holds the gist, `rows` times. A forward pass extends it, so each pass needs its own.

        With the model's `config`, sliding layers of the cache drop old places; without it no layer does.
        """
        cache = DynamicCache() if config is None else DynamicCache(config=config)
        for i, (key, value) in enumerate(self.layers):
            cache.update(key.repeat(rows, 1, 1, 1), value.repeat(rows, 1, 1, 1), i)
        return cache


def states_of(cache: Any, num_tokens: int, *, offset: int, encoded: Tensor | None = None) -> GistStates:
    """Return the states at the last `num_tokens` places of a cache without sliding layers."""
    layers = [
        (layer.keys[..., -num_tokens:, :].clone(), layer.values[..., -num_tokens:, :].clone()) for layer in cache.layers
    ]
    assert all(key.shape[2] == num_tokens for key, _ in layers), "a sliding layer has dropped a part of the gist"
    return GistStates(layers, offset, encoded)


def encoder_states(model: Any, input_ids: Tensor, *, mask: Tensor | None = None, cache: Any = None) -> Tensor:
    """Return the encoder's last hidden states, shape (B, S, hidden).

    With a `cache`, the tokens see its keys and values before their own, which are added to it. Relative positions count
    from the cache's length, so a gist that was cut out of a cache keeps its distance to the tokens that follow.
    """
    stack = model.encoder
    hidden, bias = stack.dropout(stack.embed_tokens(input_ids)), None
    for block in stack.block:
        hidden, bias, *_ = block(hidden, mask, bias, past_key_values=cache)
    states: Tensor = stack.dropout(stack.final_layer_norm(hidden))
    return states


def last_states(model: Any, input_ids: Tensor, num_tokens: int) -> GistStates:
    """Return the encoder's states of the last tokens of a text, shape (1, S).

    Relative positions count from the cache's length, so the states keep their positions.
    """
    cache = DynamicCache()
    encoded = encoder_states(model, input_ids, cache=cache)[:, -num_tokens:]
    return states_of(cache, num_tokens, offset=0, encoded=encoded.clone())


def written_from(states: Sequence[Tensor]) -> dict[str, Any]:
    """Return the arguments of `generate` for texts with these states of the encoder, (T, hidden) each."""
    padded = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True)
    lengths = torch.tensor([len(each) for each in states], device=padded.device)
    mask = (torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]).long()
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=padded), "attention_mask": mask}
