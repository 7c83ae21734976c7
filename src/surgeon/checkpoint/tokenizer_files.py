"""Edits of the tokenizer's files and of generation_config.json: add a special token, and never generate it.

The files are edited as JSON, without transformers. tokenizer.json decides. The other files list the token only if they
list such tokens at all.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from surgeon.errors import CheckpointError, PlanError

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"  # written by transformers before 5, read by all
ADDED_TOKENS = "added_tokens.json"
GENERATION = "generation_config.json"

# Without a generation_config.json, transformers reads these keys from config.json. A new generation_config.json must
# hold them, because transformers then reads it alone.
GENERATION_KEYS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "max_length", "min_length", "do_sample", "num_beams", "early_stopping", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip

NAMED_TOKENS = frozenset(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_HOW_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_FETCH_HINT = "Fetch the tokenizer's files again."

# The names of files that belong to a tokenizer, in a directory that may hold others.
_TOKENIZERS = (
    "tokenizer*", SPECIAL_TOKENS, ADDED_TOKENS, "vocab*", "merges.txt", "*.model", "*.tiktoken", "chat_template*",
    "additional_chat_templates/*",
)  # fmt: skip

Files = Callable[[str], bytes | None]  # from a file's name to its content, None where there is no such file


def tokenizer_files(directory: Path) -> list[str]:
    """Return the files of a tokenizer in a directory, by their relative path."""
    found = {path for pattern in _TOKENIZERS for path in directory.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(directory).as_posix() for path in found)


def is_tokenizer_file(relative: str) -> bool:
    """Return whether a file of a checkpoint belongs to its tokenizer, by its relative path."""
    return any(fnmatch(relative, pattern) for pattern in _TOKENIZERS) and (
        "/" not in relative or "templates/" in relative
    )


def add_to_tokenizer(files: Files, tokens: Sequence[str]) -> tuple[list[int], dict[str, bytes]]:
    """Return the ids of the new special tokens, and the edited files.

    Raises PlanError without a tokenizer.json or if it has a token of that name, CheckpointError if it is damaged.
    """
    tokenizer = read_tokenizer(files, "the only form of tokenizer to which surgeon adds tokens")
    known = vocabulary(tokenizer)
    if taken := next((token for token in tokens if token in known), None):
        raise PlanError(
            f"the tokenizer has a token {taken} already, but config.json names no gist tokens",
            hint="Use the model without that token: surgeon cannot know what it was trained for.",
        )
    _check_complete(files, known)
    first = _next_id(tokenizer, known)
    ids = list(range(first, first + len(tokens)))
    new = dict(zip(tokens, ids, strict=True))
    entries = [{"id": i, "content": token, **_HOW_ADDED} for token, i in new.items()]
    tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or []), *entries]
    edited = {TOKENIZER: written(TOKENIZER, tokenizer)}
    edits = {TOKENIZER_CONFIG: _edit_config, SPECIAL_TOKENS: _edit_map, ADDED_TOKENS: _edit_added}
    for file, edit in edits.items():
        if (content := files(file)) is not None:
            edited[file] = written(file, edit(parsed(file, content), new))
    return ids, edited


def suppress(files: Files, ids: Sequence[int], config: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the generation_config.json with which a model never emits the tokens `ids`.

    Without such a file its keys are taken from `config`, which is config.json.
    """
    content = files(GENERATION)
    if content is None:
        generation = {key: config[key] for key in GENERATION_KEYS if config.get(key) is not None}
    else:
        generation = parsed(GENERATION, content)
    generation.pop("_from_model_config", None)  # with it, transformers 4 reads config.json in place of this file
    before = generation.get("suppress_tokens") or []
    if not isinstance(before, list):
        raise CheckpointError(
            f"{GENERATION} has suppress_tokens = {before!r}, not a list",
            hint="Remove the key, or fetch the file again.",
        )
    generation["suppress_tokens"] = [*before, *(i for i in ids if i not in before)]
    return {GENERATION: written(GENERATION, generation)}


def vocabulary_of(content: bytes) -> dict[str, int]:
    """Return the id of every token of the bytes of a tokenizer.json. Raises CheckpointError for a damaged one."""
    return vocabulary(parsed(TOKENIZER, content))


def read_tokenizer(files: Files, what: str) -> dict[str, Any]:
    """Return the content of tokenizer.json, its vocabulary checked. `what` needs it, in the words of an error.

    Raises PlanError without one, CheckpointError if it is damaged.
    """
    content = files(TOKENIZER)
    if content is None:
        raise PlanError(
            f"the model has no {TOKENIZER}, {what}",
            hint="transformers writes one: AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)",
        )
    tokenizer = parsed(TOKENIZER, content)
    vocabulary(tokenizer)
    return tokenizer


def added_tokens(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tokens that a tokenizer.json adds to the vocabulary of its model."""
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(item, dict) for item in added):
        raise CheckpointError(f"the added_tokens of {TOKENIZER} are no list of tokens", hint=_FETCH_HINT)
    return added


def vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of every token of a tokenizer.json, added tokens included."""
    known = model_vocabulary(tokenizer) | {item.get("content"): item.get("id") for item in added_tokens(tokenizer)}
    if not all(isinstance(token, str) and type(i) is int and i >= 0 for token, i in known.items()):
        raise CheckpointError(f"{TOKENIZER} has a token without a text or a number", hint=_FETCH_HINT)
    return known


def model_vocabulary(tokenizer: Mapping[str, Any]) -> dict[Any, Any]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        return dict(vocabulary)
    if isinstance(vocabulary, list) and all(isinstance(piece, list) and piece for piece in vocabulary):
        return {piece[0]: i for i, piece in enumerate(vocabulary)}  # Unigram: [text, score]
    raise CheckpointError(f"{TOKENIZER} has no vocabulary", hint=_FETCH_HINT)


def _check_complete(files: Files, known: Mapping[str, int]) -> None:
    """Raises PlanError if another file names a token that tokenizer.json lacks.

    transformers adds such a token when it loads the tokenizer, with the id that a new token would get.
    """
    content = files(TOKENIZER_CONFIG)
    config = {} if content is None else parsed(TOKENIZER_CONFIG, content)
    extra = config.get("extra_special_tokens") or []
    decoder = config.get("added_tokens_decoder")
    named = [value for key, value in config.items() if key in NAMED_TOKENS]
    named += list(extra.values() if isinstance(extra, dict) else extra)
    named += config.get("additional_special_tokens") or []
    named += list(decoder.values()) if isinstance(decoder, dict) else []
    texts = [item.get("content") if isinstance(item, dict) else item for item in named]
    if missing := next((text for text in texts if isinstance(text, str) and text not in known), None):
        raise PlanError(
            f"{TOKENIZER_CONFIG} names a token {missing!r} that {TOKENIZER} does not have",
            hint="transformers fixes it: AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)",
        )


def _next_id(tokenizer: Mapping[str, Any], known: Mapping[str, int]) -> int:
    """Return the id that the tokenizers library gives to the next token: it counts tokens, and looks at added ids.

    Raises PlanError if that is not the first free id: the ids have gaps, and a new token could land in one.
    """
    added = [item["id"] for item in tokenizer.get("added_tokens") or []]
    following = max(len(model_vocabulary(tokenizer)), max(added, default=-1) + 1)
    if following != max(known.values(), default=-1) + 1:
        raise PlanError(
            f"the tokenizer would number a new token {following}, but has ids up to {max(known.values())}",
            hint="Its ids have gaps; save it again with transformers, which names them but closes none.",
        )
    return following


def _edit_config(config: dict[str, Any], new: Mapping[str, int]) -> dict[str, Any]:
    """Return tokenizer_config.json with the tokens added, in the form of the version that wrote the file."""
    if isinstance(decoder := config.get("added_tokens_decoder"), dict):
        entries = {str(i): {"content": token, **_HOW_ADDED} for token, i in new.items()}
        config = {**config, "added_tokens_decoder": {**decoder, **entries}}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict) and extra:  # transformers from 4.46: by name
        return {**config, "extra_special_tokens": extra | {f"gist_token_{i}": token for token, i in new.items()}}
    if isinstance(extra, list) and extra:  # transformers 5
        return {**config, "extra_special_tokens": [*extra, *new]}
    return _edit_map(config, new)  # all versions read this key; version 5 writes its own when it saves


def _edit_map(config: dict[str, Any], new: Mapping[str, int]) -> dict[str, Any]:
    return {**config, "additional_special_tokens": [*(config.get("additional_special_tokens") or []), *new]}


def _edit_added(added: dict[str, Any], new: Mapping[str, int]) -> dict[str, Any]:
    return {**added, **new}


def parsed(file: str, content: bytes) -> dict[str, Any]:
    """Return the object that a file of JSON holds. Raises CheckpointError for anything else."""
    try:
        read = json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        raise CheckpointError(f"{file} is not JSON: {error}", hint=_FETCH_HINT) from error
    if not isinstance(read, dict):
        raise CheckpointError(f"{file} holds a {type(read).__name__}, not an object", hint=_FETCH_HINT)
    return read


def written(file: str, content: Mapping[str, Any]) -> bytes:
    """Return JSON as tokenizers and transformers write it. Raises CheckpointError for half a surrogate pair."""
    try:
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{file} holds half of a character: {error.reason}", hint=_FETCH_HINT) from error
