"""`surgeon plot`."""

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import command as options

GROUP = "training"
EXAMPLE = "surgeon plot healed.run other.run -o loss.png"


def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Directories of runs (OUT.run), or their metrics.jsonl.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The picture: .png, .svg or .pdf.")
    ] = Path("loss.png"),
    x: Annotated[str, typer.Option(metavar="AXIS", help="Losses against steps or tokens.")] = "steps",
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Draw the losses of one or more training runs."""
    from surgeon.cli.terminal import emit, emit_json
    from surgeon.plots.figure import check_picture
    from surgeon.plots.training import AXES, plot_losses, series
    from surgeon.train.run_dir import METRICS, read_metrics

    if x not in AXES:
        raise typer.BadParameter(f"{x!r} is none of {', '.join(AXES)}", param_hint="--x")
    check_picture(output, {"RUN": tuple(str(run / METRICS if run.is_dir() else run) for run in runs)})
    records_of = [(run, read_metrics(run)) for run in runs]
    plot_losses(records_of, output, x=x)
    if not json:
        emit(f"{output}")
        return
    summaries = []
    for run, records in records_of:
        losses, evaluations = series(records, "loss"), series(records, "eval_loss")
        best = min(zip(evaluations[1], evaluations[0], strict=True), default=(None, None))
        summaries.append(
            {
                "run": str(run),
                "steps": records[-1]["step"],
                "train_loss": losses[1][-1] if losses[1] else None,
                "eval_loss": evaluations[1][-1] if evaluations[1] else None,
                "best_eval_loss": best[0],
                "best_step": best[1],
            }
        )
    emit_json({"output": str(output), "runs": summaries})
