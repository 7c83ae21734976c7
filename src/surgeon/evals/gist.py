"""The scores of a gist: the same records with the whole prompt, with its gist, and with no prompt."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from surgeon import text
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import spec_of
from surgeon.data.documents import Reading
from surgeon.data.records import chosen_columns
from surgeon.data.rows import by_template
from surgeon.errors import PlanError
from surgeon.evals.compare import (
    Estimate,
    PairedDifference,
    Recovery,
    estimate,
    gap_closed,
    markdown_table,
    paired,
    short_label,
    table_cell,
)
from surgeon.evals.evaluation import (
    EvalContext,
    checked_target,
    context_of,
    open_evaluated,
    sha256_of,
    write_predictions,
)
from surgeon.evals.options import BATCH_SIZE, MAX_NEW_TOKENS, MetricOptions
from surgeon.evals.verdicts import WIN_RATE, Judgement, card_sentences
from surgeon.gist.compressor import Compressor
from surgeon.gist.tokens import GistTokens, read_gist
from surgeon.options import (
    Checked,
    OptionError,
    adapter_option,
    check_counts,
    device_option,
    option,
    progress_option,
    revision_option,
    same_option,
    trust_option,
)
from surgeon.progress import Progress, meter
from surgeon.showing import Shown
from surgeon.text import plus_minus

if TYPE_CHECKING:
    from surgeon.evals.judge import Case, Judge
    from surgeon.gist.records import Record

LOSS, ROUGE, EXACT = "loss", "rouge_l", "exact_match"
FORMS = ("full", "gist", "none")
HEADINGS = dict(zip(FORMS, ("full prompt", "gist", "no prompt"), strict=True))
HEADER = ("", *HEADINGS.values(), "gist - none", "recovery")


@dataclass(frozen=True, repr=False)
class GistEvaluation(Shown):
    """The scores of a model on records in their forms "full", "gist" and "none".

    `outcomes` has a number per record, by measure and form. Measures are "loss", summed over the `sizes` tokens of each
    answer, "rouge_l" and "exact_match", both 0 to 1, and with a judge "win_rate" against the full prompt's answers.
    `judgements` has the judge's verdicts on "gist" and "none".

        evaluation = surgeon.evaluate_gist("SmolLM2-gist", data=["instructions.jsonl"], max_new_tokens=4)
        print(evaluation.figure("loss", "gist").value, evaluation.figure("loss", "none").value)
    """

    model: str
    outcomes: Mapping[str, Mapping[str, tuple[float, ...]]]
    sizes: tuple[int, ...]
    gist_tokens: int
    prompt_tokens: float
    setup: Mapping[str, Any]
    predictions: tuple[Mapping[str, Any], ...]
    seconds: float
    judgements: Mapping[str, Judgement] = field(default_factory=dict)

    def figure(self, measure: str, form: str) -> Estimate:
        """Return the mean of a measure in a form, with its standard error; of the loss in nats per token."""
        return estimate(self.outcomes[measure][form], self._sizes(measure))

    def difference(self, measure: str, form: str, other: str) -> PairedDifference:
        """Return the mean of the paired differences of a measure between a form and another."""
        return paired(self.outcomes[measure][form], self.outcomes[measure][other], self._sizes(measure))

    def recovery(self, measure: str) -> Recovery:
        """Return (gist - none) / (full - none) in percent: 0 is as bad as no prompt, 100 as good as the whole one.

        There is none where the whole prompt is not two errors better than no prompt: nothing is there to recover.
        """
        full, gist, none = (self.outcomes[measure][form] for form in FORMS)
        return gap_closed(full, gist, none, self._sizes(measure), higher_is_better=measure != LOSS)

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as `--json` prints it."""
        forms = {
            form: dict(entry for measure in self.outcomes for entry in _entries(measure, self.figure(measure, form)))
            for form in FORMS
        }
        differences = {
            name: {measure: self._difference(measure, *pair) for measure in self.outcomes}
            for name, pair in {"gist_none": ("gist", "none"), "gist_full": ("gist", "full")}.items()
        }
        recoveries = {measure: self.recovery(measure) for measure in self.outcomes}
        refused = {measure: one.refused for measure, one in recoveries.items() if one.refused}
        return {
            "metric": "gist",
            "model": self.model,
            "records": len(self.sizes),
            "tokens": sum(self.sizes),
            "gist_tokens": self.gist_tokens,
            "prompt_tokens": self.prompt_tokens,
            **forms,
            "differences": differences,
            "recovery": {
                measure: None if one.refused else {"value": one.value, "error": one.error}
                for measure, one in recoveries.items()
            },
            **({"recovery_refused": refused} if refused else {}),
            **self._judged(),
            **self.setup,
            "seconds": round(self.seconds, 3),
        }

    @property
    def headline(self) -> str:
        """The model, the lengths of prompt and gist, and the data."""
        return f"{self.model}, {self.prompt_tokens:g} tokens as {self.gist_tokens}, {self._data()}"

    def to_text(self) -> str:
        """Return the evaluation for people."""
        rows = [("model", self.model), ("data", self._data())]
        rows += [("judge", self.judgements["gist"].judge)] if self.judgements else []
        rows += [(HEADINGS[form], one.summary()) for form, one in self.judgements.items()]
        rows += [("note", note) for note in self.setup.get("notes", ())]
        rows += [("note", f"{HEADINGS[form]}: {note}") for form, one in self.judgements.items() for note in one.notes]
        rows += [("no recovery", reason) for reason in self._refusals()]
        return f"{text.table(list(HEADER), self._lines())}\n\n{text.rows(rows)}"

    def to_markdown(self) -> str:
        """Return the evaluation as a block for a model card."""
        judged = card_sentences({f"{HEADINGS[form]} against full prompt": one for form, one in self.judgements.items()})
        table = markdown_table(HEADER, self._lines())
        refused = "".join(f" No recovery: {reason}." for reason in self._refusals())
        return f"{table}\n\nMeasured with `surgeon evaluate --gist` on {self._data()}.{refused}{judged}"

    def _refusals(self) -> list[str]:
        """Return why measures have no recovery, a reason once with all its measures."""
        reasons: dict[str, list[str]] = {}
        for measure in self.outcomes:
            if (reason := self.recovery(measure).refused) is not None:
                reasons.setdefault(reason, []).append(measure.replace("_", " "))
        return [f"{', '.join(measures)}: {reason}" for reason, measures in reasons.items()]

    def _judged(self) -> dict[str, Any]:
        if not self.judgements:
            return {}
        model = self.judgements["gist"].judge
        return {"judge": {"model": model, **{form: one.to_dict() for form, one in self.judgements.items()}}}

    def _lines(self) -> list[list[str]]:
        lines = []
        for measure in self.outcomes:
            figures = [self.figure(measure, form) for form in FORMS]
            difference, recovered = self.difference(measure, "gist", "none"), self.recovery(measure)
            line = [plus_minus(figure.value, figure.error) for figure in figures]
            lines.append(
                [measure.replace("_", " "), *line, plus_minus(difference.value, difference.error), recovered.cell]
            )
        return lines

    def _data(self) -> str:
        ratio = f"prompts of {self.prompt_tokens:.1f} tokens in {self.gist_tokens}"
        data = table_cell(", ".join(map(short_label, self.setup["data"])))
        return f"{len(self.sizes):,} records of {data}, {ratio}, in {self.setup['dtype']}"

    def _difference(self, measure: str, form: str, other: str) -> dict[str, float | None]:
        difference = self.difference(measure, form, other)
        return {"value": difference.value, "error": difference.error, "z": difference.z}

    def _sizes(self, measure: str) -> tuple[int, ...] | None:
        return self.sizes if measure == LOSS else None


@dataclass(frozen=True, kw_only=True)
class GistEvaluationOptions(Checked):
    """The options of `surgeon.evaluate_gist`."""

    data: Sequence[str] = same_option(MetricOptions, "data")
    columns: str | None = same_option(MetricOptions, "columns")
    tokens: int | None = option("Tokens of a gist. Default: the model's own number.", None, metavar="K")
    samples: int | None = option("How many records. Default: all.", None)
    max_new_tokens: int | None = same_option(MetricOptions, "max_new_tokens")
    batch_size: int | None = same_option(MetricOptions, "batch_size")
    predictions: str | os.PathLike[str] | None = option("Write every record's answers to this .jsonl.", None)
    judge: str | os.PathLike[str] | None = option(
        "A model that compares the gist's answers, and those without a prompt, with those of the full prompt.", None
    )
    adapter: str | os.PathLike[str] | None = adapter_option()
    device: str = device_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()
    progress: Progress | bool | None = progress_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen_columns(self.columns)
        check_counts(self, "samples", "max_new_tokens", "batch_size", "tokens")
        if not self.data:
            raise OptionError("data", "there is no data to evaluate on", hint="Give records: --data FILE.")


def score_gist(model: str | os.PathLike[str], options: GistEvaluationOptions) -> GistEvaluation:
    """Return the scores of a model on records with the whole prompt, with its gist, and with no prompt."""
    began = monotonic()
    target = None if options.predictions is None else checked_target(Path(options.predictions))
    source = open_evaluated(model, options.revision, encoder=True)
    gist = read_gist(source.config)
    if gist is None:
        raise PlanError(
            f"{source.label} has no gist tokens", hint=f"surgeon gist {source.label} --tokens 4 adds them to a model."
        )
    compressor = None if options.adapter is None else Compressor(Path(options.adapter))
    if compressor is not None:
        compressor.check(source)

    from surgeon.evals.judge import load_judge
    from surgeon.gist.records import read_forms

    context = context_of([source], options.device)
    count, length = options.tokens or gist.num_tokens, options.max_new_tokens or MAX_NEW_TOKENS
    batch_size, samples = options.batch_size or BATCH_SIZE, options.samples
    has_encoder = bool(source.config.get("is_encoder_decoder"))
    reading = Reading(options.columns)
    shape: dict[str, Any] = {"num_tokens": count, "samples": samples, "encoder": has_encoder, "reading": reading}
    records = read_forms(options.data, context.tokenizers[0], gist, **shape)
    judging = None
    if options.judge is not None:
        amount: dict[str, Any] = {"samples": samples, "max_new_tokens": length}
        judging = load_judge(options.judge, options.data, context.device, columns=options.columns, **amount)
    outcomes, predictions = _measured(context, records, gist, compressor, max_new_tokens=length, batch_size=batch_size)
    if target is not None:
        write_predictions(predictions, target)
    judgements: dict[str, Judgement] = {}
    if judging is not None:  # the model is out of memory now, and its answers are on disk
        judgements = _judgements(*judging, predictions, context, batch_size=batch_size)
        even = {FORMS[0]: (0.5,) * len(records)}
        outcomes[WIN_RATE] = even | {form: judgement.scores for form, judgement in judgements.items()}
        if target is not None:
            write_predictions(predictions, target)
    return GistEvaluation(
        model=source.label,
        outcomes=outcomes,
        sizes=tuple(len(record.answer) for record in records),
        gist_tokens=count,
        prompt_tokens=sum(len(record.begin) + len(record.prompt) for record in records) / len(records),
        setup=context.setup(options.data, sha256_of([(r.asked("gist"), r.answer) for r in records]), options.columns)
        | ({"notes": list(notes)} if (notes := reading.notes(by_template(context.tokenizers[0]))) else {})
        | {"max_new_tokens": length, "batch_size": batch_size},
        predictions=tuple(predictions),
        seconds=monotonic() - began,
        judgements=judgements,
    )


def _judgements(
    judge: "Judge", cases: "Sequence[Case]", predictions: list[dict[str, Any]], context: EvalContext, *, batch_size: int
) -> dict[str, Judgement]:
    """Return a judge's verdicts on each form's answers against the full prompt's, and add them to the predictions."""
    full, *others = FORMS
    judgements = {}
    for form in others:
        answers = [[entry[one] for entry in predictions] for one in (form, full)]
        judgements[form] = judge.compare(cases, *answers, batch_size=batch_size)
        for entry, verdict in zip(predictions, judgements[form].verdicts, strict=True):
            entry |= {f"{form}_{name}": value for name, value in verdict.to_dict().items()}
    return judgements


def _measured(
    context: EvalContext,
    records: "Sequence[Record]",
    gist: GistTokens,
    compressor: Compressor | None,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> tuple[dict[str, dict[str, tuple[float, ...]]], list[dict[str, Any]]]:
    """Return the outcomes of all records by measure and form, and each record's prompt, reference and answers."""
    from surgeon.evals.generation import load_whole
    from surgeon.evals.gist_answers import answer_losses, answers
    from surgeon.evals.metrics import exact_match, rouge_l
    from surgeon.gist.support import check_support

    source, tokenizer = context.sources[0], context.tokenizers[0]
    for record in records:
        longest = len(record.asked("gist")) + max(max_new_tokens, len(record.answer))
        context.check_length(longest, f"{record.where}: with its answer it takes", "Use a smaller --max-new-tokens.")
    model = load_whole(source, context.device)
    model.generation_config.suppress_tokens = list(gist.ids)
    if (support := check_support(model)).reason is not None:
        hint = "surgeon gist --check MODEL measures whether a model can be gisted."
        raise PlanError(f"{source.label} cannot read gists: {support.reason}", hint=hint)
    if compressor is not None:
        compressor.attach(model)
    batching: dict[str, Any] = {"batch_size": batch_size, "frozen": compressor is not None}
    depth = read_anatomy(spec_of(source)).depth
    outcomes: dict[str, dict[str, tuple[float, ...]]] = {LOSS: {}, ROUGE: {}, EXACT: {}}
    predictions: list[dict[str, Any]] = [
        {"prompt": tokenizer.decode(list(record.asked("full"))), "reference": record.reference} for record in records
    ]
    for form, name in HEADINGS.items():
        work = sum(len(record.asked(form)) + len(record.answer) + max_new_tokens for record in records)
        progress = partial(_count, meter(name, work, depth), depth)
        outcomes[LOSS][form] = tuple(answer_losses(model, records, form, progress=progress, **batching))
        texts = answers(model, tokenizer, records, form, max_new_tokens=max_new_tokens, progress=progress, **batching)
        pairs = list(zip(texts, (record.reference for record in records), strict=True))
        outcomes[ROUGE][form] = tuple(rouge_l(*pair) for pair in pairs)
        outcomes[EXACT][form] = tuple(exact_match(*pair) for pair in pairs)
        for entry, answer in zip(predictions, texts, strict=True):
            entry[form] = answer
    return outcomes, predictions


def _count(count: Callable[[int], None], depth: int, tokens: int) -> None:
    count(tokens * depth)


def _entries(measure: str, figure: Estimate) -> tuple[tuple[str, float | None], ...]:
    return (measure, figure.value), (f"{measure}_error", figure.error)
