"""Models around a language model: where its tensors lie in the files, and what beside it has its axes. Data only.

Each type lists its layouts, the one that transformers writes today first, then those of older checkpoints.
"""

from collections.abc import Mapping
from dataclasses import replace

from surgeon.anatomy.families.decoders import QWEN2, QWEN3
from surgeon.anatomy.families.parts import SQUARE_SIZES
from surgeon.anatomy.families.table import Family, Rows, Wrapper, linear, one, optional

# Image features take the places of token embeddings: what makes them writes the language model's hidden state.
MROPE = "its rotary positions have sections for time, height and width, which add up to the head's size"


def writes(name: str, *, bias: bool | None = None) -> Rows:
    """Return the rows of a map from another tower's features to hidden; `bias` None: the config decides."""
    rows = linear(name, "hidden ?", bias=bias is not False)
    return rows if bias is not None else _free_bias(rows)


def two_maps(first: str, second: str, *, bias: bool | None = None) -> Rows:
    """Return the rows of two maps with an activation between, where what is between is as wide as hidden."""
    rows = linear(first, "projected ?", bias=bias is not False) | linear(
        second, "hidden projected", bias=bias is not False
    )
    return rows if bias is not None else _free_bias(rows)


def _free_bias(rows: Rows) -> Rows:
    return rows | optional("a projector's biases", {name: row for name, row in rows.items() if row.kind == "bias"})


def around(
    rows: Rows, *, opaque: str = "vision_tower.", sizes: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[Wrapper, ...]:
    """Return the layouts of a Llava: that of its checkpoints since ever, and that of transformers 4.52 to 4.57."""
    towers = tuple(opaque.split())
    return (
        Wrapper("language_model.model.", towers, rows, head="language_model.", sizes=sizes or {}),
        Wrapper(
            "model.language_model.",
            tuple(f"model.{tower}" for tower in towers),
            {f"model.{name}": row for name, row in rows.items()},
            headless="model.",
            sizes=sizes or {},
        ),
    )


def inside(base: str, rows: Rows, *, opaque: str, head: str = "", text: str | None = None, **sizes: str) -> Wrapper:
    """Return the layout of a model whose language model lies at `base`, inside of "model."."""
    paths = {axis: tuple(keys.split()) for axis, keys in sizes.items()}
    return Wrapper(base, tuple(opaque.split()), rows, head=head, headless="model.", text=text, sizes=paths)


def as_qwen_vl(text: str, merger: str, last: str, rows: Rows | None = None, **sizes: str) -> tuple[Wrapper, ...]:
    """Return the layouts of a Qwen-VL, whose `merger` ends in the map called `last`."""
    paths = {axis: tuple(keys.split()) for axis, keys in sizes.items()}
    out = writes(f"{merger}{last}", bias=True) | (rows or {})
    return (
        Wrapper("model.", ("visual.",), out, text=text, sizes=paths),
        inside(
            "model.language_model.",
            {f"model.{name}": row for name, row in out.items()},
            opaque="model.visual.",
            text=text,
            **sizes,
        ),
    )


PROJECTOR = two_maps("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
NEWLINE = one("image_newline", "hidden", "bias")  # the state that ends a line of image patches
GEMMA3_PROJECTOR = one("multi_modal_projector.mm_input_projection_weight", "? hidden", "conv1d")
DEEPSTACK: Rows = {
    name: row
    for number in range(8)
    for name, row in optional(
        f"deepstack {number}", writes(f"visual.deepstack_merger_list.{number}.linear_fc2", bias=True)
    ).items()
}
LLAVA = around(PROJECTOR)
LLAVA_NEXT = around(PROJECTOR | NEWLINE)
IDEFICS3 = (
    inside(
        "model.text_model.",
        writes("model.connector.modality_projection.proj", bias=False),
        opaque="model.vision_model.",
    ),
)

MULTIMODAL: Mapping[str, tuple[Wrapper, ...]] = {
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_next_video": LLAVA_NEXT,
    "llava_onevision": LLAVA_NEXT,
    "vipllava": around(PROJECTOR, opaque="vision_tower. multi_modal_projector.projector_layernorm."),
    "video_llava": around(PROJECTOR, opaque="image_tower. video_tower."),
    "mistral3": around(
        PROJECTOR, opaque="vision_tower. multi_modal_projector.norm. multi_modal_projector.patch_merger."
    ),
    "internvl": around(PROJECTOR, opaque="vision_tower. multi_modal_projector.layer_norm."),
    "gemma3": around(GEMMA3_PROJECTOR, opaque="vision_tower. multi_modal_projector.mm_soft_emb_norm."),
    "paligemma": around(
        writes("multi_modal_projector.linear", bias=True),
        sizes={"hidden": ("vision_config.projection_dim", "projection_dim")},
    ),
    "idefics3": IDEFICS3,
    "smolvlm": IDEFICS3,
    "cohere2_vision": (
        inside(
            "model.language_model.",
            writes("model.multi_modal_projector.linear_2", bias=True),
            opaque="model.vision_tower. model.multi_modal_projector.linear_1.",
        ),
    ),
    "lighton_ocr": (
        inside(
            "model.language_model.",
            two_maps("model.vision_projection.linear_1", "model.vision_projection.linear_2"),
            opaque="model.vision_encoder. model.vision_projection.norm. model.vision_projection.patch_merger.",
        ),
    ),
    "deepseek_vl": (
        inside(
            "model.language_model.",
            two_maps("model.aligner.linear1", "model.aligner.linear2", bias=True),
            opaque="model.vision_model.",
        ),
    ),
    "ovis2": (
        inside(
            "model.language_model.",
            one("model.visual_embeddings_table.weight", "? hidden", "embedding"),
            opaque="model.vision_tower.",
        ),
    ),
    "qwen2_vl": as_qwen_vl("qwen2_vl_text", "visual.merger.mlp.", "2", hidden="vision_config.hidden_size"),
    "qwen2_5_vl": as_qwen_vl("qwen2_5_vl_text", "visual.merger.mlp.", "2", hidden="vision_config.out_hidden_size"),
    "qwen3_vl": as_qwen_vl(
        "qwen3_vl_text", "visual.merger.", "linear_fc2", DEEPSTACK, hidden="vision_config.out_hidden_size"
    )[1:],
    "qwen3_5": as_qwen_vl("qwen3_5_text", "visual.merger.", "linear_fc2", hidden="vision_config.out_hidden_size")[1:],
}

QWEN2_VL = replace(QWEN2, sizes=SQUARE_SIZES, frozen={"head_dim": MROPE})

TEXT_MODELS: Mapping[str, Family] = {
    "qwen2_vl_text": QWEN2_VL,
    "qwen2_5_vl_text": QWEN2_VL,
    "qwen3_vl_text": replace(QWEN3, frozen={"head_dim": MROPE}),
}
