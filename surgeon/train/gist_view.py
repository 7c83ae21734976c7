"""The forward pass of gist training: what follows a gist sees the gist, and of its prompt nothing.

In one pass a mask says so. In two passes the prompt and its gist are read first, and what follows reads the keys and
values of the gist, through which gradients flow back: no mask is needed, so any attention will do, and adapters may be
on in the first pass alone. Both are the same function of the weights.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253
from transformers import DynamicCache  # noqa: TID253

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import DataError, PlanError
from surgeon.gist import GistTokens, read_gist
from surgeon.gist.architecture import refusal
from surgeon.gist.masks import (
    AFTER,
    GIST,
    IMPLEMENTATIONS,
    PROMPT,
    Condition,
    document_numbers,
    gist_masks,
    gist_phases,
)
from surgeon.gist.support import check_support
from surgeon.train.gist_data import Gists
from surgeon.train.halves import Halves
from surgeon.train.settings import Settings
from surgeon.train.view import Causal, View

MASK, TWO_PASS = "mask", "two-pass"
FIRST_SEEN = {"positive": PROMPT, "gist": GIST, "negative": AFTER}  # by condition: the first phase that AFTER sees


@dataclass(frozen=True)
class Masked:
    """One pass over whole rows, which may hold several documents. `ids` are those of gist tokens."""

    ids: tuple[int, ...]
    condition: Condition = "gist"

    def states(self, halves: Halves, input_ids: Tensor, position_ids: Tensor | None, **options: Any) -> Tensor:
        """Return the states of a batch, shape (B, S, D)."""
        assert position_ids is not None, "positions tell documents apart"
        documents = document_numbers(position_ids)
        masks = gist_masks(
            halves.model.config,
            gist_phases(input_ids, self.ids, documents=documents),
            condition=self.condition,
            documents=documents,
            dtype=halves.model.dtype,
        )
        return halves.states(input_ids, position_ids, attention_mask=masks, **options)

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()


@dataclass(frozen=True)
class TwoPass:
    """Prompt and gist in one pass, what follows in another; a row holds one document, and padding at its right.

    With `frozen` the second pass, and the head, are the model without its adapters.
    """

    ids: tuple[int, ...]
    condition: Condition = "gist"
    frozen: bool = False

    def states(self, halves: Halves, input_ids: Tensor, position_ids: Tensor | None, **options: Any) -> Tensor:
        """Return the states of a batch, shape (B, S, D); they are zeros in front of what follows a gist."""
        assert position_ids is not None, "positions tell padding from a document"
        documents = document_numbers(position_ids)
        phases = gist_phases(input_ids, self.ids, documents=documents)
        is_ours = documents == 1
        after = is_ours & (phases == AFTER)
        if not after.any(-1).all():
            missing = int((~after.any(-1)).nonzero()[0])
            raise DataError(f"row {missing} has nothing behind a gist", hint="Each row is a record with its gist.")
        before, behind = _Side(input_ids, position_ids, is_ours & ~after), _Side(input_ids, position_ids, after)
        cache = DynamicCache()  # one that forgets nothing: masks alone say what a sliding layer sees
        first = halves.states(before.ids, before.positions, attention_mask=before.mask, **_caching(cache), **options)
        is_seen = is_ours & ~after & (phases >= FIRST_SEEN[self.condition])
        kept, mask = last_places(cache, ends=before.mask.sum(1), counts=is_seen.sum(1))
        with self.reading(halves.model):
            mask = torch.cat([mask, behind.mask], 1)
            states = halves.states(behind.ids, behind.positions, attention_mask=mask, **_caching(kept), **options)
        # What comes after the last layer's keys and values touches nothing that is read: adapters there have a gradient
        # of zero, and not none, for which processes that train together would wait.
        states = states + first[:1, :1, :1] * 0
        whole = states.new_zeros((*input_ids.shape, states.shape[-1]))
        return whole.index_put(torch.where(after), states[behind.mask.bool()])

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which what follows the gist is read."""
        return without_adapters(model) if self.frozen else nullcontext()


class _Side:
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


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Return a context in which a model computes without its adapters, of its layers and of its tokens."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    adapted = [module for module in model.modules() if isinstance(module, kinds)]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)


# --- which of them ------------------------------------------------------------------------------------------------


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
    return Gists(tokens, settings.gist_counts() or (tokens.num_tokens,), settings.seed)


def implementation(settings: Settings, attention: str) -> str:
    """Return "mask" or "two-pass": what is asked for, or what is possible with this attention.

    Raises PlanError where neither is.
    """
    takes_masks = attention in IMPLEMENTATIONS
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
    if implementation(settings, attention) == MASK:
        return Masked(ids, condition)
    return TwoPass(ids, condition, frozen=settings.gist_reader == "frozen")


def _refused(source: Source, reason: str) -> PlanError:
    hint = "surgeon gist --check MODEL measures whether a model can be gisted; docs/gist.md lists those that can."
    return PlanError(f"{source.label} cannot be trained with gists: {reason}", hint=hint)
