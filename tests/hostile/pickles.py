"""Hostile pickles, zip files and GGUF files."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile.bases import Case, Damage

BIN = "pytorch_model.bin"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


def cases() -> Iterator[Case]:
    """Yield the hostile files of `surgeon convert`."""
    for name, content in PICKLES.items():
        yield Case(f"pickle: {name}", "handmade", _bin(lambda content=content: _zip(content)), ("convert",), (BIN,))
    for name, make in FILES.items():
        yield Case(f"torch file: {name}", "handmade", _bin(make), ("convert",), (BIN,))
    for name, damage in DIRECTORIES.items():
        yield Case(f"convert: {name}", "handmade", damage, ("convert",), (BIN, "model", "config.json"))
    for name, edit in GGUFS.items():
        yield Case(f"gguf: {name}", "gguf", edit, ("convert-file",), ("model.gguf", "gguf"))


def _bin(make: Callable[[], bytes]) -> Damage:
    def damage(at: Path) -> None:
        (at / "model" / "model.safetensors").unlink()
        (at / "model" / BIN).write_bytes(make())

    return damage


# --- pickles ------------------------------------------------------------------------------------------------------


def _dictionary(value: bytes) -> bytes:
    """Return the pickle of {"a": value}."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s."


def _tensor(arguments: bytes, function: bytes = b"_rebuild_tensor_v2") -> bytes:
    return _dictionary(b"ctorch._utils\n" + function + b"\n(" + arguments + b"tR")


def _text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


REST = b"\x89ccollections\nOrderedDict\n)R"  # requires_grad, backward_hooks
DEEP = b"]" * 50_000 + b"a" * 49_999
SHARED = b"]" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # each holds the one before twice


class _Runs:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


PICKLES: dict[str, bytes] = {
    "a call of os.system": pickle.dumps({"a": _Runs()}, protocol=2),
    "a call of eval": _dictionary(b"cbuiltins\neval\n" + _text("1") + b"\x85R"),
    "a class that is named alone": _dictionary(b"cos\nsystem\n"),
    "a class of torch": _dictionary(b"ctorch.nn\nModule\n)R"),
    "a name of a megabyte": _dictionary(b"cos\n" + b"x" * 10**6 + b"\n"),
    "a name with escapes": _dictionary(b"cos\n\x1b[2Jx\n"),
    "protocol 4": pickle.dumps({"a": OrderedDict()}, protocol=4),
    "protocol 5": pickle.dumps({"a": 1}, protocol=5),
    "protocol 0": pickle.dumps({"a": 1}, protocol=0),
    "an object that is built": pickle.dumps({"a": zipfile.ZipInfo("x")}, protocol=2),
    "no dictionary": b"\x80\x02]q\x00.",
    "a number": b"\x80\x02K\x01.",
    "nothing": b"",
    "no end": b"\x80\x02}",
    "no stack": b".",
    "an empty stack": b"\x80\x020.",
    "a mark too few": b"\x80\x02}u.",
    "a memo that is not there": b"\x80\x02h\x05.",
    "a string longer than the file": b"\x80\x02X\xff\xff\xff\x7fa.",
    "bytes longer than the file": b"\x80\x02\x8e" + struct.pack("<Q", 2**40) + b"a.",
    "a number of a megabyte": b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6 + b".",
    "a negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "bad UTF-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "half a surrogate": _dictionary(b"V\\ud800\n"),
    "keys that are lists": b"\x80\x02}]K\x01s.",
    "keys that are tuples": b"\x80\x02}K\x01K\x02\x86K\x01s.",
    "a key that is a tensor": b"\x80\x02}" + STORAGE + b"K\x01s.",
    "a nested dictionary": _dictionary(b"}"),
    "itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "lists in one another": _dictionary(DEEP),
    "lists that hold one another twice": _dictionary(SHARED),
    "deep marks": _tensor(STORAGE + b"K\x00K\x02\x85K\x01\x85" + REST + DEEP),
    "shared marks": _tensor(STORAGE + b"K\x00K\x02\x85K\x01\x85" + REST + SHARED),
    "a dictionary of deep marks": _tensor(STORAGE + b"K\x00K\x02\x85K\x01\x85" + REST + b"}K\x01" + DEEP + b"s"),
    "marks that are true": _tensor(STORAGE + b"K\x00K\x02\x85K\x01\x85" + REST + b"\x88"),
    "a conjugated tensor": _tensor(STORAGE + b"K\x00K\x02\x85K\x01\x85" + REST + b"}X\x04\x00\x00\x00conj\x88s"),
    "a tensor without arguments": _tensor(b""),
    "a tensor without a storage": _tensor(b"K\x00K\x00K\x02\x85K\x01\x85" + REST),
    "a shape that is a word": _tensor(STORAGE + b"K\x00X\x01\x00\x00\x002K\x01\x85" + REST),
    "a negative offset": _tensor(STORAGE + b"J\xff\xff\xff\xffK\x02\x85K\x01\x85" + REST),
    "more strides than sizes": _tensor(STORAGE + b"K\x00K\x02\x85K\x01K\x01\x86" + REST),
    "a stride of zero": _tensor(STORAGE + b"K\x00J\xff\xff\xff\x7f\x85K\x00\x85" + REST),
    "beyond its storage": _tensor(STORAGE + b"K\x00K\xff\x85K\x01\x85" + REST),
    "a shape that overflows": _tensor(STORAGE + b"K\x00" + b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85K\x01\x85" + REST),
    "a shape of 100 sizes": _tensor(STORAGE + b"K\x00(" + b"K\x01" * 100 + b"t(" + b"K\x01" * 100 + b"t" + REST),
    "a storage that is not there": _tensor(STORAGE.replace(b"0X\x03", b"9X\x03") + b"K\x00K\x02\x85K\x01\x85" + REST),
    "a storage with a path": _tensor(
        STORAGE.replace(b"X\x01\x00\x00\x000", _text("../../../etc/passwd")) + b"K\x00K\x02\x85K\x01\x85" + REST
    ),
    "a persistent id that is a word": _dictionary(_text("x") + b"Q"),
    "a persistent id of a million": _dictionary(b"(" + b"N" * 10**6 + b"tQ"),
    "a dtype that is a word": _tensor(STORAGE + b"K\x00K\x02\x85K\x01\x85" + REST + _text("x"), b"_rebuild_tensor_v3"),
    "a parameter without a tensor": _tensor(b"", b"_rebuild_parameter"),
    "pairs that are none": _dictionary(b"ccollections\nOrderedDict\n(](K\x01K\x02K\x03teatR"),
}


def _zip(content: bytes, *, root: str = "archive", **others: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{root}/data.pkl", content)
        archive.writestr(f"{root}/byteorder", b"little")
        archive.writestr(f"{root}/data/0", bytes(16))
        for name, data in others.items():
            archive.writestr(name, data)
    return file.getvalue()


def _good() -> bytes:
    return _tensor(STORAGE + b"K\x00K\x02\x85K\x01\x85" + REST)


def _repeated_pairs() -> bytes:
    """Return a pickle in which one list of 100,000 pairs is made into a dictionary 10,000 times."""
    pairs = b"](" + b"K\x01K\x02\x86" * 100_000 + b"eq\x01"
    call = b"ccollections\nOrderedDict\nh\x01\x85Rb"  # BUILD takes the result away again
    return b"\x80\x02" + pairs + b"b" + call * 10_000 + b"}."


def _repeated_shape() -> bytes:
    """Return a pickle in which one shape of 100,000 sizes is used 10,000 times."""
    shape = b"(" + b"K\x01" * 100_000 + b"tq\x01"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00h\x01h\x01" + REST + b"tRb"
    return b"\x80\x02" + shape + b"b" + call * 10_000 + b"}."


def _twice() -> bytes:
    file = io.BytesIO(_zip(_good()))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/data/0", b"another storage!")
    return file.getvalue()


def _renamed_inside() -> bytes:
    raw = _zip(_good())
    return raw.replace(b"archive/data/0", b"archive/data/1", 1)


def _deflated() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", _good() + bytes(10**7))
        archive.writestr("archive/data/0", bytes(16))
    return file.getvalue()


def _many_entries() -> bytes:
    """Return a zip file with a directory of 20 MB."""
    raw = _zip(_good())
    end = raw.rindex(b"PK\x05\x06")
    start, size = struct.unpack("<II", raw[end + 16 : end + 20] + raw[end + 12 : end + 16])
    directory = raw[start : start + size]
    copies = 20_000_000 // size
    tail = raw[end : end + 8] + struct.pack("<HHII", 0xFFFE, 0xFFFE, size * copies, start) + b"\0\0"
    return raw[:start] + directory * copies + tail


def _patched(offset: int, value: bytes) -> Callable[[], bytes]:
    """Return a maker of the zip file with `value` at `offset` of the first entry of its directory."""

    def make() -> bytes:
        raw = bytearray(_zip(_good()))
        at = raw.index(b"PK\x01\x02") + offset
        raw[at : at + len(value)] = value
        return bytes(raw)

    return make


LEGACY = b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}" + _text("little_endian")
FILES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "an HTML page": lambda: b"<!DOCTYPE html>",
    "a Git LFS pointer": lambda: b"version https://git-lfs.github.com/spec/v1\n",
    "a tar": lambda: b"ustar" + bytes(2000),
    "safetensors": lambda: (2).to_bytes(8, "little") + b"{}",
    "a zip without its end": lambda: _zip(_good())[:-30],
    "only the start of a zip": lambda: b"PK\x03\x04",
    "a zip without data.pkl": lambda: _zip(_good()).replace(b"data.pkl", b"data.pkm"),
    "a zip with two data.pkl": lambda: _zip(_good(), **{"other/data.pkl": _good()}),
    "a zip with two entries of one name": _twice,
    "a zip with another name inside": _renamed_inside,
    "a compressed zip": _deflated,
    "a directory of 20 MB": _many_entries,
    "big-endian numbers": lambda: _zip(_good()).replace(b"little", b"big\0\0\0"),
    "an encrypted entry": _patched(8, b"\x01\x00"),
    "an entry beyond the file": _patched(42, b"\xff\xff\xff\x7f"),
    "an entry of 4 GB": _patched(24, b"\xfe\xff\xff\xff"),
    "an unknown compression": _patched(10, b"\x63\x00"),
    "a name that is no text": _patched(46, b"\xff\xfe\xfd"),
    "five million instructions": lambda: _zip(b"\x80\x02" + b"Nb" * 2_500_000 + b"}."),
    "a pickle of 26 MB": lambda: _zip(b"\x80\x02" + _text("x" * 26_000_000) + b"b}."),
    "a list of pairs used again and again": lambda: _zip(_repeated_pairs()),
    "a shape used again and again": lambda: _zip(_repeated_shape()),
    "no dictionary in the legacy form": lambda: LEGACY + b"\x88s.\x80\x02K\x01.\x80\x02].",
    "a big-endian legacy file": lambda: LEGACY + b"\x89s.\x80\x02}.\x80\x02].",
    "a legacy file that ends": lambda: LEGACY,
    "a legacy call of os.system": lambda: LEGACY + b"\x88s." + pickle.dumps(_Runs(), protocol=2),
    "legacy keys of no storage": lambda: LEGACY + b"\x88s.\x80\x02}.\x80\x02](X\x01\x00\x00\x000e.",
    "a legacy string of gigabytes": lambda: LEGACY + b"\x88s.\x80\x02\x8d" + struct.pack("<Q", 2**33) + b"x",
}


def _link_bin(target: str) -> Damage:
    def damage(at: Path) -> None:
        (at / "model" / "model.safetensors").unlink()
        (at / "model" / BIN).symlink_to(target)

    return damage


def _pipe_bin(at: Path) -> None:
    (at / "model" / "model.safetensors").unlink()
    os.mkfifo(at / "model" / BIN)


DIRECTORIES: dict[str, Damage] = {
    "a pipe": _pipe_bin,
    "/dev/zero": _link_bin("/dev/zero"),
    "a link to nothing": _link_bin("gone"),
    "a checkpoint that is converted": lambda at: None,
    "nothing to convert": lambda at: (at / "model" / "model.safetensors").unlink(),
    "an index that leaves": lambda at: [
        (at / "model" / "model.safetensors").unlink(),
        (at / "model" / f"{BIN}.index.json").write_text('{"weight_map":{"a":"../a.bin"}}'),
    ],
}


# --- GGUF ---------------------------------------------------------------------------------------------------------


def _gguf(change: Callable[[bytes], bytes]) -> Damage:
    def damage(at: Path) -> None:
        path = at / "model.gguf"
        path.write_bytes(change(path.read_bytes()))

    return damage


def _at(offset: int, value: bytes) -> Damage:
    return _gguf(lambda raw: raw[:offset] + value + raw[offset + len(value) :])


def _with_code(at: Path) -> None:
    (at / "tokenizer_config.json").write_text('{"auto_map":{"AutoTokenizer":["code.Tokenizer",null]}}')
    (at / "config.json").write_text('{"auto_map":{"AutoConfig":"code.Config"}}')


GGUFS: dict[str, Damage] = {
    "empty": _gguf(lambda raw: b""),
    "only its name": _gguf(lambda raw: raw[:4]),
    "cut in the header": _gguf(lambda raw: raw[:60]),
    "cut in the metadata": _gguf(lambda raw: raw[:2000]),
    "cut in the data": _gguf(lambda raw: raw[:-500]),
    "another name": _at(0, b"GGML"),
    "an unknown version": _at(4, b"\x63\x00\x00\x00"),
    "the other byte order": _at(4, b"\x00\x00\x00\x03"),
    "2^60 tensors": _at(8, struct.pack("<Q", 2**60)),
    "no tensors": _at(8, struct.pack("<Q", 0)),
    "2^60 entries": _at(16, struct.pack("<Q", 2**60)),
    "no entries": _at(16, struct.pack("<Q", 0)),
    "a key of 2^62 bytes": _at(24, struct.pack("<Q", 2**62)),
    "an unknown architecture": _gguf(lambda raw: raw.replace(b"llama", b"zorg9")),
    "an architecture with escapes": _gguf(lambda raw: raw.replace(b"llama", b"\x1b[2Jx")),
    "tokens that are renamed": _gguf(lambda raw: raw.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz")),
    "an unknown tokenizer": _gguf(lambda raw: raw.replace(b"gpt2", b"zorg")),
    "zero heads": _gguf(lambda raw: raw.replace(b"head_count\x04\x00\x00\x00\x08", b"head_count\x04\x00\x00\x00\x00")),
    "a pipe": lambda at: [(at / "model.gguf").unlink(), os.mkfifo(at / "model.gguf")],
    "/dev/zero": lambda at: [(at / "model.gguf").unlink(), (at / "model.gguf").symlink_to("/dev/zero")],
    "a directory": lambda at: [(at / "model.gguf").unlink(), (at / "model.gguf").mkdir()],
    "code beside it": _with_code,
}
