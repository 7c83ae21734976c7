"""`surgeon evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli import options

EXAMPLE = "surgeon evaluate gpt2-27 --data text.txt --baseline gpt2-large"

if TYPE_CHECKING:
    from surgeon import Evaluation, GistEvaluation, TaskEvaluation

Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DATA",
        help="Text, or records with an answer: .txt, .jsonl, .parquet or a Hub dataset. Repeatable.",
    ),
]
Metric = Annotated[str, typer.Option(metavar="METRIC", help="perplexity, exact-match, rouge-l or choice.")]
Baseline = Annotated[
    str | None,
    typer.Option(metavar="ORIGINAL", help="Evaluate this model too, on the same tokens; adds differences, recovery."),
]
Samples = Annotated[
    int | None, typer.Option(metavar="N", help="How many rows or records. Default: 64 rows; all records.")
]
SequenceLength = Annotated[int | None, typer.Option(metavar="T", help="Tokens of a row. Default: 512.")]
Stride = Annotated[
    int | None, typer.Option(metavar="S", help="Slide windows of T tokens over the text, S apart, instead of rows.")
]
MaxNewTokens = Annotated[int | None, typer.Option(metavar="N", help="Longest answer that is written. Default: 256.")]
BatchSize = Annotated[int | None, typer.Option(metavar="N", help="Prompts that are answered together. Default: 8.")]
Extract = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help=r"For exact-match: compare the last match's first group: '#### (-?[\d,]+)'"),
]
Chat = Annotated[bool, typer.Option("--chat", help="Put every prompt into the chat template, as messages always are.")]
Predictions = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write prompt, reference, prediction and score to this .jsonl.")
]
Judge = Annotated[
    str | None,
    typer.Option(
        metavar="JUDGE", help="A model that says whose answer is better, beside --baseline or --gist: adds a win rate."
    ),
]
Tasks = Annotated[
    str | None, typer.Option(metavar="NAMES", help="Run these tasks of lm-evaluation-harness instead: arc_easy,boolq")
]
TaskDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="With --tasks: a directory with task files of your own.")
]
Gist = Annotated[
    bool,
    typer.Option(
        "--gist", help="Score records with the whole prompt, its gist, and no prompt: loss, ROUGE-L, exact match."
    ),
]
GistTokens = Annotated[
    int | None, typer.Option(metavar="K", help="With --gist: tokens of a gist. Default: the model's own number.")
]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print a block for a model card.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]

# What only some kinds of evaluation know, by what is asked for instead.
FOREIGN = {
    "--tasks": (
        "data",
        "metric",
        "sequence_length",
        "stride",
        "max_new_tokens",
        "extract",
        "predictions",
        "judge",
        "gist",
    ),
    "--gist": ("metric", "baseline", "sequence_length", "stride", "extract", "chat"),
}


def evaluate(
    model: options.Model,
    data: Data = None,
    metric: Metric = "perplexity",
    baseline: Baseline = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    stride: Stride = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = None,
    extract: Extract = None,
    chat: Chat = False,
    predictions: Predictions = None,
    judge: Judge = None,
    tasks: Tasks = None,
    task_dir: TaskDir = None,
    gist: Gist = False,
    gist_tokens: GistTokens = None,
    adapter: options.Adapter = None,
    device: options.Device = "auto",
    revision: options.Revision = None,
    markdown: Markdown = False,
    json: options.Json = False,
    quiet: Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure perplexity, answers and choices, and what is left of a baseline."""
    from surgeon.cli.terminal import emit, emit_json

    if json and markdown:
        raise typer.BadParameter("goes without --json", param_hint="--markdown")
    given = {
        "data": data,
        "metric": metric,
        "baseline": baseline,
        "samples": samples,
        "sequence_length": sequence_length,
        "stride": stride,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "extract": extract,
        "chat": chat,
        "predictions": predictions,
        "judge": judge,
        "tasks": tasks,
        "task_dir": task_dir,
        "gist": gist,
        "gist_tokens": gist_tokens,
        "adapter": adapter,
        "device": device,
        "revision": revision,
    }
    _check(given)
    found = _evaluated(model, given, quiet=quiet)
    emit_json(found.to_dict()) if json else emit(found.to_markdown() if markdown else found.to_text())


def _check(given: Mapping[str, Any]) -> None:
    """Raise typer's usage error, naming the option, for what does not go together."""
    from surgeon.verbs.evaluate import METRICS

    metric = given["metric"]
    if metric not in METRICS:
        raise typer.BadParameter(f"{metric!r} is none of {', '.join(METRICS)}", param_hint="--metric")
    if given["tasks"] is None and not given["data"]:
        raise typer.BadParameter("nothing to evaluate on: give --data or --tasks", param_hint="--data")
    if given["tasks"] is None and given["task_dir"] is not None:
        raise typer.BadParameter("goes with --tasks", param_hint="--task-dir")
    for name in ("gist_tokens", "adapter"):
        if given[name] is not None and not given["gist"]:
            raise typer.BadParameter("goes with --gist", param_hint=f"--{name.replace('_', '-')}")
    beside = "--tasks" if given["tasks"] is not None else "--gist" if given["gist"] else None
    for name in FOREIGN.get(beside or "", ()):
        if given[name] and (name, given[name]) != ("metric", "perplexity"):
            raise typer.BadParameter(f"does not go with {beside}", param_hint=f"--{name.replace('_', '-')}")
    if given["judge"] is not None and beside is None:
        if metric not in ("exact-match", "rouge-l"):
            raise typer.BadParameter("goes with --metric rouge-l or exact-match, or --gist", param_hint="--judge")
        if given["baseline"] is None:
            raise typer.BadParameter("compares with --baseline ORIGINAL, or with --gist", param_hint="--judge")


def _evaluated(model: str, given: dict[str, Any], *, quiet: bool) -> "Evaluation | TaskEvaluation | GistEvaluation":
    """Return what was asked for, given options that go together."""
    import surgeon
    from surgeon.cli.terminal import TokenMeter

    def chosen(*names: str) -> dict[str, Any]:
        return {name: given[name] for name in (*names, "samples", "batch_size", "device", "revision")}

    if given["tasks"] is not None:
        names = [name.strip() for name in given["tasks"].split(",") if name.strip()]
        return surgeon.evaluate_tasks(model, names, **chosen("baseline", "task_dir", "chat"), quiet=quiet)
    meter = TokenMeter(quiet=quiet)
    if given["gist"]:
        asked = chosen("data", "max_new_tokens", "predictions", "judge", "adapter")
        return surgeon.evaluate_gist(model, tokens=given["gist_tokens"], **asked, meter=meter)
    asked = chosen(
        "data",
        "metric",
        "baseline",
        "sequence_length",
        "stride",
        "max_new_tokens",
        "extract",
        "chat",
        "predictions",
        "judge",
    )
    return surgeon.evaluate(model, **asked, meter=meter)
