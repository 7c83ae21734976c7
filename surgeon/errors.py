"""Everything that surgeon raises on purpose.

SurgeonError
├── CheckpointError   a source that is missing, damaged or not a checkpoint
├── DataError         data that is missing, damaged, or in none of the forms that surgeon reads
├── HubError          the Hub cannot be reached, or does not have the model or file
├── MeasureError      a model that cannot be run here, or text that cannot be read
├── TrainingError     a run that cannot go on: it diverged, or the memory is full
├── PlanError         a surgery that the model's code cannot express, or that contradicts itself
├── OutputError       the result cannot be written: it exists, the disk is full, no permission
└── VerificationError the written model does not compute what it should, or cannot be loaded

Any other exception is a bug in surgeon.
"""

from surgeon.text import scrubbed


class SurgeonError(Exception):
    """A problem that the user can fix: one sentence, and a hint to type or to read.

    Neither holds a token or password: an answer of the Hub may repeat one, and an endpoint hold one.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(scrubbed(message))
        self.hint = None if hint is None else scrubbed(hint)


class CheckpointError(SurgeonError):
    """The source is missing, damaged, or not a checkpoint."""


class DataError(SurgeonError):
    """The data is missing, damaged, or in none of the forms that surgeon reads."""


class HubError(SurgeonError):
    """The Hub could not be reached, or does not have (or does not show) the model or file."""


class PlanError(SurgeonError):
    """The surgery is refused: this model's code cannot express its result, or the request contradicts itself."""


class MeasureError(SurgeonError):
    """The model cannot be measured: its code cannot run here, or its input is no text."""


class OutputError(SurgeonError):
    """The result cannot be written."""


class TrainingError(SurgeonError):
    """The run cannot go on: its loss is no longer a number, or the memory is full."""


class VerificationError(SurgeonError):
    """The written model does not compute what the plan promised, or cannot be loaded."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or its type where it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
