"""The file that `torch.save` writes, read as what it is: a pickle that names tensors, and bytes that lie in the file.

Nothing is unpickled: a pickle is a program, and this is an interpreter that has no instruction to call anything. It
follows what torch writes for a dictionary of tensors, and refuses the first thing beyond that by name. Since torch
stores every tensor's bytes as they are in memory, in both of its formats (a zip without compression since 2020, a
plain sequence before), a tensor is then a range of the file. Needs no torch.
"""

import mmap
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn, Protocol

from surgeon.checkpoint.header import DOWNLOAD_HINT
from surgeon.checkpoint.spec import DTYPE_BITS, TensorSpec
from surgeon.errors import CheckpointError

MAX_PICKLE_BYTES = 100_000_000  # as for a safetensors header; a real one has 0.2 kB for each tensor
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
_LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # the magic number, pickled
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature ... length of its name, length of its extras

_STORAGES = {
    "Double": "F64",
    "Float": "F32",
    "Half": "F16",
    "BFloat16": "BF16",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
    "ComplexFloat": "C64",
}
_DTYPES = {
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}


@dataclass(frozen=True, slots=True)
class View:
    """A tensor in a file: its spec, its strides in elements, and the byte at which its first element lies."""

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
    def num_spanned(self) -> int:
        """The number of elements from the first to the last that the tensor touches."""
        if self.spec.num_parameters == 0:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.spec.shape, self.strides, strict=True))


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What a file holds: its tensors in the order of the dictionary, and the names of entries that hold nothing."""

    tensors: Mapping[str, View]
    ignored: tuple[str, ...]


def read_torch_file(path: Path) -> TorchFile:
    """Return the tensors that a file written by `torch.save` holds, without reading or running any of it.

    Raises CheckpointError when the file is damaged, or holds more than a dictionary of tensors.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == 0:
                _refuse(path.name, "is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(data, path.name)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _read(data: mmap.mmap, where: str) -> TorchFile:
    if data[:4] == b"PK\x03\x04":
        state, places = _read_zip(data, where)
    elif data[: len(_LEGACY_START)] == _LEGACY_START:
        state, places = _read_legacy(data, where)
    elif data[:20] == b"version https://git-":
        raise CheckpointError(f"{where} is a Git LFS pointer, not the file itself", hint="git lfs pull")
    else:
        _refuse(where, "is not a file that torch.save wrote")
    if not isinstance(state, dict):
        _refuse_content(where, f"a {_kind(state)} in place of a dictionary of tensors")
    tensors: dict[str, View] = {}
    ignored = []
    for name, value in state.items():
        if isinstance(value, _Tensor) and isinstance(name, str):
            tensors[name] = _view(value, name, places, len(data), where)
        elif value is None or isinstance(value, (bool, int, float, str)):
            ignored.append(str(name))
        else:
            _refuse_content(where, f"a {_kind(value)} under {name!r}")
    return TorchFile(tensors, tuple(ignored))


# --- where the bytes are ------------------------------------------------------------------------------------------


class _Places(Protocol):
    """Where storages lie."""

    def __call__(self, storage: "_Storage") -> tuple[int, int]:
        """Return the byte range of a storage. Raises KeyError when the file has none."""


def _read_zip(data: mmap.mmap, where: str) -> tuple[Any, _Places]:
    """Return the dictionary in a zip file, and where its storages lie: uncompressed, each an entry."""
    try:
        with zipfile.ZipFile(data) as archive:  # type: ignore[arg-type]  # mmap is a file, if not by its type
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{where} is truncated or damaged: {error}", hint=DOWNLOAD_HINT) from error

    def place(name: str) -> tuple[int, int]:
        entry = entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            _refuse_content(where, f"compressed data in {name!r}, which torch.save never writes")
        header = data[entry.header_offset : entry.header_offset + _LOCAL_HEADER.size]
        signature, *lengths = _LOCAL_HEADER.unpack(header) if len(header) == _LOCAL_HEADER.size else (b"", 0)
        if signature != b"PK\x03\x04":
            _refuse(where, f"is damaged: {name!r} is not where the zip directory says")
        start = entry.header_offset + _LOCAL_HEADER.size + sum(lengths)
        return start, start + entry.file_size

    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        _refuse(where, "is a zip file, but torch.save did not write it: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in entries:
        start, end = place(f"{root}byteorder")
        if data[start:end] != b"little":
            _refuse_content(where, f"numbers of byte order {data[start : min(end, start + 10)]!r}")
    start, end = place(pickles[0])
    if end - start > MAX_PICKLE_BYTES:
        _refuse(where, f"claims a pickle of {end - start} bytes; a dictionary of tensors has no use for that")
    return _interpret(BytesIO(data[start:end]), where), lambda storage: place(f"{root}data/{storage.key}")


def _read_legacy(data: mmap.mmap, where: str) -> tuple[Any, _Places]:
    """Return the dictionary in a file of before torch 1.6: five pickles, then for each storage its length and bytes."""
    magic, protocol, system = (_interpret(data, where) for _ in range(3))
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or not isinstance(system, dict):
        _refuse(where, "is not a file that torch.save wrote")
    if system.get("little_endian") is not True:
        _refuse_content(where, "numbers that are not little-endian")
    storages: dict[str, _Storage] = {}
    state = _interpret(data, where, storages)
    keys = _interpret(data, where)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        _refuse(where, "is damaged: its storages are not those of its tensors")
    places: dict[str, tuple[int, int]] = {}
    position = data.tell()
    for key in keys:
        length = int.from_bytes(data[position : position + 8], "little")
        position += 8
        places[key] = position, position + length * storages[key].itemsize
        position = places[key][1]
    return state, lambda storage: places[storage.key]


def _view(tensor: "_Tensor", name: str, places: _Places, file_size: int, where: str) -> View:
    """Return where a tensor's elements lie, after checking that they lie in its storage, and that in the file."""
    try:
        start, end = places(tensor.storage)
    except KeyError:
        _refuse(where, f"is damaged: the numbers of {name!r} are missing")
    if end > file_size:
        _refuse(where, f"is truncated: {name!r} ends at byte {end}, the file at {file_size}")
    itemsize = DTYPE_BITS[tensor.dtype] // 8
    view = View(TensorSpec(tensor.dtype, tensor.shape), tensor.strides, start + tensor.offset * itemsize)
    if view.num_spanned and view.start + view.num_spanned * itemsize > end:
        _refuse(where, f"is damaged: {name!r} reaches beyond its storage")
    return view


# --- what the pickle says -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Global:
    """Something that a pickle calls by name. Only torch's ways to name a tensor are known, none is ever called."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str | None  # None for untyped bytes
    key: str

    @property
    def itemsize(self) -> int:
        return DTYPE_BITS[self.dtype or "U8"] // 8


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _interpret(pickle: BytesIO | mmap.mmap, where: str, storages: dict[str, _Storage] | None = None) -> Any:
    """Return what the next pickle describes: dictionaries, lists, tuples, numbers, strings and tensors.

    `storages` is given every storage that is mentioned, by its key. Raises CheckpointError for anything else.
    """
    known = {} if storages is None else storages
    try:
        return _run(pickle, where, known)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        # A damaged pickle lacks operands, or has others than its instructions expect.
        raise CheckpointError(f"{where} is damaged: its pickle makes no sense", hint=DOWNLOAD_HINT) from error


def _run(pickle: BytesIO | mmap.mmap, where: str, storages: dict[str, _Storage]) -> Any:
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(pickle):  # type: ignore[arg-type]
        match opcode.name:
            case "PROTO":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING" | "BINSTRING":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                marked.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, marked.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                items = [stack.pop() for _ in range(count)]
                stack.append(tuple(reversed(items)))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items, stack = stack, marked.pop()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items, stack = stack, marked.pop()
                _set_items(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                stack.append(_known(_Global(module, name), where))
            case "BINPERSID":
                storage = _storage(stack.pop(), where)
                storages[storage.key] = storage
                stack.append(storage)
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_rebuild(function, arguments, where))
            case "BUILD":  # attributes of a dictionary: state_dict() hangs versions of modules on it
                stack.pop()
            case "STOP":
                return stack.pop()
            case name:
                _refuse_content(where, f"the pickle instruction {name}, which torch.save never writes")
    raise ValueError("no STOP")


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or not all(isinstance(key, (str, int)) for key in items[::2]):
        raise TypeError("only a dictionary with plain keys has items to set")
    target.update(zip(items[::2], items[1::2], strict=True))


def _known(found: _Global, where: str) -> _Global:
    match found:
        case _Global("collections", "OrderedDict"):
            pass
        case _Global("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3"):
            pass
        case _Global("torch._utils", "_rebuild_parameter") | _Global("torch.storage", "UntypedStorage"):
            pass
        case _Global("torch" | "torch.cuda", name) if name.removesuffix("Storage") in _STORAGES or name in _DTYPES:
            pass
        case _:
            _refuse_content(where, f"{found.module + '.' + found.name!r}")
    return found


def _storage(identity: Any, where: str) -> _Storage:
    """Return the storage that a persistent id names: ("storage", its type, key, device, length[, None])."""
    kind, typename, key, _, _, *view = identity
    if kind != "storage" or not isinstance(typename, _Global) or not isinstance(key, str):
        raise TypeError("not the id of a storage")
    if any(part is not None for part in view):
        _refuse_content(where, "a view of a storage, as torch before 0.4 wrote")
    if typename.name == "UntypedStorage":
        return _Storage(None, key)
    return _Storage(_STORAGES[typename.name.removesuffix("Storage")], key)


def _rebuild(function: Any, arguments: Any, where: str) -> Any:
    """Return the value that a pickle asks to make, for the few calls that describe tensors."""
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise TypeError("not a call")
    match function.name:
        case "OrderedDict":
            made: dict[str, Any] = {}
            for key, value in arguments[0] if arguments else ():
                _set_items(made, [key, value])
            return made
        case "_rebuild_parameter":
            return arguments[0]
        case "_rebuild_tensor" | "_rebuild_tensor_v2":
            storage, offset, shape, strides, *rest = arguments
            dtype = storage.dtype
            metadata = rest[2] if len(rest) > 2 else None
        case "_rebuild_tensor_v3":
            storage, offset, shape, strides, _, _, named, *rest = arguments
            dtype = _DTYPES[named.name]
            metadata = rest[0] if rest else None
        case _:
            raise TypeError("not a call")
    if metadata:
        _refuse_content(where, f"a tensor that is marked {', '.join(map(str, metadata))}")
    counts = (offset, *shape, *strides)
    if dtype is None or not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise TypeError("not a tensor")
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise ValueError("not a tensor")
    return _Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, _Tensor) else "string" if isinstance(value, str) else type(value).__name__.lstrip("_")


def _refuse(where: str, what: str) -> NoReturn:
    raise CheckpointError(f"{where} {what}", hint=DOWNLOAD_HINT)


def _refuse_content(where: str, what: str) -> NoReturn:
    raise CheckpointError(
        f"{where} holds more than tensors: {what}",
        hint="It was not run. A pickle can run any code, so only plain tensors are read from one; ask for safetensors.",
    )
