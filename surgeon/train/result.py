"""What a finetuning came to, as a person, a script or the next program reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon import text


@dataclass(frozen=True)
class Training:
    """What a run came to. Losses are means in nats a token; `train_loss` of the last tenth of its steps.

    `output` is the checkpoint; None for a run that was stopped by SIGTERM, which `--resume` continues. `steps` and
    `tokens` are of the whole run, `seconds` and `tokens_per_second` of this process's part of it.
    """

    output: Path | None
    run_dir: Path
    steps: int
    tokens: int
    train_loss: float | None
    eval_loss: float | None
    learning_rate: float
    best_step: int | None
    tokens_per_second: float | None
    seconds: float
    plot: Path | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the training as `--json` prints it."""
        return {
            "output": None if self.output is None else str(self.output),
            "run_dir": str(self.run_dir),
            "steps": self.steps,
            "tokens": self.tokens,
            "train_loss": self.train_loss,
            "eval_loss": self.eval_loss,
            "learning_rate": self.learning_rate,
            "best_step": self.best_step,
            "tokens_per_second": self.tokens_per_second,
            "plot": None if self.plot is None else str(self.plot),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }

    def to_text(self) -> str:
        """Return the training for people."""
        losses = [("train loss", self.train_loss), ("validation loss", self.eval_loss)]
        rows = [("steps", f"{self.steps:,}  ({self.tokens:,} tokens)")]
        rows += [(name, f"{loss:.4f} nats a token") for name, loss in losses if loss is not None]
        rows += [("learning rate", f"{self.learning_rate:g}")]
        rows += [] if self.best_step is None else [("best step", f"{self.best_step:,}")]
        rows += [] if self.tokens_per_second is None else [("tokens a second", f"{self.tokens_per_second:,.0f}")]
        rows += [] if self.plot is None else [("plot", str(self.plot))]
        rows += [("note", note) for note in self.notes]
        rows += [("seconds", f"{self.seconds:.1f}"), ("output", str(self.output))]
        return text.rows(rows)
