"""The identity of what a step reads: by it a step is known to be done, or to have other inputs now."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgeon.checkpoint.source import CARD, CONFIG, RECEIPT
from surgeon.errors import OutputError
from surgeon.surgery import open_source
from surgeon.text import place_of, sliced

_OF_COMMANDS = (CARD, RECEIPT)  # of a checkpoint: they hold the command line, which has the output's place in it


def digest(content: Any) -> str:
    """Return the SHA-256 of a JSON value, 64 hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Identities:
    """Finds identities of files, directories and models. `known` holds those of files that have not changed since.

    A file is hashed once: its hash is taken again for the same size and time of change.
    """

    def __init__(self, known: Mapping[str, Any] | None = None) -> None:
        self.hashes: dict[str, list[Any]] = {
            path: list(entry)
            for path, entry in (known or {}).items()
            if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], str)
        }

    def of(self, item: str, *, is_model: bool = False) -> Any:
        """Return the identity of what an option names: the hash of all its files, or for the Hub its name.

        A model on the Hub is its commit; that is asked for where `is_model`.
        """
        name, *edges = sliced(item)
        if name != item:
            return [self.of(name), *edges]
        if (place := place_of(item)) != item:
            return [self.of(place), item.removeprefix(place)]
        path = Path(os.path.expanduser(item))  # noqa: PTH111  # Path.expanduser raises for ~name of an unknown user
        if os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises for a name that is too long
            left_out = _OF_COMMANDS if (path / CONFIG).is_file() else ()
            files = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in left_out)
            named = [(file.relative_to(path).as_posix(), file) for file in files]
            return digest([[name, self._hash(file)] for name, file in named if not name.startswith(".")])
        if os.path.isfile(path):  # noqa: PTH113
            return self._hash(path)
        if is_model:
            found = open_source(item).provenance()
            return {key: found[key] for key in ("id", "commit") if key in found}
        return {"id": item}

    def _hash(self, path: Path) -> str:
        """Return the SHA-256 of a file. Raises OutputError where it cannot be read."""
        try:
            look = path.stat()
            known = self.hashes.get(str(path.resolve()))
            if known is not None and known[:2] == [look.st_size, look.st_mtime_ns]:
                return str(known[2])
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise OutputError(f"cannot read {path}: {error.strerror}", hint=f"Look: ls -l {path}") from error
        self.hashes[str(path.resolve())] = [look.st_size, look.st_mtime_ns, found]
        return found
