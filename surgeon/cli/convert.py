"""`surgeon convert`."""

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import options


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A directory with pytorch_model*.bin, or a .gguf file.")
    ],
    output: options.Output = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    dtype: options.Dtype = "keep",
    max_shard_size: options.MaxShardSize = "5GB",
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Turn pytorch_model*.bin or a .gguf file into a safetensors checkpoint."""
    import surgeon
    from surgeon.cli import write

    write.run(
        surgeon.convert(source, staging=output.absolute().parent if output else Path.cwd()),
        write.WriteOptions(output, overwrite, dry_run, dtype, max_shard_size, json, quiet, push_to_hub, private),
    )
