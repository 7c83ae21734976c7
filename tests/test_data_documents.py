"""Reading documents from files, directories and the Hub."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_hub import DatasetHub
from test_rings import modules_after

from surgeon.data.documents import documents
from surgeon.data.records import FORMS_HINT, Document
from surgeon.errors import DataError
from surgeon.text import printable

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(path: Path, *records: object) -> str:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def texts(spec: str) -> list[str]:
    return ["\n".join(document.parts) for document in documents(spec)]


def refusal(spec: str) -> tuple[str, str | None]:
    """Return the message and the hint with which reading the documents fails."""
    with pytest.raises(DataError) as caught:
        list(documents(spec))
    return str(caught.value), caught.value.hint


# Text files


def test_parts_of_a_text_meet_at_the_beginning_of_a_line(tmp_path):
    text = "".join(f"line {number}\n" for number in range(37)) + "end"
    path = write(tmp_path / "a.txt", text)

    parts = [texts(f"{path}[{part}]") for part in (":50%", "50%:90%", "90%:")]

    assert "".join(part[0] for part in parts) == text
    assert all(part[0].startswith(("line", "end")) for part in parts)
    assert texts(f"{path}[:]") == texts(f"{path}[0%:100%]") == [text]
    assert "a text has no documents to count" in refusal(f"{path}[:3]")[0]
    assert "0 documents" in refusal(f"{path}[100%:]")[0]


def test_parts_of_records_are_counted_by_documents(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *({"text": str(number)} for number in range(10)))

    assert texts(f"{path}[:3]") == ["0", "1", "2"]
    assert texts(f"{path}[3:5]") == ["3", "4"]
    assert texts(f"{path}[:85%]") + texts(f"{path}[85%:]") == [str(number) for number in range(10)]
    assert texts(f"{tmp_path}[9:]") == ["9"], "of a directory, all its documents"
    assert "0 documents" in refusal(f"{path}[10:]")[0]
    assert "no such file" in refusal(f"{tmp_path}/gone.jsonl[:3]")[0]


def test_a_file_whose_name_ends_like_a_part_is_that_file(tmp_path):
    path = write(tmp_path / "a[1:2].txt", "whole")
    other = jsonl(tmp_path / "b.jsonl[:1]", {"text": "x"})

    assert texts(path) == ["whole"]
    assert "of no kind that surgeon reads" in refusal(other)[0]


def test_a_text_file_is_one_document_as_it_is(tmp_path):
    spec = write(tmp_path / "a.txt", "\n one\r\n\r\ntwo\u2028é🌿 \n")
    assert list(documents(spec)) == [Document(spec, ("\n one\r\n\r\ntwo\u2028é🌿 \n",))]


def test_a_bom_is_no_part_of_a_text(tmp_path):
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfone")) == ["one"]


def test_an_empty_text_file_is_an_empty_document(tmp_path):
    assert texts(write(tmp_path / "a.txt", "")) == [""]


def test_a_packed_text_file_is_unpacked(tmp_path):
    assert texts(write(tmp_path / "A.TXT.GZ", gzip.compress("één".encode()))) == ["één"]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_text_that_is_not_utf8_is_named_by_its_byte(tmp_path, bom):
    spec = write(tmp_path / "a.txt", bom + b"abc\xe9d")
    message, hint = refusal(spec)
    assert message == f"{spec} is not UTF-8: invalid continuation byte at byte {len(bom) + 3}"
    assert hint == f"Convert it, if you know its encoding: iconv -f ENCODING -t UTF-8 {spec}"


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("damage", [lambda raw: b"no gzip", lambda raw: raw[:-12], lambda raw: raw[:12] + b"\xff" * 30])
def test_a_damaged_gz_is_one_sentence(tmp_path, name, damage):
    spec = write(tmp_path / name, damage(gzip.compress(b'{"text": "a"}\n' * 100)))
    message, hint = refusal(spec)
    assert message.startswith(f"cannot read {spec}: ")
    assert hint == f"Look at it: ls -l {spec}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path):
    spec = write(tmp_path / "a.txt", "x")
    Path(spec).chmod(0)
    assert refusal(spec)[0] == f"cannot read {spec}: Permission denied"


def test_reading_text_and_records_imports_nothing_heavy(tmp_path):
    specs = [write(tmp_path / "a.txt", "a"), jsonl(tmp_path / "a.jsonl", {"text": "a"})]
    modules = "surgeon.data.rows", "surgeon.models.loading", "surgeon.data.documents"
    code = "".join(f"import {name}\n" for name in modules)
    code += f"from surgeon.data.documents import documents\nfor spec in {specs}: list(documents(spec))"
    assert modules_after(code) == set()


# Records


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ({"text": "a"}, ("a",)),
        ({"text": "a", "prompt": "p", "completion": "c"}, ("p", "c")),
        ({"text": "a", "instruction": "i", "input": "", "output": "o"}, ("i", "o")),
        ({"completion": "c", "prompt": "p"}, ("p", "c")),
        ({"prompt": "", "completion": "c"}, ("", "c")),
        ({"instruction": "i", "output": "o"}, ("i", "o")),
        ({"instruction": "i", "input": "in", "output": "o"}, ("i", "in", "o")),
        ({"instruction": "i", "input": "", "output": "o"}, ("i", "o")),
        ({"instruction": "i", "input": None, "output": "o"}, ("i", "o")),
        ({"question": "q", "answer": "a", "prompt": "p"}, ("q", "a")),
    ],
)
def test_a_record_is_read_in_the_first_form_that_it_has(tmp_path, record, parts):
    spec = jsonl(tmp_path / "a.jsonl", record)
    assert list(documents(spec)) == [Document(f"{spec}:1", parts)]


def test_a_chat_is_kept_as_messages_without_what_is_null(tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", {"messages": [CHAT[0] | {"name": "Ann", "tool_calls": None}, CHAT[1]]})
    assert list(documents(spec)) == [Document(f"{spec}:1", messages=(CHAT[0] | {"name": "Ann"}, CHAT[1]))]


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "null"), (3, "a number"), (True, "a boolean"), (["a"], "a list"), ({"a": 1}, "an object")],
)
def test_a_field_that_is_no_string_is_named_by_file_and_line(tmp_path, value, said):
    spec = jsonl(tmp_path / "a.jsonl", {"text": "ok"}, {"id": 7, "text": value})
    assert refusal(spec) == (f"{spec}:2: 'text' is {said}, not a string", "The record's keys are 'id', 'text'.")


def test_an_input_that_is_no_string_is_refused(tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", {"instruction": "i", "input": 0, "output": "o"})
    assert refusal(spec)[0] == f"{spec}:1: 'input' is a number, not a string"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"content": "a", "id": 1}, "has no text, only 'content', 'id'"),
        ({"prompt": "a"}, "has no text, only 'prompt'"),
        ({}, "has no text, no keys at all"),
        (["a"], "is a list, not an object"),
        ("a", "is a string, not an object"),
    ],
)
def test_a_record_without_a_text_is_named_with_the_keys_it_has(tmp_path, record, said):
    spec = jsonl(tmp_path / "a.jsonl", {"text": "ok"}, record)
    assert refusal(spec) == (f"{spec}:2 {said}", FORMS_HINT)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("Hi", "'messages' is a string, not a list"),
        ([], "'messages' is an empty list"),
        (["Hi"], "'messages'[0] is a string, not an object"),
        ([CHAT[0], {"role": "user"}], "'messages'[1] has no 'content', only 'role'"),
        ([{"from": "user", "content": "a"}], "'messages'[0] has no 'role', only 'from', 'content'"),
        ([{"role": "user", "content": None}], "'messages'[0]: 'content' is null, not a string"),
        ([{"role": "user", "content": "\ud800"}], r"'messages'[0]: 'content' is not text: its character 0"),
    ],
)
def test_a_chat_that_is_none_is_named_by_its_message(tmp_path, messages, said):
    spec = jsonl(tmp_path / "a.jsonl", {"messages": messages})
    message, hint = refusal(spec)
    assert message.startswith(f"{spec}:1: {said}")
    assert hint


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    spec = write(tmp_path / "a.jsonl", r'{"text": "ab\ud83c"}')
    assert refusal(spec) == (
        f"{spec}:1: 'text' is not text: its character 2 is half a surrogate pair, \\ud83c",
        "Write the character itself, or both halves of its pair.",
    )


# JSON


def test_lines_end_as_they_like_and_empty_ones_are_skipped_but_counted(tmp_path):
    spec = write(
        tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n \t\n{"text": "t\xe2\x80\xa8wo"}\n{"text": ""}'
    )
    assert [(document.where, *document.parts) for document in documents(spec)] == [
        (f"{spec}:1", "one"),
        (f"{spec}:4", "t\u2028wo"),
        (f"{spec}:5", ""),
    ]


def test_packed_lines_are_unpacked(tmp_path):
    assert texts(write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "b"}'))) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ('{"text": "a"', "13: Expecting ',' delimiter"),
        ('{"text" "a"}\r', "9: Expecting ':' delimiter"),
        ('{"text": "a"} {}', "15: Extra data"),
        ("plain words", "1: Expecting value"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_bad_json_is_named_by_file_line_and_column(tmp_path, name, line, place):
    spec = write(tmp_path / name, '\n{"text": "ok"}\n' + line + "\n")
    assert refusal(spec) == (f"{spec}:3:{place}", 'Write one record per line: {"text": "..."}')


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5000])
def test_json_that_python_will_not_parse_is_one_sentence(tmp_path, value):
    spec = write(tmp_path / "a.jsonl", '{"text": ' + value)
    message, hint = refusal(spec)
    assert message.startswith(f"{spec}:1: ")
    assert hint == "Take the record out."


def test_a_line_that_is_not_utf8_is_named_by_its_byte_in_the_file(tmp_path):
    spec = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n')
    assert refusal(spec)[0] == f"{spec} is not UTF-8: invalid start byte at byte 24"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_a_record_is_refused(tmp_path, name, content):
    raw = content.encode()
    spec = write(tmp_path / name, gzip.compress(raw) if name.endswith(".gz") else raw)
    assert refusal(spec) == (f"0 documents in {spec}", FORMS_HINT)


def test_lines_are_read_no_further_than_asked(tmp_path):
    stream = documents(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"}\nnot read\n'))
    assert [next(stream).parts, next(stream).parts] == [("a",), ("b",)]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_file_may_hold_an_array(tmp_path, name):
    raw = b'\xef\xbb\xbf \n [{"text": "a"},\n {"question": "b",\n  "answer": "c"}]\n'
    spec = write(tmp_path / name, gzip.compress(raw) if name.endswith(".gz") else raw)
    assert [(document.where, document.parts) for document in documents(spec)] == [
        (f"{spec}[0]", ("a",)),
        (f"{spec}[1]", ("b", "c")),
    ]


def test_a_json_file_may_hold_lines(tmp_path):
    spec = jsonl(tmp_path / "a.json", {"text": "a"}, {"text": "b"})
    assert [document.where for document in documents(spec)] == [f"{spec}:1", f"{spec}:2"]


def test_errors_in_an_array_name_the_line_or_the_record(tmp_path):
    broken = write(tmp_path / "a.json", '[{"text": "a"},\n {"text": }]')
    assert refusal(broken)[0] == f"{broken}:2:11: Expecting value"
    empty = write(tmp_path / "b.json", "[]")
    assert refusal(empty)[0] == f"0 documents in {empty}"
    wrong = write(tmp_path / "c.json", '[{"text": "a"}, {"text": null}]')
    assert refusal(wrong)[0] == f"{wrong}[1]: 'text' is null, not a string"


# Parquet


def parquet(path: Path, columns: dict[str, list[object]]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=200)
    return str(path)


def test_parquet_is_read_row_by_row(tmp_path):
    spec = parquet(tmp_path / "a.parquet", {"id": list(range(700)), "text": [f"é{i}" for i in range(700)]})
    read = list(documents(spec))
    assert [document.parts for document in read] == [(f"é{i}",) for i in range(700)]
    assert read[699].where == f"{spec}[699]"


def test_parquet_holds_chats_too(tmp_path):
    spec = parquet(tmp_path / "a.parquet", {"messages": [[CHAT[0], CHAT[1] | {"name": "Bo"}]]})
    assert next(documents(spec)).messages == (CHAT[0], CHAT[1] | {"name": "Bo"})


def test_parquet_without_a_text_column_is_refused_with_the_columns(tmp_path):
    spec = parquet(tmp_path / "a.parquet", {"id": [1], "body": ["a"]})
    assert refusal(spec) == (f"{spec} has no text, only 'id', 'body'", FORMS_HINT)


def test_parquet_with_a_null_is_refused_by_its_row(tmp_path):
    spec = parquet(tmp_path / "a.parquet", {"text": ["a", None]})
    assert refusal(spec)[0] == f"{spec}[1]: 'text' is null, not a string"


def test_parquet_without_rows_is_refused(tmp_path):
    spec = parquet(tmp_path / "a.parquet", {"text": []})
    assert refusal(spec)[0] == f"0 documents in {spec}"


def test_parquet_that_is_damaged_is_one_sentence(tmp_path):
    whole = Path(parquet(tmp_path / "a.parquet", {"text": ["abc" * 50, "b"]})).read_bytes()
    for spec in (
        write(tmp_path / "b.parquet", b"no parquet"),
        write(tmp_path / "c.parquet", whole[:4] + b"\xff" * 60 + whole[64:]),
    ):
        message, hint = refusal(spec)
        assert message.startswith(f"cannot read {spec}: ")
        assert "\n" not in message
        assert hint == "Fetch or write the file again."


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    spec = parquet(tmp_path / "a.parquet", {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert refusal(spec) == (f"pyarrow is needed to read {spec}", 'pip install "surgeon[data]"')


# Directories and names


def test_a_directory_is_its_files_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "b.txt", "b")
    jsonl(tmp_path / "a.jsonl", {"text": "a1"}, {"text": "a2"})
    write(tmp_path / "c.json.gz", gzip.compress(b'[{"text": "c"}]'))
    parquet(tmp_path / "d.parquet", {"text": ["d"]})
    write(tmp_path / ".hidden.txt", "hidden")
    write(tmp_path / "LICENSE", "licence")
    (tmp_path / "e.txt").mkdir()
    assert texts(str(tmp_path)) == ["a1", "a2", "b", "c", "d"]


def test_a_directory_without_data_is_refused_at_once(tmp_path):
    write(tmp_path / "a.xml", "a")
    with pytest.raises(DataError, match="has no file of data") as caught:
        documents(str(tmp_path))
    assert caught.value.hint == (
        "surgeon reads .txt, .jsonl, .json, .csv, .tsv (each also .gz or .zst) and .parquet, "
        "not in directories below it."
    )


@pytest.mark.parametrize("name", ["a.xml", "a", "a.gz", "a.zst", "a.parquet.gz"])
def test_a_file_of_another_kind_is_refused_at_once(tmp_path, name):
    spec = write(tmp_path / name, "a")
    with pytest.raises(DataError) as caught:
        documents(spec)
    assert str(caught.value) == f"{spec} is of no kind that surgeon reads"
    assert (
        caught.value.hint
        == "Name it by what it is: .txt, .jsonl, .json, .csv, .tsv (each also .gz or .zst) and .parquet."
    )


@pytest.mark.parametrize(
    "spec", ["missing", "a/b/c", "./a/b", "data/train.txt", "data/a.jsonl.gz", "a/b\0", "a/" + "b" * 300]
)
def test_a_name_that_can_be_no_dataset_is_a_missing_file(spec):
    with pytest.raises(DataError) as caught:
        documents(spec)
    assert str(caught.value) == f"no such file or directory: {printable(spec)}"
    assert (
        caught.value.hint == "Name a file or directory that exists, or a dataset on the Hub: ORG/NAME[:CONFIG[:SPLIT]]."
    )


def test_an_existing_path_wins_over_a_dataset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org/name").mkdir()
    write(tmp_path / "org/name/a.txt", "local")
    assert texts("org/name") == ["local"]
    with pytest.raises(DataError, match="org/name is a local path; CONFIG and SPLIT are for a dataset on the Hub"):
        documents("org/name:config")


# The Hub


CARD = b"""---
configs:
- config_name: plain
  default: true
  data_files:
  - {split: train, path: plain/train.jsonl}
  - {split: test, path: plain/test.jsonl}
- config_name: pairs
  data_files:
  - {split: train, path: pairs/train.jsonl}
- config_name: broken
  data_files:
  - {split: train, path: broken/train.jsonl}
- config_name: textless
  data_files:
  - {split: train, path: textless/train.jsonl}
---
"""
FILES = {
    "README.md": CARD,
    "plain/train.jsonl": '{"text": "één"}\n{"text": "two"}\n'.encode(),
    "plain/test.jsonl": b'{"text": "three"}\n',
    "pairs/train.jsonl": b'{"question": "q", "answer": "a"}\n',
    "broken/train.jsonl": b'{"text": \n',
    "textless/train.jsonl": b'{"body": "b"}\n',
}


def read_in_process(tmp_path: Path, *specs: str, quiet: bool = True, **environment: str) -> dict[str, object]:
    """Return what a fresh process reads of datasets, with its cache below `tmp_path` (see dataset_hub.py)."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
    mine |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    program = [sys.executable, str(Path(__file__).with_name("dataset_hub.py")), *specs]
    result = subprocess.run(program, env=mine, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not (quiet and result.stderr)
    return json.loads(result.stdout)


def test_a_dataset_on_the_hub_is_read_by_config_and_split(tmp_path):
    with DatasetHub() as hub:
        hub.commit("org/set", FILES)
        hub.commit("org/gated", FILES, gated=True)
        answers = read_in_process(
            tmp_path,
            *("org/set", "org/set:plain:test", "org/set::test", "org/set:pairs"),
            *("org/set:nope", "org/set:plain:nope", "org/set:broken", "org/set:textless", "org/none", "org/gated"),
            HF_ENDPOINT=hub.endpoint,
        )
    assert answers["org/set"] == [["org/set[0]", "één"], ["org/set[1]", "two"]]
    assert answers["org/set:plain:test"] == [["org/set:plain:test[0]", "three"]]
    assert answers["org/set::test"] == [["org/set::test[0]", "three"]]
    assert answers["org/set:pairs"] == [["org/set:pairs[0]", "q\na"]]
    assert answers["org/set:nope"] == {
        "error": "cannot read org/set:nope from the Hub: BuilderConfig 'nope' not found. "
        "Available: ['plain', 'pairs', 'broken', 'textless']",
        "hint": f"See {hub.endpoint}/datasets/org/set; CONFIG and SPLIT are written ORG/NAME:CONFIG:SPLIT.",
    }
    assert "Bad split: nope. Available splits: ['train', 'test']" in answers["org/set:plain:nope"]["error"]
    assert answers["org/set:broken"]["error"].startswith("cannot read org/set:broken from the Hub: ")
    assert answers["org/set:textless"] == {
        "error": "org/set:textless has no text, only 'body'",
        "hint": FORMS_HINT,
    }
    assert answers["org/none"] == {
        "error": "the Hub has no dataset org/none, or does not show it to you; nor is there a file of that name",
        "hint": "Check the name; if it is private, log in with `hf auth login`, or set HF_TOKEN.",
    }
    assert "gated" in answers["org/gated"]["error"]


def test_without_a_network_a_dataset_is_one_sentence(tmp_path):
    nowhere = "http://127.0.0.1:9"
    answers = read_in_process(tmp_path, "org/set", HF_ENDPOINT=nowhere, quiet=False)  # it tells of each retry
    assert answers["org/set"]["error"].startswith(f"cannot reach the Hub at {nowhere} for org/set: ")
    assert answers["org/set"]["hint"] == (
        "Check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 makes do with what is cached."
    )


def test_offline_a_dataset_is_read_from_the_cache_or_the_variable_is_named(tmp_path):
    with DatasetHub() as hub:
        hub.commit("org/set", FILES)
        fill = "import datasets; datasets.load_dataset('org/set', 'plain')"
        mine = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        subprocess.run([sys.executable, "-c", fill], env=mine, cwd=tmp_path, capture_output=True, check=True)
    answers = read_in_process(tmp_path, "org/set:plain:test", "org/other", HF_HUB_OFFLINE="1")
    assert answers["org/set:plain:test"] == [["org/set:plain:test[0]", "three"]]
    assert answers["org/other"] == {
        "error": "org/other is not in the cache of datasets, and HF_HUB_OFFLINE is set",
        "hint": "Unset HF_HUB_OFFLINE, or name a file.",
    }


def test_without_datasets_the_hint_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal("org/set") == ("datasets is needed to read org/set from the Hub", 'pip install "surgeon[data]"')
