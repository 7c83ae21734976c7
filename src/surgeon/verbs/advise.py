"""The verb `advise`: what a model can do with a text, before an hour is spent on training it."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from surgeon import text
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.config import positions_of
from surgeon.checkpoint.source import spec_of
from surgeon.cost.advice import Advice, Facts, Row
from surgeon.cost.advice import advise as advised
from surgeon.cost.flops import body_parameters
from surgeon.cost.laws import Verdict
from surgeon.cost.memory import lora_parameters
from surgeon.data.documents import check_there
from surgeon.data.records import chosen_columns
from surgeon.evals.compare import short_label
from surgeon.evals.evaluation import EvalContext, context_of, open_evaluated
from surgeon.options import (
    Checked,
    OptionError,
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
from surgeon.showing import Shown

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AdvisingOptions(Checked):
    """The options of the command `advise`."""

    data: Sequence[str] = option(
        "Text to train on: .txt, .jsonl, .csv, .parquet, Hub dataset ... Repeatable.",
        metavar="DATA",
        reads=True,
        group="text",
    )
    columns: str | None = columns_option(group="text")
    samples: int = option("Number of sequences that the model reads.", 64, metavar="N", group="text")
    sequence_length: int = option("Tokens per sequence.", 128, metavar="T", group="text")
    epochs: float = option("Passes over the data that are planned.", 3.0, metavar="E", group="length and rate")
    lora: int | None = option(
        "Rank of adapters that are to be trained, in place of all weights.", None, metavar="R", group="what is trained"
    )
    cut: str | None = option(
        "What the model is to lose before it is healed: 25%, or a number of parameters (30M).",
        None,
        metavar="C",
        group="how much goes",
    )
    reference: str | os.PathLike[str] | None = option(
        "A model that was not trained on the data, such as the parent: how much of it MODEL holds already.",
        None,
        metavar="OTHER",
        reads=True,
        group="what is measured",
    )
    probe: bool = option(
        "Train copies of the model briefly, on fresh and on repeated text, and fit both. Nothing is written.",
        False,
        group="what is measured",
    )
    probe_steps: int = option("Steps of each run of the probe.", 40, metavar="N", group="what is measured")
    lr: str = option(
        "Peak learning rate of the probe. Default: that of finetune.", "", metavar="LR", group="length and rate"
    )
    original: str | os.PathLike[str] | None = option(
        "The model that MODEL was cut from: the probe says how many tokens bring its loss back.",
        None,
        metavar="OTHER",
        reads=True,
        group="what is measured",
    )
    plot: str | os.PathLike[str] | None = option(
        "Draw data against capacity to this .png, .svg or .pdf.", None, metavar="FILE", writes=True, group="output"
    )
    overwrite: bool = overwrite_option("Replace an existing picture.")
    device: str = device_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise OptionError("data", "there is no data to look at", hint="Name a file: --data FILE.")
        check_counts(self, "samples", "lora")
        check_counts(self, "sequence_length", least=2)
        check_counts(self, "probe_steps", least=8)
        chosen_columns(self.columns)
        if not self.epochs > 0:
            raise OptionError("epochs", f"--epochs is {self.epochs}; it is above 0", hint="Such as --epochs 3.")
        if self.original is not None and not self.probe:
            raise OptionError("original", "--original is what --probe heals up to", hint="Add --probe.")
        self.removed(100)

    def removed(self, parameters: int) -> int | None:
        """Return how many of so many parameters the cut takes. Raises OptionError for what is no such number."""
        if self.cut is None:
            return None
        share, count = re.fullmatch(r"(\d+(?:\.\d+)?)%", self.cut), text.parse_count(self.cut)
        if share and 0 < float(share[1]) < 100:
            return round(parameters * float(share[1]) / 100)
        if count:
            return count
        raise OptionError(
            "cut", f"cannot read {self.cut!r} as a part of a model", hint="Such as --cut 25% or --cut 30M."
        )


@dataclass(frozen=True, kw_only=True)
class AdviseOptions(AdvisingOptions):
    """The options of `surgeon.advise`."""

    progress: Progress | bool | None = progress_option()


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelAdvice(Shown):
    """What a model can do with a text: the verdict, a row for each figure, and in words how the rows agree.

    `setup` makes the figures reproducible, `notes` say what was left out.

        advice = surgeon.advise("SmolLM2-135M", data=["text.txt"], epochs=3, samples=4)
        print(advice.verdict, [(row.quantity, row.value, row.inside) for row in advice.rows])
    """

    model: str
    facts: Facts
    advice: Advice
    setup: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """What the plan comes to: "memorises", "boundary" or "does not memorise"."""
        return self.advice.verdict

    @property
    def rows(self) -> tuple[Row, ...]:
        """A row for each figure."""
        return self.advice.rows

    @property
    def headline(self) -> str:
        """The model, the text and the verdict."""
        facts = self.facts
        return f"{short_label(self.model)} on {facts.unique:,} unique tokens, {facts.epochs:g} epochs: {self.verdict}"

    def to_dict(self) -> dict[str, Any]:
        """Return the advice as `--json` prints it."""
        rows = [
            {
                "quantity": row.quantity,
                "value": row.value,
                "shown": row.shown,
                "law": row.law,
                "range": row.range,
                "inside": row.inside,
                "says": row.says,
            }
            for row in self.rows
        ]
        said = {"verdict": self.verdict, "rows": rows, "agreement": list(self.advice.sentences)}
        return {"model": self.model, **said, **self.setup, "notes": list(self.notes), "seconds": round(self.seconds, 3)}

    def to_text(self) -> str:
        """Return the advice for people."""
        lines = [
            [row.quantity, row.shown, "" if row.says is None else row.says, "" if row.inside else "outside"]
            for row in self.rows
        ]
        parts = [text.rows([("verdict", f"{self.verdict}, in {self.facts.epochs:g} epochs")])]
        parts += [" ".join(self.advice.sentences), text.table(["", "value", "says", "range"], lines)]
        laws = [(row.quantity, f"{row.law}; {'' if row.inside else 'OUTSIDE: '}{row.range}") for row in self.rows]
        parts += [text.rows(laws), *([text.rows([("note", note) for note in self.notes])] if self.notes else [])]
        return "\n\n".join(parts)

    def draw(self) -> Any:
        """Return a figure of matplotlib: bits of data against parameters, this model and text in it."""
        from surgeon.plots.advice import draw

        facts = self.facts
        title = f"{short_label(self.model)} on {', '.join(map(short_label, self.setup['data']))}: {self.verdict}"
        return draw(facts.parameters, facts.bits, facts.unique, title=title)


@takes(AdviseOptions)
def advise(model: str | os.PathLike[str], options: AdviseOptions) -> ModelAdvice:
    """Return what a checkpoint directory or Hub model can do with a text: hold it, learn from it, or over-fit on it.

    All documents are tokenised and hashed; the model reads the first `samples` rows once. `probe` trains copies of it
    for `probe_steps` steps, twice, and fits the curves; nothing of that is kept.

    Raises DataError for a text that cannot be read, MeasureError for a model that does not predict a next token.

        print(surgeon.advise("SmolLM2-135M", data=["text.txt"], cut="25%", samples=4))
    """
    from surgeon.models.loading import runs

    began = monotonic()
    plot = None if options.plot is None else Path(options.plot)
    with suppress(RuntimeError):  # ~name of an unknown user
        plot = plot and plot.expanduser()
    if plot is not None:
        from surgeon.plots.figure import check_picture

        check_picture(
            plot, reads_of(options) | {"MODEL": (os.fspath(model),)}, overwrite=options.overwrite, option="plot"
        )
    check_there(options.data)
    with runs(os.fspath(model), trust_remote_code=options.trust_remote_code):
        found = _advice(model, options)
    if plot is not None:
        from surgeon.plots.figure import save

        save(found.draw(), plot)
    return replace(found, seconds=monotonic() - began)


def _advice(model: str | os.PathLike[str], options: AdviseOptions) -> ModelAdvice:
    from surgeon.data.duplicates import repetition
    from surgeon.data.rows import read_rows

    sources = [open_evaluated(model, options.revision)]
    sources += [] if options.reference is None else [open_evaluated(options.reference, None)]
    anatomy = read_anatomy(spec_of(sources[0]))
    context = context_of(sources, options.device)
    with stage("tokenising"):
        counted, notes = repetition(options.data, context.tokenizers[0], columns=options.columns)
        amount: dict[str, Any] = {"samples": options.samples, "sequence_length": options.sequence_length}
        rows = [read_rows(options.data, each, **amount, columns=options.columns) for each in context.tokenizers]
    tokens = rows[0].tokens
    context.check_same([one.tokens.tolist() for one in rows])
    most = min(filter(None, map(positions_of, sources)), default=tokens.shape[1])
    context.check_length(tokens.shape[1], "rows have", f"Use --sequence-length {most}.")
    whole = anatomy.spec.num_parameters
    facts = Facts(
        parameters=whole if options.lora is None else lora_parameters(anatomy, options.lora),
        body=body_parameters(anatomy) if options.lora is None else lora_parameters(anatomy, options.lora),
        whole=whole,
        tokens=counted.tokens,
        unique=counted.unique,
        epochs=options.epochs,
        packed=counted.packed,
        near=counted.near_share if counted.pieces else None,
        cut=options.removed(whole),
        **_read(context, tokens),
    )
    setup = context.setup(options.data, rows[0].digest, options.columns)
    setup |= {"rows_read": len(tokens), "sequence_length": tokens.shape[1], "epochs": options.epochs}
    setup |= {"parameters": whole, "body_parameters": body_parameters(anatomy), "trained_parameters": facts.parameters}
    setup |= {"pieces": counted.pieces, "copies": counted.copies, "near_copies": counted.near}
    measured: Sequence[Row] = ()
    if options.probe:
        from surgeon.verbs.probing import Probe, probed

        same = {name: getattr(options, name) for name in ("data", "columns", "lr", "lora", "device", "original")}
        probe = Probe(length=tokens.shape[1], steps=options.probe_steps, **same)
        measured, said = probed(sources[0], probe, facts, context)
        notes, setup = (*notes, *said.pop("notes")), setup | {"probe": said}
    return ModelAdvice(
        model=sources[0].label, facts=facts, advice=advised(facts, measured), setup=setup, notes=tuple(notes)
    )


def _read(context: EvalContext, tokens: "Tensor") -> dict[str, Any]:
    """Return what is known of rows of a text, shape (R, T), once the model and its reference have read them."""
    from surgeon.evals.compare import estimate, paired
    from surgeon.evals.perplexity import streamed
    from surgeon.measure.separation import final_states, separation

    states, sums = final_states(streamed(context.sources[0], context.device), tokens)
    sizes = [tokens.shape[1] - 1] * len(tokens)
    loss, apart = estimate(sums, sizes), separation(states)
    found: dict[str, Any] = {"loss": loss.value, "error": loss.error, "separation": apart and apart.ratio}
    if len(context.sources) > 1:
        _, others = final_states(streamed(context.sources[1], context.device), tokens)
        less = paired(others, sums, sizes)
        found["memorised"] = less.value, less.error
    return found
