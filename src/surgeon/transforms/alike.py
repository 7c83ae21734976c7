"""Whether models are alike: one architecture, one set of names and shapes, one vocabulary in one order."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from surgeon.checkpoint.header import CheckpointSpec, is_quantized
from surgeon.checkpoint.tokenizer_files import TOKENIZER, vocabulary_of
from surgeon.errors import PlanError
from surgeon.plan.plan import changed_keys

# Config keys that change nothing about what trained layers compute.
INCIDENTAL = re.compile(
    r"_name_or_path|architectures|(torch_)?dtype|transformers_version|use_cache|pretraining_tp"
    r"|.*_token_ids?|.*(drop|dropout|pdrop)|init.*|.*initializer.*"
)
TIED = "tie_word_embeddings"
# Files from which a slow tokenizer is made, where there is no tokenizer.json.
_VOCABULARIES = ("vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")

Files = Callable[[str], bytes | None]  # from a file's name to its content, None where there is no such file


def differing_setting(config: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first key by which two configs compute otherwise, with both values; None where there is none.

    A key that only one config has may be the other's under an older name, so it makes no difference.
    """
    for key, (value, their) in changed_keys(config, other).items():
        if value is not None and their is not None and not INCIDENTAL.fullmatch(key.rpartition(".")[2]):
            return key, value, their
    return None


def check_alike(first: tuple[str, CheckpointSpec], other: tuple[str, CheckpointSpec], *, dtypes: bool = False) -> None:
    """Raises PlanError where two models, each with its name, differ in more than their numbers.

    Dtypes may differ, except where `dtypes` are compared too.
    """
    (label, model), (their, spec) = first, other
    for name, each in (first, other):
        if is_quantized(each.config):
            raise PlanError(
                f"{name} is quantized: its tensors are codes, of which there is no mean",
                hint="Merge the models before they were quantized, then quantize the result.",
            )
    if _is_tied(model) != _is_tied(spec):
        tied, untied = (label, their) if _is_tied(model) else (their, label)
        raise PlanError(
            f"{tied} uses its embedding as its head, and {untied} has a head of its own: they have no common form",
            hint="Merge models of one kind.",
        )
    if (found := differing_setting(model.config, spec.config)) is not None:
        key, value, theirs = found
        raise PlanError(
            f"{their} says {key} = {theirs!r} in its config.json, {label} {value!r}",
            hint="Only models of one architecture can be merged: finetunes of one model.",
        )
    for name in [*model.tensors, *(name for name in spec.tensors if name not in model.tensors)]:
        one, two = model.tensors.get(name), spec.tensors.get(name)
        if one is None or two is None:
            without, with_it = (their, label) if two is None else (label, their)
            raise PlanError(f"{without} has no tensor {name!r}, {with_it} has it", hint="Merge models of one kind.")
        if one.shape != two.shape:
            sizes = f"{list(one.shape)} in {label}, {list(two.shape)} in {their}"
            raise PlanError(f"{name!r} is {sizes}", hint="Only tensors of one shape can be merged.")
        if dtypes and one.dtype != two.dtype:
            raise PlanError(
                f"{name!r} is {one.dtype} in {label}, {two.dtype} in {their}, and their bytes are to be copied",
                hint="Store them in one dtype first: surgeon truncate MODEL --layers 100% --dtype bfloat16",
            )


def _is_tied(spec: CheckpointSpec) -> bool:
    text = spec.config.get("text_config")
    inner = text.get(TIED) if isinstance(text, dict) else None
    stated = spec.config.get(TIED, inner)
    return bool(stated) if stated is not None else not any(name.endswith("lm_head.weight") for name in spec.tensors)


def check_vocabularies(first: tuple[str, Files], other: tuple[str, Files]) -> str | None:
    """Return a note where two models' vocabularies cannot be compared, None where they are the same.

    Raises PlanError for another token, or one with another id: means of such rows are noise.
    """
    (label, files), (their, others) = first, other
    one, two = files(TOKENIZER), others(TOKENIZER)
    if one is not None and two is not None:
        if one == two:
            return None
        ours, theirs = vocabulary_of(one), vocabulary_of(two)
        token = next((each for each in {**ours, **theirs} if ours.get(each) != theirs.get(each)), None)
        if token is None:
            return None
        ids = [f"{'none' if each is None else f'id {each}'}" for each in (ours.get(token), theirs.get(token))]
        raise PlanError(
            f"the vocabularies differ: the token {token!r} has {ids[0]} in {label}, {ids[1]} in {their}",
            hint="Only models whose ids mean the same tokens can be merged.",
        )
    for name in _VOCABULARIES:
        one, two = files(name), others(name)
        if one is not None and two is not None:
            if one == two:
                return None
            raise PlanError(
                f"the vocabularies differ: {name} of {label} is another than that of {their}",
                hint=f"Save both tokenizers with transformers: a {TOKENIZER} can be compared token by token.",
            )
    return f"the vocabularies of {label} and {their} are not compared: they have no tokenizer file in common"
