"""A whole model on a device, after a look at the memory."""

from typing import Any

from surgeon.checkpoint.source import Source
from surgeon.errors import MeasureError
from surgeon.measure.device import available_memory, compute_dtype
from surgeon.measure.loading import load_model

HINT = "The model is run by transformers; for one newer than this transformers: pip install -U transformers"
SMALLER = "Use another --device, or a smaller model."


def load_on(source: Source, device: str, *, hint: str = HINT, smaller: str = SMALLER) -> Any:
    """Return the model on `device`, in float32 or on a GPU in the 16 bits of its weights.

    Raises MeasureError where it does not fit (hint: `smaller`), cannot be loaded (`hint`), or lacks weights.
    """
    dtype = compute_dtype(source, device)
    needed = sum(dtype.itemsize * item.spec.num_parameters for item in source.tensors.values())
    if needed > available_memory(device):
        raise MeasureError(
            f"{source.label} takes {needed / 1e9:.1f} GB, more than there is on {device}",
            hint=smaller,
        )
    return load_model(source, dtype=dtype, hint=hint).to(device)
