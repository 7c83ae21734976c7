"""The options of a search for the best cut: what it minimises, on which texts, and how long it goes on."""

import re
from dataclasses import dataclass
from pathlib import Path

from surgeon.options import Checked, OptionError, check_counts, option

OBJECTIVES = ("kl", "loss")
_TIMES = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


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
