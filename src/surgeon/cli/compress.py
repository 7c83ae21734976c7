"""`surgeon compress`."""

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.command import Debug, Json, Model, Quiet, emit_next, spread
from surgeon.cli.terminal import emit, emit_json, log, read_text
from surgeon.options import OptionError, keywords_of
from surgeon.verbs import compress as verb

GROUP = "prompts"
EXAMPLE = "surgeon compress gpt2-gist --prompt-file system.txt -o bot"
PromptText = Annotated[str | None, typer.Option(metavar="TEXT", help="The prompt.", rich_help_panel="prompt")]
PromptFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A file with the prompt, in UTF-8.", rich_help_panel="prompt")
]


@spread
def compress(
    model: Model,
    prompt: PromptText = None,
    prompt_file: PromptFile = None,
    *,
    options: verb.CompressOptions,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress a prompt into the states of a few gist tokens, checked and saved."""
    if (prompt is None) == (prompt_file is None):
        raise OptionError("prompt", "--prompt and --prompt-file: one of them is needed", hint=f"Such as: {EXAMPLE}")
    content = read_text(prompt_file) if prompt is None and prompt_file is not None else str(prompt)
    if not quiet:
        log(f"running {model}")
    compression = verb.compress(model, content, **keywords_of(options) | {"prompt_file": prompt_file})
    if json:
        emit_json(compression.to_dict())
        return
    emit(compression.to_text())
    emit_next("generate", model, "TEXT", "--gist", str(compression.output))
