"""The attention masks of gist training: tokens after a gist see the gist, and not the prompt before it.

One rule, ANDed with the model's own mask: a token after the last gist token does not attend to one before the first
(arXiv:2304.08467, section 3). transformers' own builder makes the masks, with their windows, kinds of layers and
attention implementations. A mask made by hand fails silently: eager attention *adds* a bool mask, and one mask for all
layers removes the window of sliding layers.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from surgeon.errors import DataError, PlanError

PROMPT, GIST, AFTER = 0, 1, 2
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")

# gist: tokens after the gist see it alone. The paper's bounds: negative sees neither prompt nor gist, positive both.
Condition = Literal["gist", "negative", "positive"]


def gist_phases(input_ids: Tensor, gist_ids: Sequence[int], *, documents: Tensor | None = None) -> Tensor:
    """Return the phase of each token, shape (B, S): before the first gist token of its document, gist, or after it.

    In a document without gist tokens all tokens have the phase of gists, which restricts nothing.

    Raises DataError for other tokens between gist tokens: they would be visible like a gist.
    """
    is_gist = torch.isin(input_ids, torch.tensor(list(gist_ids), device=input_ids.device))
    numbers = torch.zeros_like(input_ids) if documents is None else documents - documents.amin()
    length, count = input_ids.shape[1], int(numbers.max()) + 1
    place = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    per_document = (len(input_ids), count)
    first = torch.full(per_document, length, device=input_ids.device)
    first = first.scatter_reduce(1, numbers, place.masked_fill(~is_gist, length), "amin")
    last = torch.full(per_document, -1, device=input_ids.device)
    last = last.scatter_reduce(1, numbers, place.masked_fill(~is_gist, -1), "amax")
    counts = torch.zeros(per_document, dtype=torch.long, device=input_ids.device)
    counts = counts.scatter_add(1, numbers, is_gist.long())
    split = (counts > 0) & (last - first + 1 != counts)
    if split.any():
        raise DataError(
            f"row {int(split.any(1).nonzero()[0])} has gist tokens apart from each other",
            hint="Write the gist tokens of a prompt side by side, without spaces.",
        )
    phases = torch.full_like(input_ids, GIST)
    phases = phases.masked_fill((place < first.gather(1, numbers)) & (counts.gather(1, numbers) > 0), PROMPT)
    return phases.masked_fill((place > last.gather(1, numbers)) & (counts.gather(1, numbers) > 0), AFTER)


def gist_masks(
    config: Any,
    phases: Tensor,
    *,
    condition: Condition = "gist",
    documents: Tensor | None = None,
    padding: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Return the `attention_mask` of a decoder: one mask, or one for each kind of layer, by its name.

    `config` is the model's own, which names the attention in use: masks are bool for sdpa, numbers of `dtype` for
    eager, a BlockMask for flex attention. `documents` numbers the documents of packed rows, which never see each other.
    `padding`, shape (B, S), is false where there is no token; padding that is a document of its own needs none.

    Pass `position_ids` to the model too: without a 2-D mask it does not know left padding or documents.

    Raises PlanError where the attention in use takes no masks.
    """
    implementation = config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise PlanError(
            f"{implementation} attention takes no gist mask", hint=f"Load the model with {', '.join(IMPLEMENTATIONS)}."
        )
    # The builder reads shape, dtype and device of embeddings. It must not see position ids: it would number the tokens
    # of each document anew, while the rule counts along the row.
    embeddings = torch.empty((*phases.shape, 0), dtype=dtype, device=phases.device)
    return create_masks_for_generate(
        config=config,
        inputs_embeds=embeddings,
        attention_mask=padding,
        past_key_values=None,
        position_ids=None,
        and_mask_function=_rule(phases, condition, documents),
    )


def encoder_mask(
    config: Any,
    phases: Tensor,
    *,
    condition: Condition = "gist",
    padding: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the mask of an encoder's self-attention, shape (B, 1, S, S): bool for sdpa, numbers for eager.

    An encoder looks both ways, so neither prompt nor gist may see the tokens after them: the gist must not depend on
    the input. A padding token sees only itself, so that its state is finite and holds no information.
    """
    _check(condition)
    query, key = phases[:, :, None], phases[:, None, :]
    if condition == "positive":
        allowed = torch.ones_like(query == key)
    else:
        hidden = PROMPT if condition == "gist" else GIST  # the last phase that is hidden from the tokens after the gist
        allowed = torch.where(query == AFTER, key > hidden, key != AFTER)
    if padding is not None:
        allowed = allowed & padding[:, None, :].bool()
    allowed = (allowed | torch.eye(phases.shape[1], dtype=torch.bool, device=phases.device))[:, None]
    if config._attn_implementation == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=phases.device).masked_fill(~allowed, torch.finfo(dtype).min)


def cross_mask(phases: Tensor, *, condition: Condition = "gist", padding: Tensor | None = None) -> Tensor:
    """Return the decoder's mask over the encoder's states, shape (B, S), int64.

    No row may be empty: a mask without any visible state shows all of them, also the prompt. Where nothing follows the
    gist, the negative control sees one padding token, which in `encoder_mask` sees only itself.

    Raises DataError for such a row without padding.
    """
    _check(condition)
    present = torch.ones_like(phases, dtype=torch.bool) if padding is None else padding.bool()
    hidden_below = {"gist": GIST, "negative": AFTER, "positive": PROMPT}[condition]
    seen = (phases >= hidden_below) & present
    empty = ~seen.any(-1)
    if empty.any():
        spare = ~present
        if not spare.any(-1)[empty].all():
            raise DataError(
                f"row {int((empty & ~spare.any(-1)).nonzero()[0])} has nothing after its gist that the decoder may see",
                hint="End the encoder's text with the end-of-text token, after the gist.",
            )
        seen = seen | (empty[:, None] & spare & (spare.cumsum(-1) == 1))
    return seen.long()


def _rule(phases: Tensor, condition: Condition, documents: Tensor | None) -> Callable[..., Tensor]:
    """Return whether a query may attend to a key, as a function of row, head, query and key for the builder."""
    _check(condition)

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_query, of_key = phases[row, query], phases[row, key]
        if condition == "gist":
            seen = ~((of_query == AFTER) & (of_key == PROMPT))
        elif condition == "negative":
            seen = ~((of_query == AFTER) & (of_key != AFTER))
        else:
            seen = of_query >= PROMPT
        return seen if documents is None else seen & (documents[row, query] == documents[row, key])

    return cast(Callable[..., Tensor], allowed)


def _check(condition: str) -> None:
    if condition not in get_args(Condition):
        raise PlanError(f"unknown condition {condition!r}", hint=f"One of: {', '.join(get_args(Condition))}.")
