"""Time and peak memory of `surgeon merge` beside `cp` of its own output.

    python benchmarks/merge.py [--rounds 3] [--dtype float32] [--layers 16] [--mergekit PYTHON]

Generates two Llama-shaped checkpoints (hidden size 1024; with 16 layers 1 GB each in float32) in a temporary directory,
then takes in turns, for each method: `cp` of the result followed by `sync` of the copy, and `surgeon merge`. Every
figure is of a whole process, start-up included. With the Python of an environment that has mergekit, that takes its
turn at linear, in float32 as here.
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

LINEAR = "linear .3/.7"
WAYS = {
    LINEAR: ["--weights", "0.3,0.7"],
    "slerp .3": ["--method", "slerp", "--t", "0.3"],
    "passthrough": ["--method", "passthrough", "--slices", "A:0-7,B:8-15"],
}

RECIPE = """models:
  - {{model: {a}, parameters: {{weight: 0.3}}}}
  - {{model: {b}, parameters: {{weight: 0.7}}}}
merge_method: linear
dtype: float32
"""


def main() -> None:
    """Run the rounds of each way and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--mergekit", metavar="PYTHON", help="the Python of an environment with mergekit")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        run(Path(place), options)


def run(place: Path, options: argparse.Namespace) -> None:
    """Generate the models, measure, and print the table."""
    a, b, out, copy, theirs = (place / name for name in ("a", "b", "out", "copy", "theirs"))
    generate(a, options.dtype, options.layers)
    shutil.copytree(a, b)
    recipe = place / "merge.yaml"
    recipe.write_text(RECIPE.format(a=a, b=b))
    print("| | written | cp + sync | surgeon merge | relative to cp + sync | peak memory | mergekit | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.ways:
        command = [sys.executable, "-m", "surgeon", "merge", str(a), str(b), *WAYS[name], "-o", str(out), "--quiet"]
        other = [options.mergekit, "-m", "mergekit.scripts.run_yaml", str(recipe), str(theirs), "--quiet"]
        copies, merges, others, peak = [], [], list[float](), 0.0
        for _ in range(options.rounds):
            shutil.rmtree(out, ignore_errors=True)
            subprocess.run(["sync"], check=True)
            done = measure(command)
            merges.append(done.seconds)
            peak = max(peak, done.memory)
            if options.mergekit and name == LINEAR:
                shutil.rmtree(theirs, ignore_errors=True)
                subprocess.run(["sync"], check=True)
                others.append(measure([*other, "--no-copy-tokenizer"]).seconds)
            shutil.rmtree(copy, ignore_errors=True)
            copies.append(measure(["sh", "-c", f"cp -r --reflink=never {out} {copy} && sync -f {copy}"]).seconds)
        written = sum(path.stat().st_size for path in out.iterdir())
        median = statistics.median(merges)
        cells = [f"{written / 1e9:.2f} GB", spread(copies), spread(merges), f"{median / statistics.median(copies):.2f}"]
        cells += [f"{peak:.0f} MB"]
        cells += [spread(others), f"{statistics.median(others) / median:.2f}"] if others else ["", ""]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
