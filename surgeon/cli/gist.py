"""`surgeon gist`."""

from typing import Annotated

import typer

from surgeon.cli import options


@options.writes
def gist(
    model: options.Model,
    tokens: Annotated[int, typer.Option(metavar="K", help="Tokens of a gist.")] = 1,
    distinct: Annotated[
        bool, typer.Option("--distinct", help="Add K tokens, one for each place, not one that is repeated.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Load the model, measure whether it can be gisted, and write nothing.")
    ] = False,
    device: options.Device = "cpu",
    revision: options.Revision = None,
    *,
    writing: options.Writing,
) -> None:
    """Add gist tokens to a model, for prompts that are compressed into their activations."""
    import surgeon
    from surgeon.cli import write

    if check:
        _check(model, revision=revision, device=device, json=writing.json, quiet=writing.quiet)
        return
    write.run(surgeon.add_gist(model, tokens=tokens, distinct=distinct, revision=revision), writing)


def _check(model: str, *, revision: str | None, device: str, json: bool, quiet: bool) -> None:
    """Print whether a model can be gisted. Exits with 1 where it cannot."""
    from surgeon.cli.terminal import emit, emit_json, log
    from surgeon.gist.support import check_checkpoint

    if not quiet:
        log(f"loading {model} in float32 to measure it")
    found = check_checkpoint(model, revision=revision, device=device)
    emit_json(found.to_dict()) if json else emit(found.to_text())
    if not found.supported:
        raise typer.Exit(1)
