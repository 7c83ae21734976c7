"""The documents of a dataset on the Hub, through the `datasets` library."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from surgeon.data.documents import needed
from surgeon.data.records import Document, document, fields_of
from surgeon.errors import DataError

_FAILURES = (OSError, ValueError, RuntimeError, KeyError, ImportError)


def hub_documents(spec: str, repo_id: str, *, config: str | None, split: str) -> Iterator[Document]:
    """Yield the documents of one split, of which no more is downloaded than is asked for.

    Under HF_HUB_OFFLINE it is read from the cache of `datasets`, which streaming does not fill. Raises DataError.
    """
    datasets = needed("datasets", f"{repo_id} from the Hub")
    with _explained(spec, repo_id), _hushed():
        rows = datasets.load_dataset(repo_id, config, split=split, streaming=not datasets.config.HF_HUB_OFFLINE)
        if rows.column_names:  # known before the first row is read: then nothing else has to be decoded
            rows = rows.select_columns(fields_of(rows.column_names, spec))
        for index, record in enumerate(rows):
            yield document(record, f"{spec}[{index}]")


@contextmanager
def _explained(spec: str, repo_id: str) -> Iterator[None]:
    """Turn every failure of `datasets` in this block into one DataError.

    What huggingface_hub, pyarrow and the decoders of columns raise comes through it as it is.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP library that it uses
    from pyarrow import ArrowException

    try:
        yield
    except (*_FAILURES, DatasetsError, HTTPError, ArrowException) as error:
        raise _explanation(error, spec, repo_id) from error


def _explanation(error: Exception, spec: str, repo_id: str) -> DataError:
    """Return the failure in the user's words."""
    from datasets import config
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if config.HF_HUB_OFFLINE and isinstance(error, ConnectionError):
        return DataError(
            f"{repo_id} is not in the cache of datasets, and HF_HUB_OFFLINE is set",
            hint="Unset HF_HUB_OFFLINE, or name a file.",
        )
    if isinstance(error, DatasetNotFoundError) and "is a gated dataset" not in said:
        return DataError(
            f"the Hub has no dataset {repo_id}, or does not show it to you; nor is there a file of that name",
            hint="Check the name; if it is private, log in with `hf auth login`, or set HF_TOKEN.",
        )
    is_transport = isinstance(error, (ConnectionError, HTTPError)) and not isinstance(error, HfHubHTTPError)
    if is_transport:
        return DataError(
            f"cannot reach the Hub at {config.HF_ENDPOINT} for {repo_id}: {said}",
            hint="Check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 makes do with what is cached.",
        )
    return DataError(
        f"cannot read {spec} from the Hub: {said}",
        hint=f"See {config.HF_ENDPOINT}/datasets/{repo_id}; CONFIG and SPLIT are written ORG/NAME:CONFIG:SPLIT.",
    )


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep `datasets` from logging, and where standard error is no terminal from drawing bars."""
    import datasets

    log: Any = datasets.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)  # what fails is logged as an error first, and raised then
    if not sys.stderr.isatty():
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
