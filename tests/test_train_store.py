"""The token store: what was written is what is read, and what is not whole or of other data is never used."""

import errno
import hashlib
import json
import pickle
import subprocess
import sys
from itertools import accumulate, chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from later import LATER
from talkers import TEXT, jsonl, tokenizer_of, written

from surgeon.data.documents import documents
from surgeon.errors import DataError, OutputError
from surgeon.train.examples import examples
from surgeon.train.settings import Settings

if LATER:
    import numpy as np

    import surgeon.train.tokenise as module
    from surgeon.train.store import ARRAYS, FORMAT, HEADER, damage, fingerprint, open_store
    from surgeon.train.task import Task
    from surgeon.train.tokenise import piece_lengths, prepare

TEMPLATE = "{% for m in messages %}<s>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
CHAT = [{"role": "user", "content": "The cat"}, {"role": "assistant", "content": "sat"}]
RECORDS = [
    {"text": "The cat sat on the mat, and the rat sat on the cat"},
    {"prompt": "The cat sat", "completion": "on the mat"},
    {"instruction": "Say that", "input": "", "output": "that"},
    {"question": "The rat?", "answer": "é🌿"},
    {"messages": CHAT},
    {"text": "q"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(chat_template=TEMPLATE)


@pytest.fixture
def make(tokenizer, tmp_path):
    """Return a function that makes a store of some data in the directory `store`."""

    def make(*specs, length=16, train_on="completion", **options):
        task = Task(Settings(train_on=train_on))
        return prepare(specs, tokenizer, directory=tmp_path / "store", sequence_length=length, task=task, **options)

    return make


def pieces(store):
    return [store.piece(number) for number in range(store.num_pieces)]


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()} if directory.exists() else {}


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_examples_come_back_as_they_were(make, tokenizer, tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", *RECORDS)
    store = make(spec, length=1000)

    for document, (ids, labels, start), number in zip(documents(spec), pieces(store), range(6), strict=True):
        expected = examples([document], tokenizer)[0]
        assert ids.tolist() == list(expected.ids) == store.tokens[start : start + len(ids)].tolist()
        targets = [i if flag else -100 for i, flag in zip(expected.ids, expected.trained, strict=True)]
        assert labels.tolist() == [*targets[1:], -100]
        assert store.documents[number] == number
    assert sum(source.num_documents for source in store.sources) == store.num_pieces == 6
    assert store.num_tokens == len(store.tokens) == sum(store.lengths)
    assert store.num_trained == sum(int((labels != -100).sum()) for _, labels, _ in pieces(store))
    assert (store.num_cut, store.num_dropped) == (0, 0)
    assert store.largest_id == store.tokens.max()


@pytest.mark.parametrize("length", [2, 3, 7, 16, 1000])
def test_every_token_of_a_long_text_but_its_first_is_predicted_once_after_those_before_it(
    length, make, tokenizer, tmp_path
):
    spec = written(tmp_path / "a.txt")
    store = make(spec, length=length)

    whole = list(examples([next(documents(spec))], tokenizer)[0].ids)
    found = pieces(store)
    assert list(chain.from_iterable(ids.tolist() for ids, _, _ in found)) == whole
    assert [t for _, labels, _ in found for t in labels.tolist()] == [*whole[1:], -100]
    assert max(store.lengths) <= length
    assert set(store.documents) == {0}
    assert all((labels != -100).any() for _, labels, _ in found)


@given(st.integers(1, 200), st.integers(2, 40))
def test_pieces_are_full_but_the_last_and_each_predicts_something(num_tokens, length):
    found = piece_lengths(num_tokens, length)
    assert sum(found) == num_tokens
    assert all(0 < size <= length for size in found)
    assert len(found) == -(-num_tokens // length)
    assert found[-1] > 1 or num_tokens == 1


def test_a_record_longer_than_a_row_is_cut_at_its_right_and_dropped_when_only_its_prompt_is_left(
    make, tokenizer, tmp_path
):
    spec = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "The cat", "completion": TEXT},
        {"prompt": TEXT, "completion": "The cat"},
        {"text": ""},
        {"prompt": "q", "completion": "q"},
    )
    store = make(spec)

    first, last = pieces(store)
    assert first[0].tolist() == list(examples([next(documents(spec))], tokenizer)[0].ids[:16])
    assert (first[1][-2] != -100, first[1][-1]) == (True, -100)  # what comes next was cut off
    assert last[0].tolist() == list(examples([list(documents(spec))[3]], tokenizer)[0].ids)
    assert (store.sources[0].num_documents, store.num_cut, store.num_dropped) == (4, 1, 2)
    assert store.documents.tolist() == [0, 3]


def test_what_a_text_is_cut_into_is_no_record_that_was_cut(make, tmp_path):
    assert make(written(tmp_path / "a.txt")).num_cut == 0


def test_each_argument_has_its_counts_and_the_digest_of_its_texts(make, tmp_path):
    one, other = written(tmp_path / "a.txt"), jsonl(tmp_path / "b.jsonl", *RECORDS[:2])
    store = make(one, other)

    assert [source.data for source in store.sources] == [one, other]
    assert store.sources[0].sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    parts = b"\xff".join("\n".join(document.parts).encode() for document in documents(other))
    assert store.sources[1].sha256 == hashlib.sha256(parts).hexdigest()
    ends = list(accumulate(source.num_pieces for source in store.sources))
    assert np.bincount(store.piece_sources).tolist() == [ends[0], ends[1] - ends[0]]
    assert store.documents.tolist() == [0] * ends[0] + [1, 1, 1, 2][-(ends[1] - ends[0]) :]
    assert [source.num_tokens for source in store.sources] == [
        int(store.lengths[: ends[0]].sum()),
        int(store.lengths[ends[0] :].sum()),
    ]


def test_all_is_trained_on_request(make, tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", *RECORDS[1:4])
    store = make(spec, length=1000, train_on="all")
    assert store.num_trained == store.num_tokens - 3


def test_no_more_is_read_than_asked_for_and_the_data_share_it(make, tmp_path):
    lines = [{"text": "The cat sat on the mat"}] * 50
    specs = [jsonl(tmp_path / f"{name}.jsonl", *lines) for name in "abc"]
    short = jsonl(tmp_path / "short.jsonl", lines[0])
    each = make(short, length=1000).num_tokens

    store = make(*specs, short, length=1000, max_tokens=each * 20)
    assert [source.num_documents for source in store.sources] == [5, 5, 5, 1]
    store = make(short, *specs, length=1000, max_tokens=each * 19 + 1)
    assert [source.num_documents for source in store.sources] == [1, 7, 6, 6]
    assert store.sources[1].sha256 == hashlib.sha256(b"\xff".join([lines[0]["text"].encode()] * 7)).hexdigest()


def test_documents_that_are_tokenised_together_make_no_difference(make, tmp_path, monkeypatch):
    spec = jsonl(tmp_path / "a.jsonl", *RECORDS)
    digest = make(spec).digest
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 2)
    (tmp_path / "store" / HEADER).unlink()
    assert make(spec).digest == digest


def test_progress_is_told_of_every_token(make, tmp_path):
    told = []
    store = make(jsonl(tmp_path / "a.jsonl", *RECORDS), progress=told.append)
    assert sum(told) == store.num_tokens


def test_a_pickled_store_is_small_and_maps_its_files_itself(make, tmp_path):
    store = make(written(tmp_path / "a.txt", TEXT * 20))
    expected = store.piece(3)[0].tolist()
    raw = pickle.dumps(store)
    assert len(raw) < 1500 < store.tokens.nbytes
    assert pickle.loads(raw).piece(3)[0].tolist() == expected


# --- whether it is used -----------------------------------------------------------------------------------------------


def test_a_store_that_matches_is_used_again(make, tmp_path):
    spec = written(tmp_path / "a.txt")
    made = make(spec)
    before = {path: path.stat().st_mtime_ns for path in made.directory.iterdir()}
    assert make(spec) == made == open_store(made.directory)
    assert {path: path.stat().st_mtime_ns for path in made.directory.iterdir()} == before
    assert set(before) == {made.directory / name for name in (*ARRAYS, HEADER)}


@pytest.mark.parametrize(
    "change",
    [
        lambda store, spec: spec.write_text(TEXT[::-1]),  # as long as before
        lambda store, spec: (store / HEADER).unlink(),
        lambda store, spec: (store / HEADER).write_text('{"format": 1'),
        lambda store, spec: (store / HEADER).write_text('{"format": 999}'),
        lambda store, spec: (store / HEADER).write_text("[]"),
        lambda store, spec: (store / "tokens.bin").unlink(),
        lambda store, spec: (store / "tokens.bin").write_bytes((store / "tokens.bin").read_bytes()[:-4]),
        lambda store, spec: (store / "tokens.bin").write_bytes(bytes((store / "tokens.bin").stat().st_size)),
        lambda store, spec: (store / "trained.bin").write_bytes(bytes((store / "trained.bin").stat().st_size)),
    ],
)
def test_a_store_of_other_data_or_one_that_is_not_whole_is_made_again(change, make, tmp_path):
    spec = tmp_path / "a.txt"
    make(written(spec))
    change(tmp_path / "store", spec)
    again = make(str(spec))
    fresh = prepare([str(spec)], tokenizer_of(chat_template=TEMPLATE), directory=tmp_path / "fresh", sequence_length=16)
    assert again.digest == fresh.digest
    assert damage(again) is None
    assert again.tokens.tolist() == fresh.tokens.tolist()


def test_a_store_of_other_settings_is_made_again(make, tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", *RECORDS)
    made = make(spec)
    for options in ({"length": 5}, {"train_on": "all"}, {"max_tokens": 20}):
        assert make(spec, **options).digest != made.digest
    assert sum(source.num_documents for source in make(spec, spec).sources) == 12
    assert make(spec).digest == made.digest


def test_a_store_of_another_tokenizer_is_made_again(make, tmp_path):
    spec = written(tmp_path / "a.txt")
    made = make(spec)
    other = tokenizer_of("another text altogether, with words of its own " * 9, chat_template=TEMPLATE)
    assert prepare([spec], other, directory=made.directory, sequence_length=16).digest != made.digest


def test_the_fingerprint_of_a_tokenizer_does_not_depend_on_how_it_was_called(tokenizer):
    before = fingerprint(tokenizer)
    tokenizer(["The cat", "sat"], padding=True, truncation=True, max_length=3)
    assert fingerprint(tokenizer) == before
    assert fingerprint(tokenizer_of(chat_template="{{ messages }}")) != before


def test_a_directory_without_a_store_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no tokenised data"):
        open_store(tmp_path)


def test_a_killed_process_leaves_no_store(tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", *RECORDS)
    store = tmp_path / "store"
    code = (
        "import os, sys; from pathlib import Path; import surgeon.train.tokenise as module\n"
        "from talkers import tokenizer_of\n"
        f"tokenizer = tokenizer_of(chat_template={TEMPLATE!r})\n"
        "append, left = module._Writer._append, int(sys.argv[1])\n"
        "def kill(self, name, values):\n"
        "    global left\n"
        "    append(self, name, values)\n"
        "    for file in self.files.values(): file.flush()\n"
        "    left -= 1\n"
        "    if not left: os.kill(os.getpid(), 9)\n"
        "module._Writer._append = kill\n"
        f"module.prepare([{spec!r}], tokenizer, directory=Path({str(store)!r}), sequence_length=16)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "7"], cwd=Path(__file__).parent, capture_output=True, check=False
    )
    assert result.returncode == -9, result.stderr
    assert (store / "tokens.bin").stat().st_size
    with pytest.raises(DataError):
        open_store(store)
    made = prepare([spec], tokenizer_of(chat_template=TEMPLATE), directory=store, sequence_length=16)
    assert made.sources[0].num_documents == 6


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"text": "ok"}\n{"text": 5}\n', ":2: 'text' is a number, not a string"),
        ('{"text": "ok"}\n{"text": \n', ":2:10: Expecting value"),
        ('{"text": "ok"}\n{"title": "x"}\n', ":2 has no text, only 'title'"),
        ('{"text": "ok"}\n{"messages": []}\n', ":2: 'messages' is an empty list"),
        ('{"text": "ok"}\n{"messages": [{"role": "user", "content": "x"}]}\n', ":2: no message is the assistant's"),
        ('{"text": "ok"}\n{"prompt": "x", "completion": "\\ud800"}\n', ":2: 'completion' is not text"),
        ("", "0 documents in "),
    ],
)
def test_bad_data_are_one_line_and_leave_nothing(lines, said, make, tmp_path):
    spec = written(tmp_path / "a.jsonl", lines)
    make(written(tmp_path / "good.txt"))  # a store of other data, which gives way
    with pytest.raises(DataError) as caught:
        make(spec)
    assert said in str(caught.value)
    assert spec in str(caught.value)
    assert "\n" not in str(caught.value)
    assert content(tmp_path / "store") == {}


def test_a_name_that_is_wrong_touches_nothing(make, tmp_path):
    spec = written(tmp_path / "a.txt")
    before = content(make(spec).directory)
    with pytest.raises(DataError, match="no such file or directory"):
        make(spec, str(tmp_path / "missing.txt"))
    assert content(tmp_path / "store") == before


@pytest.mark.parametrize(
    ("record", "length"),
    [({"text": ""}, 16), ({"prompt": TEXT, "completion": "x"}, 16), ({"prompt": "a", "completion": "x"}, 2)],
)
def test_data_with_nothing_to_train_are_refused(record, length, make, tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", record)
    with pytest.raises(DataError) as caught:
        make(spec, length=length)
    assert str(caught.value) == f"there is no token to train in {spec}, in rows of {length} tokens"
    assert "--sequence-length" in str(caught.value.hint)
    assert content(tmp_path / "store") == {}


def test_a_row_of_one_token_is_refused(make, tmp_path):
    with pytest.raises(DataError, match="rows of 1 tokens were asked for"):
        make(written(tmp_path / "a.txt"), length=1)


def test_a_place_that_cannot_be_written_is_refused(tokenizer, tmp_path):
    spec = written(tmp_path / "a.txt")
    with pytest.raises(OutputError, match="cannot write") as caught:
        prepare([spec], tokenizer, directory=tmp_path / "a.txt" / "store", sequence_length=16)
    assert caught.value.hint == "Choose another place with --run-dir."


def test_a_full_disk_is_one_line_and_leaves_nothing(make, tmp_path):
    spec = written(tmp_path / "a.txt")
    (tmp_path / "store").mkdir()
    (tmp_path / "store/tokens.bin").symlink_to("/dev/full")  # which refuses every byte as a full disk does
    with pytest.raises(OutputError) as caught:
        make(spec)
    assert str(caught.value) == f"the disk of {tmp_path / 'store'} is full"
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert content(tmp_path / "store") == {}


def test_the_header_can_be_read_by_people(make, tmp_path):
    header = json.loads((make(written(tmp_path / "a.txt")).directory / HEADER).read_text())
    assert header["format"] == FORMAT
    assert header["request"]["sequence_length"] == 16
    assert header["sources"][0]["data"].endswith("a.txt")
