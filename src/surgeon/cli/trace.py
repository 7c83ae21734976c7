"""`surgeon trace`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surgeon.cli.command import Debug, Json, Model, Quiet, spread
from surgeon.cli.terminal import emit, emit_json
from surgeon.errors import VerificationError
from surgeon.options import Checked, keywords_of, option, overwrite_option, reads_of
from surgeon.verbs import trace as verb

GROUP = "inspection"
EXAMPLE = "surgeon trace gpt2-large-30 --candidates gpt2-large gpt2"


@dataclass(frozen=True, kw_only=True)
class ShownOptions(Checked):
    """More candidates, and where the picture goes."""

    others: Sequence[str] = option(
        "More candidates, after the first one: --candidates A B C.",
        (),
        metavar="CANDIDATES",
        reads=True,
        is_argument=True,
    )
    check: bool = option(
        "End with status 1 where the weights contradict what the child's files say.", False, group="what is shown"
    )
    plot: Path | None = option(
        "Draw the map of the layers to this .png, .svg or .pdf.", None, metavar="FILE", writes=True, group="output"
    )
    overwrite: bool = overwrite_option("Replace an existing picture.")


@spread
def trace(
    model: Model,
    options: verb.TracingOptions,
    showing: ShownOptions,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find out which model a checkpoint comes from, and how, from a few of its bytes."""
    options = replace(options, candidates=(*options.candidates, *showing.others))
    if showing.plot is not None:
        from surgeon.plots.figure import check_picture, save

        check_picture(showing.plot, reads_of(options) | {"MODEL": (model,)}, overwrite=showing.overwrite, option="plot")
    found = verb.trace(model, **keywords_of(options))
    if showing.plot is not None:
        save(found.draw(), showing.plot)
    pictures = {} if showing.plot is None else {"pictures": [str(showing.plot)]}
    if json:
        emit_json(found.to_dict() | pictures)
    else:
        emit(found.to_text() + ("" if showing.plot is None else f"\n\n  picture  {showing.plot}"))
    if showing.check and found.disagreements:
        raise VerificationError(
            f"the weights contradict what {model} says: {found.disagreements[0]}",
            hint="Look at the layers above; a file of it was edited, or belongs to another checkpoint.",
        )
