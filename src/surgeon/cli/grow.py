"""`surgeon grow`."""

from typing import Annotated

import typer

from surgeon.cli.command import Model, Writing, run, spread
from surgeon.options import keywords_of
from surgeon.verbs import grow as verb

GROUP = "surgery"
EXAMPLE = "surgeon grow gpt2 --layers 16 --hidden-size 2x -o gpt2-grown"
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Load the result and compare its logits with the source's. Default: below 1 B parameters.",
        rich_help_panel="run",
    ),
]


@spread
def grow(model: Model, options: verb.GrowOptions, verify: Verify = None, *, writing: Writing) -> None:
    """Make a model deeper and wider, with its function kept."""
    run(verb.grow(model, **keywords_of(options)), writing, verify=verify)
