"""The options that mean the same in every command."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, or a Hub id (gpt2-large).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
Seed = Annotated[int, typer.Option(help="Everything random derives from it; same seed, same bytes.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DATA",
        help="Text to measure on: .txt, .jsonl, .parquet or a Hub dataset. Default: the model writes one.",
    ),
]
Samples = Annotated[int, typer.Option(metavar="N", help="How many rows of the text.")]
SequenceLength = Annotated[int, typer.Option(metavar="T", help="Tokens of a row.")]
Device = Annotated[str, typer.Option(help="What computes: auto (CUDA, then MPS, then the CPU), cpu, cuda, mps.")]
Adapter = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Adapters trained for a frozen reader: they compress, the model reads."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Full tracebacks.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """The options of every command that writes a checkpoint."""

    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Where the result goes. Default: the model's name with what was done."
        ),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output once the new one is complete.")
    ] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing; reads no weights.")] = (
        False
    )
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="keep (the source's bytes), float32, bfloat16 or float16.")
    ] = "keep"
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file: 5GB, 500MB.")] = "5GB"
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the finished output to this Hub repository.")
    ] = None
    private: Annotated[bool, typer.Option("--private", help="Make the Hub repository private if it is created.")] = (
        False
    )
    json: Json = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False
    debug: Debug = False


def writes(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command`, which takes `writing: Writing` last, as a command that takes those options one by one."""
    shared = inspect.signature(Writing).parameters
    own = [item for item in inspect.signature(command).parameters.values() if item.name != "writing"]

    def flat(**options: Any) -> None:
        writing = Writing(**{name: options.pop(name) for name in shared})
        command(**options, writing=writing)

    flat.__name__, flat.__doc__ = command.__name__, command.__doc__
    parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in (*own, *shared.values())]
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    flat.__annotations__ = {item.name: item.annotation for item in parameters}
    return flat


def numbers(text: str, option: str) -> list[int]:
    """Return the numbers in "3,7,11". Raises typer's usage error, naming the option, for anything else."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 3,7,11", param_hint=option)
    return [int(word) for word in words]
