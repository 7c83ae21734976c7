"""What the tokens of a tokenizer.json spell, in bytes.

Tokenizers write the same bytes in different ways: GPT-2's kin a space as "Ġ" and each byte as a letter, SentencePiece's
a space as "▁" and a byte that has no token as <0x0A>. So tokens of two vocabularies are the same where their bytes are,
and never where their strings are.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from surgeon.checkpoint.tokenizer_files import added_tokens, model_vocabulary

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "▁"  # SentencePiece's
SUBWORD = "##"  # WordPiece's, of a piece that begins no word


def byte_characters() -> list[str]:
    """Return the character by which byte-level tokenizers write each byte: itself, where it is seen and no space.

    Source: GPT-2's bytes_to_unicode.
    """
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether the letters of a tokenizer's tokens stand for bytes."""
    return any(
        part.get("type") == "ByteLevel" for key in ("decoder", "pre_tokenizer") for part in _parts(tokenizer.get(key))
    )


def has_byte_tokens(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether a character without a token is spelled by the tokens <0x00> to <0xFF>."""
    return bool(tokenizer["model"].get("byte_fallback"))


def kind_of(tokenizer: Mapping[str, Any]) -> str:
    """Return the kind of a tokenizer's model: "BPE", "Unigram", "WordPiece" or "WordLevel".

    Files of older versions do not name it.
    """
    model = tokenizer["model"]
    named = model.get("type")
    if isinstance(named, str):
        return named
    return "BPE" if "merges" in model else "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece"


def special_tokens(tokenizer: Mapping[str, Any]) -> dict[int, str]:
    """Return the tokens that stand for no text, by their ids: they are added to the vocabulary, and special."""
    return {item["id"]: item["content"] for item in added_tokens(tokenizer) if item.get("special")}


def token_bytes(tokenizer: Mapping[str, Any]) -> dict[int, bytes]:
    """Return the bytes that each ordinary token spells, by its id; special tokens spell none and are left out.

    So are tokens of a byte-level vocabulary with a letter that stands for no byte. Tokens that are added and not
    special spell their own text. Raises CheckpointError for a tokenizer.json that is damaged.
    """
    special = special_tokens(tokenizer)
    added = {item["id"]: str(item["content"]).encode() for item in added_tokens(tokenizer)}
    spell = _speller(tokenizer)
    spelled = {i: spell(token) for token, i in model_vocabulary(tokenizer).items() if i not in added}
    known = {**{i: content for i, content in spelled.items() if content is not None}, **added}
    return {i: content for i, content in sorted(known.items()) if i not in special}


def _speller(tokenizer: Mapping[str, Any]) -> Any:
    """Return the function from a token's string to its bytes, None where it has none."""
    if is_byte_level(tokenizer):
        values = {character: byte for byte, character in enumerate(byte_characters())}

        def of_letters(token: str) -> bytes | None:
            return bytes(values[letter] for letter in token) if values.keys() >= set(token) else None

        return of_letters
    if kind_of(tokenizer) == "WordPiece":
        prefix = tokenizer["model"].get("continuing_subword_prefix") or SUBWORD

        def of_word(token: str) -> bytes:
            return token.removeprefix(prefix).encode() if token.startswith(prefix) else b" " + token.encode()

        return of_word
    has_bytes = has_byte_tokens(tokenizer) or any(
        part.get("type") == "ByteFallback" for part in _parts(tokenizer.get("decoder"))
    )

    def of_piece(token: str) -> bytes:
        byte = _BYTE.fullmatch(token) if has_bytes else None
        return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()

    return of_piece


def is_byte_token(token: str) -> bool:
    """Return whether a token is one of <0x00> to <0xFF>."""
    return _BYTE.fullmatch(token) is not None


def _parts(content: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a decoder or pre-tokenizer of a tokenizer.json, or those that it is a sequence of."""
    if not isinstance(content, Mapping):
        return
    yield content
    for key in ("decoders", "pretokenizers", "normalizers"):
        for part in content.get(key) or ():
            yield from _parts(part)
