"""The ids of tokens in config.json and generation_config.json, found by their keys, and followed where tokens move."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from surgeon.anatomy.spellings import SPELLINGS

# One id, or a list of them: bos_token_id, image_token_index, and the token_ids of a gist.
_KEY = re.compile(r"(\w+_)?token_(ids?|index|indices)")
_LISTS = ("suppress_tokens", "begin_suppress_tokens")  # ids that are never, or not at first, generated
_SEQUENCES = ("bad_words_ids", "force_words_ids")  # lists of ids, or lists of such lists
_FORCED = "forced_decoder_ids"  # pairs of a position and an id

NewId = Callable[[int], int | None]  # from an id to the one that the token has now, None where it is no more


def token_ids(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the ids that a config gives a role, with their keys: those of the end of a text, of padding, of images.

    Ids of words that are never generated are no roles. A part of a config with a vocabulary of its own is left out.
    """
    for key, value in config.items():
        if _KEY.fullmatch(key):
            yield from ((key, i) for i in (value if isinstance(value, list) else [value]) if type(i) is int)
        elif isinstance(value, Mapping) and not _has_own_tokens(value, config):
            yield from token_ids(value)


def followed(config: Mapping[str, Any], new_id: NewId, lost: list[str]) -> dict[str, Any]:
    """Return a config in which every id is the token's new one. What names a token that is no more is left out.

    A single id becomes null. The keys of what is left out are added to `lost`, each once.
    """
    edited = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and not _has_own_tokens(value, config):
            edited[key] = followed(value, new_id, lost)
            continue
        new = edited[key] = _follow(key, value, new_id)
        is_shorter = isinstance(value, list) and len(new) < len(value)
        if (is_shorter or (new is None and value is not None)) and key not in lost:
            lost.append(key)
    return edited


def _follow(key: str, value: Any, new_id: NewId) -> Any:
    if _KEY.fullmatch(key) or key in _LISTS:
        if isinstance(value, list):
            return [new for i in value if (new := new_id(i) if type(i) is int else i) is not None]
        return new_id(value) if type(value) is int else value
    if key == _FORCED and isinstance(value, list):
        pairs = [(place, new_id(i) if type(i) is int else i) for place, i in value]
        return [[place, i] for place, i in pairs if i is not None]
    if key in _SEQUENCES and isinstance(value, list):
        return [new for item in value if (new := _sequence(item, new_id)) is not None]
    return value


def _sequence(item: Any, new_id: NewId) -> Any:
    """Return a list of ids, or of lists of them, with the new ones; None where one of them is no more."""
    if type(item) is int:
        return new_id(item)
    parts = [_sequence(part, new_id) for part in item] if isinstance(item, list) else [item]
    return None if None in parts else parts


def _has_own_tokens(part: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return whether a part of a config counts other tokens than the config around it."""
    sizes = [next((each[key] for key in SPELLINGS["vocab"] if key in each), None) for each in (part, config)]
    return None not in sizes and sizes[0] != sizes[1]
