"""What every command that writes a checkpoint does with its surgery: preview or save, print, push."""

import shlex
import sys

from surgeon.cli.display import emit, emit_json, log
from surgeon.cli.options import Writing
from surgeon.cli.progress import ByteProgress
from surgeon.surgery import Surgery

VERIFIED_BELOW = 1_000_000_000  # parameters; a larger result is verified on request, for it takes a while


def run(surgery: Surgery, options: Writing, *, verify: bool | None = False) -> None:
    """Carry a surgery out as the options say, and print what came of it.

    With `verify` the result is loaded and compared with its source before it is pushed; None: where it is small.
    """
    preview = surgery.summary(options.output, dtype=options.dtype, max_shard_size=options.max_shard_size)
    if options.dry_run:
        emit_json(preview.to_dict()) if options.json else emit(preview.to_text())
        return
    for note in () if options.quiet else preview.notes[len(surgery.plan.notes) :]:
        log(f"note: {note}")  # what the dtype will cost is worth a Ctrl-C before it is paid
    with ByteProgress(preview.bytes_written, quiet=options.quiet) as progress:
        summary = surgery.save(
            options.output,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            progress=progress,
            command=shlex.join(["surgeon", *sys.argv[1:]]),
        )
    verification = None
    if verify or (verify is None and summary.parameters[1] < VERIFIED_BELOW):
        from surgeon.verification import loadable
        from surgeon.verification import verify as compare

        source, revision = loadable(surgery.source)
        verification = compare(source, summary.output, revision=revision)
    url = None
    if options.push_to_hub is not None:
        from surgeon.checkpoint.push import push

        url = push(summary.output, options.push_to_hub, private=options.private)
        log(f"uploaded to {url}")
    if options.json:
        verified = {"verification": verification.to_dict()} if verification else {}
        emit_json(summary.to_dict() | verified | ({"url": url} if url else {}))
    else:
        emit(summary.to_text(done=True, found=verification.rows() if verification else ()))
