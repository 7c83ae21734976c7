"""The text that scores are taken on: the user's, or one that the model writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgeon.checkpoint.source import Source
from surgeon.data.rows import check_shape, digest, read_rows
from surgeon.errors import MeasureError
from surgeon.models.device import available_memory
from surgeon.models.loading import load_tokenizer, loadable, quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Calibration:
    """Rows of tokens, shape (R, T), and where they are from."""

    tokens: "Tensor"
    origin: Mapping[str, Any]

    def __str__(self) -> str:
        rows, length = self.tokens.shape
        sources = self.origin["sources"]
        where = ", ".join(str(item["data"]) for item in sources) if sources else "sampled from the model itself"
        return f"{rows} x {length} = {rows * length:,} tokens, {where}"


def read_calibration(source: Source, data: Sequence[str], *, samples: int, sequence_length: int) -> Calibration:
    """Return the first rows of the user's texts, tokenised by the model's own tokenizer."""
    name, revision = loadable(source)
    rows = read_rows(data, load_tokenizer(name, revision), samples=samples, sequence_length=sequence_length)
    _check_length(source, rows.tokens.shape[1])
    return Calibration(rows.tokens, _origin(rows.digest, rows.tokens, list(rows.source)))


def sample_calibration(source: Source, *, samples: int, sequence_length: int, device: str, seed: int) -> Calibration:
    """Return rows that the model writes itself, at temperature 1, each from the begin-of-text token or a random one.

    Raises MeasureError where the model does not fit into memory: writing reads all weights once a token.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_shape(samples, sequence_length)
    name, revision = loadable(source)
    _check_length(source, sequence_length)
    needed = sum(4 * item.spec.num_parameters for item in source.tensors.values())
    if needed > available_memory(device):
        raise MeasureError(
            f"{source.label} takes {needed / 1e9:.1f} GB to write a text itself, more than there is",
            hint="Give a text: --data FILE.",
        )
    try:
        with quiet_transformers():
            model: Any = AutoModelForCausalLM.from_pretrained(
                name, revision=revision, dtype=torch.float32, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MeasureError(f"transformers cannot load {source.label}: {reason}", hint="Give a text: --data.") from error
    model.to(device)
    with torch.random.fork_rng(), torch.no_grad(), quiet_transformers():
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
    return Calibration(tokens, _origin(digest(tokens), tokens, []))


def _origin(sha256: str, tokens: "Tensor", sources: list[dict[str, str]]) -> dict[str, Any]:
    return {"sources": sources, "sha256": sha256, "rows": tokens.shape[0], "sequence_length": tokens.shape[1]}


def _check_length(source: Source, length: int) -> None:
    text = source.config.get("text_config") or source.config
    keys = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    most = next((text[key] for key in keys if type(text.get(key)) is int), None)
    if most is not None and length > most:
        raise MeasureError(
            f"rows of {length} tokens are longer than the {most} positions of {source.label}",
            hint=f"Use --sequence-length {most}.",
        )
