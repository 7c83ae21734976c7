"""`surgeon generate`."""

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.command import Debug, Json, Model, spread
from surgeon.cli.terminal import emit, emit_json, read_text
from surgeon.options import OptionError, keywords_of
from surgeon.verbs import generate as verb

GROUP = "prompts"
EXAMPLE = "surgeon generate gpt2-gist 'Hello' --gist bot --max-new-tokens 64"
Text = Annotated[str | None, typer.Argument(metavar="[TEXT]", help="The text to continue.")]
InputFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A file with the text, in UTF-8, instead of TEXT.", rich_help_panel="prompt"),
]


@spread
def generate(
    model: Model,
    text: Text = None,
    input_file: InputFile = None,
    *,
    options: verb.GenerateOptions,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a model's continuation of a text, and nothing else."""
    if (text is None) == (input_file is None):
        raise OptionError("text", "TEXT and --input-file: one of them is needed", hint=f"Such as: {EXAMPLE}")
    content = read_text(input_file) if text is None and input_file is not None else str(text)
    generation = verb.generate(model, content, **keywords_of(options))
    emit_json(generation.to_dict()) if json else emit(generation.text)
