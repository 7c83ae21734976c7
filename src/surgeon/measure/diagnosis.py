"""The figures of a diagnosis: one pass that sees attention maps and states, and one that leaves layers out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.anatomy.config import layer_kinds
from surgeon.checkpoint.source import Source
from surgeon.errors import MeasureError
from surgeon.measure.attention import AttentionMaps
from surgeon.measure.residual import Influence
from surgeon.measure.scoring import Meter, Part, Removed, observe, row_losses_without, streamed_model
from surgeon.models.maps import HINT, MAPS, SAME, adds_to_states, has_attention
from surgeon.models.streaming import StreamedModel
from surgeon.models.varlen import attending_by
from surgeon.progress import meter as announced

LINEAR = "linear_attention"  # the kind of layers whose attention has no map: it sums states over tokens


@dataclass(frozen=True, eq=False)
class Losses:
    """Sums of next-token losses over each of R rows, in nats: shape (R,) of the whole model, else one a layer.

    `sizes`, (R,), are the targets of each row. `attention` is None for a layer without attention, and for one whose
    attention is inside another module, which adds to it.
    """

    sizes: Sequence[int]
    whole: Sequence[float]
    layer: Sequence[Sequence[float]]
    attention: Sequence[Sequence[float] | None]


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured: for each layer its measures, (R, H, M), None where it has no attention; and its influence."""

    maps: Sequence[Tensor | None]
    influence: Sequence[float]
    losses: Losses | None


def measure(
    source: Source, tokens: Tensor, *, energy: float, skip_rows: int, device: str, meter: Meter | None = None
) -> Measured:
    """Return the figures of a model on rows of tokens, shape (R, T), computed in float32.

    Losses without layers are taken on the first `skip_rows` rows, which may be none.
    Before that the logits of one row under the attention whose maps are seen are compared with those of the model as it
    is. Raises MeasureError where they differ, and for a model whose maps cannot be seen.
    """
    began = meter or announced
    model = streamed_model(source, device, resident=True, dtype=torch.float32)
    model.check_predicts()
    names = check_maps(model, tokens[:1], energy)
    losses = _losses(model, tokens[:skip_rows], names, began) if skip_rows else None
    maps, influence = AttentionMaps(model.label, energy), Influence(model.depth)
    with attending_by(model.whole, MAPS):
        progress = began("looking at attention", tokens.numel(), model.depth)
        observe(model, tokens, [influence], watchers=[maps], progress=progress)
    found = maps.of_layers()
    return Measured([found.get(layer) for layer in range(model.depth)], influence.block_influence(), losses)


def check_maps(model: StreamedModel, row: Tensor, energy: float) -> Mapping[int, str]:
    """Return the path of the attention in each layer that has one, such as "self_attn".

    Raises MeasureError unless the maps of each attention are seen, and logits are those of the model as it is.
    """
    maps = AttentionMaps(model.label, energy)
    plain = _logits(model, row, maps=None)
    with attending_by(model.whole, MAPS):
        probed = _logits(model, row, maps=maps)
    unseen = [layer for layer in range(model.depth) if layer not in maps.names]
    kinds = layer_kinds(model.anatomy.spec.config, model.depth)
    for layer in unseen:
        is_linear = kinds is not None and kinds[layer] == LINEAR
        if has_attention(model.module(layer)) and not is_linear:
            raise MeasureError(
                f"layer {layer} of {model.label} computes attention by code of its own, which shows no maps", hint=HINT
            )
    if len(unseen) == model.depth:
        raise MeasureError(f"{model.label} has no attention", hint=HINT)
    far, most = float((plain - probed).abs().max()), SAME * float(plain.abs().max())
    if not far <= most:  # also where one is not a number
        raise MeasureError(
            f"the logits of {model.label} differ by {far:.2g} where its attention maps are seen; at most {most:.2g} is "
            "rounding",
            hint=HINT,
        )
    return maps.names


def _logits(model: StreamedModel, row: Tensor, *, maps: AttentionMaps | None) -> Tensor:
    with torch.no_grad():
        (batch,) = model.start(row)
        watchers = [] if maps is None else [maps]
        for index in range(model.depth):
            with model.layer(index) as apply:
                for watcher in watchers:
                    watcher.batch = batch
                if maps is None:
                    apply(batch, batch.hidden)
                else:
                    with maps.watch(index, model.module(index)):
                        apply(batch, batch.hidden)
        with model.finish([batch]) as head:
            return head(batch.hidden).float()


def _losses(model: StreamedModel, tokens: Tensor, names: Mapping[int, str], meter: Meter) -> Losses:
    """Return the losses without each layer, and without each layer's attention, from one pass.

    `names` are those of `check_maps`. Raises MeasureError for a model whose layers need more of each other than states.
    """
    layers = range(model.depth)
    alone = [layer for layer in layers if "." not in names.get(layer, ".")]
    alone = [layer for layer in alone if not adds_to_states(model.module(layer).get_submodule(names[layer]))]
    attention: list[Removed] = [frozenset({Part(layer, names[layer])}) for layer in alone]
    choices = [frozenset[int](), *(frozenset({layer}) for layer in layers), *attention]
    progress = meter("leaving layers out", tokens.numel(), _steps(model.depth, alone))
    try:
        sums, sizes = row_losses_without(model, tokens, choices, progress=progress)
    except MeasureError as error:
        raise MeasureError(str(error), hint="Look at its attention alone: --skip-samples 0.") from error
    whole, *others = sums.tolist()
    of_attention = dict(zip(alone, others[model.depth :], strict=True))
    return Losses(sizes.tolist(), whole, others[: model.depth], [of_attention.get(layer) for layer in layers])


def _steps(depth: int, alone: Iterable[int]) -> int:
    """Return how many layers run: those after a choice differs from the whole model, and the whole model's."""
    return depth + sum(depth - 1 - layer for layer in range(depth)) + sum(depth - layer for layer in alone)
