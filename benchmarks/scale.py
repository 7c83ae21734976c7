"""CPU seconds and peak memory of planning at the sizes of the largest open models.

    python benchmarks/scale.py [--rounds 3] [--only llama]

Makes sparse checkpoints: true configs, headers and indexes in files of their true size without a block of data, which
take a few MB of disk. Then it inspects each and plans surgeries with `--dry-run`. Every figure is of a whole process,
start-up included: the median of the rounds' user and system seconds, and the largest peak memory. Last, one tensor of
the 70B's MLP is made twice as wide, in a process of its own and without a byte written; its peak stands beside the
estimate.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import llama_layers, measure

from surgeon.checkpoint.header import TensorSpec, format_header

SHARD = 5_000_000_000  # bytes of a file, as published checkpoints have
MOST_CPU, MOST_MEMORY = 2.0, 150  # seconds and MB that no command here should exceed
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """A model's config, its tensors, and the surgeries to plan on it besides a cut of its depth."""

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    surgeries: Mapping[str, list[str]]


def llama(*, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int = 8, head_dim: int = 128) -> Shape:
    """Return a Llama 3.1 of this size."""
    queries, keys, vocab = heads * head_dim, kv_heads * head_dim, 128256
    shapes = llama_layers(layers, hidden=hidden, ffn=ffn, queries=queries, keys=keys)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
    }
    grow = ["grow", "--intermediate-size", "2x", "--layers", str(layers * 6 // 5)]
    wider = ["grow", "--hidden-size", "2x", "--attention-heads", "2x"]
    narrower = ["prune", "--intermediate-size", str(ffn // 2), "--score", "random"]
    surgeries = {"grow --intermediate-size 2x --layers 1.2x": grow, "grow --hidden-size 2x": wider}
    surgeries["prune --intermediate-size 50%"] = narrower
    return Shape(config | _COMMON, _stored(shapes | _outside(vocab, hidden)), surgeries)


def qwen3_moe() -> Shape:
    """Return Qwen3-235B-A22B: 94 layers of 128 experts."""
    layers, hidden, ffn, experts, queries, keys, vocab = 94, 4096, 1536, 128, 8192, 512, 151936
    shapes: Shapes = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: (hidden,) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
        shapes |= {f"{prefix}self_attn.{part}_norm.weight": (128,) for part in "qk"}
        shapes |= {f"{prefix}self_attn.{part}_proj.weight": (keys, hidden) for part in "kv"}
        shapes |= {f"{prefix}self_attn.q_proj.weight": (queries, hidden)}
        shapes |= {f"{prefix}self_attn.o_proj.weight": (hidden, queries)}
        shapes |= {f"{prefix}mlp.gate.weight": (experts, hidden)}
        shapes |= _experts(f"{prefix}mlp.experts.", experts, hidden, ffn)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": 12288,
        "moe_intermediate_size": ffn,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "vocab_size": vocab,
    }
    surgeries = {
        "prune --experts 64": ["prune", "--experts", "64", "--score", "random"],
        "grow --hidden-size 2x": ["grow", "--hidden-size", "2x"],
    }
    return Shape(config | _COMMON, _stored(shapes | _outside(vocab, hidden)), surgeries)


def deepseek_v3() -> Shape:
    """Return DeepSeek-V3 in bfloat16, without its layer for multi-token prediction: 256 experts in 58 of 61 layers."""
    layers, hidden, ffn, experts, heads, vocab = 61, 7168, 2048, 256, 128, 129280
    q_rank, kv_rank, rope, nope, value = 1536, 512, 64, 128, 128
    shapes: Shapes = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: (hidden,) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
        attention = {
            "q_a_proj": (q_rank, hidden),
            "q_a_layernorm": (q_rank,),
            "q_b_proj": (heads * (nope + rope), q_rank),
            "kv_a_proj_with_mqa": (kv_rank + rope, hidden),
            "kv_a_layernorm": (kv_rank,),
            "kv_b_proj": (heads * (nope + value), kv_rank),
            "o_proj": (hidden, heads * value),
        }
        shapes |= {f"{prefix}self_attn.{name}.weight": shape for name, shape in attention.items()}
        if layer < 3:
            shapes |= _mlp(f"{prefix}mlp.", hidden, 18432)
            continue
        shapes |= {
            f"{prefix}mlp.gate.weight": (experts, hidden),
            f"{prefix}mlp.gate.e_score_correction_bias": (experts,),
        }
        shapes |= _mlp(f"{prefix}mlp.shared_experts.", hidden, ffn) | _experts(
            f"{prefix}mlp.experts.", experts, hidden, ffn
        )
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "intermediate_size": 18432,
        "moe_intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": q_rank,
        "kv_lora_rank": kv_rank,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": nope,
        "v_head_dim": value,
        "num_hidden_layers": layers,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "vocab_size": vocab,
    }
    return Shape(config | _COMMON, _stored(shapes | _outside(vocab, hidden)), {})


_COMMON = {"rms_norm_eps": 1e-05, "tie_word_embeddings": False, "dtype": "bfloat16"}


def _outside(vocab: int, hidden: int) -> Shapes:
    return {
        "model.norm.weight": (hidden,),
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
    }


def _mlp(prefix: str, hidden: int, ffn: int) -> Shapes:
    shapes = {"down_proj": (hidden, ffn), "gate_proj": (ffn, hidden), "up_proj": (ffn, hidden)}
    return {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}


def _experts(prefix: str, count: int, hidden: int, ffn: int) -> Shapes:
    shapes: Shapes = {}
    for expert in range(count):
        shapes |= _mlp(f"{prefix}{expert}.", hidden, ffn)
    return shapes


def _stored(shapes: Shapes) -> dict[str, TensorSpec]:
    return {name: TensorSpec("BF16", shapes[name]) for name in sorted(shapes)}


SHAPES = {
    "Llama 3.1 70B": lambda: llama(layers=80, hidden=8192, ffn=28672, heads=64),
    "Llama 3.1 405B": lambda: llama(layers=126, hidden=16384, ffn=53248, heads=128),
    "Qwen3-MoE 235B": qwen3_moe,
    "DeepSeek-V3": deepseek_v3,
}


def write_sparse(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> None:
    """Write a checkpoint of files that have the size of their tensors and hold only headers."""
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in tensors.items():
        if shards[-1] and filled + spec.nbytes > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    directory.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = format_header(shard)
        with (directory / file).open("wb") as target:
            target.write(header)
            target.truncate(len(header) + sum(spec.nbytes for spec in shard.values()))
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))


def row(name: str, model: Path, command: list[str], tensors: int, rounds: int) -> str:
    """Return the row of one command on one model, in bold what is above the bounds."""
    verb, *options = command
    dry = [] if verb == "inspect" else ["-o", str(model.with_name("out")), "--dry-run"]
    figures = [measure([sys.executable, "-m", "surgeon", verb, str(model), *options, *dry]) for _ in range(rounds)]
    cpu, memory = statistics.median(figure.cpu for figure in figures), max(figure.memory for figure in figures)
    return f"{tensors:,} | {_bounded(cpu, MOST_CPU, '.2f')} | {_bounded(memory, MOST_MEMORY, '.0f')} |"


def widened(model: Path) -> str:
    """Return the peak memory of making one wider tensor of the MLP, estimated and measured, in MB."""
    code = f"""
import sys
from concurrent.futures import ThreadPoolExecutor

import surgeon
from surgeon.checkpoint.source import spec_of
from surgeon.plan.arithmetic import Arithmetic, single_threaded
from surgeon.plan.execute import num_threads, peak_memory, ranges_read

surgery = surgeon.grow({str(model)!r}, intermediate_size="2x")
source, plan = surgery.source, surgery.plan
print(peak_memory(plan, surgery.spec, spec_of(source)), flush=True)
arithmetic = Arithmetic(source.tensors, source.parts(ranges_read(plan, source)))
with single_threaded(), ThreadPoolExecutor(num_threads()) as pool:
    parts = arithmetic.parts(plan.tensors["model.layers.3.mlp.down_proj.weight"])
    assert sum(pool.map(lambda part: sum(map(len, part.make())), parts)) == 2 * 2 * 28672 * 8192
"""
    with tempfile.TemporaryFile("w+") as output:
        figure = measure([sys.executable, "-c", code], stdout=output)
        output.seek(0)
        return f"{int(output.read()) / 1e6:.0f} MB estimated, {figure.memory:.0f} MB measured"


def _bounded(value: float, most: float, form: str) -> str:
    text = format(value, form)
    return text if value <= most else f"**{text}**"


def main() -> None:
    """Make each checkpoint and print a row for each command on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="a part of the names of the models to take")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="where to work")
    options = parser.parse_args()
    last = ""
    print("| model | command | tensors | CPU seconds | peak MB |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="surgeon-benchmark-", dir=options.directory) as work:
        for name, make in SHAPES.items():
            if options.only.lower() not in name.lower():
                continue
            shape, model = make(), Path(work) / name.replace(" ", "-")
            write_sparse(model, shape.config, shape.tensors)
            half = shape.config["num_hidden_layers"] // 2
            commands = {"inspect": ["inspect"], "truncate": ["truncate", "--layers", str(half)], **shape.surgeries}
            for words, command in commands.items():
                print(
                    f"| {name} | {words} |", row(name, model, command, len(shape.tensors), options.rounds), flush=True
                )

            if name == "Llama 3.1 70B":
                last = f"\none tensor of its MLP made 2x as wide: {widened(model)}"
        print(last)


if __name__ == "__main__":
    main()
