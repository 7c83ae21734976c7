"""Everything that surgeon raises on purpose.

SurgeonError
├── CheckpointError   a source that is missing, damaged or not a checkpoint
├── DataError         data that is missing, damaged, or in none of the forms that surgeon reads
├── HubError          the Hub could not be reached, or has no such thing
├── MeasureError      a model that cannot be run on text here, or a text that is none
├── TrainingError     a run that cannot go on: it diverged, or the memory is full
├── PlanError         a surgery that the model's code cannot express, or that contradicts itself
├── OutputError       the result cannot be written: it exists, the disk is full, no permission
└── VerificationError what was written does not compute what it should, or cannot be loaded to see

Anything else that escapes is a defect of surgeon.
"""


class SurgeonError(Exception):
    """A mistake or a misfortune that the user can mend: one sentence, and a hint to type or to read."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class CheckpointError(SurgeonError):
    """The source is missing, damaged, or not a checkpoint."""


class DataError(SurgeonError):
    """The data is missing, damaged, or in none of the forms that surgeon reads."""


class HubError(SurgeonError):
    """The Hub could not be reached, or does not have (or does not show) what was asked for."""


class PlanError(SurgeonError):
    """The surgery is refused: this model's code cannot express its result, or the request contradicts itself."""


class MeasureError(SurgeonError):
    """The model cannot be measured: its code cannot run here, or what it was given to read is no text."""


class OutputError(SurgeonError):
    """The result cannot be written."""


class TrainingError(SurgeonError):
    """The run cannot go on: its loss is no number any more, or the memory is full."""


class VerificationError(SurgeonError):
    """What was written does not compute what the plan promised, or cannot be loaded to see whether it does."""
