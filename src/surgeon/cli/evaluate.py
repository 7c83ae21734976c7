"""`surgeon evaluate`."""

import sys
from typing import Annotated

import typer

from surgeon.checkpoint.receipt import made_of
from surgeon.cli.command import Debug, Json, Model, Quiet, emit_next, spread
from surgeon.cli.terminal import emit, emit_json
from surgeon.options import OptionError
from surgeon.verbs import evaluate as verb

GROUP = "evaluation"
EXAMPLE = "surgeon evaluate gpt2-27 --data text.txt --baseline gpt2-large"
Markdown = Annotated[bool, typer.Option("--markdown", help="Print a block for a model card.", rich_help_panel="output")]


@spread
def evaluate(
    model: Model,
    options: verb.EvaluateOptions,
    markdown: Markdown = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, answers and choices, and compare them with a baseline."""
    if json and markdown:
        raise OptionError("markdown", "--markdown does not go with --json", hint="Leave one of them out.")
    evaluation = verb.run(model, options, quiet=quiet)
    if json:
        emit_json(evaluation.to_dict())
        return
    emit(evaluation.to_markdown() if markdown else evaluation.to_text())
    is_alone = options.baseline is None and not options.gist and not markdown
    if is_alone and (source := made_of(model)) is not None:
        emit_next(*sys.argv[1:], "--baseline", source)  # measured in the same way
