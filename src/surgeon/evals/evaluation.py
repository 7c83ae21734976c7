"""An evaluation: its context, and its result for one model or for two that see the same tokens."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon import text
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.config import positions_of
from surgeon.checkpoint.output import write_whole
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import MeasureError, OutputError
from surgeon.evals.compare import (
    PairedDifference,
    Recovery,
    Scored,
    markdown_table,
    recovered,
    recovery,
    short_label,
    table_cell,
)
from surgeon.evals.options import OF_TEXT
from surgeon.evals.verdicts import Judgement, card_sentences
from surgeon.showing import Shown
from surgeon.surgery import open_source
from surgeon.text import plus_minus

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """The scores of a model on data, and those of its baseline if there is one.

    `scored.figures` are, with their standard errors: for perplexity "perplexity", "loss" (nats per token) and
    "bits_per_byte", for pseudo-perplexity "pseudo_perplexity" and "loss"; for the others "exact_match", "rouge_l",
    "accuracy", and with choices "accuracy_normalised", all 0 to 1.
    With a judge there is "win_rate" too, against the baseline; its verdicts are in `judgement`.
    `differences` are paired: this model's figure less the baseline's. `setup` makes the figures reproducible.
    `predictions` has a record per prompt: prompt, reference, prediction, score.

        evaluation = surgeon.evaluate("gpt2-large-30", data=["text.txt"], baseline="gpt2-large", samples=8)
        perplexity = evaluation.scored.figures["perplexity"]
        print(perplexity.value, perplexity.error, evaluation.differences["loss"].value, evaluation.recovered)
    """

    metric: str
    scored: Scored
    baseline: Scored | None
    setup: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    predictions: tuple[Mapping[str, Any], ...] = ()
    seconds: float = 0.0
    judgement: Judgement | None = None

    @classmethod
    def of(
        cls,
        metric: str,
        scored: Sequence[Scored],
        setup: Mapping[str, Any],
        notes: Sequence[str] = (),
        predictions: Sequence[Mapping[str, Any]] = (),
    ) -> "Evaluation":
        """Return the evaluation of a model, or of a model and its baseline in this order."""
        baseline = scored[1] if len(scored) > 1 else None
        return cls(metric, scored[0], baseline, setup, tuple(notes), tuple(predictions))

    @property
    def recovered(self) -> Recovery | None:
        """The share of the baseline's first figure in percent, with its error; None without a baseline.

        For perplexity 100 · baseline's perplexity / this perplexity, for scores 100 · this score / baseline's: 100 is
        as good as the baseline, more is better. Errors are of the paired rows or records (delta method). There is no
        share of a score that is not two errors above 0, and none of one row or record, whose error nobody knows.
        """
        if self.baseline is None:
            return None
        name = next(iter(self.scored.figures))
        if self.metric not in OF_TEXT:
            return recovered([(self.scored.outcomes[name], self.baseline.outcomes[name])])
        value, baseline = (scored.figures[name].value for scored in (self.scored, self.baseline))
        share, error = recovery(value, baseline, higher_is_better=False), self.differences["loss"].error
        if share is None:
            return Recovery(None, None, "the perplexities are beyond numbers")
        if error is None:
            return Recovery(None, None, "one row has no error; give more of them")
        return Recovery(share, share * error)

    @property
    def recovery(self) -> float | None:
        """The value of `recovered`; None without a baseline, and where it is refused."""
        return None if self.recovered is None else self.recovered.value

    @property
    def differences(self) -> dict[str, PairedDifference]:
        """The mean of the paired differences from the baseline, of the loss or the scores; {} without a baseline."""
        return {} if self.baseline is None else self.scored.against(self.baseline)

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as `--json` prints it."""
        result = {"metric": self.metric, **_entries(self.scored), **self.setup}
        if self.baseline is not None:
            result["baseline"] = _entries(self.baseline)
            result["differences"] = {
                name: {"value": difference.value, "error": difference.error, "z": difference.z}
                for name, difference in self.differences.items()
            }
            assert self.recovered is not None
            result |= {"recovery": self.recovered.value, "recovery_error": self.recovered.error}
            result |= {"recovery_refused": self.recovered.refused} if self.recovered.refused else {}
        if self.judgement is not None:
            result["judge"] = {"model": self.judgement.judge, **self.judgement.to_dict()}
        return result | {"notes": list(self.notes), "seconds": round(self.seconds, 3)}

    @property
    def headline(self) -> str:
        """The model, its figures and the data."""
        figures = (
            f"{name.replace('_', ' ')} {plus_minus(figure.value, figure.error)}"
            for name, figure in self.scored.figures.items()
        )
        return f"{short_label(self.scored.model)}, {', '.join(figures)}, {self._data()}"

    def to_text(self) -> str:
        """Return the evaluation for people."""
        rows = [("model", self.scored.model)] + ([] if self.baseline is None else [("baseline", self.baseline.model)])
        rows += [("data", self._data())]
        rows += [] if self.recovered is None else [("recovery", str(self.recovered))]
        if self.judgement is not None:
            rows += [("judge", self.judgement.judge), ("verdicts", self.judgement.summary())]
        notes = (*self.notes, *(() if self.judgement is None else self.judgement.notes))
        rows += [("note", note) for note in notes]
        return f"{text.table(*self._table('', 'model', 'baseline'))}\n\n{text.rows(rows)}"

    def to_markdown(self) -> str:
        """Return the evaluation as a block for a model card."""
        names = [short_label(scored.model) for scored in (self.scored, self.baseline) if scored is not None]
        recovered = "" if self.recovered is None else f" Recovery: {self.recovered}."
        judged = "" if self.judgement is None else card_sentences({" against ".join(names): self.judgement})
        table = markdown_table(*self._table("", *names))
        return f"{table}\n\nMeasured with `surgeon evaluate` on {self._data()}.{recovered}{judged}"

    def _table(self, *header: str) -> tuple[list[str], list[list[str]]]:
        header = header[:2] if self.baseline is None else (*header, "difference", "z")
        lines = []
        for name, figure in self.scored.figures.items():
            line = [name.replace("_", " "), plus_minus(figure.value, figure.error)]
            if self.baseline is not None:
                other, difference = self.baseline.figures[name], self.differences.get(name)
                line.append(plus_minus(other.value, other.error))
                line.append("" if difference is None else plus_minus(difference.value, difference.error))
                line.append("" if difference is None or difference.z is None else f"{difference.z:.1f}")
            lines.append(line)
        return list(header), lines

    def _data(self) -> str:
        """Return how much of which data was used, and in which dtype."""
        counts = self.scored.counts
        if self.metric not in OF_TEXT:
            amount = f"{counts['records']:,} records"
        elif self.setup.get("documents"):
            amount = f"{counts['tokens']:,} tokens, in {counts['rows']:,} documents"
        elif self.setup["stride"] is None:
            amount = f"{counts['tokens']:,} tokens, in {counts['rows']} rows of {self.setup['sequence_length']}"
        else:
            length, stride = self.setup["sequence_length"], self.setup["stride"]
            amount = f"{counts['tokens']:,} tokens, in {counts['rows']} windows of {length} with a stride of {stride}"
        return f"{amount}, of {table_cell(', '.join(map(short_label, self.setup['data'])))}, in {self.setup['dtype']}"


def _entries(scored: Scored) -> dict[str, Any]:
    """Return one model's scores as `--json` prints them."""
    figures: dict[str, Any] = {}
    for name, figure in scored.figures.items():
        figures |= {name: _finite(figure.value), f"{name}_error": _finite(figure.error)}
    return {"model": scored.model, **figures, **scored.counts}


def _finite(value: float | None) -> float | None:
    """Return a number that JSON has: exp of a loss may be beyond a float."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class EvalContext:
    """The models of an evaluation, their tokenizers and the device."""

    sources: Sequence[Source]
    device: str
    tokenizers: "Sequence[PreTrainedTokenizerBase]"

    def check_length(self, length: int, what: str, hint: str) -> None:
        """Raises MeasureError where a model has fewer than `length` positions."""
        for source in self.sources:
            most = positions_of(source)
            if most is not None and length > most:
                raise MeasureError(
                    f"{what} {length} tokens, more than the {most} positions of {source.label}", hint=hint
                )

    def check_same(self, ids: Sequence[Sequence[Sequence[int]]]) -> None:
        """Raises MeasureError where the models' tokens, of each model in rows, are different."""
        import torch

        flat = [torch.tensor([token for row in rows for token in row]) for rows in ids]
        for other in range(1, len(flat)):
            labels = [self.sources[0].label, self.sources[other].label]
            check_same_tokens(flat[0], flat[other], [self.tokenizers[0], self.tokenizers[other]], labels)

    def setup(self, data: Sequence[str], sha256: str, columns: str | None) -> dict[str, Any]:
        """Return the entries that all evaluations have: data, chosen columns, hash of the tokens, device and dtypes."""
        from surgeon.models.device import compute_dtype

        dtypes = {str(compute_dtype(source, self.device)).removeprefix("torch.") for source in self.sources}
        chosen = {} if columns is None else {"columns": columns}
        numbers = {"sha256": sha256, "device": self.device, "dtype": "/".join(sorted(dtypes))}
        return {"data": list(data)} | chosen | numbers


def context_of(sources: Sequence[Source], device: str) -> EvalContext:
    """Return the context in which models are evaluated, with their tokenizers loaded."""
    from surgeon.models.device import resolve_device
    from surgeon.models.loading import load_tokenizer, loadable

    place = resolve_device(device)
    tokenizers = [load_tokenizer(*loadable(source)) for source in sources]
    return EvalContext(sources, place, tokenizers)


def check_same_tokens(
    one: "Tensor", other: "Tensor", tokenizers: "Sequence[PreTrainedTokenizerBase]", labels: Sequence[str]
) -> None:
    """Raises MeasureError for two models with different tokens, shape (N,), naming the first that differ."""
    import torch

    if torch.equal(one, other):
        return
    shorter = min(len(one), len(other))
    differs = (one[:shorter] != other[:shorter]).nonzero()
    place = int(differs[0]) if len(differs) else shorter
    decoded = [
        repr(tokenizer.decode([int(ids[place])])) if place < len(ids) else "none"
        for ids, tokenizer in zip((one, other), tokenizers, strict=True)
    ]
    first, second = decoded
    raise MeasureError(
        f"{labels[0]} and {labels[1]} make different tokens of the text: token {place} is {first} and {second}",
        hint="Only losses on the same tokens can be compared; evaluate each by itself, and compare bits per byte.",
    )


def sha256_of(parts: Sequence[object]) -> str:
    """Return the SHA-256 of the records that were used, 64 hex digits."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def open_evaluated(model: str | os.PathLike[str], revision: str | None, *, encoder: bool = False) -> Source:
    """Return the checkpoint of a model to evaluate. Raises MeasureError for an encoder-decoder, unless `encoder`."""
    source = open_source(model, revision=revision)
    read_anatomy(spec_of(source))  # refuses an incomplete checkpoint before any text is read
    if source.config.get("is_encoder_decoder") and not encoder:
        raise MeasureError(
            f"{source.label} has an encoder and a decoder; only models with one stack of layers are evaluated here",
            hint="Evaluate it with a script of transformers.",
        )
    return source


def checked_target(path: Path) -> Path:
    """Return the path of a file to write. Raises OutputError, before an hour of generating, where it cannot be."""
    with suppress(RuntimeError):  # ~name of an unknown user
        path = path.expanduser()
    if path.exists():
        raise OutputError(f"{path} exists", hint="Remove it, or name another file with --predictions.")
    if not path.parent.is_dir():
        raise OutputError(f"no such directory: {path.parent}", hint=f"mkdir -p {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"cannot write into {path.parent}", hint=f"Look: ls -ld {path.parent}")
    return path


def write_predictions(predictions: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Write records to a .jsonl file, all or none."""
    lines = (f"{json.dumps(record, ensure_ascii=False)}\n".encode() for record in predictions)
    try:
        write_whole(target, lines)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}", hint="Is the disk full?  df -h") from error
