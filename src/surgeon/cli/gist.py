"""`surgeon gist`."""

from typing import Annotated

import typer

from surgeon.cli.command import Device, Model, Writing, run, spread
from surgeon.options import keywords_of
from surgeon.verbs import gist as verb

GROUP = "surgery"
EXAMPLE = "surgeon gist gpt2 --tokens 4 -o gpt2-gist"


@spread
def gist(
    model: Model,
    options: verb.GistOptions,
    check: Annotated[
        bool, typer.Option("--check", help="Load the model, measure whether it can use gists, and write nothing.")
    ] = False,
    device: Device = "cpu",
    *,
    writing: Writing,
) -> None:
    """Add gist tokens to a model: prompts are then compressed into their activations."""
    if check:
        _check(model, revision=options.revision, device=device, json=writing.json, quiet=writing.quiet)
        return
    run(verb.add_gist(model, **keywords_of(options)), writing)


def _check(model: str, *, revision: str | None, device: str, json: bool, quiet: bool) -> None:
    """Print whether a model can have gists. Exits with 1 where it cannot."""
    from surgeon.cli.terminal import emit, emit_json, log
    from surgeon.gist.support import check_checkpoint

    if not quiet:
        log(f"loading {model} in float32 to measure it")
    support = check_checkpoint(model, revision=revision, device=device)
    emit_json(support.to_dict()) if json else emit(support.to_text())
    if not support.supported:
        raise typer.Exit(1)
