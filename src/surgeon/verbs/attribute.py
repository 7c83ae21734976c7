"""The verb `attribute`: which rows of the training data taught a model what it does on a query."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from surgeon.checkpoint.output import check_apart, check_target
from surgeon.checkpoint.source import Source
from surgeon.data.documents import check_there
from surgeon.errors import OutputError, PlanError
from surgeon.options import (
    Checked,
    OptionError,
    Reads,
    check_counts,
    check_seed,
    columns_option,
    device_option,
    flag_of,
    option,
    output_option,
    overwrite_option,
    progress_option,
    reads_of,
    revision_option,
    seed_option,
    takes,
    trust_option,
)
from surgeon.progress import Progress
from surgeon.train.run_dir import Request, begun
from surgeon.train.settings import TRAIN_ON
from surgeon.verbs.finetune import TrainingOptions, opened, task_of

if TYPE_CHECKING:
    from surgeon.attribution.result import Attribution
    from surgeon.train.task import Task

METHODS = ("trak", "less", "cosine", "tracin", "bm25")
_OF_THE_RUN = ("sequence_length", "train_on", "columns", "revision")


@dataclass(frozen=True, kw_only=True)
class AttributionOptions(Checked):
    """The options of the command `attribute`."""

    data: Sequence[str] = option(
        "The training data, as finetune reads it. Repeatable. Default for a run's directory: what the run trained.",
        (),
        metavar="DATA",
        reads=True,
        group="data",
    )
    query: Sequence[str] = option(
        "Texts or records that the model does; each document is one query. Repeatable.",
        (),
        metavar="DATA",
        reads=True,
        group="data",
    )
    columns: str | None = columns_option()
    sequence_length: int | None = option(
        "Tokens of a row at most. Default: the run's; else 1024, or the model's maximum if smaller.",
        None,
        metavar="T",
        group="data",
    )
    train_on: str | None = option(
        "The loss of a record is of its answer (completion) or of prompt and answer (all). Default: completion.",
        None,
        metavar="M",
        choices=TRAIN_ON,
        group="data",
    )
    method: str = option(
        "trak (with a ridge), less (Adam's steps), cosine, tracin (dot products), or bm25 (words alone).",
        "trak",
        metavar="NAME",
        choices=METHODS,
        group="what is measured",
    )
    checkpoints: Sequence[str] = option(
        "Another checkpoint of the same training; scores are averaged over all. Repeatable.",
        (),
        metavar="MODEL",
        reads=True,
        group="what is measured",
    )
    ridge: float = option(
        "With trak: added to the covariance of gradients, as a part of their mean square.",
        0.01,
        metavar="R",
        group="what is measured",
    )
    projection: str = option(
        "Sides of each map's gradient after a random projection: auto (as wide as 2 GB hold), none, or a number.",
        "auto",
        metavar="K",
        group="what is measured",
    )
    top: int = option("Rows shown of either kind.", 5, metavar="N", group="what is shown")
    packing: bool = option(
        "Let rows share sequences, as training does; the scores are the same.",
        False,
        group="numbers",
    )
    batch_size: int | None = option(
        "Sequences of a batch. Default: as many as have 2048 tokens.", None, metavar="N", group="numbers"
    )
    output: str | os.PathLike[str] | None = output_option(
        "Where scores.parquet and attribution.json go. Default: MODEL-attribution."
    )
    overwrite: bool = overwrite_option("Replace an attribution that is there.")
    device: str = device_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()
    seed: int = seed_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.query:
            hint = "Such as --query questions.jsonl."
            raise OptionError("query", "--query is missing: what did the rows teach?", hint=hint)
        check_counts(self, "top", "batch_size")
        check_counts(self, "sequence_length", least=2)
        check_seed(self.seed)
        if not 0 < self.ridge < 1e6:
            said = f"--ridge is {self.ridge:g}; without one the covariance has no inverse"
            raise OptionError("ridge", said, hint="Such as --ridge 0.01.")
        _ = self.side

    @property
    def side(self) -> int | None:
        """The side of projections: None where it is chosen, 0 for no projection. Raises OptionError for no number."""
        known = {"auto": None, "none": 0}
        if self.projection in known:
            return known[self.projection]
        if not self.projection.isascii() or not self.projection.isdigit() or int(self.projection) < 1:
            raise OptionError(
                "projection", f"--projection {self.projection!r} is no number", hint="Such as --projection 16."
            )
        return int(self.projection)


@dataclass(frozen=True, kw_only=True)
class AttributeOptions(AttributionOptions):
    """The options of `surgeon.attribute`."""

    progress: Progress | bool | None = progress_option()


@takes(AttributeOptions)
def attribute(model: str | os.PathLike[str], options: AttributeOptions) -> "Attribution":
    """Return which rows of the training data helped and harmed each query, and write the scores of all rows.

    `model` is a checkpoint directory, a Hub model, or the directory of a run of `finetune`: then its checkpoints, its
    data, its settings and what it trained are the run's. A row is a document, or a piece of a text that is longer than
    a sequence. Its gradient is that of its mean loss, as the run trains it, for the weights of the linear maps that are
    trained; embeddings, norms and the head of a language model are left out. Of several checkpoints scores are
    averaged.

    What is computed is kept in OUTPUT.partial until all is written; the same call goes on.

    Raises DataError, PlanError, MeasureError, OutputError.

        found = surgeon.attribute("gpt2", data=["text.txt"], query=["questions.jsonl"], output="taught", top=3)
        print(found)
    """
    from surgeon.models.loading import runs

    began = monotonic()
    if find_spec("pyarrow") is None:
        raise PlanError("pyarrow is needed to write scores.parquet", hint='pip install "surgeon[data]"')
    check_there((*options.data, *options.query))
    target = Path(options.output or f"{Path(model).name or Path(model).resolve().name}-attribution")
    _check_place(target, reads_of(options) | {"MODEL": (os.fspath(model),)}, overwrite=options.overwrite)
    run = begun(Path(model))
    if run is not None:
        source, task, data = _of_run(run, options)
    else:
        source, task, data = _of_model(model, options)
    with runs(source.label, trust_remote_code=options.trust_remote_code):
        from surgeon.attribution.attributing import Attributed, How

        how = How(
            side=options.side,
            **{name: getattr(options, name) for name in ("method", "ridge", "packing", "batch_size", "seed")},
        )
        place = None if run is None else Path(model)
        asked = (source, task, data, options.query, options.checkpoints, place, _processes(run), options.device)
        found = Attributed(*asked).attribute(how, target, top=options.top, overwrite=options.overwrite)
    return replace(found, seconds=monotonic() - began)


def _of_model(model: str | os.PathLike[str], options: AttributeOptions) -> "tuple[Source, Task, Sequence[str]]":
    """Return a model, the task whose loss its rows have, and their data."""
    if not options.data:
        raise OptionError(
            "data", "--data is missing: which rows may have taught it?", hint="Or name the directory of a run."
        )
    source = opened(model, options.revision)
    chosen = {name: value for name in _OF_THE_RUN[:3] if (value := getattr(options, name)) is not None}
    training = TrainingOptions(**chosen, eval_fraction=0.0, precision="float32", seed=options.seed)
    return source, task_of(source, training), options.data


def _of_run(run: Request, options: AttributeOptions) -> "tuple[Source, Task, Sequence[str]]":
    """Return the model that a run began with, its task, and the data whose rows are attributed.

    Raises OptionError for an option that the run decides, PlanError for a run that cannot be attributed.
    """
    for name in (*_OF_THE_RUN, "checkpoints"):
        if getattr(options, name):
            raise OptionError(name, f"{flag_of(name)} is the run's own", hint=f"Leave out {flag_of(name)}.")
    place = str(run.model.get("id") or run.model.get("path"))
    source = opened(place, run.model.get("commit"))
    if source.provenance() != run.model:
        raise PlanError(
            f"{place} has changed since the run began with it", hint="Put the one back that the run began with."
        )
    known = TrainingOptions.__dataclass_fields__
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in run.settings.items()
        if name in known
    }
    training = TrainingOptions(**settings)
    if training.gist:
        raise PlanError(
            "rows of gists are read in two ways at once, and have no gradient of their own here",
            hint="Attribute a run without --gist.",
        )
    if options.data:  # other rows than the run's: all of them, each once
        training = replace(training, eval_fraction=0.0, eval_data=(), max_steps=None, data_weights=None, select=None)
        training = replace(training, select_for=(), select_by="less", keep_best=False, patience=None)
    return source, task_of(source, training), options.data or run.data


def _processes(run: Request | None) -> int:
    """Return how many processes trained, which decides how much of the data a run of fixed length read."""
    count = 1 if run is None else run.settings.get("num_processes")
    return count if type(count) is int and count > 0 else 1


def _check_place(target: Path, reads: Reads, *, overwrite: bool) -> None:
    """Refuse an output that must not be written. Raises OutputError; only an attribution is replaced."""
    from surgeon.attribution.result import ABOUT

    with suppress(OSError):
        if overwrite and target.is_dir() and not target.is_symlink() and any(target.iterdir()):
            if not (target / ABOUT).is_file():
                raise OutputError(
                    f"{target} was not written by surgeon attribute, so it is not replaced",
                    hint="Remove it yourself, or choose -o.",
                )
            check_apart(target, reads)
            return
    check_target(target, overwrite=False, reads=reads)
