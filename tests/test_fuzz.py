"""Readers of files from strangers, under generated input: each returns something sound, or refuses it in one line.

Hypothesis makes headers and configs that are nearly right. atheris, where it is installed, follows the coverage of the
code for a few seconds; benchmarks/fuzz.py runs it for as long as one likes.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from handmade import CONFIG, llama
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.header import DTYPE_BITS, CheckpointSpec, format_header, parse_header
from surgeon.errors import SurgeonError
from surgeon.measure.record import Scores, read_scores
from surgeon.transforms.grow import grow
from surgeon.transforms.layers import truncate

FUZZ = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"
bounded = settings(max_examples=200, derandomize=True, deadline=None, database=None)

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
counts = st.integers(-1, 6) | st.sampled_from([2**31, 2**63, 1.0, True, None, "2"])
numbers = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats()
values = st.recursive(
    numbers | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(names, inside, max_size=3),
    max_leaves=8,
)


@st.composite
def headers(draw):
    """Return a header as JSON text that is sound but for a few fields, and the bytes of data that follow it."""
    fields, offset = {}, 0
    for name in draw(st.lists(names, unique=True, max_size=4)):
        dtype, shape = draw(st.sampled_from(sorted(DTYPE_BITS))), draw(st.lists(st.integers(0, 4), max_size=3))
        bits = DTYPE_BITS[dtype]
        for size in shape:
            bits *= size
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + bits // 8]}
        offset += bits // 8
        if draw(st.integers(0, 3)) == 0:
            entry[draw(st.sampled_from([*entry, "other"]))] = draw(values | st.lists(counts, max_size=3))
        fields[name] = entry
    return json.dumps(fields).encode(), offset


@bounded
@given(headers())
def test_a_header_is_refused_or_tiles_its_file_and_survives_a_round(made):
    raw, nbytes = made
    try:
        entries = parse_header(raw, file_size=8 + len(raw) + nbytes, where="file")
    except SurgeonError:
        return
    specs = {name: entry.spec for name, entry in entries.items()}
    assert sum(spec.nbytes for spec in specs.values()) == nbytes
    again = format_header(specs)
    parsed = parse_header(again[8:], file_size=len(again) + nbytes, where="again")
    assert {name: entry.spec for name, entry in parsed.items()} == specs


@bounded
@given(st.dictionaries(st.sampled_from([*CONFIG, "text_config", "layer_types", "rope_parameters", "gist"]), values))
def test_a_config_of_any_values_is_refused_or_makes_results_that_are_whole(changes):
    source = CheckpointSpec(CONFIG | changes, llama())
    try:
        plans = [truncate(read_anatomy(source), 2), grow(read_anatomy(source), layers=5)]
    except SurgeonError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.isprintable()
        assert len(refusal) <= 1100
        return
    for plan in plans:
        assert read_anatomy(plan.result(source)).depth in (2, 5)


def test_scores_without_the_entries_that_may_be_null_are_read(tmp_path):
    record = Scores({"fingerprint": "x"}, 2, None, 0, 0, {}, {"magnitude": [1, 2]})
    content = {key: value for key, value in record.to_dict().items() if key not in ("data", "loss")}
    (tmp_path / "scores.json").write_text(json.dumps(content))

    assert read_scores(tmp_path / "scores.json") == record


@pytest.mark.parametrize("value", ["x", [1], -1, float("nan"), float("inf")])
def test_a_standard_deviation_that_is_none_is_refused_where_new_weights_are_drawn(value):
    source = CheckpointSpec(CONFIG | {"initializer_range": value}, llama())

    with pytest.raises(SurgeonError, match="initializer_range = .*, no standard deviation"):
        grow(read_anatomy(source), hidden_size=12)


@pytest.mark.parametrize("value", [-1, 7, float("nan")])
def test_a_share_of_rotating_dimensions_that_is_none_is_refused(value):
    source = CheckpointSpec(CONFIG | {"partial_rotary_factor": value}, llama())

    with pytest.raises(SurgeonError, match="partial_rotary_factor = .*, not between 0 and 1"):
        grow(read_anatomy(source), head_dim=10)


@pytest.mark.skipif(find_spec("atheris") is None, reason='no atheris: pip install "surgeon[fuzz]"')
@pytest.mark.parametrize(("target", "runs"), [("header", 20_000), ("pickle", 4_000), ("scores", 1_000)])
def test_the_fuzzer_finds_nothing_in_a_second(target, runs, tmp_path):
    words = [sys.executable, FUZZ, target, "--runs", str(runs), "--corpus", tmp_path / "corpus"]

    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Done {runs} runs" in done.stderr
