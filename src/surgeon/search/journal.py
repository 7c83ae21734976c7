"""What a search has measured, in search.json: written after every batch, so that a killed search goes on where it was.

The search is a function of what it measures. So it is run again from its beginning, and takes from the file what that
holds: it comes to the same answer. What a cut is worth does not depend on a target, so a search for another one of the
same model on the same texts takes from the file too.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.checkpoint.begun import check_same, damaged, read_kept
from surgeon.checkpoint.output import LOCK, alone_in, guarded, write_whole
from surgeon.checkpoint.source import SEARCH
from surgeon.processes import speaks, told_by_the_first
from surgeon.search.cuts import Candidate
from surgeon.search.figures import Figures

FILE = SEARCH
FORMAT = 1
# What a search that goes on must have been begun with, in words; all other entries of a request are options.
_WORDS = {"model": "another MODEL", "texts": "other texts", "rows": "other numbers of rows or tokens"}
MOST_BYTES = 200_000_000
# Measures cuts on the rows of a stage ("screen", "search", "watch" or the name of a text), a batch at a time.
Measure = Callable[[str, Sequence[Candidate]], list[Figures]]


@dataclass
class Journal:
    """The cuts that were measured. `place` is the file, None for a search that is not to be resumed.

    `request` is what decides the figures; `tables` are times and sizes that were measured beside the text. `seconds`
    is how long the measuring took of all that this search has come to so far, be it by an earlier process. Where cuts
    are repaired, but in the stages that are `bare`, they have entries of their own.
    """

    request: Mapping[str, Any]
    measure_new: Measure
    place: Path | None = None
    entries: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    repaired: bool = False
    bare: tuple[str, ...] = ()
    _stored: dict[tuple[str, Candidate], tuple[Figures, float]] = field(init=False)
    _come_to: dict[tuple[str, Candidate], Figures] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stored = {
            (entry["stage"], candidate_of(entry)): (Figures.read(entry["figures"]), float(entry["seconds"]))
            for entry in self.entries
        }

    def measure(self, stage: str, candidates: Sequence[Candidate]) -> list[Figures]:
        """Return the figures of cuts on the rows of a stage; those that the file holds are not measured again."""
        name = self._name(stage)
        new = [each for each in dict.fromkeys(candidates) if (name, each) not in self._stored]
        if new:
            self._add(stage, name, new)
        for each in candidates:
            if (stage, each) not in self._come_to:
                self._come_to[stage, each], seconds = self._stored[name, each]
                self.seconds += seconds
        return [self._come_to[stage, each] for each in candidates]

    def _name(self, stage: str) -> str:
        return f"{stage}, repaired" if self.repaired and stage not in self.bare else stage

    def measured(self, stage: str) -> dict[Candidate, Figures]:
        """Return all cuts that this search has come to in a stage, in their order."""
        return {candidate: figures for (at, candidate), figures in self._come_to.items() if at == stage}

    def _add(self, stage: str, name: str, candidates: Sequence[Candidate]) -> None:
        began = time.monotonic()
        found = self.measure_new(stage, candidates)
        each_took = _agreed((time.monotonic() - began) / len(candidates))
        for candidate, figures in zip(candidates, found, strict=True):
            self._stored[name, candidate] = (figures, each_took)
            entry = {
                "stage": name,
                **entry_of(candidate),
                "figures": figures.to_dict(),
                "seconds": each_took,
            }
            self.entries.append(entry)
        self.write()

    def write(self) -> None:
        """Write the file, all of it or nothing. Raises OutputError where the disk refuses."""
        if self.place is None or not speaks():
            return
        content = {
            "format": FORMAT,
            "request": dict(self.request),
            "tables": dict(self.tables),
            "measured": self.entries,
        }
        with guarded(self.place):
            self.place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.place, [json.dumps(content).encode()])


def _agreed(seconds: float) -> float:
    """Return the first process's number of seconds: all have to stop at one place."""
    told = told_by_the_first(json.dumps(seconds).encode())
    assert told is not None, "the first has a clock"
    return float(json.loads(told))


def remove(directory: Path) -> None:
    """Remove the state of a search; a directory that holds anything else stays with that."""
    if not speaks():
        return
    for name in (FILE, LOCK):
        (directory / name).unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()


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
    if not speaks():
        yield _begun(place, request, measure)
        return
    with alone_in(place.parent, doing="searching in"):
        yield _begun(place, request, measure)


def _begun(place: Path, request: Mapping[str, Any], measure: Measure) -> Journal:
    own = read_kept(place, most=MOST_BYTES) if speaks() and place.exists() else None
    told = told_by_the_first(None if own is None else json.dumps(own).encode())
    if told is None:
        return Journal(request, measure, place)
    content = json.loads(told)
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or not isinstance(content.get("measured"), list)
    ):
        raise damaged(place)
    check_same(content.get("request"), request, place.parent, what="a search", words=_WORDS)
    try:
        return Journal(request, measure, place, list(content["measured"]), dict(content.get("tables") or {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(place) from error
