"""`surgeon inspect`."""

from dataclasses import dataclass
from pathlib import Path

from surgeon.cli.command import Debug, Json, Model, spread
from surgeon.cli.terminal import emit, emit_json
from surgeon.options import Checked, keywords_of, option, overwrite_option, reads_of
from surgeon.verbs import inspect as verb

GROUP = "inspection"
EXAMPLE = "surgeon inspect gpt2-large"
SHOWN = "what is shown"


@dataclass(frozen=True, kw_only=True)
class ShownOptions(Checked):
    """The options for what is shown, and where."""

    tensors: bool = option("List every tensor.", False, group=SHOWN)
    filter: str | None = option("Of the tensors those so named: '*.mlp.*'.", None, metavar="PATTERN", group=SHOWN)
    plot: Path | None = option(
        "Draw the layers to this .png, .svg or .pdf.", None, metavar="FILE", writes=True, group=SHOWN
    )
    overwrite: bool = overwrite_option("Replace an existing picture.")


@spread
def inspect(
    model: Model,
    options: verb.InspectOptions,
    showing: ShownOptions,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint is: family, sizes, each layer's attention, MLP and parameters."""
    plot = showing.plot
    if plot is not None:
        from surgeon.plots.figure import check_picture, save

        check_picture(plot, reads_of(options) | {"MODEL": (model,)}, overwrite=showing.overwrite, option="plot")
    inspection = verb.inspect(model, **keywords_of(options))
    if plot is not None:
        save(inspection.draw(), plot)
    lists, names = showing.tensors or showing.filter is not None, showing.filter or "*"
    if json:
        pictures = {} if plot is None else {"pictures": [str(plot)]}
        emit_json(inspection.to_dict(tensors=lists, names=names) | pictures)
    else:
        drawn = "" if plot is None else f"\n\n  picture  {plot}"
        emit(inspection.to_text(tensors=lists, names=names) + drawn)
