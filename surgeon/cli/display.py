"""How commands print: results on standard output, everything else on standard error."""

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any


def emit(text: str) -> None:
    """Print a result."""
    sys.stdout.write(text + "\n")


def log(text: str) -> None:
    """Print what accompanies a result."""
    sys.stderr.write(text + "\n")


@contextmanager
def results_alone() -> Iterator[None]:
    """Return a context in which whatever libraries print goes to standard error: DeepSpeed's log, gloo's greetings."""
    try:
        handle = sys.stdout.fileno()
    except io.UnsupportedOperation:  # not a file of the system: who reads it is in this process
        with redirect_stdout(sys.stderr):
            yield
        return
    sys.stdout.flush()
    kept = os.dup(handle)
    os.dup2(sys.stderr.fileno(), handle)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, handle)
        os.close(kept)


def emit_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
