"""The cost of scoring: its time beside a plain forward pass, and whether a quarter of the weights' memory is enough.

    python benchmarks/prune.py MODEL [--rounds 5]           time: in turns, in one process
    python benchmarks/prune.py --memory [--directory DIR]   memory: a process that may use a quarter of the weights

Time: 32 rows of 256 random tokens. The plain pass is the base model (no head) as transformers loads it in float32,
already in memory, on the same batches. Scoring reads every layer's weights from the file and takes angular distances
of all block sizes, block influence and relative magnitude of every layer, in one pass.

Memory: generates a Llama-shaped bfloat16 checkpoint of 8.8 GB (72 layers of 2,048), then scores it in a process whose
address space (RLIMIT_AS: all mapped memory, not only resident memory) is limited to 2.2 GB.
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared import llama_layers, normal_noise, spread, write_checkpoint

from surgeon.checkpoint.header import TensorSpec

ROWS, LENGTH = 32, 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 72,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
SHARE = 4  # the weights are this many times the memory limit


def compare(model: str, rounds: int, threads: int) -> None:
    """Print the seconds of a plain pass and of scoring, taken in turns: wall and CPU."""
    import torch
    from transformers import AutoModel

    from surgeon.measure.scoring import score_states
    from surgeon.models.streaming import BATCH_TOKENS, StreamedModel
    from surgeon.surgery import open_source

    torch.set_num_threads(threads)
    plain = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    vocabulary = plain.config.vocab_size
    tokens = torch.randint(3, vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    size = BATCH_TOKENS // LENGTH

    def forward() -> None:
        with torch.no_grad():
            for at in range(0, ROWS, size):
                plain(input_ids=tokens[at : at + size], use_cache=False)

    def scored() -> None:
        score_states(StreamedModel(open_source(model)), tokens)

    seconds: dict[str, list[tuple[float, float]]] = {"plain forward": [], "scoring": []}
    for number in range(rounds + 1):
        for name, work in (("plain forward", forward), ("scoring", scored)):
            began = time.perf_counter(), time.process_time()
            work()
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    print(f"{ROWS} x {LENGTH} tokens, {threads} threads, {rounds} rounds in turns, medians (minimum to maximum)")
    for place, clock in enumerate(("wall", "CPU")):
        times = {name: [pair[place] for pair in pairs] for name, pairs in seconds.items()}
        for name, values in times.items():
            print(f"{clock}, {name}: {spread(values, unit=' s')}")
        ratios = [scoring / plain for plain, scoring in zip(times["plain forward"], times["scoring"], strict=True)]
        print(f"{clock}, scoring / plain: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def generate(directory: Path) -> int:
    """Write the checkpoint and return the bytes of its weights."""
    hidden = CONFIG["hidden_size"]
    shapes = llama_layers(
        CONFIG["num_hidden_layers"], hidden=hidden, ffn=CONFIG["intermediate_size"], queries=hidden, keys=8 * 64
    )
    shapes |= {"model.embed_tokens.weight": (CONFIG["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    specs = {name: TensorSpec("BF16", shape) for name, shape in shapes.items()}
    return write_checkpoint(directory, CONFIG, specs, noise=normal_noise("bfloat16"))


def limited(directory: Path) -> None:
    """Score the checkpoint in this process, and print its peak."""
    import torch

    from surgeon.measure.scoring import score_states
    from surgeon.models.streaming import StreamedModel
    from surgeon.surgery import open_source

    tokens = torch.randint(3, CONFIG["vocab_size"], (4, 64), generator=torch.Generator().manual_seed(0))
    layers, _, _ = score_states(StreamedModel(open_source(directory)), tokens)
    assert all(0 <= value <= 2 for value in layers["block-influence"])
    print(f"peak resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:.0f} MB")


def run_limited(directory: Path) -> None:
    """Generate, then score in a process with a quarter of the memory."""
    work = Path(tempfile.mkdtemp(prefix="surgeon-benchmark-", dir=directory))
    try:
        nbytes = generate(work / "model")
        limit = nbytes // SHARE
        print(f"weights {nbytes / 1e9:.2f} GB, address space limited to {limit / 1e9:.2f} GB", flush=True)
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, __file__, "--limited", str(work / "model")],
            check=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
        print(f"scored in {time.perf_counter() - began:.0f} s")
    finally:
        shutil.rmtree(work)


def main() -> None:
    """Run the chosen measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="with one, CPU time means something on a busy machine")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--directory", type=Path, default=Path.cwd())
    parser.add_argument("--limited", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.limited:
        limited(options.limited)
    elif options.memory:
        run_limited(options.directory)
    else:
        compare(options.model, options.rounds, options.threads)


if __name__ == "__main__":
    main()
