"""The model of a run: loaded, its trained parameters chosen or adapters added, and its loss attached."""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import set_seed

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.checkpoint.receipt import read_receipt
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import PlanError
from surgeon.models.adapters import add_adapters
from surgeon.models.device import computes_bfloat16
from surgeon.models.loading import load_model, num_known
from surgeon.models.varlen import VARLEN
from surgeon.train.objective import Objective
from surgeon.train.settings import Settings
from surgeon.train.task import Task

if TYPE_CHECKING:
    from surgeon.cost.memory import Precision
    from surgeon.train.teacher import Teacher

LOAD_HINT = "surgeon inspect shows what the checkpoint holds; finetune needs a language model that transformers knows."
_LAYERS = re.compile(r"layers=(\d+)(?:-(\d+))?")
_FREEZE_HINT = "Such as --freeze embeddings,layers=0-11"


def precision_of(settings: Settings, device: str) -> "Precision":
    """Return "bf16", "float32" or "pure-bf16", with "auto" resolved for this device."""
    if settings.precision == "pure-bf16":
        return "pure-bf16"
    if settings.precision == "float32":
        return "float32"
    is_bf16 = settings.precision == "bf16" or computes_bfloat16(device)
    return "bf16" if is_bf16 else "float32"


def load_trainable(source: Source, task: Task, *, precision: str) -> Any:
    """Return the model to train, with its weights in float32 (the base of adapters: as stored).

    Weights in 16 bits lose small steps: at a rate of 1e-5 most of them never change. So they are float32, and only
    products are computed in 16 bits, unless the precision is "pure-bf16".
    """
    settings = task.settings
    stored_bf16 = {item.spec.dtype for item in source.tensors.values()} <= {"BF16"}
    is_frozen_base = settings.lora is not None and precision == "bf16" and stored_bf16
    dtype = torch.bfloat16 if precision == "pure-bf16" or is_frozen_base else torch.float32
    options = attention_options(settings)
    if settings.qlora:
        options["quantization_config"] = _four_bits(torch.float32 if precision == "float32" else torch.bfloat16)
    model = load_model(source, dtype=dtype, hint=LOAD_HINT, kind=task.kind(source), **options)
    model.config.use_cache = False  # with a cache, packed documents see each other
    return model


def attention_options(settings: Settings) -> dict[str, Any]:
    """Return the options of a loader for the attention of a run; ours is set once the model is there."""
    return {} if settings.attention in (None, VARLEN) else {"attn_implementation": settings.attention}


def trained_model(model: Any, source: Source, task: Task, teacher: "Teacher | None", *, compiles: bool = False) -> Any:
    """Return the model with its loss attached, and with its trained parameters chosen or adapters around it.

    Its layers are compiled where the run `compiles` them.

    Raises PlanError where nothing is left to train, or the model does not fit the task or the teacher.
    """
    settings, anatomy = task.settings, read_anatomy(spec_of(source))
    set_seed(settings.seed)  # adapters are drawn
    made = (receipt_of(source) or {}) if settings.hidden_weight else {}
    layer_map = made.get("mlp_map") or made.get("layer_map")  # states are compared after a layer's MLP
    objective = Objective.of(settings, kd_weight=task.kd_weight, layer_map=layer_map)
    task.attach(model, objective, teacher)
    if settings.activation_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is not None:
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:  # transformers before 5.20
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiles:
        model.get_decoder().compile()
    if settings.lora is not None:
        if settings.activation_checkpointing:
            model.enable_input_require_grads()
        return add_adapters(
            model,
            anatomy,
            rank=settings.lora,
            alpha=settings.lora_alpha or 2 * settings.lora,
            dropout=settings.lora_dropout,
            targets=settings.lora_targets,
            embedding_rows=task.embedding_rows(),
        )
    receipt = receipt_of(source)
    layers = None if settings.train == "all" else trained_layers(settings.train, receipt, anatomy.depth)
    count = choose(model, anatomy, layers=layers, freeze=settings.freeze, ends=settings.train == "cut")
    if settings.train == "new" and (tokens := new_token_ids(receipt)):
        count += train_rows(model, tokens)
    if not count:
        raise PlanError("nothing is left to train", hint="Freeze less.")
    return model


def num_trained(source: Source, settings: Settings) -> int:
    """Return how many parameters a run without adapters trains, by the headers of the checkpoint."""
    anatomy = read_anatomy(spec_of(source))
    layers = None
    if settings.train != "all":
        layers = trained_layers(settings.train, receipt_of(source), anatomy.depth)
    tensors = anatomy.spec.tensors
    trained = chosen(anatomy, list(tensors), layers=layers, ends=settings.train == "cut")
    names = trained - frozen(settings.freeze, anatomy, list(tensors))
    return sum(tensors[name].num_parameters for name in names)


def receipt_of(source: Source) -> dict[str, Any] | None:
    """Return the receipt of the surgery that made a local source, None where there is none."""
    return None if source.origin is None else read_receipt(source.origin)


def _four_bits(dtype: torch.dtype) -> Any:
    if find_spec("bitsandbytes") is None:
        raise PlanError("bitsandbytes is needed for --qlora", hint='pip install "surgeon[quant]"')
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


# --- trained parameters ------------------------------------------------------------------------------------------


def trained_layers(which: str, receipt: Mapping[str, Any] | None, depth: int) -> frozenset[int]:
    """Return the layers that "new" or "cut" means, by the layer map in the receipt of the surgery.

    "new" are layers without a source layer; layers that a growth copied are not new. "cut" are the two layers next to
    each place where layers were removed, or the one inside of which it lies, and the last layer where layers after it
    were removed.
    Raises PlanError where the receipt is missing or names no such layer.
    """
    layer_map = (receipt or {}).get("layer_map")
    if not isinstance(layer_map, list) or len(layer_map) != depth:
        raise PlanError(
            f"--train {which} needs the layer map of a surgery, and the model's surgeon.json has none",
            hint="Train all of it, or freeze parts by name: --freeze embeddings,layers=0-11",
        )
    if which == "new":
        layers = {index for index, source in enumerate(layer_map) if source is None}
    else:
        mlp_map = (receipt or {}).get("mlp_map") or layer_map
        pairs = [(index, index + 1) for index in range(depth - 1)]
        apart = [pair for pair in pairs if _is_gap(mlp_map[pair[0]], layer_map[pair[1]])]
        layers = {index for pair in apart for index in pair}
        layers |= {index for index in range(depth) if layer_map[index] != mlp_map[index]}
        if _cuts_the_end(receipt or {}, mlp_map):
            layers.add(depth - 1)
    if not layers and not (which == "new" and new_token_ids(receipt)):
        reason = "made no new layer" if which == "new" else "took out no layer"
        raise PlanError(f"the surgery that made this model {reason}", hint="Leave out --train.")
    return frozenset(layers)


def new_token_ids(receipt: Mapping[str, Any] | None) -> list[int]:
    """Return the ids of the tokens that surgery added, by the steps of its receipt that have token_ids."""
    steps = [step for step in (receipt or {}).get("steps") or [] if isinstance(step, dict)]
    options = [named for step in steps for named in step.values() if isinstance(named, dict)]
    lists = [named["token_ids"] for named in options if isinstance(named.get("token_ids"), list)]
    return [token for tokens in lists for token in tokens if type(token) is int]


def frozen(spec: str | None, anatomy: Anatomy, names: Sequence[str]) -> frozenset[str]:
    """Return which of the parameters' names `--freeze` means. Raises PlanError for an unknown part."""
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
    fixed = {name for name in names if (place := stack.locate(name)) and place[0] in layers}
    for part, kind in (("embeddings", "embedding"), ("head", "head")):
        if part in parts:
            fixed |= {name for name in outer if _kind(anatomy, name) == kind}
    return frozenset(fixed)


def choose(model: Any, anatomy: Anatomy, *, layers: frozenset[int] | None, freeze: str | None, ends: bool) -> int:
    """Set `requires_grad` of every parameter, and return how many numbers are trained.

    With `layers` only those are trained, and with `ends` also the final norm and the head.
    Raises PlanError for an unknown part to freeze.
    """
    named = dict(model.named_parameters())
    trained = chosen(anatomy, list(named), layers=layers, ends=ends) - frozen(freeze, anatomy, list(named))
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained and parameter.is_floating_point())
    return sum(int(parameter.numel()) for parameter in named.values() if parameter.requires_grad)


def train_rows(model: Any, tokens: Sequence[int]) -> int:
    """Make the rows of these tokens trainable, in input embedding and head, and return how many numbers they have.

    The other rows have a gradient of 0: without weight decay an optimiser does not change them.
    """
    if wrong := next((token for token in tokens if not 0 <= token < num_known(model)), None):
        hint = "Fetch or make the model again, with its receipt."
        raise PlanError(f"surgeon.json says that token {wrong} was added, and the model has none", hint=hint)
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
        weight.register_hook(_Rows(keep))
        count += len(tokens) * int(weight.shape[1])
    return count


class _Rows:
    """A hook that leaves the gradient of some rows, where `keep` is 1, and makes the others 0."""

    def __init__(self, keep: Tensor) -> None:
        self._keep = keep

    def __call__(self, gradient: Tensor) -> Tensor:
        self._keep = self._keep.to(gradient.device)  # once: the model moves after the hook was made
        return gradient * self._keep


def chosen(anatomy: Anatomy, names: Sequence[str], *, layers: frozenset[int] | None, ends: bool) -> frozenset[str]:
    """Return which parameters are trained: all, or those of `layers`, with `ends` also the final norm and the head."""
    if layers is None:
        return frozenset(names)
    stack = anatomy.stacks[0]
    inside = {name for name in names if (place := stack.locate(name)) and place[0] in layers}
    outer = {name for name in names if stack.locate(name) is None and _kind(anatomy, name) in ("head", "gain", "shift")}
    return frozenset(inside | (outer if ends else set()))


def _kind(anatomy: Anatomy, name: str) -> str:
    """Return the kind of a parameter outside the layers, by its family's table, or without one by its name."""
    if anatomy.whole_family is not None and name in anatomy.spec.tensors:
        return anatomy.row(name)[0].kind
    if "embed" in name or name.endswith((".wte.weight", ".wpe.weight")):
        return "embedding"
    return "gain" if "norm" in name or ".ln_" in name else "head"


def _is_gap(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and other != one + 1


def _cuts_the_end(receipt: Mapping[str, Any], layer_map: Sequence[int | None]) -> bool:
    """Return whether the surgery removed layers after the last one, by its steps."""
    steps = [step for step in receipt.get("steps") or [] if isinstance(step, dict)]
    dropped = [
        layer for step in steps if isinstance(step.get("prune"), dict) for layer in step["prune"].get("dropped", [])
    ]
    last = layer_map[-1]
    return any("truncate" in step for step in steps) or (last is not None and any(layer > last for layer in dropped))
