"""Low-rank adapters by PEFT: added to a model, switched off for a while, and merged into the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from surgeon.anatomy.anatomy import Anatomy
from surgeon.errors import PlanError
from surgeon.models.loading import load_adapter, quiet_transformers

_PARTS = {"attention": "attention", "ffn": "mlp"}  # the option's word: the part of the family's table


def add_adapters(
    model: Any,
    anatomy: Anatomy,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str,
    embedding_rows: Sequence[int] = (),
) -> Any:
    """Return the model with adapters on its layers' linear maps, and on some embedding rows; only they are trained.

    `targets` is "all", "attention" or "ffn"; adapters are scaled by `alpha` / `rank`.
    Raises PlanError where PEFT is missing, or the model has no such map.
    """
    try:
        import peft
    except ImportError as error:
        raise PlanError("peft is needed for --lora", hint='pip install "surgeon[train]"') from error

    config = peft.LoraConfig(  # without a task_type: its wrapper hands every argument through as it is
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a scale may be any number
        lora_dropout=dropout,
        target_modules=target_modules(model, anatomy, targets),
        trainable_token_indices=list(embedding_rows) or None,
    )
    with quiet_transformers():
        adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # PEFT makes adapters of a 16-bit model in 16 bits, which lose small steps
            parameter.data = parameter.data.float()
    return adapted


def target_modules(model: Any, anatomy: Anatomy, which: str) -> list[str]:
    """Return the full names of the linear maps inside the layers that `which` ("all", "attention", "ffn") means.

    Raises PlanError for a part where the family has no table, or where the model has no map of that part.
    """
    from transformers.pytorch_utils import Conv1D

    if which != "all":
        anatomy.require_family()
    stack = anatomy.stacks[0]
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D) or stack.locate(f"{name}.weight") is None:
            continue
        stored = f"{name}.weight"
        if which == "all" or (stored in anatomy.spec.tensors and anatomy.row(stored)[1] == _PARTS[which]):
            names.append(name)
    if not names:
        raise PlanError(
            f"no linear map of {anatomy.model_type} is in the part {which!r}",
            hint="Experts are no single maps; use --lora-targets attention, or train without --lora.",
        )
    return names


def merged(model: Any, adapter: Path) -> Any:
    """Return the model with the adapter in a directory added to its weights, in their dtype."""
    return load_adapter(model, adapter).merge_and_unload(safe_merge=True)


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Return a context in which a model computes without its adapters, of layers and of token embeddings."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    adapted = [module for module in model.modules() if isinstance(module, kinds)]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)
