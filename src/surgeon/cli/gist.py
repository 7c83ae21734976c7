"""`surgeon gist`."""

from dataclasses import dataclass

import typer

from surgeon.cli.command import Model, Writing, run, spread
from surgeon.options import Checked, device_option, keywords_of, option
from surgeon.verbs import gist as verb

GROUP = "surgery"
EXAMPLE = "surgeon gist gpt2 --tokens 4 -o gpt2-gist"


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Checked):
    """Whether the model is only measured, and where."""

    check: bool = option("Load the model, measure whether it can use gists, and write nothing.", False, group="gists")
    device: str = device_option("cpu")


@spread
def gist(model: Model, options: verb.GistOptions, checking: CheckOptions, writing: Writing) -> None:
    """Add gist tokens to a model: prompts are then compressed into their activations."""
    if checking.check:
        _check(model, revision=options.revision, device=checking.device, json=writing.json, quiet=writing.quiet)
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
