"""The documents of one --data argument: a file, a directory of files, or a dataset on the Hub.

Everything but a .txt and a .json array is read record by record, so a file may be larger than memory.
"""

import codecs
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from surgeon.data.records import FORMS_HINT, Document, document, fields_of
from surgeon.errors import DataError, first_line
from surgeon.mistyped import hint_beside
from surgeon.text import sliced

KINDS = ".txt, .jsonl, .json (each also .gz) and .parquet"
RECORD_HINT = 'Write one record per line: {"text": "..."}'
PARQUET_ROWS = 256  # decoded at a time
_HUB_SPEC = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(:(?P<config>[^:]*)(:(?P<split>.+))?)?")


def documents(spec: str) -> Iterator[Document]:
    """Return the documents of a file, of a directory's files in the order of their names, or of a Hub dataset.

    A Hub dataset is written ORG/NAME[:CONFIG[:SPLIT]], its split being "train" if it is not named. A path that exists
    is preferred over such a name. SPEC[A:B] is a part of it: documents A to B, or 90% of them; of a .txt its
    characters, cut after a line. Raises DataError: at once for a path that does not exist or cannot be read; for a
    damaged record, when it is reached; for a Hub dataset, with its first document.
    """
    name, first, last = sliced(spec)
    if name != spec:
        return _part(spec, name, first, last)
    path = Path(spec)
    with suppress(RuntimeError):  # ~name of an unknown user
        path = path.expanduser()
    if os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises for a name that is too long
        return chain.from_iterable(map(_file_documents, _files(path)))
    if os.path.exists(path):  # noqa: PTH110  # the same
        _reader(path)
        return _file_documents(path)
    named = _HUB_SPEC.fullmatch(spec)
    if named is None or _reader_or_none(path):
        hint = "Name a file or directory that exists, or a dataset on the Hub: ORG/NAME[:CONFIG[:SPLIT]]."
        hint = hint_beside(spec, hint)
        raise DataError(f"no such file or directory: {spec}", hint=hint)
    if os.path.exists(named["id"]):  # noqa: PTH110  # datasets would read it
        hint = f"Leave out CONFIG and SPLIT: {named['id']}"
        raise DataError(f"{named['id']} is a local path; CONFIG and SPLIT are for a dataset on the Hub", hint=hint)

    rows = hub_documents(spec, named["id"], config=named["config"] or None, split=named["split"] or "train")
    return _at_least_one(rows, spec)


def check_there(specs: Iterable[str]) -> None:
    """Raises DataError for data arguments that name no file, no directory and nothing that the Hub could have."""
    for spec in specs:
        documents(sliced(spec)[0])


def _part(spec: str, name: str, first: str, last: str) -> Iterator[Document]:
    """Return the documents of SPEC[A:B]; of a .txt, which is one document, a part of its text."""
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    if os.path.isfile(path) and _reader(path) is _text:  # noqa: PTH113  # Path.is_file raises for a name too long
        if any(edge and not edge.endswith("%") for edge in (first, last)):
            raise DataError(f"{spec}: a text has no documents to count", hint=f"Write percents: {name}[:90%]")
        document = next(_text(path))
        whole = document.parts[0]
        start, end = (_line_after(whole, edge, default) for edge, default in ((first, 0), (last, 100)))
        return _at_least_one(iter([Document(spec, (whole[start:end],))] if whole[start:end].strip() else []), spec)
    stream = documents(name)
    total = sum(1 for _ in documents(name)) if "%" in first + last else 0

    def place(edge: str, default: int | None) -> int | None:
        if not edge:
            return default
        return total * int(edge[:-1]) // 100 if edge.endswith("%") else int(edge)

    return _at_least_one(islice(stream, place(first, 0), place(last, None)), spec)


def _line_after(whole: str, edge: str, default: int) -> int:
    """Return the place in a text that is a percentage of its characters, moved on to the beginning of a line."""
    percent = min(100, int(edge[:-1])) if edge else default
    place = len(whole) * percent // 100
    if place in (0, len(whole)):
        return place
    return whole.find("\n", place - 1) + 1 or len(whole)


def needed(module: str, purpose: str) -> ModuleType:
    """Return a module of the extra `data`. Raises DataError when it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"{package} is needed to read {purpose}", hint='pip install "surgeon[data]"') from error


def _files(directory: Path) -> list[Path]:
    """Return the files of a directory that can be read, sorted. Raises DataError when there are none."""
    try:
        inside = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read {directory}: {error.strerror}", hint=f"Look: ls -ld {directory}") from error
    files = [path for path in inside if path.is_file() and _reader_or_none(path)]
    if not files:
        raise DataError(f"{directory} has no file of data", hint=f"surgeon reads {KINDS}, not in directories below it.")
    return files


def _file_documents(path: Path) -> Iterator[Document]:
    return _at_least_one(_reader(path)(path), str(path))


def _at_least_one(rows: Iterator[Document], name: str) -> Iterator[Document]:
    """Yield the documents. Raises DataError when there are none."""
    first = next(rows, None)
    if first is None:
        raise DataError(f"0 documents in {name}", hint=FORMS_HINT)
    yield first
    yield from rows


def _reader(path: Path) -> Callable[[Path], Iterator[Document]]:
    """Return the function that reads files of this kind. Raises DataError when there is none."""
    reader = _reader_or_none(path)
    if reader is None:
        raise DataError(f"{path} is of no kind that surgeon reads", hint=f"Name it by what it is: {KINDS}.")
    return reader


def _reader_or_none(path: Path) -> Callable[[Path], Iterator[Document]] | None:
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return None if name.endswith(".parquet.gz") else _READERS.get(suffix)


def _text(path: Path) -> Iterator[Document]:
    """Yield the one document of a text file: unchanged except for a BOM, which is removed."""
    with _opened(path) as file:
        raw = file.read()
    yield Document(str(path), (_decoded(raw, path).removeprefix("\ufeff"),))


def json_lines(path: Path, *, hint: str = RECORD_HINT) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file with one on each line that is not empty, each with its place: "data.jsonl:1".

    Raises DataError for a file that cannot be read, and with `hint` for a line that is not JSON.
    """
    offset = 0
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):  # split at b"\n" only: U+2028 may stand inside a string
            line = _decoded(raw, path, offset=offset)
            offset += len(raw)
            line = (line.removeprefix("\ufeff") if number == 1 else line).rstrip("\r\n")
            if line.strip(" \t\r"):
                yield f"{path}:{number}", _parsed(line, path, number, hint=hint)


def json_records(
    specs: Sequence[str], keys: Sequence[str], *, samples: int | None, what: str, counted: str, hint: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the first `samples` records of .jsonl files, all of them with None, each with its place.

    Raises DataError, with `hint`, for another file, a record that is no object with all `keys`, and where there is
    none. `what` is read from such files, and `counted` is what a record is.
    """
    for spec in specs:
        if Path(spec).suffix != ".jsonl":
            raise DataError(f"{spec} is no .jsonl file, which {what} are read from", hint=hint)
    lines = chain.from_iterable(json_lines(Path(spec), hint=hint) for spec in specs)
    is_empty = True
    for where, record in islice(lines, samples):
        if not isinstance(record, dict):
            raise DataError(f"{where} is no object", hint=hint)
        if lacking := next((key for key in keys if key not in record), None):
            has = ", ".join(map(repr, record)) or "nothing"
            raise DataError(f"{where} has no {lacking!r}, only {has}", hint=hint)
        yield where, record
        is_empty = False
    if is_empty:
        raise DataError(f"0 {counted} in {', '.join(specs)}", hint=hint)


def _lines(path: Path) -> Iterator[Document]:
    """Yield the documents of a file with one record on each line that is not empty."""
    return (document(record, where) for where, record in json_lines(path))


def _array_or_lines(path: Path) -> Iterator[Document]:
    """Yield the records of a JSON array, which is read as a whole, or of a file with one record on each line."""
    with _opened(path) as file:
        begun = (line.lstrip(codecs.BOM_UTF8 + b" \t\r\n") for line in file)
        first = next(filter(None, begun), b"")
    if not first.startswith(b"["):
        yield from _lines(path)
        return
    with _opened(path) as file:
        text = _decoded(file.read(), path).removeprefix("\ufeff")
    for index, record in enumerate(_parsed(text, path)):
        yield document(record, f"{path}[{index}]")


def _parquet(path: Path) -> Iterator[Document]:
    """Yield the rows of a parquet file, of which only the columns with the text are read."""
    parquet, library = needed("pyarrow.parquet", str(path)), needed("pyarrow", str(path))
    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = fields_of(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for record in batch.to_pylist():
                    yield document(record, f"{path}[{index}]")
                    index += 1
    except (library.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = first_line(error)
        raise DataError(f"cannot read {path}: {reason}", hint="Fetch or write the file again.") from error


_READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".txt": _text,
    ".jsonl": _lines,
    ".json": _array_or_lines,
    ".parquet": _parquet,
}


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to read from, unpacked if it is a .gz. Raises DataError for what goes wrong in the block."""
    opener: Callable[..., IO[bytes]] = gzip.open if path.suffix.lower() == ".gz" else open  # type: ignore[assignment]
    try:
        with opener(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise DataError(f"cannot read {path}: {reason}", hint=f"Look at it: ls -l {path}") from error


def _decoded(raw: bytes, path: Path, *, offset: int = 0) -> str:
    """Return the bytes that stand `offset` bytes into the file as text. Raises DataError when they are not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: {error.reason} at byte {offset + error.start}",
            hint=f"Convert it, if you know its encoding: iconv -f ENCODING -t UTF-8 {path}",
        ) from error


def _parsed(text: str, path: Path, line: int = 1, *, hint: str = RECORD_HINT) -> Any:
    """Return the JSON that begins on `line` of the file. Raises DataError with the place of the first error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}:{error.colno}"
        raise DataError(f"{place}: {error.msg}", hint=hint) from error
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise DataError(f"{path}:{line}: {error}", hint="Take the record out.") from error


_FAILURES = (OSError, ValueError, RuntimeError, KeyError, ImportError)


def hub_documents(spec: str, repo_id: str, *, config: str | None, split: str) -> Iterator[Document]:
    """Yield the documents of one split; only the documents that are used are downloaded.

    Under HF_HUB_OFFLINE it is read from the cache of `datasets`, which streaming does not fill. Raises DataError.
    """
    datasets = needed("datasets", f"{repo_id} from the Hub")
    with _explained(spec, repo_id), _quiet_datasets():
        rows = datasets.load_dataset(repo_id, config, split=split, streaming=not datasets.config.HF_HUB_OFFLINE)
        if rows.column_names:  # known before the first row is read: then nothing else has to be decoded
            rows = rows.select_columns(fields_of(rows.column_names, spec))
        for index, record in enumerate(rows):
            yield document(record, f"{spec}[{index}]")


@contextmanager
def _explained(spec: str, repo_id: str) -> Iterator[None]:
    """Turn an error of `datasets` in this block into a DataError.

    Errors of huggingface_hub, pyarrow and the decoders of columns pass through `datasets` unchanged.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP library that it uses
    from pyarrow import ArrowException

    try:
        yield
    except (*_FAILURES, DatasetsError, HTTPError, ArrowException) as error:
        raise _explanation(error, spec, repo_id) from error


def _explanation(error: Exception, spec: str, repo_id: str) -> DataError:
    """Return the error that the user sees."""
    from datasets import config
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    reason = first_line(error)
    if config.HF_HUB_OFFLINE and isinstance(error, ConnectionError):
        return DataError(
            f"{repo_id} is not in the cache of datasets, and HF_HUB_OFFLINE is set",
            hint="Unset HF_HUB_OFFLINE, or name a file.",
        )
    if isinstance(error, DatasetNotFoundError) and "is a gated dataset" not in reason:
        return DataError(
            f"the Hub has no dataset {repo_id}, or does not show it to you; nor is there a file of that name",
            hint="Check the name; if it is private, log in with `hf auth login`, or set HF_TOKEN.",
        )
    is_transport = isinstance(error, (ConnectionError, HTTPError)) and not isinstance(error, HfHubHTTPError)
    if is_transport:
        return DataError(
            f"cannot reach the Hub at {config.HF_ENDPOINT} for {repo_id}: {reason}",
            hint="Check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 makes do with what is cached.",
        )
    return DataError(
        f"cannot read {spec} from the Hub: {reason}",
        hint=f"See {config.HF_ENDPOINT}/datasets/{repo_id}; CONFIG and SPLIT are written ORG/NAME:CONFIG:SPLIT.",
    )


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep `datasets` from logging, and from drawing bars where standard error is no terminal."""
    import datasets

    log: Any = datasets.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)  # errors are logged before they are raised
    if not sys.stderr.isatty():
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
