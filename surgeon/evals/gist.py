"""What a gist is worth: the same records with the whole prompt, with its gist instead, and without either."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from surgeon import text
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import spec_of
from surgeon.errors import DataError, PlanError
from surgeon.evals.compare import Difference, Estimate, estimate, paired
from surgeon.evals.files import checked_target, opened, write_records
from surgeon.evals.prompts import BATCH_SIZE, MAX_NEW_TOKENS
from surgeon.evals.stream import digest
from surgeon.evals.table import cell, markdown, plus_minus, short
from surgeon.evals.verdicts import WIN_RATE, Judgement, card_sentences
from surgeon.gist.compressor import Compressor
from surgeon.gist.tokens import GistTokens, read_gist

if TYPE_CHECKING:
    from surgeon.evals.judge import Case, Judge
    from surgeon.evals.runs import Bench
    from surgeon.gist.records import Record
    from surgeon.measure.scoring import Meter
    from surgeon.models.streaming import Progress

LOSS, ROUGE, EXACT = "loss", "rouge_l", "exact_match"
FORMS = ("full", "gist", "none")
HEADINGS = dict(zip(FORMS, ("full prompt", "gist", "no prompt"), strict=True))
HEADER = ("", *HEADINGS.values(), "gist - none", "recovery")


@dataclass(frozen=True)
class GistEvaluation:
    """What a model scored on records in their forms "full", "gist" and "none", by measure and form, record by record.

    Measures are "loss", summed over the `sizes` tokens of each answer, "rouge_l" and "exact_match", both 0 to 1, and
    with a judge "win_rate" against the full prompt's answers; `judgements` has what it said of "gist" and "none".
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
        """Return the mean of a measure in a form, with its standard error; of the loss in nats a token."""
        return estimate(self.outcomes[measure][form], self._sizes(measure))

    def difference(self, measure: str, form: str, other: str) -> Difference:
        """Return how much more a form has of a measure than another, in the mean of the paired differences."""
        return paired(self.outcomes[measure][form], self.outcomes[measure][other], self._sizes(measure))

    def recovery(self, measure: str) -> Estimate | None:
        """Return (gist - none) / (full - none) in percent: 0 is no prompt, 100 the whole one. None where it is x / 0.

        Its error is that of a ratio of two means over the same records: noise, where full and none are hardly apart.
        """
        full, gist, none = (self.outcomes[measure][form] for form in FORMS)
        gains = [one - other for one, other in zip(full, none, strict=True)]
        if not sum(gains):
            return None
        kept = [one - other for one, other in zip(gist, none, strict=True)]
        found = estimate(kept, gains)  # type: ignore[arg-type]  # of a ratio, whatever stands below
        return Estimate(100 * found.value, None if found.error is None else abs(100 * found.error))

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
        recovered: dict[str, Estimate | None] = {measure: self.recovery(measure) for measure in self.outcomes}
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
                measure: None if found is None else {"value": found.value, "error": found.error}
                for measure, found in recovered.items()
            },
            **self._judged(),
            **self.setup,
            "seconds": round(self.seconds, 3),
        }

    def to_text(self) -> str:
        """Return the evaluation for people."""
        rows = [("model", self.model), ("data", self._told())]
        rows += [("judge", self.judgements["gist"].judge)] if self.judgements else []
        rows += [(HEADINGS[form], one.told()) for form, one in self.judgements.items()]
        rows += [("note", f"{HEADINGS[form]}: {note}") for form, one in self.judgements.items() for note in one.notes]
        return f"{text.table(list(HEADER), self._lines())}\n\n{text.rows(rows)}"

    def to_markdown(self) -> str:
        """Return the evaluation as a block for a model card."""
        judged = card_sentences({f"{HEADINGS[form]} against full prompt": one for form, one in self.judgements.items()})
        told = f"Measured with `surgeon evaluate --gist` on {self._told()}.{judged}"
        return f"{markdown(HEADER, self._lines())}\n\n{told}"

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
            told = "" if recovered is None else _percent(recovered)
            line = [plus_minus(found.value, found.error) for found in figures]
            lines.append([measure.replace("_", " "), *line, plus_minus(difference.value, difference.error), told])
        return lines

    def _told(self) -> str:
        ratio = f"prompts of {self.prompt_tokens:.1f} tokens in {self.gist_tokens}"
        data = cell(", ".join(map(short, self.setup["data"])))
        return f"{len(self.sizes):,} records of {data}, {ratio}, in {self.setup['dtype']}"

    def _difference(self, measure: str, form: str, other: str) -> dict[str, float | None]:
        found = self.difference(measure, form, other)
        return {"value": found.value, "error": found.error, "z": found.z}

    def _sizes(self, measure: str) -> tuple[int, ...] | None:
        return self.sizes if measure == LOSS else None


def evaluate_gist(
    model: str | os.PathLike[str],
    *,
    data: Sequence[str],
    tokens: int | None = None,
    samples: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    predictions: str | os.PathLike[str] | None = None,
    judge: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    device: str = "auto",
    revision: str | None = None,
    meter: "Meter | None" = None,
) -> GistEvaluation:
    """Return what a model with gist tokens scores on records with the whole prompt, with its gist, and without either.

    Gists have `tokens` tokens, by default as many as the checkpoint says. The loss is of the records' answers, read
    behind a mask as in training; ROUGE-L and exact match are of greedy answers of up to `max_new_tokens` (256), written
    behind the cached gist alone. `samples` is how many records are taken (all), `predictions` a .jsonl to write.
    `judge` is a model that compares the gist's answers, and those without a prompt, with those of the full prompt.
    `adapter` is a directory of adapters that compress for this model, which reads without them and has the other forms.

    Raises PlanError for a model without gist tokens and for other adapters, DataError for records without a prompt or
    an answer, MeasureError for a model that cannot be evaluated, OutputError.
    """
    began = monotonic()
    least = {"--samples": samples, "--max-new-tokens": max_new_tokens, "--batch-size": batch_size}
    if wrong := next((name for name, value in least.items() if value is not None and value < 1), None):
        raise PlanError(f"{wrong} is {least[wrong]}; 1 is the least", hint=f"Set {wrong} to 1 or more.")
    if not data:
        raise DataError("there is no data to evaluate on", hint="Give records: --data FILE.")
    target = None if predictions is None else checked_target(Path(predictions))
    source = opened(model, revision, encoder=True)
    gist = read_gist(source.config)
    if gist is None:
        raise PlanError(
            f"{source.label} has no gist tokens", hint=f"surgeon gist {source.label} --tokens 4 adds them to a model."
        )
    compressor = None if adapter is None else Compressor(Path(adapter))
    if compressor is not None:
        compressor.check(source)

    from surgeon.evals.judge import seated
    from surgeon.evals.runs import Bench
    from surgeon.gist.records import read_forms
    from surgeon.models.device import resolve_device

    count, most, size = tokens or gist.num_tokens, max_new_tokens or MAX_NEW_TOKENS, batch_size or BATCH_SIZE
    bench = Bench([source], resolve_device(device), meter or (lambda what, tokens, layers: None))
    has_encoder = bool(source.config.get("is_encoder_decoder"))
    records = read_forms(data, bench.tokenizers[0], gist, num_tokens=count, samples=samples, encoder=has_encoder)
    judging = None if judge is None else seated(judge, data, bench.device, samples=samples, max_new_tokens=most)
    outcomes, told = _measured(bench, records, gist, compressor, max_new_tokens=most, batch_size=size)
    if target is not None:
        write_records(told, target)
    judgements: dict[str, Judgement] = {}
    if judging is not None:  # by now the model is gone, and what it wrote is on disk
        judgements = _judgements(*judging, told, bench, batch_size=size)
        even = {FORMS[0]: (0.5,) * len(records)}
        outcomes[WIN_RATE] = even | {form: found.scores for form, found in judgements.items()}
        if target is not None:
            write_records(told, target)
    return GistEvaluation(
        model=source.label,
        outcomes=outcomes,
        sizes=tuple(len(record.answer) for record in records),
        gist_tokens=count,
        prompt_tokens=sum(len(record.begin) + len(record.prompt) for record in records) / len(records),
        setup=bench.setup(data, digest([(r.asked("gist"), r.answer) for r in records]))
        | {"max_new_tokens": most, "batch_size": size},
        predictions=tuple(told),
        seconds=monotonic() - began,
        judgements=judgements,
    )


def _judgements(
    judge: "Judge", cases: "Sequence[Case]", told: list[dict[str, Any]], bench: "Bench", *, batch_size: int
) -> dict[str, Judgement]:
    """Return what a judge says of each form's answers against the full prompt's, and tell it of every record."""
    full, *others = FORMS
    found = {}
    for form in others:
        answers = [[entry[one] for entry in told] for one in (form, full)]
        found[form] = judge.compare(cases, *answers, batch_size=batch_size, meter=bench.meter)
        for entry, verdict in zip(told, found[form].verdicts, strict=True):
            entry |= {f"{form}_{name}": value for name, value in verdict.to_dict().items()}
    return found


def _measured(
    bench: "Bench",
    records: "Sequence[Record]",
    gist: GistTokens,
    compressor: Compressor | None,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> tuple[dict[str, dict[str, tuple[float, ...]]], list[dict[str, Any]]]:
    """Return the outcomes of all records by measure and form, and of each what was asked, wanted and written."""
    from surgeon.evals.generation import load_whole
    from surgeon.evals.gist_answers import answer_losses, answers
    from surgeon.evals.metrics import exact_match, rouge_l
    from surgeon.gist.support import check_support

    source, tokenizer = bench.sources[0], bench.tokenizers[0]
    for record in records:
        longest = len(record.asked("gist")) + max(max_new_tokens, len(record.answer))
        bench.check_length(longest, f"{record.where}: with its answer it takes", "Use a smaller --max-new-tokens.")
    model = load_whole(source, bench.device)
    model.generation_config.suppress_tokens = list(gist.ids)
    if (support := check_support(model)).reason is not None:
        hint = "surgeon gist --check MODEL measures whether a model can be gisted."
        raise PlanError(f"{source.label} cannot read gists: {support.reason}", hint=hint)
    if compressor is not None:
        compressor.attach(model)
    how: dict[str, Any] = {"batch_size": batch_size, "frozen": compressor is not None}
    depth = read_anatomy(spec_of(source)).depth
    outcomes: dict[str, dict[str, tuple[float, ...]]] = {LOSS: {}, ROUGE: {}, EXACT: {}}
    told: list[dict[str, Any]] = [
        {"prompt": tokenizer.decode(list(record.asked("full"))), "reference": record.reference} for record in records
    ]
    for form, name in HEADINGS.items():
        work = sum(len(record.asked(form)) + len(record.answer) + max_new_tokens for record in records)
        counted = bench.meter(name, work, depth)
        progress = None if counted is None else partial(_count, counted, depth)
        outcomes[LOSS][form] = tuple(answer_losses(model, records, form, progress=progress, **how))
        written = answers(
            model,
            tokenizer,
            records,
            form,
            max_new_tokens=max_new_tokens,
            progress=progress,
            **how,
        )
        pairs = list(zip(written, (record.reference for record in records), strict=True))
        outcomes[ROUGE][form] = tuple(rouge_l(*pair) for pair in pairs)
        outcomes[EXACT][form] = tuple(exact_match(*pair) for pair in pairs)
        for entry, found in zip(told, written, strict=True):
            entry[form] = found
    return outcomes, told


def _count(progress: "Progress", depth: int, tokens: int) -> None:
    progress(tokens * depth)


def _entries(measure: str, found: Estimate) -> tuple[tuple[str, float | None], ...]:
    return (measure, found.value), (f"{measure}_error", found.error)


def _percent(found: Estimate) -> str:
    error = "" if found.error is None else f" ± {found.error:.1f}"
    return f"{found.value:.1f}{error} %"
