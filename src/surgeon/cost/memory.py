"""The memory of a batch: the numbers that autograd keeps for the backward pass, and those of the loss. From headers.

The rules are those of transformers' Llama, read line by line and checked against autograd's saved tensors. Other
families follow them as far as their tables and configs say. Dropout is not counted; most models have none.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.config import size_of, spelled, text_config
from surgeon.models.device import LOGITS_BYTES

Precision = Literal["bf16", "float32", "pure-bf16"]
# The most bytes at once of each logit of a chunk, held by tests/test_traffic.py: logits and softmax in float32. A
# distillation keeps those of two models, and what the gradient of their divergence needs.
LOGIT_BYTES, DISTILLED_LOGIT_BYTES = 8, 28
# Numbers that an MLP without a gate keeps of each channel: the activation's input, output and numbers in between. A
# gated one keeps four: gate, activation, up, and their product.
KEPT_BY_ACTIVATION = {"relu": 1, "gelu_new": 5, "gelu_fast": 5}
STATES = {"sgd": 0, "adafactor": 0, "rmsprop": 1, "adagrad": 1, "lion": 1}  # numbers for each parameter; others: 2
KEPT_BY_OTHERS, KEPT_BY_GATED = 2, 4
_GATED = re.compile(r"gate_(up_)?proj|\.w3\.")
_ATTENTION = re.compile(r"\.[qkv]_proj\.")
_BRANCHES = re.compile(r"(gate|up)_proj|\.w[13]\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The facts of a run that its cost depends on. `row_tokens` is the longest row, `mean_tokens` a usual one."""

    steps: int
    row_tokens: int
    mean_tokens: float | None = None  # of a row, without padding
    document_tokens: float | None = None  # of a document, where rows hold several and keep them apart
    batch_size: int = 1
    gradient_accumulation: int = 1
    processes: int = 1
    optim: str = "adamw_torch_fused"
    trained: int | None = None  # parameters, where not all are
    lora: int | None = None  # rank; then the base is not trained
    stored_bf16: bool = False  # the base of adapters, in memory
    precision: Precision = "bf16"
    activation_checkpointing: bool = False
    teacher: Anatomy | None = None
    logits_bytes: int = LOGITS_BYTES  # of a chunk of the loss, in float32

    @property
    def tokens(self) -> int:
        """Tokens of the whole run, padding left out."""
        rows = self.steps * self.batch_size * self.gradient_accumulation * self.processes
        return round(rows * (self.mean_tokens or self.row_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on each device by use; `peak` is the most at once."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    teacher: int
    keeps_gradients: bool  # from one batch to the next, or in the buckets that processes exchange

    @property
    def peak(self) -> int:
        """The most bytes at once: gradients grow while activations are freed, unless they exist before."""
        forward = self.activations + self.loss
        moving = self.gradients + forward if self.keeps_gradients else max(self.gradients, forward)
        return self.weights + self.optimizer + self.teacher + moving

    def to_dict(self) -> dict[str, int]:
        """Return the parts and the peak."""
        names = ("weights", "gradients", "optimizer", "activations", "loss", "teacher", "peak")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """The shape of one device's batch and its precision. `is_packed`: a mask keeps the documents of a row apart."""

    rows: int
    row_tokens: int
    precision: Precision
    is_packed: bool = False
    lora: int | None = None
    is_base_half: bool = False  # the weights of products are stored in 16 bits
    is_checkpointed: bool = False
    logits_bytes: int = LOGITS_BYTES  # of a chunk, in float32

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens

    @property
    def item(self) -> int:
        """Bytes of a number that a product reads."""
        return 4 if self.precision == "float32" else 2

    @property
    def residual(self) -> int:
        """Bytes of a number of the hidden state between layers."""
        return 2 if self.is_base_half else 4

    @property
    def casts(self) -> bool:
        """Whether each product makes a copy of its input, as autocast does."""
        return self.precision == "bf16"


def memory(anatomy: Anatomy, work: Workload, *, trained: int, adapters: int = 0) -> Memory:
    """Return the bytes that training holds on each device, without those of a runtime itself (CUDA: ½ GB)."""
    total = anatomy.spec.num_parameters
    half_base = work.precision == "pure-bf16" or (adapters > 0 and work.stored_bf16)
    wide = 2 if work.precision == "pure-bf16" else 4  # bytes of a trained parameter, its gradient and each state
    distributed = work.processes > 1
    batch = BatchShape(
        rows=work.batch_size,
        row_tokens=work.row_tokens,
        precision=work.precision,
        is_packed=work.document_tokens is not None,
        lora=work.lora,
        is_base_half=half_base,
        is_checkpointed=work.activation_checkpointing,
        logits_bytes=work.logits_bytes,
    )
    teacher = (
        0 if work.teacher is None else work.teacher.spec.num_parameters * (4 if work.precision == "float32" else 2)
    )
    return Memory(
        weights=total * (2 if half_base else 4) + adapters * 4,
        gradients=trained * wide * (2 if distributed else 1),  # torch's DDP copies them into buckets
        optimizer=round(trained * _states(work.optim) * wide),
        activations=activation_bytes(anatomy, batch),
        loss=loss_bytes(anatomy, batch, is_head_trained=not adapters, with_teacher=work.teacher is not None),
        teacher=teacher,
        keeps_gradients=work.gradient_accumulation > 1 or distributed,
    )


def lora_parameters(anatomy: Anatomy, rank: int) -> int:
    """Return the parameters of adapters on all matrices of the layers."""
    return sum(rank * sum(anatomy.spec.tensors[name].shape) for name in matrices(anatomy))


def activation_bytes(anatomy: Anatomy, batch: BatchShape) -> int:
    """Return the bytes that autograd keeps of a batch until the backward pass.

    With weights in float32 and products in bfloat16 that includes the copies of the layers' matrices, once.
    """
    hidden = sizes_of(anatomy)["hidden"]
    products = sum(anatomy.spec.tensors[name].num_parameters for name in matrices(anatomy))
    copies = 2 * products if batch.precision == "bf16" and not batch.is_base_half else 0
    layer = batch.tokens * _layer_bytes(anatomy, batch)
    final_norm = batch.tokens * hidden * _norm_bytes(anatomy, batch)
    if batch.is_checkpointed:  # the input of each layer, and everything of the one that is computed again
        return anatomy.depth * batch.tokens * hidden * batch.residual + layer + copies + final_norm
    return anatomy.depth * layer + copies + final_norm


def loss_bytes(anatomy: Anatomy, batch: BatchShape, *, is_head_trained: bool, with_teacher: bool) -> int:
    """Return the bytes of the loss: a chunk of logits and its softmax, and the gradients that are made with them."""
    sizes = sizes_of(anatomy)
    chunk = min(batch.tokens * sizes["vocab"], batch.logits_bytes // 4)
    head = sizes["vocab"] * sizes["hidden"]
    copy = 2 * head if batch.precision == "bf16" and not batch.is_base_half else 0
    chunks = chunk * (DISTILLED_LOGIT_BYTES if with_teacher else LOGIT_BYTES)
    return chunks + copy + batch.tokens * sizes["hidden"] * batch.item + (4 * head if is_head_trained else 0)


def matrices(anatomy: Anatomy) -> list[str]:
    """Return the names of the matrices of all layers, also of experts that are stored as one tensor."""
    tensors, stack = anatomy.spec.tensors, anatomy.stacks[0]
    inside = [name for name in tensors if stack.locate(name) and len(tensors[name].shape) >= 2]
    if anatomy.whole_family is None:
        return inside
    return [name for name in inside if anatomy.row(name)[0].kind in ("linear", "conv1d")]


def sizes_of(anatomy: Anatomy) -> dict[str, int]:
    """Return the sizes that memory depends on; without a table, as the config says them, 0 for unknown."""
    if anatomy.whole_family is not None:
        return dict(anatomy.sizes) | {"ffn": anatomy.sizes.get("expert_ffn", anatomy.sizes["ffn"])}
    config = anatomy.spec.config
    hidden, heads = size_of(config, "hidden") or 0, size_of(config, "heads") or 1
    return {
        "hidden": hidden,
        "heads": heads,
        "kv_heads": size_of(config, "kv_heads") or heads,
        "head_dim": size_of(config, "head_dim") or hidden // heads,
        "ffn": size_of(config, "expert_ffn") or size_of(config, "ffn") or 4 * hidden,
        "vocab": size_of(config, "vocab") or 0,
    }


def _layer_bytes(anatomy: Anatomy, batch: BatchShape) -> int:
    """Return the bytes that one layer keeps of each token."""
    sizes, names, config = sizes_of(anatomy), _last_layer(anatomy), text_config(anatomy.spec.config)
    hidden, ffn, query = sizes["hidden"], sizes["ffn"], sizes["heads"] * sizes["head_dim"]
    window = size_of(config, "window")
    is_masked = batch.is_packed or (window is not None and window < batch.row_tokens)
    key = query if is_masked else sizes["kv_heads"] * sizes["head_dim"]  # a mask makes transformers repeat them
    if any(_GATED.search(name) for name in names):
        inside = KEPT_BY_GATED
    else:
        activation = next(iter(spelled(config, "activation").values()), "gelu_new")
        inside = KEPT_BY_ACTIVATION.get(str(activation), KEPT_BY_OTHERS)
    # A product keeps its input: products of one input share it, unless each has its own copy.
    products = [name for name in names if name in matrices(anatomy)]
    into_attention = max(1, sum(map(bool, map(_ATTENTION.search, products)))) if batch.casts else 1
    branches = {match[0] for name in products if (match := _BRANCHES.search(name))}
    into_mlp = max(1, len(branches)) if batch.casts else 1
    experts = size_of(config, "experts_per_token") or 1
    numbers = into_attention * hidden + 2 * query + 2 * key  # attention: input, queries, keys, values, result
    if not any(map(_ATTENTION.search, products)) and not (anatomy.whole_family and anatomy.whole_family.rotary is None):
        numbers += query + key  # in one tensor with the values; rotated copies exist beside them
    numbers += experts * (into_mlp * hidden + inside * ffn)
    kept = numbers * batch.item + 4 * sizes["heads"]  # and the logarithm of each softmax's sum
    kept += _num_norms(anatomy, names, hidden) * hidden * _norm_bytes(anatomy, batch)
    if any("q_norm." in name for name in names):
        kept += (query + sizes["kv_heads"] * sizes["head_dim"]) * _norm_bytes(anatomy, batch)
    if config.get("attn_logit_softcapping"):  # no kernel knows it: logits and softmax of all keys exist
        kept += sizes["heads"] * batch.row_tokens * (2 * batch.item + (4 if batch.item == 2 else 0))
    elif is_masked:
        kept += batch.row_tokens * batch.item  # the mask, of which each layer makes numbers of its own
    if batch.lora:
        kept += len(products) * batch.lora * batch.item
    return kept


def _last_layer(anatomy: Anatomy) -> list[str]:
    """Return the names of the last layer's tensors: the first ones may be dense where all others have experts."""
    stack = anatomy.stacks[0]
    return [name for name in anatomy.spec.tensors if (at := stack.locate(name)) and at[0] == anatomy.depth - 1]


def _num_norms(anatomy: Anatomy, names: Sequence[str], hidden: int) -> int:
    """Return how many norms of the whole state are among tensors; gains and shifts differ by name."""
    gains = [name for name in names if name.endswith(".weight")]
    return sum(anatomy.spec.tensors[name].shape == (hidden,) for name in gains)


def _is_layer_norm(anatomy: Anatomy) -> bool:
    """Return whether norms subtract the mean; without a table, whether they have a shift beside their gain."""
    if anatomy.whole_family is not None:
        return anatomy.whole_family.norm_kind == "layer"
    return any(re.search(r"(norm|ln_\w+)\.bias$", name) for name in _last_layer(anatomy))


def _norm_bytes(anatomy: Anatomy, batch: BatchShape) -> int:
    """Return the bytes that a norm keeps of each number: its input, and for an RMS norm also the input of its gain."""
    if _is_layer_norm(anatomy):
        return batch.residual
    return 4 + batch.residual  # it computes in float32


def _states(optim: str) -> float:
    """Return how many numbers of a parameter's width an optimizer keeps of each parameter."""
    kept = next((count for name, count in STATES.items() if optim.startswith(name)), 2)
    return kept / 4 if "8bit" in optim else kept
