"""recipe.json: what a recipe has done, with the hashes of what each step read; written after every change."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.checkpoint.json_files import read_json
from surgeon.checkpoint.output import write_whole
from surgeon.checkpoint.receipt import to_bytes, versions
from surgeon.errors import CheckpointError, OutputError
from surgeon.recipe.identity import Identities

RECORD = "recipe.json"
FORMAT = 1
_DAMAGED = "Remove the directory, or choose another place with -o."


@dataclass(slots=True)
class Entry:
    """A step in the record. `key` is the hash of its command, options and inputs; `inputs` name what it was made of.

    `status` is "begun" or "done"; `output` is a path in the directory, None where there is none, and
    `identity` what is in it.
    """

    command: str
    words: list[str]
    key: str
    inputs: dict[str, Any]
    status: str = "begun"
    output: str | None = None
    identity: Any = None
    result: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as recipe.json holds it."""
        return {name: getattr(self, name) for name in self.__slots__}


class Record:
    """The record of a directory, which one process holds at a time."""

    def __init__(self, directory: Path, *, recipe: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        self._facts = {"recipe": str(recipe), "settings": dict(settings)}
        content = _content(directory / RECORD)
        self.entries: dict[str, Entry] = {
            name: _entry(name, told, directory) for name, told in content["steps"].items()
        }
        self.identities = Identities(content.get("files"))

    def save(self) -> None:
        """Write the record, whole or not at all. Raises OutputError for a full disk."""
        content = {
            "format": FORMAT,
            **self._facts,
            "versions": versions(),
            "steps": {name: entry.to_dict() for name, entry in self.entries.items()},
            "files": self.identities.hashes,
        }
        replace_file(self.directory / RECORD, to_bytes(content))


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old content or the new one. Raises OutputError."""
    try:
        write_whole(path, [content])
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="Is the disk full?  df -h") from error


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Make a directory, and hold it for one process. Raises OutputError where another one works in it."""
    from filelock import FileLock, Timeout

    _check_place(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / f".{RECORD}.lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(f"another process runs a recipe in {directory}", hint="Wait, or choose -o.") from error
    except OSError as error:
        raise OutputError(f"cannot write into {directory}: {error.strerror}", hint="Choose -o.") from error
    try:
        yield
    finally:
        lock.release()


def _check_place(directory: Path) -> None:
    """Raise OutputError for a directory that holds other things than a recipe's results."""
    try:
        names = [path.name for path in directory.iterdir()] if directory.exists() else []
    except OSError as error:  # also of a file
        raise OutputError(f"cannot write into {directory}: {error.strerror}", hint="Choose -o.") from error
    if RECORD not in names and any(not name.startswith(".") for name in names):
        raise OutputError(f"{directory} is not empty, and holds no recipe's results", hint="Choose another place: -o.")


def _content(path: Path) -> dict[str, Any]:
    """Return what a record holds; of none, no steps. Raises OutputError for a damaged one."""
    if not path.exists():
        return {"steps": {}}
    try:
        content = read_json(path)
    except CheckpointError as error:
        raise OutputError(str(error), hint=_DAMAGED) from error
    if not isinstance(content, dict) or not isinstance(content.get("steps"), dict):
        raise OutputError(f"{path} is damaged: it names no steps", hint=_DAMAGED)
    if content.get("format") != FORMAT:
        raise OutputError(f"{path} is of another surgeon: its format is {content.get('format')!r}", hint=_DAMAGED)
    if not isinstance(content.get("files", {}), dict):
        raise OutputError(f"{path} is damaged: files is no object", hint=_DAMAGED)
    return content


def _entry(name: str, told: Any, directory: Path) -> Entry:
    kinds = {"command": str, "words": list, "key": str, "inputs": dict, "status": str, "result": dict}
    if not isinstance(told, dict) or not all(isinstance(told.get(key), kind) for key, kind in kinds.items()):
        raise OutputError(f"{directory / RECORD} is damaged: step {name}", hint=_DAMAGED)
    if not isinstance(told.get("output"), str | None) or not isinstance(told.get("seconds"), int | float):
        raise OutputError(f"{directory / RECORD} is damaged: step {name}", hint=_DAMAGED)
    return Entry(**{key: told.get(key) for key in Entry.__slots__})  # type: ignore[arg-type]
