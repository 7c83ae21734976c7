"""A model in another vocabulary, method by method: anchors, bits per byte, seconds and peak memory.

    python benchmarks/transplant.py MODEL OTHER --texts wikitext2-valid.txt tinyshakespeare.txt

Each method runs as a process of its own, on one core. Bits per byte are of the first 4,500 characters of each text
without "<unk>", which is a special token of some tokenizers, seen at once; nothing is trained. They are over all rows
of the result, and over some: the anchors, the new tokens that the text has, and every 16th other new one. A matching
pursuit takes many minutes on a core for all tokens; it is measured on the new tokens that the texts have, beside rows
by ridge for all others. OTHER is a model.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from shared import measure
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgeon.checkpoint.matching import Match, Vocabulary, match
from surgeon.measure.new_rows import Helper, Matrix, pursue
from surgeon.surgery import open_source
from surgeon.verbs.transplanting import embedding_of

CHARACTERS = 4500
EVERY = 16  # of the new tokens that the text does not have, in the smaller vocabulary
TOGETHER = 128  # places whose logits are there at once


def bits(model: Any, ids: list[int], nbytes: int, some: Tensor | None) -> list[float]:
    """Return the bits per byte of a text over all rows, and over those of the tokens `some`."""
    head = model.get_output_embeddings()
    sums = [0.0, 0.0]
    with torch.no_grad():
        states = model.get_decoder()(torch.tensor([ids])).last_hidden_state[0, :-1]
        for at in range(0, len(states), TOGETHER):
            logits = head(states[at : at + TOGETHER])
            wanted = torch.tensor(ids[at + 1 : at + 1 + TOGETHER])
            hit = logits.gather(1, wanted[:, None])[:, 0]
            for place, chosen in enumerate((logits, logits if some is None else logits[:, some])):
                sums[place] += float((chosen.logsumexp(1) - hit).double().sum())
    return [total / math.log(2) / nbytes for total in sums]


# Runs a command and writes the peak of its own memory, in kB: what the system tells of a child counts its parent's too.
RUN = """
import sys
from pathlib import Path
from surgeon.cli.app import main
file, sys.argv = sys.argv[1], ["surgeon", *sys.argv[2:]]
try:
    main()
finally:
    status = Path("/proc/self/status").read_text()
    Path(file).write_text(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


class Bench:
    """A model, the other vocabulary and the texts."""

    def __init__(self, model: Path, other: Path, texts: dict[str, str]) -> None:
        self.model, self.other, self.texts = model, other, texts
        self.tokenizers = [AutoTokenizer.from_pretrained(path) for path in (model, other)]
        stored = [json.loads((path / "tokenizer.json").read_text(encoding="utf-8")) for path in (model, other)]
        self.old, self.new = (Vocabulary(each, {}) for each in stored)
        self.found: Match = match(self.old, self.new, {})
        missing = set(self.found.missing)
        self.ids = {name: self.encoded(1, text) for name, text in texts.items()}
        self.used = sorted({i for ids in self.ids.values() for i in ids} & missing)
        others = [i for i in self.found.missing if i not in set(self.used)]
        self.some = torch.tensor(sorted({*self.found.by_bytes, *self.used, *others[::EVERY]}))

    def encoded(self, which: int, text: str) -> list[int]:
        return list(self.tokenizers[which](text, add_special_tokens=False)["input_ids"])

    def wrong_anchors(self) -> int:
        """Return how many anchors transformers decodes to different texts: another way than the bytes."""
        wrong = 0
        for new, old in self.found.by_bytes.items():
            texts = [tokenizer.decode([i]) for tokenizer, i in zip(self.tokenizers, (old, new), strict=True)]
            wrong += "\ufffd" not in "".join(texts) and texts[0] != texts[1]  # half a character has no text
        return wrong

    def told(self, loaded: Any, *, is_source: bool = False) -> str:
        """Return the cells of a table: bits per byte of each text, over all rows and over some."""
        cells = []
        for name, text in self.texts.items():
            ids = self.encoded(0, text) if is_source else self.ids[name]
            values = bits(loaded, ids, len(text.encode()), None if is_source else self.some)
            cells += [f"{value:.3f}" for value in (values[:1] if is_source else values)] + [
                "" for _ in range(is_source)
            ]
        return " | ".join(cells)

    def with_pursuit(self, loaded: Any, helper: Path, k: int) -> None:
        """Put rows by a matching pursuit in place of those of the new tokens that the texts have."""
        source = open_source(helper)
        held = Helper.of(Matrix(source, embedding_of(source)), list(self.found.by_bytes), self.used)
        model = open_source(self.model)
        rows = Matrix(model, embedding_of(model)).rows(list(self.found.by_bytes.values()))
        made = torch.cat(list(pursue(held, k, device="cpu").rows(rows)()))
        with torch.no_grad():
            loaded.get_input_embeddings().weight[self.used] = made


def main() -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=["mean", "subword", "clp", "ridge"])
    parser.add_argument("--k", type=int, nargs="*", default=[16, 64], help="of the pursuits, after ridge")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    texts = {path.stem: path.read_text(encoding="utf-8").replace("<unk>", "")[:CHARACTERS] for path in options.texts}
    bench = Bench(options.model, options.other, texts)
    print(f"{len(bench.found.by_bytes):,} anchors, {bench.wrong_anchors()} of them wrong")
    print(f"{len(bench.used)} new tokens in the texts; {len(bench.some):,} rows in the smaller vocabulary\n")
    print(f"| rows | {' | '.join(f'{name}, all rows | some' for name in texts)} | norms | CPU s | peak MB |")
    print("| --- |" + " --- |" * (2 * len(texts) + 3))
    loaded = AutoModelForCausalLM.from_pretrained(options.model)
    print(f"| before, in its own vocabulary | {bench.told(loaded, is_source=True)} | | | |", flush=True)
    anchors = torch.tensor(list(bench.found.by_bytes))
    for method in options.methods:
        with tempfile.TemporaryDirectory() as directory:
            made, peak = Path(directory, "made"), Path(directory, "peak")
            command = [sys.executable, "-c", RUN, str(peak), "transplant", str(options.model), "-q", "-o", str(made)]
            figure = measure([*command, "--tokenizer", str(options.other), "--method", method])
            (made / "rows.safetensors").unlink()
            loaded = AutoModelForCausalLM.from_pretrained(made)
            rows = loaded.get_input_embeddings().weight.detach().norm(dim=1)
            middle = rows[anchors].median()
            norms = f"{rows.min() / middle:.2f} to {rows.max() / middle:.2f}"
            cost = f"{figure.cpu:.0f} | {int(peak.read_text()) / 1000:,.0f}"
            print(f"| {method} | {bench.told(loaded)} | {norms} | {cost} |", flush=True)
            for k in options.k if method == "ridge" else ():
                bench.with_pursuit(loaded, options.other, k)
                print(f"| ridge, and omp of {k} where the texts are | {bench.told(loaded)} | | | |", flush=True)


if __name__ == "__main__":
    main()
