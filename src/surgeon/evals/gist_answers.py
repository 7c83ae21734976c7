"""A model on records in each of their forms: the losses of the reference answers, and its own greedy answers."""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from surgeon.evals.generation import answer, decoded, stop_tokens
from surgeon.gist.attention import EncoderDecoder, Masked, TwoPass, last_places
from surgeon.gist.compress import encoded_behind
from surgeon.gist.records import GIST, Record
from surgeon.gist.states import encoder_states, last_states, written_from
from surgeon.models.adapters import without_adapters
from surgeon.models.loading import quiet_transformers
from surgeon.models.split import AttentionLayout, Causal, SplitModel
from surgeon.models.streaming import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def answer_losses(
    model: Any,
    records: Sequence[Record],
    form: str,
    *,
    batch_size: int,
    frozen: bool = False,
    progress: Progress | None = None,
) -> list[float]:
    """Return the cross-entropy of each record's answer in a form, in nats, summed over its tokens.

    The text after a gist is read as in training: under the gist mask, or by a `frozen` reader, the model without the
    adapters. The other forms are read without adapters too. `progress` is called with the number of tokens done.
    """
    split = SplitModel(model)
    losses, layout = [0.0] * len(records), _layout(model, records[0], form, frozen=frozen)
    order = sorted(range(len(records)), key=lambda index: -len(records[index].asked(form)))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [(*records[index].asked(form), *records[index].answer) for index in chosen]
        ids, mask = right_padded(rows, model.device)
        # Padding is a document of its own, which no earlier token sees.
        positions = torch.where(mask.bool(), mask.cumsum(1) - 1, (1 - mask).cumsum(1) - 1)
        ends = [(len(row), len(records[index].answer)) for row, index in zip(rows, chosen, strict=True)]
        predicting = torch.zeros_like(ids, dtype=torch.bool)
        for row, (length, count) in enumerate(ends):
            predicting[row, length - 1 - count : length - 1] = True
        with _reader(model, frozen=frozen and form != GIST):
            states = layout.states(split, ids, positions, predicting.flatten().nonzero()[:, 0])
            with layout.reading(model):
                logits = [split.logits(states[row, predicting[row]]).float() for row in range(len(chosen))]
        for row, index in enumerate(chosen):
            length, count = ends[row]
            answer = ids[row, length - count : length]
            losses[index] = float(nn.functional.cross_entropy(logits[row], answer, reduction="sum"))
        if progress:
            progress(sum(map(len, rows)))
    return losses


def _layout(model: Any, record: Record, form: str, *, frozen: bool) -> AttentionLayout:
    if model.config.is_encoder_decoder:
        return EncoderDecoder(record.gist)
    if form != GIST:
        return Causal()
    return TwoPass(record.gist, frozen=True) if frozen else Masked(record.gist)


def _reader(model: Any, *, frozen: bool) -> AbstractContextManager[None]:
    """Return a context in which a model reads: with `frozen` without its adapters."""
    return without_adapters(model) if frozen else nullcontext()


def answers(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    records: Sequence[Record],
    form: str,
    *,
    max_new_tokens: int,
    batch_size: int,
    frozen: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Return a model's greedy answer to each record in a form, as text, up to an end-of-text token.

    Of a prompt with its gist only the gist's keys and values are cached: the answer depends on the prompt through them
    alone. A `frozen` reader is the model without the adapters that compress.
    """
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}
    has_encoder = bool(model.config.is_encoder_decoder)
    if form != GIST and not has_encoder:
        with _reader(model, frozen=frozen):
            written, _ = answer(model, tokenizer, [record.asked(form) for record in records], **options)  # type: ignore[arg-type]
        return written
    stops, pad = stop_tokens(model, tokenizer)
    order = sorted(range(len(records)), key=lambda index: -len(records[index].asked(form)))
    texts = [""] * len(records)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [records[index] for index in chosen]
        settings = {"max_new_tokens": max_new_tokens, "pad_token_id": pad, "eos_token_id": sorted(stops) or None}
        rows = (
            _decoder_answers(model, batch, form, **settings)
            if has_encoder
            else _gist_answers(model, batch, frozen=frozen, **settings)
        )
        for index, row in zip(chosen, rows, strict=True):
            texts[index] = decoded(row, stops, tokenizer)
        if progress:
            progress(len(chosen) * max_new_tokens)
    return texts


@torch.no_grad()
def _decoder_answers(model: Any, records: Sequence[Record], form: str, **options: Any) -> list[list[int]]:
    """Return the tokens that a decoder generates from the encoder's states of some records, each encoded alone."""
    states = []
    for record in records:
        text, prompt, after = (
            torch.tensor([ids], device=model.device)
            for ids in (record.asked(form), record.prompt + record.gist, record.behind)
        )
        if form != GIST:
            states.append(encoder_states(model, text)[0])
            continue
        states.append(encoded_behind(model, last_states(model, prompt, len(record.gist)), after)[0])
    with quiet_transformers():
        sequences = model.generate(**written_from(states), **options)
    new_ids: list[list[int]] = sequences[:, 1:].tolist()
    return new_ids


@torch.no_grad()
def _gist_answers(model: Any, records: Sequence[Record], *, frozen: bool, **options: Any) -> list[list[int]]:
    """Return the tokens that a model generates after the cached gists of some records."""
    device, count = model.device, len(records[0].gist)
    ids, mask = right_padded([(*record.begin, *record.prompt, *record.gist) for record in records], device)
    cache = DynamicCache()  # keeps all tokens: masks alone limit what a sliding layer sees
    first = mask.sum(1)
    _read(model, ids, mask, cache, torch.zeros_like(first))
    gists, seen = last_places(cache, ends=first, counts=torch.full_like(first, count))
    with _reader(model, frozen=frozen):
        return _answers_after(model, records, gists, seen, first, **options)


def _answers_after(
    model: Any, records: Sequence[Record], gists: DynamicCache, seen: Tensor, first: Tensor, **options: Any
) -> list[list[int]]:
    """Return the tokens generated after gists, at the places `seen`, and texts whose positions begin at `first`."""
    device, count = model.device, len(records[0].gist)
    text, is_text = right_padded([record.behind for record in records], device)
    lengths = is_text.sum(1)
    # Without the last token of each text, which `generate` begins with.
    is_text = is_text * (torch.arange(text.shape[1], device=device) < lengths[:, None] - 1)
    if text.shape[1] > 1:
        _read(model, text[:, :-1], torch.cat([seen, is_text[:, :-1]], 1), gists, first)
    # Padding goes before the gists: between them and the text it would take room in a sliding window.
    past, seen = last_places(gists, ends=count + lengths - 1, counts=count + lengths - 1)
    final = text.gather(1, lengths[:, None] - 1)
    mask = torch.cat([seen, torch.ones_like(final)], 1)
    if _takes_positions(model):
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + (first - count)[:, None]
    with quiet_transformers():
        ids = torch.cat([torch.zeros_like(seen), final], 1)
        sequences = model.generate(ids, attention_mask=mask, past_key_values=past, **options)
    new_ids: list[list[int]] = sequences[:, ids.shape[1] :].tolist()
    return new_ids


def _read(model: Any, ids: Tensor, mask: Tensor, cache: DynamicCache, first: Tensor) -> None:
    """Run tokens into a cache, with the positions of each row from `first` on. The mask is of the cache and of them."""
    positions = {"position_ids": first[:, None] + torch.arange(ids.shape[1], device=ids.device)}
    arguments = positions if _takes_positions(model) else {}
    model.get_decoder()(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **arguments)


def right_padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Return token ids and their attention mask, shape (B, T) each."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(width, device=device) < lengths[:, None]).long()


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.get_decoder().forward).parameters
