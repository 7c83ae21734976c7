"""The request that kept work was begun with: work that goes on must be the same work."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import MAX_HEADER_BYTES
from surgeon.checkpoint.json_files import read_json
from surgeon.checkpoint.output import guarded, write_whole
from surgeon.errors import CheckpointError, OutputError


def difference(begun: Any, request: Mapping[str, Any], *, words: Mapping[str, str]) -> str | None:
    """Return in words where two requests differ, the older first; None where they are the same.

    `words` say it for the entries that are no options: "another MODEL". Of an option it is "--seed 0, not 1".
    """
    begun = begun if isinstance(begun, dict) else {}
    for name, now in json.loads(json.dumps(request)).items():  # tuples are lists then, as in what was read
        if (was := begun.get(name)) == now:
            continue
        if name in words:
            return words[name]
        within = difference(was, now, words=words) if isinstance(now, dict) else None
        return within or f"--{name.replace('_', '-')} {was!s:.60}, not {now!s:.60}"
    return None


def begin(path: Path, request: Mapping[str, Any], *, what: str, words: Mapping[str, str], is_new: bool) -> None:
    """Write the request of new work into its directory; raise OutputError where work that is there has another one."""
    if is_new:
        with guarded(path):
            write_whole(path, [json.dumps(request, indent=1).encode()])
    else:
        check_same(read_kept(path), request, path.parent, what=what, words=words)


def check_same(begun: Any, request: Mapping[str, Any], directory: Path, *, what: str, words: Mapping[str, str]) -> None:
    """Raises OutputError, which names a difference, where a directory holds `what`, "a run", of another request."""
    if found := difference(begun, request, words=words):
        raise OutputError(
            f"{directory} holds {what} that was begun with {found}",
            hint=f"Give what it was begun with, choose another -o, or begin again: rm -r {directory}",
        )


def read_kept(path: Path, *, most: int = MAX_HEADER_BYTES) -> Any:
    """Return the content of a JSON file of kept work, of at most `most` bytes. Raises OutputError for a damaged one."""
    try:
        return read_json(path, most=most)
    except CheckpointError as error:
        raise damaged(path) from error


def damaged(path: Path) -> OutputError:
    """Return the error for a file of kept work that cannot be read."""
    return OutputError(f"{path} is damaged, or of another version of surgeon", hint=f"Begin again: rm -r {path.parent}")
