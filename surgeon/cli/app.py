"""The `surgeon` command: its commands, its exit codes, and how errors are shown."""

import io
import os
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from surgeon.errors import SurgeonError
from surgeon.text import printable

EPILOG = "Example: surgeon truncate gpt2-large --layers 6 -o gpt2-large-6"

app = typer.Typer(
    name="surgeon",
    help="Model surgery on Hugging Face checkpoints.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
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
    except BrokenPipeError:  # `surgeon inspect ... | head`: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _show(error: SurgeonError) -> None:
    sys.stderr.write(f"error: {printable(str(error))}\n")
    if error.hint:
        sys.stderr.write(f"hint: {printable(error.hint)}\n")


def _register() -> None:
    from surgeon.cli import compress, convert, evaluate, finetune, generate, gist, grow, inspect, plot, prune, truncate

    shape = (inspect.inspect, truncate.truncate, grow.grow, prune.prune, gist.gist)
    learn = (finetune.finetune, plot.plot, evaluate.evaluate, compress.compress, generate.generate)
    for command in (*shape, *learn, convert.convert):
        app.command(no_args_is_help=True, epilog=EXAMPLES[command.__name__])(command)


EXAMPLES = {
    "inspect": "Example: surgeon inspect gpt2-large",
    "truncate": "Example: surgeon truncate gpt2-large --layers 6 -o gpt2-large-6",
    "grow": "Example: surgeon grow gpt2 --layers 16 --hidden-size 2x -o gpt2-grown",
    "prune": "Example: surgeon prune gpt2-large --score angular --layers 27 --data text.txt -o gpt2-27",
    "gist": "Example: surgeon gist gpt2 --tokens 4 -o gpt2-gist",
    "finetune": "Example: surgeon finetune gpt2-27 --data text.txt --teacher gpt2-large --max-steps 300 -o healed",
    "plot": "Example: surgeon plot healed.run other.run -o loss.png",
    "evaluate": "Example: surgeon evaluate gpt2-27 --data text.txt --baseline gpt2-large",
    "compress": "Example: surgeon compress gpt2-gist --prompt-file system.txt -o bot",
    "generate": "Example: surgeon generate gpt2-gist 'Hello' --gist bot --max-new-tokens 64",
    "convert": "Example: surgeon convert model.Q8_0.gguf -o model --dtype bfloat16",
}
_register()
