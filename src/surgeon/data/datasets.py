"""Datasets of the library `datasets` as tables of records: those on the Hub, streamed, and those that it has saved."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgeon.data.formats import Choose, Record, Table, needed
from surgeon.errors import DataError, first_line

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk writes, and what it writes of several
_FAILURES = (OSError, ValueError, RuntimeError, KeyError, ImportError)


def hub_table(spec: str, repo_id: str, *, config: str | None, split: str) -> Table:
    """Return the rows of one split on the Hub; only those that are used are downloaded, and none of them is stored.

    Under HF_HUB_OFFLINE it is read from the cache of `datasets`, which streaming does not fill. Its methods raise
    DataError.
    """

    def dataset() -> Any:
        datasets = needed("datasets", f"{repo_id} from the Hub")
        return datasets.load_dataset(repo_id, config, split=split, streaming=not datasets.config.HF_HUB_OFFLINE)

    def read(choose: Choose, first: int, last: int | None) -> Iterator[Record]:
        needed("datasets", f"{repo_id} from the Hub")
        with _explained(spec, repo_id), _quiet_datasets():
            yield from _rows(dataset(), spec, choose, first, last)

    def count() -> int | None:
        needed("datasets", f"{repo_id} from the Hub")
        with _explained(spec, repo_id), _quiet_datasets():
            rows = dataset()
            known = (rows.info.splits or {}).get(split)
            number = len(rows) if hasattr(rows, "__len__") else getattr(known, "num_examples", None)
            return number or None

    return Table(spec, read, count, padded=True)


def _rows(rows: Any, name: str, choose: Choose, first: int, last: int | None) -> Iterator[Record]:
    """Yield rows `first` to `last` - 1 of a Dataset or an IterableDataset; only the chosen columns are read."""
    if rows.column_names:  # known before the first row is read: then nothing else has to be decoded
        rows = rows.select_columns(choose(rows.column_names))
    rows = rows.skip(first) if first else rows
    rows = rows if last is None else rows.take(max(0, last - first))
    for index, record in enumerate(rows, start=first):
        yield f"{name}[{index}]", record


# --- saved by save_to_disk --------------------------------------------------------------------------------------------


def saved_table(directory: Path, split: str | None) -> Table | None:
    """Return the rows of a directory that `save_to_disk` wrote, of several splits those of one; None for any other.

    Raises DataError for a split that is not there, and where there are several and none is named.
    """
    if (directory / SAVED_SPLITS).is_file():
        splits = _splits(directory / SAVED_SPLITS)
        named = " or ".join(f"{directory}:{name}" for name in splits[:4])
        if split is None:
            raise DataError(f"{directory} holds the splits {', '.join(splits)}", hint=f"Name one: {named}")
        if split not in splits:
            raise DataError(f"{directory} has no split {split!r}", hint=f"Name one that it has: {named}")
        directory /= split
    elif (directory / SAVED).is_file():
        if split is not None:
            raise DataError(f"{directory} is one dataset, without splits", hint=f"Leave out the split: {directory}")
    else:
        return None
    name = str(directory)

    def dataset() -> Any:
        return needed("datasets", name).load_from_disk(name)

    def read(choose: Choose, first: int, last: int | None) -> Iterator[Record]:
        needed("datasets", name)
        with _readable(name), _quiet_datasets():
            rows = dataset()
            yield from _rows(rows, name, choose, min(first, len(rows)), None if last is None else min(last, len(rows)))

    def count() -> int:
        needed("datasets", name)
        with _readable(name), _quiet_datasets():
            return len(dataset())

    return Table(name, read, count, padded=True)


def _splits(file: Path) -> list[str]:
    """Return the names of the splits that a file lists: each is a directory beside it."""
    try:
        names = json.loads(file.read_bytes())["splits"]
        if not names or not all(isinstance(name, str) and Path(name).name == name != "" for name in names):
            raise ValueError("no list of names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file} is damaged: {error}", hint="Save the dataset again.") from error
    return list(names)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn an error of `datasets` about a saved dataset in this block into a DataError."""
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        yield
    except (*_FAILURES, TypeError, DatasetsError, ArrowException) as error:
        raise DataError(f"cannot read {name}: {first_line(error)}", hint="Save the dataset again.") from error


# --- errors and logs --------------------------------------------------------------------------------------------------


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
