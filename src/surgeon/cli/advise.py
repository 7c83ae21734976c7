"""`surgeon advise`."""

from surgeon.cli.command import Debug, Json, Model, Quiet, data_words, emit_next, spread
from surgeon.cli.terminal import emit, emit_json
from surgeon.options import keywords_of
from surgeon.verbs import advise as verb

GROUP = "inspection"
EXAMPLE = "surgeon advise SmolLM2-135M --data text.txt --epochs 3"


@spread
def advise(
    model: Model,
    options: verb.AdvisingOptions,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say before training what a model can do with data: hold it, over-fit on it, and how many tokens heal a cut."""
    advice = verb.advise(model, **keywords_of(options))
    if json:
        emit_json(advice.to_dict())
        return
    emit(advice.to_text())
    epochs = f"{options.epochs:g}"
    emit_next("finetune", model, *data_words(options.data, options.columns), "--epochs", epochs)
