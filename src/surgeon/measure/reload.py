"""Load a source and its result with transformers, as users do, and run both on the same random tokens."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgeon.checkpoint.source import LocalSource
from surgeon.errors import VerificationError
from surgeon.models.loading import load_architecture, load_config, transformers_loads

if TYPE_CHECKING:
    from torch import Tensor

ROWS, LENGTH = 2, 48  # tokens: a wrong rotary frequency has no effect at position 0 and a small one at the next few
ROUND_TRIP = 1.5**0.5  # the scale at which weights are rounded; any but a power of two rounds as much
NOTHING_TO_COMPARE = "Use --no-verify: there is nothing to compare with."
LOAD_HINT = "--no-verify writes a result without this check, to look at it."


def tokens(models: list[tuple[str, str | None]], seed: int) -> "Tensor":
    """Return random token ids, shape (2, 48) or shorter, of the smallest vocabulary, without special tokens."""
    import torch

    configs = []
    for name, revision in models:
        with transformers_loads(name, hint=LOAD_HINT, error_type=VerificationError):
            configs.append(load_config(name, revision))
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
    """Return the logits of the source, and their largest change when its weights are rounded to `dtype` (None: 0)."""
    import torch

    model, report = loaded(name, revision, name)
    model = model.to(ids.device)
    if report["missing_keys"]:
        raise VerificationError(
            f"{name} lacks {min(report['missing_keys'])!r}, so that transformers loads it with random weights",
            hint=NOTHING_TO_COMPARE,
        )
    with torch.no_grad():
        logits = logits_of(model, ids).cpu()
        if not logits.isfinite().all():
            raise VerificationError(
                f"the outputs of {name} are not finite in float32",
                hint=NOTHING_TO_COMPARE,
            )
        return logits, 0.0 if dtype is None else rounding(model, ids, logits, getattr(torch, dtype))


def rounding(model: Any, ids: "Tensor", logits: "Tensor", dtype: Any) -> float:
    """Return max |Δ logits| of a model whose weights are rounded to `dtype` once, in place.

    They are scaled before they are rounded, for weights that are stored in that dtype already would not change. A grown
    model stores them times sqrt(new / old), or in parts, or with noise, and has as many rounding errors of the same
    relative size. They add up differently, hence SLACK.
    """
    for parameter in model.parameters():
        parameter.copy_((parameter * ROUND_TRIP).to(dtype).float() / ROUND_TRIP)
    return float((logits_of(model, ids).cpu() - logits).abs().max())


def result_logits(written: LocalSource, ids: "Tensor") -> "tuple[Tensor, dict[str, Tensor]]":
    """Return the logits of a result, and the gradient of its next-token loss by the names of its stored tensors."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    model, report = loaded(str(written.directory), None, written.label)
    model = model.to(ids.device)
    check_whole(report, written.label)
    logits = logits_of(model, ids)
    predicted, target = logits[:, :-1].flatten(0, -2), ids[:, 1:].flatten()
    # A model without a head has fewer columns than tokens.
    loss = torch.nn.functional.cross_entropy(predicted, target % predicted.shape[-1])
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for name, parameter in model.named_parameters()
    }
    stored = revert_weight_conversion(model, gradients)
    return logits.detach().cpu(), {name: gradient.cpu() for name, gradient in stored.items()}


def loaded(name: str, revision: str | None, label: str, *, dtype: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Return a model ready for inference, and transformers' report of its loading.

    `dtype` is None for float32, "auto" for the one that is stored.
    """
    import torch

    with transformers_loads(label, hint=LOAD_HINT, error_type=VerificationError):
        model, report = load_architecture(name, revision, dtype=dtype or torch.float32)
    return model.eval(), report


def check_whole(report: Mapping[str, Any], label: str) -> None:
    """Raises VerificationError where transformers reports a tensor of a result that it misses, or has no place for."""
    if problems := {key: sorted(map(str, names)) for key, names in report.items() if names}:
        key, names = next(iter(problems.items()))
        raise VerificationError(
            f"{label} does not load whole: {key.replace('_', ' ')} {names[0]}"
            + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
            hint=f"Do not use it. {LOAD_HINT}",
        )


def logits_of(model: Any, ids: "Tensor") -> "Tensor":
    """Return the logits, shape (rows, length, vocabulary), or the last hidden states of a model without a head."""
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    output = model(**inputs, use_cache=False)
    states: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return states.float()
