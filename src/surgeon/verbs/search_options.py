"""The options of a search for the best cut: what the result may cost, what may change, and how long it goes on."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from surgeon.options import Checked, OptionError, Words, check_counts, flag_of, option, size_in_bytes
from surgeon.search.budget import OVER
from surgeon.search.journal import FILE
from surgeon.text import parse_count

SEARCH = "search"  # in place of a score: cuts are measured, and the best is taken
OBJECTIVES = ("kl", "loss")
_TIMES = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class TargetOptions(Checked):
    """The options that say what a result may cost, and what a search may change for that."""

    target_parameters: float | str | None = option(
        "The result has at most so many parameters: 100M, 6.7B. With a --score the fewest layers go that it takes.",
        None,
        metavar="N",
        group="how much goes",
    )
    target_memory: int | str | None = option(
        "The result has at most so many bytes of weights, with --context and of its cache: 12GB.",
        None,
        metavar="SIZE",
        group="how much goes",
    )
    target_latency: float | None = option(
        "A token of the result takes at most so many milliseconds on this device, as measured layer by layer.",
        None,
        metavar="MS",
        group="how much goes",
    )
    context: int | None = option(
        "Tokens of the cache that --target-memory counts, and that --target-latency is measured after.",
        None,
        metavar="N",
        group="how much goes",
    )
    over: str | None = option(
        f"What a search may change, with commas between: {', '.join(OVER)}. Default: all that the family can.",
        None,
        metavar="PARTS",
        choices=Words(tuple(OVER), many=True),
        group="how much goes",
    )
    point: int | None = option(
        "Make this cut of the search in the file of --scores-from; 1 is the one that it chose.",
        None,
        metavar="N",
        group="by which scores",
    )

    def asks_for_search(self, scores_from: "str | os.PathLike[str] | None") -> bool:
        """Return whether a search decides where no score is named: for a target, unless scores were taken already."""
        if scores_from is not None:
            return self.point is not None or Path(scores_from).name == FILE
        return self.has_target

    def check_search(self, score: str, *, rule: str | None, has_depth: bool, has_record: bool) -> None:
        """Raises OptionError for what only a search can do where there is none, and for what none can do.

        `rule` is an option that chooses what goes in another way.
        """
        if score != SEARCH:
            names = ("target_latency", "context", "over", "point")
            if (only := next((name for name in names if getattr(self, name) is not None), None)) is not None:
                hint = f"Leave out --score {score}."
                raise OptionError(only, f"{flag_of(only)} is for a search, and --score {score} makes none", hint=hint)
            return
        if rule is not None:
            raise OptionError(
                rule, f"a search chooses what goes, and {flag_of(rule)} does too", hint="Give one of them."
            )
        check_counts(self, "context", "point")
        if self.context is not None and self.target_memory is None and self.target_latency is None:
            hint = "Give --target-memory or --target-latency."
            raise OptionError("context", "--context counts towards no target here", hint=hint)
        if self.target_latency is not None and not 0 < self.target_latency < 1e9:
            hint = "Write milliseconds, such as 12.5."
            raise OptionError("target_latency", f"cannot read {self.target_latency!r} as a time", hint=hint)
        if self.point is not None and not has_record:
            raise OptionError("point", "--point is of a search that was made", hint="Give --scores-from search.json.")
        if not (has_record or has_depth or self.has_target):
            hint = "Give --layers, --target-parameters, --target-memory or --target-latency."
            raise OptionError("score", "a search needs to know how small the result is to be", hint=hint)

    @property
    def has_target(self) -> bool:
        """Whether the result is to meet a target."""
        return any(target is not None for target in (self.target_parameters, self.target_memory, self.target_latency))

    @property
    def parameters(self) -> int | None:
        """The most parameters that the result may have. Raises OptionError for infinity and NaN."""
        if self.target_parameters is None:
            return None
        count = parse_count(self.target_parameters)
        if count is None:
            raise OptionError(
                "target_parameters",
                f"cannot read {self.target_parameters!r} as a number of parameters",
                hint="Write 100M, 6.7B or 6.7e9.",
            )
        return count

    @property
    def nbytes(self) -> int | None:
        """The most bytes of weights that the result may have. Raises OptionError for text that is no size."""
        return None if self.target_memory is None else size_in_bytes(self.target_memory, "target_memory")


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Checked):
    """The options that only a search has."""

    objective: str = option(
        "What a search minimises: kl (the divergence from the unpruned model), or loss (on the text).",
        "kl",
        metavar="WHAT",
        choices=OBJECTIVES,
        group="search",
    )
    evaluations: int = option(
        "Cuts that a search measures, beside the single layers and pairs.", 60, metavar="N", group="search"
    )
    time_limit: str | None = option(
        "Stop a search after so long: 30m, 2h, or seconds. What it has found by then is taken.",
        None,
        metavar="TIME",
        group="search",
    )
    search_dir: Path | None = option(
        "Where a search keeps its state, so that the same command goes on. Default: OUT.search.",
        None,
        metavar="DIR",
        writes=True,
        group="search",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "evaluations")
        _ = self.seconds

    @property
    def seconds(self) -> float | None:
        """The seconds of --time-limit, None without one. Raises OptionError for what is no time."""
        if self.time_limit is None:
            return None
        match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(s|m|min|h|)\s*", str(self.time_limit))
        if match is None or float(match[1]) <= 0:
            hint = "Write 30m, 2h or a number of seconds."
            raise OptionError("time_limit", f"cannot read {self.time_limit!r} as a time", hint=hint)
        return float(match[1]) * _TIMES[match[2]]
