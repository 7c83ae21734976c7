"""The documents of one --data argument: a file, a directory of files, a saved dataset, or one on the Hub."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from surgeon.data.formats import KINDS, Table, suffix_of, table_of, text_of_file
from surgeon.data.records import (
    FORMS_HINT,
    Columns,
    Document,
    Forms,
    Unread,
    Write,
    check_columns,
    chosen_columns,
    form_of,
)
from surgeon.errors import DataError
from surgeon.mistyped import hint_beside
from surgeon.text import sliced

_HUB_SPEC = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(:(?P<config>[^:]*)(:(?P<split>.+))?)?")
Read = TypeVar("Read")
Part = Table | Path  # of a data argument: records, or a text file


def documents(spec: str, columns: Columns | None = None) -> Iterator[Document]:
    """Return the documents of a file, of a directory's files in the order of their names, or of a dataset.

    A Hub dataset is written ORG/NAME[:CONFIG[:SPLIT]], its split being "train" if it is not named; a directory that
    `datasets` saved DIR, or DIR:SPLIT. A path that exists is preferred over a name on the Hub. SPEC[A:B] is a part of
    it: documents A to B, or 90% of them; of a .txt its characters, cut after a line. `columns` says which columns of
    records are read. Raises DataError: at once for a path that does not exist or cannot be read; for a damaged record,
    when it is reached; for a Hub dataset, with its first document.
    """
    name, first, last = sliced(spec)
    parts = _parts(name)
    if len(parts) == 1 and isinstance(parts[0], Path) and name != spec:
        return _at_least_one(_part_of_text(parts[0], spec, name, first, last), spec)
    if name == spec:
        return chain.from_iterable(_at_least_one(_documents(columns, part), _name(part)) for part in parts)
    return _at_least_one(_sliced(parts, partial(_documents, columns), spec), spec)


class Reading:
    """How the records of a command are read: by the columns that the user has chosen, remembering what is not read."""

    def __init__(self, columns: str | None = None) -> None:
        self._columns = chosen_columns(columns)
        self._unread = Unread()

    def documents(self, spec: str) -> Iterator[Document]:
        """Return the documents of a data argument, as `documents` does."""
        stream = documents(spec, self._columns)  # a wrong name is an error at once
        return self._seen(spec, stream)

    def _seen(self, spec: str, stream: Iterator[Document]) -> Iterator[Document]:
        for document in stream:
            self._unread.look(spec, document)
            yield document

    def notes(self, write: Write | None = None) -> tuple[str, ...]:
        """Return sentences about what was not read of the documents until now.

        That is columns, and with `write` also what of their chats the template does not write.
        """
        return tuple(self._unread.notes(write))


# --- what a name means ------------------------------------------------------------------------------------------------


def _parts(spec: str) -> Sequence[Part]:
    """Return the tables and text files that a data argument without a slice names. Raises DataError."""
    path = Path(spec)
    with suppress(RuntimeError):  # ~name of an unknown user
        path = path.expanduser()
    if os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises for a name that is too long
        return _saved(path, None) or [_part(file) for file in _files(path)]
    if os.path.exists(path):  # noqa: PTH110  # the same
        return [_part(path)]
    place, _, split = str(path).rpartition(":")
    if os.path.isdir(place) and (saved := _saved(Path(place), split)):  # noqa: PTH112
        return saved
    named = _HUB_SPEC.fullmatch(spec)
    if named is None or suffix_of(path) in _SUFFIXES:
        hint = "Name a file or directory that exists, or a dataset on the Hub: ORG/NAME[:CONFIG[:SPLIT]]."
        hint = hint_beside(spec, hint)
        raise DataError(f"no such file or directory: {spec}", hint=hint)
    if os.path.exists(named["id"]):  # noqa: PTH110  # datasets would read it
        hint = f"Leave out CONFIG and SPLIT: {named['id']}"
        raise DataError(f"{named['id']} is a local path; CONFIG and SPLIT are for a dataset on the Hub", hint=hint)
    from surgeon.data.datasets import hub_table

    return [hub_table(spec, named["id"], config=named["config"] or None, split=named["split"] or "train")]


def check_there(specs: Iterable[str]) -> None:
    """Raises DataError for data arguments that name no file, no directory and nothing that the Hub could have."""
    for spec in specs:
        documents(sliced(spec)[0])


def _saved(directory: Path, split: str | None) -> list[Part]:
    """Return the table of a directory that `datasets` saved, or of a split in it; nothing for any other directory."""
    from surgeon.data.datasets import saved_table

    table = saved_table(directory, split)
    return [] if table is None else [table]


def _files(directory: Path) -> list[Path]:
    """Return the files of a directory that can be read, sorted. Raises DataError when there are none."""
    try:
        inside = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read {directory}: {error.strerror}", hint=f"Look: ls -ld {directory}") from error
    files = [path for path in inside if path.is_file() and suffix_of(path) in _SUFFIXES]
    if not files:
        raise DataError(f"{directory} has no file of data", hint=f"surgeon reads {KINDS}, not in directories below it.")
    return files


_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


def _part(path: Path) -> Part:
    """Return a file as its table, or itself if it is a text. Raises DataError for a file of another kind."""
    if suffix_of(path) not in _SUFFIXES:
        raise DataError(f"{path} is of no kind that surgeon reads", hint=f"Name it by what it is: {KINDS}.")
    return table_of(path) or path


def _name(part: Part) -> str:
    return str(part) if isinstance(part, Path) else part.name


# --- documents --------------------------------------------------------------------------------------------------------


def _documents(columns: Columns | None, part: Part, first: int = 0, last: int | None = None) -> Iterator[Document]:
    """Yield documents `first` to `last` - 1 of a table, or of a text file, which is one document."""
    if isinstance(part, Path):
        if first == 0 and last != 0:
            yield Document(str(part), (text_of_file(part),))
        return
    names: list[str] = []

    def choose(given: Sequence[str]) -> list[str]:
        names[:] = given
        return form_of(given, part.name, columns).columns

    forms: Forms | None = None
    for where, record in part.read(choose, first, last):
        forms = forms or Forms(columns, names or None)
        yield forms.of(record, where).document(record, where, padded=part.padded)


def _sliced(
    parts: Sequence[Part], read: Callable[[Part, int, int | None], Iterator[Read]], spec: str
) -> Iterator[Read]:
    """Yield what `read` yields of SPEC[A:B]; one table is asked for this part of it alone."""
    name, first, last = sliced(spec)
    total = None
    if "%" in first + last:
        counts = [1 if isinstance(part, Path) else part.count() for part in parts]
        if None in counts:
            hint = f"Count them yourself: {name}[:1000] reads the first 1,000."
            raise DataError(f"{spec}: the Hub does not say how many rows {name} has, so it has no percents", hint=hint)
        total = sum(count or 0 for count in counts)

    def place(edge: str) -> int:
        return total * int(edge[:-1]) // 100 if total is not None and edge.endswith("%") else int(edge)

    start, stop = place(first or "0"), place(last) if last else None
    if stop is not None and stop <= start:
        return
    if len(parts) == 1:
        yield from read(parts[0], start, stop)
    else:
        yield from islice(chain.from_iterable(read(part, 0, None) for part in parts), start, stop)


def _part_of_text(path: Path, spec: str, name: str, first: str, last: str) -> Iterator[Document]:
    """Yield a part of a text file's text as one document, or nothing where the part is empty."""
    if any(edge and not edge.endswith("%") for edge in (first, last)):
        raise DataError(f"{spec}: a text has no documents to count", hint=f"Write percents: {name}[:90%]")
    whole = text_of_file(path)
    start, end = (_line_after(whole, edge, default) for edge, default in ((first, 0), (last, 100)))
    if whole[start:end].strip():
        yield Document(spec, (whole[start:end],))


def _line_after(whole: str, edge: str, default: int) -> int:
    """Return the place in a text that is a percentage of its characters, moved on to the beginning of a line."""
    percent = min(100, int(edge[:-1])) if edge else default
    place = len(whole) * percent // 100
    if place in (0, len(whole)):
        return place
    return whole.find("\n", place - 1) + 1 or len(whole)


def _at_least_one(rows: Iterator[Document], name: str) -> Iterator[Document]:
    """Yield the documents. Raises DataError when there are none."""
    first = next(rows, None)
    if first is None:
        raise DataError(f"0 documents in {name}", hint=FORMS_HINT)
    yield first
    yield from rows


# --- records of a form of their own -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordForm:
    """A form that one metric reads: its fields, what records in it are called, and a hint that shows one."""

    fields: tuple[str, ...]
    what: str
    counted: str
    hint: str


def records(
    specs: Sequence[str], form: RecordForm, *, samples: int | None, columns: Columns | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the fields of the first `samples` records, of all with None, each with its place.

    Raises DataError, with the form's hint, for a text, a record that is no object with all fields, and where there is
    none.
    """
    read = {name: (columns or {}).get(name, name) for name in form.fields}

    def choose(names: Sequence[str]) -> list[str]:
        return [column for column in read.values() if column in names]

    def fields_in(part: Part, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if isinstance(part, Path):
            raise DataError(f"{part} is a text; {form.what} are read from records", hint=form.hint)
        for where, record in part.read(choose, start, stop):
            if not isinstance(record, dict):
                raise DataError(f"{where} is no object", hint=form.hint)
            if columns is not None:
                check_columns(read.values(), record, where)
            if lacking := next((column for column in read.values() if column not in record), None):
                has = ", ".join(map(repr, record)) or "nothing"
                raise DataError(f"{where} has no {lacking!r}, only {has}", hint=form.hint)
            yield where, {field: record[column] for field, column in read.items()}

    named = [(spec, _parts(sliced(spec)[0])) for spec in specs]  # a wrong name is an error at once
    streams = (
        _sliced(parts, fields_in, spec) if sliced(spec)[0] != spec else chain.from_iterable(map(fields_in, parts))
        for spec, parts in named
    )
    is_empty = True
    for found in islice(chain.from_iterable(streams), samples):
        yield found
        is_empty = False
    if is_empty:
        raise DataError(f"0 {form.counted} in {', '.join(specs)}", hint=form.hint)
