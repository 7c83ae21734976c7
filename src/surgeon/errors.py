"""Everything that surgeon raises on purpose.

SurgeonError
├── CheckpointError   a source that is missing, damaged or not a checkpoint
├── DataError         data that is missing, damaged, or in none of the forms that surgeon reads
├── HubError          the Hub cannot be reached, or does not have the model or file
├── MeasureError      a model that cannot be run here, or text that cannot be read
├── TrainingError     a run that cannot go on: it diverged, or the memory is full
├── PlanError         a surgery that the model's code cannot express, or that contradicts itself
├── RecipeError       a recipe that is none, or a step of it that fails or misses what it requires
├── OutputError       the result cannot be written: it exists, the disk is full, no permission
└── VerificationError the written model does not compute what it should, or cannot be loaded

Any other exception is a bug in surgeon, or was raised by a library that surgeon called: `library_of` tells which.
"""

import sys
from traceback import walk_tb

from surgeon.text import printable, scrubbed

# Known wherever they are installed; transformers_modules is the code of checkpoints that are trusted.
_LIBRARIES = {"accelerate", "peft", "tokenizers", "torch", "transformers", "transformers_modules"}
# Loggers of libraries that warn, whenever they are imported, of kernels that this machine has not.
NOISY = ("torchao", "torch.utils._pytree")
LONGEST = 1000  # characters of a sentence for the user: names in a hostile file can be as long as the file


class SurgeonError(Exception):
    """A problem that the user can fix: one sentence, and a hint to type or to read.

    Both hold what files say, so they are made short and printable here, once for all errors. Neither holds a
    token or password: an answer of the Hub may repeat one, and an endpoint hold one.

        try:
            surgeon.truncate("gpt2-large", layers=99)
        except surgeon.SurgeonError as error:
            print(f"{error} ({error.hint})")
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(sentence(message))
        self.hint = None if hint is None else sentence(hint)


class CheckpointError(SurgeonError):
    """The source is missing, damaged, or not a checkpoint.

    For example:

        try:
            surgeon.inspect("no/such/directory")
        except surgeon.CheckpointError as error:
            print(error)
    """


class DataError(SurgeonError):
    """The data is missing, damaged, or in none of the forms that surgeon reads.

    For example:

        try:
            surgeon.evaluate("gpt2", data=["missing.txt"])
        except surgeon.DataError as error:
            print(error)
    """


class HubError(SurgeonError):
    """The Hub could not be reached, or does not have (or does not show) the model or file.

    For example:

        try:
            surgeon.inspect("nobody/no-such-model")
        except surgeon.HubError as error:
            print(error)
    """


class PlanError(SurgeonError):
    """The surgery is refused: this model's code cannot express its result, or the request contradicts itself.

    For example:

        try:
            surgeon.truncate("gpt2", layers=0)
        except surgeon.PlanError as error:
            print(error)
    """


class MeasureError(SurgeonError):
    """The model cannot be measured: its code cannot run here, or its input is no text.

    For example:

        try:
            surgeon.prune("gpt2", layers=8, data=["text.txt"], sequence_length=10_000)
        except surgeon.MeasureError as error:
            print(error)
    """


class OutputError(SurgeonError):
    """The result cannot be written.

    For example:

        surgeon.truncate("gpt2", layers=6).save("taken")
        try:
            surgeon.truncate("gpt2", layers=6).save("taken")
        except surgeon.OutputError as error:
            print(error)
    """


class RecipeError(SurgeonError):
    """The recipe is none, or a step of it fails or misses what it requires."""


class TrainingError(SurgeonError):
    """The run cannot go on: its loss is no longer a number, or the memory is full.

    For example:

        try:
            surgeon.finetune("gpt2", data=["text.txt"], output="wild", max_steps=2, lr="50", sequence_length=64)
        except surgeon.TrainingError as error:
            print(error)
    """


class VerificationError(SurgeonError):
    """The written model does not compute what the plan promised, or cannot be loaded.

    For example:

        surgeon.truncate("gpt2", layers=6).save("gpt2-6")
        try:
            surgeon.verify("gpt2-large", "gpt2-6")  # which was made from another model
        except surgeon.VerificationError as error:
            print(error)
    """


def sentence(text: str) -> str:
    """Return text without secrets, printable and not too long to be read: of a longer one the beginning and the end."""
    text = scrubbed(text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 :]}"
    return printable(text)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or its type where it has no message.

    A line that ends in a colon only announces the next one: "Validation error for field 'x':".
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    said = next((line for line in lines if line), type(error).__name__)
    after = lines[lines.index(said) + 1 :] if said in lines else []
    return f"{said} {after[0]}" if said.endswith(":") and after else said


def library_of(error: BaseException) -> str | None:
    """Return the library in whose code an error was raised, None where it was surgeon's, or a user's.

    It is the owner of the innermost frame that is neither the standard library's, for whoever called `json.loads` owns
    its error, nor of code that was made on the way, such as a template. Compiled code has no frames: its error belongs
    to its caller too.
    """
    for frame, _ in reversed(list(walk_tb(error.__traceback__))):
        owner, file = str(frame.f_globals.get("__name__")).partition(".")[0], frame.f_code.co_filename
        if owner in sys.stdlib_module_names or file.startswith("<"):
            continue
        is_installed = "site-packages" in file or "dist-packages" in file
        return owner if owner != "surgeon" and (is_installed or owner in _LIBRARIES) else None
    return None


def failure_of_library(error: BaseException) -> str | None:
    """Return a library's reason for an error that was raised in its code; None for surgeon's own errors and bugs.

    It may be of any class, a bare Exception included; a panic of a library in Rust is no Exception.
    """
    is_failure = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    if not is_failure or isinstance(error, SurgeonError) or library_of(error) is None:
        return None
    return reason(error)


def reason(error: BaseException) -> str:
    """Return what another library says of its error, with its type where the message may be a bare name."""
    said = first_line(error)
    is_bare = isinstance(error, (LookupError, TypeError, AttributeError, AssertionError))
    return f"{type(error).__name__}: {said}" if is_bare and said != type(error).__name__ else said
