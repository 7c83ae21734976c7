"""`surgeon trim`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.cli import command
from surgeon.cli.command import Model, Writing, spread
from surgeon.options import keywords_of
from surgeon.verbs import trim as verb

GROUP = "surgery"
EXAMPLE = "surgeon trim SmolLM2-135M --data english.txt --coverage 99.99% -o SmolLM2-english"


@spread
def trim(model: Model, options: verb.TrimOptions, writing: Writing) -> None:
    """Keep only the tokens that a text uses: a smaller vocabulary, with the same logits."""
    surgery = verb.trim(model, **keywords_of(options))
    command.run(surgery, writing, report=TrimReport(surgery), columns=options.columns)


@dataclass(frozen=True)
class TrimReport:
    """Reports what stays before the result is written, and its bits per byte afterwards."""

    surgery: verb.Trimming

    def preview(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return what stays, as rows for people and as entries for JSON."""
        return self.surgery.told()

    def after(self, output: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return the bits per byte, measured once the result is there."""
        return verb.report(self.surgery, output)
