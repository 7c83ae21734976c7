"""The verb `distill`: a model rewrites the answers of a dataset in its own words, to train what is cut from it."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from surgeon import text
from surgeon.anatomy.config import positions_of
from surgeon.checkpoint.begun import difference
from surgeon.checkpoint.json_files import read_json
from surgeon.checkpoint.overlap import check_file_replaced
from surgeon.checkpoint.receipt import public_name, to_bytes, versions
from surgeon.checkpoint.source import Source, fingerprint
from surgeon.data.documents import Reading, check_there
from surgeon.data.rows import by_template
from surgeon.errors import CheckpointError, DataError, OutputError
from surgeon.evals.compare import estimate
from surgeon.evals.evaluation import open_evaluated
from surgeon.options import (
    reads_of,
    takes,
)
from surgeon.progress import current, stage
from surgeon.rewriting.checks import REASONS
from surgeon.rewriting.engines import Engine, TransformersEngine, VllmEngine, chosen
from surgeon.rewriting.journal import WORDS, Journal, opened, write_lines
from surgeon.rewriting.loop import Asked, Progress, lines, rewrite
from surgeon.rewriting.options import DECIDING, DROP, KEEP, DistillOptions
from surgeon.rewriting.prompts import PROMPTS, form_of, prompt_tokens, row_of
from surgeon.showing import Shown
from surgeon.text import place_of, plus_minus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Distillation(Shown):
    """What came of a dataset's answers.

    `rewritten` rows have the model's answer, which in `unchanged` ones is the reference word for word; `kept` rows have
    their own, `dropped` ones are not in the output. `reasons`
    counts the rows that were not rewritten, by reason; `prompts` the rows and the rewritten ones, by the prompt's name.
    `tokens` were written by this process, at `tokens_per_second`; `resumed` rows were on disk when it began.

        made = surgeon.distill("SmolLM2-135M", data=["questions.jsonl"], output="rewritten.jsonl", max_new_tokens=8)
        print(f"{made.rewritten} of {made.rows} answers were rewritten: {made.reasons}")
    """

    output: str
    rows: int
    rewritten: int
    unchanged: int
    kept: int
    dropped: int
    reasons: Mapping[str, int]
    prompts: Mapping[str, Mapping[str, int]]
    engine: str
    tokens: int
    tokens_per_second: float | None
    resumed: int
    seconds: float
    sha256: str
    notes: tuple[str, ...] = field(default=())

    @property
    def acceptance(self) -> float:
        return self.rewritten / self.rows

    @property
    def acceptance_error(self) -> float | None:
        return estimate([1.0] * self.rewritten + [0.0] * (self.rows - self.rewritten)).error

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        rates = {"acceptance": self.acceptance, "acceptance_error": self.acceptance_error}
        plain = {"reasons": dict(self.reasons), "prompts": {name: dict(of) for name, of in self.prompts.items()}}
        return fields | rates | plain | {"notes": list(self.notes)}

    @property
    def headline(self) -> str:
        """Where the dataset is, and how much of it was rewritten."""
        return f"{self.output}, {self.rewritten:,} of {self.rows:,} rows rewritten"

    def to_text(self) -> str:
        """Return this for people."""
        error = None if self.acceptance_error is None else 100 * self.acceptance_error
        accepted = f"{plus_minus(100 * self.acceptance, error)} %"
        rate = "" if self.tokens_per_second is None else f", {self.tokens_per_second:,.1f} tokens/s"
        rows = [("rows", f"{self.rows:,}"), ("rewritten", f"{self.rewritten:,}, {accepted}")]
        rows += [("unchanged", f"{self.unchanged:,} of them say the reference again")] if self.unchanged else []
        if len(self.prompts) > 1:
            rows += [(f"- {name}", f"{of['rewritten']:,} of {of['rows']:,}") for name, of in self.prompts.items()]
        rows += [("kept", f"{self.kept:,} answers of the data")] if self.kept else []
        rows += [("dropped", f"{self.dropped:,} rows")] if self.dropped else []
        rows += [(f"- {name}", f"{count:,}: {REASONS[name]}") for name, count in self.reasons.items()]
        rows += [("written", f"{self.tokens:,} tokens{rate}, by {self.engine}")]
        rows += [("resumed", f"{self.resumed:,} rows were done")] if self.resumed else []
        rows += [("output", self.output), *(("note", note) for note in self.notes)]
        return text.rows(rows)


@takes(DistillOptions)
def distill(model: str | os.PathLike[str], options: DistillOptions) -> Distillation:
    """Let a checkpoint directory or Hub model rewrite the answers of records, and write the records to a .jsonl.

    The model sees the question and the data's answer (`prompt`); its own answer takes the place of that where it passes
    `extract`, ends, does not speak of its task, and is about as long. Of up to `samples` answers the first that
    passes is taken. A row where none does keeps its answer, or is dropped (`on_fail`). The column "distill" of the
    output says of each row what became of it. Each finished batch is on disk in OUTPUT.partial; the same call goes on.

    Raises DataError for data without answers, OutputError for an output that exists or that was begun otherwise,
    MeasureError for a model that cannot be run.

        surgeon.distill("SmolLM2-135M", data=["questions.jsonl"], output="distilled.jsonl", max_new_tokens=64)
    """
    check_there(options.data)
    source = open_evaluated(model, options.revision)
    _check_target(options, os.fspath(model))

    from surgeon.models.loading import runs

    with runs(source.label, trust_remote_code=options.trust_remote_code):
        return _distilled(source, options)


def _distilled(source: Source, options: DistillOptions) -> Distillation:
    began = monotonic()

    from surgeon.models.device import resolve_device
    from surgeon.models.loading import load_tokenizer, loadable

    device = resolve_device(options.device)
    tokenizer = load_tokenizer(*loadable(source))
    reading = Reading(options.columns)
    with stage("reading the rows"):
        asked, digest = _asked(source, tokenizer, options, reading)
    engine_name = chosen(options.engine, device)
    teacher = {"teacher": public_name(source), "fingerprint": fingerprint(source)}
    request = {"format": FORMAT, "teacher": teacher["fingerprint"], "data": digest}
    request |= {name: getattr(options, name) for name in DECIDING} | {"engine": engine_name, "device": device}
    target = options.target
    partial = target.with_name(f"{target.name}.partial")
    if not partial.exists() and target.exists():
        if (done := _done(target, request, options)) is not None:
            return done
        _refuse_existing(target, options)
    with opened(partial, request) as journal:
        resumed = len(journal.outcomes)
        if resumed < len(asked):
            _refuse_existing(target, options)
        engine: Engine = (
            VllmEngine(source, tokenizer, options.trust_remote_code, options.writing)
            if engine_name == "vllm"
            else TransformersEngine(source, tokenizer, device, options.writing)
        )
        first = current().begin("rewriting the first rows")

        def watch(progress: Progress) -> None:
            first.done()
            if options.watch is not None:
                options.watch(progress)

        try:
            progress = rewrite(asked, engine, options.checks, journal, samples=options.samples, watch=watch)
        finally:
            first.done()
        source.check_unchanged()
        sha256 = _write(target, asked, journal, teacher, options)
        result = _summary(asked, journal, progress, options, engine=engine_name, resumed=resumed, sha256=sha256)
        notes = (*result.notes, *reading.notes(by_template(tokenizer)))
        result = replace(result, notes=notes, seconds=round(monotonic() - began, 3))
        _write_receipt(target, request, result, options)
        journal.remove()
    return result


def _asked(
    source: Source, tokenizer: "PreTrainedTokenizerBase", options: DistillOptions, reading: Reading
) -> tuple[list[Asked], str]:
    """Return the rows of the data with their prompts, all of them checked, and a SHA-256 over both."""
    streams = [reading.documents(spec) for spec in options.data]  # a wrong name is an error before anything is read
    checks, most, asked = options.checks, positions_of(source), []
    digest = hashlib.sha256()
    for document in chain(*streams):
        row = row_of(document)
        checks.check_row(row)
        name = form_of(row, options.prompt)
        ids = prompt_tokens(row, name, tokenizer)
        digest.update(json.dumps([row.record, name, ids], sort_keys=True, default=str).encode())
        is_full = most is not None and len(ids) + options.max_new_tokens > most
        asked.append(Asked(row, name, None if is_full else ids))
    if all(item.ids is None for item in asked):
        raise DataError(
            f"no prompt leaves room for {options.max_new_tokens} tokens in the {most} positions of {source.label}",
            hint="Use a smaller --max-new-tokens.",
        )
    return asked, digest.hexdigest()


def _check_target(options: DistillOptions, model: str) -> None:
    """Raises OutputError where the output is something that is read, or would be at the next call."""
    check_file_replaced(options.target, reads_of(options) | {"MODEL": (model,)})
    place = os.path.realpath(options.target.parent)
    for spec in (place_of(written) for written in options.data):
        if os.path.isdir(spec) and os.path.realpath(spec) == place:  # noqa: PTH112  # Path.is_dir may raise
            raise OutputError(f"{options.target} would be among what --data reads: {spec}", hint="Choose another -o.")


def _refuse_existing(target: Path, options: DistillOptions) -> None:
    """Raises OutputError where the output exists and is not to be replaced."""
    if target.is_dir() or (target.exists() and not options.overwrite):
        raise OutputError(f"{target} exists", hint="Choose another -o, or add --overwrite.")


def _write(
    target: Path, asked: Sequence[Asked], journal: Journal, teacher: Mapping[str, Any], options: DistillOptions
) -> str:
    """Write the output, and return its SHA-256. Raises DataError where every row would be dropped."""
    drops = options.on_fail == DROP
    if drops and all(outcome.answer is None for outcome in journal.outcomes.values()):
        raise DataError(
            "no answer passes, so every row is dropped", hint="Keep them: the same command with --on-fail keep."
        )
    write_lines(target, lines(asked, journal, dict(teacher), seed=options.seed, drops=drops))
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _summary(
    asked: Sequence[Asked],
    journal: Journal,
    progress: Progress,
    options: DistillOptions,
    *,
    engine: str,
    resumed: int,
    sha256: str,
) -> Distillation:
    outcomes = [journal.outcomes[index] for index in range(len(asked))]
    taken = [outcome.answer is not None for outcome in outcomes]
    counts = Counter(outcome.reason for outcome in outcomes if outcome.reason is not None)
    prompts = {
        name: {
            "rows": sum(item.prompt == name for item in asked),
            "rewritten": sum(is_taken and item.prompt == name for item, is_taken in zip(asked, taken, strict=True)),
        }
        for name in PROMPTS
        if any(item.prompt == name for item in asked)
    }
    failed = len(asked) - sum(taken)
    notes = () if any(taken) else ("no answer passed: the output has the answers of the data",)
    return Distillation(
        output=str(options.target),
        rows=len(asked),
        rewritten=sum(taken),
        unchanged=sum(
            outcome.answer == item.row.reference.strip() for outcome, item in zip(outcomes, asked, strict=True)
        ),
        kept=failed if options.on_fail == KEEP else 0,
        dropped=failed if options.on_fail == DROP else 0,
        reasons={name: counts[name] for name in REASONS if counts[name]},
        prompts=prompts,
        engine=engine,
        tokens=progress.tokens,
        tokens_per_second=progress.tokens_per_second,
        resumed=resumed,
        seconds=0.0,
        sha256=sha256,
        notes=notes,
    )


# --- the receipt: by which a finished distillation is known ---------------------------------------------------------


def _receipt(target: Path) -> Path:
    return target.with_name(f"{target.name}.receipt")  # of no kind that is read as data


def _write_receipt(target: Path, request: Mapping[str, Any], result: Distillation, options: DistillOptions) -> None:
    content = {"request": dict(request), "on_fail": options.on_fail, "result": result.to_dict(), "versions": versions()}
    write_lines(_receipt(target), [to_bytes(content)])


def _done(target: Path, request: Mapping[str, Any], options: DistillOptions) -> Distillation | None:
    """Return the summary of the same distillation that is done, and whose output is still as it was; else None."""
    try:
        content = read_json(_receipt(target))
        stored = content["result"]
        with target.open("rb") as file:
            is_same = hashlib.file_digest(file, "sha256").hexdigest() == stored["sha256"]
        if not is_same or content["on_fail"] != options.on_fail or difference(content["request"], request, words=WORDS):
            return None
        fields = {name: stored[name] for name in Distillation.__dataclass_fields__}
    except (CheckpointError, OSError, KeyError, TypeError):
        return None
    return Distillation(**fields | {"output": str(target), "notes": ("it was done already", *fields["notes"])})
