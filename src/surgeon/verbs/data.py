"""The verb `data`: text that surgeon makes itself, with a tokenizer for it and the loss that a perfect model has."""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.checkpoint.output import check_space, check_target, staged, write_files
from surgeon.checkpoint.receipt import to_bytes
from surgeon.data.question_formation import LEXICONS, Line, Lines, cross_entropy, entropy
from surgeon.errors import OutputError
from surgeon.options import (
    Checked,
    OptionError,
    Words,
    check_seed,
    flag_of,
    option,
    output_option,
    overwrite_option,
    seed_option,
    takes,
)
from surgeon.showing import Shown
from surgeon.text import rows

KIND = Words(("question-formation",))
ABOUT = "grammar.json"


@dataclass(frozen=True, slots=True, repr=False)
class GeneratedData(Shown):
    """The files that were written, and what is known of them.

    `entropy` is that of the grammar in nats a token, over all tokens of a line and its end; `validation_floor` is the
    same of the lines that were drawn for validation.

        made = surgeon.generate_data("question-formation", output="questions", lines=100)
        print(made.files, made.entropy)
    """

    output: str
    lines: Mapping[str, int]  # by split
    files: Mapping[str, str]
    words: int
    entropy: float
    nats_per_line: float
    tokens_per_line: float
    validation_floor: float
    moved: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it."""
        return {
            "output": self.output,
            "lines": dict(self.lines),
            "files": dict(self.files),
            "words": self.words,
            "entropy": self.entropy,
            "nats_per_line": self.nats_per_line,
            "tokens_per_line": self.tokens_per_line,
            "validation_floor": self.validation_floor,
            "moved": self.moved,
            "seconds": round(self.seconds, 3),
        }

    @property
    def headline(self) -> str:
        """Where the text is, its lines and its entropy."""
        counts = ", ".join(f"{count:,} {split}" for split, count in self.lines.items())
        return f"{self.output}, {counts} lines, entropy {self.entropy:.4f} nats a token"

    def to_text(self) -> str:
        """Return this for people."""
        counts = ", ".join(f"{count:,} {split}" for split, count in self.lines.items())
        lines = [
            ("lines", counts),
            ("words", f"{self.words}, and 4 special tokens"),
            ("entropy", f"{self.entropy:.4f} nats a token, {self.tokens_per_line:.2f} tokens a line with its end"),
            ("floor", f"{self.validation_floor:.4f} nats a token on the validation lines"),
            ("output", self.output),
        ]
        if self.moved:
            lines.insert(
                1, ("note", f"{self.moved:,} lines have another structure than was drawn, which had no new one")
            )
        return f"{rows(lines)}\n\nnext: surgeon init gpt2 --tokenizer {self.output} --set n_layer=2 -o new"


@dataclass(frozen=True, kw_only=True)
class DataOptions(Checked):
    """The options of `data`."""

    output: str | os.PathLike[str] | None = output_option("Where the files go. Default: the kind's name.")
    lines: int = option("Training lines.", 20_000, metavar="N", group="lines")
    validation_lines: int = option("Held-out lines of the same distribution.", 1_000, metavar="N", group="lines")
    generalization_lines: int = option(
        "Lines that tell the rules apart which fit all others.", 1_000, metavar="N", group="lines"
    )
    lexicon: int = option(
        "Words of the grammar: 68 (all), 41 or 30.",
        68,
        metavar="WORDS",
        choices=tuple(map(str, LEXICONS)),
        group="lines",
    )
    repeats: bool = option(
        "Let lines occur more than once: they are drawn from the grammar exactly.", False, group="lines"
    )
    seed: int = seed_option()
    overwrite: bool = overwrite_option("Replace what this command wrote there before.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        for name in ("lines", "validation_lines", "generalization_lines"):
            if not 1 <= (count := getattr(self, name)) < 10**8:
                raise OptionError(name, f"{flag_of(name)} is {count}", hint="It is 1 or more, and below 100 million.")


@takes(DataOptions)
def generate_data(kind: str, options: DataOptions) -> GeneratedData:
    """Write the data of a kind into a directory, and return what is known of it.

    The kind is "question-formation": lines of a small grammar for training, validation and generalization, a tokenizer
    of its words, and the grammar's entropy. The same seed writes the same bytes.

    Raises DataError where there are not so many different lines, OutputError.

        print(surgeon.generate_data("question-formation", output="questions", lines=2_000))
    """
    began = time.perf_counter()
    kind = KIND.spelled("kind", kind, label="KIND")
    target = Path(options.output or kind)
    _check(target, overwrite=options.overwrite)
    lexicon = LEXICONS[options.lexicon]
    drawn = Lines(lexicon, seed=options.seed, repeats=options.repeats)
    training, validation = drawn.training(options.lines), drawn.training(options.validation_lines)
    telling = drawn.generalization(options.generalization_lines)
    questions = [line for line in validation if line.task == "quest"]
    files = {
        "train.jsonl": _texts(training),
        "validation.jsonl": _texts(validation),
        "questions.jsonl": _prompts(questions),
        "generalization.jsonl": _prompts(telling),
    }
    known = entropy(lexicon)
    made: dict[str, Any] = {
        "words": len(lexicon.words),
        "entropy": known.per_token,
        "nats_per_line": known.nats,
        "tokens_per_line": known.tokens,
        "validation_floor": cross_entropy(validation),
        "moved": drawn.num_moved,
    }
    counts = {"train": len(training), "validation": len(validation), "generalization": len(telling)}
    about = {"kind": kind, "lines": counts, **made, "seed": options.seed, "repeats": options.repeats}
    about |= {"counted": "every word of a line and its end, each predicted from all before it"}
    _write(target, files | _tokenizer(lexicon.words) | {ABOUT: to_bytes(about)}, overwrite=options.overwrite)
    paths = {name.removesuffix(".jsonl"): str(target / name) for name in files}
    return GeneratedData(str(target), counts, paths, **made, seconds=time.perf_counter() - began)


def _tokenizer(words: Sequence[str]) -> dict[str, bytes]:
    from surgeon.models.vocabularies import word_tokenizer

    return word_tokenizer(words)


def _check(target: Path, *, overwrite: bool) -> None:
    """Refuse an output that must not be written. Raises OutputError; only what this command wrote is replaced."""
    with suppress(OSError):
        if overwrite and target.is_dir() and not target.is_symlink() and any(target.iterdir()):
            if not (target / ABOUT).is_file():
                raise OutputError(
                    f"{target} was not written by surgeon data, so it is not replaced",
                    hint="Remove it yourself, or choose -o.",
                )
            return
    check_target(target, overwrite=False, reads={})


def _write(target: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    check_space(target, sum(map(len, files.values())))
    with staged(target, overwrite=overwrite) as stage:
        write_files(stage, files)


def _texts(lines: Sequence[Line]) -> bytes:
    return _records({"text": line.text} for line in lines)


def _prompts(lines: Sequence[Line]) -> bytes:
    return _records({"prompt": line.prompt, "completion": line.target} for line in lines)


def _records(records: Iterable[Mapping[str, str]]) -> bytes:
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()
