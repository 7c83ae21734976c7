"""What a checkpoint stores and its language model does not run, settled before the first surgery on it.

A head may be stored though the config ties it to the embedding, and layers that predict further tokens (MTP) may follow
the model's own, under the next numbers.
"""

from collections.abc import Mapping
from dataclasses import replace

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.anatomy.stacks import PREDICTORS
from surgeon.checkpoint.comparing import are_equal
from surgeon.checkpoint.source import Source
from surgeon.plan.plan import Plan

KEY = "tie_word_embeddings"


def settle(source: Source, anatomy: Anatomy, plan: Plan) -> tuple[Plan, Anatomy]:
    """Return the plan, which so far changes nothing, and the anatomy of what the surgeries begin with."""
    if anatomy.predictors:
        plan = without_predictors(anatomy, plan)
        anatomy = read_anatomy(plan.result(anatomy.spec))
    return (plan, anatomy) if anatomy.stored_tie is None else settle_tie(source, anatomy, plan)


def without_predictors(anatomy: Anatomy, plan: Plan) -> Plan:
    """Return the plan without the layers that predict further tokens, and the config without their number.

    transformers does not run them, so nothing can be said of what another depth or width would make of them.
    """
    tensors = {name: expr for name, expr in plan.tensors.items() if name not in anatomy.predictors}
    config = dict(plan.config)
    if PREDICTORS in config:
        config[PREDICTORS] = 0
    if isinstance(text := config.get("text_config"), Mapping) and PREDICTORS in text:
        config["text_config"] = {**text, PREDICTORS: 0}
    note = f"the layers that predict further tokens (MTP) are left out: {min(anatomy.predictors)} and the rest of them"
    return replace(plan, config=config, tensors=tensors, notes=(*plan.notes, note))


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
