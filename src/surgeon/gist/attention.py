"""Attention layouts of gist training: tokens after a gist see the gist, and not its prompt.

In one pass a mask ensures that. In two passes the model reads the prompt and its gist first, and then the rest with the
keys and values of the gist, through which gradients flow back. The second way needs no mask, so it works with any
attention, and adapters can be on in the first pass alone. By lengths one pass needs no mask either: the kernel is told
which keys a gist's later tokens have. All are the same function of the weights.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

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
    encoder_mask,
    gist_masks,
    gist_phases,
)
from surgeon.models.adapters import without_adapters
from surgeon.models.split import AttentionLayout, Batch, LeftAligned, Plan, Seq2Seq, SplitModel, document_numbers

FIRST_SEEN = {"positive": PROMPT, "gist": GIST, "negative": AFTER}  # by condition: the first phase that AFTER sees


@dataclass(frozen=True)
class Masked(AttentionLayout):
    """One pass over rows, which may hold several documents. `ids` are the ids of gist tokens."""

    ids: tuple[int, ...]
    condition: Condition = "gist"

    def plan(self, batch: Batch) -> Plan:
        """Return the phases of the tokens."""
        assert batch["position_ids"] is not None, "positions tell documents apart"
        documents = document_numbers(batch["position_ids"])
        return {"phases": gist_phases(batch["input_ids"], self.ids, documents=documents)}

    def computed(
        self, split: SplitModel, input_ids: Tensor, position_ids: Tensor | None, plan: Plan, **options: Any
    ) -> Tensor:
        """Return the states of a batch, shape (B, S, D)."""
        assert position_ids is not None, "positions tell documents apart"
        masks = gist_masks(
            split.model.config,
            plan["phases"],
            condition=self.condition,
            documents=document_numbers(position_ids),
            dtype=split.model.dtype,
        )
        return split.states(input_ids, position_ids, attention_mask=masks, **options)


@dataclass(frozen=True)
class ByLengths(AttentionLayout):
    """One pass over rows, which may hold several documents, for an attention that reads lengths in place of a mask.

    A document is cut after its gist. Its second part has more keys than queries: those of the gist, then its own.
    """

    ids: tuple[int, ...]
    condition: Condition = "gist"

    def plan(self, batch: Batch) -> Plan:
        """Return the lengths of the parts, and the places of their keys, all rows in one."""
        assert batch["position_ids"] is not None, "positions tell documents apart"
        documents = document_numbers(batch["position_ids"])
        phases = gist_phases(batch["input_ids"], self.ids, documents=documents).flatten()
        is_first, is_gist = batch["position_ids"].flatten() == 0, phases == GIST
        is_cut = (phases == AFTER) & ((phases.roll(1) != AFTER) | is_first)  # the first token after a gist
        starts = (is_first if self.condition == "positive" else is_first | is_cut).nonzero()[:, 0]
        ends = torch.cat([starts[1:], starts.new_tensor([len(phases)])])
        before = torch.zeros_like(starts)  # gist tokens whose keys come first
        if self.condition == "gist":
            gists = is_gist.cumsum(0)
            of_earlier = torch.where(is_first, gists - is_gist.long(), 0).cummax(0).values  # in the documents before
            before = torch.where(is_cut, gists - of_earlier, 0)[starts]
        keys = [torch.arange(begin, end) for begin, end in zip((starts - before).tolist(), ends.tolist(), strict=True)]
        queries = ends - starts
        counts = queries + before
        return {
            "cu_seq_lens_q": torch.cat([starts, ends[-1:]]).int(),
            "cu_seq_lens_k": torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
            "max_length_q": int(queries.max()),
            "max_length_k": int(counts.max()),
            "key_index": torch.cat(keys).to(starts.device),
        }

    def computed(
        self, split: SplitModel, input_ids: Tensor, position_ids: Tensor | None, plan: Plan, **options: Any
    ) -> Tensor:
        """Return the states of a batch, shape (B, S, D)."""
        return split.states(input_ids, position_ids, **{**options, **plan})  # not the lengths of whole documents


@dataclass(frozen=True)
class TwoPass(AttentionLayout):
    """Prompt and gist in one pass, the rest in another; a row holds one document, padded at its right.

    With `frozen` the second pass and the head use the model without its adapters.
    """

    ids: tuple[int, ...]
    condition: Condition = "gist"
    frozen: bool = False

    def plan(self, batch: Batch) -> Plan:
        """Return the tokens of both passes, and the places of the first whose keys and values the second one sees.

        Raises DataError for a row without a token after its gist.
        """
        input_ids, position_ids = batch["input_ids"], batch["position_ids"]
        assert position_ids is not None, "positions tell padding from a document"
        documents = document_numbers(position_ids)
        phases = gist_phases(input_ids, self.ids, documents=documents)
        is_document = documents == 1  # padding is another document
        after = is_document & (phases == AFTER)
        if not after.any(-1).all():
            missing = int((~after.any(-1)).nonzero()[0])
            raise DataError(f"row {missing} has nothing after its gist", hint="Each row is a record with its gist.")
        before = LeftAligned.of(batch, is_document & ~after)
        rest = LeftAligned.of(batch, after)
        is_seen = is_document & ~after & (phases >= FIRST_SEEN[self.condition])
        places, mask = places_before(ends=before.mask.sum(1), counts=is_seen.sum(1))
        return {"first": vars(before), "second": vars(rest), "places": places, "mask": torch.cat([mask, rest.mask], 1)}

    def computed(
        self, split: SplitModel, input_ids: Tensor, position_ids: Tensor | None, plan: Plan, **options: Any
    ) -> Tensor:
        """Return the states of a batch, shape (B, S, D), with zeros up to the end of the gist."""
        before, rest = LeftAligned(**plan["first"]), LeftAligned(**plan["second"])
        cache = DynamicCache()  # without sliding layers: masks alone limit what they see
        first = split.states(before.ids, before.positions, attention_mask=before.mask, **_caching(cache), **options)
        gist_cache = states_at(cache, plan["places"])
        with self.reading(split.model):
            states = split.states(
                rest.ids, rest.positions, attention_mask=plan["mask"], **_caching(gist_cache), **options
            )
        # The first pass is used only up to the last layer's keys and values. Adapters after them get a gradient of zero
        # here, and not None, for which processes that train together would wait.
        return rest.spread(states + first[:1, :1, :1] * 0, input_ids.shape)

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which the model reads the tokens after the gist."""
        return without_adapters(model) if self.frozen else nullcontext()


def last_places(cache: Any, *, ends: Tensor, counts: Tensor) -> tuple[DynamicCache, Tensor]:
    """Return a cache with the last `counts` of the first `ends` places of each row, and its mask, (B, W)."""
    places, mask = places_before(ends=ends, counts=counts)
    return states_at(cache, places), mask


def places_before(*, ends: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last `counts` of the first `ends` places of each row, (B, W), and which of them there are, (B, W).

    The places are moved to the right, next to the tokens that follow, because a sliding window counts what is between.
    """
    place = torch.arange(int(counts.max()), device=ends.device) - counts.max()  # -W to -1
    return (ends[:, None] + place).clamp(min=0), (place >= -counts[:, None]).long()


def states_at(cache: Any, places: Tensor) -> DynamicCache:
    """Return a cache with the states at some places of each row, (B, W)."""
    index = places[:, None, :, None]
    last = DynamicCache()
    for number, layer in enumerate(cache.layers):
        pair = (layer.keys, layer.values)  # of different widths in some models
        last.update(*(states.gather(2, _like(index, states)) for states in pair), number)
    return last


def _like(index: Tensor, states: Tensor) -> Tensor:
    """Return the places to gather, (B, 1, W, 1), in the shape that `gather` needs."""
    return index.expand(-1, states.shape[1], -1, states.shape[3])


def _caching(cache: DynamicCache) -> dict[str, Any]:
    return {"past_key_values": cache, "use_cache": True}


@dataclass(frozen=True)
class EncoderDecoder(Seq2Seq):
    """The encoder reads up to the answer, the decoder writes the answer. `ids` are the ids of gist tokens.

    Neither the encoder's tokens after a gist nor the decoder see the prompt.
    """

    ids: tuple[int, ...]
    condition: Condition = "gist"

    def seen(self, read: LeftAligned) -> Plan:
        """Return the decoder's mask over the encoder's states, (B, T), and the phases of the encoder's tokens."""
        phases = gist_phases(read.ids, self.ids, documents=read.mask)
        return {"seen": cross_mask(phases, condition=self.condition, padding=read.mask), "phases": phases}

    def encoded(self, model: Any, read: LeftAligned, plan: Plan) -> Tensor:
        """Return the encoder's states of each row, shape (B, T, D)."""
        mask = encoder_mask(
            model.config, plan["phases"], condition=self.condition, padding=read.mask, dtype=model.dtype
        )
        states: Tensor = model.get_encoder()(input_ids=read.ids, attention_mask=mask)[0]
        return states
