"""Changes by a gist mask and by a cached gist in a model, measured on one row of random tokens.

The row is a prompt, a gist and an input. To find a leak the row gets another prompt, while the gist's states after
every layer are fixed at those of the first prompt: any change of the input's logits then came past the gist.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from surgeon.gist.masks import AFTER, GIST, PROMPT, Condition, cross_mask, encoder_mask, gist_masks
from surgeon.gist.states import encoder_states

PROMPT_TOKENS, GIST_TOKENS, INPUT_TOKENS = 20, 2, 12
HELD = slice(PROMPT_TOKENS, PROMPT_TOKENS + GIST_TOKENS)
BEHIND = slice(PROMPT_TOKENS + GIST_TOKENS, None)
# Names of tables of positions in models: of learned ones, or of angles that begin at position 0.
POSITION_TABLES = frozenset({"wpe", "embed_positions", "position_embeddings", "position_embedding"})


@dataclass(frozen=True, slots=True)
class Differences:
    """Largest differences of the input's logits, relative to the largest logit, as explained in `Support`.

    `caching` is the change by an ordinary cache of keys and values, which is rounding.
    """

    leak: float
    control: float
    cached: float
    rebased: float | None
    caching: float


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of prompt, gist and input, shape (1, S), the same with another prompt, and the phases of both."""

    ids: Tensor
    other: Tensor
    phases: Tensor


def probe_decoder(model: Any) -> Differences:
    """Return the differences of a decoder. Raises the errors of its code where that takes no such mask."""
    row = _draw(model)

    def run(ids: Tensor, condition: Condition) -> Tensor:
        masks = gist_masks(model.config, row.phases, condition=condition, dtype=model.dtype)
        return logits_of(model, ids, attention_mask=masks, use_cache=False, **positions_from(model, 0, ids.shape[1]))

    def leak(condition: Condition) -> float:
        return _leak(_layers(model), row, lambda ids: run(ids, condition)[:, BEHIND])

    masked, plain = (run(row.ids, condition)[:, BEHIND] for condition in ("gist", "positive"))
    rebased = None
    if not has_position_table(model):
        rebased = relative_difference(masked, _cached(model, row.ids, keep=GIST_TOKENS, shift=PROMPT_TOKENS))
    return Differences(
        leak=leak("gist"),
        control=leak("positive"),
        cached=relative_difference(masked, _cached(model, row.ids, keep=GIST_TOKENS)),
        rebased=rebased,
        caching=relative_difference(plain, _cached(model, row.ids, keep=PROMPT_TOKENS + GIST_TOKENS)),
    )


def probe_encoder(model: Any) -> Differences:
    """Return the differences of an encoder-decoder with T5's code; its relative positions need no moving."""
    row = _draw(model)
    target = row.ids[:, BEHIND]

    def run(ids: Tensor, condition: Condition) -> Tensor:
        mask = encoder_mask(model.config, row.phases, condition=condition, dtype=model.dtype)
        return decode(encoder_states(model, ids, mask=mask), cross_mask(row.phases, condition=condition))

    def decode(states: Tensor, seen: Tensor) -> Tensor:
        encoded = BaseModelOutput(last_hidden_state=states)
        return logits_of(model, None, encoder_outputs=encoded, attention_mask=seen, decoder_input_ids=target)

    def cached() -> Tensor:
        cache = DynamicCache()
        before = encoder_states(model, row.ids[:, : BEHIND.start], cache=cache)
        after = encoder_states(model, row.ids[:, BEHIND], cache=gist_slice(cache, None, GIST_TOKENS))
        states = torch.cat([before[:, HELD], after], 1)
        return decode(states, torch.ones_like(states[..., 0], dtype=torch.long))

    def leak(condition: Condition) -> float:
        # The decoder reads the gist's states of the encoder too, and they are fixed there as well.
        return _leak(list(model.encoder.block), row, lambda ids: run(ids, condition))

    # Without a gist mask an encoder cannot be cached at all, so there is no ordinary caching to compare with.
    difference = relative_difference(run(row.ids, "gist"), cached())
    return Differences(leak("gist"), leak("positive"), cached=difference, rebased=difference, caching=0.0)


def gist_slice(cache: Any, config: Any, num_tokens: int) -> DynamicCache:
    """Return a new cache that holds only the last `num_tokens` places of each layer of `cache`.

    With the model's `config`, sliding layers get a layer of their kind; an encoder has none.
    """
    last = DynamicCache() if config is None else DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is not None:
            last.update(layer.keys[..., -num_tokens:, :].clone(), layer.values[..., -num_tokens:, :].clone(), i)
    return last


def _cached(model: Any, ids: Tensor, *, keep: int, shift: int = 0) -> Tensor:
    """Return the input's logits with only the last `keep` places before it in the cache.

    Positions begin at -`shift`: with the length of the prompt as `shift` the gist begins at position 0.
    """
    before, length = BEHIND.start, ids.shape[1]
    cache = DynamicCache(config=model.config)
    logits_of(model, ids[:, :before], past_key_values=cache, use_cache=True, **positions_from(model, -shift, before))
    used = cache if keep == before else gist_slice(cache, model.config, keep)
    positions = positions_from(model, before - shift, length - before)
    return logits_of(model, ids[:, before:], past_key_values=used, use_cache=True, **positions)


def positions_from(model: Any, first: int, count: int) -> dict[str, Tensor]:
    """Return the position argument for `count` tokens from `first`, empty where a model has none."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": torch.arange(first, first + count, device=model.device)[None]}


def has_position_table(model: nn.Module) -> bool:
    """Return whether a model looks up positions in a table, which has none below 0."""
    members = [name for name, _ in (*model.named_modules(), *model.named_buffers(), *model.named_parameters())]
    return any(name.rpartition(".")[2] in POSITION_TABLES for name in members)


def _leak(layers: Sequence[nn.Module], row: _Row, run: Callable[[Tensor], Tensor]) -> float:
    """Return the change of the result of `run` by another prompt, while the gist's states are fixed."""
    states: list[Tensor] = []
    with _hooked(layers, lambda i, hidden: states.append(hidden[:, HELD].clone())):
        first = run(row.ids)

    def hold(i: int, hidden: Tensor) -> None:
        hidden[:, HELD] = states[i]

    with _hooked(layers, hold):
        return relative_difference(first, run(row.other))


@contextmanager
def _hooked(layers: Sequence[nn.Module], act: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `act` with each layer's number and the hidden states after it, which it may change in place."""

    def hook(i: int) -> Callable[..., Any]:
        def after(_: nn.Module, __: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            act(i, hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return after

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: Any) -> list[nn.Module]:
    """Return the layers of a decoder: the outermost list of modules with as many entries as the model has layers."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    return list(next(lists, []))


def _draw(model: Any) -> _Row:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, PROMPT_TOKENS + GIST_TOKENS + INPUT_TOKENS), generator=random)
    ids[:, HELD] = vocabulary - 1  # any token will do: the mask makes it a gist
    other = ids.clone()
    other[:, :PROMPT_TOKENS] = (ids[:, :PROMPT_TOKENS] + 1 + vocabulary // 3) % vocabulary
    phases = torch.tensor([[PROMPT] * PROMPT_TOKENS + [GIST] * GIST_TOKENS + [AFTER] * INPUT_TOKENS])
    return _Row(ids.to(model.device), other.to(model.device), phases.to(model.device))


def logits_of(model: Any, ids: Tensor | None, **arguments: Any) -> Tensor:
    """Return the logits of a forward pass, in float32 or wider."""
    logits: Tensor = model(input_ids=ids, **arguments).logits
    return logits.float() if logits.dtype.itemsize < 4 else logits


def relative_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    return float((one - other).abs().max() / one.abs().max())
