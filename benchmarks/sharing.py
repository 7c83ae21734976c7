"""Time and space of `surgeon truncate` beside `cp` on a disk that shares blocks.

    sudo python benchmarks/sharing.py [--kind xfs|btrfs] [--layers 8] [--rounds 5]

Makes a disk in a file of --directory (twice the size of a model), and on it models of random bytes with the tensors of
Llama-3-8B and of Qwen3-8B and few layers. Then takes in turns, for each: `cp --reflink=never` of a file with as many
bytes as the result, followed by `sync` of it; and `surgeon truncate` to three quarters of the layers. Every figure is
of a whole process, start-up included. `df` says what each takes of the disk.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from disks import disk, used
from shared import Figure, llama_layers, measure, spread, write_checkpoint

from surgeon.checkpoint.header import TensorSpec

SIZES = {"llama": {"ffn": 14336, "vocab": 128256}, "qwen3": {"ffn": 12288, "vocab": 151936}}


def generate(directory: Path, family: str, *, layers: int) -> int:
    """Write a model with its tensors in the order of their names; return the bytes of its weights."""
    ffn, vocab = SIZES[family]["ffn"], SIZES[family]["vocab"]
    shapes = llama_layers(layers, hidden=4096, ffn=ffn, queries=4096, keys=1024)
    if family == "qwen3":
        shapes |= {f"model.layers.{i}.self_attn.{name}_norm.weight": (128,) for i in range(layers) for name in "qk"}
    shapes |= {"model.embed_tokens.weight": (vocab, 4096), "lm_head.weight": (vocab, 4096)}
    shapes |= {"model.norm.weight": (4096,)}
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if family == "llama" else "Qwen3ForCausalLM"],
        "model_type": family,
        "hidden_size": 4096,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    specs = {name: TensorSpec("BF16", shapes[name]) for name in sorted(shapes)}
    return write_checkpoint(directory, config, specs, noise=memoryview(os.urandom(1 << 20)))


def main() -> None:
    """Run the rounds and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["xfs", "btrfs"], default="xfs")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="where the file of the disk is made")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="surgeon-benchmark-", dir=options.directory))
    size = 2_500_000_000 + 450_000_000 * options.layers
    try:
        for family in SIZES:
            with disk(work / family, options.kind, size=2 * size) as place:
                generate(place / "source", family, layers=options.layers)
                compare(place, family, layers=options.layers * 3 // 4, rounds=options.rounds)
    finally:
        shutil.rmtree(work)


def compare(place: Path, family: str, *, layers: int, rounds: int) -> None:
    """Run the rounds on one model, and print its lines of the table."""
    out, copy = place / "out", place / "copy"
    surgeon = [sys.executable, "-m", "surgeon", "truncate", str(place / "source"), "--layers", str(layers)]
    surgeon += ["-o", str(out)]
    measure(surgeon)
    yardstick, size = place / "yardstick", (out / "model.safetensors").stat().st_size
    (out / "model.safetensors").rename(yardstick)
    shutil.rmtree(out)
    commands = {
        "cp --reflink=never + sync": ["sh", "-c", f"cp --reflink=never {yardstick} {copy} && sync {copy}"],
        "surgeon truncate": surgeon,
    }
    figures: dict[str, list[Figure]] = {name: [] for name in commands}
    space: dict[str, list[int]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            before = used(place)
            figures[name].append(measure(command))
            space[name].append(used(place) - before)
            shutil.rmtree(out, ignore_errors=True)
            copy.unlink(missing_ok=True)
    cp, cut = ([figure.seconds for figure in figures[name]] for name in commands)
    ratio = statistics.median(own / other for own, other in zip(cut, cp, strict=True))
    print(f"{family}: {size / 1e9:.2f} GB written, {rounds} rounds in turns; truncate takes {ratio:.3f} of cp's time")
    for name in commands:
        seconds, more = [figure.seconds for figure in figures[name]], statistics.median(space[name])
        print(f"| {family} | {name} | {spread(seconds)} | {more / 1e6:.1f} MB | {100 * more / size:.2f} % |")


if __name__ == "__main__":
    main()
