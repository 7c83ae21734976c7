"""The verb `truncate`: keep the first layers of a model, or every second one."""

import os
from collections.abc import Collection
from dataclasses import dataclass, replace

from surgeon.options import Checked, OptionError, Verb, check_counts, option, revision_option, seed_option, takes, words
from surgeon.surgery import Surgery, open_model
from surgeon.transforms.layers import check_depth, check_parts
from surgeon.transforms.layers import truncate as plan_truncate

NONE = "none"  # the empty list, which the command line could not write


def _parts(text: str) -> list[str]:
    """Return the parts in "attention,mlp"; of "none" there are none."""
    return [] if text.strip() == NONE else words(text)


VERB = Verb(counts_layers=True, plans="truncate", then="finetune {output} {data} --teacher {source}")


@dataclass(frozen=True, kw_only=True)
class TruncateOptions(Checked):
    """The options of `truncate`."""

    layers: int | str | None = option(
        "Keep the first N layers: 12, or 50% of the source's.", None, metavar="N", group="what is kept"
    )
    every: int | None = option(
        "Keep every N-th layer from the first on: 2 keeps 0, 2, 4 ...", None, metavar="N", group="what is kept"
    )
    inherit: Collection[str] | None = option(
        "Keep only these parts of the source (attention,mlp,norm,embedding; none); initialise the rest at random. "
        "Default: all.",
        None,
        metavar="PARTS",
        parse=_parts,
        group="what is kept",
    )
    seed: int = seed_option()
    revision: str | None = revision_option()

    def __post_init__(self) -> None:
        """Raise OptionError unless one option says which layers stay."""
        super().__post_init__()
        if (self.layers is None) == (self.every is None):
            missing, double = "is missing: give it, or --every 2", "and --every both say which layers stay"
            fault = missing if self.layers is None else double
            raise OptionError("layers", f"--layers {fault}", hint="Give --layers 12, or --every 2.")
        if self.layers is not None:
            check_depth(self.layers)
        check_counts(self, "every", least=2)
        check_parts(self.inherit or ())


@takes(TruncateOptions)
def truncate(model: "str | os.PathLike[str] | Surgery", options: TruncateOptions) -> Surgery:
    """Return the surgery that keeps the first layers of `model`: a checkpoint directory, a Hub id, or a surgery.

    With `every`, it keeps layers 0, `every`, 2 `every` and so on, as DistilBERT's students begin.

    Raises PlanError when the model has fewer layers or cannot be cut.

        surgeon.truncate("gpt2-large", layers=6).save("gpt2-large-6")
    """
    begun = open_model(model, revision=options.revision)
    plan = plan_truncate(begun.anatomy, options.layers, every=options.every, inherit=options.inherit, seed=options.seed)
    return replace(begun, plan=begun.plan.then(plan))
