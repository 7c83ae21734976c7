"""A file that `torch.save` wrote, read as its tensors and the bytes that each of them takes.

Both formats (a zip without compression; before torch 1.6 a plain sequence) hold a pickle that describes the tensors,
and their storages as they were in memory. So a tensor is a range of the file, and can be copied without being loaded.
Nothing is unpickled, and torch is not needed.
"""

import mmap
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, cast

from surgeon.checkpoint.formats.torch_pickle import PickledTensor, Storage, interpret, refuse_content
from surgeon.checkpoint.header import DOWNLOAD_HINT, DTYPE_BITS, TensorSpec, opened
from surgeon.errors import CheckpointError

MAX_PICKLE_BYTES = 25_000_000  # as for a safetensors header; a real one has 0.2 kB for each tensor
MAX_DIRECTORY_BYTES = 16_000_000  # of a zip file; a real one has 0.1 kB for each tensor
MODELS = ("model", "state_dict", "model_state_dict", "module")  # where training scripts put a state dict
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
_LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # the magic number, pickled
_ZIP_START = b"PK\x03\x04"
_LFS_START = b"version https://git-lfs"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature, ..., the length of its name, of its extras

Locate = Callable[[Storage], tuple[int, int]]  # returns the byte range of a storage; KeyError if it is missing


@dataclass(frozen=True, slots=True)
class StridedTensor:
    """A tensor in a file: its spec, its strides in elements, and the position of its first byte."""

    spec: TensorSpec
    strides: tuple[int, ...]
    start: int

    @property
    def is_contiguous(self) -> bool:
        """Whether the tensor's bytes are one range of the file, in the order of its elements."""
        expected = 1
        for size, stride in zip(reversed(self.spec.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.spec.num_parameters == 0
            expected *= size
        return True

    @property
    def end(self) -> int:
        """The byte after the last element that the tensor touches."""
        if self.spec.num_parameters == 0:
            return self.start
        last = sum((size - 1) * stride for size, stride in zip(self.spec.shape, self.strides, strict=True))
        return self.start + (last + 1) * DTYPE_BITS[self.spec.dtype] // 8


@dataclass(frozen=True, slots=True)
class TorchFile:
    """The content of a file: its tensors in the order of their dictionary, and the names of all other entries."""

    tensors: Mapping[str, StridedTensor]
    ignored: tuple[str, ...]


def read_torch_file(path: Path) -> TorchFile:
    """Return the tensors of a file that `torch.save` wrote. The pickle is read, not run.

    Raises CheckpointError when the file is damaged, or holds more than a dictionary of tensors.
    """
    with opened(path) as file:
        if file.seek(0, 2) == 0:
            _refuse(path.name, "is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(data, path.name)


def _read(data: mmap.mmap, where: str) -> TorchFile:
    if data[: len(_ZIP_START)] == _ZIP_START:
        state, locate = _read_zip(data, where)
    elif data[: len(_LEGACY_START)] == _LEGACY_START:
        state, locate = _read_legacy(data, where)
    elif data[: len(_LFS_START)] == _LFS_START:
        raise CheckpointError(f"{where} is a Git LFS pointer, not the file itself", hint="git lfs pull")
    else:
        _refuse(where, "is not a file that torch.save wrote")
    if not isinstance(state, dict):
        refuse_content(where, f"a {type(state).__name__} in place of a dictionary of tensors")
    tensors: dict[str, StridedTensor] = {}
    state, ignored = _model_in(state, where)
    for name, value in state.items():
        if isinstance(value, PickledTensor) and isinstance(name, str):
            tensors[name] = _strided_tensor(value, name, locate, len(data), where)
        elif value is None or isinstance(value, (int, float, str)):
            ignored.append(str(name))
        else:
            refuse_content(where, f"a {type(value).__name__} under {name!r}")
    return TorchFile(tensors, tuple(ignored))


def _model_in(state: dict[Any, Any], where: str) -> tuple[dict[Any, Any], list[str]]:
    """Return the dictionary of tensors in what a training script saved, and the names of all that lies beside it.

    That is the state itself, or a dictionary in it under a name that scripts use. Raises CheckpointError for several.
    """
    if any(isinstance(value, PickledTensor) for value in state.values()):
        return state, []
    inner = [name for name in MODELS if isinstance(state.get(name), dict) and state[name]]
    if len(inner) > 1:
        refuse_content(where, f"models under {' and '.join(map(repr, inner))}")
    if not inner:
        return state, []
    return state[inner[0]], [str(name) for name in state if name != inner[0]]


def _read_zip(data: mmap.mmap, where: str) -> tuple[Any, Locate]:
    """Return the dictionary in a zip file, and the function that locates its storages: uncompressed entries."""
    try:
        with zipfile.ZipFile(cast("IO[bytes]", _Directory(data))) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            names = [entry.filename for entry in archive.infolist()]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise CheckpointError(
            f"{where} is truncated or damaged: its zip directory is missing", hint=DOWNLOAD_HINT
        ) from error

    if len(entries) < len(names):  # readers differ in which of the two they take
        twice = next(name for name, count in Counter(names).items() if count > 1)
        _refuse(where, f"has two entries {twice!r} in its zip directory")

    def entry_range(name: str) -> tuple[int, int]:
        return _entry_range(data, entries[name], where)

    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        _refuse(where, "is a zip file, but torch.save did not write it: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in entries:
        start, end = entry_range(f"{root}byteorder")
        if data[start : min(end, start + 10)] != b"little":
            refuse_content(where, "numbers that are not little-endian")
    start, end = entry_range(pickles[0])
    if end - start > MAX_PICKLE_BYTES:
        _refuse(where, f"claims a pickle of {end - start} bytes; no dictionary of tensors needs so many")
    return interpret(BytesIO(data[start:end]), where), lambda storage: entry_range(f"{root}data/{storage.key}")


@dataclass(frozen=True, slots=True)
class _Directory:
    """A file of which zipfile reads the directory: it would read one of any size, and make an object of each entry."""

    data: mmap.mmap

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: Literal[0, 1, 2] = 0) -> int:
        self.data.seek(offset, whence)  # which returns the position in Python 3.13 and later only
        return self.data.tell()

    def tell(self) -> int:
        return self.data.tell()

    def read(self, count: int = -1) -> bytes:
        if count > MAX_DIRECTORY_BYTES:
            raise ValueError("a zip directory of such a size")
        return self.data.read(min(count, MAX_DIRECTORY_BYTES) if count >= 0 else MAX_DIRECTORY_BYTES)


def _entry_range(data: mmap.mmap, entry: zipfile.ZipInfo, where: str) -> tuple[int, int]:
    """Return the byte range of a zip entry's content."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        _refuse(where, f"compresses {entry.filename!r}, which torch.save never does")
    start = entry.header_offset + _LOCAL_HEADER.size
    header = data[entry.header_offset : start]
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP_START):
        _refuse(where, f"is damaged: {entry.filename!r} is not where the zip directory says")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if data[start : start + name_length] != entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437"):
        _refuse(where, f"is damaged: {entry.filename!r} has another name where it is stored")
    start += name_length + extra_length
    return start, start + entry.file_size


def _read_legacy(data: mmap.mmap, where: str) -> tuple[Any, Locate]:
    """Return the same for a file from before torch 1.6: five pickles, then the length and bytes of each storage."""

    def read(storages: dict[str, Storage] | None = None) -> Any:
        """Return the next pickle. A string in it can claim gigabytes: it gets no more than a pickle may have."""
        start = data.tell()
        pickle = BytesIO(data[start : start + MAX_PICKLE_BYTES])
        content = interpret(pickle, where, storages)
        data.seek(start + pickle.tell())
        return content

    magic, protocol, system = (read() for _ in range(3))
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or not isinstance(system, dict):
        _refuse(where, "is not a file that torch.save wrote")
    if system.get("little_endian") is not True:
        refuse_content(where, "numbers that are not little-endian")
    storages: dict[str, Storage] = {}
    state = read(storages)
    keys = read()
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        _refuse(where, "is damaged: its storages are not those of its tensors")
    places: dict[str, tuple[int, int]] = {}
    position = data.tell()
    for key in keys:
        length = int.from_bytes(data[position : position + 8], "little")
        places[key] = position + 8, position + 8 + length * storages[key].itemsize
        position = places[key][1]
    return state, lambda storage: places[storage.key]


def _strided_tensor(tensor: PickledTensor, name: str, locate: Locate, file_size: int, where: str) -> StridedTensor:
    """Return the tensor, after checking that its storage lies in the file and its elements in the storage."""
    try:
        start, end = locate(tensor.storage)
    except KeyError:
        _refuse(where, f"is damaged: the numbers of {name!r} are missing")
    if end > file_size:
        _refuse(where, f"is truncated: {name!r} ends at byte {end}, the file at {file_size}")
    first = start + tensor.offset * DTYPE_BITS[tensor.dtype] // 8
    strided = StridedTensor(TensorSpec(tensor.dtype, tensor.shape), tensor.strides, first)
    if strided.end > end:
        _refuse(where, f"is damaged: {name!r} reaches beyond its storage")
    if strided.spec.nbytes > file_size:  # strides of 0 repeat a number as often as a shape says
        _refuse(where, f"is damaged: {name!r} would take {strided.spec.nbytes} bytes, the whole file has {file_size}")
    return strided


def _refuse(where: str, fault: str) -> NoReturn:
    raise CheckpointError(f"{where} {fault}", hint=DOWNLOAD_HINT)
