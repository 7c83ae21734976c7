"""Chats as people write them: messages by role and content or by from and value, content in parts, tools."""

import json
from collections.abc import Mapping
from typing import Any

from surgeon.errors import DataError

# The speakers of ShareGPT and of what was made after it, as chat templates know them.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
HINT = 'Write it so: [{"role": "user", "content": "..."}, ...]'
_JSON_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def kind_of(value: object) -> str:
    """Return the name of a value's type in JSON."""
    return _JSON_NAMES.get(type(value), type(value).__name__)


def checked_text(value: object, what: str, *, hint: str | None = None) -> str:
    """Return the value. Raises DataError when it is no string, or one that UTF-8 cannot hold."""
    if not isinstance(value, str):
        raise DataError(f"{what} is {kind_of(value)}, not a string", hint=hint)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write one: "\ud800"
        half = f"{ord(value[error.start]):04x}"
        raise DataError(
            f"{what} is not text: its character {error.start} is half a surrogate pair, \\u{half}",
            hint="Write the character itself, or both halves of its pair.",
        ) from error
    return value


def without_nulls(value: Any) -> Any:
    """Return a value without the keys of its objects that are null; nulls in lists stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def parsed_list(value: object, what: str) -> list[Any]:
    """Return a list, or the one that a text holds as JSON, as in a column of a .csv. Raises DataError for no list."""
    parsed = _parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if not isinstance(parsed, list):
        raise DataError(f"{what} is {kind_of(parsed)}, not a list", hint=HINT)
    if not parsed:
        raise DataError(f"{what} is an empty list", hint=HINT)
    return parsed


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def chat_of(value: object, what: str) -> tuple[Mapping[str, Any], ...]:
    """Return the messages of a chat, each with its role and its content as one text, without the keys that are null.

    Raises DataError for anything else, naming the message.
    """
    return tuple(_message(message, f"{what}[{number}]") for number, message in enumerate(parsed_list(value, what)))


def _message(message: object, what: str) -> Mapping[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"{what} is {kind_of(message)}, not an object", hint=HINT)
    by_speaker = "role" not in message and {"from", "value"} <= message.keys()
    speaker, said = ("from", "value") if by_speaker else ("role", "content")
    calls = bool(message.get("tool_calls"))
    for key in (speaker, said):
        if key not in message and not (calls and key == said):
            keys = ", ".join(map(repr, message)) or "nothing"
            raise DataError(f"{what} has no {key!r}, only {keys}", hint=HINT)
    role = checked_text(message[speaker], f"{what}: {speaker!r}", hint=HINT)
    if by_speaker:
        if role not in SPEAKERS:
            raise DataError(f"{what} is from {role!r}", hint=f"Known are {', '.join(SPEAKERS)}.")
        role = SPEAKERS[role]
    content = _content(message.get(said), f"{what}: {said!r}", calls=calls)
    rest = {key: item for key, item in message.items() if item is not None and key not in (speaker, said)}
    return {"role": role, "content": content, **rest}


def _content(value: object, what: str, *, calls: bool) -> str:
    """Return what a message says as one text: parts joined as they are; nothing beside calls of tools may be null."""
    if value is None and calls:
        return ""
    if not isinstance(value, list):
        return checked_text(value, what, hint=HINT)
    texts = []
    for number, part in enumerate(value):
        here = f"{what}[{number}]"
        if not isinstance(part, Mapping):
            raise DataError(f"{here} is {kind_of(part)}, not an object", hint='Write it so: {"type": "text", ...}')
        if (kind := part.get("type")) != "text":
            hint = "surgeon reads text alone: take the record out, or write the part as text."
            raise DataError(f"{here} is a part of type {kind!r}, not a text", hint=hint)
        texts.append(checked_text(part.get("text"), f"{here}: 'text'", hint=HINT))
    return "".join(texts)


def tools_of(value: object, what: str) -> tuple[Mapping[str, Any], ...]:
    """Return the descriptions of tools, which a record holds as a list, as JSON, or as a list of JSON texts.

    Raises DataError for anything else.
    """
    hint = 'Write it so: [{"type": "function", "function": {"name": "...", ...}}, ...]'
    items = _parsed(value) if isinstance(value, str) else value
    if items is None:
        return ()
    if not isinstance(items, list):
        raise DataError(f"{what} is {kind_of(items)}, not a list", hint=hint)
    tools: list[Any] = [_parsed(item) if isinstance(item, str) else item for item in items]
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise DataError(f"{what}[{number}] is {kind_of(tool)}, not an object", hint=hint)
    return tuple(tools)
