"""Every form of a record that docs/finetune.md lists: its tokens, for finetune and evaluate alike."""

import csv
import gzip
import json
import re
import sys
from pathlib import Path

import pytest
from later import LATER
from talkers import jsonl, talker, tokenizer_of, written

import surgeon
from surgeon.data.documents import Reading, documents
from surgeon.data.formats import needed
from surgeon.errors import DataError
from surgeon.options import OptionError

if LATER:
    from surgeon.data.rows import by_template, text_of
    from surgeon.evals.answers import prompts_of, read_records
    from surgeon.evals.choices import read_questions
    from surgeon.evals.classes import read_labelled
    from surgeon.rewriting.prompts import row_of
    from surgeon.train.examples import examples
    from surgeon.train.tokenise import prepare

PAGE = (Path(__file__).parent.parent / "docs/finetune.md").read_text(encoding="utf-8")
TEMPLATE = (
    "{% if tools %}<s>tools\n{{ tools | tojson }}<end>\n{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
USER, BOT = {"role": "user", "content": "The cat"}, {"role": "assistant", "content": "sat"}
ASKED, ANSWERED = "<s>user\nThe cat<end>\n<s>assistant\n", "sat<end>"
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "cat"}}}
WITH_TOOLS = f"<s>tools\n{json.dumps([TOOL])}<end>\n" + ASKED
# By the first cell of its row: a record, the chosen columns, what is read before the answer, and what is trained.
CASES = {
    "messages": ({"messages": [USER, BOT]}, None, ASKED, ANSWERED),
    "messages, tools": ({"messages": [USER, BOT], "tools": [TOOL]}, None, WITH_TOOLS, ANSWERED),
    "messages, system": (
        {"messages": [USER, BOT], "system": "that"},
        None,
        f"<s>system\nthat<end>\n{ASKED}",
        ANSWERED,
    ),
    "messages with tool_calls and null content": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
        None,
        WITH_TOOLS,
        json.dumps([CALL]) + "<end>",
    ),
    "messages with content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": part} for part in ("The ", "cat")]}, BOT]},
        None,
        ASKED,
        ANSWERED,
    ),
    "conversations with from and value": (
        {"conversations": [{"from": "human", "value": "The cat"}, {"from": "gpt", "value": "sat"}]},
        None,
        ASKED,
        ANSWERED,
    ),
    "prompt, completion": ({"prompt": "The cat", "completion": "sat"}, None, "<s>The cat\n", ANSWERED),
    "prompt, completion as lists of messages": (
        {"prompt": [USER, BOT, USER], "completion": [BOT]},
        None,
        f"{ASKED}sat<end>\n{ASKED}",
        ANSWERED,
    ),
    "prompt, response": ({"prompt": "The cat", "response": "sat"}, None, "<s>The cat\n", ANSWERED),
    "instruction, input, output": (
        {"instruction": "The cat", "input": "and the rat", "output": "sat"},
        None,
        "<s>The cat\nand the rat\n",
        ANSWERED,
    ),
    "instruction, context, response": (
        {"instruction": "The cat", "context": "", "response": "sat"},
        None,
        "<s>The cat\n",
        ANSWERED,
    ),
    "question, answer": ({"question": "The cat", "answer": "sat"}, None, "<s>The cat\n", ANSWERED),
    "query, answer": ({"query": "The cat", "answer": "sat"}, None, "<s>The cat\n", ANSWERED),
    "query, response": ({"query": "The cat", "response": "sat"}, None, "<s>The cat\n", ANSWERED),
    "text": ({"text": "The cat sat"}, None, "<s>", "The cat sat<end>"),
    "text beside a form above": (
        {"instruction": "The cat", "input": "", "output": "sat", "text": "Below is ... The cat sat"},
        None,
        "<s>The cat\n",
        ANSWERED,
    ),
    "any with --columns": (
        {"q": "The cat", "a": "sat", "text": "other"},
        "prompt=q,completion=a",
        "<s>The cat\n",
        ANSWERED,
    ),
}


def cells(heading: str) -> list[str]:
    """Return the first cell of each row of the table below a heading row, without its backticks."""
    table = PAGE[PAGE.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [line.split("|")[1].strip().replace("`", "") for line in table]


def spelled(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids))


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(chat_template=TEMPLATE)


def test_every_row_of_the_page_is_tried():
    assert cells("| columns of a record |") == list(CASES)


@pytest.mark.parametrize("form", CASES)
def test_finetune_reads_and_trains_what_the_page_says(tokenizer, tmp_path, form):
    record, columns, asked, answered = CASES[form]

    (made,) = examples(list(Reading(columns).documents(jsonl(tmp_path / "a.jsonl", record))), tokenizer)

    first = made.trained.index(1)
    last = len(made.trained) - made.trained[::-1].index(1)
    assert spelled(tokenizer, made.ids[:first]) == asked
    assert spelled(tokenizer, made.ids[first:last]) == answered
    assert all(made.trained[first:last])
    assert spelled(tokenizer, made.ids[last:]) in ("", "\n")


@pytest.mark.parametrize("form", [form for form in CASES if form != "text"])
def test_evaluate_asks_with_the_tokens_before_the_answer_that_finetune_trains(tokenizer, tmp_path, form):
    record, columns, asked, answered = CASES[form]
    read = list(Reading(columns).documents(jsonl(tmp_path / "a.jsonl", record)))

    (prompt,) = prompts_of(
        read_records([str(tmp_path / "a.jsonl")], Reading(columns), samples=None), tokenizer, chat=False
    )

    (made,) = examples(read, tokenizer)
    assert list(prompt.ids) == list(made.ids[: made.trained.index(1)])
    assert spelled(tokenizer, prompt.ids) == asked
    assert prompt.reference == answered.removesuffix("<end>")


# --- columns ----------------------------------------------------------------------------------------------------------


def notes(reading: Reading, spec: str, template: str = TEMPLATE) -> tuple[str, ...]:
    list(reading.documents(spec))
    return reading.notes(by_template(tokenizer_of(chat_template=template)))


def test_every_column_is_read_or_named_in_a_note(tmp_path):
    spec = jsonl(
        tmp_path / "a.jsonl", CASES["text beside a form above"][0], {"prompt": "p", "completion": "c", "id": 3}
    )

    assert notes(Reading(), spec) == (
        f"{spec}: read as 'instruction', 'input', 'output'; not read: 'text' (--columns chooses)",
        f"{spec}: read as 'prompt', 'completion'; not read: 'id' (--columns chooses)",
    )
    assert notes(Reading(), jsonl(tmp_path / "b.jsonl", {"text": "a"}, {"messages": [USER, BOT]})) == ()


def test_keys_that_the_chat_template_does_not_write_are_named(tmp_path):
    record = {"messages": [USER | {"name": "Ann"}, BOT | {"tool_calls": [CALL]}], "tools": [TOOL]}
    spec = jsonl(tmp_path / "a.jsonl", record)

    assert notes(Reading(), spec) == (f"{spec}: the chat template does not write 'name'",)
    plain = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    said = notes(Reading(), spec, plain)
    assert said == (f"{spec}: the chat template does not write 'name', 'tool_calls', 'tools'",)


def test_what_a_template_mentions_and_does_not_write_is_named(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    spec = jsonl(tmp_path / "a.jsonl", {"messages": [system, USER | {"name": "Ann"}, BOT], "tools": [TOOL]})
    deaf = "{# no tools, no name #}{% for m in messages if m.role != 'system' %}{{ m.role }}{{ m.content }}{% endfor %}"

    said = notes(Reading(), spec, deaf)

    assert said == (f"{spec}: the chat template does not write the system turn, 'name', 'tools'",)


def test_columns_that_are_not_there_are_refused_with_the_nearest_name(tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "a", "hint": "h"})

    for columns, lacking in (("prompt=questoin,completion=answer", "questoin"), ("text=x", "x")):
        with pytest.raises(DataError, match=f"a.jsonl:1 has no column '{lacking}', which --columns names") as caught:
            list(Reading(columns).documents(spec))
        assert ("Did you mean 'question'?" in caught.value.hint) == (lacking == "questoin")
        assert "It has 'question', 'answer', 'hint'." in caught.value.hint
    with pytest.raises(DataError, match="has no column 'hnit'"):
        list(Reading("instruction=question,input=hnit,output=answer").documents(spec))


def test_an_optional_column_may_be_absent_from_later_records(tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", {"q": "1", "i": "2", "a": "3"}, {"q": "1", "a": "3"})

    found = [each.parts for each in Reading("instruction=q,input=i,output=a").documents(spec)]

    assert found == [("1", "2", "3"), ("1", "3")]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("question", "is no list of FIELD=COLUMN"),
        ("prompt=a,prompt=b", "is no list of FIELD=COLUMN"),
        ("prompt=a,compltion=b", "no field 'compltion'; did you mean completion"),
        ("zzz=a", "no field 'zzz'; the fields are messages, tools"),
        ("prompt=a", "a record has prompt, completion, [tools]; or prompt, response"),
        ("text=a,completion=b", "a record has prompt, completion, [tools]; or text, [label]"),
    ],
)
def test_columns_that_make_no_form_are_a_usage_error(columns, said):
    with pytest.raises(OptionError) as caught:
        Reading(columns)
    assert said in str(caught.value)


def test_the_chosen_columns_are_part_of_what_a_token_store_is_of(tokenizer, tmp_path):
    from surgeon.train.settings import Settings
    from surgeon.train.task import Task

    spec = jsonl(tmp_path / "a.jsonl", {"q": "The cat", "a": "sat", "text": "other"})

    def made(columns):
        task = Task(Settings(columns=columns))
        return prepare([spec], tokenizer, directory=tmp_path / "store", sequence_length=16, task=task)

    chosen = made("prompt=q,completion=a")
    assert spelled(tokenizer, chosen.tokens) == "<s>The cat\nsat<end>"
    assert chosen.sources[0].notes == (f"{spec}: read as 'q', 'a'; not read: 'text' (--columns chooses)",)
    assert made("prompt=q,completion=a").sources == chosen.sources, "the same store, its notes included"
    assert spelled(tokenizer, made(None).tokens) == "<s>other<end>"


def test_the_chosen_columns_are_part_of_what_is_recorded(tmp_path):
    from surgeon.rewriting.options import DECIDING
    from surgeon.train.settings import Settings

    model = talker(tmp_path / "model", template=TEMPLATE)
    spec = jsonl(tmp_path / "a.jsonl", {"q": "The cat", "a": "sat", "text": "other"})
    options = {"metric": "rouge-l", "max_new_tokens": 2, "device": "cpu"}

    found = surgeon.evaluate(model, data=[spec], columns="prompt=q,completion=a", **options)

    assert found.to_dict()["columns"] == "prompt=q,completion=a"
    assert found.notes[0] == f"{spec}: read as 'q', 'a'; not read: 'text' (--columns chooses)"
    assert found.predictions[0]["prompt"] == "The cat\n"
    assert Settings(columns="text=text").deciding()["columns"] == "text=text"
    assert "columns" in DECIDING


# --- chats that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]}, "a part of type 'image'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "'messages'[0]: 'content'[0] is a string, not an object"),
        ({"conversations": [{"from": "bard", "value": "a"}]}, "'conversations'[0] is from 'bard'"),
        ({"messages": [USER, BOT], "tools": {"a": 1}}, "'tools' is an object, not a list"),
        ({"prompt": "p", "completion": "c", "tools": [TOOL]}, "has 'tools', which only a chat can have"),
        ({"prompt": [USER], "completion": "c"}, "'completion' is a string, not a list"),
        ({"messages": [{"role": "system", "content": "a"}, USER, BOT], "system": "b"}, "has two system turns"),
    ],
)
def test_what_cannot_be_read_of_a_chat_is_refused_by_its_name(tmp_path, record, said):
    with pytest.raises(DataError) as caught:
        list(documents(jsonl(tmp_path / "a.jsonl", record)))
    assert said in str(caught.value)
    assert caught.value.hint


def test_parts_of_a_text_are_joined_as_a_template_that_reads_parts_joins_them(tmp_path):
    reads_parts = (  # as Qwen2-VL's
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}\n"
        "{% endfor %}"
    )
    parts = [{"type": "text", "text": text} for text in ("The cat ", "sat", "\non the mat")]
    (document,) = documents(jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": parts}, BOT]}))
    tokenizer = tokenizer_of(chat_template=reads_parts)

    own = tokenizer.apply_chat_template([{"role": "user", "content": parts}, BOT], tokenize=False)

    assert text_of(document, tokenizer) == own


def test_a_template_that_reads_parts_alone_is_given_parts(tmp_path):
    loops = (  # as SmolVLM's: a text is no list of parts, and would be lost
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% endif %}{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = tokenizer_of(chat_template=loops)
    record = jsonl(tmp_path / "a.jsonl", {"messages": [USER, BOT]})

    (made,) = examples(list(documents(record)), tokenizer)

    assert spelled(tokenizer, made.ids) == "user:The cat<end>\nassistant:sat<end>\n"
    assert spelled(tokenizer, [i for i, flag in zip(made.ids, made.trained, strict=True) if flag]) == "sat<end>"


# --- rewriting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [form for form in CASES if form not in ("text", "messages with tool_calls and null content")]
)
def test_a_rewritten_answer_stands_where_the_record_had_it(tokenizer, tmp_path, form):
    record, columns, asked, _ = CASES[form]
    (document,) = Reading(columns).documents(jsonl(tmp_path / "a.jsonl", record))

    made = row_of(document).answered("on the mat")

    assert made.keys() == record.keys()
    (again,) = examples(list(Reading(columns).documents(jsonl(tmp_path / "b.jsonl", made))), tokenizer)
    assert spelled(tokenizer, again.ids).rstrip("\n") == f"{asked}on the mat<end>"


def test_an_answer_that_calls_tools_is_not_rewritten(tmp_path):
    record = CASES["messages with tool_calls and null content"][0]
    (document,) = documents(jsonl(tmp_path / "a.jsonl", record))
    with pytest.raises(DataError, match="its last answer calls tools"):
        row_of(document)


# --- kinds of files ---------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f'The cat {number}, \n"x"', "completion": "sat"} for number in range(7)]
EXPECTED = [(row["prompt"], row["completion"]) for row in ROWS]


def zstd():
    return needed("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", "the test")


def packed(path: Path, content: bytes) -> str:
    pack = {".gz": gzip.compress, ".zst": lambda raw: zstd().compress(raw)}.get(path.suffix, lambda raw: raw)
    path.write_bytes(pack(content))
    return str(path)


def csv_bytes(separator: str) -> bytes:
    import io

    text = io.StringIO()
    table = csv.DictWriter(text, list(ROWS[0]), delimiter=separator)
    table.writeheader()
    table.writerows(ROWS)
    return b"\xef\xbb\xbf" + text.getvalue().encode()


def saved(path: Path, *, splits: bool = False) -> str:
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    (datasets.DatasetDict({"train": whole, "test": whole.select([0])}) if splits else whole).save_to_disk(path)
    return str(path)


def parquet(path: Path, rows: list[dict] = ROWS) -> str:
    import pyarrow
    from pyarrow import parquet as library

    library.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return str(path)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
MAKE = {
    ".jsonl": lambda place: packed(place / "a.jsonl", LINES),
    ".jsonl.zst": lambda place: packed(place / "a.jsonl.zst", LINES),
    ".json": lambda place: packed(place / "a.json", json.dumps(ROWS).encode()),
    ".csv": lambda place: packed(place / "a.csv", csv_bytes(",")),
    ".csv.zst": lambda place: packed(place / "a.csv.zst", csv_bytes(",")),
    ".tsv.gz": lambda place: packed(place / "a.tsv.gz", csv_bytes("\t")),
    ".parquet": lambda place: parquet(place / "a.parquet"),
    "DIR": lambda place: saved(place / "saved"),
    "DIR:SPLIT": lambda place: saved(place / "splits", splits=True) + ":train",
}


def test_every_kind_of_file_on_the_page_is_tried():
    kinds = {kind for cell in cells("| data | holds |") for kind in re.split(", | or ", cell)}
    assert kinds - {".txt", "ORG/NAME:CONFIG:SPLIT"} == {re.sub(r"(?<=[a-z])\.(gz|zst)$", "", kind) for kind in MAKE}


@pytest.mark.parametrize("kind", MAKE)
def test_all_kinds_of_files_hold_the_same_records_and_parts_of_them(kind, tmp_path):
    spec = MAKE[kind](tmp_path)

    def read(part: str = "") -> list[tuple[str, ...]]:
        return [each.parts for each in documents(spec + part)]

    assert read() == EXPECTED
    assert read("[:2]") + read("[2:5]") + read("[5:]") == EXPECTED
    assert read("[:50%]") + read("[50%:]") == EXPECTED
    assert [each.where for each in documents(f"{spec}[4:5]")] == [list(documents(spec))[4].where]


def test_questions_and_labels_are_read_from_every_kind_of_file_and_by_columns(tmp_path):
    questions = parquet(tmp_path / "q.parquet", [{"ask": "2 + 2 =", "choices": ["3", "4"], "right": 1, "id": 7}])
    labels = written(tmp_path / "l.csv", "review,stars\nI liked it.,1\n")

    (question,) = read_questions([questions], samples=None, columns="question=ask,choices=choices,answer=right")
    (labelled,) = read_labelled([labels], samples=None, columns="text=review,label=stars")

    assert (question.text, question.choices, question.answer) == ("2 + 2 =", ("3", "4"), 1)
    assert (labelled.text, labelled.label) == ("I liked it.", "1")
    with pytest.raises(DataError, match="has no column 'rite', which --columns names"):
        read_questions([questions], samples=None, columns="question=ask,choices=choices,answer=rite")
    with pytest.raises(OptionError, match="a record has question, choices, answer"):
        read_questions([questions], samples=None, columns="question=ask,answer=right")


def test_of_a_parquet_file_only_the_groups_of_a_part_are_read(tmp_path, monkeypatch):
    from pyarrow.parquet import ParquetFile

    asked: list[list[int]] = []
    whole = ParquetFile.iter_batches
    monkeypatch.setattr(
        ParquetFile, "iter_batches", lambda self, **how: asked.append(how["row_groups"]) or whole(self, **how)
    )

    list(documents(f"{parquet(tmp_path / 'a.parquet')}[4:6]"))

    assert asked == [[1]]


def test_nulls_that_a_table_pads_objects_with_are_not_rendered(tokenizer, tmp_path):
    other = {"type": "function", "function": {"name": "see", "arguments": {"where": "mat"}}}
    rows = [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [TOOL]}
        for call in (CALL, other)
    ]

    from_table = examples(list(documents(parquet(tmp_path / "a.parquet", rows))), tokenizer)
    from_lines = examples(list(documents(jsonl(tmp_path / "a.jsonl", *rows))), tokenizer)

    assert [each.ids for each in from_table] == [each.ids for each in from_lines]
    assert "null" not in spelled(tokenizer, from_table[0].ids)
    assert from_table[0].ids != from_table[1].ids


def test_a_null_that_a_person_wrote_into_an_argument_is_kept(tokenizer, tmp_path):
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": None}}}
    record = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}

    (made,) = examples(list(documents(jsonl(tmp_path / "a.jsonl", record))), tokenizer)

    assert '"what": null' in spelled(tokenizer, made.ids)


def test_a_chat_in_a_csv_is_a_text_of_json(tmp_path):
    (tmp_path / "a.csv").write_text('id,messages\n1,"' + json.dumps([USER, BOT]).replace('"', '""') + '"\n')
    assert next(documents(str(tmp_path / "a.csv"))).messages == (USER, BOT)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,id\na\n", "a.csv:2 has 1 values, and the header has 2"),
        ('text\n"a\nb"\n"c', "a.csv: unexpected end of data"),
        ("text,text\na,b\n", "the column 'text' stands twice in the header"),
        ("", "0 documents in"),
        ("text\n", "0 documents in"),
    ],
)
def test_a_csv_that_is_none_is_named_by_its_line(tmp_path, text, said):
    with pytest.raises(DataError) as caught:
        list(documents(written(tmp_path / "a.csv", text)))
    assert said in str(caught.value)


def test_a_damaged_zst_is_one_sentence(tmp_path):
    whole = zstd().compress(LINES)
    for content in (b"no zstd at all", whole[:-9]):
        (tmp_path / "a.jsonl.zst").write_bytes(content)
        with pytest.raises(DataError, match="cannot read .*a.jsonl.zst: "):
            list(documents(str(tmp_path / "a.jsonl.zst")))


def test_of_several_saved_splits_one_must_be_named(tmp_path):
    both, one = saved(tmp_path / "both", splits=True), saved(tmp_path / "one")

    for spec, said, hint in (
        (both, "holds the splits train, test", f"Name one: {both}:train or {both}:test"),
        (f"{both}:valid", "has no split 'valid'", f"Name one that it has: {both}:train or {both}:test"),
        (f"{one}:train", "is one dataset, without splits", f"Leave out the split: {one}"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            documents(spec)
        assert caught.value.hint == hint


def test_a_saved_split_that_leads_out_of_its_directory_is_refused(tmp_path):
    spec = saved(tmp_path / "both", splits=True)
    (tmp_path / "both/dataset_dict.json").write_text('{"splits": ["../other"]}')
    with pytest.raises(DataError, match="dataset_dict.json is damaged"):
        documents(f"{spec}:train")


def test_a_change_of_a_saved_dataset_makes_its_tokens_anew(tokenizer, tmp_path):
    from surgeon.train.store import stamps

    spec = saved(tmp_path / "both", splits=True)
    before = stamps(f"{spec}:train")
    saved(tmp_path / "other", splits=True)
    (tmp_path / "both/train/data-00000-of-00001.arrow").write_bytes(b"")

    assert before
    assert stamps(f"{spec}:train") != before


def test_a_saved_dataset_is_not_replaced_by_what_is_made_of_a_split_of_it(tmp_path):
    from surgeon.checkpoint.overlap import check_replaced
    from surgeon.errors import OutputError

    spec = saved(tmp_path / "both", splits=True)
    with pytest.raises(OutputError, match="is what --data reads"):
        check_replaced(tmp_path / "both", {"--data": (f"{spec}:train[:5]",)})
