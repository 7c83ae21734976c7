"""Records and their text: the fields that are read, their order and their types."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgeon.errors import DataError

# A record is read in the first of these forms whose fields it has; a field in brackets may be absent, null or "".
FORMS = (
    ("text", "[label]"),
    ("messages",),
    ("prompt", "completion"),
    ("instruction", "[input]", "output"),
    ("question", "answer"),
)
FORMS_HINT = (
    "A record has text; or messages; or prompt and completion; or instruction and output; or question and answer."
)
_JSON_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True, slots=True)
class Document:
    """One text in its parts, which newlines join, or one chat; `where` is the file and line it was read from.

    `label` is the class of a text, for a classifier; None where the record has none. `record` is what it was read from,
    with all that a .jsonl or .json holds, of a parquet file or a dataset on the Hub the columns with the text; None for
    a text file.
    """

    where: str
    parts: tuple[str, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    label: str | int | None = None
    record: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)


def document(record: object, where: str) -> Document:
    """Return the document in a record.

    Raises DataError when it is no object, has none of the forms, or has a field that is no string.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where} is {_kind(record)}, not an object", hint=FORMS_HINT)
    fields = fields_of(record, where)
    if fields == ["messages"]:
        return Document(where, messages=_messages(record["messages"], where), record=record)
    label = record["label"] if "label" in fields else None
    fields = [name for name in fields if name != "label"]
    optional = {name.strip("[]") for form in FORMS for name in form if name.startswith("[")}
    present = [name for name in fields if name not in optional or record[name] not in (None, "")]
    hint = f"The record's keys are {', '.join(map(repr, record))}."
    parts = tuple(checked_text(record[name], f"{where}: {name!r}", hint=hint) for name in present)
    return Document(where, parts, label=label if type(label) in (int, str) else None, record=record)


def fields_of(names: Iterable[str], where: str) -> list[str]:
    """Return the fields that are read of a record with these names. Raises DataError when it has no form."""
    names = list(names)
    for form in FORMS:
        if all(name in names for name in form if not name.startswith("[")):
            return [name for name in (name.strip("[]") for name in form) if name in names]
    keys = f"only {', '.join(map(repr, names))}" if names else "no keys at all"
    raise DataError(f"{where} has no text, {keys}", hint=FORMS_HINT)


def checked_text(value: object, what: str, *, hint: str | None = None) -> str:
    """Return the value. Raises DataError when it is no string, or one that UTF-8 cannot hold."""
    if not isinstance(value, str):
        raise DataError(f"{what} is {_kind(value)}, not a string", hint=hint)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write one: "\ud800"
        half = f"{ord(value[error.start]):04x}"
        raise DataError(
            f"{what} is not text: its character {error.start} is half a surrogate pair, \\u{half}",
            hint="Write the character itself, or both halves of its pair.",
        ) from error
    return value


def _messages(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """Return a chat, without the keys that are null: a column of a parquet file has every key in every message."""
    what, hint = f"{where}: 'messages'", 'Write it so: [{"role": "user", "content": "..."}, ...]'
    if not isinstance(value, list):
        raise DataError(f"{what} is {_kind(value)}, not a list", hint=hint)
    if not value:
        raise DataError(f"{what} is an empty list", hint=hint)
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise DataError(f"{what}[{number}] is {_kind(message)}, not an object", hint=hint)
        for key in ("role", "content"):
            if key not in message:
                keys = ", ".join(map(repr, message)) or "nothing"
                raise DataError(f"{what}[{number}] has no {key!r}, only {keys}", hint=hint)
            checked_text(message[key], f"{what}[{number}]: {key!r}", hint=hint)
    return tuple({key: item for key, item in message.items() if item is not None} for message in value)


def _kind(value: object) -> str:
    """Return the name of a value's type in JSON."""
    return _JSON_NAMES.get(type(value), type(value).__name__)


ANSWER_HINT = (
    "A record has prompt and completion; or instruction and output; or question and answer; "
    "or messages that end with the assistant's."
)
