"""The safetensors header: what is refused and why, and that the reference implementation agrees."""

import json
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from handmade import data, raw_file
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from surgeon.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES, TensorSpec, format_header, parse_header, read_header
from surgeon.errors import CheckpointError

A = '"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
B = '"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}'
ZERO = '"b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}'


def one(dtype: str = '"U8"', shape: str = "[2]", offsets: str = "[0,2]") -> str:
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'


def refusal(path: Path) -> str | None:
    """Return why we refuse the file, None where we do not."""
    try:
        read_header(path)
    except CheckpointError as error:
        return f"{error}" if error.hint else "no hint"
    return None


def accepted_by_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "np"):
            return True
    except SafetensorError:
        return False


REFUSED = {
    "an empty file": (b"", "is 0 bytes long, too short"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "is 7 bytes long, too short"),
    "a header beyond the file": ((9).to_bytes(8, "little") + b"{}", "its header needs 9 bytes, the file has 2"),
    "a header of 2^64 - 1": (b"\xff" * 8 + b"{}", "claims a header of 18446744073709551615 bytes"),
    "a header of 101 MB": ((101_000_000).to_bytes(8, "little") + b"{}", "at most 25000000 are read"),
    "no object": (raw_file("[]"), "does not begin with '{'"),
    "no header at all": (raw_file(""), "does not begin with '{'"),
    "half an object": (raw_file("{"), "not JSON"),
    "zeros behind the object": (raw_file("{}\0"), "not JSON"),
    "two objects": (raw_file("{}{}"), "not JSON"),
    "bad UTF-8": (raw_file(b'{"\xff":1}'), "not JSON"),
    "endless nesting": (raw_file('{"a":' + "[" * 100_000), "not JSON"),
    "a number of 5000 digits": (raw_file(one(shape=f"[{'9' * 5000}]")), "not JSON"),
    "a repeated tensor": (raw_file(f"{{{A},{A}}}", b"12"), "has two entries 'a'"),
    "a repeated field": (raw_file(one(dtype='"U8","dtype":"U8"'), b"12"), "has two entries 'dtype'"),
    "repeated metadata": (raw_file(f'{{"__metadata__":{{"x":"1","x":"2"}},{A}}}', b"12"), "has two entries 'x'"),
    "metadata that is a list": (raw_file('{"__metadata__":[]}'), "__metadata__"),
    "metadata with a number": (raw_file('{"__metadata__":{"x":1}}'), "__metadata__"),
    "a tensor that is a number": (raw_file('{"a":1}'), "describes 'a' by something other"),
    "a tensor without dtype": (raw_file('{"a":{"shape":[2],"data_offsets":[0,2]}}', b"12"), "describes 'a'"),
    "an unknown dtype": (raw_file(one('"F12"'), b"12"), "gives 'a' the unknown dtype 'F12'"),
    "a dtype that is a list": (raw_file(one("[]"), b"12"), "gives 'a' the unknown dtype []"),
    "a negative length": (raw_file(one(shape="[-2]"), b"12"), "impossible shape [-2]"),
    "a length of 2.0": (raw_file(one(shape="[2.0]"), b"12"), "impossible shape [2.0]"),
    "a length that is true": (raw_file(one(shape="[true]", offsets="[0,1]"), b"1"), "impossible shape [True]"),
    "a shape that is a number": (raw_file(one(shape="2"), b"12"), "impossible shape 2"),
    "a length beyond 64 bits": (raw_file(one(shape="[18446744073709551616]"), b"12"), "impossible shape"),
    "a product beyond 64 bits": (raw_file(one(shape=f"[{2**62},{2**62}]"), b"12"), "impossible shape"),
    "a product that wraps to 0": (raw_file(one(shape=f"[{2**32},{2**32}]", offsets="[0,0]")), "impossible shape"),
    "an overflow before a 0": (raw_file(one(shape=f"[{2**62},4,0]", offsets="[0,0]")), "impossible shape"),
    "one offset": (raw_file(one(offsets="[0]"), b"12"), "impossible data_offsets [0]"),
    "three offsets": (raw_file(one(offsets="[0,1,2]"), b"12"), "impossible data_offsets"),
    "a negative offset": (raw_file(one(offsets="[-2,0]"), b"12"), "impossible data_offsets"),
    "offsets backwards": (raw_file(one(offsets="[2,0]"), b"12"), "impossible data_offsets"),
    "fewer bytes than the shape": (raw_file(one(shape="[3]"), b"12"), "gives 'a' 2 bytes; U8 [3] needs 3"),
    "half a byte": (raw_file(one('"F4"', shape="[3]", offsets="[0,1]"), b"1"), "F4 [3] needs 1.5"),
    "an overlap": (raw_file(f"{{{A},{B.replace('[2,3]', '[1,2]')}}}", b"12"), "'b' where it overlaps"),
    "a hole": (raw_file(f"{{{A},{B.replace('[2,3]', '[3,4]')}}}", b"1234"), "'b' where it leaves a hole"),
    "a hole in front": (raw_file(one(offsets="[1,3]"), b"123"), "'a' where it leaves a hole"),
    "a missing byte": (raw_file(f"{{{A}}}", b"1"), "is truncated: its tensors end at byte"),
    "a byte too many": (raw_file(f"{{{A}}}", b"123"), "has 1 bytes after its last tensor"),
    "half a surrogate pair": (raw_file(f"{{{A.replace('a', chr(92) + 'ud800', 1)}}}", b"12"), "half a surrogate pair"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_damaged_file_is_refused_with_one_sentence_that_names_the_file(what, tmp_path):
    content, reason = REFUSED[what]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    found = refusal(path)

    assert found is not None
    assert found.startswith("model.safetensors ")
    assert reason in found


# What the reference lets pass, and why we do not. Everything else must agree.
STRICTER = {
    "a repeated tensor": "readers disagree on which of the two counts",
    "repeated metadata": "the same",
}
STRICTER_ONLY = {
    "white space first": raw_file(f" {{{A}}}", b"12"),  # the format: must begin with {
    "no metadata, explicitly": raw_file(f'{{"__metadata__":null,{A}}}', b"12"),
    "an unknown field": raw_file(one(offsets='[0,2],"x":1'), b"12"),
    "a tensor as a list": raw_file('{"a":["U8",[2],[0,2]]}', b"12"),
    "a dtype as an object": raw_file(one('{"U8":null}'), b"12"),
    "a length of 2^63": raw_file(one(shape=f"[{2**63},0]", offsets="[0,0]")),  # no tensor library has such a one
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_we_refuse_the_reference_refuses_too_but_for_duplicates(what, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(REFUSED[what][0])

    assert accepted_by_safetensors(path) == (what in STRICTER)


@pytest.mark.parametrize("what", STRICTER_ONLY)
def test_odd_spellings_that_only_the_reference_accepts_are_refused(what, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(STRICTER_ONLY[what])

    assert accepted_by_safetensors(path)
    assert refusal(path) is not None


def test_minus_zero_is_a_number_to_us_alone(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(one(shape="[-0]", offsets="[0,0]")))  # to the reference, -0 is a float

    assert refusal(path) is None
    assert not accepted_by_safetensors(path)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_has_the_size_that_the_reference_gives_it(dtype, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(one(f'"{dtype}"', "[8]", f"[0,{DTYPE_BITS[dtype]}]"), bytes(DTYPE_BITS[dtype])))

    assert accepted_by_safetensors(path)
    assert read_header(path)["a"].spec.nbytes == DTYPE_BITS[dtype]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "model.safetensors").mkdir()

    assert refusal(tmp_path / "model.safetensors") == f"cannot read {tmp_path / 'model.safetensors'}: Is a directory"
    assert "No such file" in refusal(tmp_path / "absent.safetensors")


def test_a_header_that_claims_100_mb_allocates_nothing(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(MAX_HEADER_BYTES.to_bytes(8, "little") + b"{")

    tracemalloc.start()
    assert refusal(path) is not None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 1_000_000


@pytest.mark.parametrize("text", ['{"a":[' + "[]," * 300_000 + "[]]}", '{"a":{' + '"":{},' * 200_000 + '"":1}}'])
def test_memory_is_bounded_by_the_size_of_the_header(text, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(text))

    tracemalloc.start()
    assert refusal(path) is not None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 50 * len(text)  # an empty list of 3 bytes takes 64; nothing is denser


def test_a_duplicate_behind_many_names_is_found_in_one_pass(tmp_path):
    names = ",".join(f'"{i}":0' for i in range(200_000))
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(f'{{{names},"199999":0}}'))  # counting each name for itself would take an hour

    assert refusal(path) == "model.safetensors has two entries '199999' in its header"


def test_a_shape_of_many_huge_lengths_is_refused_without_multiplying_them_all(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(one(shape=f"[{','.join(['9223372036854775807'] * 300_000)}]")))

    assert "impossible shape" in refusal(path)


def test_a_refusal_quotes_little_of_a_huge_value(tmp_path):
    path = tmp_path / "model.safetensors"
    for header in (one(f'"{"x" * 10**6}"'), one(shape=f"[{'1,' * 10**5}-1]"), f'{{"{"n" * 10**6}":1}}'):
        path.write_bytes(raw_file(header, b"12"))

        assert len(refusal(path)) < 1000


def test_tensors_come_in_the_order_of_their_data_with_offsets_in_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(f'{{"__metadata__":{{"format":"pt"}},{B},{A}}}   \n', b"123"))
    start = path.stat().st_size - 3

    entries = read_header(path)

    assert [(name, entry.start - start, entry.end - start) for name, entry in entries.items()] == [
        ("a", 0, 2),
        ("b", 2, 3),
    ]


# --- property tests ---------------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**62, 2**63 - 1, 2**64, 0.5, True, None, "1"]))
tensor_like = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "F4", "BF16", "u8", "", None, 1]),
        "shape": st.one_of(st.lists(numbers, max_size=3), st.none()),
        "data_offsets": st.one_of(st.lists(numbers, min_size=1, max_size=3), st.none()),
    }
)
anything = st.recursive(
    st.one_of(numbers, st.text(max_size=4)), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)
json_headers = st.dictionaries(
    st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=3)),
    st.one_of(tensor_like, tensor_like, anything, st.dictionaries(st.text(max_size=2), anything, max_size=2)),
    max_size=4,
)
specs = st.builds(
    TensorSpec, st.sampled_from(["U8", "F32", "BF16", "F64", "I16"]), st.lists(st.integers(0, 5), max_size=3).map(tuple)
)
layouts = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
    specs,
    max_size=5,
)


def agree(content: bytes) -> None:
    """Assert that we and the reference accept the same file, outside of what STRICTER_ONLY lists."""
    with TemporaryDirectory() as directory:
        path = Path(directory, "model.safetensors")
        path.write_bytes(content)
        ours, theirs = refusal(path) is None, accepted_by_safetensors(path)
        if ours != theirs:
            assert theirs, f"only we accept {content!r}"
            assert is_odd_spelling(content[8 : 8 + int.from_bytes(content[:8], "little")]), (
                f"only we refuse {content!r}"
            )


def is_odd_spelling(raw: bytes) -> bool:
    """Return whether a header that the reference accepts is one of those that STRICTER and STRICTER_ONLY describe."""
    duplicates: list[str] = []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in found]
        duplicates.extend(name for name in names if names.count(name) > 1)
        return dict(found)

    header = json.loads(raw, object_pairs_hook=pairs)
    if duplicates or not raw.startswith(b"{") or header.pop("__metadata__", {}) is None:
        return True
    return any(
        isinstance(tensor, list)
        or set(tensor) != {"dtype", "shape", "data_offsets"}
        or not isinstance(tensor["dtype"], str)
        or any(length >= 2**63 for length in tensor["shape"])
        for tensor in header.values()
    )


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_never_crash(content):
    agree(content)


@settings(max_examples=300, deadline=None)
@given(json_headers, st.integers(0, 12), st.booleans())
@example({"a": {"dtype": "U8", "shape": [2**62, 4, 0], "data_offsets": [0, 0]}}, 0, True)
@example({"\ud800": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, 2, True)
@example(json.loads(f"{{{A},{ZERO}}}"), 2, True)
def test_random_headers_are_judged_as_the_reference_judges_them(header, nbytes, escaped):
    try:
        text = json.dumps(header, ensure_ascii=escaped).encode()
    except UnicodeEncodeError:  # half a surrogate pair can only be spelt as an escape
        text = json.dumps(header).encode()

    agree(raw_file(text, bytes(nbytes)))


@settings(max_examples=300, deadline=None)
@given(layouts, st.data())
def test_sound_files_with_a_few_bytes_changed_are_judged_as_the_reference_judges_them(layout, draw):
    content = bytearray(format_header(layout) + bytes(sum(spec.nbytes for spec in layout.values())))
    del content[8 + len(content[8:].partition(b"   ")[0]) :]  # most padding is dull
    content[:8] = (len(content) - 8).to_bytes(8, "little")
    content += bytes(sum(spec.nbytes for spec in layout.values()))
    for _ in range(draw.draw(st.integers(0, 3))):
        place = draw.draw(st.integers(0, len(content) - 1))
        match draw.draw(st.sampled_from(["replace", "insert", "delete"])):
            case "replace":
                content[place] = draw.draw(st.sampled_from(b'0129{}[],:"\\ \xff\0u'))
            case "insert":
                content.insert(place, draw.draw(st.sampled_from(b'0129{}[],:"\\ \n')))
            case "delete" if len(content) > 1:
                del content[place]

    agree(bytes(content))


@settings(max_examples=100, deadline=None)
@given(layouts, st.integers(0, 8191))
def test_what_format_header_writes_both_readers_read(layout, align):
    header = format_header(layout, align=align)
    content = header + b"".join(data(name, spec.nbytes) for name, spec in layout.items())

    entries = parse_header(header[8:], file_size=len(content), where="model.safetensors")

    assert {name: entry.spec for name, entry in entries.items()} == layout
    assert len(header) % 8 == 0
    assert 0 <= (len(header) - align) % 4096 < 8
    with TemporaryDirectory() as directory:
        Path(directory, "model.safetensors").write_bytes(content)
        with safe_open(Path(directory, "model.safetensors"), "np") as file:
            assert set(file.keys()) == set(layout)
            assert {name: tuple(file.get_slice(name).get_shape()) for name in layout} == {
                name: spec.shape for name, spec in layout.items()
            }


def test_the_data_begins_at_every_alignment_asked_for():
    layout = {"a": TensorSpec("F32", (3,))}

    for align in [*range(0, 4096, 8), 1, 4095, 4097]:
        header = format_header(layout, align=align)

        assert len(header) % 4096 == (align + -align % 8) % 4096
        assert parse_header(header[8:], file_size=len(header) + 12, where="x")["a"].start == len(header)
