"""Tables that name the MLP only: what gives a model type its MLP width, where nobody has written the rest. Data only.

A dense layer's neurons are written and read by two or three tensors, under one of a dozen names. Such a table needs to
know nothing else: neither where the layers lie nor what attention does. Experts with a size of their own have none of
these neurons; they stay whole beside dense layers.
"""

from collections.abc import Mapping

from surgeon.anatomy.axes import parse
from surgeon.anatomy.families.table import ANY, Family, Kind, Row, Rows

REST = "the table of this model type names the MLP alone"


def mlp(write: str, read: str, *, kind: Kind = "linear", width: str = "ffn") -> Rows:
    """Return the rows of the maps that write the neurons, and of the one that reads them; with biases, where there are.

    `width` is the axis that is written: "(ffn + ffn)" where one map writes gates and values.
    """
    dims = (f"{width} ?", "? ffn") if kind == "linear" else (f"? {width}", "ffn ?")
    several = "experts" if "{}" in read else ""  # how many there are is not this table's business
    rows = {f"{name}.weight": Row(parse(dims[0]), kind, optional=several) for name in write.split()}
    rows |= {f"{name}.bias": Row(parse(width), "bias", optional="biases") for name in write.split()}
    return rows | {f"{read}.weight": Row(parse(dims[1]), kind, optional=several)}


def only(*alternatives: Rows, ffn: str = "intermediate_size", **other: str) -> Family:
    """Return the table of a type whose layers have one of these MLPs, or one that is none of this table's business.

    `ffn` are the config keys that hold their size; those of another axis can be given too.
    """
    return Family(
        base="",
        layers=ANY,
        embedding={},
        final_norm={},
        attention={},
        norm={},
        mlp=({}, *alternatives),
        sizes={"ffn": tuple(ffn.split())} | {axis: tuple(keys.split()) for axis, keys in other.items()},
        default_sizes={},
        opaque=(ANY,),
        frozen=dict.fromkeys(("hidden", "heads", "kv_heads", "head_dim", "experts"), REST),
    )


GATED = mlp("mlp.gate_proj mlp.up_proj", "mlp.down_proj")
UNGATED = mlp("mlp.up_proj", "mlp.down_proj")
FUSED = mlp("mlp.gate_up_proj", "mlp.down_proj", width="(ffn + ffn)")
FC = mlp("fc1", "fc2")
MLP_FC = mlp("mlp.fc1", "mlp.fc2")
W123 = mlp("feed_forward.w1 feed_forward.w3", "feed_forward.w2")
FEED = mlp("feed_forward.gate_proj feed_forward.up_proj", "feed_forward.down_proj")
AS_BERT = mlp("intermediate.dense", "output.dense")
AS_MODERNBERT = mlp("mlp.Wi", "mlp.Wo", width="(ffn + ffn)")
AS_WAV2VEC = mlp("feed_forward.intermediate_dense", "feed_forward.output_dense")
EXPERTS = mlp("mlp.experts.{}.gate_proj mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj")
EXPERTS_W123 = mlp("block_sparse_moe.experts.{}.w1 block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2")
STACKED = {  # all experts of a layer in one tensor
    "block_sparse_moe.input_linear.weight": Row(parse("? (ffn + ffn) ?"), "linear"),
    "block_sparse_moe.output_linear.weight": Row(parse("? ? ffn"), "linear"),
}

EXPERTS_FEED = mlp(
    "feed_forward.experts.{}.gate_proj feed_forward.experts.{}.up_proj", "feed_forward.experts.{}.down_proj"
)
STACKED_MLP = {name.replace("block_sparse_moe", "mlp"): row for name, row in STACKED.items()}
SHARED = mlp("mlp.shared_mlp.gate_proj mlp.shared_mlp.up_proj", "mlp.shared_mlp.down_proj")
AS_GTE = mlp("mlp.up_gate_proj", "mlp.down_proj", width="(ffn + ffn)")
AS_NOMIC = mlp("mlp.fc11 mlp.fc12", "mlp.fc2")
AS_DISTILBERT = mlp("ffn.lin1", "ffn.lin2")
AS_CTRL = mlp("ffn.0", "ffn.2")
AS_FUYU = mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
AS_PROPHETNET = mlp("feed_forward.intermediate", "feed_forward.output")
AS_KIMI = mlp("block_sparse_moe.gate_proj block_sparse_moe.up_proj", "block_sparse_moe.down_proj")
AS_HY_V4 = mlp("mlp.linear_gate mlp.up_proj", "mlp.down_proj")
AS_MOLMO = mlp("mlp.ff_proj", "mlp.ff_out", width="(ffn + ffn)")
AS_T5 = mlp("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo")
AS_T5_DECODER = mlp("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo")
AS_MT5 = mlp("layer.1.DenseReluDense.wi_0 layer.1.DenseReluDense.wi_1", "layer.1.DenseReluDense.wo")
AS_MT5_DECODER = mlp("layer.2.DenseReluDense.wi_0 layer.2.DenseReluDense.wi_1", "layer.2.DenseReluDense.wo")

_TABLES: tuple[tuple[Family, str], ...] = (
    (only(GATED), "@GATED"),
    (only(UNGATED), "@UNGATED"),
    (only(FUSED), "@FUSED"),
    (only(FC), "@FC"),
    (only(MLP_FC), "@MLP_FC"),
)

PARTIAL: Mapping[str, Family] = {name: table for table, names in _TABLES for name in names.split()}
