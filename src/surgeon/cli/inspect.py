"""`surgeon inspect`."""

from typing import Annotated

import typer

from surgeon.cli.command import Debug, Json, Model, spread
from surgeon.cli.terminal import emit, emit_json
from surgeon.options import keywords_of
from surgeon.verbs import inspect as verb

GROUP = "inspection"
EXAMPLE = "surgeon inspect gpt2-large"


@spread
def inspect(
    model: Model,
    options: verb.InspectOptions,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor.", rich_help_panel="what is shown")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint is: family, layers, sizes, parameters by part."""
    inspection = verb.inspect(model, **keywords_of(options))
    emit_json(inspection.to_dict(tensors=tensors)) if json else emit(inspection.to_text(tensors=tensors))
