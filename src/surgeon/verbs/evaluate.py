"""The verb `evaluate`: the scores of a model on data, of its gists, on tasks, and of answers before a judge."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from time import monotonic
from typing import Any

from surgeon.checkpoint.header import is_quantized
from surgeon.checkpoint.source import Source
from surgeon.data.documents import check_there
from surgeon.errors import DataError
from surgeon.evals.evaluation import Evaluation, checked_target, context_of, open_evaluated, write_predictions
from surgeon.evals.gist import GistEvaluation, GistEvaluationOptions, score_gist
from surgeon.evals.harness import TaskEvaluation, TaskEvaluationOptions, run_tasks
from surgeon.evals.judge import Case, Judge, JudgementOptions, load_judge
from surgeon.evals.options import BATCH_SIZE, MAX_NEW_TOKENS, METRICS, OF_TEXT, EvaluationOptions, MetricOptions
from surgeon.evals.suite import SuiteEvaluation, SuiteOptions
from surgeon.evals.verdicts import Judgement
from surgeon.options import (
    OptionError,
    adapter_option,
    check_counts,
    device_option,
    flag_of,
    option,
    revision_option,
    same_option,
    takes,
    trust_option,
    words,
)
from surgeon.plan.dequantizing import dequantized

# The options that have no effect on an evaluation of the harness's tasks, and of gists.
_NOT_WITH = {
    "tasks": (
        "data",
        "columns",
        "metric",
        "sequence_length",
        "stride",
        "documents",
        "max_new_tokens",
        "draft_tokens",
        "extract",
        "predictions",
        "judge",
        "gist",
    ),
    "gist": ("metric", "baseline", "sequence_length", "stride", "documents", "extract", "chat"),
}


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(MetricOptions):
    """The options of the command `evaluate`, which is one of four evaluations: of a metric, of several tasks in one
    table, of the harness's tasks, or of gists.
    """

    data: Sequence[str] = same_option(MetricOptions, "data", default=())
    tasks: Sequence[str] | None = option(
        "Run these tasks of lm-evaluation-harness instead: arc_easy,boolq",
        None,
        metavar="NAMES",
        parse=words,
        group="what is measured",
    )
    task_dir: str | os.PathLike[str] | None = same_option(TaskEvaluationOptions, "task_dir")
    gist: bool = option(
        "Score records with the whole prompt, its gist, and no prompt: loss, ROUGE-L, exact match.",
        False,
        group="gists",
    )
    gist_tokens: int | None = option(
        "With --gist: number of gist tokens. Default: the model's number.", None, metavar="K", group="gists"
    )
    adapter: str | os.PathLike[str] | None = adapter_option()
    device: str = device_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tasks is None and not self.data:
            raise OptionError("data", "there is nothing to evaluate on", hint="Give --data FILE, or --tasks.")
        if self.tasks is None and self.task_dir is not None:
            raise OptionError("task_dir", "--task-dir has no effect without --tasks", hint="Add --tasks NAMES.")
        check_counts(self, "samples", "max_new_tokens", "draft_tokens", "batch_size", "stride", "gist_tokens")
        check_counts(self, "sequence_length", least=2)
        for name in ("gist_tokens", "adapter"):
            if getattr(self, name) is not None and not self.gist:
                raise OptionError(name, f"{flag_of(name)} has no effect without --gist", hint="Add --gist.")
        kind = "tasks" if self.tasks is not None else "gist" if self.gist else ""
        for name in _NOT_WITH.get(kind, ()):
            if getattr(self, name) and (name, getattr(self, name)) != ("metric", METRICS[0]):
                hint = f"Leave out {flag_of(name)}, or --{kind}."
                raise OptionError(name, f"{flag_of(name)} does not go with --{kind}", hint=hint)
        if "," in self.metric:
            SuiteOptions(**self.keywords_for(SuiteOptions))
        elif not kind:
            EvaluationOptions(**self.keywords_for(EvaluationOptions))

    def keywords_for(self, options: type) -> dict[str, Any]:
        """Return the fields that another dataclass of options has too, as keywords."""
        return {item.name: getattr(self, item.name) for item in fields(options) if hasattr(self, item.name)}


def run(
    model: str, options: EvaluateOptions, *, quiet: bool
) -> Evaluation | TaskEvaluation | GistEvaluation | SuiteEvaluation:
    """Return the evaluation that the command's options ask for."""
    if "," in options.metric:
        return evaluate_suite(model, **options.keywords_for(SuiteOptions))
    if options.tasks is not None:
        return evaluate_tasks(model, options.tasks, **options.keywords_for(TaskEvaluationOptions), quiet=quiet)
    if options.gist:
        keywords = options.keywords_for(GistEvaluationOptions)
        return evaluate_gist(model, tokens=options.gist_tokens, **keywords)
    return evaluate(model, **options.keywords_for(EvaluationOptions))


@takes(EvaluationOptions)
def evaluate(model: str | os.PathLike[str], options: EvaluationOptions) -> Evaluation:
    """Return the scores of a checkpoint directory or Hub model on data, and with a `baseline` those of that model too.

    `metric` is "perplexity" of the first `samples` (64) rows of `sequence_length` (512) tokens, or with a `stride` of
    windows over as many tokens; "exact-match" or "rouge-l" of greedy answers of up to `max_new_tokens` (256); "choice";
    "pseudo-perplexity" of a masked language model; "classification"; or "acceptance" of its tokens by the `baseline`,
    for which it would be the draft. Of records all are used, or `samples`.
    `extract` is a regular expression whose last match is compared, `chat` puts prompts into the tokenizer's chat
    template, `predictions` is a .jsonl to write. `judge` is a model that compares each answer with the baseline's:
    `surgeon.judge_answers`.

    Raises DataError for data that cannot be read or has no answers, MeasureError for a model that cannot be evaluated
    and for a baseline with other tokens, PlanError for options that contradict each other, OutputError.

        print(surgeon.evaluate("gpt2-large-30", data=["text.txt"], baseline="gpt2-large"))
    """
    from surgeon.models.loading import runs

    with runs(os.fspath(model), trust_remote_code=options.trust_remote_code):
        return _evaluated(model, options)


def _evaluated(model: str | os.PathLike[str], options: EvaluationOptions) -> Evaluation:
    """Return the scores of a model, and of its baseline, on data."""
    began = monotonic()
    check_there(options.data)
    target = None if options.predictions is None else checked_target(Path(options.predictions))
    sources: list[Source] = [open_evaluated(model, options.revision)]
    sources += [] if options.baseline is None else [open_evaluated(options.baseline, None)]
    if options.metric in OF_TEXT and not options.documents:  # what streams has weights; the rest is run as it is stored
        sources = [dequantized(source) if is_quantized(source.config) else source for source in sources]
    context = context_of(sources, options.device)
    judging = None
    if options.judge is not None:
        length = options.max_new_tokens or MAX_NEW_TOKENS
        amount: dict[str, Any] = {"samples": options.samples, "max_new_tokens": length}
        judging = load_judge(options.judge, options.data, context.device, columns=options.columns, **amount)
    if options.documents:
        from surgeon.evals.whole import evaluate_documents as score
    elif options.metric == "perplexity":
        from surgeon.evals.perplexity import evaluate_perplexity as score
    elif options.metric == "pseudo-perplexity":
        from surgeon.evals.masked import evaluate_pseudo_perplexity as score
    elif options.metric == "acceptance":
        from surgeon.evals.drafts import evaluate_acceptance as score
    elif options.metric == "classification":
        from surgeon.evals.classes import evaluate_classes as score
    elif options.metric == "choice":
        from surgeon.evals.choices import evaluate_choices as score
    else:
        from surgeon.evals.answers import evaluate_answers as score

    evaluation = score(context, options)
    if target is not None:
        write_predictions(evaluation.predictions, target)
    if judging is not None:  # the models are out of memory now, and their answers are on disk
        from surgeon.evals.answers import with_verdicts

        evaluation = with_verdicts(evaluation, *judging, context, batch_size=options.batch_size or BATCH_SIZE)
        if target is not None:
            write_predictions(evaluation.predictions, target)
    return replace(evaluation, seconds=monotonic() - began)


@takes(SuiteOptions)
def evaluate_suite(model: str | os.PathLike[str], options: SuiteOptions) -> SuiteEvaluation:
    """Return the scores of a model on several tasks: each of `data` with its `metric`, which a comma separates.

    With a `baseline` there are differences and the recovery: 100 times the mean over tasks of the model's scores over
    that of the baseline's. Other options hold for the metrics on which they have an effect. `predictions` is a .jsonl.

    Raises OptionError for options that do not fit, and what `surgeon.evaluate` raises.

        tasks = ["questions.jsonl", "instructions.jsonl"]
        metrics = "exact-match,rouge-l"
        print(surgeon.evaluate_suite("gpt2", data=tasks, metric=metrics, extract="number", max_new_tokens=16))
    """
    began = monotonic()
    target = None if options.predictions is None else checked_target(Path(options.predictions))

    from surgeon.models.loading import runs

    with runs(os.fspath(model), trust_remote_code=options.trust_remote_code):
        suite = SuiteEvaluation({name: _evaluated(model, task) for name, task in options.tasks.items()})
    if target is not None:
        write_predictions(suite.predictions, target)
    return replace(suite, seconds=monotonic() - began)


@takes(GistEvaluationOptions)
def evaluate_gist(model: str | os.PathLike[str], options: GistEvaluationOptions) -> GistEvaluation:
    """Return the scores of a model with gist tokens on records with the whole prompt, its gist, and no prompt.

    Gists have `tokens` tokens, by default as many as the checkpoint says. The loss is of the records' answers, under
    the mask of training; ROUGE-L and exact match are of greedy answers of up to `max_new_tokens` (256), generated
    after the cached gist alone. `samples` is the number of records (all), `predictions` a .jsonl to write.
    `judge` is a model that compares the gist's answers, and those without a prompt, with those of the full prompt.
    `adapter` is a directory of adapters that were trained with a frozen reader: the model with them computes the gist;
    the model without them reads it, and the other forms.

    Raises PlanError for a model without gist tokens and for other adapters, DataError for records without a prompt or
    an answer, MeasureError for a model that cannot be evaluated, OutputError.

        print(surgeon.evaluate_gist("SmolLM2-gist", data=["instructions.jsonl"], max_new_tokens=16))
    """
    from surgeon.models.loading import runs

    with runs(os.fspath(model), trust_remote_code=options.trust_remote_code):
        return score_gist(model, options)


@takes(TaskEvaluationOptions)
def evaluate_tasks(
    model: str | os.PathLike[str], tasks: Sequence[str], options: TaskEvaluationOptions
) -> TaskEvaluation:
    """Return the results of lm-evaluation-harness on its tasks, or on those of the files in `task_dir`.

    `samples` is the number of records per task, `chat` applies the chat template. The harness loads the model itself,
    in the precision in which it is stored. Without `quiet` its log is streamed to standard error.

    Raises MeasureError where it is not installed, fails, or writes no results; PlanError for a task_dir that is none.

        print(surgeon.evaluate_tasks("gpt2", "hellaswag,arc_easy", limit=100))
    """
    return run_tasks(model, tasks, options)


@takes(JudgementOptions)
def judge_answers(
    judge: str | os.PathLike[str],
    prompts: Sequence[str],
    answers: Sequence[str],
    others: Sequence[str],
    options: JudgementOptions,
) -> Judgement:
    """Return a local model's verdicts on two answers to each prompt, and how often the first wins: the win rate.

    `judge` is the checkpoint directory or Hub id of a causal model. It is asked in both orders, in its chat template
    where it has one, and its reply is the likeliest of three letters; where the orders disagree it is a tie.

    Raises DataError for lists of different lengths, MeasureError for a judge that cannot be asked.

        print(surgeon.judge_answers("SmolLM2-135M", ["2 + 2?"], ["4"], ["5"]))
    """
    from surgeon.models.device import resolve_device
    from surgeon.models.loading import runs

    if not len(prompts) == len(answers) == len(others):
        counts = f"{len(prompts)} prompts, {len(answers)} answers and {len(others)} others"
        raise DataError(f"{counts} make no pairs", hint="Give as many of each.")
    if not prompts:
        raise DataError("there are no answers to judge", hint="Give one prompt at least, with two answers.")
    cases = [Case(f"prompt {index}", prompt) for index, prompt in enumerate(prompts)]
    with runs(os.fspath(judge), trust_remote_code=options.trust_remote_code):
        loaded = Judge(open_evaluated(judge, options.revision), resolve_device(options.device))
        return loaded.compare(cases, answers, others, batch_size=options.batch_size)
