"""The new rows of a transplant: computed by its method, tensor by tensor, into one file with the map of old ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.header import TensorSpec
from surgeon.checkpoint.matching import Match, Vocabulary
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import PlanError
from surgeon.plan.plan import FLOAT_DTYPES
from surgeon.plan.planned import PlannedSource
from surgeon.plan.rows import MAP, RowsFile
from surgeon.plan.solved import SolvedWriter, bytes_of
from surgeon.progress import meter
from surgeon.surgery import Surgery
from surgeon.transforms.vocabulary import vocabulary_dims, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TOGETHER = 8192  # texts that are tokenised at once


def embedding_of(source: Source) -> str:
    """Return the name of a helper's table of rows for tokens. Raises PlanError where it is stored as codes."""
    anatomy = read_anatomy(spec_of(source))
    tables = [name for name, dim in vocabulary_dims(anatomy).items() if dim == 0]
    name = next(name for name in tables if len(anatomy.spec.tensors[name].shape) == 2)
    if (dtype := anatomy.spec.tensors[name].dtype) not in FLOAT_DTYPES:
        raise PlanError(f"{source.label} stores {name!r} as {dtype}", hint="Name a helper that is not quantized.")
    return name


@dataclass(eq=False)
class RowMaker:
    """Makes the new rows; what tensors share is computed once."""

    begun: Surgery
    method: str
    helper: Source | None
    old: Vocabulary
    new: Vocabulary
    found: Match
    num_rows: int
    tokenizer: "PreTrainedTokenizerBase"  # the old one
    k: int
    device: str
    shared: Any = None  # the pieces, the helper's rows, or what was pursued

    def made(self) -> RowsFile:
        """Return the file of the map and the new rows: of each tensor the mean row, and those of missing tokens."""
        import numpy as np

        from surgeon.measure.new_rows import Matrix
        from surgeon.plan.arithmetic import TORCH_DTYPES

        begun, size = self.begun, vocabulary_size(self.begun.anatomy)
        missing = self.found.missing if self.method != "mean" else ()
        places = np.full(self.num_rows, size, dtype="<i4")  # the mean row follows the old ones, then come the others
        for i, token in self.found.old.items():
            places[i] = token
        places[list(missing)] = size + 1 + np.arange(len(missing))
        source = PlannedSource(begun.source, begun.plan) if begun.plan.steps else begun.source
        writer = SolvedWriter(RowsFile, "the new rows")
        writer.add(MAP, TensorSpec("I32", (self.num_rows,)), memoryview(places.tobytes()))
        for name, dim in vocabulary_dims(begun.anatomy).items():
            spec = begun.anatomy.spec.tensors[name]
            shape = (*spec.shape[:dim], 1 + len(missing), *spec.shape[dim + 1 :])
            matrix, dtype = Matrix(source, name, dim), TORCH_DTYPES[spec.dtype]

            def blocks(matrix: Matrix = matrix, dtype: Any = dtype) -> Iterator[memoryview]:
                yield bytes_of(matrix.mean().to(dtype))
                for block in self._blocks(matrix) if missing else ():
                    yield bytes_of(block.to(dtype))

            writer.add_blocks(name, TensorSpec(spec.dtype, shape), blocks())
        made = writer.finish({"rows": {"method": self.method, "model": begun.source.provenance()}})
        assert made is not None, "there is a map"
        return made

    def _blocks(self, matrix: Any) -> Iterator[Any]:
        """Return the new rows of a tensor, block by block. Raises MeasureError."""
        from surgeon.measure.new_rows import Helper, Matrix, by_cosines, by_ridge, of_pieces, pursue
        from surgeon.models.device import resolve_device

        if self.method == "subword":
            self.shared = self.shared or self._pieces()
            return of_pieces(matrix, self.shared)()
        assert self.helper is not None, "the method has a helper"
        anchors, missing = self.found.by_bytes, self.found.missing
        if self.shared is None:
            self.shared = Helper.of(Matrix(self.helper, embedding_of(self.helper)), list(anchors), missing)
            if self.method == "omp":
                device, progress = resolve_device(self.device), meter("matching", len(missing), 1)
                self.shared = pursue(self.shared, self.k, device=device, progress=progress)
        rows = matrix.rows(list(anchors.values()))
        if self.method == "omp":
            return self.shared.rows(rows)()  # type: ignore[no-any-return]
        return (by_ridge if self.method == "ridge" else by_cosines)(rows, self.shared)()

    def _pieces(self) -> list[list[int]]:
        """Return the old tokens that spell each missing one: as the old tokenizer writes its text, where it is text.

        Where that has other bytes (a space that the tokenizer puts first), or is none: the longest at each place.
        """
        contents = [self.new.spelled[i] for i in self.found.missing]
        found = []
        for at in range(0, len(contents), TOGETHER):
            some = contents[at : at + TOGETHER]
            texts = [content.decode("utf-8", "replace") for content in some]
            encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for content, ids in zip(some, encoded, strict=True):
                spelled = b"".join(self.old.spelled.get(i, b"\xff") for i in ids)
                found.append(list(ids) if spelled == content else self.old.pieces(content))
        return found
