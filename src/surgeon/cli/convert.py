"""`surgeon convert`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.command import Writing, run, spread
from surgeon.options import keywords_of
from surgeon.verbs import convert as verb

GROUP = "formats"
EXAMPLE = "surgeon convert model.Q8_0.gguf -o model --dtype bfloat16"
SourceArgument = Annotated[
    Path, typer.Argument(metavar="SRC", help="A directory with pytorch_model*.bin, a .gguf file, or an adapter.")
]


@spread
def convert(source: SourceArgument, *, options: verb.ConvertOptions, writing: Writing) -> None:
    """Turn pytorch_model*.bin, a .gguf file or a LoRA adapter into a safetensors checkpoint."""
    staging = writing.output.absolute().parent if writing.output else Path.cwd()
    run(verb.convert(source, **keywords_of(replace(options, staging=staging))), writing)
