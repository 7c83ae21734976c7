"""Feed a reader of files from strangers with inputs that a coverage-guided fuzzer (atheris) makes.

    python benchmarks/fuzz.py header --runs 1000000

Whatever the bytes say, a reader returns, or raises a SurgeonError; anything else ends the run, and the input is kept
beside the corpus. A reader that returns has more to show: what it read must be consistent. TARGETS lists the readers.
"""

import argparse
import io
import pickle
import re
import resource
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

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


def configs() -> tuple[Target, Iterator[bytes]]:
    """Configs with edited values: a surgery is refused, or its result is as whole as its source."""
    import toys

    from surgeon.anatomy.anatomy import read_anatomy
    from surgeon.anatomy.layer_rules import INDEX_LISTS, LAYER_LISTS, RULES
    from surgeon.checkpoint.header import CheckpointSpec
    from surgeon.checkpoint.source import open_directory, spec_of
    from surgeon.errors import SurgeonError
    from surgeon.transforms.grow import grow
    from surgeon.transforms.layers import truncate

    place = Path(tempfile.mkdtemp(prefix="surgeon-fuzz-"))
    names = ("llama", "gpt2", "gemma2", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "t5")
    specs = [spec_of(open_directory(toys.build(name, place / name))) for name in names]
    rules = {key for rules in RULES.values() for rule in rules for key in rule.keys}
    others = sorted({*INDEX_LISTS, *LAYER_LISTS, *rules, "text_config", "quantization_config", "auto_map", "gist"})
    surgeries = [
        lambda anatomy, size: truncate(anatomy, size % 9),
        lambda anatomy, size: grow(anatomy, layers=size % 13),
        lambda anatomy, size: grow(anatomy, hidden_size=size, intermediate_size=2 * size),
    ]

    def read(data: bytes) -> None:
        which, surgery, size, *edits = (*data, 0, 0, 0)
        spec = specs[which % len(specs)]
        keys = [*spec.config, *others]
        config = dict(spec.config)
        for key, kind, number in zip(edits[::3], edits[1::3], edits[2::3], strict=False):
            config[keys[key % len(keys)]] = _value(kind, number)
        edited = CheckpointSpec(config, spec.tensors)
        plan = surgeries[surgery % len(surgeries)](read_anatomy(edited), size)
        try:
            read_anatomy(plan.result(edited))
        except SurgeonError as error:
            raise AssertionError(f"a plan for a result that is refused: {error}") from error

    return read, iter([bytes(12), bytes(range(30)), bytes([3, 1, 8, 40, 3, 2])])


def _value(kind: int, number: int) -> Any:
    """Return a value of a config, of any type."""
    values: list[Any] = [number, -number, float(number), str(number), None, bool(number % 2), [], {}, [number] * 6]
    values += [["full_attention"] * (number % 9), [[["global", "local"], number % 5]], {"a": number}, 2**number, "x"]
    values += [[number % 7], [None], ["x"] * 6, [0, 1] * 3, {"rope_type": "default"}, float("nan"), float("inf")]
    return values[kind % len(values)]


def receipts() -> tuple[Target, Iterator[bytes]]:
    """A surgeon.json: what is taken for a receipt can be read by all that read receipts."""
    from surgeon.checkpoint.receipt import read_receipt, receipt, to_bytes
    from surgeon.train.model import new_token_ids, trained_layers
    from surgeon.verbs.inspect import _axis
    from surgeon.verbs.verify import _noise, _reason

    place = Path(tempfile.mkdtemp(prefix="surgeon-fuzz-"))

    def read(data: bytes) -> None:
        (place / "surgeon.json").write_bytes(data)
        content = read_receipt(place)
        if content is None:
            return
        for runs in content.get("axis_maps", {}).values():
            assert _axis(runs)
        _noise(content)
        _reason(content)
        new_token_ids(content)
        for which in ("new", "cut"):
            trained_layers(which, content, len(content.get("layer_map", [])))

    step = {"grow": {"noise": 0.5, "layers": 8}, "gist": {"token_ids": [7]}, "truncate": {}}
    told = receipt(
        source={"path": "x"},
        steps=[step],
        layer_map=[0, None, 1],
        axis_maps={"ffn": [[0, 4], [-1, 2]]},
        options={},
        command=None,
        notes=["a"],
        approximate=["b"],
    )
    return read, iter([to_bytes(told), b"{}"])


def scores() -> tuple[Target, Iterator[bytes]]:
    """A scores.json: what is taken for scores can be written again, and chosen by."""
    from surgeon.measure.record import Scores, check_model, check_ranking, read_scores
    from surgeon.transforms.scores import METHODS

    place = Path(tempfile.mkdtemp(prefix="surgeon-fuzz-")) / "scores.json"

    def read(data: bytes) -> None:
        place.write_bytes(data)
        record = read_scores(place)
        assert read_scores_again(record) == record
        check_model(record, {"fingerprint": "x"}, "model")
        for name in METHODS:
            check_ranking(record, name)

    def read_scores_again(record: Scores) -> Scores:
        place.write_bytes(record.to_bytes())
        return read_scores(place)

    matrix = [[None if end <= start else 0.5 for end in range(3)] for start in range(2)]
    layers = {"angular": matrix, "magnitude": [1, 2.5]}
    widths = {"contribution": {"ffn": [[1.0, 2], [3, 4]], "hidden": [1, 2]}}
    whole = Scores(
        {"fingerprint": "x"}, 2, {"sha256": "y"}, 8, 0, {"tokens": "last"}, layers, widths, {"order": [1]}, 2.5
    )
    return read, iter([whole.to_bytes(), b'{"format":1}'])


TARGETS: Mapping[str, Callable[[], tuple[Target, Iterator[bytes]]]] = {
    "header": header,
    "pickle": pickles,
    "torch-file": torch_files,
    "config": configs,
    "receipt": receipts,
    "scores": scores,
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
    own = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    )  # the peak of the process that started this one counts
    limits += [
        f"-rss_limit_mb={own + 2000}",
        f"-artifact_prefix={corpus.parent}/{corpus.name}-found-",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
