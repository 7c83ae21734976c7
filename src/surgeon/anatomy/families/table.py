"""A family's table: the names of its tensors in the files, and what their axes mean.

The tables describe checkpoints as transformers writes them, never the modules that it builds from them (Mixtral
saves an expert's three matrices; in memory there are two, fused over the experts). Axes are written in the layout in
which the tensor is stored: "out in" for a linear map, "in out" for GPT-2's Conv1D.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from surgeon.anatomy.axes import Dim, parse

Kind = Literal["linear", "conv1d", "bias", "gain", "shift", "embedding", "head", "logit", "scalar", "buffer", "opaque"]


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor's axes and what it does with them.

    `linear` and `conv1d` map one axis to another, `gain` and `shift` are a norm's, `logit` is a parameter added to
    logits (a router's bias, attention sinks), `scalar` something without axes of the model's (an activation's own
    parameter), `buffer` is something old files carry and every loader ignores, `opaque` has no axis that a surgery
    could change.
    `when` is the config key that decides whether the tensor exists, or two axes that then differ: "embed != hidden";
    FIRST for what only the first layer of a stack has, LATER for what all others have, ALL_OR_NONE for what all layers
    have or none, UNTIED for what a head of its own has beside it. `optional` names the part of a model that not every
    class of the family has, such as a pooler or a masked LM's head: of one part all tensors are there, or none. `start`
    is the value of a fresh one, where its kind does not say.
    """

    axes: tuple[Dim, ...]
    kind: Kind
    when: str | None = None
    optional: str = ""
    start: float | None = None


Rows = dict[str, Row]

FIRST = "first layer"
LATER = "layers after the first"
ALL_OR_NONE = "all or none"  # no config key, so that the layers themselves say it
UNTIED = "untied head"
ANY = ""  # of Family.opaque: every tensor that has no row


@dataclass(frozen=True, slots=True)
class Layers:
    """The tensors in the layers of one stack. Their names are relative to `prefix` and the layer's number.

    `attention` and `mlp` list alternatives: a layer has exactly one of them (softmax attention, or a linear one; dense,
    or experts). In names, "{}" stands for an expert's number.
    """

    prefix: str
    attention: tuple[Rows, ...]
    norm: Rows
    mlp: tuple[Rows, ...]

    @property
    def rows(self) -> Rows:
        """All rows that a layer may have."""
        alternatives = (self.norm, *self.attention, *self.mlp)
        return {name: row for rows in alternatives for name, row in rows.items()}


# What the heads of classifiers and reward models are called, by the end of the class that has them.
CLASS_HEADS: Mapping[str, tuple[str, ...]] = {
    "ForSequenceClassification": ("score", "classifier"),
    "ForTokenClassification": ("score", "classifier"),
    "ForQuestionAnswering": ("qa_outputs",),
    "RewardModel": ("score", "v_head"),
}


@dataclass(frozen=True, slots=True)
class Family:
    """The tensors of a family, grouped by part. Names inside a layer are relative to `layers` and the layer's number.

    `mlp` lists alternatives: a layer has exactly one of them (dense, or experts); `mixers` are what some layers have in
    place of `attention`. In names, "{}" stands for an expert's number, and "?" among axes for a size that is nothing
    that can change. `base` is the prefix that checkpoints saved from the headless model lack. Of an encoder-decoder the
    layers here are the decoder's. `embedding` holds all that lies outside of the layers but the norm before the head.

    A tensor without a row is an error, unless its name begins with one of `opaque`: it belongs to another tower, or,
    where that is ANY, the table speaks of some axes only. `frozen` says of an axis why it cannot change.
    """

    base: str
    layers: str
    embedding: Rows
    final_norm: Rows
    attention: Rows
    norm: Rows
    mlp: tuple[Rows, ...]
    sizes: Mapping[str, tuple[str, ...]]  # axis: the config keys that may hold its size; the first one counts
    default_sizes: Mapping[str, tuple[float, str]]  # axis: (factor, axis) where no key holds it
    init_std: str = "initializer_range"  # the config key with the standard deviation of fresh weights
    embedding_std: str | None = None  # the key of embeddings, where they have one of their own
    init_gain: float = 1.0  # a fresh norm's stored gain; 0 where the model adds 1
    residual_init: tuple[str, ...] = ()  # fresh weights drawn with std / sqrt(2 * layers)
    inverse_layer_scale: str | None = None  # the config flag with which attention logits are divided by layer + 1
    norm_kind: Literal["rms", "layer"] = "rms"
    branch_norms: tuple[str, ...] = ()  # norms at the end of a branch: all that a layer adds passes through their gains
    pre_norm_flag: str | None = None  # the config key that is false where norms follow the sum instead
    norms_after_sum: bool = False  # norms always follow the sum
    scales_embedding: bool | str = False  # embeddings are multiplied by sqrt(hidden): always, or as a config key says
    query_scale_flag: str | None = None  # the config key that is false where attention logits are not scaled
    expert_shares_flag: str | None = None  # the config key that is false where experts' weights are shares among all
    expert_shares: bool = False  # experts' weights are always shares among all
    expert_groups: str | None = None  # the config key with the number of groups in which experts compete
    fixed_query_scale: bool = False  # logits are not divided by the square root of head_dim but by a key of the config
    rotary: Literal["halves", "pairs"] | None = "halves"  # which dims rotate together: i and i + R/2, or 2i and 2i + 1
    hidden_divisible: bool = False  # the config insists that heads divide hidden, even where head_dim is given
    mixers: tuple[Rows, ...] = ()
    encoder: Layers | None = None
    opaque: tuple[str, ...] = ()
    frozen: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()  # what older files call a tensor, as (their part of a name, ours)
    shares_heads: bool = False  # layers share a bias of their heads: all of a stack keep the same ones
    # Keys outside of the text config that hold a size, with dots.
    outer_sizes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scales_head: bool = False  # what the head reads is multiplied by hidden ** -0.5
    head_scale_flags: tuple[str, ...] = ()  # the config keys that are false where it is not; the first one counts
    last_norm: str = ""  # the norm at the end of a layer that stands before the head where no final norm does
    encoder_norm: Rows = field(default_factory=dict)  # the norm at the end of the encoder, which the decoder reads
    own_init: bool = False  # fresh weights are drawn in a way of the family's own, which the table does not say
    init_by_inputs: bool = False  # fresh weights are drawn with std / sqrt(inputs), embeddings with std
    frozen_by: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # the same, where a config key is set
    kv_heads_flag: str | bool = True  # whether the config's number of key-value heads counts, or the key that says so
    multi_query_flag: str | None = None  # else: the config key that is true, or absent, where one serves all heads
    square_heads: bool | str = False  # whether heads x head_dim must be hidden where head_dim is given too, or the key
    post_norm_flag: str | None = None  # the config key that is true where what a norm puts out is what is added to
    # The config keys that are true where attention and MLP read one state, each with its value where it is absent.
    parallel_flags: Mapping[str, bool] = field(default_factory=dict)
    rotary_off_flag: str | None = None  # the config key that is true where no dims rotate
    rotary_share: float = 1.0  # the share of a head's dims that rotate, where the config does not say

    @property
    def stacks(self) -> tuple[Layers, ...]:
        """The layers of each stack: one, or a decoder's and an encoder's."""
        own = Layers(self.layers, (self.attention, *self.mixers), self.norm, self.mlp)
        return (own,) if self.encoder is None else (own, self.encoder)

    @property
    def outside(self) -> Rows:
        """All rows of tensors that lie outside of the layers."""
        return self.embedding | self.encoder_norm | self.final_norm

    def current(self, name: str) -> str:
        """Return what files call a tensor today that an older one calls `name`."""
        for old, new in self.aliases:
            name = name.replace(old, new)
        return name

    def of_class(self, names: Sequence[str], layers: str) -> "Family":
        """Return this family with the head of the class of one of these names, and its name of the base.

        `layers` is what the files call the layers: the class of Llama's kind that answers questions has another base.
        """
        heads = {name: row for name, row in self.embedding.items() if row.kind == "head"}
        own = next((own for end, own in CLASS_HEADS.items() if any(name.endswith(end) for name in names)), ())
        added: Rows = {}
        for name in own if heads else ():
            axes = (*parse("?"), *next(iter(heads.values())).axes[1:])
            added[f"{name}.weight"] = Row(axes, "head", optional=name)
            added[f"{name}.bias"] = Row(axes[:1], "bias", optional=f"bias of {name}")
        unneeded = {name: replace(row, optional="language model head") for name, row in heads.items()} if added else {}
        family = replace(self, embedding={**added, **self.embedding, **unneeded}) if added else self
        inside = self.layers.removeprefix(self.base)
        is_other = bool(inside) and layers == "transformer." + inside != self.layers
        return Wrapper("transformer.", ()).around(family) if is_other else family

    def placed(self, prefixes: Sequence[str]) -> "Family":
        """Return a table that says the same of each stack, wherever it lies."""
        layers = [replace(self.stacks[0], prefix=prefix) for prefix in prefixes]
        return replace(self, layers=prefixes[0], encoder=layers[1] if layers[1:] else None)

    @property
    def is_partial(self) -> bool:
        """Whether the table speaks of some axes only."""
        return ANY in self.opaque


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A model around a language model that has a family of its own: where its tensors lie, and what else touches it.

    `base` stands in the files for the language model's own base ("model."), `head` in front of the names that lie
    outside of it (lm_head). `headless` is the prefix that checkpoints of the headless model lack. `rows` are tensors
    beside it that have axes of the language model, such as a projector that writes its hidden state ("projected" is an
    axis inside a projector that is as wide as hidden); all else under `opaque` has none. `sizes` are config keys
    outside of the text config that hold a size, with dots.
    """

    base: str
    opaque: tuple[str, ...]
    rows: Rows = field(default_factory=dict)
    head: str = ""
    headless: str = ""
    text: str | None = None  # the language model's type, where an older config does not say it
    sizes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    frozen: Mapping[str, str] = field(default_factory=dict)

    def around(self, family: Family) -> Family:
        """Return the family of the whole model."""

        def named(name: str) -> str:
            inside = name.startswith(family.base)
            return self.base + name.removeprefix(family.base) if inside else self.head + name

        def renamed(rows: Rows) -> Rows:
            return {named(name): row for name, row in rows.items()}

        return replace(
            family,
            base=self.headless,
            layers=named(family.layers),
            embedding=renamed(family.embedding) | self.rows,
            final_norm=renamed(family.final_norm),
            default_sizes={**family.default_sizes, "projected": (1, "hidden")},
            opaque=(*family.opaque, *self.opaque),
            frozen={**family.frozen, **self.frozen},
            outer_sizes=self.sizes,
        )


def written_and_read(row: Row) -> tuple[int | None, int | None]:
    """Return which dimension of a tensor writes an axis, and which reads one; None where none does."""
    last = len(row.axes) - 1
    match row.kind:
        case "linear":
            return last - 1, last
        case "conv1d":
            return last, last - 1
        case "head":
            return None, last
        case _:
            return last, None


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


def optional(part: str, rows: Rows) -> Rows:
    """Return the rows of a part of the model that not every class has."""
    return {name: replace(row, optional=part) for name, row in rows.items()}


def one(name: str, axes: str, kind: Kind, when: str | None = None, *, start: float | None = None) -> Rows:
    return {name: Row(parse(axes), kind, when, start=start)}
