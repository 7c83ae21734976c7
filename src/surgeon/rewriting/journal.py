"""The rows of a begun distillation, on disk as they are finished: a killed run goes on where it was."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgeon.checkpoint.begun import begin, damaged
from surgeon.checkpoint.output import alone_in, guarded, write_whole

REQUEST, ROWS = "request.json", "rows.jsonl"
# What a run that goes on must have been begun with, in words; all other entries of a request are options.
WORDS = {"teacher": "another MODEL", "data": "other data", "format": "another version of surgeon"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a row: the answer that was taken, None with the reason; which sample; and the tokens of all."""

    row: int
    answer: str | None
    reason: str | None
    sample: int
    tokens: int


class Journal:
    """The finished rows of a run in a directory, which one process at a time may have."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.outcomes: dict[int, Outcome] = {}

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Write finished rows; they are on disk when this returns. Raises OutputError where the disk refuses."""
        outcomes = list(outcomes)
        lines = "".join(json.dumps(asdict(outcome), ensure_ascii=True) + "\n" for outcome in outcomes)
        with guarded(self.directory), (self.directory / ROWS).open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        self.outcomes |= {outcome.row: outcome for outcome in outcomes}

    def remove(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def opened(directory: Path, request: Mapping[str, Any]) -> Iterator[Journal]:
    """Yield the journal of a run, begun or new. Raises OutputError for one that was begun with another request, that is
    damaged, or that another process has.
    """
    with alone_in(directory, doing="writing"):
        journal = Journal(directory)
        path = directory / REQUEST
        begin(path, request, what="a run", words=WORDS, is_new=not path.exists())
        with guarded(directory):
            _read_rows(journal)
        yield journal


def _read_rows(journal: Journal) -> None:
    """Read what there is, and cut off a line that was not written to its end."""
    path = journal.directory / ROWS
    if not path.exists():
        return
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(path, len(whole))
    try:
        outcomes = [Outcome(**json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError) as error:
        raise damaged(path) from error
    journal.outcomes = {outcome.row: outcome for outcome in outcomes}


def write_lines(target: Path, lines: Iterable[bytes]) -> None:
    """Write a file, all of it or nothing. Raises OutputError where the disk refuses."""
    with guarded(target):
        write_whole(target, lines)
