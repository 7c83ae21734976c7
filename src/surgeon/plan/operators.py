"""The operator of a learned growth: a file beside the weights of a result, whose tensors its plan reads.

So the same plan can be carried out again without the text on which the operator was trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from surgeon.checkpoint.source import Source, inside, spec_of
from surgeon.errors import CheckpointError, PlanError
from surgeon.mistyped import hint_beside
from surgeon.plan.expressions import Read
from surgeon.plan.plan import Plan, reads
from surgeon.plan.solved import SolvedFile, SolvedSource

OPERATOR = "operator.safetensors"
WORD = "operator"  # of the joined source
PREFIX = f"{WORD}:"
AGAIN = "Learn again: surgeon grow with --learn."


@dataclass(frozen=True)
class OperatorFile(SolvedFile):
    """The learned tensors of a growth, under the names that the plan of the growth gives them."""

    kept_as: ClassVar[str] = OPERATOR
    holds: ClassVar[str] = "operator of a growth"
    again: ClassVar[str] = AGAIN

    @staticmethod
    def is_record(content: Mapping[str, Any]) -> bool:
        """Return whether this is the record of a learned growth."""
        return isinstance(content.get("steps"), int) and isinstance(content.get("held_out"), dict)


def open_operator(directory: Path) -> OperatorFile:
    """Return the operator beside the weights in a directory. Raises CheckpointError where there is none."""
    place = inside(directory, OPERATOR)
    if not place.is_file():
        raise CheckpointError(f"there is no file {place}", hint=hint_beside(place, "A learned growth holds one."))
    return OperatorFile(directory, str(place), OPERATOR)


def with_operator(source: Source, begun: Plan, plan: Plan, operator: OperatorFile) -> tuple[SolvedSource, Plan]:
    """Return the source joined with an operator, and the plan of the whole: `plan`, which reads it, after `begun`.

    Raises PlanError where the operator is that of another growth.
    """
    joined = SolvedSource(source, operator, WORD)
    whole = after(begun, plan)
    wanted = {name for expr in plan.tensors.values() for name in reads(expr) if name.startswith(PREFIX)}
    if wanted != {name for name in joined.tensors if name.startswith(PREFIX)}:
        raise PlanError(f"{operator.label} holds what was learned of another growth", hint=AGAIN)
    try:
        whole.result(spec_of(joined))
    except PlanError as error:
        raise PlanError(f"{operator.label} does not fit this growth: {error}", hint=AGAIN) from error
    return joined, whole


def after(begun: Plan, plan: Plan) -> Plan:
    """Return the plan that does `begun`, then `plan`, which reads an operator too."""
    names = {name for expr in plan.tensors.values() for name in reads(expr) if name.startswith(PREFIX)}
    return replace(begun, tensors={**begun.tensors, **{name: Read(name) for name in names}}).then(plan)
