"""Files of data as tables of records: lines of JSON, a JSON array, csv and tsv, parquet; packed by gzip or zstd.

Everything but a .txt and a .json array is read record by record, so a file may be larger than memory.
"""

import codecs
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from surgeon.errors import DataError, first_line

KINDS = ".txt, .jsonl, .json, .csv, .tsv (each also .gz or .zst) and .parquet"
RECORD_HINT = 'Write one record per line: {"text": "..."}'
INSTALL_HINT = 'pip install "surgeon[data]"'
PARQUET_ROWS = 256  # decoded at a time
MOST_CHARACTERS = 1 << 30  # of a field of a .csv
PACKED = (".gz", ".zst")

Record = tuple[str, Any]  # its place, "data.jsonl:1", and what was read
Choose = Callable[[Sequence[str]], list[str]]  # from the columns that there are, those that are read


@dataclass(frozen=True)
class Table:
    """The records of one file or dataset.

    `read` yields records `first` to `last` - 1, to the end with None. `count` returns how many there are, None where
    only reading them all would tell. `names` returns the columns where all records have the same; of these, `read`
    takes those that `choose` returns. `padded`: objects in a record have every key of those in other records, as null.
    """

    name: str
    read: Callable[[Choose, int, int | None], Iterator[Record]]
    count: Callable[[], int | None]
    names: Callable[[], list[str]] | None = None
    padded: bool = False


def needed(module: str, purpose: str) -> ModuleType:
    """Return a module of the extra `data`. Raises DataError when it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module if module.startswith("backports.") else module.partition(".")[0]
        raise DataError(f"{package} is needed to read {purpose}", hint=INSTALL_HINT) from error


def suffix_of(path: Path) -> str:
    """Return the suffix that says what a file holds, without that of its packing: ".jsonl" of "a.jsonl.gz"."""
    name = path.name.lower()
    packing = next((packed for packed in PACKED if name.endswith(packed)), "")
    suffix = Path(name.removesuffix(packing)).suffix
    return "" if packing and suffix == ".parquet" else suffix


def table_of(path: Path) -> Table | None:
    """Return the records of a file by its suffix; None for a .txt, which is one document, and for other kinds."""
    suffix, name = suffix_of(path), str(path)
    if suffix == ".parquet":
        return Table(name, partial(_parquet_records, path), partial(_parquet_count, path), _parquet_names(path), True)
    if suffix not in _READERS:
        return None
    read = _READERS[suffix]

    def part(choose: Choose, first: int, last: int | None) -> Iterator[Record]:
        return islice(read(path), first, last)

    return Table(name, part, lambda: sum(1 for _ in read(path)))


def text_of_file(path: Path) -> str:
    """Return a text file's text, unchanged except for a BOM, which is removed. Raises DataError."""
    with opened(path) as file:
        raw = file.read()
    return decoded(raw, path).removeprefix("\ufeff")


# --- JSON -------------------------------------------------------------------------------------------------------------


def json_lines(path: Path, *, hint: str = RECORD_HINT) -> Iterator[Record]:
    """Yield the records of a file with one on each line that is not empty, each with its place: "data.jsonl:1".

    Raises DataError for a file that cannot be read, and with `hint` for a line that is not JSON.
    """
    offset = 0
    with opened(path) as file:
        for number, raw in enumerate(file, start=1):  # split at b"\n" only: U+2028 may stand inside a string
            line = decoded(raw, path, offset=offset)
            offset += len(raw)
            line = (line.removeprefix("\ufeff") if number == 1 else line).rstrip("\r\n")
            if line.strip(" \t\r"):
                yield f"{path}:{number}", _parsed(line, path, number, hint=hint)


def _array_or_lines(path: Path) -> Iterator[Record]:
    """Yield the records of a JSON array, which is read as a whole, or of a file with one record on each line."""
    with opened(path) as file:
        begun = (line.lstrip(codecs.BOM_UTF8 + b" \t\r\n") for line in file)
        first = next(filter(None, begun), b"")
    if not first.startswith(b"["):
        yield from json_lines(path)
        return
    with opened(path) as file:
        text = decoded(file.read(), path).removeprefix("\ufeff")
    for index, record in enumerate(_parsed(text, path)):
        yield f"{path}[{index}]", record


def _parsed(text: str, path: Path, line: int = 1, *, hint: str = RECORD_HINT) -> Any:
    """Return the JSON that begins on `line` of the file. Raises DataError with the place of the first error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}:{error.colno}"
        raise DataError(f"{place}: {error.msg}", hint=hint) from error
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise DataError(f"{path}:{line}: {error}", hint="Take the record out.") from error


# --- csv --------------------------------------------------------------------------------------------------------------


def _csv_records(path: Path) -> Iterator[Record]:
    """Yield the rows of a .csv or .tsv below its header, each with the line on which it begins. All values are texts.

    Raises DataError for a row with more or fewer values than the header, and for a header with a name twice.
    """
    limit = csv.field_size_limit(MOST_CHARACTERS)
    separator = "\t" if suffix_of(path) == ".tsv" else ","
    try:
        with opened(path) as file:
            rows = csv.reader(_decoded_lines(file, path), delimiter=separator, strict=True)
            header = next(rows, None)
            if header is None:
                return
            if twice := next((name for name in header if header.count(name) > 1), None):
                raise DataError(f"{path}:1: the column {twice!r} stands twice in the header", hint="Rename one.")
            line = rows.line_num + 1
            for row in rows:
                if row:
                    if len(row) != len(header):
                        raise DataError(
                            f"{path}:{line} has {len(row)} values, and the header has {len(header)}",
                            hint='Put a value with a comma, a quote or a line break into quotes: "a, b"',
                        )
                    yield f"{path}:{line}", dict(zip(header, row, strict=True))
                line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}: {error}", hint="Write it anew as .jsonl, which has no quotes to close.") from error
    finally:
        csv.field_size_limit(limit)


def _decoded_lines(file: IO[bytes], path: Path) -> Iterator[str]:
    offset = 0
    for number, raw in enumerate(file):
        line = decoded(raw, path, offset=offset)
        offset += len(raw)
        yield line if number else line.removeprefix("\ufeff")


# --- parquet ----------------------------------------------------------------------------------------------------------


def _parquet_records(path: Path, choose: Choose, first: int, last: int | None) -> Iterator[Record]:
    """Yield rows of a parquet file, of which only the chosen columns are read, and only the groups that hold them."""
    with _parquet(path) as file:
        columns, groups, place, end = choose(file.schema_arrow.names), list[int](), 0, 0
        for group in range(file.num_row_groups):
            begin, end = end, end + file.metadata.row_group(group).num_rows
            if end > first and (last is None or begin < last):
                place = place if groups else begin
                groups.append(group)
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups, columns=columns) if groups else ():
            for record in batch.to_pylist():
                if first <= place and (last is None or place < last):
                    yield f"{path}[{place}]", record
                place += 1


def _parquet_names(path: Path) -> Callable[[], list[str]]:
    def names() -> list[str]:
        with _parquet(path) as file:
            return list(file.schema_arrow.names)

    return names


def _parquet_count(path: Path) -> int:
    with _parquet(path) as file:
        return int(file.metadata.num_rows)


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Yield a parquet file. Raises DataError for what goes wrong in the block."""
    parquet, library = needed("pyarrow.parquet", str(path)), needed("pyarrow", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (library.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {first_line(error)}", hint="Fetch or write the file again.") from error


# --- reading ----------------------------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to read from, unpacked if it is a .gz or .zst. Raises DataError for what goes wrong in the block."""
    opener, failures = _unpacked(path)
    try:
        with opener(path, "rb") as file:
            yield file
    except failures as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise DataError(f"cannot read {path}: {reason}", hint=f"Look at it: ls -l {path}") from error


def _unpacked(path: Path) -> tuple[Callable[..., IO[bytes]], tuple[type[Exception], ...]]:
    """Return the function that opens a file, by the suffix of its packing, and the errors of reading it."""
    packing = path.suffix.lower()
    if packing == ".zst":
        zstd = needed("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", str(path))
        return zstd.open, (OSError, EOFError, zstd.ZstdError)
    if packing == ".gz":
        return gzip.open, (OSError, EOFError, zlib.error)  # type: ignore[return-value]
    return open, (OSError,)


def decoded(raw: bytes, path: Path, *, offset: int = 0) -> str:
    """Return the bytes that stand `offset` bytes into the file as text. Raises DataError when they are not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: {error.reason} at byte {offset + error.start}",
            hint=f"Convert it, if you know its encoding: iconv -f ENCODING -t UTF-8 {path}",
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": json_lines,
    ".json": _array_or_lines,
    ".csv": _csv_records,
    ".tsv": _csv_records,
}
