"""SmolLM2-135M in codes of 8 and 4 bits: the bytes of the file, perplexity and KL on a text, and the seconds.

    python benchmarks/quantize.py MODEL --data wikitext2-valid.txt [--samples 16]

MODEL is stored in bfloat16 first, for that is how it was published. Each way is one command of its own, on one core,
which loads its result and compares the logits with those of the model quantized in memory, before it takes its place.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WAYS = {
    "int8, a scale for each row (torchao)": ["--bits", "8"],
    "8 bits, groups of 64 (compressed-tensors)": ["--bits", "8", "--method", "compressed-tensors"],
    "4 bits, groups of 32 (compressed-tensors)": ["--bits", "4", "--group-size", "32"],
    "4 bits, groups of 64 (compressed-tensors)": ["--bits", "4"],
}


def surgeon(*words: str) -> dict:
    """Return the JSON object that a command prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "surgeon", *words, "--json", "--quiet"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", default="16", help="rows of 512 tokens")
    options = parser.parse_args()
    print("| | file, MB | of bfloat16 | perplexity | loss less the source's | KL, nats a token | same logits | s |")
    print("| --- |" + " --- |" * 7)
    with tempfile.TemporaryDirectory() as directory:
        source = str(Path(directory, "bfloat16"))
        surgeon("truncate", options.model, "--layers", "100%", "--dtype", "bfloat16", "-o", source)
        for number, (name, words) in enumerate(WAYS.items()):
            output = str(Path(directory, str(number)))
            measured = ["--data", options.data, "--samples", options.samples]
            found = surgeon("quantize", source, *words, *measured, "-o", output)
            size, worth, over, kl = (found[key] for key in ("file_bytes", "perplexity", "loss_difference", "kl"))
            if not number:
                error = worth["errors"]["before"]
                told = f"{size['before'] / 1e6:.1f} | | {worth['before']:.3f} ± {error:.3f}"
                print(f"| bfloat16 | {told} | | | | |", flush=True)
            cells = [
                f"{size['after'] / 1e6:.1f}",
                f"{100 * size['after'] / size['before']:.1f} %",
                f"{worth['after']:.3f} ± {worth['errors']['after']:.3f}",
                f"{over['value']:.4f} ± {over['error']:.4f}",
                f"{kl['value']:.4f} ± {kl['error']:.4f}",
                "yes" if found["verification"]["verdict"] == "exact" else "no",
                f"{found['seconds']:.0f}",
            ]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
