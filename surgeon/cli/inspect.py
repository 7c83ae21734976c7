"""`surgeon inspect`."""

from typing import Annotated

import typer

from surgeon.cli import options


def inspect(
    model: options.Model,
    against: Annotated[str | None, typer.Option(metavar="OTHER", help="Show what differs from this model.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    revision: options.Revision = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what a checkpoint is: family, layers, sizes, parameters by part."""
    import surgeon
    from surgeon.cli.terminal import emit, emit_json

    inspection = surgeon.inspect(model, against=against, revision=revision)
    emit_json(inspection.to_dict(tensors=tensors)) if json else emit(inspection.to_text(tensors=tensors))
