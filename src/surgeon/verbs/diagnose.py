"""The verb `diagnose`: what attention looks at in each layer of a model, and what each layer is worth."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.config import positions_of
from surgeon.checkpoint.source import Source, spec_of
from surgeon.data.documents import check_there
from surgeon.data.records import chosen_columns
from surgeon.evals.compare import short_label
from surgeon.evals.diagnosis import (
    Diagnosis,
    calibration_table,
    comparison_table,
    diagnosis_of,
    findings,
    layer_table,
)
from surgeon.evals.evaluation import EvalContext, context_of, open_evaluated
from surgeon.options import (
    Checked,
    OptionError,
    Reads,
    check_counts,
    columns_option,
    device_option,
    option,
    overwrite_option,
    progress_option,
    reads_of,
    revision_option,
    takes,
    trust_option,
)
from surgeon.progress import Progress, stage
from surgeon.verbs.inspect import layers_in

if TYPE_CHECKING:
    from torch import Tensor

    from surgeon.progress import Progress


@dataclass(frozen=True, kw_only=True)
class DiagnosisOptions(Checked):
    """The options of the command `diagnose`."""

    data: Sequence[str] = option(
        "Text to look at: .txt, .jsonl, .csv, .parquet, Hub dataset ... Repeatable.",
        metavar="DATA",
        reads=True,
        group="text",
    )
    columns: str | None = columns_option(group="text")
    samples: int = option("Number of sequences taken from the text.", 20, metavar="N", group="text")
    sequence_length: int = option(
        "Tokens per sequence (T); ranks of different T cannot be compared.", 100, metavar="T", group="text"
    )
    energy: float = option(
        "Share of a map's energy that its rank and its mass hold.", 0.9, metavar="E", group="what is measured"
    )
    skip_samples: int = option(
        "Number of sequences on which each layer, and its attention, is left out; 0 leaves none out.",
        8,
        metavar="N",
        group="what is measured",
    )
    against: str | os.PathLike[str] | None = option(
        "Diagnose this model too, and show both side by side.",
        None,
        metavar="OTHER",
        reads=True,
        group="what is measured",
    )
    plot: str | os.PathLike[str] | None = option(
        "Draw heat maps of heads and layers to this .png, .svg or .pdf.",
        None,
        metavar="FILE",
        writes=True,
        group="output",
    )
    html: str | os.PathLike[str] | None = option(
        "Write a page with the picture, the tables and the findings to this .html.",
        None,
        metavar="FILE",
        writes=True,
        group="output",
    )
    overwrite: bool = overwrite_option("Replace an existing picture and page.")
    device: str = device_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise OptionError("data", "there is no data to look at", hint="Name a file: --data FILE.")
        check_counts(self, "samples")
        check_counts(self, "sequence_length", least=2)
        check_counts(self, "skip_samples", least=0)
        chosen_columns(self.columns)
        if not 0 < self.energy < 1:
            raise OptionError(
                "energy", f"--energy is {self.energy}; it lies between 0 and 1", hint="Such as --energy 0.9."
            )


@dataclass(frozen=True, kw_only=True)
class DiagnoseOptions(DiagnosisOptions):
    """The options of `surgeon.diagnose`."""

    progress: Progress | bool | None = progress_option()


@takes(DiagnoseOptions)
def diagnose(model: str | os.PathLike[str], options: DiagnoseOptions) -> Diagnosis:
    """Return the diagnosis of a checkpoint directory or Hub model on the first `samples` rows of a text.

    Of each head and layer: the rank of its attention maps, their mass on columns, and the share of attention on the
    first token (Inheritune, arXiv 2404.08634); of each layer also its block influence, and by how much the loss rises
    without it and without its attention, on the first `skip_samples` rows. All of it is computed in float32; a map is
    reduced as soon as it is made, and freed. `against` is another model, diagnosed on the same rows.

    Raises DataError for a text that cannot be read, MeasureError for a model whose attention cannot be seen and for
    another one with other tokens, PlanError and OutputError for pictures that cannot be drawn or written.

        print(surgeon.diagnose("gpt2-large", data=["text.txt"], samples=4, skip_samples=2))
    """
    from surgeon.models.loading import runs

    began = monotonic()
    plot, html = _targets(options, reads_of(options) | {"MODEL": (os.fspath(model),)})
    check_there(options.data)
    with runs(os.fspath(model), trust_remote_code=options.trust_remote_code):
        diagnosis = _diagnosed(model, options)
    if plot is not None:
        from surgeon.plots.figure import save

        save(diagnosis.draw(), plot)
        diagnosis = replace(diagnosis, written={"pictures": [str(plot)]})
    if html is not None:
        _write_page(diagnosis, html)
        diagnosis = replace(diagnosis, written={**diagnosis.written, "pages": [str(html)]})
    return replace(diagnosis, seconds=monotonic() - began)


def _targets(options: DiagnoseOptions, reads: Reads) -> tuple[Path | None, Path | None]:
    """Return where the picture and the page go, after checking that they can be written there."""
    plot, html = (None if name is None else Path(name) for name in (options.plot, options.html))
    with suppress(RuntimeError):  # ~name of an unknown user
        plot, html = (path and path.expanduser() for path in (plot, html))
    if plot is not None:
        from surgeon.plots.figure import check_picture

        check_picture(plot, reads, overwrite=options.overwrite, option="plot")
    if html is not None:
        from surgeon.plots.page import check_page

        check_page(html, reads, overwrite=options.overwrite)
    return plot, html


def _diagnosed(model: str | os.PathLike[str], options: DiagnoseOptions) -> Diagnosis:
    """Return the diagnosis of a model, and in it that of the one that it is held against."""
    from surgeon.data.rows import read_rows
    from surgeon.measure.attention import calibration

    sources = [open_evaluated(model, options.revision)]
    sources += [] if options.against is None else [open_evaluated(options.against, None)]
    context = context_of(sources, options.device)
    amount: dict[str, Any] = {"samples": options.samples, "sequence_length": options.sequence_length}
    with stage("tokenising"):
        rows = [read_rows(options.data, each, **amount, columns=options.columns) for each in context.tokenizers]
    tokens, length = rows[0].tokens, rows[0].tokens.shape[1]
    context.check_same([one.tokens.tolist() for one in rows])
    most = min(filter(None, map(positions_of, sources)), default=length)
    context.check_length(length, "rows have", f"Use --sequence-length {most}.")
    known = calibration(length, options.energy)
    setup = context.setup(options.data, rows[0].digest, options.columns) | {"dtype": "float32"}
    setup |= {"asked_length": options.sequence_length} | ({"notes": list(rows[0].notes)} if rows[0].notes else {})
    diagnoses = [_one(source, tokens, known, setup, context, options) for source in sources]
    if len(diagnoses) == 1:
        return diagnoses[0]
    anatomies = [read_anatomy(spec_of(source)) for source in sources]
    layer_map = layers_in(sources[0], anatomies[0], sources[1], anatomies[1])
    return replace(diagnoses[0], other=diagnoses[1], layer_map=layer_map)


def _one(
    source: Source,
    tokens: "Tensor",
    known: dict[str, dict[str, float]],
    setup: dict[str, Any],
    context: EvalContext,
    options: DiagnoseOptions,
) -> Diagnosis:
    from surgeon.measure.diagnosis import measure

    how: dict[str, Any] = {"energy": options.energy, "skip_rows": options.skip_samples}
    measured = measure(source, tokens, **how, device=context.device)
    return diagnosis_of(source.label, measured, known, setup, length=tokens.shape[1], energy=options.energy)


# --- pictures -----------------------------------------------------------------------------------------------------


def _write_page(diagnosis: Diagnosis, path: Path) -> None:
    from surgeon.plots import page

    title = f"Diagnosis of {short_label(diagnosis.model)}"
    parts = [page.sentences(findings(diagnosis)), page.picture(diagnosis.draw(), f"{title}: heads over layers")]
    parts += [page.heading("Layers"), page.table(*layer_table(diagnosis))]
    if diagnosis.other is not None:
        parts += [page.heading(f"Layers of {short_label(diagnosis.other.model)}")]
        parts += [page.table(*layer_table(diagnosis.other))]
        parts += [page.heading("Side by side"), page.table(*comparison_table(diagnosis))]
    parts += [page.heading(f"Known patterns at T = {diagnosis.length}"), page.table(*calibration_table(diagnosis))]
    parts += [page.heading("What was measured"), page.table(["", ""], [list(fact) for fact in diagnosis.facts()])]
    page.write_page(path, title, parts)
