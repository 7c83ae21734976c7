"""The verb `trace`: which of several candidates a checkpoint comes from, and how."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgeon.checkpoint.source import Source
from surgeon.options import (
    Checked,
    check_counts,
    check_seed,
    option,
    progress_option,
    revision_option,
    seed_option,
    takes,
)
from surgeon.surgery import open_source

if TYPE_CHECKING:
    from surgeon.lineage.record import Trace
    from surgeon.progress import Progress


@dataclass(frozen=True, kw_only=True)
class TracingOptions(Checked):
    """The options of the command `trace` that decide what is found."""

    candidates: Sequence[str] = option(
        "A model that it may come from: a directory, or a Hub id (id@REVISION). Repeatable, or all after the first. "
        "Default: the models that the child's own files name.",
        (),
        metavar="MODEL",
        reads=True,
        group="source",
    )
    quick: bool = option(
        "Stop once the layers are known: compare no neurons, heads or tensors.", False, group="what is measured"
    )
    permutations: int = option(
        "Permutations of the hidden state, for the p-value; its least is 1 / (N + 1).",
        999,
        metavar="N",
        group="what is measured",
    )
    seed: int = seed_option()
    revision: str | None = revision_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "permutations", least=19)  # fewer never reach 0.05
        check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class TraceOptions(TracingOptions):
    """The options of `surgeon.trace`."""

    progress: "Progress | bool | None" = progress_option()


@takes(TraceOptions)
def trace(child: str | os.PathLike[str], options: TraceOptions) -> "Trace":
    """Return where a checkpoint comes from, among candidates: the nearest one, its layers, its axes, and what was done.

    Claims of the child's own files are held against the weights, of which a few ranges are read. The layers are found
    by norm gains and a few rows of each; the p-value is of the gains, under permutations of the hidden state that are
    the same for all layers. Neurons and heads are found by columns, then tensors are compared: identical, cast,
    trained, a merged LoRA, on the grid of a quantization, or a mean of several candidates.

    Raises CheckpointError for a model type without a table, codes that are not read, and a child that names no model.

        trace = surgeon.trace("gpt2-large-30", candidates=["gpt2-large"])
        print(trace.layers, trace.looks_like, trace.p)
    """
    from surgeon.lineage.tracing import How, claimed_candidates, traced

    source = open_source(child, revision=options.revision)
    names = [os.fspath(name) for name in options.candidates] or claimed_candidates(source)
    alone = {os.path.realpath(name) if os.path.lexists(name) else name: name for name in reversed(names)}
    candidates = [_opened(name) for name in reversed(alone.values())]
    return traced(source, candidates, How(options.permutations, options.seed, options.quick))


def _opened(name: str) -> Source:
    """Return a candidate: a directory, a Hub id, or one with @ and a revision."""
    place, at, revision = name.rpartition("@")
    return open_source(place, revision=revision) if at and not os.path.lexists(name) else open_source(name)
