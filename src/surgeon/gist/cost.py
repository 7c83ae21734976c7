"""The cost of a prompt with nothing cached, with the whole prompt cached, and with its gist cached.

Floating point operations are counted, not estimated: torch's counter follows a forward pass on the meta device, where
tensors have shapes and no content, so a config is enough. Bytes of keys and values are counted in the cache. Only times
are measured on this machine, each as the median of rounds in which the three ways take turns in random order.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedConfig,
)
from transformers.modeling_outputs import BaseModelOutput

from surgeon import text
from surgeon.gist.compress import encoded_behind, position_limit
from surgeon.gist.probes import logits_of, positions_from
from surgeon.gist.states import GistStates, encoder_states, last_states, states_of
from surgeon.models.loading import from_config
from surgeon.showing import Shown

INPUT_TOKENS, NEW_TOKENS, ROUNDS, WARM_UP = 32, 8, 5, 1
NOTHING, WHOLE, GIST = "nothing cached", "whole prompt cached", "gist cached"
SAME_SAVING = (
    "Caching the whole prompt saves as many operations, but for a little attention, without loss and without training; "
    "what a gist saves is memory and context."
)
LOOKS_AHEAD = "An encoder looks ahead: a whole prompt that is cached in one is not what it would be before its text."


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one way to use a prompt: cached and computed tokens, bytes of the cache, operations, seconds.

    `first_token` is the time to the first token, `next_token` that of each further token. `flops` is None where the
    model's code does not run without content (some experts).
    """

    name: str
    cached_tokens: int
    computed_tokens: int
    kv_bytes: int
    flops: int | None
    first_token: float
    next_token: float


@dataclass(frozen=True, slots=True, repr=False)
class CostTable(Shown):
    """The costs of a prompt in a call with `input_tokens` after it, and the cost of compressing it."""

    prompt_tokens: int
    gist_tokens: int
    input_tokens: int
    rows: tuple[Cost, ...]
    compress_flops: int | None
    notes: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """How many tokens a gist token replaces, by the paper's count: prompt and gist over gist."""
        return (self.prompt_tokens + self.gist_tokens) / self.gist_tokens

    @property
    def break_even(self) -> int | None:
        """The number of calls from which compressing takes fewer operations than computing the prompt each time."""
        nothing, gist = self.rows[0].flops, self.rows[-1].flops
        if nothing is None or gist is None or self.compress_flops is None or nothing <= gist:
            return None
        return self.compress_flops // (nothing - gist) + 1

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it: bytes, operations, seconds."""
        return asdict(self) | {"ratio": self.ratio, "break_even": self.break_even}

    @property
    def headline(self) -> str:
        """The lengths of prompt and gist."""
        return f"{self.prompt_tokens:,} → {self.gist_tokens:,} tokens, {self.ratio:.0f}x"

    def to_text(self) -> str:
        """Return this for people."""
        header = ("", "tokens cached", "computed", "kept", "GFLOPs", "first token", "each further")
        lines = [
            [
                row.name,
                f"{row.cached_tokens:,}",
                f"{row.computed_tokens:,}",
                text.size(row.kv_bytes),
                "-" if row.flops is None else f"{row.flops / 1e9:,.2f}",
                f"{row.first_token * 1e3:.1f} ms",
                f"{row.next_token * 1e3:.1f} ms",
            ]
            for row in self.rows
        ]
        calls = "" if self.break_even is None else f" In operations it pays from call {self.break_even} on."
        summary = f"{self.prompt_tokens:,} prompt tokens to {self.gist_tokens:,}: {self.ratio:.0f}x.{calls}"
        return "\n".join([text.table(header, lines), *(f"  {line}" for line in (summary, *self.notes))])


def flops(model: Any, num_tokens: int, *, cached: int = 0) -> int:
    """Return the operations of one forward pass over `num_tokens` tokens after `cached` ones, with all their logits.

    `model` is a config, or a model on the meta device. Matrix products are counted, an addition and a multiplication
    each, attention without regard to causality. Of an encoder-decoder: the encoder, and the decoder's first token.
    """
    if isinstance(model, PreTrainedConfig):
        model = meta_model(model)
    with torch.no_grad():
        before = _states(model, _zeros(cached)) if cached else None
        with FlopCounterMode(display=False) as counter:
            _begin(model, before, _zeros(num_tokens))
    return int(counter.get_total_flops())


def meta_model(config: PreTrainedConfig) -> Any:
    """Return a model of shapes without content. Its eager attention has the same products as any other."""
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        # Experts in batches: the only implementation whose shapes do not depend on the routing.
        options = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
        model = from_config(kind, deepcopy(config), **options)
    model.config.pad_token_id = None  # some code searches its input for padding
    return model.eval()


def measure(
    model: Any,
    ids: Sequence[int],
    states: GistStates,
    *,
    input_tokens: int = INPUT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> CostTable:
    """Return the costs of a prompt with and without its gist. `ids` are the prompt and the gist with these `states`."""
    count = states.num_tokens
    limit = position_limit(model)
    if limit is not None:  # there is room for at least one token, with which the gist was checked
        new_tokens = max(0, min(new_tokens, limit - len(ids) - 1))
        input_tokens = max(1, min(input_tokens, limit - len(ids) - new_tokens))
    prompt = torch.tensor([list(ids[:-count])], device=model.device)
    text_ids = prompt[:, torch.arange(input_tokens) % prompt.shape[1]]  # the cost does not depend on the tokens
    with torch.no_grad():
        whole = _states(model, prompt)
        ways: dict[str, tuple[GistStates | None, Tensor]] = {
            NOTHING: (None, torch.cat([prompt, text_ids], 1)),
            WHOLE: (whole, text_ids),
            GIST: (states, text_ids),
        }
        times = _times(model, ways, new_tokens=new_tokens, rounds=rounds, seed=seed)
    counted = _counted(model.config, prompt.shape[1], count, input_tokens)
    rows = []
    for name, (before, read) in ways.items():
        cached, num_bytes = (0, 0) if before is None else (before.num_tokens, _cache_bytes(model, before))
        first, following = (median(column) for column in zip(*times[name], strict=True))
        rows.append(Cost(name, cached, read.shape[1], num_bytes, counted[name], first, following))
    notes = (SAME_SAVING, LOOKS_AHEAD) if model.config.is_encoder_decoder else (SAME_SAVING,)
    return CostTable(prompt.shape[1], count, input_tokens, tuple(rows), counted["compress"], notes)


def _counted(config: Any, prompt: int, gist: int, following: int) -> Mapping[str, int | None]:
    """Return the operations of each way, and of compressing; None where the code needs content to run."""
    sizes = {
        NOTHING: (prompt + following, 0),
        WHOLE: (following, prompt),
        GIST: (following, gist),
        "compress": (prompt + gist, 0),
    }
    try:
        model = meta_model(config)
        return {name: flops(model, count, cached=cached) for name, (count, cached) in sizes.items()}
    except (RuntimeError, NotImplementedError, ValueError):  # from code that reads the content of tensors
        return dict.fromkeys(sizes)


def _times(
    model: Any, ways: Mapping[str, tuple[GistStates | None, Tensor]], *, new_tokens: int, rounds: int, seed: int
) -> dict[str, list[tuple[float, float]]]:
    """Return seconds to the first token and for each further one, of each way and round."""
    order, draw = list(ways), random.Random(seed)  # noqa: S311  # the order of measurements is no secret
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(WARM_UP + rounds):
        draw.shuffle(order)
        for name in order:
            pair = _timed(model, *ways[name], new_tokens=new_tokens)
            if turn >= WARM_UP:
                times[name].append(pair)
    return times


def _timed(model: Any, before: GistStates | None, ids: Tensor, *, new_tokens: int) -> tuple[float, float]:
    began = _now(model)
    token, step = _begin(model, before, ids)
    token = token.argmax(-1)
    first = _now(model)
    for _ in range(new_tokens):
        token = step(token).argmax(-1)
    return first - began, (_now(model) - first) / max(new_tokens, 1)


def _begin(model: Any, before: GistStates | None, ids: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the logits of the first new token, shape (1, 1, vocab), and a function from a token to the next logits."""
    if model.config.is_encoder_decoder:
        return _begin_decoding(model, before, ids)
    cache = DynamicCache(config=model.config) if before is None else before.cache(model.config)
    place = 0 if before is None else before.offset + before.num_tokens

    def step(tokens: Tensor) -> Tensor:
        nonlocal place
        arguments = positions_from(model, place, tokens.shape[1])
        place += tokens.shape[1]
        return logits_of(model, tokens, past_key_values=cache, use_cache=True, **arguments)[:, -1:]

    return step(ids), step


def _begin_decoding(model: Any, before: GistStates | None, ids: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    states = encoder_states(model, ids) if before is None else encoded_behind(model, before, ids)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def step(tokens: Tensor) -> Tensor:
        encoded = BaseModelOutput(last_hidden_state=states)
        options = {"encoder_outputs": encoded, "past_key_values": cache, "use_cache": True}
        return logits_of(model, None, decoder_input_ids=tokens, **options)[:, -1:]

    return step(torch.full_like(ids[:, :1], getattr(model.config, "decoder_start_token_id", None) or 0)), step


def _states(model: Any, ids: Tensor) -> GistStates:
    """Return the states of a whole text, as if it were a gist."""
    if model.config.is_encoder_decoder:
        return last_states(model, ids, ids.shape[1])
    cache = DynamicCache()
    logits_of(model, ids, past_key_values=cache, use_cache=True, **positions_from(model, 0, ids.shape[1]))
    return states_of(cache, ids.shape[1], offset=0)


def _cache_bytes(model: Any, states: GistStates) -> int:
    """Return the bytes of the cache between calls: in a sliding layer those of its window."""
    if states.encoded is not None:
        return states.num_bytes
    layers: list[Any] = list(states.cache(model.config).layers)
    return sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))


def _zeros(count: int) -> Tensor:
    return torch.zeros(1, count, dtype=torch.long, device="meta")


def _now(model: Any) -> float:
    """Return the time after the device has finished its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    elif model.device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
