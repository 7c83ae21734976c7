"""Answers in batches, greedy or sampled, by transformers' `generate`."""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.config import text_config
from surgeon.checkpoint.source import Source
from surgeon.evals.perplexity import HARNESS_HINT
from surgeon.models.loading import check_tokens, load_on, num_known, quiet_transformers
from surgeon.models.streaming import PROBE, check_causal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STREAMED = "Perplexity and choices stream: --metric perplexity, or choice."
SEGMENT = 32  # tokens after which the rows that have ended leave their batch
# By bytes of the dtype: how far padding may move a logit, relative to the largest one. It is due to rounding.
PADDING = {4: 1e-3, 2: 5e-2}


def load_whole(source: Source, device: str) -> Any:
    """Return a model of transformers with all its weights in memory, with greedy decoding.

    Raises MeasureError where it does not fit, cannot be loaded, or lacks weights.
    """
    import torch
    from transformers import GenerationConfig

    model = load_on(source, device, hint=HARNESS_HINT, smaller=STREAMED)
    stops = _ids(model.generation_config.eos_token_id) | _ids(text_config(source.config).get("eos_token_id"))
    start = getattr(model.config, "decoder_start_token_id", None)
    # A new one: the checkpoint's own may sample, or penalise repetition.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, eos_token_id=sorted(stops) or None, decoder_start_token_id=start
    )
    probe = torch.tensor(PROBE, device=device)
    extra = {"decoder_input_ids": probe} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        check_causal(model(probe[:1].expand_as(probe) if extra else probe, **extra).logits, source.label)
    return model


def answer(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[str], bool]:
    """Return the greedy continuation of each prompt (token ids) up to an end-of-text token, as text; and whether
    batches had prompts of different lengths.

    Prompts are padded on the left where a trial shows that this does not change the model's outputs; else (positions
    counted from the left, say) a batch holds prompts of one length only. `progress` is called with the number of
    tokens done, `max_new_tokens` per prompt.
    """
    stops, pad = stop_tokens(model, tokenizer)
    check_prompts(model, [*prompts, [pad]])
    answers = [""] * len(prompts)
    batches, mixed = planned(model, prompts, pad, batch_size=batch_size)
    for batch in batches:
        rows = continued(model, tokenizer, [prompts[index] for index in batch], max_new_tokens=max_new_tokens)
        for index, row in zip(batch, rows, strict=True):
            answers[index] = decoded(row, stops, tokenizer)
        if progress:
            progress(len(batch) * max_new_tokens)
    return answers, mixed


def check_prompts(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Raises MeasureError where a prompt has a token that the model does not know."""
    largest = max((max(prompt, default=0) for prompt in prompts), default=0)
    check_tokens(largest, num_known(model), str(model.name_or_path or "the model"))


def planned(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pad: int,
    *,
    batch_size: int,
    most_tokens: int | None = None,
    new_tokens: int = 0,
) -> tuple[list[list[int]], bool]:
    """Return the indices of the prompts in batches, the longest first, and whether a batch may mix lengths.

    It may where a trial shows that padding does not change the model's outputs. With `most_tokens` a batch of padded
    prompts, each with `new_tokens` after it, has no more tokens, unless it is of one prompt.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    with torch.no_grad(), quiet_transformers():
        mixed = batch_size > 1 and _may_be_padded(model, [prompts[index] for index in order[:batch_size]], pad)
    lengths = [len(prompt) + new_tokens for prompt in prompts]
    return list(_batches(order, lengths, batch_size, mixed=mixed, most_tokens=most_tokens)), mixed


def continued(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    segment: int = SEGMENT,
) -> list[list[int]]:
    """Return the tokens that a model writes after each prompt of one batch: greedy, or at a temperature from a seed.

    A row ends with a stop token where there is one; after it may stand padding. Every `segment` tokens the rows that
    have ended leave the batch: one that goes on to the limit would else have all others computed with it.
    """
    import torch

    stops, pad = stop_tokens(model, tokenizer)
    options: dict[str, Any] = {"pad_token_id": pad, "eos_token_id": sorted(stops) or None}
    if temperature:  # top_k: transformers keeps 50 tokens where nothing is said
        options |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    rows: list[list[int]] = [[] for _ in prompts]
    going, cache, done = list(range(len(prompts))), None, 0
    ids, mask = (part.to(model.device) for part in _left_padded(prompts, pad))
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), quiet_transformers():
        torch.manual_seed(seed)
        while going and done < max_new_tokens:
            count = min(segment, max_new_tokens - done)
            options |= {"max_new_tokens": count, "past_key_values": cache, "return_dict_in_generate": True}
            output = model.generate(ids, attention_mask=mask, **options)
            new = output.sequences[:, ids.shape[1] :]
            for index, row in zip(going, new.tolist(), strict=True):
                rows[index] += row
            left = [place for place, row in enumerate(new.tolist()) if stops.isdisjoint(row)]
            kept = torch.tensor(left, dtype=torch.long, device=model.device)
            cache = _selected(output.past_key_values, kept)
            segment = (
                max_new_tokens if cache is None else segment
            )  # what is cached is computed anew once, not each time
            ids, mask = output.sequences[kept], torch.cat([mask, torch.ones_like(new)], dim=1)[kept]
            going, done = [going[place] for place in left], done + new.shape[1]
    return rows


def _selected(cache: Any, rows: Any) -> Any:
    """Return a cache with some rows of its batch; None for any but a plain one, which is then computed anew."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(cache) is not DynamicCache or not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    if len(rows):
        cache.batch_select_indices(rows)
    return cache


def stop_tokens(model: Any, tokenizer: "PreTrainedTokenizerBase") -> tuple[set[int], int]:
    """Return the tokens that end an answer, and the padding token."""
    stops = _ids(model.generation_config.eos_token_id) | _ids(tokenizer.eos_token_id)
    return stops, min(_ids(tokenizer.pad_token_id) or stops or {0})


def decoded(row: Sequence[int], stops: Container[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return tokens as text, up to the first stop token."""
    end = next((place for place, token in enumerate(row) if token in stops), len(row))
    return str(tokenizer.decode(list(row[:end]), skip_special_tokens=True))


def _may_be_padded(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> bool:
    """Return whether the shortest of these prompts has the same logits alone and padded to the longest, for two new
    tokens (the second is computed from the cache). Prompts of one length need no padding and are not tried.
    """
    import torch

    short = min(prompts, key=len)
    if len(short) == len(prompts[0]):
        return True
    last_logits = []
    for batch in ([short], [prompts[0], short]):
        ids, mask = _left_padded(batch, pad)
        options = {"max_new_tokens": 2, "min_new_tokens": 2, "pad_token_id": pad, "return_dict_in_generate": True}
        output = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), output_logits=True, **options
        )
        last_logits.append(torch.stack([logits[-1].float() for logits in output.logits]))
    alone, padded = last_logits
    return bool((alone - padded).abs().max() <= PADDING[model.dtype.itemsize] * alone.abs().max())


def _batches(
    order: Sequence[int], lengths: Sequence[int], size: int, *, mixed: bool, most_tokens: int | None = None
) -> Iterator[list[int]]:
    """Yield the prompts in batches, the longest first; without `mixed` a batch has prompts of one length."""
    batch: list[int] = []
    for index in order:
        width = lengths[batch[0]] if batch else 0
        is_full = len(batch) == size or (most_tokens is not None and (len(batch) + 1) * width > most_tokens)
        if batch and (is_full or not (mixed or lengths[index] == width)):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> Any:
    """Return token ids and their attention mask, shape (B, T) each."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _ids(value: object) -> set[int]:
    """Return the token ids that a config gives as a number, a list or null."""
    return set(value) if isinstance(value, list) else {value} if isinstance(value, int) else set()
