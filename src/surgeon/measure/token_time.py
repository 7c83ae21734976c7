"""What headers do not say of a cut: the time of a token, measured layer by layer, and the bytes of its cache.

A layer of each kind is built at its real shape, with numbers that are no weights, and run for one token after a
context, on the device that is asked about. The time of a model is that of what stands around the layers, and of each of
its layers. Operations are not counted: on few tokens a layer waits for memory, and no formula knows a device.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.config import attention_kinds
from surgeon.anatomy.halves import MLP, Pairing
from surgeon.checkpoint.blank import BlankSource
from surgeon.checkpoint.header import CheckpointSpec
from surgeon.errors import MeasureError, PlanError
from surgeon.models.loading import from_config, libraries_fail, parsed_config, quiet_transformers
from surgeon.models.skeleton import auto_class
from surgeon.processes import of_the_first
from surgeon.progress import stage
from surgeon.transforms.layers import keep_layers, planned
from surgeon.transforms.prune import prune

COPIES = 4  # of a layer in the model that is timed: one alone would be lost beside the head
ROUNDS, WARM_UP = 15, 3  # tokens that are timed, and before them; their median counts
DEFAULT_CONTEXT = 256  # tokens before the one that is timed, where none is asked for
HINT = "Give --target-parameters, or --target-memory without --context."


@dataclass
class DeviceMeter:
    """The tables of one model on one device, filled as kinds of layers and widths come up.

    `context` is the tokens of the cache; None: no cache is counted. `times` says whether tokens are timed.
    `known` are entries of earlier: a search that goes on decides by the same times.
    """

    anatomy: Anatomy
    device: str
    dtype: torch.dtype
    context: int | None = None
    times: bool = False
    known: dict[str, float] = field(default_factory=dict)

    def cache(self, sizes: Mapping[str, int] | None, pairing: Pairing) -> int | None:
        """Return the bytes of keys, values and states after `context` tokens of one sequence; None without a context.

        They are counted in the cache that transformers makes of the result's config, on the meta device.
        """
        if self.context is None:
            return None
        return round(sum(self._entry("cache", layer, layer, sizes) for layer in pairing.attention))

    def milliseconds(self, sizes: Mapping[str, int] | None, pairing: Pairing) -> float | None:
        """Return the time of a token after the context, in milliseconds; None where no tokens are timed."""
        if not self.times:
            return None
        layers = zip(pairing.attention, pairing.mlp, strict=True)
        around = self._entry("around", 0, 0, sizes)
        return around + sum(self._entry("layer", one, other, sizes) for one, other in layers)

    def _entry(self, what: str, attention: int, mlp: int, sizes: Mapping[str, int] | None) -> float:
        """Return a number of the table: of layers that are alike it is the first one's."""
        attention, mlp = self._first_like[0][attention], self._first_like[1][mlp]
        if what == "cache":
            mlp = attention
        shown = "" if sizes is None else " ".join(f"{axis}={size}" for axis, size in sorted(sizes.items()))
        key = f"{what} {attention} {mlp} {shown}".strip()
        if key not in self.known:
            with stage(f"timing layers on {self.device}" if what != "cache" else "sizing the cache"):
                value = {"cache": self._cache_bytes, "around": self._around}.get(what, self._layer)(
                    attention, mlp, sizes
                )
            self.known[key] = float(of_the_first(torch.tensor(value, dtype=torch.float64)))
        return self.known[key]

    @property
    def _first_like(self) -> tuple[list[int], list[int]]:
        if not hasattr(self, "_like"):
            self._like = _alike(self.anatomy)
        return self._like

    # --- what is measured -------------------------------------------------------------------------------------

    def _layer(self, attention: int, mlp: int, sizes: Mapping[str, int] | None) -> float:
        """Return the milliseconds of a layer: of several copies of it, without what stands around them."""
        around = self._entry("around", 0, 0, sizes)
        if attention == mlp:
            return max(0.0, (self._timed([attention] * COPIES, sizes) - around) / COPIES)
        # A layer whose halves have kinds that no layer of the source has together: each layer's time by its halves.
        shares = [_share(self.anatomy, layer) for layer in (attention, mlp)]
        one, other = (self._entry("layer", layer, layer, sizes) for layer in (attention, mlp))
        return one * shares[0] + other * (1.0 - shares[1])

    def _around(self, _: int, __: int, sizes: Mapping[str, int] | None) -> float:
        """Return the milliseconds of embedding, final norm and head."""
        one, more = self._timed([0], sizes), self._timed([0] * (1 + COPIES), sizes)
        return max(0.0, one - (more - one) / COPIES)

    def _timed(self, layers: list[int], sizes: Mapping[str, int] | None) -> float:
        """Return the median milliseconds of one token of a model of these layers."""
        context = self.context or DEFAULT_CONTEXT
        model = self._built(layers, sizes, self.device)
        tokens = torch.zeros(1, context, dtype=torch.long, device=self.device)
        times: list[float] = []
        with torch.no_grad(), self._running():
            cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
            for _ in range(WARM_UP + ROUNDS):
                self._wait()
                began = time.perf_counter()
                cache = model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True).past_key_values
                self._wait()
                times.append(1e3 * (time.perf_counter() - began))
        return median(times[WARM_UP:])

    def _cache_bytes(self, attention: int, _: int, sizes: Mapping[str, int] | None) -> float:
        """Return the bytes that one layer keeps of the context."""
        model = self._built([attention], sizes, "meta")
        tokens = torch.zeros(1, self.context or 1, dtype=torch.long, device="meta")
        with torch.no_grad(), self._running():
            cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
        return float(sum(tensor.nbytes for tensor in _tensors(cache)))

    def _built(self, layers: list[int], sizes: Mapping[str, int] | None, device: str) -> Any:
        """Return a model of transformers of copies of these layers, whose numbers are no weights."""
        plan = keep_layers(self.anatomy, layers)
        if sizes is not None:
            shorter = planned(self.anatomy, plan)
            plan = plan.then(prune(shorter, sizes=sizes, criterion="uniform"))
        spec: CheckpointSpec = plan.result(self.anatomy.spec)
        label = f"a model of layer {layers[0]}"
        config = parsed_config(spec.config, label, hint=HINT)
        kind = auto_class(BlankSource(label, spec.config, spec.tensors))
        with libraries_fail(f"transformers cannot build {label}", hint=HINT, error_type=MeasureError):
            with quiet_transformers(), torch.device("meta"):
                model = from_config(kind, config, dtype=self.dtype)
            if device != "meta":
                model = from_config(kind, config, dtype=self.dtype).to(device)
        return model.eval()

    def _running(self) -> Any:
        message = f"layers of this {self.anatomy.model_type} do not run one token after others"
        return libraries_fail(message, hint=HINT, error_type=MeasureError)

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def _tensors(cache: Any) -> list[torch.Tensor]:
    """Return the tensors of a cache of transformers, each once, whatever its layers are called."""
    found: dict[int, torch.Tensor] = {}
    queue, seen = [cache], set()
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found[id(item)] = item
        elif isinstance(item, list | tuple):
            queue += item
        elif isinstance(item, dict):
            queue += item.values()
        elif type(item).__module__.startswith("transformers.cache_utils"):
            queue += vars(item).values()
    return [tensor for tensor in found.values() if tensor.is_floating_point()]  # and no counters


def _alike(anatomy: Anatomy) -> tuple[list[int], list[int]]:
    """Return for each layer the first whose attention is of its kind and shapes, and the first whose MLP is."""
    kinds = attention_kinds(anatomy.spec.config, anatomy.depth)
    shapes: list[tuple[dict[str, object], dict[str, object]]] = [({}, {}) for _ in range(anatomy.depth)]
    for name, tensor in anatomy.spec.tensors.items():
        if (place := anatomy.stacks[0].locate(name)) is not None:
            half = int(anatomy.rows.get(name, (None, ""))[1] == MLP)
            shapes[place[0]][half][place[1]] = tensor.shape
    found: tuple[list[int], list[int]] = ([], [])
    for half in (0, 1):
        first: dict[object, int] = {}
        for layer in range(anatomy.depth):
            key = (kinds[layer] if half == 0 else "", tuple(sorted(map(str, shapes[layer][half].items()))))
            found[half].append(first.setdefault(key, layer))
    return found


def _share(anatomy: Anatomy, layer: int) -> float:
    """Return the part of a layer's parameters that its attention has."""
    inside = [
        (anatomy.rows.get(name, (None, ""))[1], tensor.num_parameters)
        for name, tensor in anatomy.spec.tensors.items()
        if (place := anatomy.stacks[0].locate(name)) is not None and place[0] == layer
    ]
    total = sum(count for _, count in inside)
    return 1.0 - sum(count for part, count in inside if part == MLP) / max(1, total)


def check_context(anatomy: Anatomy, context: int, positions: int | None) -> None:
    """Raises PlanError for a context longer than the model's positions."""
    if positions is not None and context > positions:
        raise PlanError(
            f"a context of {context} tokens is longer than the {positions} positions of this {anatomy.model_type}",
            hint=f"Use --context {positions}, or less.",
        )
