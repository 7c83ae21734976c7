"""The loop of a distillation: rows in windows, written in batches, checked, tried again, and kept on disk."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from surgeon.rewriting.checks import Checks
from surgeon.rewriting.engines import Engine
from surgeon.rewriting.journal import Journal, Outcome
from surgeon.rewriting.prompts import COLUMN, Row

WINDOW = 512  # rows that are sorted by length and put into batches together


@dataclass(slots=True)
class Progress:
    """How far a distillation is. `tokens` and `seconds` are those of this process, spent on writing alone."""

    rows: int
    done: int = 0
    accepted: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None


Watch = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """A row, the name of its prompt and the prompt's tokens; None where they leave no room for an answer."""

    row: Row
    prompt: str
    ids: Sequence[int] | None


def rewrite(
    asked: Sequence[Asked], engine: Engine, checks: Checks, journal: Journal, *, samples: int, watch: Watch
) -> Progress:
    """Write an answer to every row that the journal does not have, up to `samples` times until one passes the checks.

    Batches are those of all rows of a window, and every draw has a seed of its own, so that a run which was interrupted
    writes what one that was not would have written.
    """
    progress = Progress(len(asked), len(journal.outcomes), _accepted(journal))
    for start in range(0, len(asked), WINDOW):
        window = range(start, min(start + WINDOW, len(asked)))
        if all(index in journal.outcomes for index in window):
            continue
        full = [index for index in window if asked[index].ids is None and index not in journal.outcomes]
        journal.add(Outcome(index, None, "prompt", 0, 0) for index in full)
        rows = [index for index in window if asked[index].ids is not None]
        prompts = [_ids(asked[index]) for index in rows]
        for places in engine.plan(prompts) if rows else []:
            batch = [rows[place] for place in places]
            if all(index in journal.outcomes for index in batch):
                continue
            began = monotonic()
            outcomes = _written(batch, asked, engine, checks, samples)
            progress.seconds += monotonic() - began
            progress.tokens += sum(outcome.tokens for outcome in outcomes)
            journal.add(outcomes)
            progress.done, progress.accepted = len(journal.outcomes), _accepted(journal)
            watch(progress)
    return progress


def _written(
    batch: Sequence[int], asked: Sequence[Asked], engine: Engine, checks: Checks, samples: int
) -> list[Outcome]:
    """Return what comes of the rows of a batch: the first sample that passes, else the fault of the last."""
    done: dict[int, Outcome] = {}
    tokens = dict.fromkeys(batch, 0)
    for attempt in range(1, samples + 1):
        left = [index for index in batch if index not in done or done[index].answer is None]
        if not left:
            break
        answers = engine.write([_ids(asked[index]) for index in left], left, attempt)
        for index, written in zip(left, answers, strict=True):
            tokens[index] += written.num_tokens
            fault = checks.fault(written.text, asked[index].row, is_finished=written.is_finished)
            done[index] = Outcome(index, None if fault else written.text, fault, attempt, tokens[index])
    return [done[index] for index in batch]


def lines(
    asked: Sequence[Asked], journal: Journal, teacher: dict[str, Any], *, seed: int, drops: bool
) -> Iterator[bytes]:
    """Yield the lines of the output in the order of the data: records that `finetune` and `evaluate` read."""
    for index, item in enumerate(asked):
        outcome = journal.outcomes[index]
        if outcome.answer is None and drops:
            continue
        record = dict(item.row.record) if outcome.answer is None else item.row.answered(outcome.answer)
        record[COLUMN] = {
            "status": "kept" if outcome.answer is None else "accepted",
            "reason": outcome.reason,
            "prompt": item.prompt,
            "sample": outcome.sample,
            "seed": seed,
            **teacher,
            "original": None if outcome.answer is None else item.row.reference,
        }
        yield (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _accepted(journal: Journal) -> int:
    return sum(outcome.answer is not None for outcome in journal.outcomes.values())


def _ids(asked: Asked) -> Sequence[int]:
    assert asked.ids is not None
    return asked.ids
