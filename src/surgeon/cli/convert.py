"""`surgeon convert`."""

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.command import Writing, run, spread
from surgeon.verbs import convert as verb

GROUP = "formats"
EXAMPLE = "surgeon convert model.Q8_0.gguf -o model --dtype bfloat16"
SourceArgument = Annotated[
    Path, typer.Argument(metavar="SRC", help="A directory with pytorch_model*.bin, or a .gguf file.")
]


@spread
def convert(source: SourceArgument, *, writing: Writing) -> None:
    """Turn pytorch_model*.bin or a .gguf file into a safetensors checkpoint."""
    staging = writing.output.absolute().parent if writing.output else Path.cwd()
    run(verb.convert(source, staging=staging), writing)
