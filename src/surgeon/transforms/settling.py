"""What a checkpoint stores and its language model does not run, settled before the first surgery on it.

A head may be stored though the config ties it to the embedding, and layers that predict further tokens (MTP) may follow
the model's own, under the next numbers.
"""

from collections.abc import Mapping
from dataclasses import replace

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.anatomy.axes import axes_of
from surgeon.anatomy.stacks import PREDICTORS
from surgeon.checkpoint.comparing import are_equal
from surgeon.checkpoint.source import Source
from surgeon.plan.plan import Plan

KEY = "tie_word_embeddings"


def predictors_in(anatomy: Anatomy) -> frozenset[str]:
    """Return the tensors of layers that predict further tokens (MTP), where they follow the model's own by number."""
    return frozenset(name for name in anatomy.spec.tensors if any(stack.is_beyond(name) for stack in anatomy.stacks))


def stored_tie(anatomy: Anatomy) -> tuple[str, str] | None:
    """Return the head that is stored though the config ties it to the embedding, and the embedding; else None."""
    if anatomy.spec.config.get(KEY, anatomy.config.get(KEY)) is not True:
        return None
    of_tokens = {"head": "", "embedding": ""} | {
        row.kind: name
        for name, (row, _) in anatomy.rows.items()
        if row.kind in ("head", "embedding") and axes_of(row.axes[0]) == {"vocab"}
    }
    head, embedding = of_tokens["head"], of_tokens["embedding"]
    return (head, embedding) if head and embedding else None


def settle(source: Source, anatomy: Anatomy, plan: Plan) -> tuple[Plan, Anatomy]:
    """Return the plan, which so far changes nothing, and the anatomy of what the surgeries begin with."""
    if predictors := predictors_in(anatomy):
        plan = _without_predictors(plan, predictors)
        anatomy = read_anatomy(plan.result(anatomy.spec))
    if (tie := stored_tie(anatomy)) is not None:
        plan = _settle_tie(source, plan, tie)
        anatomy = read_anatomy(plan.result(anatomy.spec))
    return plan, anatomy


def _without_predictors(plan: Plan, predictors: frozenset[str]) -> Plan:
    """Return the plan without the layers that predict further tokens, and the config without their number.

    transformers does not run them, so nothing can be said of what another depth or width would make of them.
    """
    tensors = {name: expr for name, expr in plan.tensors.items() if name not in predictors}
    config = dict(plan.config)
    if PREDICTORS in config:
        config[PREDICTORS] = 0
    if isinstance(text := config.get("text_config"), Mapping) and PREDICTORS in text:
        config["text_config"] = {**text, PREDICTORS: 0}
    note = f"the layers that predict further tokens (MTP) are left out: {min(predictors)} and the rest of them"
    return replace(plan, config=config, tensors=tensors, notes=(*plan.notes, note))


def _settle_tie(source: Source, plan: Plan, tie: tuple[str, str]) -> Plan:
    """Return the plan of a model that ties its head or does not.

    transformers ties a stored head that equals the embedding, and no other, whatever the config says. So the copy is
    left out, or the config no longer says that it is tied.
    """
    head, embedding = tie
    if is_copy(source, tie):
        tensors = {name: expr for name, expr in plan.tensors.items() if name != head}
        note = f"{head} is left out: it equals {embedding}, to which {KEY} ties it"
        return replace(plan, tensors=tensors, notes=(*plan.notes, note))
    config = {**plan.config, KEY: False}
    if isinstance(text := config.get("text_config"), Mapping):
        config["text_config"] = {**text, KEY: False}
    note = f"{KEY} became false: {head} differs from {embedding}, and so transformers does not tie it"
    return replace(plan, config=config, notes=(*plan.notes, note))


def is_copy(source: Source, tie: tuple[str, str]) -> bool:
    """Return whether a stored head equals the embedding, so that transformers ties it."""
    head, embedding = tie
    alike = source.tensors[head].spec == source.tensors[embedding].spec
    return alike and are_equal(source, head, source, embedding)
