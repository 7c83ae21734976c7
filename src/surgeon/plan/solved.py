"""Tensors that were solved or learned for a result: a file beside its weights, which its plan reads.

The plan reads them from there as it reads all else from its source. So the same plan can be carried out again without
the text on which they were solved. What was solved on which text, and for what, stands in the file itself. There are
several kinds of such files; the repairs of a cut, whose tensors take the place of those that the plan makes, are here.
"""

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from surgeon.checkpoint.derived import JoinedSource
from surgeon.checkpoint.header import FilePart, TensorSpec, read_header, read_metadata
from surgeon.checkpoint.receipt import public_record
from surgeon.checkpoint.source import LocalSource, Source, StoredTensor, inside, spec_of, stored
from surgeon.errors import CheckpointError, OutputError, PlanError
from surgeon.mistyped import hint_beside
from surgeon.plan.execute import TensorWrite, write_safetensors
from surgeon.plan.expressions import Read
from surgeon.plan.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

REPAIRS = "repairs.safetensors"
WORD = "repairs"  # of the joined source
FORMAT = 1
_KEY = "surgeon"  # of the record among the metadata
AGAIN = "Measure again: leave out --repairs-from."


@dataclass(frozen=True)
class SolvedFile(LocalSource):
    """The file `file` in `directory` as a source of tensors; each kind has a name in a result, and a record."""

    file: str

    kept_as: ClassVar[str]  # in the result
    holds: ClassVar[str]  # in words
    again: ClassVar[str]  # what to do where it does not

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.directory / self.file

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return {}

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return {name: stored(self.file, entry) for name, entry in read_header(self.local(self.file)).items()}

    @property
    def companions(self) -> Sequence[str]:
        return ()

    @cached_property
    def sha256(self) -> str:
        """The hash of the whole file."""
        with self.local(self.file).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """What was solved, on which text, for what. Raises CheckpointError for a file without such a record."""
        try:
            content = json.loads(read_metadata(self.local(self.file)).get(_KEY, ""))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or content.get("format") != FORMAT or not self.is_record(content):
            raise CheckpointError(f"{self.path} holds no {self.holds} that this surgeon wrote", hint=self.again)
        return content

    @staticmethod
    def is_record(content: Mapping[str, Any]) -> bool:
        """Return whether this is the record of such a file."""
        raise NotImplementedError

    def provenance(self) -> dict[str, Any]:
        return {"file": self.kept_as, "sha256": self.sha256}


@dataclass(frozen=True)
class RepairsFile(SolvedFile):
    """The solved maps of a cut, under the names that they have in the result."""

    kept_as: ClassVar[str] = REPAIRS
    holds: ClassVar[str] = "repairs"
    again: ClassVar[str] = AGAIN

    @staticmethod
    def is_record(content: Mapping[str, Any]) -> bool:
        return _are_maps(content.get("maps"))


@dataclass(frozen=True)
class SolvedSource(JoinedSource):
    """A model joined with a file of solved tensors, which goes with its result."""

    joined: SolvedFile

    @property
    def companions(self) -> Sequence[str]:
        return [*(name for name in self.base.companions if name != self.joined.kept_as), self.joined.kept_as]

    def fetch(self, file: str) -> Path:
        return self.joined.local(self.joined.file) if file == self.joined.kept_as else super().fetch(file)


def open_repairs(path: Path) -> RepairsFile:
    """Return the repairs in a file, or in the repairs.safetensors of a directory. Raises CheckpointError."""
    place = inside(path, REPAIRS) if path.is_dir() else path
    if not place.is_file():
        hint = hint_beside(place, f"A compensated result holds a {REPAIRS}.")
        raise CheckpointError(f"there is no file {place}", hint=hint)
    return RepairsFile(place.parent, str(path), place.name)


def with_repairs(source: Source, plan: Plan, repairs: RepairsFile) -> tuple[SolvedSource, Plan]:
    """Return the source and the plan with the tensors of a file in place of those that the plan made.

    Raises PlanError for a tensor that the result has not, or has in another form.
    """
    joined = SolvedSource(source, repairs, WORD)
    made = plan.result(spec_of(source)).tensors
    for name, item in repairs.tensors.items():
        if made.get(name) != item.spec:
            raise PlanError(f"{repairs.label} holds {name!r}, which this result has in another form or not", hint=AGAIN)
    solved = {name: Read(joined.prefix + name) for name in repairs.tensors}
    return joined, replace(plan, tensors={**plan.tensors, **solved})


Kept = TypeVar("Kept", bound=SolvedFile)


class SolvedWriter(Generic[Kept]):
    """Takes solved tensors one by one, and writes them as one file in a temporary place, which lasts as long as it.

    The file is opened as `kind`, and called `label`.
    """

    def __init__(self, kind: type[Kept], label: str) -> None:
        self._kind, self._label = kind, label
        self._directory = Path(tempfile.mkdtemp(prefix="surgeon-solved-"))
        self._remove = weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._places: dict[str, tuple[TensorSpec, int]] = {}
        self._end = 0

    @property
    def _spool(self) -> Path:
        return self._directory / "tensors"

    def add(self, name: str, spec: TensorSpec, *blocks: memoryview) -> None:
        """Take the bytes of a tensor, in blocks. Raises OutputError where there is no room for them."""
        self.add_blocks(name, spec, blocks)

    def add_blocks(self, name: str, spec: TensorSpec, blocks: Iterable[memoryview]) -> None:
        """Take the bytes of a tensor, block by block as they are made."""
        try:
            with self._spool.open("ab") as file:
                for block in blocks:
                    file.write(block)
                size = file.tell()
        except OSError as error:
            raise _no_room(self._directory, error) from error
        self._places[name] = spec, self._end
        self._end += spec.nbytes
        assert size == self._end, f"{name} was {size - self._end:+d} bytes longer than {spec}"

    def finish(self, record: Mapping[str, Any]) -> Kept | None:
        """Return the file with the tensors and the record; None where no tensor was taken."""
        if not self._places:
            return None
        part = FilePart(self._spool)
        writes = [
            TensorWrite(name, spec, part.range(start, start + spec.nbytes))
            for name, (spec, start) in self._places.items()
        ]
        try:
            metadata = {_KEY: json.dumps(public_record({"format": FORMAT, **record}))}  # it may be published
            write_safetensors(self._directory / self._kind.kept_as, writes, metadata=metadata)
            self._spool.unlink()
        except OSError as error:
            raise _no_room(self._directory, error) from error
        made = self._kind(self._directory, self._label, self._kind.kept_as)
        self._remove.detach()
        weakref.finalize(made, shutil.rmtree, self._directory, ignore_errors=True)
        return made


def bytes_of(tensor: "Tensor") -> memoryview:
    """Return the bytes of a tensor as a file holds them."""
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().data


def _are_maps(maps: object) -> bool:
    """Return whether these are entries of solved maps: their tensors, what was in front of them, and their errors."""
    return isinstance(maps, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("tensors"), list)
        and bool(each["tensors"])
        and all(isinstance(name, str) for name in (*each["tensors"], each.get("reason")))
        and isinstance(each.get("taken"), bool)
        and isinstance(each.get("ridge"), int | float)
        and all(_is_pair(each.get(key)) for key in ("fit", "held_out", "tokens"))
        for each in maps
    )


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(number, int | float) for number in value)


def _no_room(directory: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {directory}: {error.strerror}", hint="Set TMPDIR to a disk with more space.")
