"""The result of an attribution: for each query the rows that helped it and those that harmed it, and its files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon import text
from surgeon.attribution.estimators import Scores
from surgeon.checkpoint.output import staged, write_files
from surgeon.checkpoint.receipt import to_bytes, versions
from surgeon.errors import OutputError
from surgeon.showing import Shown
from surgeon.text import printable

ABOUT, SCORES = "attribution.json", "scores.parquet"
SHOWN = 88  # characters of a text in a table


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the data: its number from 0, in the order of reading, and the number of its document in that data.

    `score` is its score for a query, and `share` the part that this is of the sum of all rows' scores without signs.
    """

    row: int
    score: float
    share: float
    data: str
    document: int
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Query:
    """A query, with the rows that helped it most, the best first, and those that harmed it most, the worst first."""

    text: str
    helpful: tuple[Row, ...]
    harmful: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it."""
        rows = {name: [row.to_dict() for row in getattr(self, name)] for name in ("helpful", "harmful")}
        return {"text": self.text, **rows}


@dataclass(frozen=True, repr=False)
class Attribution(Shown):
    """Which rows of the data helped and harmed each query. `output` is a directory with the scores of all rows.

    `checkpoints` are those whose scores were averaged, `numbers` those that a row's gradient was kept as.

        found = surgeon.attribute("gpt2", data=["text.txt"], query=["questions.jsonl"], output="taught")
        print(found.queries[0].helpful[0].text)
    """

    output: str
    method: str
    queries: tuple[Query, ...]
    rows: int
    checkpoints: tuple[str, ...]
    numbers: int | None
    attributed: float | None
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it."""
        return {
            "output": self.output,
            "method": self.method,
            "queries": [query.to_dict() for query in self.queries],
            "rows": self.rows,
            "checkpoints": list(self.checkpoints),
            "numbers": self.numbers,
            "attributed": self.attributed,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }

    @property
    def headline(self) -> str:
        """Where the scores are, and of how much."""
        return f"{self.output}, {self.rows:,} rows for {len(self.queries):,} queries, by {self.method}"

    def to_text(self) -> str:
        """Return this for people."""
        parts = []
        for number, query in enumerate(self.queries):
            parts.append(f"query {number}: {brief(query.text)}")
            lines = [
                [kind, str(row.row), f"{row.score:+.3g}", f"{100 * row.share:.2f} %", brief(row.text)]
                for kind, rows in (("helpful", query.helpful), ("harmful", query.harmful))
                for row in rows
            ]
            parts.append(text.table(["", "row", "score", "share", "text"], lines) if lines else "no row has a score")
        facts = [("method", self.method), ("rows", f"{self.rows:,}")]
        facts += [("checkpoints", ", ".join(self.checkpoints))] if self.checkpoints else []
        facts += [] if self.numbers is None else [("gradients", f"{self.numbers:,} numbers a row")]
        if self.attributed is not None:
            facts += [("attributed", f"{100 * self.attributed:.0f} % of the trained numbers")]
        facts += [("note", note) for note in self.notes]
        facts += [("seconds", f"{self.seconds:.1f}"), ("output", self.output)]
        return "\n\n".join([*parts, text.rows(facts)])


def brief(words: str) -> str:
    """Return a text in one line of at most SHOWN characters."""
    line = printable(" ".join(words.split()))
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of the data and their scores, (rows, queries). All lists have an entry for each row."""

    rows: Sequence[int]
    data: Sequence[str]
    documents: Sequence[int]
    tokens: Sequence[int]
    texts: Sequence[str]
    scores: Scores

    def query(self, number: int, words: str, *, top: int) -> Query:
        """Return a query with its `top` rows of either kind. Equal scores go by the number of the row."""
        scores: NDArray[np.float64] = self.scores[:, number]
        mass = float(np.abs(scores).sum()) or 1.0
        order = np.argsort(-scores, kind="stable")

        def row(index: int) -> Row:
            score = float(scores[index])
            where = (self.data[index], self.documents[index], self.texts[index])
            return Row(int(self.rows[index]), score, abs(score) / mass, *where)

        helpful = [row(index) for index in order[:top].tolist() if scores[index] > 0]
        harmful = [row(index) for index in order[::-1][:top].tolist() if scores[index] < 0]
        return Query(words, tuple(helpful), tuple(harmful))

    def to_parquet(self, path: Path) -> None:
        """Write a line for each row: its number, data, document, tokens and text, and its score for each query."""
        import pyarrow
        import pyarrow.parquet

        columns: dict[str, Any] = {
            "row": pyarrow.array(self.rows, pyarrow.int64()),
            "data": pyarrow.array(self.data, pyarrow.string()),
            "document": pyarrow.array(self.documents, pyarrow.int64()),
            "tokens": pyarrow.array(self.tokens, pyarrow.int64()),
            "text": pyarrow.array(self.texts, pyarrow.string()),
        }
        columns |= {f"query_{number}": pyarrow.array(self.scores[:, number]) for number in range(self.scores.shape[1])}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write(result: Attribution, table: Table, request: Mapping[str, Any], target: Path, *, overwrite: bool) -> None:
    """Write the directory of an attribution, whole or not at all. Raises OutputError where the disk refuses."""
    content = {**result.to_dict(), "request": dict(request), "versions": versions()}
    with staged(target, overwrite=overwrite) as stage:
        try:
            table.to_parquet(stage / SCORES)
        except OSError as error:
            raise OutputError(f"cannot write {target}: {error}", hint="Free some space, or choose -o.") from error
        write_files(stage, {ABOUT: to_bytes(content)})
