"""Convert a checkpoint in another format: its tensors as a source, and the plan that moves them unchanged."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.formats import pickled
from surgeon.checkpoint.source import INDEX, WEIGHTS, Source, check_links, inside, open_directory, spec_of
from surgeon.errors import CheckpointError
from surgeon.options import Verb
from surgeon.plan.plan import identity
from surgeon.surgery import Surgery

VERB = Verb(keeps_function=True)


def convert(source: str | os.PathLike[str], *, staging: str | os.PathLike[str] | None = None) -> Surgery:
    """Return the surgery that writes `source` as a safetensors checkpoint.

    `source` is a directory with `pytorch_model.bin` (or its shards and their index), one of these files, or a GGUF
    file. Pickles are never run, and their tensors are copied from file to file. A GGUF file is dequantized to float32
    at once, in memory and then in a temporary directory inside `staging` (default: where temporary files go; best is
    the disk of the result).

    Raises CheckpointError when there is nothing to convert, when a file is damaged, or holds more than tensors.

        surgeon.convert("old-gpt2").save("new-gpt2", dtype="bfloat16")
    """
    path = Path(source).expanduser()
    opened, step, notes = _open(path, None if staging is None else Path(staging))
    anatomy = read_anatomy(spec_of(opened))
    plan = identity(anatomy.spec, depth=anatomy.depth)
    if buffers := [name for name in plan.tensors if anatomy.whole_family and anatomy.row(name)[1] == "buffer"]:
        notes = (*notes, f"left out, as every loader ignores them: {buffers[0]} and {len(buffers) - 1} more buffers")
    tensors = {name: expr for name, expr in plan.tensors.items() if name not in buffers}
    plan = replace(plan, tensors=tensors, steps=({"convert": step},), notes=(*plan.notes, *notes))
    return Surgery(opened, plan, reads={"SRC": (str(path),)})


def _open(path: Path, staging: Path | None) -> tuple[Source, Mapping[str, Any], tuple[str, ...]]:
    """Return the source, what the receipt says of it, and what the user should hear."""
    if not path.exists():
        raise CheckpointError(
            f"no such file or directory: {path}", hint="Name a directory with pytorch_model*.bin, or a .gguf file."
        )
    ggufs = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if path.is_dir() and ((path / WEIGHTS).is_file() or (path / INDEX).is_file()):
        raise CheckpointError(
            f"{path} is a safetensors checkpoint already", hint="Name the file that is to be converted."
        )
    if path.is_dir() and not _has_pickles(path) and ggufs:
        if len(ggufs) > 1:
            raise CheckpointError(f"{path} holds {len(ggufs)} GGUF files", hint=f"Name one: surgeon convert {ggufs[0]}")
        path = inside(path, ggufs[0].name)
    if path.is_file() and not _is_pickle(path):
        from surgeon.checkpoint.formats.gguf import open_gguf

        check_links(path.parent)  # transformers looks for a config and a tokenizer beside the file
        return open_gguf(path, staging=staging), {"from": "gguf"}, ()
    source = pickled.open_pickled(path)
    open_directory(source.directory)
    if not _has_pickles(source.directory) and path.is_dir():
        raise CheckpointError(
            f"{path} has no {pickled.WEIGHTS} and no GGUF file: there is nothing to convert", hint=f"Look: ls {path}"
        )
    return source, {"from": "pickle"}, source.notes


def _has_pickles(directory: Path) -> bool:
    return (directory / pickled.WEIGHTS).is_file() or (directory / pickled.INDEX).is_file()


def _is_pickle(path: Path) -> bool:
    return path.suffix == ".bin" or path.name == pickled.INDEX
