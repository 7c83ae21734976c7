"""Give a model rows for other tokens: new ones that are the mean of all rows, or only some of its own.

A row is a position along the axis of the vocabulary: in the embedding, the head and the head's bias. With the mean row
and the mean bias the logit of a new token is the mean of all logits: it is neither likely nor excluded before training.
Where the vocabulary is padded, new tokens take rows that no token has yet.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.axes import Index, Scale, axes_of
from surgeon.anatomy.config import size_of, spelled, text_config
from surgeon.anatomy.spellings import SPELLINGS
from surgeon.errors import PlanError
from surgeon.plan.expressions import Expr, Gather, Read
from surgeon.plan.plan import Plan

PADDED = "the vocabulary is padded: {} of the new tokens took rows that no token had, which were overwritten"
TOKENIZER_HINT = "The tokenizer belongs to another model, or config.json does; fetch both again."


def add_tokens(anatomy: Anatomy, ids: Sequence[int]) -> Plan:
    """Return the plan of the model that has rows for the tokens `ids`, which follow each other.

    Rows are appended where there are none yet, and the vocabulary size in the config follows; a row that is there
    already, beyond the tokens of the tokenizer, is overwritten.

    Raises PlanError when a row before `ids` is missing, or when it is not clear which tensors have rows for tokens.
    """
    dims = vocabulary_dims(anatomy)
    size = vocabulary_size(anatomy)
    first, count = ids[0], len(ids)
    assert list(ids) == list(range(first, first + count)), "a tokenizer numbers new tokens one after the other"
    if first > size:
        raise PlanError(f"the tokenizer has {first} tokens, the model rows for {size}", hint=TOKENIZER_HINT)
    index = Index([(0, first), (-1, count), (first + count, max(0, size - first - count))])
    scale = Scale.all(1.0, len(index))
    tensors: dict[str, Expr] = {name: Read(name) for name in anatomy.spec.tensors}
    tensors |= {name: Gather(Read(name), dim, index, scale, mean=1.0) for name, dim in dims.items()}
    taken = min(count, size - first)
    return Plan(
        config=with_rows(anatomy.spec.config, size, len(index)),
        tensors=tensors,
        layer_map=tuple(range(anatomy.depth)),
        steps=({"tokens": {"ids": list(ids)}},),
        notes=(PADDED.format(taken),) if taken else (),
        axes={"vocab": index},
    )


def select_tokens(anatomy: Anatomy, kept: Sequence[int], *, rows: int | None = None) -> Plan:
    """Return the plan of the model that has only the rows of the tokens `kept`, ascending, and is `rows` long.

    What is more than there are tokens is padding: the mean of all rows, so that its logit is the mean of all logits
    and not 0, which may be above most others.

    Raises PlanError for a token without a row, or when it is not clear which tensors have rows for tokens.
    """
    index = Index(chain(((token, 1) for token in kept), ((-1, max(0, (rows or 0) - len(kept))),)))
    return replace(exchange_tokens(anatomy, index), axes={"vocab": index})


def exchange_tokens(anatomy: Anatomy, old: Sequence[int]) -> Plan:
    """Return the plan of the model whose row for token j is that of its old token old[j], the mean row where it is -1.

    Where the rows stay as they are, they are not read. Raises PlanError as `vocabulary_dims` does.
    """
    dims, size = vocabulary_dims(anatomy), vocabulary_size(anatomy)
    index = Index.of(old)
    check_rows(index.highest, size)
    scale = Scale.all(1.0, len(index))
    tensors: dict[str, Expr] = {name: Read(name) for name in anatomy.spec.tensors}
    if not index.is_whole or len(index) != size:
        tensors |= {name: Gather(Read(name), dim, index, scale, mean=1.0) for name, dim in dims.items()}
    config = with_rows(anatomy.spec.config, size, len(index))
    return Plan(config=config, tensors=tensors, layer_map=tuple(range(anatomy.depth)))


def check_rows(highest: int, size: int) -> None:
    """Raises PlanError for a token whose id is beyond the rows of a model."""
    if highest >= size:
        raise PlanError(f"the tokenizer has a token {highest}, the model rows for {size}", hint=TOKENIZER_HINT)


def vocabulary_dims(anatomy: Anatomy) -> dict[str, int]:
    """Return the tensors with a position for each token, and the dimension along which they have it.

    A family's table says so. Without a table they are the tensors outside the layers that are as long as the
    vocabulary. Raises PlanError where there is none, or where something else is as long.
    """
    if anatomy.whole_family is not None:
        with_tokens = {
            name: dim
            for name in anatomy.spec.tensors
            for dim, axes in enumerate(anatomy.row(name)[0].axes)
            if "vocab" in axes_of(axes)
        }
    else:
        size = vocabulary_size(anatomy)
        with_tokens = {
            name: tensor.shape.index(size)
            for name, tensor in anatomy.spec.tensors.items()
            if size in tensor.shape and not any(stack.locate(name) for stack in anatomy.stacks)
        }
        _check_unambiguous(anatomy, with_tokens, size)
    if not any(len(anatomy.spec.tensors[name].shape) == 2 for name in with_tokens):
        raise PlanError("no tensor of this model has a row for each token", hint=TOKENIZER_HINT)
    return with_tokens


def vocabulary_size(anatomy: Anatomy) -> int:
    """Return how many rows for tokens a model has. Raises PlanError where its config does not say."""
    size = size_of(anatomy.spec.config, "vocab")
    if size is None or size < 1:
        key, value = next(iter(spelled(anatomy.spec.config, "vocab").items()), (SPELLINGS["vocab"][0], None))
        raise PlanError(f"config.json says {key} = {value!r}, so rows cannot be counted", hint=TOKENIZER_HINT)
    return size


def _check_unambiguous(anatomy: Anatomy, names: Collection[str], size: int) -> None:
    """Raises PlanError where a length may count something else than tokens: there are as many positions or channels."""
    if "vocab_size_per_layer_input" in text_config(anatomy.spec.config):
        raise PlanError(
            f"{anatomy.model_type} has embeddings in every layer, with a vocabulary of their own",
            hint="Tokens can be added to models with one input embedding.",
        )
    for name in names:
        shape = anatomy.spec.tensors[name].shape
        if shape.count(size) > 1 or "pos" in name or "wpe" in name:
            raise PlanError(
                f"{name!r} is {list(shape)} and the vocabulary {size}: it is not known which dimension counts "
                f"tokens, because model type {anatomy.model_type!r} has no table of its tensors",
                hint="Tokens can be added to model types with a table: docs/models.md lists them.",
            )


def with_rows(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """Return the config with another vocabulary size, wherever it says the old one."""
    text = text_config(config)
    keys = spelled(text, "vocab").keys()
    edited = {**config, **{key: new for key in keys if config.get(key) == old}}
    return edited if text is config else edited | {"text_config": {**text, **dict.fromkeys(keys, new)}}
