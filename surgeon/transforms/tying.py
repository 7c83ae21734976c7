"""A head that is stored though the config ties it to the embedding: what transformers makes of it is made plain."""

from collections.abc import Mapping
from dataclasses import replace

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.checkpoint.comparing import are_equal
from surgeon.checkpoint.source import Source
from surgeon.plan.plan import Plan

KEY = "tie_word_embeddings"


def settle_tie(source: Source, anatomy: Anatomy, plan: Plan) -> tuple[Plan, Anatomy]:
    """Return the plan, which changes nothing else, and the anatomy of a model that ties its head or does not.

    transformers ties a stored head that equals the embedding, and no other, whatever the config says. So the copy is
    left out, or the config no longer says that it is tied.
    """
    assert anatomy.stored_tie is not None, "there is something to settle"
    head, embedding = anatomy.stored_tie
    if is_copy(source, anatomy.stored_tie):
        tensors = {name: expr for name, expr in plan.tensors.items() if name != head}
        note = f"{head} is left out: it equals {embedding}, to which {KEY} ties it"
        plan = replace(plan, tensors=tensors, notes=(*plan.notes, note))
    else:
        config = {**plan.config, KEY: False}
        if "text_config" in config and isinstance(text := config["text_config"], Mapping):
            config["text_config"] = {**text, KEY: False}
        note = f"{KEY} became false: {head} differs from {embedding}, and so transformers does not tie it"
        plan = replace(plan, config=config, notes=(*plan.notes, note))
    return plan, read_anatomy(plan.result(anatomy.spec))


def is_copy(source: Source, tie: tuple[str, str]) -> bool:
    """Return whether a stored head equals the embedding, so that transformers ties it."""
    head, embedding = tie
    alike = source.tensors[head].spec == source.tensors[embedding].spec
    return alike and are_equal(source, head, source, embedding)
