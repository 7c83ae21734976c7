"""Which view of its tokens a run of gist training takes: what was asked for, the model and its attention decide."""

from typing import Any

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import PlanError
from surgeon.gist import GistTokens, read_gist
from surgeon.gist.architecture import refusal
from surgeon.gist.masks import IMPLEMENTATIONS, Condition
from surgeon.gist.support import check_support
from surgeon.train.encoder_view import EncoderDecoder
from surgeon.train.gist_data import Gists
from surgeon.train.gist_view import Masked, TwoPass
from surgeon.train.settings import Settings
from surgeon.train.view import Causal, View

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


def view_of(model: Any, source: Source, settings: Settings) -> View:
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
