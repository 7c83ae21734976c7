"""Which parameters are trained: all, only what surgery made, or only the neighbourhood of its cut."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from surgeon.anatomy.anatomy import Anatomy
from surgeon.errors import PlanError

_LAYERS = re.compile(r"layers=(\d+)(?:-(\d+))?")
_FREEZE_HINT = "Such as --freeze embeddings,layers=0-11"


def trained_layers(which: str, receipt: Mapping[str, Any] | None, depth: int) -> frozenset[int]:
    """Return the layers that "new" or "cut" means, by the layer map of the receipt that surgery left.

    "new" are the layers that come from no layer of the source; layers that a growth copied are not new. "cut" are the
    two layers at each place where layers were taken out, and the last one where the end was.
    Raises PlanError where the receipt is missing or names no such layer.
    """
    layer_map = (receipt or {}).get("layer_map")
    if not isinstance(layer_map, list) or len(layer_map) != depth:
        raise PlanError(
            f"--train {which} needs the layer map of a surgery, and the model's surgeon.json has none",
            hint="Train all of it, or freeze parts by name: --freeze embeddings,layers=0-11",
        )
    if which == "new":
        found = {index for index, source in enumerate(layer_map) if source is None}
    else:
        pairs = [(index, index + 1) for index in range(depth - 1)]
        apart = [pair for pair in pairs if _is_gap(layer_map[pair[0]], layer_map[pair[1]])]
        found = {index for pair in apart for index in pair}
        if _cuts_the_end(receipt or {}, layer_map):
            found.add(depth - 1)
    if not found and not (which == "new" and new_token_ids(receipt)):
        what = "made no new layer" if which == "new" else "took out no layer"
        raise PlanError(f"the surgery that made this model {what}", hint="Leave out --train.")
    return frozenset(found)


def new_token_ids(receipt: Mapping[str, Any] | None) -> list[int]:
    """Return the ids of the tokens that surgery added, by its receipt."""
    steps = (receipt or {}).get("steps") or []
    found = [step["gist"].get("token_ids", []) for step in steps if isinstance(step, dict) and "gist" in step]
    return [int(token) for ids in found for token in ids]


def frozen(spec: str | None, anatomy: Anatomy, names: Sequence[str]) -> frozenset[str]:
    """Return which of the parameters' names `--freeze` means. Raises PlanError for a part that there is not."""
    if spec is None:
        return frozenset()
    stack, parts = anatomy.stacks[0], [part.strip() for part in spec.split(",")]
    layers: set[int] = set()
    for part in parts:
        if match := _LAYERS.fullmatch(part):
            first, last = int(match[1]), int(match[2] or match[1])
            if not first <= last < anatomy.depth:
                hint = f"The model has layers 0 to {anatomy.depth - 1}."
                raise PlanError(f"--freeze {part}: there are no such layers", hint=hint)
            layers |= set(range(first, last + 1))
        elif part not in ("embeddings", "head"):
            raise PlanError(f"--freeze does not know {part!r}", hint=_FREEZE_HINT)
    outer = [name for name in names if stack.locate(name) is None]
    found = {name for name in names if (place := stack.locate(name)) and place[0] in layers}
    for part, kind in (("embeddings", "embedding"), ("head", "head")):
        if part in parts:
            found |= {name for name in outer if _kind(anatomy, name) == kind}
    return frozenset(found)


def choose(model: Any, anatomy: Anatomy, *, layers: frozenset[int] | None, freeze: str | None, ends: bool) -> int:
    """Set `requires_grad` of every parameter, and return how many numbers are trained.

    With `layers` only those are, and with `ends` what stands behind the last layer as well: final norm and head.
    Raises PlanError for a part to freeze that there is not.
    """
    named = dict(model.named_parameters())
    wanted = chosen(anatomy, list(named), layers=layers, ends=ends) - frozen(freeze, anatomy, list(named))
    for name, parameter in named.items():
        parameter.requires_grad_(name in wanted and parameter.is_floating_point())
    return sum(int(parameter.numel()) for parameter in named.values() if parameter.requires_grad)


def train_rows(model: Any, tokens: Sequence[int]) -> int:
    """Make the rows of these tokens trainable, in input embedding and head, and return how many numbers they have.

    The other rows have a gradient of 0, with which an optimiser leaves them alone as long as it decays no weights.
    """
    count = 0
    seen: set[int] = set()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = None if module is None else module.weight
        if weight is None or id(weight) in seen:
            continue
        seen.add(id(weight))
        keep = weight.detach().new_zeros(len(weight), 1)
        keep[list(tokens)] = 1
        weight.requires_grad_(True)
        weight.register_hook(lambda gradient, keep=keep: gradient * keep.to(gradient.device))
        count += len(tokens) * int(weight.shape[1])
    return count


def chosen(anatomy: Anatomy, names: Sequence[str], *, layers: frozenset[int] | None, ends: bool) -> frozenset[str]:
    """Return which parameters are trained: all, or those of `layers` and with `ends` what stands behind the last."""
    if layers is None:
        return frozenset(names)
    stack = anatomy.stacks[0]
    inside = {name for name in names if (place := stack.locate(name)) and place[0] in layers}
    outer = {name for name in names if stack.locate(name) is None and _kind(anatomy, name) in ("head", "gain", "shift")}
    return frozenset(inside | (outer if ends else set()))


def _kind(anatomy: Anatomy, name: str) -> str:
    """Return what a parameter outside the layers is, by its family's table, or by its name where there is none."""
    if anatomy.family is not None and name in anatomy.spec.tensors:
        return anatomy.row(name)[0].kind
    if "embed" in name or name.endswith((".wte.weight", ".wpe.weight")):
        return "embedding"
    return "gain" if "norm" in name or ".ln_" in name else "head"


def _is_gap(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and other != one + 1


def _cuts_the_end(receipt: Mapping[str, Any], layer_map: Sequence[int | None]) -> bool:
    """Return whether the source had layers behind the last one, as the steps tell."""
    steps = [step for step in receipt.get("steps") or [] if isinstance(step, dict)]
    dropped = [
        layer for step in steps if isinstance(step.get("prune"), dict) for layer in step["prune"].get("dropped", [])
    ]
    last = layer_map[-1]
    return any("truncate" in step for step in steps) or (last is not None and any(layer > last for layer in dropped))
