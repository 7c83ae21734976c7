"""`surgeon merge`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from surgeon.cli.command import Writing, check, run, spread
from surgeon.options import keywords_of
from surgeon.surgery import Surgery
from surgeon.verbs import merge as verb

GROUP = "surgery"
EXAMPLE = "surgeon merge finetune-a finetune-b --weights 0.3,0.7 -o merged"

First = Annotated[str | None, typer.Argument(metavar="MODEL", help="The first model: it gives config and tokenizer.")]


@dataclass(frozen=True)
class _Told:
    """What --json prints beside the summary: the method, the models and their weights."""

    surgery: Surgery

    def preview(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        return [], verb.told(self.surgery)

    def after(self, output: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        return [], {}


@spread
def merge(model: First = None, *, options: verb.MergeOptions, writing: Writing) -> None:
    """Make one model of several, each number rounded once."""
    planned = verb.merge(model, **keywords_of(replace(options, measure=False)))
    surgery = planned
    if not writing.dry_run and (options.base is not None or options.data):
        check(planned, writing)  # an output that exists is refused before weights are read
        surgery = verb.merge(model, **keywords_of(options))
    run(surgery, writing, report=_Told(surgery))
