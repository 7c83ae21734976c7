"""What recipes know of commands: their options by name, how they are checked, planned and run.

The command line implements `Commands`; recipes stand below it and name no command.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from surgeon.draft import Draft
from surgeon.errors import RecipeError
from surgeon.surgery import Surgery

# Options of commands that `surgeon run` gives itself, or that make no sense in a recipe.
RESERVED = (
    "output",
    "overwrite",
    "resume",
    "run-dir",
    "dry-run",
    "json",
    "markdown",
    "quiet",
    "debug",
    "check",
    "help",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An option of a command, or its argument, as a recipe spells it.

    `flag` turns it on, `off` turns a switch off where that has a spelling. `reads` marks what names files, models or
    data that are read, `is_model` models; `writes` what names a file to write; `decides` is False for what changes no
    number. `words` are all that the value can be, `aliases` their other spellings; () where any text goes.
    """

    name: str
    kind: Literal["text", "integer", "number", "switch"]
    help: str
    flag: str = ""
    off: str = ""
    is_list: bool = False
    is_argument: bool = False
    is_required: bool = False
    reads: bool = False
    is_model: bool = False
    writes: bool = False
    decides: bool = True
    words: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


class StepError(RecipeError):
    """A command of a recipe ended with `status`; it has said why on standard error."""

    def __init__(self, message: str, *, status: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class UsageError(RecipeError):
    """The options of a command are wrong; `option` names the one at fault, where it is one."""

    def __init__(self, message: str, *, option: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.option = option


class Commands(Protocol):
    """The commands of the command line. `words` are what one would type after the command's name."""

    def names(self) -> Sequence[str]:
        """Return the names of the commands that can be steps."""

    def keys(self, command: str) -> Mapping[str, Key]:
        """Return the options and arguments of a command by their names in a recipe."""

    def check(self, command: str, words: Sequence[str]) -> None:
        """Raise UsageError for options that the command would refuse before it reads anything."""

    def is_surgery(self, command: str) -> bool:
        """Return whether the command is a surgery, which can be planned from headers."""

    def continues(self, command: str) -> bool:
        """Return whether the surgery can begin with a model that is planned and not written."""

    def plan(self, command: str, words: Sequence[str], model: Surgery | None, *, measure: bool = False) -> Surgery:
        """Return a surgery; with a `model` it begins there instead of what `words` name.

        It is planned from headers, unless `measure`: then scores are taken.
        """

    def repeat(self, command: str, step: Mapping[str, Any], model: Surgery | None) -> Surgery:
        """Return the surgery that a step of a receipt describes, on a model, or of None where it begins without one.

        The step's entries are the options that decided it.
        """

    def draft(self, command: str, words: Sequence[str], surgery: Surgery) -> Draft:
        """Return the result that a surgery would write with the command's options for writing."""

    def write(self, command: str, words: Sequence[str], surgery: Surgery) -> dict[str, Any]:
        """Write a surgery with the command's options for writing, and return its JSON object."""

    def run(self, command: str, words: Sequence[str]) -> dict[str, Any]:
        """Run a command in a process of its own, and return its JSON object. Raises StepError where it fails."""
