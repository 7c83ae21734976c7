"""What an evaluation reads and writes: the checkpoint, and the file of predictions."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import Source, open_source, spec_of
from surgeon.errors import MeasureError, OutputError


def opened(model: str | os.PathLike[str], revision: str | None, *, encoder: bool = False) -> Source:
    """Return a model to evaluate. Raises MeasureError for one with an encoder, unless that is allowed for."""
    source = open_source(model, revision=revision)
    read_anatomy(spec_of(source))  # a checkpoint that is not whole is refused before any text is read
    if source.config.get("is_encoder_decoder") and not encoder:
        raise MeasureError(
            f"{source.label} has an encoder and a decoder; what is evaluated here has one stack of layers",
            hint="Evaluate it with a script of transformers.",
        )
    return source


def checked_target(path: Path) -> Path:
    """Refuse a file that could not be written, before an hour of generating."""
    with suppress(RuntimeError):  # ~someone who has no home here
        path = path.expanduser()
    if path.exists():
        raise OutputError(f"{path} exists", hint="Remove it, or name another file with --predictions.")
    if not path.parent.is_dir():
        raise OutputError(f"no such directory: {path.parent}", hint=f"mkdir -p {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"cannot write into {path.parent}", hint=f"Look: ls -ld {path.parent}")
    return path


def write_records(predictions: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Write records to a .jsonl, whole or not at all."""
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in predictions)
    try:
        staged.write_text(lines, encoding="utf-8")
        staged.replace(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}", hint="Is the disk full?  df -h") from error
    finally:
        staged.unlink(missing_ok=True)
