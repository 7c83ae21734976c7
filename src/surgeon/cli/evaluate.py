"""`surgeon evaluate`."""

from typing import Annotated

import typer

from surgeon.cli.command import Debug, Json, Model, Quiet, spread
from surgeon.cli.terminal import emit, emit_json
from surgeon.options import OptionError
from surgeon.verbs import evaluate as verb

GROUP = "evaluation"
EXAMPLE = "surgeon evaluate gpt2-27 --data text.txt --baseline gpt2-large"
Markdown = Annotated[bool, typer.Option("--markdown", help="Print a block for a model card.")]


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
        raise OptionError("markdown", "--markdown goes without --json")
    evaluation = verb.run(model, options, quiet=quiet)
    emit_json(evaluation.to_dict()) if json else emit(evaluation.to_markdown() if markdown else evaluation.to_text())
