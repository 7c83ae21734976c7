"""Solved tensors of a result: a file beside its weights, whose tensors take the place of those that a plan makes.

The plan reads them from there as it reads all else from its source. So the same plan can be carried out again without
the text on which they were solved. What was solved on which text, and for which cut, stands in the file itself.
"""

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from surgeon.checkpoint.derived import JoinedSource
from surgeon.checkpoint.header import FilePart, TensorSpec, read_header, read_metadata
from surgeon.checkpoint.receipt import public_record
from surgeon.checkpoint.source import LocalSource, Source, StoredTensor, inside, spec_of, stored
from surgeon.errors import CheckpointError, OutputError, PlanError
from surgeon.mistyped import hint_beside
from surgeon.plan.execute import TensorWrite, write_safetensors
from surgeon.plan.plan import Plan, Read

REPAIRS = "repairs.safetensors"
WORD = "repairs"  # of the joined source
FORMAT = 1
_KEY = "surgeon"  # of the record among the metadata
AGAIN = "Measure again: leave out --repairs-from."


@dataclass(frozen=True)
class RepairsFile(LocalSource):
    """The file `file` in `directory` as a source of tensors, under the names that they have in the result."""

    file: str

    called: ClassVar[str] = REPAIRS  # beside the weights of a result
    holds: ClassVar[str] = "repairs"
    again: ClassVar[str] = AGAIN

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
        is_ours = isinstance(content, dict) and content.get("format") == FORMAT
        if not isinstance(content, dict) or not is_ours or not self.is_record(content):
            raise CheckpointError(f"{self.path} holds no {self.holds} that this surgeon wrote", hint=self.again)
        return content

    @staticmethod
    def is_record(content: Mapping[str, Any]) -> bool:
        """Return whether this is the record of such a file."""
        return _are_maps(content.get("maps"))

    def provenance(self) -> dict[str, Any]:
        return {"file": self.called, "sha256": self.sha256}


@dataclass(frozen=True)
class RepairedSource(JoinedSource):
    """A model joined with a file of solved or learned tensors, which goes with its result."""

    joined: RepairsFile

    @property
    def companions(self) -> Sequence[str]:
        return [*self.base.companions, self.joined.called]

    def fetch(self, file: str) -> Path:
        return self.joined.local(self.joined.file) if file == self.joined.called else super().fetch(file)


def open_repairs(path: Path) -> RepairsFile:
    """Return the repairs in a file, or in the repairs.safetensors of a directory. Raises CheckpointError."""
    place = inside(path, REPAIRS) if path.is_dir() else path
    if not place.is_file():
        hint = hint_beside(place, f"A compensated result holds a {REPAIRS}.")
        raise CheckpointError(f"there is no file {place}", hint=hint)
    return RepairsFile(place.parent, str(path), place.name)


def with_repairs(source: Source, plan: Plan, repairs: RepairsFile) -> tuple[RepairedSource, Plan]:
    """Return the source and the plan with the tensors of a file in place of those that the plan made.

    Raises PlanError for a tensor that the result has not, or has in another form.
    """
    joined = RepairedSource(source, repairs, WORD)
    made = plan.result(spec_of(source)).tensors
    for name, item in repairs.tensors.items():
        if made.get(name) != item.spec:
            raise PlanError(f"{repairs.label} holds {name!r}, which this result has in another form or not", hint=AGAIN)
    solved = {name: Read(joined.prefix + name) for name in repairs.tensors}
    return joined, replace(plan, tensors={**plan.tensors, **solved})


Solved = TypeVar("Solved", bound=RepairsFile)


class RepairsWriter:
    """Takes solved tensors one by one, and writes them as one file in a temporary place, which lasts as long as it."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="surgeon-repairs-"))
        self._remove = weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._places: dict[str, tuple[TensorSpec, int]] = {}
        self._end = 0

    @property
    def _spool(self) -> Path:
        return self._directory / "tensors"

    def add(self, name: str, spec: TensorSpec, content: memoryview) -> None:
        """Take the bytes of a tensor. Raises OutputError where there is no room for them."""
        try:
            with self._spool.open("ab") as file:
                file.write(content)
        except OSError as error:
            raise _no_room(self._directory, error) from error
        self._places[name] = spec, self._end
        self._end += spec.nbytes

    def finish(self, record: Mapping[str, Any]) -> RepairsFile | None:
        """Return the file with the tensors and the record; None where no tensor was taken."""
        return self.finish_as(RepairsFile, record, "the compensation") if self._places else None

    def finish_as(self, kind: type[Solved], record: Mapping[str, Any], label: str) -> Solved:
        """Return the file, as one of this kind, with the tensors and the record."""
        part = FilePart(self._spool)
        writes = [
            TensorWrite(name, spec, part.range(start, start + spec.nbytes))
            for name, (spec, start) in self._places.items()
        ]
        try:
            metadata = {_KEY: json.dumps(public_record({"format": FORMAT, **record}))}  # it may be published
            write_safetensors(self._directory / kind.called, writes, metadata=metadata)
            self._spool.unlink()
        except OSError as error:
            raise _no_room(self._directory, error) from error
        made = kind(self._directory, label, kind.called)
        self._remove.detach()
        weakref.finalize(made, shutil.rmtree, self._directory, ignore_errors=True)
        return made


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
