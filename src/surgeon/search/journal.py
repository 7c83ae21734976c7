"""What a search has measured, in search.json: written after every batch, so that a killed search goes on where it was.

The search is a function of what it measures. So it is run again from its beginning, and every batch that the file holds
is taken from there: it comes to the same answer.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.checkpoint.json_files import read_json
from surgeon.checkpoint.output import write_whole
from surgeon.errors import CheckpointError, OutputError
from surgeon.search.cuts import Candidate
from surgeon.search.figures import Figures

FILE = "search.json"
FORMAT = 1
MOST_BYTES = 200_000_000
# Measures cuts on the rows of a stage ("screen", "search", "watch" or the name of a text), a batch at a time.
Measure = Callable[[str, Sequence[Candidate]], list[Figures]]


@dataclass
class Journal:
    """The batches of a search in their order. `place` is the file, None for a search that is not to be resumed.

    `request` is what the search was begun with; `tables` are times and sizes that were measured beside the text.
    `seconds` is how long the batches took that the search has come to so far.
    """

    request: Mapping[str, Any]
    measure_new: Measure
    place: Path | None = None
    batches: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    _next: int = 0
    _known: dict[tuple[str, Candidate], Figures] = field(default_factory=dict)

    def measure(self, stage: str, candidates: Sequence[Candidate]) -> list[Figures]:
        """Return the figures of cuts on the rows of a stage; those of this stage that are known are not measured."""
        new = [each for each in dict.fromkeys(candidates) if (stage, each) not in self._known]
        if new:
            for candidate, figures in zip(new, self._batch(stage, new), strict=True):
                self._known[stage, candidate] = figures
        return [self._known[stage, candidate] for candidate in candidates]

    def measured(self, stage: str) -> dict[Candidate, Figures]:
        """Return all cuts that were measured in a stage, in their order."""
        return {candidate: figures for (at, candidate), figures in self._known.items() if at == stage}

    def _batch(self, stage: str, candidates: Sequence[Candidate]) -> list[Figures]:
        names = [entry_of(candidate) for candidate in candidates]
        if self._next < len(self.batches):
            batch = self.batches[self._next]
            if batch["stage"] == stage and batch["cuts"] == names:
                self._next += 1
                self.seconds += batch["seconds"]
                return [Figures.read(entry) for entry in batch["figures"]]
            del self.batches[self._next :]  # another version chose otherwise from here on
        began = time.monotonic()
        figures = self.measure_new(stage, candidates)
        took = time.monotonic() - began
        entries = [each.to_dict() for each in figures]
        self.batches.append({"stage": stage, "cuts": names, "figures": entries, "seconds": took})
        self._next += 1
        self.seconds += took
        self.write()
        return figures

    def to_dict(self) -> dict[str, Any]:
        """Return this as search.json holds it while a search goes on."""
        return {
            "format": FORMAT,
            "request": dict(self.request),
            "tables": dict(self.tables),
            "batches": self.batches,
        }

    def write(self, **more: Any) -> None:
        """Write the file, all of it or nothing. Raises OutputError where the disk refuses."""
        if self.place is not None:
            with _guarded(self.place):
                self.place.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.place, [json.dumps({**self.to_dict(), **more}, allow_nan=False).encode()])


def entry_of(candidate: Candidate) -> dict[str, Any]:
    """Return a cut as search.json holds it."""
    return {"pieces": list(candidate.pieces), "widths": dict(candidate.widths)}


def candidate_of(entry: Mapping[str, Any]) -> Candidate:
    """Return the cut of such an entry."""
    return Candidate(tuple(entry["pieces"]), tuple(entry["widths"].items()))


@contextmanager
def opened(place: Path | None, request: Mapping[str, Any], measure: Measure) -> Iterator[Journal]:
    """Yield the journal of a search, begun or new, which no other process may have meanwhile.

    Raises OutputError for a file that was begun with another request, or is damaged.
    """
    if place is None:
        yield Journal(request, measure)
        return
    from filelock import FileLock, Timeout

    with _guarded(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.parent / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            hint = "Wait for it, or choose another -o."
            raise OutputError(f"another process is searching in {place.parent}", hint=hint) from error
    try:
        yield _begun(place, request, measure)
    finally:
        lock.release()


def _begun(place: Path, request: Mapping[str, Any], measure: Measure) -> Journal:
    if not place.exists():
        return Journal(request, measure, place)
    again = f"Begin again: rm -r {place.parent}"
    try:
        content = read_json(place, most=MOST_BYTES)
    except CheckpointError as error:
        raise OutputError(f"{place} is damaged", hint=again) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("batches"), list):
        raise OutputError(f"{place} is damaged, or of another version of surgeon", hint=again)
    begun = content.get("request") or {}
    for name, value in request.items():
        if begun.get(name) != (value := json.loads(json.dumps(value))):
            told = f"{name.replace('_', ' ')} {begun.get(name)!r:.60}, not {value!r:.60}"
            raise OutputError(
                f"{place.parent} holds a search that was begun with {told}",
                hint=f"Give what it was begun with, choose another -o, or begin again: rm -r {place.parent}",
            )
    return Journal(request, measure, place, list(content["batches"]), dict(content.get("tables") or {}))


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Turn an error of the disk in this block into an OutputError."""
    try:
        yield
    except OSError as error:
        hint = f"Is the disk full, or not yours?  df -h {path.parent}"
        raise OutputError(f"cannot write {path}: {error.strerror}", hint=hint) from error
