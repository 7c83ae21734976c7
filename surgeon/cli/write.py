"""What every command that writes a checkpoint does with its surgery: preview or save, print, push."""

import shlex
import sys
from pathlib import Path
from typing import Any, Protocol

from surgeon.checkpoint.output import check_target
from surgeon.cli.options import Writing
from surgeon.cli.terminal import ByteProgress, emit, emit_json, log
from surgeon.surgery import Surgery

VERIFIED_BELOW = 1_000_000_000  # parameters; a larger result is verified on request, for it takes a while


class Report(Protocol):
    """What a command says beside the summary: rows for people, and entries for JSON."""

    def preview(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return what is known before anything is written."""

    def after(self, output: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return what is known once the result is there."""


def check(surgery: Surgery, options: Writing) -> None:
    """Raise what writing would raise before it begins: an output that exists, options that make no sense."""
    surgery.summary(options.output, dtype=options.dtype, max_shard_size=options.max_shard_size)
    target = options.output or Path(surgery.name)
    check_target(target, overwrite=options.overwrite, source=surgery.source.origin)


def run(surgery: Surgery, options: Writing, *, verify: bool | None = False, report: Report | None = None) -> None:
    """Carry a surgery out as the options say, and print what came of it.

    With `verify` the result is loaded and compared with its source before it is pushed; None: where it is small.
    """
    preview = surgery.summary(options.output, dtype=options.dtype, max_shard_size=options.max_shard_size)
    rows, entries = report.preview() if report else ([], {})
    if options.dry_run:
        emit_json(preview.to_dict() | entries) if options.json else emit(preview.to_text(found=rows))
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
        from surgeon.models.loading import loadable
        from surgeon.verbs.verify import verify as compare

        source, revision = loadable(surgery.source)
        verification = compare(source, summary.output, revision=revision)
    if verification:
        rows += verification.rows()
        entries["verification"] = verification.to_dict()
    if report:
        more = report.after(summary.output)
        rows, entries = rows + more[0], entries | more[1]
    if options.push_to_hub is not None:
        from surgeon.checkpoint.hub import push

        url = push(summary.output, options.push_to_hub, private=options.private)
        log(f"uploaded to {url}")
        entries["url"] = url
    if options.json:
        emit_json(summary.to_dict() | entries)
    else:
        emit(summary.to_text(done=True, found=rows))
