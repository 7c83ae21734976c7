"""The task of gist training: records with a gist after the prompt, and what each token sees of it.

The options, the model and its attention decide whether a run takes one pass with a mask or two passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import Source, spec_of
from surgeon.data.records import Document
from surgeon.errors import PlanError
from surgeon.gist import masks
from surgeon.gist.architecture import refusal
from surgeon.gist.attention import ByLengths, EncoderDecoder, Masked, TwoPass
from surgeon.gist.records import Gists, gist_examples
from surgeon.gist.settings import LENGTHS, MASK, TWO_PASS, GistSettings
from surgeon.gist.support import check_support
from surgeon.gist.tokens import GistTokens, read_gist
from surgeon.models.split import AttentionLayout, Batch, Causal, Plan
from surgeon.models.varlen import VARLEN, attending_by
from surgeon.train.examples import Example
from surgeon.train.settings import Settings
from surgeon.train.task import Task
from surgeon.train.teacher import OnlineTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONDITIONS: dict[str, masks.Condition] = {"none": "gist", "positive": "positive", "negative": "negative"}


@dataclass(frozen=True, kw_only=True)
class GistTask(Task):
    """Answers of records, for which the prompt is read through its gist alone. `source` is the model that is trained.

    With `gist_distill` the untrained model teaches, which sees the prompt and no gist.
    """

    source: Source
    gist: GistSettings

    @property
    def can_recompute(self) -> bool:
        """Whether a gist is certain to be read in one pass: recomputing empties the cache between two."""
        return self.gist.gist_impl != TWO_PASS and not self.gist.is_frozen and self.settings.attention in (None, "sdpa")

    @property
    def tokens(self) -> GistTokens:
        """The gist tokens of the model. Raises PlanError where it has none."""
        tokens = read_gist(self.source.config)
        if tokens is None:
            hint = f"surgeon gist {self.source.label} --tokens 4 adds them."
            raise PlanError(f"{self.source.label} has no gist tokens to train", hint=hint)
        return tokens

    @property
    def gists(self) -> Gists:
        """The gists that records get. Raises PlanError for a model that cannot be trained with them."""
        tokens = self.tokens
        if (reason := refusal(self.source.config, read_anatomy(spec_of(self.source)).depth)) is not None:
            raise self._refused(reason)
        counts = self.gist.counts() or (tokens.num_tokens,)
        return Gists(tokens, counts, self.settings.seed, encoder=self._has_encoder)

    @property
    def fingerprint(self) -> str | None:
        """The gist tokens of a record, how many there are, and how their number is drawn."""
        return self.gists.fingerprint

    def examples(
        self, documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", *, first: int, length: int
    ) -> list[Example]:
        """Return the example of each document with its gist, cut to `length` tokens."""
        return gist_examples(documents, tokenizer, self.gists, first=first, length=length)

    def may_share_rows(self, attention: str) -> bool:
        """Return whether a row may hold several documents: in one pass over a decoder."""
        passes = implementation(self.gist, self.settings, attention, encoder=self._has_encoder)
        return passes in (MASK, LENGTHS) and not self._has_encoder

    @property
    def reads_lengths(self) -> bool:
        """Whether one pass by lengths is what the options ask for; the untrained model reads other lengths."""
        return self.gist.leaves_form_open and not (self.gist.gist_distill or self._has_encoder)

    def layout(self, model: Any) -> AttentionLayout:
        """Return how tokens see the prompt and its gist. Raises PlanError for a model that cannot be gisted."""
        ids, attention = self.tokens.ids, str(model.config._attn_implementation)
        if attention in (*masks.IMPLEMENTATIONS, VARLEN):
            with attending_by(model, "sdpa" if attention == VARLEN else attention):  # it is tried with masks
                support = check_support(model)
            if support.reason is not None:
                raise self._refused(support.reason)
        condition = CONDITIONS[self.gist.gist_control]
        encoder = bool(model.config.is_encoder_decoder)
        passes = implementation(self.gist, self.settings, attention, encoder=encoder)
        if passes == TWO_PASS:
            return TwoPass(ids, condition, frozen=self.gist.is_frozen)
        if passes == LENGTHS:
            return ByLengths(ids, condition)
        return EncoderDecoder(ids, condition) if encoder else Masked(ids, condition)

    def embedding_rows(self) -> Sequence[int]:
        """Return the ids of the gist tokens."""
        return self.tokens.ids

    @property
    def kd_weight(self) -> float:
        """The weight of the untrained model in the loss, 0 to 1."""
        return self.gist.gist_distill

    def teacher_source(self) -> Source | None:
        """Return the model itself, None without distillation."""
        return self.source if self.gist.gist_distill else None

    def teacher(self, model: Any) -> OnlineTeacher:
        """Return the untrained model as a teacher that reads the prompt without its gist."""
        ids = self.tokens.ids
        return WithoutGist(model, ids, layout=EncoderDecoder(ids) if self._has_encoder else Causal())

    @property
    def _has_encoder(self) -> bool:
        return bool(self.source.config.get("is_encoder_decoder"))

    def _refused(self, reason: str) -> PlanError:
        hint = "surgeon gist --check MODEL measures whether a model can be gisted; docs/gist.md lists those that can."
        return PlanError(f"{self.source.label} cannot be trained with gists: {reason}", hint=hint)


def implementation(gist: GistSettings, settings: Settings, attention: str, *, encoder: bool = False) -> str:
    """Return "mask", "two-pass" or "lengths": the one that the options name, or that this attention allows.

    With `encoder` an encoder reads the prompt. It looks ahead, so only a mask can limit what it sees.
    Raises PlanError where neither is possible.
    """
    takes_masks = attention in masks.IMPLEMENTATIONS
    if attention == VARLEN and gist.leaves_form_open and not encoder:
        return LENGTHS
    if encoder and (gist.is_frozen or gist.gist_impl == TWO_PASS or not takes_masks):
        raise PlanError(
            "an encoder-decoder is trained with gists behind a mask, in one pass, and reads them as it was trained",
            hint="Use --attention sdpa, without --gist-reader and --gist-impl.",
        )
    if gist.gist_impl == MASK and not takes_masks:
        raise PlanError(f"{attention} attention takes no gist mask", hint="Use --gist-impl two-pass.")
    if gist.gist_impl == MASK or (gist.leaves_form_open and takes_masks):
        return MASK
    if settings.activation_checkpointing:
        raise PlanError(
            f"with {attention} attention a gist is trained in two passes, and activation checkpointing empties the "
            "cache between them",
            hint="Use --attention sdpa, or leave out --activation-checkpointing.",
        )
    return TWO_PASS


@dataclass(frozen=True)
class Omission:
    """Batches without their gist tokens, of these `ids`, for a model that reads them in a layout."""

    ids: tuple[int, ...]
    layout: AttentionLayout

    def plan(self, batch: Batch) -> Plan:
        """Return the batch without gist tokens, with the new places of its trained tokens, and the layout's plan."""
        assert batch["position_ids"] is not None, "positions tell documents apart"
        multiple = batch.get("multiple", 1)
        ids, positions, order = without_gist(batch["input_ids"], batch["position_ids"], self.ids, multiple=multiple)
        places = moved(batch["trained"], order, batch["input_ids"].shape[1])
        made = {"input_ids": ids, "position_ids": positions, "trained": places}
        return {**made, "layout": self.layout.plan({**batch, **made})}


class WithoutGist(OnlineTeacher):
    """An online teacher that reads batches without their gist tokens, which it may not know. `ids` are their ids."""

    def __init__(self, model: Any, ids: tuple[int, ...], *, layout: AttentionLayout | None = None) -> None:
        super().__init__(model, layout=layout)
        self.plan = Omission(ids, self.layout).plan

    def see(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        token_index: Tensor | None,
        trained: Tensor,
        *,
        layers: Sequence[int],
        plan: Plan | None = None,
        **options: Any,
    ) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
        """Return the teacher's states of the tokens at `trained`, no gist token, (N, D), and those after `layers`."""
        plan = plan or self.plan({"input_ids": input_ids, "position_ids": position_ids, "trained": trained})
        batch = (plan["input_ids"], plan["position_ids"], None, plan["trained"])
        return super().see(*batch, layers=layers, plan=plan["layout"])


def moved(trained: Tensor, order: Tensor, width: int) -> Tensor:
    """Return the new places of tokens in a batch, (B, T), that took the places `order` of rows of this width.

    Both are counted along the rows. No token that is left out may be among them.
    """
    rows, count = order.shape
    places = (order + torch.arange(rows, device=order.device)[:, None] * width).flatten()
    where = torch.zeros(rows * width, dtype=torch.long, device=order.device)
    new = torch.arange(rows * count, device=order.device)
    return where.index_copy(0, places, new).index_select(0, trained)


def without_gist(
    input_ids: Tensor, position_ids: Tensor, ids: Sequence[int], *, multiple: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch without its gist tokens, and the place that each of its tokens had before, all of shape (B, T).

    T is a multiple of `multiple`, or as many as before. Documents keep their order, and their positions have no gap.
    The places that are left at the end of a row become a document of their own, as padding is.
    """
    is_gist = torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))
    lengths = (~is_gist).sum(1)
    width = int(lengths.max())
    order = is_gist.long().argsort(dim=1, stable=True)[:, : width + -width % multiple]
    before = is_gist.long().cumsum(1)  # gist tokens of the row up to each token
    first = torch.zeros_like(before).masked_fill(position_ids == 0, 1) * (before - is_gist.long())
    # For a document's first token these are the gist tokens of earlier documents; `cummax` copies them to the others.
    before = before - first.cummax(1).values
    positions = (position_ids - before).gather(1, order)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    padding = place >= lengths[:, None]
    positions = torch.where(padding, place - lengths[:, None], positions)
    return input_ids.gather(1, order), positions, order
