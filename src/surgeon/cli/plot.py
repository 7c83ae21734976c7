"""`surgeon plot`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.command import Debug, Json, spread
from surgeon.options import Checked, option, overwrite_option
from surgeon.plots.training import AXES

GROUP = "training"
EXAMPLE = "surgeon plot healed.run other.run -o loss.png"
Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Directories of runs (OUT.run), or their metrics.jsonl.")
]


@dataclass(frozen=True, kw_only=True)
class PlotOptions(Checked):
    """The options of `plot`."""

    output: Path = option(
        "The picture: .png, .svg or .pdf.",
        Path("loss.png"),
        names=("--output", "-o"),
        metavar="FILE",
        writes=True,
        group="output",
    )
    overwrite: bool = overwrite_option("Replace an existing picture.")
    x: str = option("Losses against steps or tokens.", "steps", metavar="AXIS", choices=AXES, group="picture")


@spread
def plot(runs: Runs, options: PlotOptions, json: Json = False, debug: Debug = False) -> None:
    """Draw the losses of one or more training runs."""
    from surgeon.cli.terminal import emit, emit_json
    from surgeon.plots.figure import check_picture
    from surgeon.plots.training import plot_losses, series
    from surgeon.train.run_dir import METRICS, read_metrics

    output, reads = options.output, {"RUN": tuple(str(run / METRICS if run.is_dir() else run) for run in runs)}
    check_picture(output, reads, overwrite=options.overwrite)
    records_of = [(run, read_metrics(run)) for run in runs]
    plot_losses(records_of, output, x=options.x)
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
