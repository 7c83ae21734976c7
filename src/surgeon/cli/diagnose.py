"""`surgeon diagnose`."""

from surgeon.cli.command import Debug, Json, Model, Quiet, data_words, emit_next, spread
from surgeon.cli.terminal import emit, emit_json
from surgeon.options import keywords_of
from surgeon.verbs import diagnose as verb

GROUP = "inspection"
EXAMPLE = "surgeon diagnose gpt2-large --data text.txt --plot gpt2-large.png"


@spread
def diagnose(
    model: Model,
    options: verb.DiagnosisOptions,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what attention looks at in each layer, and what each layer is worth."""
    diagnosis = verb.diagnose(model, **keywords_of(options))
    if json:
        emit_json(diagnosis.to_dict())
        return
    emit(diagnosis.to_text())
    data = data_words(options.data, options.columns)
    emit_next("prune", model, "--score", "block-influence", "--layers", "80%", *data)
