"""Cuts of the sizes of `prune_table.py` by two other tools, soup-cli and optipfair, from the same rows of text.

    pip install soup-cli optipfair
    python benchmarks/prune_peers.py MODEL --data wikitext.txt --data other.jsonl --work DIR --dropped 12 8 4

Each directory in DIR that this leaves is judged by prune_table.py with the same --work, as the methods soup,
optipfair-depth and optipfair-width.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", action="append", required=True, help="the first 60 % is read")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dropped", type=int, nargs="*", default=(12, 8, 4))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows = tokens_of(given)
    for dropped in given.dropped:
        soup(given, rows, dropped)
        depth(given, rows, dropped)
        width(given, rows, dropped)


def tokens_of(given: argparse.Namespace) -> Any:
    """Return the rows that surgeon's scores are taken on, shape (32, 256)."""
    from surgeon.measure.calibration import read_calibration
    from surgeon.surgery import open_source

    texts = [f"{name}[:60%]" for name in given.data]
    return read_calibration(open_source(given.model), texts, samples=32, sequence_length=256).tokens


def soup(given: argparse.Namespace, rows: Any, dropped: int) -> None:
    """`soup shrink`: the block of the least angular distance over all tokens, bare."""
    out = (given.work / f"{dropped}-soup").resolve()
    if (out / "config.json").exists():
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts = [json.dumps({"text": tokenizer.decode(row)}) + "\n" for row in rows]
    place = (given.work / "soup").resolve()  # it reads and writes under its working directory only
    place.mkdir(exist_ok=True)
    (place / "calib.jsonl").write_text("".join(texts))
    words = ["--model", str(Path(given.model).resolve()), "--drop-layers", str(dropped), "--calib", "calib.jsonl"]
    command = [str(Path(sys.executable).with_name("soup")), "shrink", *words, "-o", "out", "--tolerance", "5"]
    done = subprocess.run(command, check=False, cwd=place, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode in (0, 2), "2: its verdict is not to ship"
    (place / "out/model").rename(out)
    shutil.rmtree(place)


def depth(given: argparse.Namespace, rows: Any, dropped: int) -> None:
    """Optipfair's depth pruning: the layers of the least 1 - cosine between their input and output."""
    out = given.work / f"{dropped}-optipfair-depth"
    if (out / "config.json").exists():
        return
    import optipfair

    model, loader = opened(given, rows)
    scores = optipfair.analyze_layer_importance(model, loader, show_progress=False)
    lowest = sorted(sorted(scores, key=lambda layer: scores[layer])[:dropped])
    print(f"optipfair removes layers {lowest}", flush=True)
    saved(given, optipfair.prune_model(model, pruning_type="DEPTH", layer_indices=lowest, show_progress=False), out)


def width(given: argparse.Namespace, rows: Any, dropped: int) -> None:
    """Optipfair's MLP pruning with activations of the text, to the size of prune_table's narrow cut."""
    out = given.work / f"{dropped}-optipfair-width"
    if (out / "config.json").exists():
        return
    import optipfair

    model, loader = opened(given, rows)
    ffn, hidden = model.config.intermediate_size, model.config.hidden_size
    layer = sum(value.numel() for value in model.model.layers[0].parameters())
    gone = (dropped * layer // (3 * hidden * model.config.num_hidden_layers) + 15) // 16 * 16
    narrow = optipfair.prune_model(
        model, pruning_type="MLP_GLU", pruning_percentage=100 * gone / ffn, dataloader=loader, show_progress=False
    )
    print(f"optipfair keeps {narrow.config.intermediate_size} of {ffn} neurons", flush=True)
    saved(given, narrow, out)


def opened(given: argparse.Namespace, rows: Any) -> tuple[Any, Any]:
    """Return the model as transformers loads it, and batches of the rows."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
    return model, batches


def saved(given: argparse.Namespace, model: Any, out: Path) -> None:
    from transformers import AutoTokenizer

    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(given.model).save_pretrained(out)


if __name__ == "__main__":
    main()
