"""Tokenizers that surgeon makes itself: one of bytes, and one of whole words. Each as the files of a checkpoint."""

import json
from collections.abc import Sequence
from typing import Any

from surgeon.checkpoint.token_bytes import byte_characters
from surgeon.checkpoint.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG

END_OF_TEXT = "<|endoftext|>"
PADDING, BEGIN, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"


def byte_tokenizer() -> dict[str, bytes]:
    """Return a tokenizer of 257 tokens: token b is the byte b, and 256 the end of a text. Nothing is merged.

    The end of a text is also its begin and its padding, as of GPT-2, and is never put before a text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return _files(tokenizer, tokens, clean_up_tokenization_spaces=False)


def word_tokenizer(words: Sequence[str]) -> dict[str, bytes]:
    """Return a tokenizer of whole words, split at spaces, which puts `<s>` before every text.

    The tokens 0 to 3 are `<pad>`, `<s>`, `</s>` and `<unk>`; then come the words in their order.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    special = (PADDING, BEGIN, END, UNKNOWN)
    vocabulary = {word: index for index, word in enumerate((*special, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    return _files(tokenizer, dict(zip(names, special, strict=True)), clean_up_tokenization_spaces=False)


def _files(tokenizer: Any, tokens: dict[str, str], **config: Any) -> dict[str, bytes]:
    named = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **config}
    written = {TOKENIZER: tokenizer.to_str(pretty=True), TOKENIZER_CONFIG: json.dumps(named, indent=2)}
    return {name: f"{content}\n".encode() for name, content in written.items()}
