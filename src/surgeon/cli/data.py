"""`surgeon data`."""

from dataclasses import dataclass

from surgeon.cli.command import Debug, Json, Quiet, spread
from surgeon.cli.terminal import emit, emit_json
from surgeon.options import Checked, keywords_of, option
from surgeon.verbs import data as verb

GROUP = "training"
EXAMPLE = "surgeon data question-formation --lines 20000 -o questions"


@dataclass(frozen=True, kw_only=True)
class KindOptions(Checked):
    """What to make."""

    kind: str = option("What to make: question-formation.", metavar="KIND", choices=verb.KIND, is_argument=True)


@spread
def data(
    made: KindOptions, *, options: verb.DataOptions, json: Json = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Make text of a known grammar, with a tokenizer and its entropy."""
    found = verb.generate_data(made.kind, **keywords_of(options))
    emit_json(found.to_dict()) if json else emit(found.to_text())
