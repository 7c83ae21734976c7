"""Which view of its tokens a run of gist training takes: what was asked for, the model and its attention decide."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import PlanError
from surgeon.gist.architecture import refusal
from surgeon.gist.masks import IMPLEMENTATIONS, Condition
from surgeon.gist.records import Gists
from surgeon.gist.support import check_support
from surgeon.gist.tokens import GistTokens, read_gist
from surgeon.gist.views import EncoderDecoder, Masked, TwoPass
from surgeon.models.split import AttentionLayout, Causal
from surgeon.train.settings import Settings
from surgeon.train.teacher import OnlineTeacher

MASK, TWO_PASS = "mask", "two-pass"


def gist_tokens(source: Source) -> GistTokens:
    """Return the gist tokens of a checkpoint. Raises PlanError where it has none."""
    found = read_gist(source.config)
    if found is None:
        raise PlanError(
            f"{source.label} has no gist tokens to train", hint=f"surgeon gist {source.label} --tokens 4 adds them."
        )
    return found


def gists_of(source: Source, settings: Settings) -> Gists | None:
    """Return the gists that records get in a run; None without --gist. Raises PlanError for a model without any."""
    if not settings.gist:
        return None
    tokens = gist_tokens(source)
    if (reason := refusal(source.config, read_anatomy(spec_of(source)).depth)) is not None:
        raise _refused(source, reason)
    encoder = bool(source.config.get("is_encoder_decoder"))
    return Gists(tokens, settings.gist_counts() or (tokens.num_tokens,), settings.seed, encoder=encoder)


def implementation(settings: Settings, attention: str, *, encoder: bool = False) -> str:
    """Return "mask" or "two-pass": what is asked for, or what is possible with this attention.

    With `encoder` prompts are read by one, which looks ahead: a mask alone can tell it what it may see.
    Raises PlanError where neither is possible.
    """
    takes_masks = attention in IMPLEMENTATIONS
    if encoder and (settings.gist_reader == "frozen" or settings.gist_impl == TWO_PASS or not takes_masks):
        raise PlanError(
            "an encoder-decoder is trained with gists behind a mask, in one pass, and reads them as it was trained",
            hint="Use --attention sdpa, without --gist-reader and --gist-impl.",
        )
    if settings.gist_impl == MASK and not takes_masks:
        raise PlanError(f"{attention} attention takes no gist mask", hint="Use --gist-impl two-pass.")
    if settings.gist_impl == MASK or (settings.gist_impl == "auto" and takes_masks and settings.gist_reader == "same"):
        return MASK
    if settings.activation_checkpointing:
        raise PlanError(
            f"with {attention} attention a gist is trained in two passes, and activation checkpointing empties the "
            "cache between them",
            hint="Use --attention sdpa, or leave out --activation-checkpointing.",
        )
    return TWO_PASS


def view_of(model: Any, source: Source, settings: Settings) -> AttentionLayout:
    """Return how the tokens of a run see each other. Raises PlanError for a model that cannot be gisted."""
    if not settings.gist:
        return Causal()
    ids, attention = gist_tokens(source).ids, str(model.config._attn_implementation)
    if attention in IMPLEMENTATIONS and (support := check_support(model)).reason is not None:
        raise _refused(source, support.reason)
    conditions: dict[str, Condition] = {"none": "gist", "positive": "positive", "negative": "negative"}
    condition = conditions[settings.gist_control]
    encoder = bool(model.config.is_encoder_decoder)
    if implementation(settings, attention, encoder=encoder) == TWO_PASS:
        return TwoPass(ids, condition, frozen=settings.gist_reader == "frozen")
    return EncoderDecoder(ids, condition) if encoder else Masked(ids, condition)


def _refused(source: Source, reason: str) -> PlanError:
    hint = "surgeon gist --check MODEL measures whether a model can be gisted; docs/gist.md lists those that can."
    return PlanError(f"{source.label} cannot be trained with gists: {reason}", hint=hint)


class WithoutGist(OnlineTeacher):
    """An online teacher from whom gist tokens, of which it may know nothing, are taken away. `ids` are theirs."""

    def __init__(self, model: Any, ids: tuple[int, ...], *, layout: AttentionLayout | None = None) -> None:
        super().__init__(model, layout=layout)
        self._ids = ids

    def see(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        token_index: Tensor | None,
        chosen: Tensor,
        *,
        layers: Sequence[int],
    ) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
        """Return the teacher's states of the tokens `chosen`, none of them a gist's, (N, D), and behind `layers`."""
        assert position_ids is not None, "positions tell documents apart"
        ids, positions, order = without_gist(input_ids, position_ids, self._ids)
        return super().see(ids, positions, None, chosen.gather(1, order), layers=layers)


def without_gist(input_ids: Tensor, position_ids: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch without its gist tokens, and which token each of its places holds, all of shape (B, T).

    Documents stay where they were, and their positions have no gap. What is left over at the end of a row is a document
    of its own, as padding is.
    """
    is_gist = torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))
    kept = (~is_gist).sum(1)
    order = is_gist.long().argsort(dim=1, stable=True)[:, : int(kept.max())]
    before = is_gist.long().cumsum(1)  # gist tokens up to each token, of the row
    first = torch.zeros_like(before).masked_fill(position_ids == 0, 1) * (before - is_gist.long())
    # Of a document's first token it is those of the documents before it; `cummax` hands it on to the others.
    before = before - first.cummax(1).values
    positions = (position_ids - before).gather(1, order)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    padding = place >= kept[:, None]
    positions = torch.where(padding, place - kept[:, None], positions)
    return input_ids.gather(1, order), positions, order
