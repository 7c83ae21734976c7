"""A surgery that stores weights as codes: its proof, what it made smaller, and what that costs on a text."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon import text
from surgeon.anatomy.config import positions_of
from surgeon.checkpoint.source import Source
from surgeon.draft import Confirm, Draft
from surgeon.errors import MeasureError
from surgeon.models.loading import loadable, runs
from surgeon.models.tokenizers import tokenizer_from
from surgeon.plan.dequantizing import dequantized
from surgeon.plan.planned import PlannedSource
from surgeon.plan.schemes import Scheme
from surgeon.surgery import Surgery, open_source
from surgeon.text import plus_minus

if TYPE_CHECKING:
    from surgeon.evals.compare import Estimate, PairedDifference
    from surgeon.evals.perplexity import TokenStream
    from surgeon.measure.quantized import Proof


@dataclass(frozen=True)
class Cost:
    """What quantizing costs on a text: the perplexity before and after, and KL(before || after) in nats a token.

    `difference` is that of the losses, paired by rows.
    """

    before: "Estimate"
    after: "Estimate"
    difference: "PairedDifference"
    kl: "Estimate"
    tokens: int
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it."""
        return {
            "perplexity": {
                "before": self.before.value,
                "after": self.after.value,
                "errors": {"before": self.before.error, "after": self.after.error},
            },
            "loss_difference": {"value": self.difference.value, "error": self.difference.error},
            "kl": {"value": self.kl.value, "error": self.kl.error},
            "tokens": self.tokens,
        }

    def to_rows(self) -> list[tuple[str, str]]:
        """Return this for people."""
        before, after = (plus_minus(each.value, each.error) for each in (self.before, self.after))
        change = plus_minus(self.difference.value, self.difference.error)
        seen = f"on {self.tokens:,} tokens in {self.rows} rows"
        return [
            ("perplexity", f"{before} → {after}  ({change} nats a token, paired; {seen})"),
            ("KL", f"{plus_minus(self.kl.value, self.kl.error)} nats a token from the source"),
        ]


@dataclass(frozen=True, eq=False)
class QuantizingCost:
    """Measures what a result costs on the first rows of texts, beside its source."""

    begun: Surgery
    data: Sequence[str]
    columns: str | None
    samples: int
    sequence_length: int
    device: str

    @cached_property
    def stream(self) -> "TokenStream":
        """The tokens of the text. Raises DataError, and MeasureError for rows that are too long for the model."""
        from surgeon.evals.perplexity import read_stream

        most = positions_of(self.begun.source)
        if most is not None and self.sequence_length > most:
            label = self.begun.source.label
            raise MeasureError(f"rows have {self.sequence_length} tokens, more than the {most} positions of {label}",
                               hint=f"Use --sequence-length {most}.")  # fmt: skip
        with runs(self.begun.source.label):
            tokenizer = tokenizer_from(self.begun.tokenizer_files, self.begun.spec.config)
        shape: dict[str, Any] = {"samples": self.samples, "sequence_length": self.sequence_length}
        return read_stream(self.data, tokenizer, **shape, whole_rows=True, columns=self.columns)

    def of(self, output: Path) -> Cost:
        """Return what the result in `output` costs: of the weights that its codes stand for, in float32 on a CPU."""
        from surgeon.evals.compare import estimate, exponential, paired
        from surgeon.evals.drafts import both_figures
        from surgeon.evals.perplexity import streamed
        from surgeon.models.device import resolve_device

        tokens = self.stream.tokens
        length = min(self.sequence_length, len(tokens))
        rows = tokens[: len(tokens) // length * length].view(-1, length)
        device, sizes = resolve_device(self.device), (length - 1,) * len(rows)
        with runs(self.begun.source.label):
            result, source = (streamed(each, device) for each in (dequantized(open_source(output)), self._source()))
            after, before = both_figures(result, source, rows)
        return Cost(
            before=exponential(estimate(before.loss, sizes)),
            after=exponential(estimate(after.loss, sizes)),
            difference=paired(after.loss, before.loss, sizes),
            kl=estimate(after.kl, sizes),
            tokens=sum(sizes),
            rows=len(rows),
        )

    def _source(self) -> Source:
        """Return what was quantized: of a chain what the steps before make, which is never written."""
        return PlannedSource(self.begun.source, self.begun.plan) if self.begun.plan.steps else self.begun.source


@dataclass(frozen=True, kw_only=True, repr=False)
class Quantizing(Surgery):
    """A surgery that stores the weights of linear maps as codes.

    `begun` is the model with its weights, `modules` are those that are quantized. Where it `verifies`, a result that
    does not reload to the logits of what was quantized does not take its place. `cost` measures a result on a text.

        quantizing = surgeon.quantize("SmolLM2-135M", bits=8)
        quantizing.save("SmolLM2-int8")
        print(quantizing.file_bytes(), quantizing.scheme.words)
    """

    begun: Surgery
    scheme: Scheme
    modules: tuple[str, ...]
    verifies: bool
    cost: QuantizingCost | None
    proofs: "list[Proof]" = field(default_factory=list, compare=False)  # of what was written, the newest last

    def prepare(self, *given: Any, **named: Any) -> Draft:
        """Return the result, not yet written; a code counts as the parameter that it stands for."""
        draft = super().prepare(*given, **named)
        count = self.begun.spec.num_parameters
        return replace(draft, summary=replace(draft.summary, parameters=(draft.summary.parameters[0], count)))

    @contextmanager
    def _proving(self) -> Iterator[Confirm]:
        from surgeon.plan.quantizing import library

        library(self.scheme.method)
        if self.cost is not None:
            _ = self.cost.stream  # a text that cannot be read is known now
        if not self.verifies:
            yield lambda made: None
            return
        from surgeon.measure.quantized import Expected

        with self._written() as source:
            expected = Expected.of(source, self.modules, self.scheme)
        yield lambda made: self.proofs.append(expected.check(made, self.source.label))

    def proving(self) -> AbstractContextManager[Confirm]:
        """Return a context whose value raises VerificationError for a result that does not reload to the same."""
        return self._proving()

    @contextmanager
    def _written(self) -> Iterator[tuple[str, str | None]]:
        """Return the name and revision by which what is quantized is loaded; of a chain it is written for a while."""
        if not self.begun.plan.steps:
            yield loadable(self.begun.source, weights=True)
            return
        with tempfile.TemporaryDirectory(prefix="surgeon-quantize-") as place:
            self.begun.save(Path(place, "begun"))
            yield str(Path(place, "begun")), None

    def file_bytes(self, output: Path | None = None) -> tuple[int, int]:
        """Return the bytes of the weights before and after: of the tensors, of an `output` those of the files."""
        before, after = self.begun.spec.nbytes, self.spec.nbytes
        if output is None:
            return before, after
        return _bytes_of_files(self.begun.source) or before, _bytes_of_files(open_source(output)) or after

    def preview(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return what gets smaller, as rows for people and as entries for JSON."""
        step = self.plan.steps[-1]["quantize"]
        entries = {name: step[name] for name in ("bits", "method", "group_size")}
        rows = [("codes", f"{self.scheme.words}, by {step['library']}, in {len(self.modules)} linear maps")]
        return [*rows, *self._size_rows(None)], {**entries, "file_bytes": self._sizes(None), "perplexity": None}

    def after(self, output: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return the sizes of the files, the proof, and what the result costs on the text."""
        rows, entries = self._size_rows(output), {"file_bytes": self._sizes(output)}
        for proof in self.proofs[-1:]:
            rows += proof.rows()
            entries["verification"] = proof.to_dict()
        if self.cost is not None:
            cost = self.cost.of(output)
            rows += cost.to_rows()
            entries |= cost.to_dict()
        return rows, entries

    def _size_rows(self, output: Path | None) -> list[tuple[str, str]]:
        before, after = self.file_bytes(output)
        what = "tensors" if output is None else "files"
        return [(what, f"{text.size(before)} → {text.size(after)}  ({100 * after / before:.1f} %)")]

    def _sizes(self, output: Path | None) -> dict[str, int]:
        return dict(zip(("before", "after"), self.file_bytes(output), strict=True))


def _bytes_of_files(source: Source) -> int | None:
    """Return the bytes of the weight files of a source, None where they are not all on this machine."""
    paths = [source.at_hand(file) for file in {item.file for item in source.tensors.values()}]
    return None if None in paths else sum(path.stat().st_size for path in paths if path is not None)
