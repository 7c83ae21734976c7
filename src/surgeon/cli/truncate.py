"""`surgeon truncate`."""

from surgeon.cli.command import Model, Writing, run, spread
from surgeon.options import keywords_of
from surgeon.verbs import truncate as verb

GROUP = "surgery"
EXAMPLE = "surgeon truncate gpt2-large --layers 6 -o gpt2-large-6"


@spread
def truncate(model: Model, options: verb.TruncateOptions, writing: Writing) -> None:
    """Keep the first N layers of a model (Inheritune)."""
    run(verb.truncate(model, **keywords_of(options)), writing)
