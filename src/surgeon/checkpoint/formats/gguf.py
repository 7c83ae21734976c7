"""A GGUF file as a source: transformers converts it to float32, tokenizer included, in a temporary directory.

The directory is removed when the source is no longer used, at the latest when Python ends.
"""

import contextlib
import hashlib
import io
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import DOWNLOAD_HINT, opened
from surgeon.checkpoint.output import check_space
from surgeon.checkpoint.source import LocalSource
from surgeon.errors import CheckpointError, OutputError
from surgeon.progress import stage

MAGIC = b"GGUF"
SPACE_HINT = "Free some space there, or choose another disk with -o."
# llama.cpp splits the digits of these vocabularies one by one before it applies GPT-2's pattern (llama-vocab.cpp).
# transformers applies the pattern alone, and then splits spaces before a digit otherwise than in the model's training.
SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})


@dataclass(frozen=True, slots=True)
class Metadata:
    """The metadata of a GGUF file. `pre_tokenizer` is llama.cpp's name for the rule that splits text into words."""

    architecture: str
    pre_tokenizer: str | None
    num_parameters: int


@dataclass(frozen=True)
class GgufSource(LocalSource):
    """The checkpoint that transformers made from `file`."""

    file: Path

    @property
    def origin(self) -> Path:
        return self.file

    def provenance(self) -> dict[str, Any]:
        with self.file.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        return {"path": str(self.file.resolve()), "fingerprint": f"sha256:{digest.hexdigest()}"}


def open_gguf(path: Path, *, staging: Path | None = None) -> GgufSource:
    """Return the checkpoint in the GGUF file `path`, dequantized into a new directory in `staging`.

    Needs memory for the whole model in float32, and as much space in `staging` (default: the temporary directory).

    Raises CheckpointError when it is not a GGUF file, is damaged, or transformers cannot read its architecture.
    """
    with stage(f"reading {path.name}"):
        metadata = _examine(path)
    try:
        if staging is not None:
            staging.mkdir(parents=True, exist_ok=True)
        root = Path(tempfile.mkdtemp(prefix=".surgeon-convert-", dir=staging))
    except OSError as error:
        raise OutputError(f"cannot write {error.filename or staging}: {error.strerror}", hint=SPACE_HINT) from error
    try:
        check_space(root, 4 * metadata.num_parameters)
        directory = root / path.stem  # named after the model: cards and receipts repeat the name
        source = GgufSource(directory, path.stem, path)
        source.look_at(path)
        with _bars_on_terminals_only():
            _dequantize(path, metadata, directory)
        weakref.finalize(source, shutil.rmtree, root, ignore_errors=True)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    return source


def _examine(path: Path) -> Metadata:
    """Return the metadata of a file, after checking that it is complete."""
    with opened(path) as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        raise CheckpointError(
            f"{path.name} is not a GGUF file: it does not begin with {MAGIC.decode()!r}", hint=DOWNLOAD_HINT
        )
    if find_spec("gguf") is None:
        raise CheckpointError("reading a GGUF file needs the package gguf", hint='pip install "surgeon[gguf]"')
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = (reader.get_field(key) for key in ("general.architecture", "tokenizer.ggml.pre"))
        architecture, pre_tokenizer = (None if field is None else str(field.contents()) for field in fields)
        num_parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    except (ValueError, LookupError, OverflowError, MemoryError) as error:  # raised by reads beyond the end
        raise CheckpointError(f"{path.name} is truncated or damaged", hint=DOWNLOAD_HINT) from error
    if architecture is None or not num_parameters:
        raise CheckpointError(f"{path.name} holds no model: it has no architecture or no tensors", hint=DOWNLOAD_HINT)
    return Metadata(architecture, pre_tokenizer, num_parameters)


def _dequantize(path: Path, metadata: Metadata, directory: Path) -> None:
    """Write the model, its generation config and its tokenizer into `directory`."""
    from safetensors import SafetensorError
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    from surgeon.models.loading import libraries_fail, load_gguf

    what = f"transformers cannot read {path.name}, of architecture {metadata.architecture!r}"
    hint = "Convert it with llama.cpp's tools, or look for the safetensors checkpoint that it was made from."
    with libraries_fail(what, hint=hint, error_type=CheckpointError):
        model, report, tokenizer = load_gguf(path)
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{path.name} lacks {missing[0]!r}, and {len(missing) - 1} more tensors of the model", hint=DOWNLOAD_HINT
        )
    if metadata.pre_tokenizer in SINGLE_DIGITS:
        parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {directory}: {error}", hint=SPACE_HINT) from error


@contextlib.contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Keep the progress bars of transformers, which it always writes to standard error, out of logs."""
    import transformers  # noqa: F401  # at import its log handler takes the real standard error

    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        yield
