"""Checkpoints made by hand, byte by byte: small, quick, without torch, and as wrong as a test wants them."""

import json
from collections.abc import Mapping
from hashlib import shake_128
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import TensorSpec, format_header
from surgeon.checkpoint.source import INDEX, WEIGHTS

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 19,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 5,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def llama(
    *, layers: int = 3, hidden: int = 8, ffn: int = 12, vocab: int = 19, dtype: str = "F32"
) -> dict[str, TensorSpec]:
    """Return the tensors of a Llama with 4 heads of 5, 2 of them for keys and values; CONFIG says the defaults."""
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (20, hidden),
        "self_attn.k_proj.weight": (10, hidden),
        "self_attn.v_proj.weight": (10, hidden),
        "self_attn.o_proj.weight": (hidden, 20),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    shapes |= {f"model.layers.{i}.{rest}": shape for i in range(layers) for rest, shape in layer.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return {name: TensorSpec(dtype, shape) for name, shape in shapes.items()}


def data(name: str, nbytes: int) -> bytes:
    """Return the bytes of a tensor: as good as random, and its own."""
    return shake_128(name.encode("utf-8", "surrogatepass")).digest(nbytes)


def safetensors(tensors: Mapping[str, TensorSpec], *, align: int = 0) -> bytes:
    """Return a safetensors file."""
    return format_header(tensors, align=align) + b"".join(data(name, spec.nbytes) for name, spec in tensors.items())


def raw_file(header: str | bytes | Mapping[str, Any], body: bytes = b"") -> bytes:
    """Return a file with any header at all."""
    text = header if isinstance(header, (str, bytes)) else json.dumps(header)
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + body


def checkpoint(
    directory: Path, *, tensors: Mapping[str, TensorSpec] | None = None, shards: int = 1, **config: Any
) -> Path:
    """Return `directory`, now a checkpoint of `tensors` (default: `llama()`) whose config is CONFIG and `config`."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = llama() if tensors is None else tensors
    (directory / "config.json").write_text(json.dumps(CONFIG | config, indent=2))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    if shards == 1:
        (directory / WEIGHTS).write_bytes(safetensors(tensors))
        return directory
    weight_map = {name: shard_name(i * shards // len(tensors) + 1, shards) for i, name in enumerate(tensors)}
    for shard in sorted(set(weight_map.values())):
        held = {name: spec for name, spec in tensors.items() if weight_map[name] == shard}
        (directory / shard).write_bytes(safetensors(held))
    write_index(directory, weight_map)
    return directory


def shard_name(number: int, shards: int) -> str:
    return f"model-{number:05}-of-{shards:05}.safetensors"


def read_index(directory: Path) -> dict[str, str]:
    return json.loads((directory / INDEX).read_text())["weight_map"]


def write_index(directory: Path, weight_map: Mapping[str, Any]) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of config.json; ... removes one."""
    config = json.loads((directory / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(kept))


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Return everything below `directory`, hidden files too: bytes of files, None for directories and links."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }
