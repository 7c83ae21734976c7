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
AS_GTE = mlp("mlp.up_gate_proj", "mlp.down_proj", width="(ffn + ffn)")
AS_NOMIC = mlp("mlp.fc11 mlp.fc12", "mlp.fc2")
AS_CTRL = mlp("ffn.0", "ffn.2")
AS_FUYU = mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
AS_PROPHETNET = mlp("feed_forward.intermediate", "feed_forward.output")
AS_KIMI = mlp("block_sparse_moe.gate_proj block_sparse_moe.up_proj", "block_sparse_moe.down_proj")
AS_HY_V4 = mlp("mlp.linear_gate mlp.up_proj", "mlp.down_proj")
AS_MOLMO = mlp("mlp.ff_proj", "mlp.ff_out", width="(ffn + ffn)")
AS_T5 = mlp("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo")
AS_T5_DECODER = mlp("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo")

_TABLES: tuple[tuple[Family, str], ...] = (
    (
        only(GATED),
        (
            "afmoe audioflamingo3 axk1 axk2 aya_vision beam cosmos3_omni deepseek_v32 deepseek_vl_hybrid "
            "diffllama doge embedding_gemma2 embedding_gemma2_text eurobert exaone4_5 flint gemma4 gemma4_text "
            "gemma4_unified gemma4_unified_text glm4v_moe glm4v_moe_text glm5_next glm5_next_text glm_moe_dsa "
            "glmasr got_ocr2 granite_docling granite_docling_text hy_v3 hyperclovax "
            "hyperclovax_vision_v2 kimi_k25 laguna mimo_v2_flash minicpm3 minicpm_ocr minicpmv4_6 minicpmv4_7 "
            "mllama moss_transcribe_diarize muse_glimmer muse_glimmer_text musicflamingo olmo_hybrid "
            "pp_chart2table qianfan_ocr qwen2_audio qwen3_asr ultrabert ultravbert unlimited_ocr video_llama_3 voxtral"
        ),
    ),
    (
        only(AS_BERT),
        (
            "bert-generation big_bird convbert data2vec-text data2vec-vision deberta deberta-v2 deit dpt ernie "
            "fnet git ijepa layoutlm longformer markuplm megatron-bert mpnet mra nystromformer rembert "
            "roberta-prelayernorm roc_bert roformer sew-d splinter tapas visual_bert vit vit_msn"
        ),
    ),
    (
        only(MLP_FC),
        (
            "chinese_clip_vision_model clip_text_model clip_vision_model granite_docling_vision idefics3_vision "
            "internvl_vision jina_embeddings_v3 mlcd_vision_model nanochat qianfan_ocr_vision sam3_vit_model "
            "smolvlm_vision"
        ),
    ),
    (only(FUSED), "glm46v glm4v glm4v_text glm_image glm_image_text glm_ocr glm_ocr_text glmga phi4_multimodal"),
    (only(FC, ffn="encoder_ffn_dim decoder_ffn_dim"), "bigbird_pegasus fsmt led m2m_100 mvp pegasus_x plbart"),
    (only(AS_WAV2VEC), "data2vec-audio hubert sew unispeech unispeech-sat wav2vec2 wavlm"),
    (only(FEED), "bamba falcon_h1 mistral_large4_text pixtral"),
    (only(W123), "lfm2_moe lfm3 lfm3_vl mistral_large4"),
    (only(UNGATED), "neomme"),
    (only(EXPERTS_W123), "minimax minimax_m3_vl"),
    (only(AS_MODERNBERT), "modernbert-decoder modernvbert"),
    (only(FC), "biogpt"),
    (only(EXPERTS), "cohere2_moe"),
    (only(AS_CTRL, ffn="dff"), "ctrl"),
    (only(AS_FUYU), "fuyu"),
    (only(STACKED), "granitemoehybrid"),
    (only(AS_GTE), "gte"),
    (only(AS_HY_V4), "hy_v4"),
    (only(FEED, EXPERTS_FEED), "jamba"),
    (only(STACKED_MLP), "jetmoe"),
    (only(AS_KIMI), "kimi_linear"),
    (only(AS_T5, AS_T5_DECODER, ffn="d_ff"), "longt5"),
    (only(AS_MOLMO), "molmo2_text"),
    (only(AS_NOMIC), "nomic_bert"),
    (only(AS_PROPHETNET, ffn="encoder_ffn_dim decoder_ffn_dim"), "prophetnet"),
)

PARTIAL: Mapping[str, Family] = {name: table for table, names in _TABLES for name in names.split()}
