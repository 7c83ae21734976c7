"""How a command carries out its surgery: preview or write, verify, push, print."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from surgeon.cli.terminal import ByteProgress, emit, emit_json, log
from surgeon.options import option
from surgeon.surgery import Draft, Surgery

VERIFIED_BELOW = 1_000_000_000  # parameters; a larger result is verified on request, for it takes a while


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """The options of every command that writes a checkpoint."""

    output: Path | None = option(
        "Where the result goes. Default: the model's name with what was done.",
        None,
        names=("--output", "-o"),
        metavar="DIR",
    )
    overwrite: bool = option("Replace an existing output once the new one is complete.", False)
    dry_run: bool = option("Print the plan and write nothing; reads no weights.", False)
    dtype: str = option("keep (the source's bytes), float32, bfloat16 or float16.", "keep", metavar="DTYPE")
    max_shard_size: str = option("Largest weight file: 5GB, 500MB.", "5GB", metavar="SIZE")
    push_to_hub: str | None = option("Upload the finished output to this Hub repository.", None, metavar="REPO")
    private: bool = option("Make the Hub repository private if it is created.", False)
    json: bool = option("Print one JSON object on standard output and nothing else.", False)
    quiet: bool = option("No progress.", False, names=("--quiet", "-q"))
    debug: bool = option("Full tracebacks.", False)


class Report(Protocol):
    """A command's additions to the summary: rows for people, and entries for JSON."""

    def preview(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return the additions that are known before anything is written."""

    def after(self, output: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return the additions that need the result."""


def check(surgery: Surgery, writing: Writing) -> None:
    """Raise the errors that writing would raise before it begins: an existing output, an impossible option."""
    _draft(surgery, writing).check(overwrite=writing.overwrite)


def run(surgery: Surgery, writing: Writing, *, verify: bool | None = False, report: Report | None = None) -> None:
    """Carry a surgery out and print its summary.

    With `verify` the result is loaded and compared with its source before it is pushed; None: where it is small.
    """
    draft = _draft(surgery, writing)
    rows, entries = report.preview() if report else ([], {})
    if writing.dry_run:
        emit_json(draft.summary.to_dict() | entries) if writing.json else emit(draft.summary.to_text(rows=rows))
        return
    for note in () if writing.quiet else draft.plan.notes[len(surgery.plan.notes) :]:
        log(f"note: {note}")  # the cost of the dtype, in time for a Ctrl-C
    command = shlex.join(["surgeon", *sys.argv[1:]])
    with ByteProgress(draft.summary.bytes_written, quiet=writing.quiet) as progress:
        summary = draft.write(overwrite=writing.overwrite, progress=progress, command=command)
    if verify or (verify is None and summary.parameters[1] < VERIFIED_BELOW):
        from surgeon.models.loading import loadable
        from surgeon.verbs.verify import verify as compare

        source, revision = loadable(surgery.source)
        verification = compare(source, summary.output, revision=revision)
        rows += verification.rows()
        entries["verification"] = verification.to_dict()
    if report:
        more = report.after(summary.output)
        rows, entries = rows + more[0], entries | more[1]
    if writing.push_to_hub is not None:
        from surgeon.checkpoint.hub import push

        entries["url"] = push(summary.output, writing.push_to_hub, private=writing.private)
        log(f"uploaded to {entries['url']}")
    emit_json(summary.to_dict() | entries) if writing.json else emit(summary.to_text(done=True, rows=rows))


def _draft(surgery: Surgery, writing: Writing) -> Draft:
    return surgery.prepare(writing.output, dtype=writing.dtype, max_shard_size=writing.max_shard_size)
