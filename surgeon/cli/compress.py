"""`surgeon compress`."""

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import options

EXAMPLE = "surgeon compress gpt2-gist --prompt-file system.txt -o bot"


def compress(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with the prompt, in UTF-8.")] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="K", help="Tokens of the gist. Default: what the model was given.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is the system turn of the chat template.")] = False,
    keep_text: Annotated[
        bool, typer.Option("--keep-text", help="Keep the prompt in gist.json, which else holds its SHA-256.")
    ] = False,
    bench: Annotated[
        bool, typer.Option("--bench", help="Measure a call with nothing cached, the whole prompt, and the gist.")
    ] = False,
    adapter: options.Adapter = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Where the result goes. Default: MODEL-compress-KT."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing compressed prompt once the new one is complete.")
    ] = False,
    device: options.Device = "auto",
    revision: options.Revision = None,
    json: options.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    debug: options.Debug = False,
) -> None:
    """Compress a prompt into the states of a few gist tokens, checked and saved."""
    import surgeon
    from surgeon.cli.terminal import emit, emit_json, log, read_text

    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give one of --prompt and --prompt-file", param_hint="--prompt")
    content = prompt if prompt_file is None else read_text(prompt_file)
    assert content is not None
    if not quiet:
        log(f"running {model}")
    found = surgeon.compress(
        model,
        content,
        tokens=tokens,
        output=output,
        overwrite=overwrite,
        chat=chat,
        keep_text=keep_text,
        bench=bench,
        adapter=adapter,
        device=device,
        revision=revision,
    )
    if json:
        emit_json(found.to_dict())
        return
    emit(found.to_text())
    emit(f"next: surgeon generate {model} TEXT --gist {found.output}")
