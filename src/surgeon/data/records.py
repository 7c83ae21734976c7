"""Records: the one place that decides the form of a record, the columns that it is read from, and its document."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from surgeon.data.chats import chat_of, checked_text, kind_of, parsed_list, tools_of, without_nulls
from surgeon.errors import DataError
from surgeon.options import OptionError

# A record is read in the first of these forms whose fields it has; a field in brackets may be absent, null or "".
# Forms with an answer come before a text: a `text` beside them holds prompt and answer once more, as in Alpaca.
FORMS = (
    ("messages", "[tools]", "[system]"),
    ("conversations", "[tools]", "[system]"),
    ("prompt", "completion", "[tools]"),
    ("prompt", "response"),
    ("instruction", "[input]", "output"),
    ("instruction", "[context]", "response"),
    ("question", "answer"),
    ("query", "answer"),
    ("query", "response"),
    ("text", "[label]"),
)
CHOICES = ("question", "choices", "answer")  # the form of `evaluate --metric choice` alone
CHATS = ("messages", "conversations")
FORMS_HINT = (
    "A record has text; or messages, or conversations; or prompt and completion or response; or instruction and output "
    "or response; or question or query, and answer. --columns prompt=NAME,completion=NAME reads other columns."
)
ANSWER_HINT = (
    "A record has prompt and completion; or instruction and output; or question and answer; "
    "or messages that end with the assistant's."
)
SYSTEM = "the system turn"
MOST_NAMED = 8  # columns in one note


@dataclass(frozen=True, slots=True)
class Document:
    """One text in its parts, which newlines join, or one chat; `where` is the file and line it was read from.

    Of a chat the first `given` messages are a prompt, in which no answer is trained; `tools` are descriptions of
    functions, for the chat template. `label` is the class of a text, for a classifier; None where the record has none.
    `record` is what it was read from, with all that a .jsonl, .json or .csv holds, of a parquet file or a dataset the
    columns that are read; None for a text file. `answer` leads to the answer in it, key by key; `form` is how it was
    read.
    """

    where: str
    parts: tuple[str, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    label: str | int | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    given: int = 0
    record: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    answer: tuple[str | int, ...] = field(default=(), repr=False, compare=False)
    form: "Form | None" = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Form:
    """The columns that hold the fields of a record, in the order in which they are read, and those that are not read.

    `optional` are the fields that may be absent, null or "".
    """

    fields: Mapping[str, str]
    optional: frozenset[str]
    unread: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return list(self.fields.values())

    def document(self, record: Mapping[str, Any], where: str, *, padded: bool = False) -> Document:
        """Return the document in a record. Raises DataError for a field that is not what it must be.

        `padded`: the record comes from a table, which gives every object in it every key of any other, as null.
        """
        if padded:
            record = {name: without_nulls(value) for name, value in record.items()}
        values = {name: record[column] for name, column in self.fields.items() if column in record}
        values = {name: value for name, value in values.items() if name not in self.optional or value not in (None, "")}
        if chat := next((name for name in CHATS if name in values), None):
            return self._chat(record, values, chat, where)
        if isinstance(values.get("prompt"), list) and "completion" in values:
            return self._chat_in_two(record, values, where)
        label = values.pop("label", None)
        if "tools" in values:
            names = ",".join(f"{name}={column}" for name, column in self.fields.items() if name != "tools")
            hint = f"Write it as messages; or leave them out: --columns {names}"
            raise DataError(f"{where} has {self.fields['tools']!r}, which only a chat can have", hint=hint)
        hint = f"The record's keys are {', '.join(map(repr, record))}."
        parts = tuple(
            checked_text(value, f"{where}: {self.fields[name]!r}", hint=hint) for name, value in values.items()
        )
        last = self.fields[list(values)[-1]] if len(parts) > 1 else ""
        return Document(
            where,
            parts,
            label=label if type(label) in (int, str) else None,
            record=record,
            answer=(last,) if last else (),
            form=self,
        )

    def _chat(self, record: Mapping[str, Any], values: Mapping[str, Any], chat: str, where: str) -> Document:
        """Return a chat, with the system turn that a column of its own gives it."""
        column = self.fields[chat]
        what = f"{where}: {column!r}"
        given = parsed_list(values[chat], what)
        messages = chat_of(given, what)
        if "system" in values:
            name = self.fields["system"]
            system = {"role": "system", "content": checked_text(values["system"], f"{where}: {name!r}")}
            if messages[0]["role"] != "system":
                messages = (system, *messages)
            elif messages[0]["content"].strip() != system["content"].strip():
                hint = f"Leave one out: --columns {chat}={column} reads the chat's own."
                raise DataError(f"{where} has two system turns: in {column!r} and in {name!r}", hint=hint)
        return Document(
            where,
            messages=messages,
            tools=tools_of(values.get("tools"), f"{where}: {self.fields.get('tools')!r}"),
            record={**record, column: given},
            answer=(column, -1, "content" if "role" in given[-1] else "value"),
            form=self,
        )

    def _chat_in_two(self, record: Mapping[str, Any], values: Mapping[str, Any], where: str) -> Document:
        """Return the chat of a prompt and a completion that are lists of messages, as TRL has them."""
        prompt, completion = (self.fields[name] for name in ("prompt", "completion"))
        asked = chat_of(values["prompt"], f"{where}: {prompt!r}")
        answer = chat_of(values["completion"], f"{where}: {completion!r}")
        return Document(
            where,
            messages=asked + answer,
            tools=tools_of(values.get("tools"), f"{where}: {self.fields.get('tools')!r}"),
            given=len(asked),
            record=record,
            answer=(completion, -1, "content" if "role" in values["completion"][-1] else "value"),
            form=self,
        )

    def __str__(self) -> str:
        return ", ".join(map(repr, self.columns))


Columns = Mapping[str, str]  # the column of each field, where the user has chosen them


def chosen_columns(written: str | None, *, forms: Iterable[tuple[str, ...]] = (*FORMS, CHOICES)) -> Columns | None:
    """Return the columns in "prompt=question,completion=answer", by the fields that they are read as; None for None.

    Raises OptionError for a text that is no such list, or whose fields make no form.
    """
    if written is None:
        return None
    pairs = [pair.partition("=") for pair in written.split(",")]
    columns = {name.strip(): column.strip() for name, _, column in pairs}
    if len(columns) < len(pairs) or not all(name and column for name, column in columns.items()):
        raise OptionError(
            "columns", f"--columns {written!r} is no list of FIELD=COLUMN, such as prompt=question,completion=answer"
        )
    forms = list(forms)
    known = list(dict.fromkeys(name.strip("[]") for form in forms for name in form))
    if unknown := next((name for name in columns if name not in known), None):
        near = get_close_matches(unknown, known, 1)
        said = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(known)}"
        raise OptionError("columns", f"--columns has no field {unknown!r}; {said}")
    if not any(_is_form(form, columns) for form in forms):
        fields = [f"{', '.join(form)}" for form in forms if set(columns) & {name.strip("[]") for name in form}]
        raise OptionError("columns", f"--columns {written}: a record has {'; or '.join(fields)}")
    return columns


def _is_form(form: tuple[str, ...], names: Iterable[str]) -> bool:
    """Return whether fields with these names, and no other, make a form."""
    required = {name for name in form if not name.startswith("[")}
    return required <= set(names) <= {name.strip("[]") for name in form}


def form_of(names: Iterable[str], where: str, columns: Columns | None = None) -> Form:
    """Return the form of a record with these columns; with `columns` the one that the user has chosen.

    Raises DataError when it has no form, or lacks a chosen column.
    """
    names = list(names)
    if columns is None:
        found = next((form for form in FORMS if all(name in names for name in form if not name.startswith("["))), None)
        if found is None:
            keys = f"only {', '.join(map(repr, names))}" if names else "no keys at all"
            raise DataError(f"{where} has no text, {keys}", hint=FORMS_HINT)
        fields = {name.strip("[]"): name.strip("[]") for name in found if name.strip("[]") in names}
    else:
        found = next(form for form in (*FORMS, CHOICES) if _is_form(form, columns))
        check_columns(columns.values(), names, where)
        fields = {bare: columns[bare] for bare in (name.strip("[]") for name in found) if bare in columns}
    optional = frozenset(name.strip("[]") for name in found if name.startswith("["))
    return Form(fields, optional, tuple(name for name in names if name not in fields.values()))


def check_columns(columns: Iterable[str], names: Iterable[str], where: str) -> None:
    """Raises DataError, with the nearest name that there is, where a record or a file lacks one of some columns."""
    names = list(names)
    for column in columns:
        if column not in names:
            near = get_close_matches(column, names, 1)
            has = f"It has {', '.join(map(repr, names[:MOST_NAMED]))}." if names else "It has no columns."
            hint = f"Did you mean {near[0]!r}? {has}" if near else has
            raise DataError(f"{where} has no column {column!r}, which --columns names", hint=hint)


Write = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], str]  # of messages and tools


class Forms:
    """The forms of records that come one after another, each decided once for the same columns.

    `names` are the columns of a table, where it has the same for all records; else a record's keys are. A column that
    the user has chosen must be in the first record; of the later ones it may be absent where its field may.
    """

    def __init__(self, columns: Columns | None, names: Iterable[str] | None = None) -> None:
        self._columns = columns
        self._names = None if names is None else tuple(names)
        self._known: dict[tuple[str, ...], Form] = {}
        self._first: Form | None = None

    def of(self, record: object, where: str) -> Form:
        """Return the form of a record. Raises DataError for one that is no object, or has no form."""
        if not isinstance(record, Mapping):
            raise DataError(f"{where} is {kind_of(record)}, not an object", hint=FORMS_HINT)
        names = tuple(record) if self._names is None else self._names
        if names not in self._known:
            self._known[names] = self._decided(names, where)
        return self._known[names]

    def _decided(self, names: tuple[str, ...], where: str) -> Form:
        columns = self._columns
        if columns is not None and self._first is not None:
            columns = {
                name: column for name, column in columns.items() if column in names or name not in self._first.optional
            }
        form = form_of(names, where, columns)
        self._first = self._first or form
        return form


class Unread:
    """What of some documents is not read: columns, and what of chats the chat template does not write."""

    def __init__(self) -> None:
        self._columns: dict[tuple[str, str], dict[str, None]] = {}  # by the data and the form, in order
        self._chats: dict[str, dict[str, Document]] = {}  # by the data, the first chat with each key

    def look(self, data: str, document: Document) -> None:
        """Remember a document of a data argument."""
        if document.form is not None and document.form.unread:
            self._columns.setdefault((data, str(document.form)), {}).update(dict.fromkeys(document.form.unread))
        if document.messages:
            first = self._chats.setdefault(data, {})
            for message in document.messages:
                if message["role"] == "system":
                    first.setdefault(SYSTEM, document)
                if len(message) > 2:
                    for key in [key for key in message if key not in ("role", "content") and message[key] != ""]:
                        first.setdefault(key, document)
            if document.tools:
                first.setdefault("tools", document)

    def notes(self, write: Write | None) -> list[str]:
        """Return sentences for the user: of each data argument what is read, and what is not.

        `write` returns a chat as the template writes it, and raises DataError where that refuses it. What makes no
        difference to the text is not written.
        """
        notes = []
        for (data, form), unread in self._columns.items():
            names = ", ".join(map(repr, list(unread)[:MOST_NAMED]))
            more = f" and {len(unread) - MOST_NAMED} more" if len(unread) > MOST_NAMED else ""
            notes.append(f"{data}: read as {form}; not read: {names}{more} (--columns chooses)")
        if write is None:
            return notes
        for data, first in self._chats.items():
            if lost := [key for key, document in first.items() if not _is_written(document, key, write)]:
                names = ", ".join(key if key == SYSTEM else repr(key) for key in lost)
                notes.append(f"{data}: the chat template does not write {names}")
        return notes


def _is_written(document: Document, key: str, write: Write) -> bool:
    """Return whether a template's text of a chat is another one without this key, or without its system turn."""
    if key == SYSTEM:
        without: list[Mapping[str, Any]] = [
            {**each, "content": f"{each['content']}{SYSTEM}"} if each["role"] == "system" else each
            for each in document.messages
        ]
    else:
        without = [{name: value for name, value in each.items() if name != key} for each in document.messages]
    try:
        whole = write(document.messages, document.tools)
        return whole != write(without, () if key == "tools" else document.tools)
    except DataError:  # it looks at what is missing
        return True
