"""Decoders in which some layers mix tokens by something else than softmax attention. Data only.

What such a mixer has inside (states, convolutions, heads of its own) is none of a table's axes: it reads and writes
hidden.
"""

from collections.abc import Mapping
from dataclasses import replace

from surgeon.anatomy.families.decoders import QWEN3
from surgeon.anatomy.families.experts import QWEN2_MOE
from surgeon.anatomy.families.parts import ATTENDED, HEAD_NORMS, KEY, PRE_NORMS, VALUE, gated
from surgeon.anatomy.families.table import Family, linear, one

HEAD_DIM = "only a share of its dimensions rotates, at frequencies derived from how many those are"

# Each head's query is followed by the gate of what it puts out.
GATED_ATTENTION = (
    linear("self_attn.q_proj", "(kv_heads group (q_dim + v_dim)) hidden", bias="attention_bias")
    | linear("self_attn.k_proj", f"({KEY}) hidden", bias="attention_bias")
    | linear("self_attn.v_proj", f"({VALUE}) hidden", bias="attention_bias")
    | linear("self_attn.o_proj", f"hidden ({ATTENDED})", bias="attention_bias")
)
DELTA = (
    linear("linear_attn.out_proj", "hidden ?")
    | one("linear_attn.A_log", "?", "opaque")
    | one("linear_attn.dt_bias", "?", "opaque")
    | one("linear_attn.conv1d.weight", "? ? ?", "opaque")
    | one("linear_attn.norm.weight", "?", "opaque")
)
QWEN3_5 = replace(
    QWEN3,
    attention=GATED_ATTENTION | HEAD_NORMS,
    norm=PRE_NORMS,
    mixers=(
        DELTA
        | linear("linear_attn.in_proj_qkv", "? hidden")
        | linear("linear_attn.in_proj_z", "? hidden")
        | linear("linear_attn.in_proj_a", "? hidden")
        | linear("linear_attn.in_proj_b", "? hidden"),
    ),
    mlp=(gated(),),
    init_gain=0.0,
    own_init=True,  # of its linear attention
    frozen={"head_dim": HEAD_DIM},
)

QWEN3_NEXT = replace(
    QWEN3_5,
    mixers=(DELTA | linear("linear_attn.in_proj_qkvz", "? hidden") | linear("linear_attn.in_proj_ba", "? hidden"),),
    mlp=QWEN2_MOE.mlp,
    sizes=QWEN2_MOE.sizes,
    expert_shares_flag="norm_topk_prob",
)

HYBRIDS: Mapping[str, Family] = {"qwen3_5_text": QWEN3_5, "qwen3_next": QWEN3_NEXT}
