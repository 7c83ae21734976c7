"""The options of an evaluation: of one metric, alone or beside others, and the metrics on which each has an effect."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surgeon.data.records import chosen_columns
from surgeon.evals.metrics import extracted, final_number
from surgeon.options import (
    Checked,
    OptionError,
    Words,
    check_counts,
    columns_option,
    device_option,
    flag_of,
    option,
    progress_option,
    revision_option,
    trust_option,
)
from surgeon.progress import Progress

METRICS = ("perplexity", "exact-match", "rouge-l", "choice", "pseudo-perplexity", "classification", "acceptance")
OF_TEXT = ("perplexity", "pseudo-perplexity", "acceptance")  # the metrics of a text; of the first two less is better
SAMPLES, SEQUENCE_LENGTH = 64, 512  # defaults of a perplexity; of records all are used
NUMBER = "number"  # the --extract that is no regular expression
MAX_NEW_TOKENS, BATCH_SIZE = 256, 8  # defaults of generated answers
DRAFTED = 4  # tokens that a draft proposes at once where nothing is said
# The metrics on which an option has an effect.
METRICS_OF = {
    "sequence_length": ("perplexity", "pseudo-perplexity", "acceptance"),
    "stride": ("perplexity",),
    "documents": ("perplexity",),
    "max_new_tokens": ("exact-match", "rouge-l", "acceptance"),
    "draft_tokens": ("acceptance",),
    "batch_size": ("exact-match", "rouge-l", "classification"),
    "chat": ("exact-match", "rouge-l"),
    "extract": ("exact-match",),
    "predictions": ("exact-match", "rouge-l", "choice", "classification"),
    "judge": ("exact-match", "rouge-l"),
}


@dataclass(frozen=True, kw_only=True)
class MetricOptions(Checked):
    """The options of one metric on data, in the Python call and on the command line."""

    data: Sequence[str] = option(
        "Text, or records with an answer: .txt, .jsonl, .json, .csv, .parquet, or a dataset, saved or on the Hub. "
        "Repeatable.",
        metavar="DATA",
        reads=True,
        group="data",
    )
    columns: str | None = columns_option()
    metric: str = option(
        "perplexity, exact-match, rouge-l, choice, pseudo-perplexity, classification, or acceptance (of the model's "
        "tokens by --baseline, whose draft it would be). Several, such as "
        "exact-match,rouge-l, are of one --data each, in one table with their mean.",
        "perplexity",
        metavar="METRIC",
        choices=Words(METRICS, many=True),
        group="what is measured",
    )
    baseline: str | os.PathLike[str] | None = option(
        "Evaluate this model too, on the same tokens; adds differences and recovery.",
        None,
        metavar="ORIGINAL",
        reads=True,
        group="what is measured",
    )
    samples: int | None = option(
        "Use the first N rows of a text, or records. Default: 64 rows (of pseudo-perplexity 16); all records.",
        None,
        metavar="N",
        group="data",
    )
    sequence_length: int | None = option(
        "Tokens per row of a text. Default: 512 (of pseudo-perplexity 128).", None, metavar="T", group="data"
    )
    stride: int | None = option(
        "Slide windows of T tokens over the text, S apart. Default: rows, each of T tokens.",
        None,
        metavar="S",
        group="data",
    )
    documents: bool = option(
        "Score each document by itself, on the tokens that finetune would train of it.", False, group="data"
    )
    max_new_tokens: int | None = option(
        "Longest generated answer, in tokens. Default: 256. With acceptance: sample so many tokens with the draft too.",
        None,
        metavar="N",
        group="sampling",
    )
    draft_tokens: int | None = option(
        "With acceptance and --max-new-tokens: tokens that the draft proposes at once. Default: 4.",
        None,
        metavar="G",
        group="sampling",
    )
    batch_size: int | None = option("Prompts or texts per batch. Default: 8.", None, metavar="N", group="run")
    extract: str | None = option(
        "With exact-match: compare the final number (after ####, else the last): number; or the first group of a "
        r"regular expression's last match: '#### (-?[\d,]+)'",
        None,
        metavar="REGEX",
        group="what is measured",
    )
    chat: bool = option("Put every prompt into the chat template, as messages always are.", False, group="sampling")
    predictions: str | os.PathLike[str] | None = option(
        "Write prompt, reference, prediction and score to this .jsonl.",
        None,
        metavar="FILE",
        writes=True,
        group="output",
    )
    judge: str | os.PathLike[str] | None = option(
        "A model that compares the answers with the baseline's, or, with --gist, the full prompt's; adds a win rate.",
        None,
        metavar="JUDGE",
        reads=True,
        group="what is measured",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen_columns(self.columns)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(MetricOptions):
    """The options of `surgeon.evaluate`."""

    device: str = device_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()
    progress: Progress | bool | None = progress_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise OptionError("data", "there is no data to evaluate on", hint="Give a text or records: --data FILE.")
        if self.metric not in METRICS:
            hint = "surgeon.evaluate_suite takes several, of one `data` each."
            raise OptionError("metric", f"--metric {self.metric!r} is more than one", hint=hint)
        for name, metrics in METRICS_OF.items():
            value = getattr(self, name)
            if value is not None and value is not False and self.metric not in metrics:
                self._refuse(name, metrics)
        if self.metric == "acceptance" and self.baseline is None:
            message = "acceptance is by the model that the draft writes for"
            raise OptionError("baseline", message, hint="Name it: --baseline TARGET.")
        if self.draft_tokens is not None and self.max_new_tokens is None:
            message = "--draft-tokens has no effect where nothing is sampled"
            raise OptionError("draft_tokens", message, hint="Add --max-new-tokens 64.")
        if self.judge is not None and self.baseline is None:
            raise OptionError(
                "judge", "--judge compares with --baseline ORIGINAL, or with --gist", hint="Add one of them."
            )
        check_counts(self, "samples", "max_new_tokens", "draft_tokens", "batch_size", "stride")
        check_counts(self, "sequence_length", least=2)
        length = self.sequence_length or SEQUENCE_LENGTH
        if self.stride is not None and self.stride >= length:
            raise OptionError(
                "stride",
                f"windows of {length} tokens, {self.stride} apart, leave the first of each without context",
                hint=f"Use a --stride below {length}; without it the text is cut into rows.",
            )
        if self.documents and self.stride is not None:
            said = "--documents does not go with --stride: no document is cut into windows"
            raise OptionError("documents", said, hint="Leave one of them out.")
        _ = self.extractor

    def _refuse(self, name: str, metrics: Sequence[str]) -> None:
        message = f"{flag_of(name)} has no effect on {self.metric}"
        others = " and ".join(metrics)
        gists = ", or --gist" if name == "judge" else ""
        raise OptionError(name, message, hint=f"It goes with {others}{gists}.")

    @property
    def extractor(self) -> Callable[[str], str | None] | None:
        """What takes the compared part out of an answer, by `extract`. Raises PlanError for no regular expression."""
        if self.extract is None:
            return None
        if self.extract == NUMBER:
            return final_number
        try:
            pattern = re.compile(self.extract)
        except re.error as error:
            hint = r"Write number, or an expression with one group, such as '#### (-?[\d,]+)'"
            raise OptionError("extract", f"--extract is no regular expression: {error}", hint=hint) from error
        return lambda text: extracted(text, pattern)
