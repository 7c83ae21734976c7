"""Time and peak memory of `surgeon merge` beside `cp` of its own output.

    python benchmarks/merge.py [--rounds 3] [--dtype float32] [--layers 16]

Generates two Llama-shaped checkpoints (hidden size 1024; with 16 layers 1 GB each in float32) in a temporary directory,
then takes in turns, for each method: `cp` of the result followed by `sync` of the copy, and `surgeon merge`. Every
figure is of a whole process, start-up included.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from grow import generate
from shared import measure, spread

WAYS = {
    "linear .3/.7": ["--weights", "0.3,0.7"],
    "slerp .3": ["--method", "slerp", "--t", "0.3"],
    "passthrough": ["--method", "passthrough", "--slices", "A:0-7,B:8-15"],
}


def main() -> None:
    """Run the rounds of each way and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--directory", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        run(Path(place), options.rounds, options.dtype, options.layers)


def run(place: Path, rounds: int, dtype: str, layers: int) -> None:
    """Generate the models, measure, and print the table."""
    a, b, out, copy = (place / name for name in ("a", "b", "out", "copy"))
    generate(a, dtype, layers)
    shutil.copytree(a, b)
    print("| | written | cp + sync | surgeon merge | relative to cp + sync | peak memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, words in WAYS.items():
        command = [sys.executable, "-m", "surgeon", "merge", str(a), str(b), *words, "-o", str(out), "--quiet"]
        copies, merges, peak = [], [], 0.0
        for _ in range(rounds):
            shutil.rmtree(out, ignore_errors=True)
            subprocess.run(["sync"], check=True)
            done = measure(command)
            merges.append(done.seconds)
            peak = max(peak, done.memory)
            shutil.rmtree(copy, ignore_errors=True)
            copies.append(measure(["sh", "-c", f"cp -r --reflink=never {out} {copy} && sync -f {copy}"]).seconds)
        written = sum(path.stat().st_size for path in out.iterdir())
        ratio = statistics.median(merges) / statistics.median(copies)
        cells = (f"{written / 1e9:.2f} GB", spread(copies), spread(merges), f"{ratio:.2f}", f"{peak:.0f} MB")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
