"""`surgeon data`."""

from typing import Annotated

import typer

from surgeon.cli.command import Debug, Json, Quiet, spread
from surgeon.cli.terminal import emit, emit_json
from surgeon.options import keywords_of
from surgeon.verbs import data as verb

GROUP = "training"
EXAMPLE = "surgeon data question-formation --lines 20000 -o questions"
Kind = Annotated[str, typer.Argument(metavar="KIND", help=f"What to make: {', '.join(verb.KINDS)}.")]


@spread
def data(
    kind: Kind, *, options: verb.DataOptions, json: Json = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Make text of a known grammar, with a tokenizer and its entropy."""
    made = verb.generate_data(kind, **keywords_of(options))
    emit_json(made.to_dict()) if json else emit(made.to_text())
