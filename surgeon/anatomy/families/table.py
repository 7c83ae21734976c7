"""A family's table: the names of its tensors in the files, and what their axes mean.

The tables describe checkpoints as transformers writes them, never the modules that it builds from them (Mixtral
saves an expert's three matrices; in memory there are two, fused over the experts). Axes are written in the layout in
which the tensor is stored: "out in" for a linear map, "in out" for GPT-2's Conv1D.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from surgeon.anatomy.axes import Dim, parse

Kind = Literal["linear", "conv1d", "bias", "gain", "shift", "embedding", "head", "logit", "buffer"]


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor's axes and what it does with them.

    `linear` and `conv1d` map one axis to another, `gain` and `shift` are a norm's, `logit` is a parameter added to
    logits (a router's bias, attention sinks), `buffer` is something old files carry and every loader ignores.
    `when` is the config key that decides whether the tensor exists, or two axes that then differ: "embed != hidden".
    """

    axes: tuple[Dim, ...]
    kind: Kind
    when: str | None = None


Rows = dict[str, Row]


@dataclass(frozen=True, slots=True)
class Family:
    """The tensors of a family, grouped by part. Names inside a layer are relative to `layers` and the layer's number.

    `mlp` lists alternatives: a layer has exactly one of them (dense, or experts). In names, "{}" stands for an
    expert's number. `base` is the prefix that checkpoints saved from the headless model lack.
    """

    base: str
    layers: str
    embedding: Rows
    final_norm: Rows
    attention: Rows
    norm: Rows
    mlp: tuple[Rows, ...]
    sizes: Mapping[str, tuple[str, ...]]  # axis: the config keys that may hold its size; the first one counts
    default_sizes: Mapping[str, tuple[int, str]]  # axis: (factor, axis) where no key holds it
    init_std: str = "initializer_range"  # the config key with the standard deviation of fresh weights
    init_gain: float = 1.0  # a fresh norm's stored gain; 0 where the model adds 1
    residual_init: tuple[str, ...] = ()  # fresh weights drawn with std / sqrt(2 * layers)
    inverse_layer_scale: str | None = None  # the config flag with which attention logits are divided by layer + 1
    norm_kind: Literal["rms", "layer"] = "rms"
    branch_norms: tuple[str, ...] = ()  # norms at the end of a branch: all that a layer adds passes through their gains
    pre_norm_flag: str | None = None  # the config key that is false where norms follow the sum instead
    scales_embedding: bool = False  # the model multiplies embeddings by the square root of hidden
    query_scale_flag: str | None = None  # the config key that is false where attention logits are not scaled
    expert_shares_flag: str | None = None  # the config key that is false where experts' weights are shares among all
    fixed_query_scale: bool = False  # logits are not divided by the square root of head_dim but by a key of the config
    rotary: Literal["halves", "pairs"] | None = "halves"  # which dims rotate together: i and i + R/2, or 2i and 2i + 1
    hidden_divisible: bool = False  # the config insists that heads divide hidden, even where head_dim is given


def linear(name: str, axes: str, *, bias: str | bool = False, kind: Kind = "linear") -> Rows:
    """Return the rows of a linear map; `bias` is whether it has one, or the config key that says so."""
    dims = parse(axes)
    rows = {f"{name}.weight": Row(dims, kind)}
    if bias is not False:
        out = dims[-1:] if kind == "conv1d" else dims[:1]
        rows[f"{name}.bias"] = Row(out, "bias", when=bias if isinstance(bias, str) else None)
    return rows


def norm(name: str, axes: str = "hidden", *, shift: bool = False, when: str | None = None) -> Rows:
    """Return the rows of a norm: its gain, and for a layer norm its shift."""
    dims = parse(axes)
    rows = {f"{name}.weight": Row(dims, "gain", when)}
    return rows | {f"{name}.bias": Row(dims, "shift", when)} if shift else rows


def one(name: str, axes: str, kind: Kind, when: str | None = None) -> Rows:
    return {name: Row(parse(axes), kind, when)}
