"""Feed a reader of files from strangers with inputs that a coverage-guided fuzzer (atheris) makes.

    python benchmarks/fuzz.py header --runs 1000000

Whatever the bytes say, a reader returns, or raises a SurgeonError; anything else ends the run, and the input is kept
beside the corpus. A reader that returns has more to show: what it read must be consistent. TARGETS lists the readers.
"""

import argparse
import io
import pickle
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

Target = Callable[[bytes], None]


def header() -> tuple[Target, Iterator[bytes]]:
    """The header of a safetensors file: what is accepted is written again and read as the same."""
    from handmade import llama, safetensors

    from surgeon.checkpoint.header import format_header, header_length, parse_header

    def read(data: bytes) -> None:
        assert header_length(len(data).to_bytes(8, "little"), file_size=8 + len(data), where="fuzz") == len(data)
        ends = re.findall(rb"(\d{1,18})\s*\]\s*[,}]", data)
        nbytes = max(map(int, ends), default=0)  # the length that the file needs, for most others are refused at once
        entries = parse_header(data, file_size=8 + len(data) + nbytes, where="fuzz")
        specs = {name: entry.spec for name, entry in entries.items()}
        assert sum(spec.nbytes for spec in specs.values()) == nbytes
        again = format_header(specs)
        parsed = parse_header(again[8:], file_size=len(again) + nbytes, where="again")
        assert {name: entry.spec for name, entry in parsed.items()} == specs

    def seeds() -> Iterator[bytes]:
        file = safetensors(dict(list(llama().items())[:2]))
        yield file[8 : 8 + int.from_bytes(file[:8], "little")].rstrip()
        yield b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]},"":{"dtype":"U8","shape":[],"data_offsets":[1,2]}}'
        yield b'{"__metadata__":{"format":"pt"},"\\u00e9":{"dtype":"I64","shape":[0,9],"data_offsets":[0,0]}}'
        yield b"{}"

    return read, seeds()


def pickles() -> tuple[Target, Iterator[bytes]]:
    """The pickle of a torch file: whatever it says, only plain objects come of it."""
    from surgeon.checkpoint.formats.torch_pickle import interpret

    def read(data: bytes) -> None:
        interpret(io.BytesIO(data), "fuzz")

    return read, (_inside(file) for file in _torch_files() if file.startswith(b"PK"))


def torch_files() -> tuple[Target, Iterator[bytes]]:
    """A whole torch file, zip or legacy: what is accepted lies inside the file."""
    from surgeon.checkpoint.formats.torch_file import read_torch_file

    place = Path(tempfile.mkdtemp(prefix="surgeon-fuzz-")) / "pytorch_model.bin"

    def read(data: bytes) -> None:
        place.write_bytes(data)
        for tensor in read_torch_file(place).tensors.values():
            assert 0 <= tensor.start <= tensor.end <= len(data)
            assert tensor.spec.nbytes <= len(data)

    return read, _torch_files()


TARGETS: Mapping[str, Callable[[], tuple[Target, Iterator[bytes]]]] = {
    "header": header,
    "pickle": pickles,
    "torch-file": torch_files,
}


WORDS = r"""
"dtype" "shape" "data_offsets" "F32" "BF16" "F4" "F6_E2M3" "U8" "__metadata__" [0,0] {} [] null true -1 1e9 \ud800
9223372036854775807 9223372036854775808 collections OrderedDict torch._utils _rebuild_tensor_v2 _rebuild_parameter
_rebuild_tensor_v3 torch FloatStorage HalfStorage UntypedStorage float8_e4m3fn storage cpu PK data.pkl byteorder little
"""


def _torch_files() -> Iterator[bytes]:
    """Return small files that torch.save writes, of both formats."""
    import torch

    values: list[Any] = [
        {"a": torch.ones(2, 3), "b": torch.ones(3, 2, dtype=torch.float16).t(), "epoch": 3, "name": "x", "no": None},
        {"w": torch.nn.Parameter(torch.ones(2)), "f8": torch.ones(2).to(torch.float8_e4m3fn)},
    ]
    for value in values:
        for is_zip in (True, False):
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=is_zip)
            yield file.getvalue()
    yield pickle.dumps({"a": [1, (2, 3)], "b": 1.5}, protocol=2)


def _inside(file: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def main() -> None:
    """Fuzz one target for a number of runs; exit with 0 where nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=int, default=4096, help="bytes of an input")
    parser.add_argument("--corpus", type=Path, help="a directory that is read and added to; default: a new one")
    options = parser.parse_args()

    import atheris

    with atheris.instrument_imports(include=["surgeon", "pickletools", "zipfile", "json"]):
        read, seeds = TARGETS[options.target]()
    from surgeon.errors import SurgeonError

    corpus = options.corpus or Path(tempfile.mkdtemp(prefix="surgeon-fuzz-"))
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def one(data: bytes) -> None:
        try:
            read(data)
        except SurgeonError as error:
            said = str(error)
        else:
            said = ""
        assert not said or (said.isprintable() and len(said) < 2000), "an error line that nobody can read"

    words = corpus.with_name(f"{corpus.name}-words")
    lines = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in WORDS.split())
    words.write_text("".join(f'"{line}"\n' for line in lines))
    limits = [
        f"-dict={words}",
        f"-runs={options.runs}",
        f"-max_len={options.longest}",
        f"-seed={options.seed}",
        "-timeout=10",
    ]
    limits += ["-rss_limit_mb=2000", f"-artifact_prefix={corpus.parent}/{corpus.name}-found-", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
