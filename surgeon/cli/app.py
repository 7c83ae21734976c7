"""The `surgeon` command: its commands, its exit codes, and how errors are shown."""

import io
import os
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from surgeon.errors import SurgeonError
from surgeon.text import printable

EXAMPLE = "surgeon truncate gpt2-large --layers 6 -o gpt2-large-6"
# The commands, as --help lists them. Each is the function of its name in surgeon/cli/NAME.py.
COMMANDS = {
    "inspect": "Show what a checkpoint is: family, layers, sizes, parameters by part.",
    "truncate": "Keep the first N layers of a model (Inheritune).",
    "grow": "Make a model deeper and wider, with its function kept.",
    "prune": "Remove the layers, neurons, heads and experts that matter least.",
    "gist": "Add gist tokens to a model: prompts are then compressed into their activations.",
    "finetune": "Train a model on data: heal a cut, train new layers, distil from a teacher.",
    "plot": "Draw the losses of one or more training runs.",
    "evaluate": "Measure perplexity, answers and choices, and the recovery of a baseline.",
    "compress": "Compress a prompt into the states of a few gist tokens, checked and saved.",
    "generate": "Print a model's continuation of a text, and nothing else.",
    "convert": "Turn pytorch_model*.bin or a .gguf file into a safetensors checkpoint.",
}
SETTINGS = {"help_option_names": ["-h", "--help"]}


class Commands(TyperGroup):
    """The commands by name. A command's file is imported when that command is run, and none for `surgeon --help`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = dict.fromkeys(COMMANDS)  # their names, for "did you mean"

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names, in the order of --help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, None where there is none of that name."""
        return load(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a line for each command."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def load(name: str) -> Any:
    """Return a command by its name, as typer runs it."""
    file = import_module(f"surgeon.cli.{name}")
    single = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=SETTINGS)
    registered = single.command(
        name, help=COMMANDS[name], no_args_is_help=True, epilog=f"Example: {file.EXAMPLE}", context_settings=SETTINGS
    )
    registered(getattr(file, name))
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
    """Run the command line and exit: 0 done, 1 refused or failed, 2 bad usage, 130 Ctrl-C, 143 SIGTERM."""
    if os.name != "posix":
        sys.exit("error: surgeon runs on Linux and macOS\nhint: On Windows, run it inside WSL.")
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path need not be text, and a terminal need not know "→"
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except SurgeonError as error:
        if "--debug" in sys.argv:
            raise
        _show(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `surgeon inspect ... | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _show(error: SurgeonError) -> None:
    sys.stderr.write(f"error: {printable(str(error))}\n")
    if error.hint:
        sys.stderr.write(f"hint: {printable(error.hint)}\n")
