"""The dtype and shape of every tensor, the safetensors header that holds them, and the bytes of weights.

A header is read strictly, and written with padding that aligns the data after it. The format: 8 bytes (little-endian
header length), a JSON object, then the data. Everything that the format forbids is refused here with one sentence.
The reference implementation is more lenient: it accepts duplicate keys, and readers then disagree on which of the two
is the tensor. It also accepts white space before the object, `"__metadata__": null`, unknown fields of a tensor, a
tensor given as a list, a dtype given as an object, and lengths of 2^63 and more. We accept none of these.

Bytes are read through a `FilePart`. A missing byte of a sparse file reads as zero, and zeros are a valid tensor; a part
knows what is there and refuses the rest.
"""

import json
import os
import stat
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

from surgeon import text
from surgeon.errors import CheckpointError
from surgeon.showing import Shown

# The dtypes and shapes

# Bits per element of every dtype that safetensors 0.8 knows, by its name in the header.
DTYPE_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's dtype (by its safetensors name) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True, repr=False)
class CheckpointSpec(Shown):
    """The config and the dtype and shape of every tensor of a checkpoint: all that deciding a plan needs."""

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]

    @property
    def headline(self) -> str:
        """The number of tensors, and of parameters."""
        return f"{len(self.tensors)} tensors, {self.num_parameters:,} parameters"

    def to_text(self) -> str:
        """Return a line for each tensor: its name, dtype and shape."""
        lines = [(name, tensor.dtype, str(list(tensor.shape))) for name, tensor in self.tensors.items()]
        return text.table(("tensor", "dtype", "shape"), lines)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_parameters for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # the second is older compressed-tensors
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # ModelOpt, GPTQ, AWQ


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Return whether a config says that the weights are stored as codes, which no table of tensors here describes."""
    nested = config.get("text_config")
    parts = (config, nested) if isinstance(nested, Mapping) else (config,)
    return any(part.get(key) is not None for part in parts for key in QUANTIZATION_KEYS)


# The header of one file

# The format allows 100 MB, of which Python makes gigabytes. An entry has some 100 bytes, and a file of a large model a
# few thousand entries.
MAX_HEADER_BYTES = 25_000_000
LONGEST_QUOTE = 200
CHANGED_HINT = "Something else changed the source; let it finish, then run the command again."
DOWNLOAD_HINT = "The file is damaged or incomplete; fetch it again."


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in one file: its spec and its byte range [start, end), counted from the file's start."""

    spec: TensorSpec
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file in the order of their data.

    Raises CheckpointError when the file is damaged; memory and time are bounded by the header's real size.
    """
    raw, file_size = _raw_header(path)
    return parse_header(raw, file_size=file_size, where=path.name)


def read_metadata(path: Path) -> dict[str, str]:
    """Return what a safetensors file says beside its tensors. Raises CheckpointError when the file is damaged."""
    raw, file_size = _raw_header(path)
    parse_header(raw, file_size=file_size, where=path.name)
    metadata: dict[str, str] = json.loads(raw).get("__metadata__") or {}
    return metadata


def _raw_header(path: Path) -> tuple[bytes, int]:
    """Return the bytes of a file's header, and the size of the file."""
    with opened(path) as file:
        file_size = file.seek(0, 2)
        file.seek(0)
        length = header_length(file.read(8), file_size=file_size, where=path.name)
        return file.read(length), file_size


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Yield a regular file, open for reading. Raises CheckpointError for what is none, or cannot be read."""
    try:
        if (what := not_regular(path)) is not None:
            raise CheckpointError(f"{path} is {what}, not a file", hint=f"Look at it: ls -l {path}")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", hint=f"Look at it: ls -l {path}") from error


def not_regular(path: Path) -> str | None:
    """Return what a path is that a reader would wait for, or read without end; None for files and directories."""
    mode = path.stat().st_mode
    kinds = {"a pipe": stat.S_ISFIFO, "a device": stat.S_ISCHR, "a disk": stat.S_ISBLK, "a socket": stat.S_ISSOCK}
    return next((what for what, is_one in kinds.items() if is_one(mode)), None)


def is_dense(raw: bytes) -> bool:
    """Return whether JSON has so many objects, lists and keys that Python would take 20 and more times its size."""
    most = 100_000 + len(raw) // 12
    return len(raw) > 100_000 and (raw.count(b"[") + raw.count(b"{") > most or raw.count(b":") > most)


def header_length(prefix: bytes, *, file_size: int, where: str) -> int:
    """Return the header's length in bytes, from the first 8 bytes of a file of `file_size` bytes."""
    if len(prefix) < 8:
        _refuse(where, f"is {file_size} bytes long, too short for a safetensors header")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        _refuse(where, f"claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if length > file_size - 8:
        _refuse(where, f"is truncated: its header needs {length} bytes, the file has {max(file_size - 8, 0)}")
    return length


def parse_header(raw: bytes, *, file_size: int, where: str) -> dict[str, Entry]:
    """Return the tensors that the header `raw` describes, in the order of their data in a file of `file_size` bytes."""
    if not raw.startswith(b"{"):
        _refuse(where, "has no safetensors header: it does not begin with '{'")
    if is_dense(raw):
        _refuse(where, "has a header with more lists, objects and keys than tensors of its size can have")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except _DuplicateKeyError as error:
        _refuse(where, f"has two entries {_brief(error.args[0])} in its header")
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number with too many digits
        _refuse(where, f"has a header that is not JSON: {error}")
    if b"\\u" in raw and (invalid := next((name for name in header if not _is_text(name)), None)) is not None:
        _refuse(where, f"names a tensor {_brief(invalid)}, which is no text: it holds half a surrogate pair")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(where, "has a __metadata__ that does not map strings to strings")

    data_start = 8 + len(raw)
    entries = {name: _entry(name, value, data_start, where) for name, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_tiling(entries, data_start, file_size, where)
    return entries


class _DuplicateKeyError(ValueError):
    pass


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _DuplicateKeyError(next(name for name, count in counts.items() if count > 1))
    return result


def _is_text(name: str) -> bool:
    """Return whether `name` can be written as UTF-8. JSON escapes can hold half a surrogate pair."""
    return not any("\ud800" <= char <= "\udfff" for char in name)


_FIELDS = frozenset(("dtype", "shape", "data_offsets"))


def _entry(name: str, value: Any, data_start: int, where: str) -> Entry:
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        _refuse(where, f"describes {_brief(name)} by something other than dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _refuse(where, f"gives {_brief(name)} the unknown dtype {_brief(dtype)}")
    if not _are_counts(shape) or _overflows(shape):
        _refuse(where, f"gives {_brief(name)} the impossible shape {_brief(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(where, f"gives {_brief(name)} the impossible data_offsets {_brief(offsets)}")
    spec = _spec(dtype, tuple(shape))
    bits = spec.num_parameters * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        needed = f"{dtype} {_brief(shape)} needs {bits / 8:.15g}"
        _refuse(where, f"gives {_brief(name)} {offsets[1] - offsets[0]} bytes; {needed}")
    return Entry(spec, data_start + offsets[0], data_start + offsets[1])


@lru_cache(maxsize=1024)
def _spec(dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    """Return a spec, the same object for many tensors: layers and experts are alike."""
    return TensorSpec(dtype, shape)


def _are_counts(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110  (several times for each tensor: a loop costs half of what all() does)
        if type(item) is not int or not 0 <= item < 2**63:
            return False
    return True


def _overflows(shape: Sequence[int]) -> bool:
    """Return whether the number of elements exceeds 63 bits. Stops there: a shape may be millions long."""
    count = 1
    for length in shape:
        count *= length
        if count >= 2**63:
            return True
    return False


def _check_tiling(entries: Mapping[str, Entry], data_start: int, file_size: int, where: str) -> None:
    """Refuse data that overlaps, leaves a hole, or does not end where the file ends."""
    expected = data_start
    for name, entry in entries.items():
        if entry.start != expected:
            fault = "overlaps the tensor before it" if entry.start < expected else "leaves a hole before it"
            _refuse(where, f"stores {_brief(name)} where it {fault}")
        expected = entry.end
    if expected > file_size:
        _refuse(where, f"is truncated: its tensors end at byte {expected}, the file at {file_size}")
    if expected < file_size:
        _refuse(where, f"has {file_size - expected} bytes after its last tensor")


def _brief(value: Any) -> str:
    """Return the value, cut for an error message: a hostile one can be as long as the header."""
    text = repr(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def _refuse(where: str, fault: str) -> NoReturn:
    raise CheckpointError(f"{where} {fault}", hint=DOWNLOAD_HINT)


def format_header(
    tensors: Mapping[str, TensorSpec], *, align: int = 0, block: int = 4096, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the length prefix and header for `tensors`, whose data follows in the mapping's order.

    The header is padded with spaces so that the data begins at `align` modulo `block` (rounded up to a multiple of 8).
    A kernel copies whole pages, and shares whole blocks, only between offsets that agree modulo their size.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, spec in tensors.items():
        fields[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    padding = (align - (8 + len(text))) % block
    padding += -(8 + len(text) + padding) % 8
    return (len(text) + padding).to_bytes(8, "little") + text + b" " * padding


# Reading JSON


class OpenFile(Protocol):
    """A file that is open as long as this object is there."""

    def fileno(self) -> int:
        """Return its descriptor."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """A file of which the bytes in `present` are there (sorted, apart; None: all), and no other byte can be read.

    `held` keeps it open, so that it stays readable where another process removes it; None: it is opened by its path.
    """

    path: Path
    present: tuple[tuple[int, int], ...] | None = None
    held: "OpenFile | None" = None

    def range(self, start: int, end: int) -> "FileRange":
        """Return the bytes [start, end). Raises CheckpointError where one of them is not there."""
        if self.present is not None and start < end:
            place = bisect_right(self.present, start, key=lambda span: span[0]) - 1
            if place < 0 or end > self.present[place][1]:
                raise CheckpointError(
                    f"bytes {start} to {end} of {self.path} were not fetched",
                    hint="Fetch the whole checkpoint (hf download), and give its directory.",
                )
        return FileRange(self, start, end)

    def open(self) -> int:
        """Return a new descriptor of the file, to be closed. Raises CheckpointError where it cannot be opened."""
        try:
            return os.open(self.path, os.O_RDONLY) if self.held is None else os.dup(self.held.fileno())
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}", hint=CHANGED_HINT) from error

    @contextmanager
    def opened(self) -> "Iterator[OpenPart]":
        """Return a context in which ranges of the file can be read."""
        descriptor = self.open()
        try:
            yield OpenPart(self, descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class FileRange:
    """The bytes [start, end) of a file, which are there: only `FilePart.range` makes one."""

    file: FilePart
    start: int
    end: int

    @property
    def path(self) -> Path:
        """The path of the file; of a partial one, another process may remove it. `file.open` still opens it then."""
        return self.file.path

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.end - self.start

    def between(self, start: int, end: int) -> "FileRange":
        """Return the bytes [start, end) of the same file."""
        return self.file.range(start, end)


@dataclass(frozen=True, slots=True)
class OpenPart:
    """A part of a file, open for reading."""

    part: FilePart
    descriptor: int

    def read_into(self, buffer: bytearray | memoryview, start: int) -> None:
        """Fill `buffer` with the bytes from `start` on. Raises CheckpointError where one is not there."""
        view, path = memoryview(buffer).cast("B"), self.part.path
        self.part.range(start, start + len(view))
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.descriptor, [view[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error.strerror}", hint=CHANGED_HINT) from error
            if not count:
                raise CheckpointError(f"{path} has become shorter while it was read", hint=CHANGED_HINT)
            done += count
