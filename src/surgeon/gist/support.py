"""Whether a model can have gists, measured: does the prompt leak past the mask, does a cached gist replace it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from surgeon import text
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import spec_of
from surgeon.errors import PlanError
from surgeon.gist.architecture import refusal
from surgeon.gist.probes import Differences, probe_decoder, probe_encoder
from surgeon.models.device import resolve_device
from surgeon.models.loading import load_model
from surgeon.showing import Shown
from surgeon.surgery import open_source

ROUNDING = 16  # machine epsilons: experts that get other tokens too sum ours in another order
EXACT = 1e-5  # of the largest logit, in float32: models show 1e-7 to 4e-6, by docs/gist.md
FLOOR = 4  # times the change by ordinary caching of keys and values, which decides in 16 bits
LOAD_HINT = "A model is measured by running it; for one newer than this transformers: pip install -U transformers"
# The errors of models whose code does not expect a mask of four dimensions, or one for each kind of layer.
_FAILURES = (ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError)


@dataclass(frozen=True, slots=True, repr=False)
class Support(Shown):
    """Whether a model can have gists, and the measured differences, relative to the largest logit.

    `leak` is the change by other prompts after a gist whose states are fixed, `control` the same without the mask.
    `cache_difference` is between a gist's keys and values in a cache and the masked pass over all tokens,
    `rebased_difference` the same with the gist moved to position 0; None where positions are learned. All are None
    where only the config was read, or the model's code fails.
    """

    supported: bool
    reason: str | None = None
    leak: float | None = None
    control: float | None = None
    cache_difference: float | None = None
    rebased_difference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it."""
        return asdict(self)

    @property
    def headline(self) -> str:
        """Whether gist tokens are supported, and why not."""
        return "supported" if self.supported else f"not supported: {self.reason}"

    def to_text(self) -> str:
        """Return this for people."""
        measured = {
            "leak": self.leak,
            "without the mask": self.control,
            "cached gist": self.cache_difference,
            "moved to position 0": self.rebased_difference,
        }
        rows = [("gist tokens", "supported" if self.supported else f"not supported: {self.reason}")]
        rows += [(name, f"{value:.1e} of the largest logit") for name, value in measured.items() if value is not None]
        return text.rows(rows)


def check_support(model: Any) -> Support:
    """Return whether `model`, or one with that config, can be gisted.

    A config is judged by the kinds of its layers; a model is run, on a few dozen tokens, in the dtype that it has.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    depth = int(getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0) or 0)
    if (reason := refusal(config.to_dict(), depth)) is not None:
        return Support(supported=False, reason=reason)
    if model is config:
        return Support(supported=True)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            measured = probe_encoder(model) if config.is_encoder_decoder else probe_decoder(model)
    except (PlanError, *_FAILURES) as error:
        message = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return Support(supported=False, reason=f"{config.model_type} fails with a gist mask: {message}")
    finally:
        model.train(was_training)
    return _judged(measured, model.dtype)


def check_checkpoint(name: str, *, revision: str | None = None, device: str = "cpu") -> Support:
    """Return whether a checkpoint can have gists. Loads it in float32, unless its config alone forbids gists.

    Raises CheckpointError where there is no checkpoint, MeasureError where transformers cannot load it.
    """
    place = resolve_device(device)
    source = open_source(name, revision=revision)
    if (reason := refusal(source.config, read_anatomy(spec_of(source)).depth)) is not None:
        return Support(supported=False, reason=reason)
    return check_support(load_model(source, dtype=torch.float32, hint=LOAD_HINT).to(place))


def _judged(measured: Differences, dtype: torch.dtype) -> Support:
    allowed = max(EXACT, FLOOR * measured.caching, FLOOR * torch.finfo(dtype).eps)  # caching may happen to be exact
    reason = None
    if not measured.leak <= ROUNDING * torch.finfo(dtype).eps:  # "not": NaN is no small number
        reason = f"the prompt leaks past the mask: it changes what follows by {measured.leak:.1e} of the largest logit"
    elif not measured.cached <= allowed:
        reason = f"a cached gist changes what follows by {measured.cached:.1e} of the largest logit, not {allowed:.0e}"
    return Support(reason is None, reason, measured.leak, measured.control, measured.cached, measured.rebased)
