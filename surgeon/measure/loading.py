"""A whole model of transformers in memory, with the weights of a source and none that were drawn at random."""

from typing import Any

from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import MeasureError
from surgeon.plan.plan import identity
from surgeon.reload import hushed
from surgeon.verification import loadable


def load_model(source: Source, *, dtype: Any, hint: str, **options: Any) -> Any:
    """Return the model in evaluation mode, on the CPU unless `options` (of from_pretrained) place it elsewhere.

    Code that the checkpoint brings is not run, nor code that its config names.
    Raises MeasureError, with `hint`, where transformers cannot load it or would draw weights at random.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = str(source.config.get("model_type"))
    if known not in CONFIG_MAPPING:
        raise MeasureError(f"transformers has no model type {known!r} of its own", hint=hint)
    kind: Any = AutoModelForSeq2SeqLM if source.config.get("is_encoder_decoder") else AutoModelForCausalLM
    name, revision = loadable(source)
    safe = identity(spec_of(source), depth=0).config  # without keys that choose the code that runs it
    try:
        with hushed():
            loaded: Any = kind.from_pretrained(
                name,
                revision=revision,
                config=CONFIG_MAPPING[known].from_dict(dict(safe)),
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MeasureError(f"transformers cannot load {source.label}: {said}", hint=hint) from error
    model, report = loaded
    if lost := sorted(map(str, report["missing_keys"])):
        raise MeasureError(
            f"{source.label} has no weights for {lost[0]!r}, which transformers would draw at random",
            hint="This needs a model with a language model head; surgeon inspect shows what is there.",
        )
    return model.eval()
