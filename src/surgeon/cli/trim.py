"""`surgeon trim`."""

from surgeon.cli import command
from surgeon.cli.command import Model, Writing, spread
from surgeon.options import keywords_of
from surgeon.verbs import trim as verb
from surgeon.verbs.judging import JudgedReport

GROUP = "surgery"
EXAMPLE = "surgeon trim SmolLM2-135M --data english.txt --coverage 99.99% -o SmolLM2-english"


@spread
def trim(model: Model, options: verb.TrimOptions, writing: Writing) -> None:
    """Keep only the tokens that a text uses: a smaller vocabulary, with the same logits."""
    surgery = verb.trim(model, **keywords_of(options))
    command.run(surgery, writing, report=JudgedReport(surgery.told(), surgery.judging), columns=options.columns)
