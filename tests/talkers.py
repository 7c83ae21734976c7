"""Toys that can be evaluated: a checkpoint with a tokenizer of its own, and texts and records for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toys
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

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


def pieces_of(kind: str, text: str = TEXT, **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of another kind than `tokenizer_of`: "sentencepiece" (BPE with byte tokens), "unigram" (with
    them), "wordpiece" or "words". Its special tokens are the first: <pad>, <s>, <end>, <unk>.
    """
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "<end>", "<unk>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained: Any = {"vocab_size": VOCABULARY + 256, "special_tokens": special + bytes_, "show_progress": False}
    space = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    if kind == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tokenizer.normalizer, tokenizer.decoder = normalizers.Replace(" ", "▁"), _of_spaces()
        tokenizer.train_from_iterator(text.splitlines(keepends=True), trainers.BpeTrainer(**trained))
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = space, _of_spaces()
        tokenizer.train_from_iterator(
            [text], trainers.UnigramTrainer(unk_token="<unk>", initial_alphabet=["▁"], **trained)
        )
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator([text], trainer)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.train_from_iterator([text], trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    content = json.loads(tokenizer.to_str())
    if kind in ("sentencepiece", "unigram"):  # bytes are tokens of the model, and not special
        content["added_tokens"] = [item for item in content["added_tokens"] if item["content"] in special]
        content["model"]["byte_fallback"] = True
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **names, **options)


def _of_spaces() -> Any:
    """Return the decoder of SentencePiece's kin."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(parts)


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
