"""The `surgeon` command: its commands, its exit codes, and how errors are shown."""

import io
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from surgeon.cli import clock
from surgeon.cli.commands import GROUPS, by_group, commands
from surgeon.cli.help import SETTINGS, Page, Row, row_of, shown
from surgeon.errors import SurgeonError, failure_of_library, first_line, library_of
from surgeon.options import OptionError
from surgeon.starter import STARTER, ends_with_starter
from surgeon.text import scrubbed

EXAMPLE = "surgeon truncate gpt2-large --layers 6 -o gpt2-large-6"


class Commands(TyperGroup):
    """The commands by name. A command's file is imported when that command is run, and none for `surgeon --help`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names, in the order of --help."""
        return list(commands())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, None where there is none of that name."""
        if cmd_name.isidentifier() and Path(__file__).with_name(f"{cmd_name}.py").exists():
            module = import_module(f"surgeon.cli.{cmd_name}")
            if hasattr(module, "GROUP"):
                from surgeon.cli.command import command_of

                return command_of(module)
        self.commands: Any = commands()  # for "did you mean"
        return None

    def get_help(self, ctx: Any) -> str:
        """Return the help: the commands, by what they are for."""
        sections = {
            f"{group}: {GROUPS[group]}": [Row(name, sentence) for name, sentence in listed.items()]
            for group, listed in by_group().items()
        }
        sections["options"] = [row_of(item, ctx) for item in self.get_params(ctx)]
        usage = f"{ctx.command_path} COMMAND [ARGUMENTS] [OPTIONS]"
        return shown(Page(usage, str(self.help), sections, EXAMPLE, "surgeon COMMAND --help, and README.md"))


app = typer.Typer(
    name="surgeon",
    cls=Commands,
    help="Model surgery on Hugging Face checkpoints.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        sys.stdout.write(f"surgeon {version('surgeon')}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Model surgery on Hugging Face checkpoints."""


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 refused or failed, 2 bad usage, 130 Ctrl-C, 143 SIGTERM, 70 a bug."""
    if os.name != "posix":
        sys.exit("error: surgeon runs on Linux and macOS\nhint: On Windows, run it inside WSL.")
    if STARTER in os.environ:
        ends_with_starter()
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path need not be text, and a terminal need not know "→"
        sys.stdout.reconfigure(errors="backslashreplace")
    standard_error, sys.stderr = sys.stderr, _WithoutSecrets(sys.stderr)
    try:
        _run()
    finally:
        sys.stderr = standard_error
        clock.restart()


class _WithoutSecrets:
    """Standard error without tokens and passwords: a library's log or a traceback may repeat them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, written: str) -> int:
        """Write text, and return how many characters were asked for."""
        self._stream.write(scrubbed(written))
        return len(written)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _run() -> NoReturn:
    places: Mapping[str, object] = {}
    try:
        words = sys.argv[1:]
        if any(word.partition("=")[0] in ("--config", "--show-config") for word in words):
            from surgeon.cli.config import expanded

            sys.argv[1:], places = expanded(words)
        code = app(prog_name="surgeon", standalone_mode=False)
    except BrokenPipeError:  # `surgeon inspect ... | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except SystemExit:
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if "--debug" in sys.argv:
            traceback.print_exc()
        raise SystemExit(_shown(error, places)) from error
    sys.exit(code if isinstance(code, int) else 0)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _show(error: SurgeonError) -> None:
    sys.stderr.write(f"error: {error}\n")
    if error.hint:
        sys.stderr.write(f"hint: {error.hint}\n")


USAGE = 2  # the exit code of a mistake on the command line
BUG = 70  # the exit code: EX_SOFTWARE of sysexits.h


def _shown(error: BaseException, places: Mapping[str, object]) -> int:
    """Show an error, and return the exit code: BUG for one that is surgeon's own, which nothing foresaw, else 1 or 2.

    `places` are the lines of a config file that gave options, by their names.
    """
    if type(error).__name__ == "NoArgsIsHelpError":  # typed alone: `surgeon` lists the commands, a command its options
        is_root = getattr(error, "ctx", None) is not None and error.ctx.parent is None  # type: ignore[attr-defined]
        (sys.stdout if is_root else sys.stderr).write(f"{error}\n")
        return 0 if is_root else USAGE
    if isinstance(error, TyperException):
        from surgeon.cli.mistakes import explained

        error = explained(error, typed=next(iter(sys.argv[1:]), ""))
    if isinstance(error, OptionError):
        place, named = places.get(error.option), next(iter(sys.argv[1:]), "")
        sentence = str(error) if place is None else f"{place}: {error}"
        _show(SurgeonError(sentence, hint=error.hint or f"surgeon {named} --help says what it takes."))
        return USAGE
    if isinstance(error, SurgeonError):
        _show(error)
    elif isinstance(error, MemoryError):
        _show(SurgeonError("the memory is full", hint="Use a smaller model, shorter rows, or another machine."))
    elif (said := failure_of_library(error)) is not None:
        _show(SurgeonError(f"{library_of(error)} fails: {said}", hint="--debug shows where."))
    else:
        what = f"surgeon fails with {type(error).__name__}: {first_line(error)}"
        _show(SurgeonError(what, hint="This is a bug in surgeon: please report it with what --debug shows."))
        return BUG
    return 1
