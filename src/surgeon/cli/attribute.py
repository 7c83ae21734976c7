"""`surgeon attribute`."""

from surgeon.cli.command import Debug, Json, Model, Quiet, data_words, emit_next, spread
from surgeon.cli.terminal import emit, emit_json
from surgeon.options import keywords_of
from surgeon.verbs import attribute as verb

GROUP = "inspection"
EXAMPLE = "surgeon attribute tuned --data train.jsonl --query questions.jsonl -o taught"


@spread
def attribute(
    model: Model,
    options: verb.AttributionOptions,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show which rows of the training data taught a model what it does on a query, and which stood in its way."""
    found = verb.attribute(model, **keywords_of(options))
    if json:
        emit_json(found.to_dict())
        return
    emit(found.to_text())
    if options.data:
        asked = [word for name in options.query for word in ("--select-for", name)]
        emit_next("finetune", "CUT-MODEL", *data_words(options.data, options.columns), "--select", "5%", *asked)
