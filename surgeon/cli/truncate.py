"""`surgeon truncate`."""

from typing import Annotated

import typer

from surgeon.cli import options


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
    output: options.Output = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    dtype: options.Dtype = "keep",
    max_shard_size: options.MaxShardSize = "5GB",
    seed: options.Seed = 0,
    revision: options.Revision = None,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Keep the first N layers of a model (Inheritune)."""
    import surgeon
    from surgeon.cli import write

    parts = None if inherit is None else [part.strip() for part in inherit.split(",") if part.strip()]
    surgery = surgeon.truncate(model, layers=layers, inherit=parts, seed=seed, revision=revision)
    write.run(
        surgery,
        write.WriteOptions(output, overwrite, dry_run, dtype, max_shard_size, json, quiet, push_to_hub, private),
    )
