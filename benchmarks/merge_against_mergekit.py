"""surgeon merge beside mergekit, method by method, in float32, from the same recipe files.

    python benchmarks/merge_against_mergekit.py --python /path/to/a/python/with/mergekit

Makes a small Llama and two finetunes of it (noise of two sizes on all weights), writes one recipe for each method, runs
both tools on it, and prints the largest difference of any number. mergekit 0.1.5 is installed in an environment of its
own. DARE draws other numbers in each tool: it is compared at density 1, and by what survives at density 0.5.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import surgeon

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
BOTH = (
    "models:\n  - {{model: {a}, parameters: {{weight: {w}{more}}}}}\n"
    "  - {{model: {b}, parameters: {{weight: {v}{more}}}}}\n"
)
PLAIN = "models:\n  - model: {a}\n  - model: {b}\n"
BASE = "base_model: {base}\n"
RECIPES = {
    "linear .3/.7": BOTH + "merge_method: linear\n",
    "task_arithmetic": BOTH + BASE + "merge_method: task_arithmetic\nparameters: {{lambda: 0.8}}\n",
    "ties, density .3": BOTH + BASE + "merge_method: ties\n",
    "ties, gradient": BOTH + BASE + "merge_method: ties\n",
    "dare_linear, density 1": BOTH + BASE + "merge_method: dare_linear\n",
    "dare_ties, density 1": BOTH + BASE + "merge_method: dare_ties\n",
    "slerp .3": PLAIN + "base_model: {a}\nmerge_method: slerp\nparameters: {{t: 0.3}}\n",
    "slerp, by layer and part": PLAIN
    + "base_model: {a}\nmerge_method: slerp\nparameters:\n  t:\n    - {{filter: self_attn, value: [0, 0.5, 1]}}\n"
    + "    - {{filter: mlp, value: [1, 0]}}\n    - value: 0.5\n",
    "nuslerp": BOTH + "merge_method: nuslerp\n",
    "nuslerp with a base": BOTH + BASE + "merge_method: nuslerp\n",
    "model_stock": PLAIN + BASE + "merge_method: model_stock\n",
    "karcher": PLAIN + "merge_method: karcher\n",
    "passthrough": "slices:\n  - sources: [{{model: {a}, layer_range: [0, 3]}}]\n"
    "  - sources: [{{model: {b}, layer_range: [1, 4]}}]\nmerge_method: passthrough\n",
}
MORE = {"ties, density .3": ", density: 0.3", "dare_linear, density 1": ", density: 1.0"}
WEIGHTS = {"ties, gradient": ("[0.2, 0.8]", "[1.0, 0.5]")}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the Python of an environment with mergekit")
    python = parser.parse_args().python
    with tempfile.TemporaryDirectory() as place:
        made(Path(place), python)


def made(place: Path, python: str) -> None:
    """Make the models in a directory, run both tools for each recipe, and print what differs."""
    base, a, b = (place / name for name in ("base", "a", "b"))
    surgeon.init("llama", set=[f"{key}={value}" for key, value in (SIZES | HEADS).items()]).save(base)
    tensors = load_file(base / "model.safetensors")
    for seed, (model, step) in enumerate(((a, 2e-3), (b, 4e-3)), start=1):
        surgeon.open_model(base).save(model)
        generator = torch.Generator().manual_seed(seed)
        common = torch.Generator().manual_seed(0)  # a part that both have learned, so that their cosine is not 0
        moved = {
            name: value
            + step * torch.randn(value.shape, generator=generator)
            + 2e-3 * torch.randn(value.shape, generator=common)
            for name, value in tensors.items()
        }
        save_file(moved, model / "model.safetensors", metadata={"format": "pt"})
    print("| recipe | largest difference | largest number | numbers that differ by more than 1e-6 |")
    print("| --- | --- | --- | --- |")
    for name, text in RECIPES.items():
        w, v = WEIGHTS.get(name, ("0.3", "0.7"))
        recipe = place / "merge.yaml"
        recipe.write_text(text.format(base=base, a=a, b=b, w=w, v=v, more=MORE.get(name, "")) + "dtype: float32\n")
        theirs, ours = place / "theirs", place / "ours"
        command = [python, "-m", "mergekit.scripts.run_yaml", str(recipe), str(theirs), "--allow-crimes", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"mergekit failed on {name}: {done.stderr[-2000:]}")
        surgeon.merge(None, from_file=recipe).save(ours, overwrite=True)
        print(row(name, read(ours), read(theirs)))
        for path in theirs.iterdir():
            path.unlink()


def read(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def row(name: str, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str:
    """Return the line of the table that compares two results."""
    if ours.keys() != theirs.keys():
        return f"| {name} | other tensors: {json.dumps(sorted(ours.keys() ^ theirs.keys())[:3])} | | |"
    differences = torch.cat([(ours[key].double() - theirs[key].double()).abs().flatten() for key in ours])
    largest = max(float(value.abs().max()) for value in theirs.values())
    return f"| {name} | {float(differences.max()):.1e} | {largest:.2f} | {int((differences > 1e-6).sum()):,} |"


if __name__ == "__main__":
    main()
