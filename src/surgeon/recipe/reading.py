"""A recipe as it is written: the settings and steps of a YAML file, each value with its line.

Values stay the text that was written, as if typed on the command line: 1e-4 and +2 reach a command unchanged. Only
true, false and null are more than text. There is no templating: `$name`, standing alone, is a setting; with a slice,
`$name[:90%]`, a part of the data that it names.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from surgeon.errors import RecipeError
from surgeon.mistyped import close_to, hint_beside

MOST_BYTES = 1_000_000  # of a recipe; PyYAML reads some 100 kB a second
MOST_ROUNDS = 1000
MOST_LETTERS = 100_000  # of a value: Linux takes 131,072 bytes in a word of a command
Form = Literal["text", "list", "true", "false", "null"]
_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,63}")  # of a step: a directory is named after it
_SETTING = re.compile(r"\$([A-Za-z_][\w-]*)(\[\d*%?:\d*%?\])?")  # with a slice, of data
_COMPARED = re.compile(r"\s*(<=|>=|==|<|>)\s*(\S+)\s*")
_TOP, _OF_STEP = ("settings", "steps"), ("name", "require")
_OF_LOOP = ("until", "at-most", "with", "steps")
FORM_HINT = "Its form is in docs/run.md; recipes/ has examples."


class Place(NamedTuple):
    """A line of a file, counted from 1; 0 where there are no lines: of an option."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    def error(self, message: str, *, hint: str = FORM_HINT) -> RecipeError:
        """Return an error that begins with this place."""
        return RecipeError(f"{self}: {message}", hint=hint)


@dataclass(frozen=True, slots=True)
class Value:
    """A value as written: a text, a list of texts, true, false or null; `word` is how one of these three is written."""

    form: Form
    items: tuple[str, ...]
    place: Place
    word: str = ""

    def __str__(self) -> str:
        return ", ".join(self.items) if self.form in ("text", "list") else self.form


@dataclass(frozen=True, slots=True)
class Condition:
    """What a figure has to be: `path` leads to it in a step's result, `sign` is <=, >=, ==, < or >."""

    path: tuple[str, ...]
    sign: str
    number: float
    place: Place

    def __str__(self) -> str:
        return f"{'.'.join(self.path)} {self.sign} {self.number:g}"

    def holds(self, figure: float) -> bool:
        """Return whether a figure fulfils it; NaN never does."""
        match self.sign:
            case "<=":
                return figure <= self.number
            case ">=":
                return figure >= self.number
            case "<":
                return figure < self.number
            case ">":
                return figure > self.number
        return figure == self.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command of a recipe, with its options by their names without dashes: "max-steps"."""

    name: str
    command: str
    options: Mapping[str, Value]
    require: tuple[Condition, ...]
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Steps that are repeated: until the conditions hold, `at_most` times; or once for each value in `settings`."""

    name: str
    steps: tuple[Step, ...]
    until: tuple[Condition, ...]
    at_most: int
    settings: Mapping[str, Value]
    place: Place


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe: its file, its settings, with those that the user has replaced, and its steps."""

    path: Path
    settings: Mapping[str, Value]
    steps: tuple[Step | Loop, ...]


def read_recipe(path: Path, commands: Collection[str], given: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a YAML file, with its settings replaced by those given as "name=value".

    Raises RecipeError, with the line, for a file that is no recipe of these `commands`.
    """
    root = _root(path)
    entries = dict(_entries(root, str(path), "a recipe", allowed=_TOP))
    settings: dict[str, Value] = {}
    if "settings" in entries:
        settings = {key: _value(node, str(path)) for key, node in _entries(entries["settings"], str(path), "settings")}
    settings |= _given(given, settings)
    for key, value in settings.items():
        if any(_SETTING.fullmatch(item) for item in value.items):
            raise value.place.error(f"the setting {key} is {value}; a setting names no other")
    if "steps" not in entries:
        raise Place(str(path), 1).error("a recipe has steps, and this one has none")
    steps = tuple(_steps(entries["steps"], str(path), commands, settings))
    return Recipe(path, settings, steps)


def read_options(path: Path, what: str, *, hint: str) -> dict[str, Value]:
    """Return the options in a YAML file that is `what`. Raises RecipeError, with the line, where it is none."""
    return {key: _value(node, str(path)) for key, node in _entries(_root(path, what, hint), str(path), what)}


def substituted(value: Value, settings: Mapping[str, Value]) -> Value:
    """Return a value with the settings in it put in their places. A list in a list becomes one list.

    Raises RecipeError for a setting that does not exist, or that has no value yet.
    """
    if value.form not in ("text", "list"):
        return value
    if value.form == "text":
        found = _setting(value.items[0], value.place, settings)
        return value if found is None else replace(found, place=value.place)
    items: list[str] = []
    for item in value.items:
        found = _setting(item, value.place, settings)
        if found is not None and found.form not in ("text", "list"):
            raise value.place.error(f"{item} is {found.form}, which has no place in a list")
        items += [item] if found is None else found.items
    return replace(value, items=tuple(items))


def _setting(item: str, place: Place, settings: Mapping[str, Value]) -> Value | None:
    named = _SETTING.fullmatch(item)
    if named is None:
        return None
    if named[1] not in settings:
        raise place.error(f"no setting is named {named[1]}{close_to(named[1], settings)}", hint="Add it to settings.")
    found = settings[named[1]]
    if found.form == "null":
        raise place.error(f"{named[1]} has no value", hint=f"Give one: --set {named[1]}=VALUE")
    return replace(found, items=tuple(f"{entry}{named[2]}" for entry in found.items)) if named[2] else found


def _given(given: Sequence[str], settings: Mapping[str, Value]) -> dict[str, Value]:
    """Return the settings in "name=value" texts. A value in [brackets] is a list."""
    found: dict[str, Value] = {}
    for text in given:
        name, equals, value = text.partition("=")
        where = Place(f"--set {name}", 0)
        if not equals:
            raise RecipeError(f"--set {text} is no name=value", hint="Such as --set model=gpt2-large.")
        if name not in settings:
            known = ", ".join(settings) or "none"
            raise RecipeError(
                f"--set {name}: the recipe has no such setting{close_to(name, settings)}", hint=f"It has: {known}."
            )
        found[name] = _value(_composed(value, str(where)), where.file) if value[:1] == "[" else plain(value, where)
    return found


def plain(text: str, place: Place) -> Value:
    """Return the value that a text is: true, false and null are more than text."""
    named: dict[str, Form] = {"true": "true", "false": "false", "null": "null"}
    return Value(named[text], (), place) if text in named else Value("text", (text,), place)


# --- steps --------------------------------------------------------------------------------------------------------


Settings = Mapping[str, Value]


def _steps(node: Any, file: str, commands: Collection[str], settings: Settings) -> Iterator[Step | Loop]:
    seen: dict[str, Place] = {}
    for item in _list(node, file, "steps"):
        step = _step(item, file, commands, settings)
        if step.name in seen:
            raise step.place.error(f"a step is named {step.name} already, in line {seen[step.name].line}")
        seen[step.name] = step.place
        yield step


def _step(node: Any, file: str, commands: Collection[str], settings: Settings) -> Step | Loop:
    place = _place(node, file)
    entries = dict(_entries(node, file, "a step"))
    name = _text(entries["name"], file) if "name" in entries else None
    if name is None:
        raise place.error("a step has a name, and this one has none", hint="Such as: name: cut")
    if not _NAME.fullmatch(name):
        raise place.error(f"{name!r} is no name of a step", hint="Letters, digits, - and _, up to 64 of them.")
    words = [key for key in entries if key not in _OF_STEP]
    for word in words:
        if word not in (*commands, "repeat"):
            known = [*commands, "repeat", *_OF_STEP]
            raise _place(entries[word], file).error(
                f"surgeon has no command {word}{close_to(word, known)}", hint="surgeon --help lists the commands."
            )
    if len(words) != 1:
        raise place.error(f"{name} has {len(words)} commands ({', '.join(words) or 'none'}); a step has one")
    word = words[0]
    if word == "repeat":
        if "require" in entries:
            raise place.error(f"{name} repeats steps; require goes to one of them")
        return _loop(entries[word], file, name, commands, settings)
    options = {key: _value(value, file) for key, value in _entries(entries[word], file, f"the options of {word}")}
    require = tuple(_conditions(entries["require"], file, settings)) if "require" in entries else ()
    return Step(name=name, command=word, options=options, require=require, place=place)


def _loop(node: Any, file: str, name: str, commands: Collection[str], known: Settings) -> Loop:
    place = _place(node, file)
    entries = dict(_entries(node, file, "repeat", allowed=_OF_LOOP))
    if "steps" not in entries:
        raise place.error(f"{name} repeats nothing: it has no steps")
    steps = list(_steps(entries["steps"], file, commands, known))
    for step in steps:
        if isinstance(step, Loop):
            raise step.place.error(f"{step.name} repeats inside {name}; steps are repeated on one level")
    settings: dict[str, Value] = {}
    if "with" in entries:
        settings = {key: _value(value, file) for key, value in _entries(entries["with"], file, "with")}
    until = tuple(_conditions(entries["until"], file, known)) if "until" in entries else ()
    if bool(settings) == bool(until):
        raise place.error(f"{name} repeats either with settings or until something holds", hint=FORM_HINT)
    if bool(until) != ("at-most" in entries):
        raise place.error(f"{name}: until and at-most go together")
    at_most = 1
    if until:
        text = _text(entries["at-most"], file)
        at_most = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
        if not 1 <= at_most <= MOST_ROUNDS:
            raise _place(entries["at-most"], file).error(f"at-most is {text}; it is from 1 to {MOST_ROUNDS}")
    return Loop(
        name=name,
        steps=tuple(step for step in steps if isinstance(step, Step)),
        until=until,
        at_most=at_most,
        settings=settings,
        place=place,
    )


def _conditions(node: Any, file: str, settings: Settings) -> Iterator[Condition]:
    """Yield conditions on figures, each written as "<= 1" or as a setting that holds such a text."""
    for key, value in _entries(node, file, "require"):
        place = _place(value, file)
        text = str(substituted(_value(value, file), settings))
        parts = _COMPARED.fullmatch(text)
        try:
            number = float(parts[2]) if parts else math.nan
        except ValueError:
            number = math.nan
        if parts is None or not math.isfinite(number):
            raise place.error(f"{text!r} is no condition on {key}", hint='Such as recovery: ">= 80"')
        yield Condition(tuple(key.split(".")), parts[1], number, place)


# --- YAML ---------------------------------------------------------------------------------------------------------


def _root(path: Path, what: str = "a recipe", hint: str = FORM_HINT) -> Any:
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        named = hint_beside(path, f"Name {what}: a file such as x.yaml")
        raise RecipeError(f"cannot read {path}: {error.strerror}", hint=named) from error
    if len(raw) > MOST_BYTES:
        raise RecipeError(f"{path} has over {MOST_BYTES // 10**6} MB, more than {what} has", hint=hint)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 at byte {error.start}", hint=f"Is it {what}?") from error
    return _composed(text, str(path), hint)


def _composed(text: str, file: str, hint: str = FORM_HINT) -> Any:
    """Return the node at the root of YAML text. Nothing is constructed from it: no tag can run code."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise RecipeError(f"{file} has an alias (*name)", hint="Use a setting: $name.")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Place(file, mark.line + 1 if mark else 1)
        raise where.error(f"no YAML: {error.problem or error.context}", hint=hint) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{file} is no YAML: {str(error).splitlines()[0]}", hint=hint) from error
    if node is None:
        raise RecipeError(f"{file} is empty", hint=hint)
    return node


def _place(node: Any, file: str) -> Place:
    return Place(file, node.start_mark.line + 1)


def _entries(node: Any, file: str, what: str, *, allowed: Collection[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the keys and nodes of a mapping; null is an empty one. Raises RecipeError for a key that is there twice."""
    if node.id == "scalar" and _form(node) == "null":
        return
    if node.id != "mapping":
        raise _place(node, file).error(f"{what} is no mapping of names to values")
    seen: set[str] = set()
    for key_node, value in node.value:
        key = _text(key_node, file)
        if key in seen:
            raise _place(key_node, file).error(f"{key} is there twice")
        if allowed is not None and key not in allowed:
            raise _place(key_node, file).error(
                f"{what} has no {key}{close_to(key, allowed)}", hint=f"It has: {', '.join(allowed)}."
            )
        seen.add(key)
        yield key, value


def _list(node: Any, file: str, what: str) -> list[Any]:
    if node.id != "sequence" or not node.value:
        raise _place(node, file).error(f"{what} is no list, or an empty one")
    return list(node.value)


def _text(node: Any, file: str) -> str:
    if node.id != "scalar":
        raise _place(node, file).error("a text belongs here, not a list or a mapping")
    if "\0" in node.value or len(node.value.encode()) > MOST_LETTERS:
        raise _place(node, file).error("a text that no command line takes", hint="Put it into a file, and name that.")
    return str(node.value)


def _value(node: Any, file: str) -> Value:
    place = _place(node, file)
    if node.id == "sequence":
        return Value("list", tuple(_text(item, file) for item in node.value), place)
    if node.id != "scalar":
        raise place.error("a value is a text, a number, true, false or a list, not a mapping")
    form = _form(node)
    return Value(form, (_text(node, file),) if form == "text" else (), place, "" if form == "text" else node.value)


def _form(node: Any) -> Form:
    if node.tag.endswith(":null"):
        return "null"
    if node.tag.endswith(":bool"):
        return "true" if node.value.lower() in ("true", "yes", "on") else "false"
    return "text"
