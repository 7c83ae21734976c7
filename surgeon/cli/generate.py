"""`surgeon generate`."""

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import options

EXAMPLE = "surgeon generate gpt2-gist 'Hello' --gist bot --max-new-tokens 64"


def generate(
    model: options.Model,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What the model goes on from.")] = None,
    input_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file with the text, in UTF-8, instead of TEXT.")
    ] = None,
    gist: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A prompt from surgeon compress, in front of the text.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest continuation that is written.")] = 256,
    temperature: Annotated[float, typer.Option(metavar="T", help="Draw at this temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Draw among the likeliest tokens that make up this probability.")
    ] = 1.0,
    beams: Annotated[int, typer.Option(metavar="N", help="Search with so many beams.")] = 1,
    seed: options.Seed = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the text into the chat template, as a user's turn.")
    ] = False,
    device: options.Device = "auto",
    revision: options.Revision = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Print what a model writes behind a text, and nothing else."""
    import surgeon
    from surgeon.cli.terminal import emit, emit_json, read_text

    if (text is None) == (input_file is None):
        raise typer.BadParameter("give one of TEXT and --input-file", param_hint="TEXT")
    content = text if input_file is None else read_text(input_file)
    assert content is not None
    found = surgeon.generate(
        model,
        content,
        gist=gist,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        beams=beams,
        seed=seed,
        chat=chat,
        device=device,
        revision=revision,
    )
    emit_json(found.to_dict()) if json else emit(found.text)
