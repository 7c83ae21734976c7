"""The `surgeon` command: its commands, its exit codes, and how errors are shown."""

import ast
import io
import os
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from types import FrameType, ModuleType
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from surgeon.cli import clock
from surgeon.errors import SurgeonError, failure_of_library, first_line, library_of
from surgeon.starter import STARTER, ends_with_starter
from surgeon.text import scrubbed

EXAMPLE = "surgeon truncate gpt2-large --layers 6 -o gpt2-large-6"
# The order of --help: by what a command is for (`GROUP` in its file), then by its name.
GROUPS = ("recipes", "inspection", "surgery", "training", "evaluation", "prompts", "formats")
SETTINGS = {"help_option_names": ["-h", "--help"]}


def commands() -> dict[str, str]:
    """Return the first sentence of each command by its name, in the order of --help.

    A command is the function of its file's name in src/surgeon/cli/NAME.py, where that file has a GROUP. The files are
    parsed and not imported, because they import what their commands need.
    """
    listed = []
    for path in Path(__file__).parent.glob("*.py"):
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        groups = (
            ast.literal_eval(item.value)
            for item in statements
            if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == "GROUP"
        )
        if (group := next(groups, None)) is not None:
            functions = {item.name: item for item in statements if isinstance(item, ast.FunctionDef)}
            sentence = (ast.get_docstring(functions[path.stem]) or "").partition("\n\n")[0]
            listed.append((GROUPS.index(group), path.stem, sentence))
    return {name: sentence for _, name, sentence in sorted(listed)}


class Commands(TyperGroup):
    """The commands by name. A command's file is imported when that command is run, and none for `surgeon --help`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names, in the order of --help."""
        return list(commands())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, None where there is none of that name."""
        file = Path(__file__).with_name(f"{cmd_name}.py")
        if not cmd_name.isidentifier() or not file.exists():
            self.commands: Any = commands()  # for "did you mean"
            return None
        module = import_module(f"surgeon.cli.{cmd_name}")
        return command_of(module) if hasattr(module, "GROUP") else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a line for each command."""
        with formatter.section("Commands"):
            formatter.write_dl(list(commands().items()))


def command_of(module: ModuleType) -> Any:
    """Return the command in a file of src/surgeon/cli, as typer runs it."""
    function = getattr(module, module.__name__.rpartition(".")[2])
    single = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=SETTINGS)
    single.command(no_args_is_help=True, epilog=f"Example: {module.EXAMPLE}", context_settings=SETTINGS)(function)
    return typer.main.get_command(single)


app = typer.Typer(
    name="surgeon",
    cls=Commands,
    help="Model surgery on Hugging Face checkpoints.",
    epilog=f"Example: {EXAMPLE}",
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
    try:
        app()
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
            raise SystemExit(1) from error
        raise SystemExit(_shown(error)) from error
    sys.exit(0)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _show(error: SurgeonError) -> None:
    sys.stderr.write(f"error: {error}\n")
    if error.hint:
        sys.stderr.write(f"hint: {error.hint}\n")


BUG = 70  # the exit code: EX_SOFTWARE of sysexits.h


def _shown(error: BaseException) -> int:
    """Show an error, and return the exit code: BUG for one that is surgeon's own, which nothing foresaw, else 1."""
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
