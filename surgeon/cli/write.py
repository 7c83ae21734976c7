"""What every command that writes a checkpoint does with its surgery: preview or save, print, push."""

import shlex
import sys

from surgeon.cli.display import emit, emit_json, log
from surgeon.cli.options import Writing
from surgeon.cli.progress import ByteProgress
from surgeon.surgery import Surgery


def run(surgery: Surgery, options: Writing) -> None:
    """Carry a surgery out as the options say, and print what came of it."""
    preview = surgery.summary(options.output, dtype=options.dtype, max_shard_size=options.max_shard_size)
    if options.dry_run:
        emit_json(preview.to_dict()) if options.json else emit(preview.to_text())
        return
    with ByteProgress(preview.bytes_written, quiet=options.quiet) as progress:
        summary = surgery.save(
            options.output,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            progress=progress,
            command=shlex.join(["surgeon", *sys.argv[1:]]),
        )
    url = None
    if options.push_to_hub is not None:
        from surgeon.checkpoint.push import push

        url = push(summary.output, options.push_to_hub, private=options.private)
        log(f"uploaded to {url}")
    if options.json:
        emit_json(summary.to_dict() | ({"url": url} if url else {}))
    else:
        emit(summary.to_text(done=True))
