"""A tokenizer with fewer tokens: what kept tokens are made of, and every file of the tokenizer written anew.

A text of which all tokens are kept has the same tokens as before. For BPE: a token is merged of the same parts wherever
it stands, so if those are kept with it, each merge that was the first to apply still is. For Unigram and WordPiece the
best, or longest, pieces of before are still there, and no new ones. What other texts fall back to are smaller pieces,
down to bytes or characters, which are all kept.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from surgeon.checkpoint.token_bytes import (
    SPACE,
    SUBWORD,
    byte_characters,
    has_byte_tokens,
    is_byte_level,
    is_byte_token,
    kind_of,
)
from surgeon.checkpoint.tokenizer_files import (
    ADDED_TOKENS,
    NAMED_TOKENS,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Files,
    added_tokens,
    model_vocabulary,
    parsed,
    vocabulary,
    written,
)
from surgeon.errors import PlanError

KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
VOCAB, MERGES, WORDS = "vocab.json", "merges.txt", "vocab.txt"
STALE = ".model", ".tiktoken"  # files of other libraries, which surgeon does not write
_HINT = "Its tokenizer stays as it is; --dtype bfloat16 halves the embeddings instead."


def check_can_trim(tokenizer: Mapping[str, Any]) -> None:
    """Raises PlanError for a tokenizer of which nobody can say what a token is made of."""
    kind, model = kind_of(tokenizer), tokenizer["model"]
    if kind not in KINDS:
        raise PlanError(f"the tokenizer is a {kind}, and surgeon trims {', '.join(KINDS)}", hint=_HINT)
    affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if kind == "BPE" and affixes:
        raise PlanError(
            f"the tokenizer's model has {affixes[0]} = {model[affixes[0]]!r}, so its merges do not spell its tokens",
            hint=_HINT,
        )
    if kind == "BPE" and model.get("dropout"):
        raise PlanError("the tokenizer drops merges at random, so a text has no certain tokens", hint=_HINT)


def always_kept(tokenizer: Mapping[str, Any], files: Files, template: str) -> dict[str, set[int]]:
    """Return the tokens that stay whatever the text, by the reason: "special" and "alphabet".

    Special are those that a file of the tokenizer names, that it puts around a text, or that the chat template writes;
    of the others that were added, only those that the text has.
    """
    known, model = vocabulary(tokenizer), tokenizer["model"]
    names = {text for file in (TOKENIZER_CONFIG, SPECIAL_TOKENS) for text in _named(file, files(file))}
    names |= {item["content"] for item in added_tokens(tokenizer) if item["content"] in template}
    names |= {str(model["unk_token"])} if model.get("unk_token") else set()
    special = {known[name] for name in names if name in known}
    special |= set(_processor_ids(tokenizer.get("post_processor")))
    special |= {model["unk_id"]} if type(model.get("unk_id")) is int else set()
    return {"special": special, "alphabet": _alphabet(tokenizer) - special}


def _named(file: str, content: bytes | None) -> Iterator[str]:
    """Yield the tokens that tokenizer_config.json or special_tokens_map.json names by what they are for."""
    config = {} if content is None else parsed(file, content)
    values = [value for key, value in config.items() if key in NAMED_TOKENS]
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        extra = config.get(key) or []
        values += list(extra.values() if isinstance(extra, dict) else extra)
    for value in values:
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            yield text


def _alphabet(tokenizer: Mapping[str, Any]) -> set[int]:
    """Return the tokens by which everything can be spelled that could be: of bytes, else of single characters."""
    known, kind = model_vocabulary(tokenizer), kind_of(tokenizer)
    if is_byte_level(tokenizer):
        return {known[letter] for letter in byte_characters() if letter in known}
    if kind == "WordLevel":
        return set()
    lowest = set()
    if kind == "Unigram":  # the price of an unknown character is counted from the lowest score
        scores = [piece[1] for piece in tokenizer["model"]["vocab"]]
        lowest = {min(range(len(scores)), key=scores.__getitem__)}
    if has_byte_tokens(tokenizer):  # the sign for a space is no character of a text: its bytes would not decode to one
        return {i for token, i in known.items() if is_byte_token(token) or token == SPACE} | lowest
    prefix = (tokenizer["model"].get("continuing_subword_prefix") or SUBWORD) if kind == "WordPiece" else ""
    return {i for token, i in known.items() if len(token.removeprefix(prefix)) == 1} | lowest


def parts_of(tokenizer: Mapping[str, Any], ids: Collection[int]) -> set[int]:
    """Return the tokens that these are made of: for BPE all that come up while their own text is merged, else none."""
    if kind_of(tokenizer) != "BPE":
        return set()
    known = model_vocabulary(tokenizer)
    ranks = {pair: rank for rank, pair in enumerate(_merges(tokenizer))}
    texts = {i: token for token, i in known.items()}
    found = {symbol for i in ids if i in texts for symbol in _derivation(texts[i], ranks)}
    return {known[symbol] for symbol in found if symbol in known} - set(ids)


def _derivation(token: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """Return all symbols that come up when a token's text is merged by BPE: the best pair first, then the leftmost."""
    symbols, seen = list(token), set(token)
    while len(symbols) > 1:
        pairs = [(ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(symbols))]
        rank, at = min(pairs)
        if rank == len(ranks):
            break
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        seen.add(symbols[at])
    return seen


def _merges(tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the merges of a BPE in their order; older files have each as one text with a space."""
    for merge in tokenizer["model"]["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def trimmed(files: Files, tokenizer: Mapping[str, Any], kept: Sequence[int]) -> dict[str, bytes | None]:
    """Return every file of the tokenizer with only the tokens `kept`, ascending, numbered anew in their order.

    A file that surgeon cannot write anew is None: it would name tokens that are no more. It has the same tokens as
    tokenizer.json, which is read in its place.
    """
    numbers = {old: new for new, old in enumerate(kept)}
    edited = _tokenizer(tokenizer, numbers)
    changed: dict[str, bytes | None] = {TOKENIZER: written(TOKENIZER, edited)}
    if (content := files(TOKENIZER_CONFIG)) is not None:
        changed[TOKENIZER_CONFIG] = written(TOKENIZER_CONFIG, _config(parsed(TOKENIZER_CONFIG, content), numbers))
    if (content := files(ADDED_TOKENS)) is not None:
        items = parsed(ADDED_TOKENS, content).items()
        changed[ADDED_TOKENS] = written(ADDED_TOKENS, {text: numbers[i] for text, i in items if i in numbers})
    known = model_vocabulary(edited)
    if files(VOCAB) is not None:
        changed[VOCAB] = written(VOCAB, known) if kind_of(edited) == "BPE" else None
    if files(MERGES) is not None:
        lines = ["#version: 0.2", *(" ".join(pair) for pair in _merges(edited))] if kind_of(edited) == "BPE" else None
        changed[MERGES] = None if lines is None else ("\n".join(lines) + "\n").encode()
    if files(WORDS) is not None:
        is_listed = kind_of(edited) == "WordPiece" and sorted(known.values()) == list(range(len(known)))
        changed[WORDS] = "".join(f"{token}\n" for token in known).encode() if is_listed else None
    return changed


def _tokenizer(tokenizer: Mapping[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    model = dict(tokenizer["model"])
    tokens = {token: numbers[i] for token, i in model_vocabulary(tokenizer).items() if i in numbers}
    tokens = dict(sorted(tokens.items(), key=lambda item: item[1]))
    if isinstance(model["vocab"], list):
        model["vocab"] = [piece for i, piece in enumerate(model["vocab"]) if i in numbers]
    else:
        model["vocab"] = tokens
    if "merges" in model:
        pairs = zip(model["merges"], _merges(tokenizer), strict=True)
        model["merges"] = [as_it_is for as_it_is, (a, b) in pairs if a in tokens and b in tokens and a + b in tokens]
    if type(model.get("unk_id")) is int:
        model["unk_id"] = numbers[model["unk_id"]]
    added = [{**item, "id": numbers[item["id"]]} for item in added_tokens(tokenizer) if item["id"] in numbers]
    edited = {**tokenizer, "added_tokens": added, "model": model}
    if isinstance(padding := tokenizer.get("padding"), dict) and padding.get("pad_id") in numbers:
        edited["padding"] = {**padding, "pad_id": numbers[padding["pad_id"]]}
    edited["post_processor"] = _processor(tokenizer.get("post_processor"), numbers)
    return edited


def _config(config: dict[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return config
    entries = {int(i): entry for i, entry in decoder.items()}
    renumbered = {str(numbers[i]): entry for i, entry in entries.items() if i in numbers}
    return {**config, "added_tokens_decoder": renumbered}


def _processor_ids(processor: Any) -> Iterator[int]:
    """Yield the ids of the tokens that a post-processor puts around a text."""
    if not isinstance(processor, Mapping):
        return
    for part in processor.get("processors") or ():
        yield from _processor_ids(part)
    for key in ("sep", "cls"):  # of BERT and RoBERTa: [text, id]
        if isinstance(pair := processor.get(key), list) and len(pair) == 2:
            yield pair[1]
    for entry in (processor.get("special_tokens") or {}).values():
        yield from entry.get("ids") or ()


def _processor(processor: Any, numbers: Mapping[int, int]) -> Any:
    """Return a post-processor whose tokens have their new numbers."""
    if not isinstance(processor, Mapping):
        return processor
    edited = dict(processor)
    if isinstance(parts := processor.get("processors"), list):
        edited["processors"] = [_processor(part, numbers) for part in parts]
    for key in ("sep", "cls"):
        if isinstance(pair := processor.get(key), list) and len(pair) == 2:
            edited[key] = [pair[0], numbers[pair[1]]]
    if isinstance(special := processor.get("special_tokens"), dict):
        edited["special_tokens"] = {
            name: {**entry, "ids": [numbers[i] for i in entry.get("ids") or ()]} for name, entry in special.items()
        }
    return edited
