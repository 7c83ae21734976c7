"""`surgeon evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import options


def evaluate(
    model: options.Model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA",
            help="Text, or records with an answer: .txt, .jsonl, .parquet or a Hub dataset. Repeatable.",
        ),
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="METRIC", help="perplexity, exact-match, rouge-l or choice.")
    ] = "perplexity",
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL", help="Evaluate this model too, on the same tokens; adds differences, recovery."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="How many rows or records. Default: 64 rows; all records.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(metavar="T", help="Tokens of a row. Default: 512.")] = None,
    stride: Annotated[
        int | None, typer.Option(metavar="S", help="Slide windows of T tokens over the text, S apart, instead of rows.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Longest answer that is written. Default: 256.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Prompts that are answered together. Default: 8.")
    ] = None,
    extract: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help=r"For exact-match: compare the last match's first group: '#### (-?[\d,]+)'"),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put every prompt into the chat template, as messages always are.")
    ] = False,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write prompt, reference, prediction and score to this .jsonl.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Run these tasks of lm-evaluation-harness instead: arc_easy,boolq"),
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --tasks: a directory with task files of your own.")
    ] = None,
    gist: Annotated[
        bool,
        typer.Option(
            "--gist", help="Score records with the whole prompt, its gist, and no prompt: loss, ROUGE-L, exact match."
        ),
    ] = False,
    gist_tokens: Annotated[
        int | None, typer.Option(metavar="K", help="With --gist: tokens of a gist. Default: the model's own number.")
    ] = None,
    device: options.Device = "auto",
    revision: options.Revision = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a block for a model card.")] = False,
    json: options.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    debug: options.Debug = False,
) -> None:
    """Measure perplexity, answers and choices, and what is left of a baseline."""
    import surgeon
    from surgeon.cli.display import emit, emit_json
    from surgeon.cli.progress import TokenMeter
    from surgeon.evaluation import METRICS

    if metric not in METRICS:
        raise typer.BadParameter(f"{metric!r} is none of {', '.join(METRICS)}", param_hint="--metric")
    if json and markdown:
        raise typer.BadParameter("goes without --json", param_hint="--markdown")
    if tasks is None and not data:
        raise typer.BadParameter("nothing to evaluate on: give --data or --tasks", param_hint="--data")
    if tasks is None and task_dir is not None:
        raise typer.BadParameter("goes with --tasks", param_hint="--task-dir")
    if gist_tokens is not None and not gist:
        raise typer.BadParameter("goes with --gist", param_hint="--gist-tokens")
    found: surgeon.Evaluation | surgeon.TaskEvaluation | surgeon.GistEvaluation
    if tasks is not None:
        foreign = {
            "--data": data,
            "--metric": metric != "perplexity",
            "--sequence-length": sequence_length,
            "--stride": stride,
            "--max-new-tokens": max_new_tokens,
            "--extract": extract,
            "--predictions": predictions,
            "--gist": gist,
        }
        _refuse(foreign, beside="--tasks")
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        found = surgeon.evaluate_tasks(
            model,
            names,
            baseline=baseline,
            task_dir=task_dir,
            samples=samples,
            batch_size=batch_size,
            chat=chat,
            device=device,
            revision=revision,
            quiet=quiet,
        )
    elif gist:
        foreign = {
            "--metric": metric != "perplexity",
            "--baseline": baseline,
            "--sequence-length": sequence_length,
            "--stride": stride,
            "--extract": extract,
            "--chat": chat,
        }
        _refuse(foreign, beside="--gist")
        found = surgeon.evaluate_gist(
            model,
            data=data or (),
            tokens=gist_tokens,
            samples=samples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            predictions=predictions,
            device=device,
            revision=revision,
            meter=TokenMeter(quiet=quiet),
        )
    else:
        found = surgeon.evaluate(
            model,
            data=data or (),
            metric=metric,
            baseline=baseline,
            samples=samples,
            sequence_length=sequence_length,
            stride=stride,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            extract=extract,
            chat=chat,
            predictions=predictions,
            device=device,
            revision=revision,
            meter=TokenMeter(quiet=quiet),
        )
    emit_json(found.to_dict()) if json else emit(found.to_markdown() if markdown else found.to_text())


def _refuse(foreign: Mapping[str, object], *, beside: str) -> None:
    """Raise typer's usage error, naming the option, for the first that was given and says nothing beside another."""
    if wrong := next((name for name, value in foreign.items() if value), None):
        raise typer.BadParameter(f"does not go with {beside}", param_hint=wrong)
