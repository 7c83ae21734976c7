"""Which results of surgeon run in llama.cpp as they do in transformers: kind of result × family.

    python benchmarks/runtimes.py [FAMILY...]

Builds a toy of each family with the pattern of layers that is published, makes each kind of result, converts it with
llama.cpp's converter, and compares the log-probabilities of the next token behind five prompts with transformers'. A
cell is the median over the prompts of the largest difference, or the reason why there is none, and "said" where
surgeon's summary says so. The median, for a router of experts that is nearly undecided may decide otherwise.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import llama_cpp  # noqa: E402
import toys  # noqa: E402

import surgeon  # noqa: E402
from surgeon.errors import SurgeonError  # noqa: E402
from surgeon.surgery import Surgery, open_model  # noqa: E402
from surgeon.transforms.layers import keep_layers  # noqa: E402

LONG = {"num_hidden_layers": 12, "max_position_embeddings": 256}
EVEN = LONG | {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 2}
GPT2 = {"n_layer": 12, "n_embd": 64, "n_head": 4, "n_positions": 256, "n_inner": 256}
OWN = LONG | {"hidden_size": 48, "head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 2}
DERIVED = LONG | {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2}
SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere2": DERIVED | {"head_dim": 16, "sliding_window": 5, "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 3},
    "gemma": OWN,
    "gemma2": OWN | {"query_pre_attn_scalar": 16},
    "gemma3_text": OWN | {"query_pre_attn_scalar": 16, "layer_types": [*[SLIDING] * 5, FULL] * 2},
    "gpt2": GPT2,
    "gpt_neox": DERIVED | {"num_key_value_heads": 8, "hidden_size": 128},
    "gpt_oss": OWN | {"layer_types": [SLIDING, FULL] * 6, "head_dim": 64},
    "granite": DERIVED,
    "llama": OWN,
    "mistral": OWN | {"sliding_window": None},
    "mixtral": OWN | {"num_local_experts": 8},
    "olmo2": DERIVED,
    "phi3": DERIVED | {"sliding_window": None},
    "qwen2": DERIVED | {"use_sliding_window": False},
    "qwen3": OWN | {"use_sliding_window": False},
    "qwen3_moe": OWN | {"use_sliding_window": False, "num_experts": 8},
    "smollm3": DERIVED | {"no_rope_layer_interval": 4},
}


def keep(model: Path, layers: Sequence[int]) -> Surgery:
    """Return the surgery that keeps these layers."""
    whole = open_model(model)
    return replace(whole, plan=keep_layers(whole.anatomy, list(layers)))


def heads(model: Path) -> int:
    """Return the number of attention heads."""
    return open_model(model).anatomy.sizes["heads"]


# Keys of published configs that llama.cpp's converter reads and transformers does not write any more.
PUBLISHED = {"gpt2": {"n_ctx": 256}, "gpt_neox": {"rotary_pct": 0.25}, "cohere2": {"rotary_pct": 1.0}}

RESULTS: dict[str, Callable[[Path], Any]] = {
    "as published": open_model,
    "first 9 layers": lambda model: surgeon.truncate(model, layers=9),
    "without layers 0-2": lambda model: keep(model, range(3, 12)),
    "without layers 3-8": lambda model: keep(model, [0, 1, 2, 9, 10, 11]),
    "stacked": lambda model: surgeon.grow(model, layers=24, depth_method="stack"),
    "MLP 2x": lambda model: surgeon.grow(model, intermediate_size="2x"),
    "hidden 2x": lambda model: surgeon.grow(model, hidden_size="2x"),
    "heads 2x": lambda model: surgeon.grow(model, attention_heads="2x"),
    "fewer heads": lambda model: surgeon.prune(model, attention_heads=heads(model) // 2, score="magnitude"),
}
PROMPTS = [[(7 * i + 5 * j + j * j) % 97 + 3 for i in range(30)] for j in range(5)]


def results_of(family: str, folder: Path) -> tuple[dict[str, Path], dict[str, str], dict[str, list[str]]]:
    """Return the results that surgeon makes of the toy of a family, the reasons of those it refuses, and its notes."""
    toy = toys.build(family, folder / "toy", **FAMILIES[family])
    config = json.loads((toy / "config.json").read_text())
    (toy / "config.json").write_text(json.dumps(config | PUBLISHED.get(family, {})))
    vocabulary = {f"t{i}": i for i in range(toys.TOKENS["vocab_size"])}  # the converter counts it for some families
    (toy / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {"vocab": vocabulary}}))
    made, refused, notes = {}, {}, {}
    for name, make in RESULTS.items():
        try:
            summary = make(toy).save(folder / name)
        except SurgeonError as error:
            refused[name] = f"surgeon: {error}"
        else:
            made[name] = summary.output
            notes[name] = [note for note in summary.notes if note.startswith("llama.cpp")]
    return made, refused, notes


def differences(models: Mapping[str, Path], folder: Path) -> dict[str, float | str]:
    """Return how far llama.cpp's log-probabilities are from transformers', or why it refuses."""
    import torch

    found = llama_cpp.log_probabilities(models, PROMPTS, vocab=toys.TOKENS["vocab_size"], folder=folder)
    results: dict[str, float | str] = {}
    for name, answer in found.items():
        if isinstance(answer, str):
            results[name] = answer
            continue
        loaded, _ = toys.load(models[name], dtype=torch.float32)
        with torch.no_grad():
            expected = loaded(torch.tensor(PROMPTS), use_cache=False).logits[:, -1].log_softmax(-1)
        results[name] = float((torch.tensor(answer) - expected).abs().amax(1).median())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"{', '.join(FAMILIES)}; all by default")
    families = parser.parse_args().families or list(FAMILIES)
    if reason := llama_cpp.missing():
        parser.error(f"{reason}; run make once")
    print("| family | " + " | ".join(RESULTS) + " |\n|" + " --- |" * (len(RESULTS) + 1))
    for family in families:
        with tempfile.TemporaryDirectory() as name:
            made, refused, notes = results_of(family, Path(name))
            found = differences(made, Path(name))
        cells = []
        for result in RESULTS:
            value = refused.get(result, found.get(result))
            said = ", said" if notes.get(result) else ""
            cells.append((f"{value:.1g}" if isinstance(value, float) else f"{str(value)[:100]}") + said)
        print(f"| {family} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
