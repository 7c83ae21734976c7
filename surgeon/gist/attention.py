"""The forward pass of gist training: what follows a gist sees the gist, and of its prompt nothing.

In one pass a mask says so. In two passes the prompt and its gist are read first, and what follows reads the keys and
values of the gist, through which gradients flow back: no mask is needed, so any attention will do, and adapters may be
on in the first pass alone. Both are the same function of the weights.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache

from surgeon.errors import DataError
from surgeon.gist.masks import (
    AFTER,
    GIST,
    PROMPT,
    Condition,
    cross_mask,
    document_numbers,
    encoder_mask,
    gist_masks,
    gist_phases,
)
from surgeon.models.adapters import without_adapters
from surgeon.models.split import AttentionLayout, SplitModel

FIRST_SEEN = {"positive": PROMPT, "gist": GIST, "negative": AFTER}  # by condition: the first phase that AFTER sees


@dataclass(frozen=True)
class Masked(AttentionLayout):
    """One pass over whole rows, which may hold several documents. `ids` are those of gist tokens."""

    ids: tuple[int, ...]
    condition: Condition = "gist"

    def states(
        self, split: SplitModel, input_ids: Tensor, position_ids: Tensor | None, chosen: Tensor, **options: Any
    ) -> Tensor:
        """Return the states of a batch, shape (B, S, D)."""
        assert position_ids is not None, "positions tell documents apart"
        documents = document_numbers(position_ids)
        masks = gist_masks(
            split.model.config,
            gist_phases(input_ids, self.ids, documents=documents),
            condition=self.condition,
            documents=documents,
            dtype=split.model.dtype,
        )
        return split.states(input_ids, position_ids, attention_mask=masks, **options)


@dataclass(frozen=True)
class TwoPass(AttentionLayout):
    """Prompt and gist in one pass, what follows in another; a row holds one document, and padding at its right.

    With `frozen` the second pass, and the head, are the model without its adapters.
    """

    ids: tuple[int, ...]
    condition: Condition = "gist"
    frozen: bool = False

    def states(
        self, split: SplitModel, input_ids: Tensor, position_ids: Tensor | None, chosen: Tensor, **options: Any
    ) -> Tensor:
        """Return the states of a batch, shape (B, S, D); they are zeros in front of what follows a gist."""
        assert position_ids is not None, "positions tell padding from a document"
        documents = document_numbers(position_ids)
        phases = gist_phases(input_ids, self.ids, documents=documents)
        is_ours = documents == 1
        after = is_ours & (phases == AFTER)
        if not after.any(-1).all():
            missing = int((~after.any(-1)).nonzero()[0])
            raise DataError(f"row {missing} has nothing behind a gist", hint="Each row is a record with its gist.")
        before, behind = Side(input_ids, position_ids, is_ours & ~after), Side(input_ids, position_ids, after)
        cache = DynamicCache()  # one that forgets nothing: masks alone say what a sliding layer sees
        first = split.states(before.ids, before.positions, attention_mask=before.mask, **_caching(cache), **options)
        is_seen = is_ours & ~after & (phases >= FIRST_SEEN[self.condition])
        kept, mask = last_places(cache, ends=before.mask.sum(1), counts=is_seen.sum(1))
        with self.reading(split.model):
            mask = torch.cat([mask, behind.mask], 1)
            states = split.states(behind.ids, behind.positions, attention_mask=mask, **_caching(kept), **options)
        # What comes after the last layer's keys and values touches nothing that is read: adapters there have a gradient
        # of zero, and not none, for which processes that train together would wait.
        states = states + first[:1, :1, :1] * 0
        whole = states.new_zeros((*input_ids.shape, states.shape[-1]))
        return whole.index_put(torch.where(after), states[behind.mask.bool()])

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which what follows the gist is read."""
        return without_adapters(model) if self.frozen else nullcontext()


class Side:
    """The chosen tokens of each row moved to its left: `ids`, `positions` and `mask`, shape (B, T); 0 for padding."""

    def __init__(self, input_ids: Tensor, position_ids: Tensor, chosen: Tensor) -> None:
        width = int(chosen.sum(1).max())
        order = chosen.long().argsort(dim=1, stable=True, descending=True)[:, :width]
        self.mask = chosen.long().gather(1, order)
        self.ids, self.positions = (values.gather(1, order) * self.mask for values in (input_ids, position_ids))


def last_places(cache: Any, *, ends: Tensor, counts: Tensor) -> tuple[DynamicCache, Tensor]:
    """Return a cache with the last `counts` of the `ends` places of each row, and which of its (B, W) places they are.

    They are moved to the right, so that nothing lies between them and what follows, where a window would count it.
    """
    place = torch.arange(int(counts.max()), device=ends.device) - counts.max()  # -W to -1
    index = (ends[:, None] + place).clamp(min=0)[:, None, :, None]
    kept = DynamicCache()
    for number, layer in enumerate(cache.layers):
        pair = (layer.keys, layer.values)  # of different widths in some models
        kept.update(*(states.gather(2, _like(index, states)) for states in pair), number)
    return kept, (place >= -counts[:, None]).long()


def _like(index: Tensor, states: Tensor) -> Tensor:
    """Return the places to gather, (B, 1, W, 1), as `gather` takes them."""
    return index.expand(-1, states.shape[1], -1, states.shape[3])


def _caching(cache: DynamicCache) -> dict[str, Any]:
    return {"past_key_values": cache, "use_cache": True}


@dataclass(frozen=True)
class EncoderDecoder(AttentionLayout):
    """The encoder reads up to the answer, the decoder writes it. `ids` are those of gist tokens.

    Of a prompt neither what follows its gist in the encoder sees anything, nor the decoder.
    """

    has_encoder: ClassVar[bool] = True
    ids: tuple[int, ...]
    condition: Condition = "gist"

    def states(
        self, split: SplitModel, input_ids: Tensor, position_ids: Tensor | None, chosen: Tensor, **options: Any
    ) -> Tensor:
        """Return the decoder's states, shape (B, S, D); they are zeros in front of the answer."""
        assert position_ids is not None, "positions tell padding from a document"
        is_ours = document_numbers(position_ids) == 1
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        # A row that lost its answer trains nothing: the decoder starts at its end.
        last = torch.where(chosen.any(1), chosen.long().argmax(1), is_ours.sum(1) - 1)[:, None]
        read = Side(input_ids, position_ids, is_ours & (place <= last))
        is_written = is_ours & (place >= last)
        start = split.model.config.decoder_start_token_id
        written = Side(input_ids.masked_fill(place == last, start), position_ids, is_written)
        encoded, seen = self._encoded(split.model, read)
        states = split.states(
            written.ids,
            attention_mask=written.mask,
            encoder_hidden_states=encoded,
            encoder_attention_mask=seen,
            **options,
        )
        whole = states.new_zeros((*input_ids.shape, states.shape[-1]))
        return whole.index_put(torch.where(is_written), states[written.mask.bool()])

    def _encoded(self, model: Any, read: Side) -> tuple[Tensor, Tensor]:
        """Return the encoder's states of each row, shape (B, T, D), and which of them the decoder sees, (B, T)."""
        phases = gist_phases(read.ids, self.ids, documents=read.mask)
        mask = encoder_mask(model.config, phases, condition=self.condition, padding=read.mask, dtype=model.dtype)
        states: Tensor = model.get_encoder()(input_ids=read.ids, attention_mask=mask)[0]
        return states, cross_mask(phases, condition=self.condition, padding=read.mask)
