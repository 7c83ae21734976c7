"""Time and peak memory of `surgeon grow` beside `cp` of its own output.

    python benchmarks/grow.py [--rounds 5] [--dtype float32]

Generates a Llama-shaped checkpoint (hidden size 1024; with 36 layers 2 GB in float32) in a temporary directory of
--directory, then takes in turns, for each way to grow it: `cp` of the result followed by `sync` of the copy, and
`surgeon grow` (noise on, no verification). Every figure is of a whole process, start-up included.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from shared import llama_layers, measure, normal_noise, spread, write_checkpoint

from surgeon.checkpoint.header import TensorSpec

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1024, 2816, 16, 8, 64, 32000
STORED = {"float32": "F32", "bfloat16": "BF16"}
WAYS = {
    "clone: everything 2x": ["--hidden-size", "2x", "--intermediate-size", "2x", "--attention-heads", "2x"],
    "pad: hidden size 1024 to 1920": [
        *("--hidden-size", "1920", "--intermediate-size", "5280"),
        *("--attention-heads", "30", "--key-value-heads", "15"),
    ],
    "identity: three times as deep": ["--layers", "3x"],
}


def generate(directory: Path, dtype: str, num_layers: int) -> None:
    """Write the checkpoint, its tensors in the order of their names as safetensors writes them."""
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = llama_layers(num_layers, hidden=HIDDEN, ffn=FFN, queries=queries, keys=keys)
    shapes |= {"model.norm.weight": (HIDDEN,), "model.embed_tokens.weight": (VOCAB, HIDDEN)}
    shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": num_layers,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    specs = {name: TensorSpec(STORED[dtype], shapes[name]) for name in sorted(shapes)}
    write_checkpoint(directory, config, specs, noise=normal_noise(dtype))


def main() -> None:
    """Run the rounds of each way and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=16, help="of the checkpoint that is grown")
    parser.add_argument("--dtype", choices=STORED, default="float32", help="of the checkpoint and of the result")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="where to work; its disk is measured")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="surgeon-benchmark-", dir=options.directory))
    try:
        generate(work / "source", options.dtype, options.layers)
        read = (work / "source" / "model.safetensors").stat().st_size
        print(f"{read / 1e9:.2f} GB read in {options.dtype}, {options.rounds} rounds in turns, medians (from, to)\n")
        torch = [measure([sys.executable, "-c", "import torch"]).seconds for _ in range(options.rounds + 1)][1:]
        print(f"Of each `surgeon grow`, the import of torch alone takes {statistics.median(torch):.2f} s.\n")
        print("| | written | cp + sync | surgeon grow | to cp + sync | CPU | peak memory |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name, sizes in WAYS.items():
            print(row(name, work, sizes, options.rounds), flush=True)
    finally:
        shutil.rmtree(work)


def row(name: str, work: Path, sizes: list[str], rounds: int) -> str:
    """Return the row of one way to grow: medians, and the median of the ratios of each round."""
    source, out, copy, yardstick = work / "source", work / "out", work / "copy", work / "yardstick"
    surgeon = [sys.executable, "-m", "surgeon", "grow", str(source), *sizes, "-o", str(out), "--no-verify", "--quiet"]
    surgeon += ["--max-shard-size", "100GB"]  # one file, as cp has
    measure(surgeon)  # warms the page cache for both
    (out / "model.safetensors").rename(yardstick)
    shutil.rmtree(out)
    copies, grown = [], []
    for _ in range(rounds):
        subprocess.run(["sync"], check=True)
        copies.append(measure(["sh", "-c", f"cp {yardstick} {copy} && sync {copy}"]))
        copy.unlink()
        subprocess.run(["sync"], check=True)
        grown.append(measure(surgeon))
        shutil.rmtree(out)
    size = yardstick.stat().st_size
    yardstick.unlink()
    ratio = statistics.median(own.seconds / cp.seconds for own, cp in zip(grown, copies, strict=True))
    cpu, memory = statistics.median(figure.cpu for figure in grown), max(figure.memory for figure in grown)
    copying, growing = (spread([figure.seconds for figure in figures], unit=" s") for figures in (copies, grown))
    return f"| {name} | {size / 1e9:.2f} GB | {copying} | {growing} | {ratio:.2f} | {cpu:.1f} s | {memory:.0f} MB |"


if __name__ == "__main__":
    main()
