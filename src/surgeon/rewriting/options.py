"""The options of `distill`."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgeon.data.records import chosen_columns
from surgeon.options import (
    Checked,
    OptionError,
    Words,
    check_counts,
    check_seed,
    columns_option,
    device_option,
    in_python,
    option,
    output_option,
    overwrite_option,
    progress_option,
    revision_option,
    seed_option,
    trust_option,
)
from surgeon.progress import Progress as Bars
from surgeon.rewriting.checks import AUTO, NONE, NUMBER, Checks
from surgeon.rewriting.engines import Writing
from surgeon.rewriting.loop import Watch
from surgeon.rewriting.prompts import PROMPTS
from surgeon.text import sliced

ENGINES = ("auto", "transformers", "vllm")
KEEP, DROP = "keep", "drop"


@dataclass(frozen=True, kw_only=True)
class DistillOptions(Checked):
    """The options of `distill`."""

    data: Sequence[str] = option(
        "Records with an answer (prompt, completion; instruction, output; question, answer; messages ...): .jsonl, "
        ".json, .csv, .parquet, a directory, or a dataset, saved or on the Hub. Repeatable.",
        metavar="DATA",
        reads=True,
        group="data",
    )
    columns: str | None = columns_option()
    output: str | os.PathLike[str] | None = output_option(
        "The .jsonl to write; a name without a suffix gets it. Default: DATA-distill.jsonl.", "FILE"
    )
    overwrite: bool = overwrite_option()
    prompt: str = option(
        "auto (gsm8k where an answer has a number after ####, else sdft), sdft or gsm8k.",
        "auto",
        metavar="PROMPT",
        choices=PROMPTS,
        group="answers",
    )
    extract: str = option(
        "What of an answer must be as in the reference: number, none, auto (number where that has one after ####), or "
        "the last match of a regular expression.",
        AUTO,
        metavar="REGEX",
        choices=Words((AUTO, NUMBER, NONE), others=".*"),
        group="answers",
    )
    on_fail: str = option(
        "keep the data's own answer where none passes, or drop the row.",
        KEEP,
        metavar="WHAT",
        choices=(KEEP, DROP),
        group="answers",
    )
    samples: int = option(
        "Write up to N answers to a row; the first that passes is taken.", 1, metavar="N", group="answers"
    )
    temperature: float = option("Sample at this temperature; 0 is greedy.", 0.0, metavar="T", group="sampling")
    max_new_tokens: int = option(
        "Longest answer, in tokens; one that does not end by then fails.", 512, metavar="N", group="sampling"
    )
    min_length_ratio: float = option(
        "Shortest free text that passes, in characters over the reference's.", 0.3, metavar="R", group="answers"
    )
    max_length_ratio: float = option(
        "Longest free text that passes, in characters over the reference's.", 3.0, metavar="R", group="answers"
    )
    max_copied: float | None = option(
        "Share of runs of 8 words from the reference above which an answer fails. Default: not looked at.",
        None,
        metavar="SHARE",
        group="answers",
    )
    batch_size: int = option("Most prompts per batch.", 16, metavar="N", group="run")
    batch_tokens: int = option(
        "Most tokens per batch, prompts with padding and new ones.", 16384, metavar="N", group="run"
    )
    engine: str = option(
        "auto (vllm on CUDA where it is installed), transformers or vllm.",
        "auto",
        metavar="ENGINE",
        choices=ENGINES,
        group="run",
    )
    seed: int = seed_option()
    device: str = device_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()
    progress: Bars | bool | None = progress_option()
    watch: Watch | None = in_python("Called with the progress after each batch.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        chosen_columns(self.columns)
        if not self.data:
            raise OptionError("data", "there is nothing to rewrite", hint="Name records: --data FILE.")
        check_counts(self, "samples", "max_new_tokens", "batch_size", "batch_tokens")
        if not 0 <= self.temperature < float("inf"):
            raise OptionError(
                "temperature", f"--temperature is {self.temperature}", hint="0 is greedy, 1 the model's own."
            )
        if self.samples > 1 and not self.temperature:
            said = "--samples has no effect without --temperature: greedy answers are the same"
            raise OptionError("samples", said, hint="Add --temperature 1.")
        if not 0 <= self.min_length_ratio < self.max_length_ratio:
            low, high = self.min_length_ratio, self.max_length_ratio
            said = f"--min-length-ratio {low} to --max-length-ratio {high} is no range"
            raise OptionError("min_length_ratio", said, hint="Such as --min-length-ratio 0.3 --max-length-ratio 3.")
        if self.max_copied is not None and not 0 <= self.max_copied <= 1:
            said = f"--max-copied is {self.max_copied}, not between 0 and 1"
            raise OptionError("max_copied", said, hint="Such as --max-copied 0.5.")
        if self.output is not None and Path(self.output).suffix not in ("", ".jsonl"):
            hint = f"Write {Path(self.output).with_suffix('.jsonl')}."
            raise OptionError("output", f"--output {os.fspath(self.output)} is no .jsonl", hint=hint)
        if self.extract not in (AUTO, NUMBER, NONE):
            try:
                re.compile(self.extract)
            except re.error as error:
                hint = "Write number, none, auto, or an expression with one group."
                raise OptionError("extract", f"--extract is no regular expression: {error}", hint=hint) from error

    @property
    def checks(self) -> Checks:
        """What an answer is checked for."""
        return Checks(self.extract, (self.min_length_ratio, self.max_length_ratio), self.max_copied)

    @property
    def writing(self) -> Writing:
        """How answers are written."""
        names = ("max_new_tokens", "temperature", "seed", "batch_size", "batch_tokens")
        return Writing(**{name: getattr(self, name) for name in names})

    @property
    def target(self) -> Path:
        """The file to write."""
        if self.output is not None:
            return Path(self.output).expanduser().with_suffix(".jsonl")
        name = Path(sliced(self.data[0])[0].partition(":")[0]).name
        return Path(f"{name.partition('.')[0] or 'data'}-distill.jsonl")


# The options that decide what is written; --on-fail decides only what becomes of it.
DECIDING = (
    *(
        "columns",
        "prompt",
        "extract",
        "samples",
        "temperature",
        "max_new_tokens",
        "min_length_ratio",
        "max_length_ratio",
    ),
    *("max_copied", "batch_size", "batch_tokens", "seed"),
)
