"""Read the pickle in a torch file without unpickling it.

A pickle is a program. This interpreter has no instruction to call or import anything: it builds dictionaries, lists,
tuples, numbers and strings, and records the places of tensors. It refuses by name the first instruction or object that
torch does not write for a dictionary of tensors.
"""

import pickletools
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from surgeon.checkpoint.header import DOWNLOAD_HINT, DTYPE_BITS
from surgeon.errors import CheckpointError

# The classes of torch's typed storages, without their ending "Storage", and its dtypes that have no such class.
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
_CALLS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
}

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINSTRING"}

# A tensor takes some 35 instructions; so many take a few seconds and a few hundred MB at most.
MAX_INSTRUCTIONS = 4_000_000
MAX_PAIRS = 500_000  # of all dictionaries that are made from lists
MAX_DIMENSIONS = 64  # as many as NumPy has


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of numbers of one dtype (None: untyped bytes), which the file holds under `key`."""

    dtype: str | None
    key: str

    @property
    def itemsize(self) -> int:
        return DTYPE_BITS[self.dtype or "U8"] // 8


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor's place in a storage; offset and strides count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def interpret(pickle: IO[bytes], where: str, storages: MutableMapping[str, Storage] | None = None) -> Any:
    """Return the object that the next pickle of a file describes, and add every storage in it to `storages`.

    Raises CheckpointError when the pickle is damaged, or holds more than tensors.
    """
    machine = _Machine(where, {} if storages is None else storages)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
            if count == MAX_INSTRUCTIONS:
                raise CheckpointError(
                    f"{where} has a pickle of over {count} instructions; no dictionary of tensors needs so many",
                    hint=DOWNLOAD_HINT,
                )
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        # A damaged pickle ends early, or its operands are missing or wrong.
        raise CheckpointError(f"{where} is damaged: its pickle is invalid", hint=DOWNLOAD_HINT) from error


def refuse_content(where: str, content: str) -> NoReturn:
    """Raise the error for a file that holds something other than plain tensors."""
    raise CheckpointError(
        f"{where} holds more than tensors: {content}",
        hint="None of it was run: a pickle is a program, so only plain tensors are read. Ask for safetensors.",
    )


@dataclass(frozen=True, slots=True)
class _Global:
    """A function, class or dtype that a pickle names. It is never looked up."""

    module: str
    name: str


class _Machine:
    """The pickle machine: a stack, the stacks saved at marks, and a memo."""

    def __init__(self, where: str, storages: MutableMapping[str, Storage]) -> None:
        self.where = where
        self.storages = storages
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.pairs = 0

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name == "MARK":
            self.marked.append(self.stack)
            self.stack = []
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(self._global(argument))
        elif name == "BINPERSID":
            self.stack.append(self._storage(self.stack.pop()))
        elif name == "REDUCE":
            arguments, function = self.stack.pop(), self.stack.pop()
            self.stack.append(self._call(function, arguments))
        elif name not in ("PROTO", "STOP"):
            self._collect(name)

    def _collect(self, name: str) -> None:
        """Carry out an instruction that moves items from the stack into a collection."""
        match name:
            case "TUPLE":
                items = self._since_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.stack.pop() for _ in range(int(name[-1]))]
                self.stack.append(tuple(reversed(items)))
            case "APPEND":
                item = self.stack.pop()
                self.stack[-1].append(item)
            case "APPENDS":
                items = self._since_mark()
                self.stack[-1].extend(items)
            case "SETITEM":
                value, key = self.stack.pop(), self.stack.pop()
                _set_items(self.stack[-1], [key, value])
            case "SETITEMS":
                items = self._since_mark()
                _set_items(self.stack[-1], items)
            case "BUILD":  # attributes of a dictionary: state_dict() stores the versions of modules in one
                self.stack.pop()
            case _:
                refuse_content(self.where, f"the pickle instruction {name}, which torch.save does not write")

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _global(self, argument: str) -> _Global:
        module, _, name = argument.partition(" ")
        is_storage = module in ("torch", "torch.cuda") and name.removesuffix("Storage") in _STORAGES
        is_dtype = module == "torch" and name in _DTYPES
        if is_storage or is_dtype or (module, name) == ("torch.storage", "UntypedStorage") or (module, name) in _CALLS:
            return _Global(module, name)
        refuse_content(self.where, repr(f"{module}.{name}"[:100]))

    def _storage(self, identity: Any) -> Storage:
        """Return the storage that a persistent id names: ("storage", its type, key, device, length[, None])."""
        kind, typename, key, _, _, *view = _tuple(identity, most=6)
        if kind != "storage" or not isinstance(typename, _Global) or not isinstance(key, str):
            raise TypeError("not the id of a storage")
        if any(part is not None for part in view):
            refuse_content(self.where, "a view of a storage, as torch wrote before 0.4")
        untyped = typename.name == "UntypedStorage"
        storage = Storage(None if untyped else _STORAGES[typename.name.removesuffix("Storage")], key)
        self.storages[key] = storage
        return storage

    def _call(self, function: Any, arguments: Any) -> Any:
        """Return the result of a call, for the few calls that a dictionary of tensors needs."""
        if not isinstance(function, _Global) or (function.module, function.name) not in _CALLS:
            raise TypeError("not a call that makes a tensor")
        match function.name:
            case "OrderedDict":
                return self._dictionary(*_tuple(arguments, most=1))
            case "_rebuild_parameter":
                return _tuple(arguments, most=3)[0]
            case "_rebuild_tensor_v3":
                storage, offset, shape, strides, _, _, dtype, *marks = _tuple(arguments, most=8)
                return self._tensor(storage, _DTYPES[dtype.name], offset, shape, strides, marks)
            case _:
                storage, offset, shape, strides, *rest = _tuple(arguments, most=7)
                return self._tensor(storage, storage.dtype, offset, shape, strides, rest[2:])

    def _dictionary(self, pairs: Any = ()) -> dict[Any, Any]:
        """Return an OrderedDict as Python 2 wrote it: from a list of [key, value].

        A list can be used any number of times, but no file that torch wrote uses one twice.
        """
        result: dict[Any, Any] = {}
        self.pairs += len(pairs)
        if self.pairs > MAX_PAIRS:
            raise ValueError("lists that are copied again and again")
        for key, value in pairs:
            _set_items(result, [key, value])
        return result

    def _tensor(
        self, storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any, marks: list[Any]
    ) -> PickledTensor:
        if any(marks):  # conjugated or negated when read: its bytes are not its numbers
            # Only words are shown: what else stands there may be nested, or shared, without end.
            words = [word for word in marks[0] if isinstance(word, str)] if isinstance(marks[0], dict) else []
            refuse_content(self.where, f"a tensor that is marked {sorted(words)[:3]}")
        if not isinstance(storage, Storage) or dtype is None or len(shape) != len(strides):
            raise TypeError("not a tensor")
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError("a shape that no tensor has")
        if not all(type(count) is int and 0 <= count < 2**63 for count in (offset, *shape, *strides)):
            raise ValueError("not a tensor")
        return PickledTensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _tuple(value: Any, *, most: int) -> tuple[Any, ...]:
    """Return the arguments of a call. One list can be the arguments of many calls, so a long one is refused."""
    if not isinstance(value, tuple) or len(value) > most:
        raise TypeError("not the arguments of this call")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    """Put items (key, value, key, value ...) into a dictionary. Keys must be plain: nothing else is hashed."""
    if not isinstance(target, dict) or not all(isinstance(key, (str, int)) for key in items[::2]):
        raise TypeError("not a dictionary with plain keys")
    target.update(zip(items[::2], items[1::2], strict=True))
