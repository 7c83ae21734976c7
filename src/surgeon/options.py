"""The declarations of a verb: its options, and facts about all its steps.

Options are one frozen dataclass, whose fields are the command's options and the Python call's keywords.

    @dataclass(frozen=True, kw_only=True)
    class TruncateOptions:
        layers: int | str = option("Layers of the result: 12, or 50% of the source's.", metavar="N")
        seed: int = option("Seed of every random draw.", 0)

    @takes(TruncateOptions)
    def truncate(model: str, options: TruncateOptions) -> Surgery: ...

    truncate("gpt2", layers=6)          # the Python call
    surgeon truncate gpt2 --layers 6    # the command, by `surgeon.cli.command.spread`

So a default, a help text and a check stand once. `VERB` in the same file says what all steps of the verb have in
common, so that nobody else lists the verbs.
"""

import inspect
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec
from types import UnionType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, Union, get_args, get_origin, overload

from surgeon.errors import PlanError
from surgeon.mistyped import close_to
from surgeon.progress import watched
from surgeon.text import parse_size

A = TypeVar("A")  # A to D: the arguments of a verb before its options
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
Options = TypeVar("Options", covariant=True)
Result = TypeVar("Result")
Keywords = ParamSpec("Keywords")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """Facts about all steps of a verb.

    `keeps_function`: the result computes what its source computes, unless the plan names a reason (`Plan.approximate`).
    `counts_layers`: its results are named by their depth.
    `plans` is the function that returns its surgery, "" where there is none; of a surgery that is not written yet it
    continues that, unless the verb `begins`: by its scores, or without a model. `then` is the command that its results
    are made for, with {output}, {source} (what it was made of) and {data} (what it was scored on, else a placeholder).
    `relation` is what a result is to its base model, in a word of the Hub; of a verb that `ends` no surgery continues
    what is not written yet.
    """

    keeps_function: bool = False
    counts_layers: bool = False
    plans: str = ""
    begins: bool = False
    then: str = "inspect {output}"
    relation: str = ""
    ends: bool = False


def verb_named(name: str) -> Verb:
    """Return the facts that a verb declares; for a name that no verb has, the defaults, which promise nothing."""
    home = f"surgeon.verbs.{name}"
    if not name.isidentifier() or find_spec(home) is None:
        return Verb()
    return getattr(import_module(home), "VERB", Verb())


class OptionError(PlanError):
    """An option has a value that it cannot have, alone or beside another: a usage error of the command line.

    `option` is the field's name, "" where no single one is at fault; a message that does not name it begins with it.
    """

    def __init__(self, option: str, message: str, *, hint: str | None = None) -> None:
        is_named = not option or flag_of(option) in message or option.upper() in message
        super().__init__(message if is_named else f"{flag_of(option)}: {message}", hint=hint)
        self.option = option


FEW = 8  # words of twice as many that a hint names


@dataclass(frozen=True, slots=True)
class Words:
    """The words that a value can be: what is checked, completed, listed in --help and in the schema of recipes.

    `known` are they, or a function that returns them where finding them takes time. `aliases` are other spellings of
    them. A value that matches `others` passes too. With `many` a value is any number of them, with commas between.
    `refused` are words that one may well expect, each with the reason why it is none.
    """

    known: Sequence[str] | Callable[[], Sequence[str]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    others: str = ""
    many: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def listed(self) -> Sequence[str]:
        """The words."""
        return self.known() if callable(self.known) else self.known

    @property
    def is_complete(self) -> bool:
        """Whether the words are known at once, and no other value passes."""
        return not callable(self.known) and not self.others and not self.many

    def spelled(self, option: str, value: str, *, label: str = "") -> str:
        """Return a value in its own spelling. Raises OptionError, with what may have been meant, for another one."""
        if self.many:
            one = replace(self, many=False)
            return ",".join(one.spelled(option, word, label=label) for word in words(value))
        word = self.aliases.get(value, value)
        if word in self.listed or (self.others and re.fullmatch(self.others, word)):
            return word
        label = label or flag_of(option)
        shown = self.listed if len(self.listed) < 2 * FEW else [*self.listed[:FEW], "..."]
        hint = f"One of: {', '.join(shown)}."
        if value in self.refused:
            raise OptionError(option, f"{label} {value}: {self.refused[value]}", hint=hint)
        close = close_to(value, [*self.listed, *self.aliases])
        raise OptionError(option, f"unknown {label} {value!r}{close}", hint=hint)


DTYPES = Words(
    ("keep", "float32", "bfloat16", "float16"),
    aliases={"fp32": "float32", "f32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16"}
    | {"f16": "float16", "half": "float16"},
)
DEVICES = Words(("auto", "cpu", "cuda", "mps"), others=r"(cuda|cpu|mps):\d+")
# The groups of options in --help and in the docs, in their order. Each option names one of them.
GROUPS = (
    *("source", "what is kept", "how much goes", "by which scores", "search", "compensation", "depth", "width"),
    *("experts", "vocabulary", "learning", "config", "merging", "regression", "codes"),
    *("text", "prompt"),
    *("data", "lines", "what is measured", "answers", "sampling", "length and rate", "what is trained"),
    *("distillation", "gists", "numbers", "steps", "what is shown", "picture", "output", "run"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """How a field appears on the command line.

    `help` is the sentence that --help shows, `metavar` the placeholder of the value. `names` replace the flag that is
    made of the field's name. `parse` makes the field's value from the text that was typed; it raises ValueError with
    the reason. A field that is not `on_command_line` exists in Python alone. `at_resume` marks an option that a resumed
    run may change, because it decides no number of the result. `reads` marks an option that names what is read: files,
    directories, or names on the Hub, none of which may lie in what the command replaces. `writes` marks the name of a
    file or directory that is written. `group` is one of `GROUPS`. `choices` are the words that the value can be. What
    `is_argument` has no flag: its place among the words says what it is.
    """

    help: str
    metavar: str | None = None
    names: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    on_command_line: bool = True
    at_resume: bool = False
    reads: bool = False
    writes: bool = False
    group: str = ""
    choices: Words | None = None
    is_argument: bool = False


def option(help: str, default: Any = MISSING, *, choices: Any = None, **flag: Any) -> Any:  # noqa: A002  (its help)
    """Return a field of an options dataclass; `flag` are the other attributes of `Flag`.

    `choices` are `Words`, or what they are made of: a list of words, or a function that returns one.
    """
    known = choices if choices is None or isinstance(choices, Words) else Words(choices)
    return field(default=default, metadata={"flag": Flag(help=help, choices=known, **flag)})


class Checked:
    """A base of dataclasses of options: a value that is none of its option's words is refused.

    What is another spelling of one becomes it. So the command line, the Python call, recipes and a run that is resumed
    all take and refuse the same.
    """

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]  # it is a base of dataclasses
            flag, value = item.metadata["flag"], getattr(self, item.name)
            if flag.choices is None or value is None or value == item.default:
                continue
            spelled = partial(flag.choices.spelled, item.name, label=label_of(item))
            if isinstance(value, str):
                object.__setattr__(self, item.name, spelled(value))
            elif isinstance(value, list | tuple):
                object.__setattr__(self, item.name, tuple(map(spelled, value)))
            else:
                spelled(str(value))


def label_of(item: "Field[Any]") -> str:
    """Return the name of a field as a user types it: "--layers", or the placeholder of an argument."""
    flag: Flag = item.metadata["flag"]
    return str(flag.metavar) if flag.is_argument else flag.names[0] if flag.names else flag_of(item.name)


def in_python(help: str, default: Any = None) -> Any:  # noqa: A002
    """Return a field that only the Python call has: a progress meter, a callback."""
    return option(help, default, on_command_line=False)


def progress_option() -> Any:
    """Return the field `progress`, which `takes` hands to the work of the call."""
    return in_python(
        "What watches the call: an object with begin(what, total, unit), False for silence, True for bars. "
        "Default: bars on a terminal and in a notebook."
    )


def seed_option() -> Any:
    """Return the field `seed`."""
    return option("Seed of every random draw; the same seed gives the same result.", 0, metavar="N", group="run")


def check_seed(seed: int) -> None:
    """Raises OptionError for a seed that a random generator of NumPy, transformers or torch would refuse."""
    if not 0 <= seed < 2**32:
        raise OptionError("seed", f"--seed is {seed}; it lies between 0 and {2**32 - 1}", hint="Such as --seed 1.")


def check_counts(options: Any, *names: str, least: int = 1) -> None:
    """Raises OptionError for an option that is no number, or below `least`; None is a default."""
    for name in names:
        count, flag = getattr(options, name), flag_of(name)
        if isinstance(count, str):
            raise OptionError(name, f"{flag} is {count!r}, no whole number", hint=f"Such as {flag} {least + 1}.")
        if count is not None and count < least:
            raise OptionError(name, f"{flag} is {count}; the least is {least}", hint=f"Set {flag} to {least} or more.")


def output_option(help: str, metavar: str = "DIR", **flag: Any) -> Any:  # noqa: A002  (it is the option's help)
    """Return the field `output`: --output, or -o; `flag` are the other attributes of `Flag`."""
    return option(help, None, names=("--output", "-o"), metavar=metavar, writes=True, group="output", **flag)


def overwrite_option(help: str = "Replace an existing output once the new one is complete.") -> Any:  # noqa: A002
    """Return the field `overwrite`."""
    return option(help, False, group="output")


def revision_option() -> Any:
    """Return the field `revision`."""
    said = "Branch, tag or commit of a Hub model. Default: its main branch."
    return option(said, None, metavar="REVISION", group="run")


def device_option(default: str = "auto") -> Any:
    """Return the field `device`."""
    said = "Device to compute on: auto (CUDA, then MPS, then the CPU), cpu, cuda, mps, cuda:1."
    return option(said, default, metavar="DEVICE", choices=DEVICES, group="run")


def dtype_option() -> Any:
    """Return the field `dtype`: of the result's numbers."""
    said = "Dtype of the result: keep (the source's), float32, bfloat16 (or bf16), float16 (or fp16)."
    return option(said, "keep", metavar="DTYPE", choices=DTYPES, group="output")


def shard_option() -> Any:
    """Return the field `max_shard_size`."""
    return option("Largest weight file: 5GB, 500MB.", "5GB", metavar="SIZE", group="output")


def size_in_bytes(size: int | str, option: str = "max_shard_size") -> int:
    """Return a number of bytes: `size` itself, or "5GB", "500MB", "2GiB". Raises OptionError for anything else."""
    result = parse_size(str(size))
    if result is None:
        hint = "Write 5GB, 500MB or a number of bytes."
        raise OptionError(option, f"cannot read {size!r} as a size", hint=hint)
    return result


def trust_option() -> Any:
    """Return the field `trust_remote_code`."""
    said = "Run the code that the checkpoint brings along (auto_map). Read that code first."
    return option(said, False, group="run")


def columns_option(group: str = "data") -> Any:
    """Return the field `columns`."""
    return option(
        "Columns that records are read from: prompt=question,completion=answer. Default: by their names.",
        None,
        metavar="FIELD=COLUMN",
        group=group,
    )


def adapter_option() -> Any:
    """Return the field `adapter`."""
    return option(
        "Adapters trained with a frozen reader: they are on while the gist is made, off while it is read.",
        None,
        metavar="DIR",
        reads=True,
        group="gists",
    )


def same_option(options: Any, name: str, *, default: Any = MISSING) -> Any:
    """Return a field like the field `name` of another dataclass of options: the same help, flag and default."""
    item = next(item for item in fields(options) if item.name == name)
    return field(default=item.default if default is MISSING else default, metadata=item.metadata)


def keywords_of(options: Any) -> dict[str, Any]:
    """Return the fields of a dataclass of options as keywords."""
    return {item.name: getattr(options, item.name) for item in fields(options)}


Reads = Mapping[str, tuple[str, ...]]  # what a command reads, by the option that names it


def reads_of(options: Any) -> dict[str, tuple[str, ...]]:
    """Return what the options name to be read, by their flags: files, directories and names on the Hub."""
    found: dict[str, tuple[str, ...]] = {}
    for item in fields(options):
        value = getattr(options, item.name)
        if item.metadata["flag"].reads and value:
            values = value if isinstance(value, tuple | list) else (value,)
            found[flag_of(item.name)] = tuple(os.fspath(one) for one in values)
    return found


def flag_of(name: str) -> str:
    """Return the flag of a field: "--layers" for "layers"."""
    return f"--{name.replace('_', '-')}"


def numbers(text: str) -> list[int]:
    """Return the numbers in "3,7,11". Raises ValueError for anything else."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise ValueError(f"{text!r} is not a list of numbers such as 3,7,11")
    return [int(word) for word in words]


def layer_numbers(text: str) -> list[int]:
    """Return the numbers in "3,7,11-13", in their order. Raises ValueError for anything else, or one named twice."""
    found: dict[int, None] = {}
    for word in text.split(","):
        ends = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?", word)
        if ends is None:
            raise ValueError(f"{text!r} is not a list of layers such as 3,7,11-13")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            raise ValueError(f"{word.strip()!r} runs backwards; write {last}-{first}")
        if (twice := next(filter(found.__contains__, range(first, last + 1)), None)) is not None:
            raise ValueError(f"{text!r} names layer {twice} twice")
        found |= dict.fromkeys(range(first, last + 1))
    return list(found)


def words(text: str) -> list[str]:
    """Return the words in "attention,mlp"; empty ones are left out."""
    return [word.strip() for word in text.split(",") if word.strip()]


class Taking(Protocol[Keywords, Options]):
    """The decorator that `takes` returns, for functions of one argument and more before their options."""

    @overload
    def __call__(self, function: Callable[[A, Options], Result]) -> Callable[Concatenate[A, Keywords], Result]: ...

    @overload
    def __call__(
        self, function: Callable[[A, B, Options], Result]
    ) -> Callable[Concatenate[A, B, Keywords], Result]: ...

    @overload
    def __call__(
        self, function: Callable[[A, B, C, D, Options], Result]
    ) -> Callable[Concatenate[A, B, C, D, Keywords], Result]: ...


def takes(options: Callable[Keywords, Options]) -> Taking[Keywords, Options]:
    """Return a decorator: the function takes the fields of `options` as keywords, after its other arguments.

    Its signature and its docstring list them, for `help()` and for editors; type checkers see them too. A field `given`
    gets the names of the options that the call names, unless it is named itself. A field `progress` watches the call.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        make: Any = options
        *arguments, _ = inspect.signature(function).parameters.values()
        signature = inspect.Signature(
            [*arguments, *inspect.signature(options).parameters.values()],
            return_annotation=inspect.signature(function).return_annotation,
        )

        @wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            try:
                values = signature.bind(*given, **named).arguments
            except TypeError as error:  # which names the argument, but not the function
                raise TypeError(f"{function.__name__}(): {error}") from None
            for name, value in values.items():
                if fault := _fault(signature.parameters[name].annotation, value):
                    raise TypeError(f"{function.__name__}(): {name} is {value!r}, {fault}")
            if "given" in signature.parameters:
                values.setdefault("given", tuple(values))
            with watched(values.get("progress")):
                return function(*(values.pop(item.name) for item in arguments), make(**values))

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n{_listed(options)}\n"
        return call

    return decorate


def _fault(annotation: Any, value: Any) -> str | None:
    """Return what is wrong with one text given for a list, which Python would take apart, or with the opposite."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    takes_text, takes_list = str in kinds, Sequence in [get_origin(kind) for kind in kinds]
    if isinstance(value, str) and takes_list and not takes_text:
        return "one text where a list belongs"
    if isinstance(value, list | tuple) and takes_text and not takes_list:
        return "a list where one text belongs"
    return None


def _listed(options: Any) -> str:
    """Return a line for each field of a dataclass of options: its name and its help."""
    lines = (f"{item.name}: {item.metadata['flag'].help}" for item in fields(options))
    return "\n".join(textwrap.fill(line, 116, initial_indent="    ", subsequent_indent="        ") for line in lines)
