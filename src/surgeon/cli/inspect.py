"""`surgeon inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.command import Debug, Json, Model, spread
from surgeon.cli.terminal import emit, emit_json
from surgeon.options import keywords_of, reads_of
from surgeon.verbs import inspect as verb

GROUP = "inspection"
EXAMPLE = "surgeon inspect gpt2-large"
SHOWN = "what is shown"


@spread
def inspect(
    model: Model,
    options: verb.InspectOptions,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.", rich_help_panel=SHOWN)] = False,
    filter: Annotated[  # noqa: A002  (it is the option's name)
        str | None,
        typer.Option(
            "--filter",
            metavar="PATTERN",
            help="Of the tensors those so named: '*.mlp.*'.",
            rich_help_panel=SHOWN,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Draw the layers to this .png, .svg or .pdf.", rich_help_panel=SHOWN
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing picture.", rich_help_panel=SHOWN)
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint is: family, sizes, each layer's attention, MLP and parameters."""
    if plot is not None:
        from surgeon.plots.figure import check_picture, save

        check_picture(plot, reads_of(options) | {"MODEL": (model,)}, overwrite=overwrite, option="plot")
    inspection = verb.inspect(model, **keywords_of(options))
    if plot is not None:
        save(inspection.draw(), plot)
    lists, names = tensors or filter is not None, filter or "*"
    if json:
        pictures = {} if plot is None else {"pictures": [str(plot)]}
        emit_json(inspection.to_dict(tensors=lists, names=names) | pictures)
    else:
        drawn = "" if plot is None else f"\n\n  picture  {plot}"
        emit(inspection.to_text(tensors=lists, names=names) + drawn)
