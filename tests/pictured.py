"""Tiny vision-language checkpoints in float64, with an image for each: for test_multimodal.py.

The towers are tiny and wider or narrower than the language model, whose sizes are those of tabled.py, two layers deep.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import toys
from toys import DERIVED_HEAD_DIM, OWN_HEAD_DIM, Config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

IMAGE, VIDEO, START, END = 126, 127, 128, 129  # tokens
TOWER: Config = {"hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP = TOWER | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
PIXTRAL = CLIP | {"model_type": "pixtral", "head_dim": 8, "image_size": 32}
IDEFICS = CLIP | {"model_type": "idefics3_vision"}
QWEN_VISION: Config = {"depth": 2, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
MROPE: Config = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 1, 1]}}

OWN = OWN_HEAD_DIM | {"num_hidden_layers": 2, "hidden_size": 96}
DERIVED = DERIVED_HEAD_DIM | {"num_hidden_layers": 2}
LLAMA = OWN | {"model_type": "llama"}
MISTRAL = OWN | {"model_type": "mistral"}
QWEN2 = DERIVED | {"model_type": "qwen2"}
QWEN2_VL = DERIVED | MROPE | {"model_type": "qwen2_vl_text"}
QWEN2_5_VL = QWEN2_VL | {"model_type": "qwen2_5_vl_text"}
QWEN3_VL = OWN | MROPE | {"model_type": "qwen3_vl_text"}
DELTA: Config = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 18,
    "linear_value_head_dim": 20,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.4,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    },
}
QWEN3_5 = OWN | DELTA | {"model_type": "qwen3_5_text"}
COHERE2 = OWN | {"model_type": "cohere2", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
GEMMA3 = COHERE2 | {"model_type": "gemma3_text", "query_pre_attn_scalar": 13}

TOKENS: Config = {"image_token_index": IMAGE, "image_token_id": IMAGE}
GRIDS: Config = {"image_grid_pinpoints": [[16, 16]]}
QWEN_TOKENS: Config = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def _qwen(text: Config, vision: Config) -> Config:
    return QWEN_TOKENS | {"text_config": text, "vision_config": QWEN_VISION | vision}


def _model(text: Config, vision: Config, **other: Any) -> Config:
    return TOKENS | {"text_config": text, "vision_config": vision} | other


TYPES: dict[str, Config] = {
    "cohere2_vision": _model(COHERE2, SIGLIP, downsample_factor=2, alignment_intermediate_size=44),
    "deepseek_vl": _model(LLAMA, SIGLIP),
    "gemma3": _model(GEMMA3, SIGLIP, mm_tokens_per_image=1),
    "idefics3": _model(LLAMA, IDEFICS, scale_factor=2),
    "internvl": _model(
        QWEN2, TOWER | {"image_size": [16, 16], "patch_size": [8, 8]}, downsample_ratio=0.5, image_seq_length=1
    ),
    "lighton_ocr": _model(OWN | {"model_type": "qwen3"}, PIXTRAL, spatial_merge_size=2),
    "llava": _model(LLAMA, CLIP),
    "llava-tied": _model(LLAMA | {"tie_word_embeddings": True}, CLIP, tie_word_embeddings=True),
    "llava_next": _model(MISTRAL, CLIP, **GRIDS),
    "llava_next_video": _model(LLAMA, CLIP, **GRIDS),
    "llava_onevision": _model(QWEN2, SIGLIP, **GRIDS),
    "mistral3": _model(MISTRAL, PIXTRAL, spatial_merge_size=2),
    "ovis2": _model(
        QWEN2,
        TOWER
        | {"image_size": 16, "patch_size": 4, "vocab_size": 37, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
        hidden_size=80,
        visual_indicator_token_ids=[120, 121, 122, 123, 124],
    ),
    "paligemma": _model(OWN | {"model_type": "gemma"}, SIGLIP | {"projection_dim": 96}, projection_dim=96),
    "qwen2_5_vl": _qwen(
        QWEN2_5_VL,
        {
            "hidden_size": 32,
            "intermediate_size": 36,
            "out_hidden_size": 80,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen2_vl": _qwen(QWEN2_VL, {"hidden_size": 80, "embed_dim": 32}),
    "qwen3_5": _qwen(
        QWEN3_5,
        {"hidden_size": 32, "intermediate_size": 36, "out_hidden_size": 96, "num_position_embeddings": 16},
    ),
    "qwen3_vl": _qwen(
        QWEN3_VL,
        {
            "hidden_size": 32,
            "intermediate_size": 36,
            "out_hidden_size": 96,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 16,
        },
    ),
    "smolvlm": _model(LLAMA, IDEFICS | {"model_type": "smolvlm_vision"}, scale_factor=2),
    "video_llava": _model(LLAMA, CLIP, video_token_index=VIDEO),
    "vipllava": _model(LLAMA, CLIP, vision_feature_layers=[-1, 0]),
}


def build64(name: str, directory: Path) -> Path:
    """Return `directory`, now holding the toy `name` in float64."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(name.partition("-")[0], **TYPES[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        toys._randomise(model)
    model.to(torch.float64).save_pretrained(directory)
    return directory


def talker(name: str, directory: Path) -> Path:
    """Return `directory`, now holding the toy `name` in float32, with a larger vocabulary and the tokenizer of it."""
    import talkers
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = TYPES[name]["text_config"] | {"vocab_size": talkers.VOCABULARY, "max_position_embeddings": 512}
    config = AutoConfig.for_model(name, **TYPES[name] | {"text_config": text})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        toys._randomise(model)
    model.save_pretrained(directory)
    talkers.tokenizer_of().save_pretrained(directory)
    return directory


def load64(directory: Path) -> PreTrainedModel:
    """Return the model in `directory`. Nothing may be missing, left over or mismatched."""
    import torch
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def logits64(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return the logits on a text, and on a text with an image in it, in float64 throughout."""
    import torch
    from exact64 import Exact64

    with Exact64(), torch.no_grad():
        text = model(**toys.inputs(model, length=24), use_cache=False).logits
        return text, model(**_with_image(model), use_cache=False).logits


def _with_image(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the arguments of a forward pass with an image of noise."""
    import torch

    config, vision, random = model.config, model.config.vision_config, torch.Generator().manual_seed(1)
    name = config.model_type
    if name.startswith("qwen"):
        size = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(16, size, generator=random, dtype=torch.float64)
        ids = torch.tensor([[5, START, *[IMAGE] * 4, END, 7, 8, 9]])
        return {
            "input_ids": ids,
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (ids == IMAGE).long(),
        }
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    pixels = torch.randn(1, 3, side, side, generator=random, dtype=torch.float64)
    given: dict[str, Any] = {"pixel_values_images" if name == "video_llava" else "pixel_values": pixels}
    if name in ("idefics3", "smolvlm"):
        given["pixel_values"] = pixels[None]
    if name in ("llava_next", "llava_next_video", "llava_onevision"):
        given |= {"pixel_values": pixels[None].repeat(1, 2, 1, 1, 1), "image_sizes": torch.tensor([[side, side]])}
    if name in ("mistral3", "lighton_ocr"):
        given["image_sizes"] = torch.tensor([[side, side]])
    ids = torch.tensor([[5, 6, *[IMAGE] * NUM_IMAGE_TOKENS[name], 7, 8, 9]])
    if name in ("gemma3", "paligemma"):
        given["token_type_ids"] = (ids == IMAGE).long()
    return {"input_ids": ids, **given}


# With as many features as a tower and its projector make of the image.
NUM_IMAGE_TOKENS = dict.fromkeys(TYPES, 4) | {
    **dict.fromkeys(("cohere2_vision", "gemma3", "idefics3", "internvl", "smolvlm"), 1),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), 10),
}
