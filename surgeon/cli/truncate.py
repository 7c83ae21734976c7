"""`surgeon truncate`."""

from typing import Annotated

import typer

from surgeon.cli import options


@options.writes
def truncate(
    model: options.Model,
    layers: Annotated[str, typer.Option(metavar="N", help="Layers of the result: 12, or 50% of the source's.")],
    inherit: Annotated[
        str | None,
        typer.Option(
            metavar="PARTS",
            help="Keep only these parts of the source (attention,mlp,norm,embedding) and draw the rest anew.",
        ),
    ] = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    *,
    writing: options.Writing,
) -> None:
    """Keep the first N layers of a model (Inheritune)."""
    import surgeon
    from surgeon.cli import write

    parts = None if inherit is None else [part.strip() for part in inherit.split(",") if part.strip()]
    write.run(surgeon.truncate(model, layers=layers, inherit=parts, seed=seed, revision=revision), writing)
