"""Toys that can be evaluated: a checkpoint with a tokenizer of its own, and texts and records for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT = "The cat sat on the mat, and the rat sat on the cat; é🌿 — that was that.\n" * 12
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
VOCABULARY = 300


def tokenizer_of(text: str = TEXT, **options: Any) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE trained on a text, which puts <s> before what it is given and <end> behind it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <end>", special_tokens=[("<s>", 1), ("<end>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


def talker(
    directory: Path, name: str = "llama", *, text: str = TEXT, template: str | None = TEMPLATE, **how: Any
) -> Path:
    """Return `directory`, now holding the toy `name` with a tokenizer trained on `text`."""
    toys.build(name, directory, vocab_size=VOCABULARY, **how)
    tokenizer_of(text, chat_template=template).save_pretrained(directory)
    return directory


def written(path: Path, text: str = TEXT) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def jsonl(path: Path, *records: object) -> str:
    return written(path, "".join(json.dumps(record) + "\n" for record in records))
