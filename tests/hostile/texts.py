"""Hostile tokenizers, chat templates, and data to read."""

import gzip
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile.bases import Case, Damage, edited, set_entry

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TOKENIZED = ("evaluate", "generate", "prune", "finetune", "gist")
CHATTING = ("answers", "chat", "train-chat")


def cases() -> Iterator[Case]:
    """Yield the hostile texts."""
    for name, change in TOKENIZERS.items():
        yield Case(
            f"tokenizer: {name}", "llama", edited(f"model/{TOKENIZER}", change), TOKENIZED, (TOKENIZER, "tokenizer")
        )
    for name, change in TOKENIZER_CONFIGS.items():
        yield Case(f"tokenizer config: {name}", "llama", edited(f"model/{SETTINGS}", change), TOKENIZED, ("tokenizer",))
    for name, template in TEMPLATES.items():
        yield Case(f"template: {name}", "llama", _template(template), CHATTING, ("chat template", "tokenizer"))
    for name, (file, content) in DATA.items():
        yield Case(f"data: {name}", "llama", _data(file, content), ("on-data", "train-data"), ("data",))


TOKENIZERS: dict[str, Callable[[Any], Any] | bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "an object": b"{}",
    "null": b"null",
    "nested 100,000 deep": b'{"model":' * 100_000,
    "bad UTF-8": b'{"version":"\xff"}',
    "another version": set_entry("version", to="9.0"),
    "no model": lambda content: {key: value for key, value in content.items() if key != "model"},
    "an unknown model": set_entry("model", "type", to="Zorg"),
    "a model that is a word": set_entry("model", to="BPE"),
    "a vocabulary that is a list": set_entry("model", "vocab", to=["a"]),
    "a vocabulary of words": set_entry("model", "vocab", to={"a": "b"}),
    "a vocabulary of negative numbers": set_entry("model", "vocab", to={"a": -1}),
    "an empty vocabulary": set_entry("model", "vocab", to={}),
    "two tokens of one number": lambda content: content["model"]["vocab"].update({"zorg": 5, "zorg9": 5}),
    "numbers beyond the model": lambda content: content["model"].update(
        vocab={word: 10**6 + i for word, i in content["model"]["vocab"].items()}
    ),
    "numbers beyond 32 bits": set_entry("model", "vocab", to={"a": 2**40}),
    "merges that are unknown": set_entry("model", "merges", to=[["zorg", "zorg"]]),
    "merges that are numbers": set_entry("model", "merges", to=[1]),
    "merges of three": set_entry("model", "merges", to=[["a", "b", "c"]]),
    "added tokens that are words": set_entry("added_tokens", to=["x"]),
    "added tokens without a number": set_entry("added_tokens", to=[{"content": "x"}]),
    "an added token of a negative number": set_entry("added_tokens", 0, "id", to=-1),
    "an added token beyond the model": set_entry("added_tokens", 1, "id", to=10**7),
    "an added token that is empty": set_entry("added_tokens", 0, "content", to=""),
    "an unknown split": set_entry("pre_tokenizer", to={"type": "Zorg"}),
    "a regular expression that is none": set_entry(
        "pre_tokenizer", to={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    ),
    "a normaliser that is a list": set_entry("normalizer", to=[]),
    "a template of unknown tokens": set_entry("post_processor", "special_tokens", to={}),
    "a template that is a word": set_entry("post_processor", to="x"),
    "an unknown decoder": set_entry("decoder", to={"type": "Zorg"}),
    "truncation to nothing": set_entry(
        "truncation", to={"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0}
    ),
}
TOKENIZER_CONFIGS: dict[str, Callable[[Any], Any] | bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "nested 100,000 deep": b'{"a":' * 100_000,
    "code of its own": set_entry("auto_map", to={"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}),
    "code on the Hub": set_entry("auto_map", to={"AutoTokenizer": ["nobody/repo--code.Tokenizer", None]}),
    "code as a word": set_entry("auto_map", to="code.Tokenizer"),
    "an unknown class": set_entry("tokenizer_class", to="ZorgTokenizer"),
    "a class that is no tokenizer": set_entry("tokenizer_class", to="AutoModel"),
    "a class that is a number": set_entry("tokenizer_class", to=7),
    "a class that is a list": set_entry("tokenizer_class", to=["x"]),
    "an end of text that is a number": set_entry("eos_token", to=7),
    "an end of text that is a list": set_entry("eos_token", to=["x"]),
    "an end of text that is an object": set_entry("eos_token", to={"content": 7}),
    "a begin of text that is null": set_entry("bos_token", to=None),
    "a longest text that is a word": set_entry("model_max_length", to="x"),
    "a longest text below zero": set_entry("model_max_length", to=-1),
    "added tokens that are words": set_entry("added_tokens_decoder", to="x"),
    "added tokens of no number": set_entry("added_tokens_decoder", to={"x": {"content": "y"}}),
    "extra tokens that are numbers": set_entry("extra_special_tokens", to=[1, 2]),
    "other special tokens that are numbers": set_entry("additional_special_tokens", to=[1]),
    "a padding side that is neither": set_entry("padding_side", to="up"),
    "a file elsewhere": set_entry("tokenizer_file", to="/etc/passwd"),
    "a vocabulary elsewhere": set_entry("vocab_file", to="/dev/zero"),
    "a method in place of a word": set_entry("encode", to="x"),
}


# --- chat templates -----------------------------------------------------------------------------------------------


def _template(template: Any) -> Damage:
    def damage(at: Path) -> None:
        (at / "model" / "chat_template.jinja").unlink(missing_ok=True)
        if isinstance(template, str):
            (at / "model" / "chat_template.jinja").write_text(template)
        else:
            edited(f"model/{SETTINGS}", set_entry("chat_template", to=template))(at)

    return damage


TEMPLATES: dict[str, Any] = {
    "no template": "",
    "no Jinja": "{% if %}",
    "an open block": "{% for m in messages %}",
    "an unknown filter": "{{ messages | zorg }}",
    "an unknown name": "{{ zorg.attribute }}",
    "a division by zero": "{{ 1 / 0 }}",
    "a refusal": "{{ raise_exception('not this chat') }}",
    "400 MB": "{{ 'x' * 400000000 }}",
    "10 GB": "{{ 'x' * 10000000000 }}",
    "100 MB in a loop": "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
    "3 MB": "{{ 'x' * 3000000 }}",
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a range too long": "{% for i in range(10**9) %}{% endfor %}",
    "Python's insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the insides of a function": "{{ raise_exception.__globals__['os'].system('touch ran') }}",
    "an import": "{% import 'os' as os %}",
    "a file": "{% include '/etc/passwd' %}",
    "half a surrogate": "{{ '\\ud800' }}",
    "a number": 7,
    "a list": ["x"],
    "named templates without a default": [{"name": "zorg", "template": "x"}],
    "an object": {"a": 1},
}


# --- data ---------------------------------------------------------------------------------------------------------


def _data(name: str, content: bytes | None) -> Damage:
    def damage(at: Path) -> None:
        (at / "data" / "a.txt").unlink()
        if content is None:
            os.mkfifo(at / "data" / name)
        else:
            (at / "data" / name).write_bytes(content)

    return damage


DATA: dict[str, tuple[str, bytes | None]] = {
    "nothing": ("a.txt", b""),
    "one byte": ("a.txt", b"x"),
    "bad UTF-8": ("a.txt", b"abc\xff" * 100),
    "UTF-16": ("a.txt", ("the cat sat " * 50).encode("utf-16")),
    "a pipe": ("a.txt", None),
    "an unknown kind": ("a.doc", b"text"),
    "no gzip": ("a.txt.gz", b"text"),
    "half a gzip": ("a.txt.gz", gzip.compress(b"text " * 1000)[:-20]),
    "no JSON": ("a.jsonl", b"{oops}\n"),
    "a number": ("a.jsonl", b"7\n"),
    "a list": ("a.jsonl", b"[1]\n"),
    "no form": ("a.jsonl", b'{"zorg": 1}\n'),
    "a text that is a number": ("a.jsonl", b'{"text": 7}\n'),
    "a text that is a list": ("a.jsonl", b'{"text": ["x"]}\n'),
    "half a surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n'),
    "nested 100,000 deep": ("a.jsonl", b'{"a":' * 100_000 + b"\n"),
    "a number of 10,000 digits": ("a.jsonl", b'{"text": ' + b"9" * 10_000 + b"}\n"),
    "a key of a megabyte": ("a.jsonl", b'{"' + b"x" * 10**6 + b'": 1}\n'),
    "a key with escapes": ("a.jsonl", b'{"\\u001b[2J": 1}\n'),
    "messages that are a word": ("a.jsonl", b'{"messages": "x"}\n'),
    "messages without a role": ("a.jsonl", b'{"messages": [{"content": "x"}]}\n'),
    "messages of numbers": ("a.jsonl", b'{"messages": [1]}\n'),
    "a role that is a list": ("a.jsonl", b'{"messages": [{"role": [], "content": "x"}]}\n'),
    "no parquet": ("a.parquet", b"PAR1 text PAR1"),
    "half a JSON array": ("a.json", b'[{"text": "x"},'),
}
