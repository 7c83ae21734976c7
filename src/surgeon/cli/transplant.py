"""`surgeon transplant`."""

from dataclasses import replace

from surgeon.cli import clock, command
from surgeon.cli.command import Model, Writing, spread
from surgeon.options import keywords_of
from surgeon.verbs import transplant as verb
from surgeon.verbs.judging import JudgedReport

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
    command.run(surgery, writing, report=JudgedReport(surgery.told(), surgery.judging))
