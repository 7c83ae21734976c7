"""Convert a checkpoint in another format, or an adapter: its tensors as a source, and the plan that moves them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.derived import RenamedSource, wrapper_of
from surgeon.checkpoint.formats import pickled
from surgeon.checkpoint.source import (
    ADAPTER,
    INDEX,
    WEIGHTS,
    Source,
    check_links,
    inside,
    is_adapter,
    open_directory,
    spec_of,
)
from surgeon.errors import CheckpointError, PlanError
from surgeon.mistyped import hint_beside
from surgeon.options import Checked, OptionError, Verb, in_python, option, takes
from surgeon.plan.plan import identity
from surgeon.surgery import Surgery, open_source

VERB = Verb(keeps_function=True)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Checked):
    """The options of `convert`."""

    base: str | os.PathLike[str] | None = option(
        "The model that an adapter changes: a directory or Hub id. Default: the one that it names.",
        None,
        metavar="MODEL",
        reads=True,
        group="source",
    )
    staging: str | os.PathLike[str] | None = in_python("Where a GGUF file is dequantized: best the result's disk.")


@takes(ConvertOptions)
def convert(source: str | os.PathLike[str], options: ConvertOptions) -> Surgery:
    """Return the surgery that writes `source` as a safetensors checkpoint.

    `source` is a directory with `pytorch_model.bin` (or its shards and their index), one of these files, a GGUF file, a
    safetensors checkpoint whose names all begin as a training tool left them, or a LoRA adapter, which is merged into
    its base. Pickles are never run, and their tensors are copied from file to file. A GGUF file is dequantized to
    float32 at once, in memory and then in a temporary directory inside `staging` (default: where temporary files go).

    Raises CheckpointError when there is nothing to convert, when a file is damaged, or holds more than tensors;
    PlanError for an adapter that cannot be merged exactly.

        surgeon.convert("old-gpt2").save("new-gpt2", dtype="bfloat16")
    """
    path = Path(source).expanduser()
    opened, step, notes = _open(path, options)
    opened, renamed = _without_wrapper(opened)
    anatomy = read_anatomy(spec_of(opened))
    plan = identity(anatomy.spec, depth=anatomy.depth)
    if buffers := [name for name in plan.tensors if anatomy.whole_family and anatomy.row(name)[1] == "buffer"]:
        notes = (*notes, f"left out, as every loader ignores them: {buffers[0]} and {len(buffers) - 1} more buffers")
    tensors = {name: expr for name, expr in plan.tensors.items() if name not in buffers}
    plan = replace(plan, tensors=tensors, steps=({"convert": step},), notes=(*plan.notes, *notes, *renamed))
    reads = {"SRC": (str(path),), **({} if options.base is None else {"--base": (os.fspath(options.base),)})}
    return Surgery(opened, plan, reads=reads)


def _open(path: Path, options: ConvertOptions) -> tuple[Source, Mapping[str, Any], tuple[str, ...]]:
    """Return the source, what the receipt says of it, and what the user should hear."""
    if not path.exists():
        hint = "Name a directory with pytorch_model*.bin, a .gguf file, or an adapter."
        raise CheckpointError(f"no such file or directory: {path}", hint=hint_beside(path, hint))
    if is_adapter(path):
        from surgeon.checkpoint.lora import open_adapter

        base = None if options.base is None else os.fspath(options.base)
        merged = open_adapter(path, label=str(path), open_base=open_source, base=base)
        note = f"the adapter changes {len(merged.updates)} of the {len(merged.tensors)} tensors of {merged.base.label}"
        return merged, {"from": "adapter", "base": merged.base.provenance()}, (note,)
    if options.base is not None:
        raise OptionError("base", f"--base goes with an adapter, and {path} has no {ADAPTER}", hint="Leave out --base.")
    ggufs = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if path.is_dir() and ((path / WEIGHTS).is_file() or (path / INDEX).is_file()):
        found = open_directory(path)
        if wrapper_of(found.tensors):
            return found, {"from": "safetensors"}, ()
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
        staging = None if options.staging is None else Path(options.staging)
        return open_gguf(path, staging=staging), {"from": "gguf"}, ()
    source = pickled.open_pickled(path)
    open_directory(source.directory)
    if not _has_pickles(source.directory) and path.is_dir():
        raise CheckpointError(
            f"{path} has no {pickled.WEIGHTS} and no GGUF file: there is nothing to convert", hint=f"Look: ls {path}"
        )
    return source, {"from": "pickle"}, source.notes


def _without_wrapper(source: Source) -> tuple[Source, tuple[str, ...]]:
    """Return the source with the names that its model has, and a note on what a training tool had put before them.

    Raises PlanError for a model with adapters inside.
    """
    if name := next((name for name in source.tensors if ".lora_" in name or ".base_layer." in name), None):
        raise PlanError(
            f"{source.label} is a model with adapters inside, which are no weights of it: {name!r}",
            hint="Write it with PEFT: merge_and_unload().save_pretrained(...); or save_pretrained, and convert that.",
        )
    if not (wrapper := wrapper_of(source.tensors)):
        return source, ()
    return RenamedSource(source, wrapper), (f"taken off the names of all {len(source.tensors)} tensors: {wrapper}",)


def _has_pickles(directory: Path) -> bool:
    return (directory / pickled.WEIGHTS).is_file() or (directory / pickled.INDEX).is_file()


def _is_pickle(path: Path) -> bool:
    return path.suffix in (".bin", ".pt", ".pth", ".ckpt") or path.name == pickled.INDEX
