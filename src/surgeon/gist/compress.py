"""Compressing a prompt to the states of its gist, with a check that they replace it in this model.

The check compares with the masked pass of training, over prompt, gist and some text: the same text after the cached
gist alone must have the same logits. Where the positions allow it, the prompt is run at negative positions, so that the
gist begins at 0 and the length of the prompt no longer matters. That is measured too, and dropped where the logits
differ (a rotation that changes with the length, a table of positions).
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from surgeon.anatomy.config import positions_in
from surgeon.errors import DataError, VerificationError
from surgeon.gist.masks import cross_mask, encoder_mask, gist_masks, gist_phases
from surgeon.gist.probes import has_position_table, logits_of, positions_from, relative_difference
from surgeon.gist.states import GistStates, encoder_states, last_states, states_of
from surgeon.gist.support import EXACT, FLOOR

PROBE_TOKENS = 12  # of text after the gist


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """How far the cached gist is from the masked pass: largest difference of a logit, relative to the largest logit.

    `rebased` is of the gist at position 0, None where it was not tried. `difference` is of the returned states,
    `allowed` its limit.
    """

    difference: float
    offset: float
    rebased: float | None
    allowed: float


def compress_ids(model: Any, ids: Sequence[int], num_tokens: int) -> tuple[GistStates, SelfCheck]:
    """Return the states of the gist at the end of `ids`, in the model's dtype, and the check.

    Raises DataError for more tokens than the model has positions, VerificationError where the gist does not replace its
    prompt to 1e-5 of the largest logit, or to a few times the rounding in this model if that is more.
    """
    num_probes = PROBE_TOKENS
    if (limit := position_limit(model)) is not None:
        num_probes = min(PROBE_TOKENS, limit - len(ids))
        if num_probes < 1:
            raise DataError(
                f"prompt and gist have {len(ids)} tokens, and the model sees {limit} with what follows",
                hint="Shorten the prompt.",
            )
    # The prompt's own tokens: after random tokens rounding alone moves the logits of a trained model.
    probe = torch.tensor([(list(ids[:-num_tokens]) * num_probes)[-num_probes:]], device=model.device)
    row = torch.tensor([list(ids)], device=model.device)
    with torch.no_grad():
        compress = _compress_encoder if model.config.is_encoder_decoder else _compress_decoder
        states, check = compress(model, row, probe, num_tokens)
    if not check.difference <= check.allowed:  # "not": NaN is no small number
        raise VerificationError(
            f"the cached gist changes what follows by {check.difference:.1e} of the largest logit, "
            f"not {check.allowed:.0e} at most",
            hint="surgeon gist --check MODEL measures whether the architecture can be gisted.",
        )
    return states, check


def continued(model: Any, states: GistStates, text: Tensor) -> Tensor:
    """Return the logits of a text, shape (1, T), after a cached gist."""
    arguments = positions_from(model, states.offset + states.num_tokens, text.shape[1])
    return logits_of(model, text, past_key_values=states.cache(model.config), use_cache=True, **arguments)


def encoded_behind(model: Any, states: GistStates, text: Tensor) -> Tensor:
    """Return an encoder's states of a gist and the text after it, shape (1, K + T, hidden)."""
    assert states.encoded is not None, "states of an encoder have its output"
    return torch.cat([states.encoded, encoder_states(model, text, cache=states.cache())], 1)


def position_limit(model: Any) -> int | None:
    """Return how many positions a model has, None where its config does not say, or positions are relative."""
    return positions_in(model.config.to_dict())


def _compress_decoder(model: Any, row: Tensor, probe: Tensor, num_tokens: int) -> tuple[GistStates, SelfCheck]:
    whole = torch.cat([row, probe], 1)
    masks = gist_masks(model.config, gist_phases(whole, row[0, -num_tokens:].tolist()), dtype=model.dtype)
    masked = _tail(model, whole, probe.shape[1], attention_mask=masks)
    num_prompt = row.shape[1] - num_tokens
    takes_positions = bool(positions_from(model, 0, 1))
    # A model without a positions argument counts from its cache, so that its gist is always moved.
    unmoved = _gist_of(model, row, num_tokens, first=0, offset=num_prompt if takes_positions else 0)
    offset = relative_difference(masked, continued(model, unmoved, probe))
    rounding = _rounding(model, row, probe=probe, masks=masks, masked=masked)
    allowed = max(EXACT, FLOOR * rounding, FLOOR * torch.finfo(model.dtype).eps)  # caching may happen to be exact
    rebased = None
    if takes_positions and not has_position_table(model):
        moved = _gist_of(model, row, num_tokens, first=-num_prompt, offset=0)
        rebased = relative_difference(masked, continued(model, moved, probe))
        if rebased <= allowed:
            return moved, SelfCheck(rebased, offset, rebased, allowed)
    return unmoved, SelfCheck(offset, offset, rebased, allowed)


def _compress_encoder(model: Any, row: Tensor, probe: Tensor, num_tokens: int) -> tuple[GistStates, SelfCheck]:
    whole = torch.cat([row, probe], 1)
    phases = gist_phases(whole, row[0, -num_tokens:].tolist())
    mask = encoder_mask(model.config, phases, dtype=model.dtype)

    def decode(states: Tensor, seen: Tensor) -> Tensor:
        encoded = BaseModelOutput(last_hidden_state=states)
        return logits_of(model, None, encoder_outputs=encoded, attention_mask=seen, decoder_input_ids=probe)

    masked = decode(encoder_states(model, whole, mask=mask), cross_mask(phases))
    states = last_states(model, row, num_tokens)
    encoded = encoded_behind(model, states, probe)
    difference = relative_difference(masked, decode(encoded, torch.ones_like(encoded[..., 0], dtype=torch.long)))
    # An encoder looks ahead, so there is no ordinary caching to compare with: in 16 bits a few roundings are allowed.
    allowed = max(EXACT, FLOOR * torch.finfo(model.dtype).eps)
    return states, SelfCheck(difference, difference, difference, allowed)


def _gist_of(model: Any, row: Tensor, num_tokens: int, *, first: int, offset: int) -> GistStates:
    """Return the last `num_tokens` states of a row that is run at positions from `first`."""
    cache = DynamicCache()  # without sliding layers: a gist may be longer than a window
    _tail(model, row, 1, first=first, past_key_values=cache, use_cache=True)
    return states_of(cache, num_tokens, offset=offset)


def _tail(model: Any, ids: Tensor, count: int, *, first: int = 0, **arguments: Any) -> Tensor:
    """Return the last `count` logits of a row; the others are not computed where the model can leave them out."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = count
    logits = logits_of(model, ids, **({"use_cache": False} | arguments), **positions_from(model, first, ids.shape[1]))
    return logits[:, -count:]


def _rounding(model: Any, row: Tensor, *, probe: Tensor, masks: Any, masked: Tensor) -> float:
    """Return the change by rounding in a text after a gist: in 16 bits the change by ordinary caching.

    In float32 ordinary caching changes too little to compare with, so it is the change by one rounding of the
    embeddings: up to 1e-4 of the largest logit in SmolLM2-135M, whose first token is an attention sink.
    """
    whole, count = torch.cat([row, probe], 1), probe.shape[1]
    if model.dtype.itemsize < 4:
        everything = _gist_of(model, row, row.shape[1], first=0, offset=0)
        return relative_difference(_tail(model, whole, count), continued(model, everything, probe))
    random = torch.Generator().manual_seed(0)

    def nudge(_: Any, __: Any, embedded: Tensor) -> Tensor:
        shares = torch.rand(embedded.shape, generator=random).to(embedded) * 2 - 1
        return embedded * (1 + torch.finfo(embedded.dtype).eps * shares)

    handle = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        return relative_difference(masked, _tail(model, whole, count, attention_mask=masks))
    finally:
        handle.remove()
