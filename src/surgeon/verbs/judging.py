"""Bits per byte of a model and of what is made of it, where the two have other tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.checkpoint.source import Source
from surgeon.data.usage import texts_of
from surgeon.errors import MeasureError
from surgeon.models.loading import load_tokenizer, runs
from surgeon.models.tokenizers import tokenizer_from
from surgeon.options import check_counts, device_option, option
from surgeon.surgery import Surgery, open_source
from surgeon.text import plus_minus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.evals.compare import Estimate

TOKENS = 4096  # of the text, by the source's tokenizer


@dataclass(frozen=True, kw_only=True)
class JudgedOnText:
    """The options of a command that measures a model and its result on a text."""

    eval_data: Sequence[str] = option(
        "Text to measure on, before and after: bits per byte, and how it is written. Repeatable.",
        (),
        metavar="DATA",
        reads=True,
        group="text",
    )
    eval_tokens: int = option(
        "Tokens of that text, by the old tokenizer, whose bits per byte are measured.",
        TOKENS,
        metavar="N",
        group="text",
    )
    sequence_length: int = option("Tokens that the model sees at once.", 512, metavar="N", group="text")
    device: str = device_option()

    def __post_init__(self) -> None:
        """Raise OptionError for a text of no tokens."""
        super().__post_init__()  # type: ignore[misc]  # of Checked, which comes after
        check_counts(self, "eval_tokens", "sequence_length", least=2)


@dataclass(frozen=True, eq=False)
class Judging:
    """Measures bits per byte of `source` and of a result on the same `text`."""

    source: Source
    tokenizer: "PreTrainedTokenizerBase"
    text: str
    sequence_length: int
    device: str

    @cached_property
    def before(self) -> "Estimate":
        """The bits per byte of the source. Raises MeasureError where it has none."""
        return self._measured(self.source, self.tokenizer)

    def result(self, output: Path) -> "Estimate":
        """Return the bits per byte of a written result."""
        return self._measured(open_source(output), load_tokenizer(str(output)))

    def after(self, output: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return both as a row for people and as entries for JSON."""
        before, after = self.before, self.result(output)
        said = [plus_minus(each.value, each.error) for each in (before, after)]
        row = ("bits per byte", f"{said[0]} → {said[1]}  (on {len(self.text.encode()):,} bytes of text)")
        entries = {
            "before": before.value,
            "after": after.value,
            "errors": {"before": before.error, "after": after.error},
            "bytes": len(self.text.encode()),
        }
        return [row], {"bits_per_byte": entries}

    def _measured(self, source: Source, tokenizer: "PreTrainedTokenizerBase") -> "Estimate":
        from surgeon.evals.bits import bits_per_byte
        from surgeon.models.device import resolve_device

        with runs(source.label):
            length, device = self.sequence_length, resolve_device(self.device)
            return bits_per_byte(source, tokenizer, self.text, sequence_length=length, device=device)


@dataclass(frozen=True)
class JudgedReport:
    """Reports what was `told` of a surgery before its result is written, and its bits per byte afterwards."""

    told: tuple[list[tuple[str, str]], dict[str, Any]]
    judging: Judging | None

    def preview(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return what is known of the result, as rows for people and as entries for JSON."""
        return self.told

    def after(self, output: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return the bits per byte, measured once the result is there; nothing without a text."""
        return ([], {}) if self.judging is None else self.judging.after(output)


def judged_by(begun: Surgery, options: Any, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Judging | None:
    """Return what measures a model and its result; None where no text is given, or the model is itself a plan."""
    if not options.eval_data:
        return None
    if begun.plan.steps:
        raise MeasureError("bits per byte are measured of a checkpoint, and this one is not saved yet",
                           hint="Save it first, or leave out --eval-data.")  # fmt: skip
    if tokenizer is None:
        with runs(begun.source.label):
            tokenizer = tokenizer_from(begun.tokenizer_files, begun.spec.config)
    from surgeon.data.rows import encode

    columns = getattr(options, "columns", None)
    text = "\n".join(texts_of(options.eval_data, tokenizer, most=32 * options.eval_tokens, columns=columns))
    ids = encode(text, tokenizer)
    if len(ids) > options.eval_tokens:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        text = text[: offsets[options.eval_tokens - 1][1]]
    return Judging(begun.source, tokenizer, text, options.sequence_length, options.device)
