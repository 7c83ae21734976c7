"""How many bytes a trace of a model of 70B parameters reads: of a sparse file, in which only what is told apart is set.

    python benchmarks/trace_large.py --work DIR

The checkpoint has the shapes of Llama 3 70B in bfloat16, 141 GB that take megabytes on a disk that knows sparse files.
Gains, rows of the embedding and the first rows of each layer's gate are random, all else is zero; the child is the same
file under another name. So the ranges are those of a real model; what is found of zeros is not.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

import surgeon
from surgeon.checkpoint.header import TensorSpec, format_header

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 80, 8192, 28672, 64, 8, 128, 128256
SET = {"layernorm": 1, "gate_proj": 64, "embed": 256}  # rows that are random, by a part of the tensor's name
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def sparse(directory: Path) -> Path:
    """Return `directory`, now holding the checkpoint."""
    heads, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer = {
        "input_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (heads, HIDDEN),
        "self_attn.k_proj.weight": (keys, HIDDEN),
        "self_attn.v_proj.weight": (keys, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, heads),
        "post_attention_layernorm.weight": (HIDDEN,),
        "mlp.gate_proj.weight": (FFN, HIDDEN),
        "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    shapes |= {f"model.layers.{i}.{rest}": shape for i in range(LAYERS) for rest, shape in layer.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    specs = {name: TensorSpec("BF16", shape) for name, shape in shapes.items()}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    random, header = np.random.default_rng(0), format_header(specs)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        at = len(header)
        for name, spec in specs.items():
            count = next((rows for part, rows in SET.items() if part in name), 0) * HIDDEN
            start = at + VOCAB // 8 * HIDDEN * 2 if "embed" in name else at
            if count:
                numbers = (1 + 0.2 * random.normal(size=count)).astype(np.float32)
                file.seek(start)
                file.write((numbers.view(np.uint32) >> 16).astype("<u2").tobytes())
            at += spec.nbytes
        file.truncate(at)
    return directory


def main() -> None:
    """Print the bytes, the ranges and the seconds of a quick trace and of a whole one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    base = work / "base" if (work / "base").exists() else sparse(work / "base")
    if not (work / "child").exists():
        (work / "child").symlink_to("base")
    for quick in (True, False):
        began = time.process_time()
        found = surgeon.trace(work / "child", candidates=[str(base)], quick=quick, permutations=999, progress=False)
        told, seconds = found.candidates[str(base)], time.process_time() - began
        print(
            f"{'quick' if quick else 'whole'}: {told['bytes_read'] / 1e6:.1f} MB of the candidate, "
            f"{(found.bytes_read - told['bytes_read']) / 1e6:.1f} MB of the child, {found.requests} ranges of both, "
            f"{seconds:.0f} CPU s; {sum(layer == j for j, layer in enumerate(found.layers))} of {LAYERS} layers right"
        )


if __name__ == "__main__":
    main()
