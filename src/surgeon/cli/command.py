"""How a command is made: its options, spread from dataclasses, and how it carries out a surgery and prints it."""

import inspect
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Protocol, Union, get_args, get_origin, get_type_hints

import typer

from surgeon.anatomy.config import trains
from surgeon.cli import clock
from surgeon.cli.help import SETTINGS, Command
from surgeon.cli.terminal import emit, emit_json, log
from surgeon.draft import VERIFIED_BELOW, Draft, Summary
from surgeon.options import (
    Checked,
    Flag,
    OptionError,
    Words,
    dtype_option,
    flag_of,
    option,
    output_option,
    overwrite_option,
    shard_option,
    size_in_bytes,
    verb_named,
)
from surgeon.processes import speaks, wait_for_all
from surgeon.progress import Bars, watched
from surgeon.surgery import Surgery

if TYPE_CHECKING:
    from surgeon.verbs.verify import Verification

RUN = "run"  # the group of options that say how a command runs and prints
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, or a Hub id (gpt2-large).")]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on standard output and nothing else.", rich_help_panel=RUN),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=RUN)]
Debug = Annotated[bool, typer.Option("--debug", help="Full tracebacks.", rich_help_panel=RUN)]
# Of every command: `surgeon.cli.config` acts on both before the command's other options are parsed.
CONFIG, SHOW_CONFIG = "config_file", "show_config"
_ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Take options from this YAML file: their names without dashes are its keys. The command line wins.",
        rich_help_panel=RUN,
    ),
]
_ShowConfig = Annotated[
    bool,
    typer.Option("--show-config", help="Print such a file with these options, and do no more.", rich_help_panel=RUN),
]


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` with each parameter that is a dataclass of options spread into its fields, in their order.

    A value that cannot be raises OptionError, the usage error, which names the option. --config and --show-config are
    added.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for item in inspect.signature(command).parameters.values():
        hint = hints[item.name]
        if is_dataclass(hint):
            groups[item.name] = hint
            parameters += _parameters(hint)
        else:
            parameters.append(item.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hint))
    for name, hint, default in ((CONFIG, _ConfigFile, None), (SHOW_CONFIG, _ShowConfig, False)):
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))

    def grouped(given: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in given.items() if name not in (CONFIG, SHOW_CONFIG)}
        for name, kind in groups.items():
            given[name] = _made(kind, given)
        return given

    def flat(**given: Any) -> None:
        if given.get("quiet"):
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # huggingface_hub reads it when it is imported
        with watched(Bars(quiet=bool(given.get("quiet")))):
            command(**grouped(given))

    flat.__name__, flat.__doc__ = command.__name__, command.__doc__
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    flat.__annotations__ = {item.name: item.annotation for item in parameters}
    flat.grouped = grouped  # type: ignore[attr-defined]  # what typer parsed, as the command takes it
    flat.flags = {item.name: item.metadata["flag"] for kind in groups.values() for item in fields(kind)}  # type: ignore[attr-defined]
    return flat


def _made(kind: Any, given: dict[str, Any]) -> Any:
    """Return the options of a dataclass, taken out of what typer parsed."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for item in fields(kind):
        flag: Flag = item.metadata["flag"]
        if not flag.on_command_line:
            continue
        value = given.pop(item.name)
        if flag.parse is not None and value is not None:
            try:
                value = flag.parse(value)
            except ValueError as error:
                raise OptionError(item.name, str(error)) from error
        values[item.name] = tuple(value or ()) if _is_repeatable(hints[item.name]) else value
    return kind(**values)


def _parameters(kind: Any) -> list[inspect.Parameter]:
    """Return the parameters that typer makes the options of a dataclass from."""
    hints = get_type_hints(kind)
    parameters = []
    for item in fields(kind):
        flag: Flag = item.metadata["flag"]
        if not flag.on_command_line:
            continue
        hint = hints[item.name]
        is_switch = _without_none(hint) is bool
        names = flag.names or ((flag_of(item.name),) if not is_switch or hint is bool else ())
        complete = None if flag.choices is None else completion(flag.choices)
        said: dict[str, Any] = {"metavar": flag.metavar, "help": flag.help, "autocompletion": complete}
        declared = (
            typer.Argument(**said) if flag.is_argument else typer.Option(*names, **said, rich_help_panel=flag.group)
        )
        default = inspect.Parameter.empty if item.default is MISSING else item.default
        parameters.append(
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if _is_repeatable(hint) and default is not inspect.Parameter.empty else default,
                annotation=Annotated[_typed(hint, flag, required=item.default is MISSING), declared],
            )
        )
    return parameters


def completion(choices: Words) -> Callable[[str], list[str]]:
    """Return the function that completes a value from its words; of several with commas between, the last one."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",") if choices.many else ("", "", incomplete)
        return [f"{before}{comma}{word}" for word in choices.listed if word.startswith(last)]

    return complete


def _typed(hint: Any, flag: Flag, *, required: bool) -> Any:
    """Return the type that typer parses for a field: of a union the one that a text can be."""
    if _is_repeatable(hint):
        return list[str] if required else list[str] | None
    optional = not required and type(None) in get_args(hint)
    plain: Any = str if flag.parse is not None else _without_none(hint)
    return plain | None if optional else plain


def _without_none(hint: Any) -> Any:
    """Return the type of a union that the command line gives: text before all others, a path before a number."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    members = [member for member in get_args(hint) if member is not type(None)]
    return next((kind for kind in (str, Path) if kind in members), members[0])


def _is_repeatable(hint: Any) -> bool:
    """Return whether a field holds any number of texts, so that its option may be given more than once."""
    return hint in (tuple[str, ...], Sequence[str], Sequence[str | float])


def command_of(module: ModuleType) -> Any:
    """Return the command in a file of src/surgeon/cli, as typer runs it."""
    function = getattr(module, module.__name__.rpartition(".")[2])
    single = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=SETTINGS)
    single.command(cls=Command, no_args_is_help=True, context_settings=SETTINGS)(function)
    command: Any = typer.main.get_command(single)
    command.flags, command.example = getattr(function, "flags", {}), module.EXAMPLE
    return command


@dataclass(frozen=True, kw_only=True)
class Writing(Checked):
    """The options of every command that writes a checkpoint."""

    output: Path | None = output_option("Where the result goes. Default: the source's name with the surgery.")
    overwrite: bool = overwrite_option()
    dry_run: bool = option(
        "Print the plan and write nothing; reads headers only (a .gguf file is read whole).", False, group=RUN
    )
    dtype: str = dtype_option()
    max_shard_size: str = shard_option()
    push_to_hub: str | None = option(
        "Upload the finished output to this Hub repository.", None, metavar="REPO", group="output"
    )
    private: bool = option("Make the Hub repository private if it is created.", False, group="output")
    json: bool = option("Print one JSON object on standard output and nothing else.", False, group=RUN)
    quiet: bool = option("No progress.", False, names=("--quiet", "-q"), group=RUN)
    debug: bool = option("Full tracebacks.", False, group=RUN)

    def __post_init__(self) -> None:
        super().__post_init__()
        size_in_bytes(self.max_shard_size)


class Report(Protocol):
    """A command's additions to the summary: rows for people, and entries for JSON."""

    def preview(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return the additions that are known before anything is written."""

    def after(self, output: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return the additions that need the result."""


def check(surgery: Surgery, writing: Writing) -> None:
    """Raise the errors that writing would raise before it begins: an existing output, an impossible option."""
    _check(draft_of(surgery, writing), writing)


def run(
    surgery: Surgery,
    writing: Writing,
    *,
    verify: bool | None = False,
    report: Report | None = None,
    columns: str | None = None,
) -> None:
    """Carry a surgery out and print its summary.

    With `verify` the result is loaded and compared with its source before it takes its place; None: where it is small.
    `columns` are those that the surgery's data was read by.
    """
    summary, rows, entries = carried_out(surgery, writing, verify=verify, report=report)
    if writing.json:
        emit_json(summary.to_dict() | entries)
        return
    emit(replace(summary, seconds=clock.seconds()).to_text(done=not writing.dry_run, rows=rows))
    if not writing.dry_run:
        emit_next(*_following(surgery, str(summary.output), columns))


def _following(surgery: Surgery, output: str, columns: str | None) -> list[str]:
    """Return the words of the command that a result is made for, filled in from what is known."""
    data = surgery.reads.get("--data", ())
    words = {"{output}": [output], "{source}": [surgery.source.label]}
    words["{data}"] = data_words(data, columns) if data else data_words([SOME_TEXT])
    then, config = verb_named(next(iter(surgery.plan.steps[-1]))).then, surgery.spec.config
    if then.startswith("finetune") and not trains(config, teacher="--teacher" in then):
        then = then.replace(" --teacher {source}", "")
    if then.startswith("finetune") and not trains(config, teacher="--teacher" in then):
        then = "inspect {output}"
    return [item for word in then.split() for item in words.get(word, [word])]


def data_words(data: Iterable[str], columns: str | None = None) -> list[str]:
    """Return the words that name data to another command, which is to read the same of it."""
    return [word for name in data for word in ("--data", name)] + ([] if columns is None else ["--columns", columns])


SOME_TEXT = "text.txt"  # where a command cannot know which


def emit_next(*words: str) -> None:
    """Print the command to run next."""
    emit(f"\nnext: surgeon {shlex.join(words)}")


def carried_out(
    surgery: Surgery, writing: Writing, *, verify: bool | None = False, report: Report | None = None
) -> tuple[Summary, list[tuple[str, str]], dict[str, Any]]:
    """Return the summary of a surgery that is carried out, and the additions to it: rows, and entries for JSON.

    With --dry-run it is only planned.
    """
    draft = draft_of(surgery, writing)
    rows, entries = report.preview() if report else ([], {})
    if writing.dry_run:
        return draft.summary, rows, entries
    _check(draft, writing)
    for note in () if writing.quiet else draft.plan.notes[len(surgery.plan.notes) :]:
        log(f"note: {note}")  # the cost of the dtype, in time for a Ctrl-C
    command = shlex.join(["surgeon", *sys.argv[1:]])
    found: list[Verification] = []

    def confirm(stage: Path) -> None:
        from surgeon.models.loading import loadable
        from surgeon.verbs.verify import verify_as

        source, revision = loadable(surgery.source, weights=True)
        with clock.part("verifying"):
            found.append(verify_as(str(draft.summary.output), source, stage, revision=revision))

    if verify is None:
        verify = draft.summary.parameters[1] < VERIFIED_BELOW
    with clock.part("writing"):
        wait_for_all()  # none is still checking that the output is free
        if speaks():
            summary = draft.write(overwrite=writing.overwrite, command=command, confirm=confirm if verify else None)
        else:
            summary = draft.summary
        wait_for_all()  # they measure the result together
    for verification in found:
        rows += verification.rows()
        entries["verification"] = verification.to_dict()
    if report:
        with clock.part("measuring"):
            more = report.after(summary.output)
        rows, entries = rows + more[0], entries | more[1]
        summary = summary.downloaded_from(surgery.source)  # it may have read more of it
    if writing.push_to_hub is not None and speaks():
        from surgeon.checkpoint.hub import push

        with clock.part("uploading"):
            entries["url"] = push(summary.output, writing.push_to_hub, private=writing.private, reads=draft.reads)
        log(f"uploaded to {entries['url']}")
    return summary, rows, entries


def _check(draft: Draft, writing: Writing) -> None:
    draft.check(overwrite=writing.overwrite)
    if writing.push_to_hub is not None:
        from surgeon.checkpoint.overlap import check_uploaded

        check_uploaded(writing.push_to_hub, draft.reads)


def draft_of(surgery: Surgery, writing: Writing) -> Draft:
    """Return the result that these options would write."""
    return surgery.prepare(writing.output, dtype=writing.dtype, max_shard_size=writing.max_shard_size)
