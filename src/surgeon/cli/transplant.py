"""`surgeon transplant`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgeon.cli import clock, command
from surgeon.cli.command import Model, Writing, spread
from surgeon.options import keywords_of
from surgeon.verbs import transplant as verb

GROUP = "surgery"
EXAMPLE = "surgeon transplant SmolLM2-135M --tokenizer gemma-3-270m -o SmolLM2-in-gemma"


@spread
def transplant(model: Model, options: verb.TransplantOptions, writing: Writing) -> None:
    """Give a model another tokenizer, with a row for each of its tokens."""
    surgery = verb.transplant(model, **keywords_of(replace(options, measure=False)))
    if not writing.dry_run:
        command.check(surgery, writing)  # before rows are computed, which may take minutes
        with clock.part("matching"):
            surgery = surgery.computed()
    command.run(surgery, writing, report=TransplantReport(surgery))


@dataclass(frozen=True)
class TransplantReport:
    """Reports how many rows each rule gave before the result is written, and its bits per byte afterwards."""

    surgery: verb.Transplanting

    def preview(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return how many rows each rule gave, as rows for people and as entries for JSON."""
        return self.surgery.told()

    def after(self, output: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return the bits per byte, measured once the result is there."""
        return verb.report(self.surgery, output)
