"""The verb `plot`: the losses of training runs as a picture."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgeon.plots.training import draw_losses
from surgeon.train.run_dir import read_metrics


def plot(runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, x: str = "steps") -> Any:
    """Return a figure of matplotlib with the losses of one or more training runs, against "steps" or "tokens".

    A run is the directory that training keeps (`OUT.run`), or its metrics.jsonl. Losses are cross-entropies in nats. In
    a notebook the figure shows itself; `figure.savefig("loss.png")` writes it.

    Raises DataError for a run that cannot be read, PlanError where there is no loss to draw, or no matplotlib.

        surgeon.plot(["first.run", "second.run"], x="tokens").savefig("loss.png")
    """
    paths = [Path(run) for run in ([runs] if isinstance(runs, str | os.PathLike) else runs)]
    return draw_losses([(path, read_metrics(path)) for path in paths], x=x)
