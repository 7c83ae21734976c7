"""The options of a learned growth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.options import (
    Checked,
    OptionError,
    check_counts,
    device_option,
    flag_of,
    in_python,
    option,
    progress_option,
)
from surgeon.progress import Progress

GROUP = "learning"
RATE = 1e-3  # of maps: a step moves all layers at once; at 3e-3 the loss of a trained toy rose


@dataclass(frozen=True, kw_only=True)
class LearnOptions(Checked):
    """Whether the maps of a growth are trained, on what, and where the run is kept."""

    learn: int | None = option(
        "Train the maps of the growth for so many steps on --data; of learned and exact the better is kept.",
        None,
        metavar="STEPS",
        group=GROUP,
    )
    data: Sequence[str] = option(
        "Text to learn on: .txt, .jsonl, .csv, .parquet, Hub dataset ... Repeatable.",
        (),
        metavar="DATA",
        reads=True,
        group=GROUP,
    )
    eval_data: Sequence[str] = option(
        "Text that decides between learned and exact. Repeatable. Default: a twentieth of --data.",
        (),
        metavar="DATA",
        reads=True,
        group=GROUP,
    )
    lr: float = option("Peak learning rate of the maps.", RATE, metavar="LR", group=GROUP)
    sequence_length: int | None = option(
        "Tokens per sequence. Default: 1024, or the model's maximum if smaller.", None, metavar="T", group=GROUP
    )
    batch_size: int | None = option(
        "Sequences per batch. Default: 8 a step, in as large batches as fit the memory.", None, metavar="N", group=GROUP
    )
    run_dir: str | None = option(
        "Where the learning keeps its state, so that the same command goes on. Default: OUT.learn, until OUT is there.",
        None,
        metavar="DIR",
        writes=True,
        group=GROUP,
    )
    device: str = device_option()
    progress: Progress | bool | None = progress_option()
    measure: bool = in_python("False: read headers only, and learn nothing yet; the sizes are exact.", True)

    def check_learning(self, others: Any) -> None:
        """Raises OptionError for options that have no effect, or are missing; `others` are what --learn forbids."""
        if self.learn is None:
            if name := next((name for name in ("data", "eval_data", "run_dir") if getattr(self, name)), None):
                raise OptionError(
                    name, f"{flag_of(name)} has no effect without --learn", hint="Such as --learn 100 --data FILE."
                )
            return
        check_counts(self, "learn", least=0)
        check_counts(self, "batch_size")
        check_counts(self, "sequence_length", least=2)
        if not 0 < self.lr < 100:
            raise OptionError("lr", f"--lr is {self.lr:g}; a rate is above 0", hint=f"Such as --lr {RATE:g}.")
        if self.learn and not self.data:
            raise OptionError("learn", "--learn needs a text to learn on", hint="Give one: --data FILE.")
        if name := next((name for name, value in others.items() if value), None):
            raise OptionError(
                "learn",
                f"--learn is for depth and width, not for {flag_of(name)}",
                hint=f"Leave out {flag_of(name)}.",
            )
