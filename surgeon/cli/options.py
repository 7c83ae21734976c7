"""The options that mean the same in every command."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, or a Hub id (gpt2-large).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="DIR", help="Where the result goes. Default: the model's name with what was done."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output once the new one is complete.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing; reads no weights.")]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="keep (the source's bytes), float32, bfloat16 or float16.")]
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file: 5GB, 500MB.")]
Seed = Annotated[int, typer.Option(help="Everything random derives from it; same seed, same bytes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Full tracebacks.")]
PushToHub = Annotated[
    str | None, typer.Option(metavar="REPO", help="Upload the finished output to this Hub repository.")
]
Private = Annotated[bool, typer.Option("--private", help="Make the Hub repository private if it is created.")]


def numbers(text: str, option: str) -> list[int]:
    """Return the numbers in "3,7,11". Raises typer's usage error, naming the option, for anything else."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 3,7,11", param_hint=option)
    return [int(word) for word in words]
