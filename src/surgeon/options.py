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
from dataclasses import MISSING, dataclass, field, fields
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from types import UnionType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, Union, get_args, get_origin, overload

from surgeon.errors import PlanError
from surgeon.progress import watched

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
    """

    keeps_function: bool = False
    counts_layers: bool = False
    plans: str = ""
    begins: bool = False
    then: str = "inspect {output}"


def verb_named(name: str) -> Verb:
    """Return the facts that a verb declares; for a name that no verb has, the defaults, which promise nothing."""
    home = f"surgeon.verbs.{name}"
    if not name.isidentifier() or find_spec(home) is None:
        return Verb()
    return getattr(import_module(home), "VERB", Verb())


class OptionError(PlanError):
    """An option has a value that it cannot have, alone or beside another. `option` is the field's name."""

    def __init__(self, option: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.option = option


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """How a field appears on the command line.

    `help` is the sentence that --help shows, `metavar` the placeholder of the value. `names` replace the flag that is
    made of the field's name. `parse` makes the field's value from the text that was typed; it raises ValueError with
    the reason. A field that is not `on_command_line` exists in Python alone. `at_resume` marks an option that a resumed
    run may change, because it decides no number of the result. `reads` marks an option that names what is read: files,
    directories, or names on the Hub, none of which may lie in what the command replaces. `writes` marks the name of a
    file or directory that is written.
    """

    help: str
    metavar: str | None = None
    names: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    on_command_line: bool = True
    at_resume: bool = False
    reads: bool = False
    writes: bool = False


def option(help: str, default: Any = MISSING, **flag: Any) -> Any:  # noqa: A002  (it is the option's help)
    """Return a field of an options dataclass; `flag` are the other attributes of `Flag`."""
    return field(default=default, metadata={"flag": Flag(help=help, **flag)})


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
    return option("Seed of every random draw; the same seed gives the same result.", 0)


def check_seed(seed: int) -> None:
    """Raises OptionError for a seed that a random generator of NumPy, transformers or torch would refuse."""
    if not 0 <= seed < 2**32:
        raise OptionError("seed", f"--seed is {seed}; it lies between 0 and {2**32 - 1}", hint="Such as --seed 1.")


def output_option(help: str, metavar: str = "DIR", **flag: Any) -> Any:  # noqa: A002  (it is the option's help)
    """Return the field `output`: --output, or -o; `flag` are the other attributes of `Flag`."""
    return option(help, None, names=("--output", "-o"), metavar=metavar, writes=True, **flag)


def overwrite_option() -> Any:
    """Return the field `overwrite`."""
    return option("Replace an existing output once the new one is complete.", False)


def revision_option() -> Any:
    """Return the field `revision`."""
    return option("Branch, tag or commit of a Hub model.", None)


def device_option(default: str = "auto") -> Any:
    """Return the field `device`."""
    return option("Device to compute on: auto (CUDA, then MPS, then the CPU), cpu, cuda, mps.", default)


def trust_option() -> Any:
    """Return the field `trust_remote_code`."""
    return option("Run the code that the checkpoint brings along (auto_map). Read that code first.", False)


def adapter_option() -> Any:
    """Return the field `adapter`."""
    return option(
        "Adapters trained with a frozen reader: they are on while the gist is made, off while it is read.",
        None,
        metavar="DIR",
        reads=True,
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
