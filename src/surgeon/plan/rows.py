"""Rows for tokens of another vocabulary: a file beside a result's weights with a map of the old rows, and new ones.

Result row j is row map[j] of the old rows and, laid after them, the new ones of the file. The plan reads both, so that
it can be carried out again without what the new rows were computed from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from surgeon.anatomy.axes import Index, Scale
from surgeon.checkpoint.source import Source, StoredTensor, inside, spec_of
from surgeon.errors import CheckpointError, PlanError
from surgeon.plan.expressions import Gather, Joined, Read
from surgeon.plan.plan import Plan
from surgeon.plan.solved import SolvedFile, SolvedSource

ROWS = "rows.safetensors"
WORD = "rows"  # of the joined source
AGAIN = "Transplant again, from the model."
MAP = "map"  # int32, shape (rows of the result,)


@dataclass(frozen=True)
class RowsFile(SolvedFile):
    """A file of new rows, under the names of their tensors, and the map."""

    kept_as: ClassVar[str] = ROWS
    holds: ClassVar[str] = "rows"
    again: ClassVar[str] = AGAIN

    @property
    def index(self) -> Index:
        """The map."""
        import numpy as np

        stored = self.tensors.get(MAP)
        if stored is None or stored.spec.dtype != "I32" or len(stored.spec.shape) != 1:
            raise CheckpointError(f"{self.path} has no map of rows", hint=AGAIN)
        with self.local(self.file).open("rb") as file:
            file.seek(stored.start)
            positions = np.frombuffer(file.read(stored.end - stored.start), "<i4")
        if len(positions) == 0 or positions.min() < 0:
            raise CheckpointError(f"the map of rows in {self.path} is damaged", hint=AGAIN)
        return Index.of(positions.tolist())

    @property
    def new_rows(self) -> Mapping[str, StoredTensor]:
        """The new rows of each tensor."""
        return {name: item for name, item in self.tensors.items() if name != MAP}

    @staticmethod
    def is_record(content: Mapping[str, Any]) -> bool:
        return isinstance(content.get("rows"), dict)


def open_rows(directory: Path) -> RowsFile:
    """Return the rows beside a transplanted checkpoint. Raises CheckpointError."""
    if not inside(directory, ROWS).is_file():
        raise CheckpointError(f"there is no {ROWS} in {directory}", hint=AGAIN)
    return RowsFile(directory, str(directory), ROWS)


def with_rows_of(
    source: Source, begun: Plan, plan: Plan, dims: Mapping[str, int], rows: RowsFile
) -> tuple[Source, Plan]:
    """Return the source and the plan of a transplant whose rows are those of a file.

    `plan` continues `begun`, which makes the model from the source; `dims` are its tensors with a position for each
    token, and the dimension along which they have it. Raises PlanError for rows of another model.
    """
    joined = SolvedSource(source, rows, WORD)
    made, index = begun.result(spec_of(source)).tensors, rows.index
    scale = Scale.all(1.0, len(index))
    tensors = dict(plan.tensors)
    for name, dim in dims.items():
        item = rows.new_rows.get(name)
        expected = (
            None if item is None else (*made[name].shape[:dim], item.spec.shape[dim], *made[name].shape[dim + 1 :])
        )
        if item is None or item.spec.shape != expected or item.spec.dtype != made[name].dtype:
            raise PlanError(f"{rows.label} holds no rows for {name!r} of this model", hint="Transplant again.")
        if index.highest >= made[name].shape[dim] + item.spec.shape[dim]:
            raise PlanError(f"the map of rows of {rows.label} is of a larger model", hint="Transplant again.")
        tensors[name] = Gather(Joined((Read(name), Read(joined.prefix + name)), dim), dim, index, scale)
    offered = {name: Read(name) for name in joined.tensors if name.startswith(joined.prefix)}
    passed = replace(begun, tensors={**begun.tensors, **offered})
    return joined, passed.then(replace(plan, tensors=tensors))
