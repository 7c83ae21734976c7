"""The text that scores are computed on: the user's, or text sampled from the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.config import positions_of
from surgeon.checkpoint.source import Source
from surgeon.data.rows import check_shape, digest, read_rows
from surgeon.errors import MeasureError
from surgeon.models.device import available_memory
from surgeon.models.loading import load_model, load_tokenizer, loadable, quiet_transformers
from surgeon.models.skeleton import predicts_next
from surgeon.models.streaming import check_runs
from surgeon.processes import of_the_first
from surgeon.progress import stage

if TYPE_CHECKING:
    from torch import Tensor

SELF_SAMPLED = "the calibration text was written by the model itself; give --data for a text of your own"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Rows of tokens, shape (R, T), and their origin. `notes` say who wrote them, or what of records was not read."""

    tokens: "Tensor"
    origin: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows, length = self.tokens.shape
        sources = self.origin["sources"]
        where = ", ".join(str(item["data"]) for item in sources) if sources else "sampled from the model itself"
        return f"{rows} x {length} = {rows * length:,} tokens, {where}"


def calibrate(
    source: Source,
    data: Sequence[str],
    *,
    samples: int,
    sequence_length: int,
    device: str,
    seed: int,
    columns: str | None = None,
) -> Calibration:
    """Return rows of the user's texts, of records by their `columns`; without any, rows that the model writes."""
    check_runs(source)
    if data:
        return read_calibration(source, data, samples=samples, sequence_length=sequence_length, columns=columns)
    return sample_calibration(source, samples=samples, sequence_length=sequence_length, device=device, seed=seed)


def read_calibration(
    source: Source, data: Sequence[str], *, samples: int, sequence_length: int, columns: str | None = None
) -> Calibration:
    """Return the first rows of the user's texts, tokenised by the model's own tokenizer."""
    name, revision = loadable(source)
    tokenizer = load_tokenizer(name, revision)
    amount: dict[str, Any] = {"samples": samples, "sequence_length": sequence_length}
    with stage("tokenising"):
        rows = read_rows(data, tokenizer, **amount, columns=columns)
    _check_length(source, rows.tokens.shape[1])
    origin = _origin(rows.digest, rows.tokens, list(rows.source)) | ({} if columns is None else {"columns": columns})
    return Calibration(rows.tokens, origin, rows.notes)


def sample_calibration(source: Source, *, samples: int, sequence_length: int, device: str, seed: int) -> Calibration:
    """Return rows sampled from the model at temperature 1, each after the begin-of-text token or a random one.

    Raises MeasureError where the model does not fit into memory: generation reads all weights once per token.
    """
    import torch

    if not predicts_next(source):
        raise MeasureError(f"{source.label} cannot write a text to be scored on", hint="Give one: --data FILE.")
    check_shape(samples, sequence_length)
    _check_length(source, sequence_length)
    needed = sum(4 * item.spec.num_parameters for item in source.tensors.values())
    if needed > available_memory(device):
        raise MeasureError(
            f"{source.label} takes {needed / 1e9:.1f} GB to sample a text from it, more than there is",
            hint="Give a text: --data FILE.",
        )
    model = load_model(source, dtype=torch.float32, hint="Give a text: --data FILE.").to(device)
    with stage("sampling a text"), torch.random.fork_rng(), torch.no_grad(), quiet_transformers():
        torch.manual_seed(seed)
        begin = model.config.get_text_config().bos_token_id
        vocabulary = model.config.get_text_config().vocab_size
        first = torch.randint(vocabulary, (samples, 1)) if begin is None else torch.full((samples, 1), int(begin))
        tokens = model.generate(
            first.to(device),
            attention_mask=torch.ones_like(first).to(device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=sequence_length - 1,
            max_new_tokens=sequence_length - 1,
            pad_token_id=0,
        ).cpu()
        tokens = of_the_first(tokens)
    return Calibration(tokens, _origin(digest(tokens), tokens, []), (SELF_SAMPLED,))


def _origin(sha256: str, tokens: "Tensor", sources: list[dict[str, str]]) -> dict[str, Any]:
    return {"sources": sources, "sha256": sha256, "rows": tokens.shape[0], "sequence_length": tokens.shape[1]}


def _check_length(source: Source, length: int) -> None:
    most = positions_of(source)
    if most is not None and length > most:
        raise MeasureError(
            f"rows of {length} tokens are longer than the {most} positions of {source.label}",
            hint=f"Use --sequence-length {most}.",
        )
