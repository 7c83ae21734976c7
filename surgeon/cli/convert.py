"""`surgeon convert`."""

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import options


@options.writes
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A directory with pytorch_model*.bin, or a .gguf file.")
    ],
    *,
    writing: options.Writing,
) -> None:
    """Turn pytorch_model*.bin or a .gguf file into a safetensors checkpoint."""
    import surgeon
    from surgeon.cli import write

    staging = writing.output.absolute().parent if writing.output else Path.cwd()
    write.run(surgeon.convert(source, staging=staging), writing)
