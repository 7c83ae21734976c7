"""Load checkpoints with transformers, as any user does, and run them on the same random tokens."""

from typing import TYPE_CHECKING, Any

from surgeon.checkpoint.source import LocalSource
from surgeon.errors import VerificationError

if TYPE_CHECKING:
    from torch import Tensor

ROWS, LENGTH = 2, 48  # tokens: a wrong rotary frequency is invisible at position 0 and small at the next few
ROUND_TRIP = 1.5**0.5  # the scale at which weights are rounded; any but a power of two rounds as much
NOTHING_TO_COMPARE = "Use --no-verify: there is nothing to compare with."


def tokens(models: list[tuple[str, str | None]], seed: int) -> "Tensor":
    """Return token ids, shape (2, 48) or shorter, that all models know, without their special tokens."""
    import torch
    from transformers import AutoConfig

    configs = [
        loaded
        for name, revision in models
        for loaded in [_explained(AutoConfig.from_pretrained, name, revision=revision, trust_remote_code=False)]
    ]
    texts = [config.get_text_config() for config in configs]
    special: set[int] = set()
    for config in (*configs, *texts):
        for key, value in config.to_dict().items():
            if key.endswith("token_id"):
                special |= set(value if isinstance(value, list) else [value])
    vocab = min(text.vocab_size for text in texts)
    lengths = [getattr(text, "max_position_embeddings", None) or LENGTH for text in texts]
    allowed = torch.tensor([i for i in range(vocab) if i not in special] or [0])
    drawn = torch.randint(len(allowed), (ROWS, min(LENGTH, *lengths)), generator=torch.Generator().manual_seed(seed))
    return allowed[drawn]


def source_logits(name: str, revision: str | None, ids: "Tensor", *, dtype: str | None) -> "tuple[Tensor, float]":
    """Return the logits of the source, and how far they move when its weights are rounded to `dtype` (None: 0)."""
    import torch

    model, report = _load(name, revision, str(ids.device))
    if report["missing_keys"]:
        raise VerificationError(
            f"{name} lacks {min(report['missing_keys'])!r}, so that transformers loads it with random weights",
            hint=NOTHING_TO_COMPARE,
        )
    with torch.no_grad():
        logits = _logits(model, ids).cpu()
        if not logits.isfinite().all():
            raise VerificationError(
                f"{name} puts out numbers that are not finite in float32",
                hint=NOTHING_TO_COMPARE,
            )
        return logits, 0.0 if dtype is None else rounding(model, ids, logits, getattr(torch, dtype))


def rounding(model: Any, ids: "Tensor", logits: "Tensor", dtype: Any) -> float:
    """Return max |Δ logits| of a model whose weights go through `dtype` once, in place.

    They are rounded at another scale than their own, for weights of that very dtype would not be rounded at all: a
    grown model holds them times sqrt(new / old), or in shares, or beside noise, and has as many of the same relative
    errors. What differs is how they add up, hence SLACK.
    """
    for parameter in model.parameters():
        parameter.copy_((parameter * ROUND_TRIP).to(dtype).float() / ROUND_TRIP)
    return float((_logits(model, ids).cpu() - logits).abs().max())


def result_logits(written: LocalSource, ids: "Tensor") -> "tuple[Tensor, dict[str, Tensor]]":
    """Return the logits of a result, and the gradient of its next-token loss by the names of its stored tensors."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    model, report = _load(str(written.directory), None, str(ids.device))
    if wrong := {key: sorted(map(str, names)) for key, names in report.items() if names}:
        key, names = next(iter(wrong.items()))
        raise VerificationError(
            f"{written.label} does not load whole: {key.replace('_', ' ')} {names[0]}"
            + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
            hint=f"Do not use {written.label}, which is left for you to look at.",
        )
    logits = _logits(model, ids)
    guess, target = logits[:, :-1].flatten(0, -2), ids[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(guess, target % guess.shape[-1])  # a headless model has fewer columns
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for name, parameter in model.named_parameters()
    }
    stored = revert_weight_conversion(model, gradients)
    return logits.detach().cpu(), {name: gradient.cpu() for name, gradient in stored.items()}


def _load(name: str, revision: str | None, device: str) -> tuple[Any, dict[str, Any]]:
    """Return a model in float32, ready for inference, and the loading report of transformers."""
    import torch
    import transformers

    config = _explained(transformers.AutoConfig.from_pretrained, name, revision=revision, trust_remote_code=False)
    named = [getattr(transformers, architecture, None) for architecture in config.architectures or []]
    plain = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    options = {"revision": revision, "dtype": torch.float32, "output_loading_info": True}
    model, report = _explained(next(filter(None, named), plain).from_pretrained, name, **options)
    return model.eval().to(device), report


def _logits(model: Any, ids: "Tensor") -> "Tensor":
    """Return the logits of a model, shape (rows, length, vocabulary), or its last hidden states if it has no head."""
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    output = model(**inputs, use_cache=False)
    logits: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return logits.float()


def _explained(load: Any, name: str, **options: Any) -> Any:
    """Return the result of `load` for a model. Raises VerificationError when transformers cannot."""
    try:
        return load(name, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise VerificationError(
            f"transformers cannot load {name}: {reason[0]}",
            hint="A result that was written stays where it is; --no-verify writes it without this check.",
        ) from error
