"""`surgeon init`."""

from typing import Annotated

import typer

from surgeon.cli.command import Writing, run, spread
from surgeon.options import keywords_of
from surgeon.verbs import init as verb

GROUP = "surgery"
EXAMPLE = "surgeon init gpt2 --set n_layer=8 --set n_embd=96 --set n_head=4 --tokenizer bytes -o small"
ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A model type (gpt2), a config.json, a directory, or a Hub id.")
]


@spread
def init(config: ConfigArgument, options: verb.InitOptions, writing: Writing) -> None:
    """Make a model with random weights from a config."""
    run(verb.init(config, **keywords_of(options)), writing)
