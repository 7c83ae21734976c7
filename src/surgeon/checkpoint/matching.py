"""Which tokens of two vocabularies are the same: ordinary ones by the bytes that they spell, special ones by role."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from surgeon.checkpoint.token_bytes import is_byte_token, special_tokens, token_bytes
from surgeon.checkpoint.tokenizer_files import vocabulary

# Of two roles that one token has, the first decides: where padding is the end of a text, the token is the end.
ROLES = ("bos", "eos", "unk", "sep", "cls", "mask", "pad")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a tokenizer.json, with the ids that have a role: {"bos": 1, "eos": 2}."""

    tokenizer: Mapping[str, Any]
    roles: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any], roles: Mapping[str, int]) -> "Vocabulary":
        """Return the vocabulary of a tokenizer.json without its merges, of which there may be a million."""
        model = {key: [] if key == "merges" else value for key, value in tokenizer["model"].items()}
        return cls({**tokenizer, "model": model}, roles)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of every token."""
        return vocabulary(self.tokenizer)

    @cached_property
    def spelled(self) -> dict[int, bytes]:
        """The bytes of every ordinary token."""
        return token_bytes(self.tokenizer)

    @cached_property
    def special(self) -> dict[int, str]:
        """The special tokens, and those that have a role."""
        texts = {i: token for token, i in self.ids.items()}
        named = {i: texts[i] for i in self.roles.values() if i in texts and i not in self.spelled}
        return special_tokens(self.tokenizer) | named

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """The token that spells bytes. Of several the one that a text has: not the one that stands for a byte."""
        texts = {i: token for token, i in self.ids.items()}
        found: dict[bytes, int] = {}
        for i, content in self.spelled.items():
            if content not in found or is_byte_token(texts[found[content]]):
                found[content] = i
        return found

    def pieces(self, content: bytes) -> list[int]:
        """Return tokens that spell bytes, the longest at each place; a byte without a token is left out."""
        found, at = [], 0
        while at < len(content):
            lengths = range(min(len(content) - at, self._longest), 0, -1)
            length = next((n for n in lengths if content[at : at + n] in self.by_bytes), 0)
            if length:
                found.append(self.by_bytes[content[at : at + length]])
            at += max(1, length)
        return found

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.spelled.values()), default=0)


@dataclass(frozen=True, eq=False)
class Match:
    """The old token of each new one, and the rule: `by_bytes` or `by_role`. `missing` are the new tokens without one.

    `unmatched` are special tokens without a counterpart. All are new ids, ascending.
    """

    by_bytes: Mapping[int, int]
    by_role: Mapping[int, int]
    missing: Sequence[int]
    unmatched: Sequence[int]

    @cached_property
    def old(self) -> dict[int, int]:
        """The old token of each new one that has one."""
        return {**self.by_bytes, **self.by_role}

    @cached_property
    def new(self) -> dict[int, int]:
        """The first new token of each old one that has one."""
        return {old: new for new, old in sorted(self.old.items(), reverse=True)}


def match(old: Vocabulary, new: Vocabulary, named: Mapping[int, int]) -> Match:
    """Return which tokens of two vocabularies are the same. `named` are pairs of a new and an old id that are given.

    A special token is the old one that is given, else that of the same text, else that of the same role; the start of a
    text without a counterpart is the end of one.
    """
    by_role = dict(named)
    texts = {text: i for i, text in old.special.items()}
    for i, text in new.special.items():
        role = next((role for role in ROLES if new.roles.get(role) == i), None)
        same = texts.get(text)
        if same is None and role is not None:
            same = old.roles.get(role, old.roles.get("eos") if role in ("bos", "pad") else None)
        if same is not None:
            by_role.setdefault(i, same)
    ordinary = {i: content for i, content in new.spelled.items() if i not in by_role and i not in new.special}
    by_bytes = {i: old.by_bytes[content] for i, content in ordinary.items() if content in old.by_bytes}
    missing = [i for i in ordinary if i not in by_bytes]
    others = [i for i in new.ids.values() if i not in ordinary and i not in by_role]
    return Match(by_bytes, by_role, missing, sorted(others))
