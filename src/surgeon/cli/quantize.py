"""`surgeon quantize`."""

from surgeon.cli.command import Model, Writing, run, spread
from surgeon.options import keywords_of
from surgeon.verbs import quantize as verb

GROUP = "surgery"
EXAMPLE = "surgeon quantize SmolLM2-135M --bits 8 --data text.txt -o SmolLM2-int8"


@spread
def quantize(model: Model, options: verb.QuantizeOptions, writing: Writing) -> None:
    """Store the weights of linear maps in 8 or 4 bits, through a kept library."""
    surgery = verb.quantize(model, **keywords_of(options))
    run(surgery, writing, report=surgery, columns=options.columns)
