"""Rows of tokens from documents, with tokenizers made on the spot."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from later import LATER
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from surgeon.data.rows import TokenRows, digest, read_rows
from surgeon.errors import DataError
from surgeon.models.loading import load_tokenizer

if LATER:
    import torch
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXT = "The cat sat on the mat, and the rat sat on the cat; é🌿 — that was that.\n" * 12
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE trained on TEXT, which puts <s> before a text and says that it can see 8 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "<end>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <end>", special_tokens=[("<s>", 0), ("<end>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "<end>", "model_max_length": 8} | options
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text, from the tokenizers library itself."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def joined(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    """Return the ids of texts with the end-of-text token between them."""
    stream: list[int] = []
    for number, text in enumerate(texts):
        stream += [tokenizer.eos_token_id] * (number > 0) + ids_of(tokenizer, text)
    return stream


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(path: Path, *records: object) -> str:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def refusal(*args: Any, **options: Any) -> tuple[str, str | None]:
    with pytest.raises(DataError) as caught:
        read_rows(*args, **{"samples": 2, "sequence_length": 4} | options)
    return str(caught.value), caught.value.hint


def test_a_text_is_one_stream_cut_in_order_without_special_tokens(tokenizer, tmp_path):
    spec = write(tmp_path / "a.txt", TEXT)
    stream = ids_of(tokenizer, TEXT)

    rows = read_rows([spec], tokenizer, samples=3, sequence_length=10)

    assert rows.tokens.dtype == torch.int64
    assert rows.tokens.tolist() == [stream[0:10], stream[10:20], stream[20:30]]
    assert rows.num_tokens == 30
    assert not {0, 1} & set(stream)


def test_a_rest_shorter_than_a_row_is_dropped(tokenizer, tmp_path):
    stream = ids_of(tokenizer, TEXT)
    length = len(stream) // 3 - 1  # 3 rows and a few tokens
    rows = read_rows([write(tmp_path / "a.txt", TEXT)], tokenizer, samples=100, sequence_length=length)
    assert rows.tokens.tolist() == [stream[i * length : (i + 1) * length] for i in range(3)]


def test_text_that_does_not_fill_a_row_is_one_shorter_row(tokenizer, tmp_path):
    stream = ids_of(tokenizer, "sat on")
    rows = read_rows([write(tmp_path / "a.txt", "sat on")], tokenizer, samples=4, sequence_length=len(stream) + 1)
    assert rows.tokens.tolist() == [stream]


def test_text_of_exactly_two_tokens_is_a_row(tokenizer, tmp_path):
    rows = read_rows([write(tmp_path / "a.txt", "qz")], tokenizer, samples=1, sequence_length=128)
    assert rows.tokens.shape == (1, 2)


@pytest.mark.parametrize(("text", "found"), [("", "0 tokens"), ("q", "1 token")])
def test_less_than_two_tokens_are_refused(tokenizer, tmp_path, text, found):
    spec = write(tmp_path / "a.txt", text)
    message, hint = refusal([spec], tokenizer)
    assert message == f"{found} in {spec}; a row has 2 at least"
    assert hint == "Give more text with --data."


def test_no_data_is_refused(tokenizer):
    assert refusal([], tokenizer)[0] == "0 tokens in no data; a row has 2 at least"


def test_documents_and_arguments_are_joined_by_the_end_of_text_token(tokenizer, tmp_path):
    first = jsonl(
        tmp_path / "a.jsonl", {"text": "The cat"}, {"text": ""}, {"prompt": "sat on", "completion": "the mat"}
    )
    second = write(tmp_path / "b.txt", "that was that")
    stream = joined(tokenizer, ["The cat", "", "sat on\nthe mat", "that was that"])

    rows = read_rows([first, second], tokenizer, samples=1, sequence_length=len(stream))

    assert rows.tokens.tolist() == [stream]


def test_a_longer_row_than_the_model_can_see_says_nothing(tokenizer, tmp_path, capfd, caplog):
    read_rows([write(tmp_path / "a.txt", TEXT)], tokenizer, samples=2, sequence_length=20)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_one_document_needs_no_end_of_text_token(tmp_path):
    bare = byte_level(eos_token=None)
    spec = write(tmp_path / "a.txt", TEXT)
    assert read_rows([spec], bare, samples=2, sequence_length=4).num_tokens == 8


def test_two_documents_without_an_end_of_text_token_are_refused(tmp_path):
    bare = byte_level(eos_token=None)
    spec = jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    assert refusal([spec], bare) == (
        f"{spec}:2 is a second document, and the tokenizer has no end-of-text token to put before it",
        "Put all text into one .txt, or set eos_token in tokenizer_config.json.",
    )


def test_no_more_documents_are_read_than_rows_need(tokenizer, tmp_path):
    enough = {"text": "The cat sat on the mat"}
    spec = write(tmp_path / "a.jsonl", json.dumps(enough) + "\nno json\n")
    unread = write(tmp_path / "b.jsonl", "no json either\n")

    rows = read_rows([spec, unread], tokenizer, samples=1, sequence_length=3)

    assert [item["data"] for item in rows.source] == [spec]
    assert refusal([spec], tokenizer, samples=1000)[0] == f"{spec}:2:1: Expecting value"
    assert refusal([spec, unread], tokenizer, samples=2)[0] == f"{unread}:1:1: Expecting value"


def test_rows_of_several_texts_come_in_turns_and_what_is_left_comes_last(tokenizer, tmp_path):
    short, long = "The cat sat", TEXT
    specs = [write(tmp_path / "a.txt", short), write(tmp_path / "b.txt", long)]
    first, second = ids_of(tokenizer, short), ids_of(tokenizer, long)
    length = len(first) - 1
    number = len(second) // length

    rows = read_rows(specs, tokenizer, samples=1000, sequence_length=length).tokens.tolist()

    whole = [second[i * length : (i + 1) * length] for i in range(number)]
    rest = [first[-1], tokenizer.eos_token_id, *second[number * length :]]
    assert rows == [first[:-1], *whole, *[rest[:length] for _ in range(len(rest) // length)]]
    assert read_rows(specs, tokenizer, samples=2, sequence_length=length).tokens.tolist() == rows[:2]


def test_a_name_that_is_wrong_is_refused_though_it_would_not_be_reached(tokenizer, tmp_path):
    spec = write(tmp_path / "a.txt", TEXT)
    assert refusal([spec, str(tmp_path / "missing.txt")], tokenizer)[0].startswith("no such file or directory: ")


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        ({"samples": 0}, "0 samples were asked for; 1 is the least", "Set --samples to 1 or more."),
        (
            {"sequence_length": 1},
            "rows of 1 tokens were asked for; 2 are the least, one to see and one to predict",
            "Set --sequence-length to 2 or more.",
        ),
    ],
)
def test_sizes_that_make_no_row_are_refused(tokenizer, options, said, hint):
    assert refusal(["missing.txt"], tokenizer, **options) == (said, hint)


# Chats


def test_a_chat_is_written_by_the_template_of_the_tokenizer(tmp_path):
    chatty = byte_level(chat_template=TEMPLATE)
    messages = [{"role": "user", "content": "The cat"}, {"role": "assistant", "content": "sat"}]
    spec = jsonl(tmp_path / "a.jsonl", {"messages": messages})
    rows = read_rows([spec], chatty, samples=1, sequence_length=1000)
    assert rows.tokens.tolist() == [ids_of(chatty, "<user>The cat<assistant>sat")]


def test_a_chat_without_a_template_is_refused(tokenizer, tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "Hi"}]})
    message, hint = refusal([spec], tokenizer)
    assert message == f"{spec}:1 is a chat, and the tokenizer has no chat template"
    assert hint == "Use a model that has one (an instruct or chat model), or data with text."


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
    ],
)
def test_a_chat_that_the_template_refuses_is_named(tmp_path, template, said):
    spec = jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "Hi"}]})
    message, hint = refusal([spec], byte_level(chat_template=template))
    assert message.startswith(f"the chat template refuses {spec}:1: {said}")
    assert hint.startswith("Many templates require")


# What was read


def test_the_digest_is_of_the_row_length_and_the_ids(tokenizer, tmp_path):
    rows = read_rows([write(tmp_path / "a.txt", TEXT)], tokenizer, samples=3, sequence_length=5)
    numbers = [5, *rows.tokens.flatten().tolist()]
    assert rows.digest == hashlib.sha256(b"".join(number.to_bytes(8, "little") for number in numbers)).hexdigest()


def test_the_digest_changes_with_a_token_their_order_and_the_row_length():
    tokens = torch.arange(12)
    others = [tokens.reshape(3, 4), tokens.reshape(4, 3), tokens.flip(0).reshape(3, 4), tokens[:8].reshape(2, 4)]
    changed = tokens.reshape(3, 4).clone()
    changed[2, 3] += 1
    assert len({digest(rows) for rows in [*others, changed]}) == 5
    assert digest(tokens.reshape(4, 3).T.contiguous().T) == digest(tokens.reshape(4, 3))


def test_the_same_rows_from_another_form_have_the_same_digest(tokenizer, tmp_path):
    text = read_rows([write(tmp_path / "a.txt", TEXT)], tokenizer, samples=3, sequence_length=5)
    line = read_rows([jsonl(tmp_path / "a.jsonl", {"text": TEXT})], tokenizer, samples=3, sequence_length=5)
    assert text.digest == line.digest
    assert text.source[0]["sha256"] == line.source[0]["sha256"]


def test_the_source_of_a_text_file_is_the_hash_of_the_file(tokenizer, tmp_path):
    spec = write(tmp_path / "a.txt", TEXT)
    rows = read_rows([spec], tokenizer, samples=1, sequence_length=5)
    assert json.loads(json.dumps(rows.source)) == [
        {"data": spec, "sha256": hashlib.sha256(Path(spec).read_bytes()).hexdigest()}
    ]


def test_the_source_of_records_is_the_hash_of_their_texts(tokenizer, tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", {"text": "é"}, {"question": "q", "answer": "a"})
    rows = read_rows([spec], tokenizer, samples=9, sequence_length=2)
    assert rows.source[0]["sha256"] == hashlib.sha256("é".encode() + b"\xff" + b"q\na").hexdigest()


def test_two_texts_are_not_hashed_as_one(tokenizer, tmp_path):
    splits = [("ab", "c"), ("a", "bc"), ("abc", ""), ("abc",)]
    specs = [jsonl(tmp_path / f"{i}.jsonl", *({"text": t} for t in texts)) for i, texts in enumerate(splits)]
    hashes = {read_rows([spec], tokenizer, samples=9, sequence_length=2).source[0]["sha256"] for spec in specs}
    assert len(hashes) == 4


# Whatever the texts


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=40), min_size=1, max_size=6),
    samples=st.integers(1, 5),
    length=st.integers(2, 20),
)
def test_rows_in_a_line_are_a_prefix_of_the_joined_stream(tmp_path_factory, tokenizer, texts, samples, length):
    spec = jsonl(tmp_path_factory.mktemp("rows") / "a.jsonl", *({"text": text} for text in texts))
    stream = joined(tokenizer, texts)
    if len(stream) < 2:
        refusal([spec], tokenizer, samples=samples, sequence_length=length)
        return

    tokens = read_rows([spec], tokenizer, samples=samples, sequence_length=length).tokens

    assert tokens.flatten().tolist() == stream[: tokens.numel()]
    if len(stream) < length:
        assert tokens.shape == (1, len(stream))
    else:
        assert tokens.shape == (min(samples, len(stream) // length), length)


def test_a_large_text_is_tokenised_as_a_whole(tokenizer, tmp_path):
    text = "no boundary" + "x" * 300_000  # one word: a prefix of it would have other tokens at its end
    rows = read_rows([write(tmp_path / "a.txt", text)], tokenizer, samples=10_000, sequence_length=16)
    assert rows.tokens.flatten().tolist() == ids_of(tokenizer, text)[: rows.num_tokens]


# Loading a tokenizer


def test_a_tokenizer_is_loaded_as_it_was_saved(tokenizer, tmp_path, capfd):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert ids_of(loaded, TEXT) == ids_of(tokenizer, TEXT)
    assert loaded.eos_token_id == 1
    assert capfd.readouterr() == ("", "")


def test_a_word_level_tokenizer_does_too(tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / "words")
    spec = write(tmp_path / "a.txt", "the cat the dog")

    rows: TokenRows = read_rows([spec], load_tokenizer(str(tmp_path / "words")), samples=2, sequence_length=2)

    assert rows.tokens.tolist() == [[1, 2], [1, 0]]


def loading_refusal(name: Path | str) -> tuple[str, str | None]:
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(name))
    return str(caught.value), caught.value.hint


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "llama"])
def test_a_model_without_a_tokenizer_is_refused_even_where_transformers_makes_an_empty_one(tmp_path, model_type, capfd):
    write(tmp_path / "config.json", json.dumps({"model_type": model_type}))
    message, hint = loading_refusal(tmp_path)
    assert str(tmp_path) in message
    assert hint == f"Copy tokenizer.json and tokenizer_config.json of the model that {tmp_path} comes from into it."
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[1]"),
        ("tokenizer.json", '{"version": "9.0", "added_tokens": [], "model": {"type": "New"}}'),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"eos_token": 5, "tokenizer_class": "PreTrainedTokenizerFast"}'),
    ],
)
def test_a_damaged_tokenizer_is_one_sentence(tokenizer, tmp_path, file, content):
    tokenizer.save_pretrained(tmp_path)
    write(tmp_path / file, content)
    message, hint = loading_refusal(tmp_path)
    assert message.startswith(f"cannot load the tokenizer of {tmp_path}: ")
    assert "\n" not in message
    assert hint == f"Fetch the tokenizer's files in {tmp_path} again, or: pip install -U transformers tokenizers"


def test_code_that_a_tokenizer_brings_is_not_run(tmp_path):
    write(tmp_path / "config.json", '{"model_type": "mine"}')
    write(tmp_path / "tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["mine.Mine", null]}}')
    write(tmp_path / "mine.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    message, hint = loading_refusal(tmp_path)
    assert message == f"the tokenizer of {tmp_path} is code of its own (auto_map in tokenizer_config.json)"
    assert "--trust-remote-code" in hint
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.environ.get("HF_HUB_OFFLINE") != "1", reason="asks the Hub")
def test_offline_a_name_that_is_not_there_names_the_variable():
    message, hint = loading_refusal("org/nothing-of-that-name")
    assert message.startswith("cannot load the tokenizer of org/nothing-of-that-name: ")
    assert hint == "Unset HF_HUB_OFFLINE to ask the Hub for it, or name a checkpoint directory that exists."
