"""Time and peak memory of `surgeon truncate` on a multi-gigabyte checkpoint, beside `cp` and transformers.

    python benchmarks/truncate.py [--layers 32] [--rounds 5] [--transformers]

Generates a GPT-2 XL-shaped float32 checkpoint (48 layers, 6.2 GB) in a temporary directory of --directory, then takes
in turns: `cp` of a file with as many bytes as the result, followed by `sync` of it; `surgeon truncate`; and with
--transformers the way by hand: load, slice the layers, save. Every figure is of a whole process, start-up included.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from shared import Figure, measure, spread, write_checkpoint

from surgeon.checkpoint.header import TensorSpec

CONFIG = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_layer": 48,
    "n_embd": 1600,
    "n_head": 25,
    "n_inner": None,
    "n_positions": 1024,
    "vocab_size": 50257,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
LAYER = {
    "attn.c_attn.bias": (4800,),
    "attn.c_attn.weight": (1600, 4800),
    "attn.c_proj.bias": (1600,),
    "attn.c_proj.weight": (1600, 1600),
    "ln_1.bias": (1600,),
    "ln_1.weight": (1600,),
    "ln_2.bias": (1600,),
    "ln_2.weight": (1600,),
    "mlp.c_fc.bias": (6400,),
    "mlp.c_fc.weight": (1600, 6400),
    "mlp.c_proj.bias": (1600,),
    "mlp.c_proj.weight": (6400, 1600),
}
BY_HAND = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.transformer.h = model.transformer.h[: int(sys.argv[3])]
model.config.n_layer = int(sys.argv[3])
model.save_pretrained(sys.argv[2], max_shard_size="5GB")
"""


def generate(directory: Path) -> None:
    """Write the checkpoint, its tensors in the order of their names as safetensors writes them."""
    shapes = {f"transformer.h.{i}.{name}": shape for i in range(CONFIG["n_layer"]) for name, shape in LAYER.items()}
    shapes |= {"transformer.ln_f.bias": (1600,), "transformer.ln_f.weight": (1600,)}
    shapes |= {"transformer.wpe.weight": (1024, 1600), "transformer.wte.weight": (50257, 1600)}
    specs = {name: TensorSpec("F32", shapes[name]) for name in sorted(shapes)}
    write_checkpoint(directory, CONFIG, specs, noise=memoryview(os.urandom(1 << 20)))


def main() -> None:
    """Run the rounds and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transformers", action="store_true", help="also load, slice and save by hand (slow)")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="where to work; its disk is measured")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="surgeon-benchmark-", dir=options.directory))
    try:
        source, out, copy, yardstick = work / "source", work / "out", work / "copy", work / "yardstick"
        generate(source)
        surgeon = [sys.executable, "-m", "surgeon", "truncate", str(source), "--layers", str(options.layers)]
        measure([*surgeon, "-o", str(out)])  # warms the page cache for all
        (out / "model.safetensors").rename(yardstick)
        shutil.rmtree(out)
        commands = {
            "cp + sync": ["sh", "-c", f"cp {yardstick} {copy} && sync {copy}"],
            "surgeon truncate": [*surgeon, "-o", str(out)],
        }
        if options.transformers:
            commands["transformers by hand"] = [
                sys.executable,
                "-c",
                BY_HAND,
                str(source),
                str(out),
                str(options.layers),
            ]
        figures: dict[str, list[Figure]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                subprocess.run(["sync"], check=True)
                figures[name].append(measure(command))
                shutil.rmtree(out, ignore_errors=True)
                copy.unlink(missing_ok=True)
        size = yardstick.stat().st_size
        report(figures, size)
    finally:
        shutil.rmtree(work)


def report(figures: dict[str, list[Figure]], size: int) -> None:
    """Print medians, and the median of the ratios of each round."""
    yardstick = [figure.seconds for figure in figures["cp + sync"]]
    print(f"{size / 1e9:.2f} GB written, {len(yardstick)} rounds in turns, medians (minimum to maximum)")
    print("| | seconds | to cp + sync | CPU seconds | peak memory |")
    print("| --- | --- | --- | --- | --- |")
    for name, rounds in figures.items():
        seconds = [figure.seconds for figure in rounds]
        ratio = statistics.median(own / cp for own, cp in zip(seconds, yardstick, strict=True))
        cpu, memory = statistics.median(figure.cpu for figure in rounds), max(figure.memory for figure in rounds)
        print(f"| {name} | {spread(seconds)} | {ratio:.2f} | {cpu:.2f} | {memory:.0f} MB |")


if __name__ == "__main__":
    main()
