"""What the streamed forward pass is compared with: the plainly loaded model of transformers, watched through hooks."""

from pathlib import Path
from typing import Any

import torch
import toys
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgeon.models.streaming import StreamedModel
from surgeon.surgery import open_source


def stream(directory: Path, **options: Any) -> StreamedModel:
    """Return the checkpoint in a folder as a model that streams."""
    return StreamedModel(open_source(str(directory)), **options)


def plain(directory: Path, **options: Any) -> PreTrainedModel:
    """Return the model in a folder as transformers loads it in float32, with its own default of how experts run.

    Its weights are moved out of the mapped file, where they lie at odd addresses: a product's last bit may depend on
    them (GraniteMoE's does), and equality is asked for here.
    """
    experts = "grouped_mm" if "experts" in (directory / "config.json").read_text() else "eager"
    model, _ = toys.load(directory, **{"experts_implementation": experts, "dtype": torch.float32} | options)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def tokens(rows: int = 2, length: int = 12, *, seed: int = 0) -> Tensor:
    """Return token ids, shape (rows, length), that every toy knows."""
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain_states(model: PreTrainedModel, ids: Tensor, real: Tensor | None = None) -> list[Tensor]:
    """Return the states before each layer and behind the last, (B, T, D) each, as hooks on the layers see them."""
    states: dict[int, Tensor] = {}
    layers = toys.stacks(model)[0]

    def before(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[index] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    def behind(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states[len(layers)] = (output[0] if isinstance(output, tuple) else output).clone()

    hooks = [layer.register_forward_pre_hook(before(i), with_kwargs=True) for i, layer in enumerate(layers)]
    hooks.append(layers[-1].register_forward_hook(behind))
    mask = {} if real is None else {"attention_mask": real.long()}
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, **mask)
    for hook in hooks:
        hook.remove()
    return [states[index] for index in range(len(layers) + 1)]


def streamed_states(model: StreamedModel, ids: Tensor, real: Tensor | None = None) -> list[Tensor]:
    """Return the same states, streamed."""
    with torch.no_grad():
        batches = model.embed(ids, real)
        states = [[batch.hidden for batch in batches]]
        for index in range(model.depth):
            with model.layer(index) as apply:
                states.append([apply(batch, state) for batch, state in zip(batches, states[-1], strict=True)])
    return [torch.cat(parts) for parts in states]


def real_parameters(module: nn.Module) -> list[str]:
    """Return the names of the parameters whose numbers are in memory."""
    return [name for name, parameter in module.named_parameters() if not parameter.is_meta]


def padded(ids: Tensor, lengths: list[int], *, left: bool, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Return rows of `ids` cut to their lengths and filled up on one side, and which of their tokens are real."""
    rows, width = len(ids), max(lengths) + 2
    filled = torch.full((rows, width), pad)
    real = torch.zeros(rows, width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if left else slice(0, length)
        filled[row, place] = ids[row, :length]
        real[row, place] = True
    return filled, real


def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss of the next tokens inside rows."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
