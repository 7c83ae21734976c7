"""bert2BERT on a small BERT: does a grown masked LM learn faster than one with random weights?

    python benchmarks/bert_growth.py [--data FILE] [--seeds 2] [--quick]

Trains a small byte-level BERT as a masked LM on the text of --data (by default the sources of the Python standard
library), and grows it with `surgeon.grow` as bert2BERT (arXiv:2110.07143) does: FPI repeats positions (--width-method
uneven), AKI takes the repeated rows from the next layer (--width-method advanced); to twice the width, and to one and a
half times. Then it trains each result, the small model itself, and models of the large shapes with random weights on
the same text, as grow_training.py does for decoders. Nothing is downloaded. Writes the losses as JSON into --directory,
the plot as docs/images/bert-growth.png, and prints the tables.
"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grow_training import ROOT, Lengths, Start, command_line, corpus, gather, plot, run_all, table, train

if TYPE_CHECKING:
    from torch import Tensor

PLOT = ROOT / "docs" / "images" / "bert-growth.png"
MASK, SHARE = 256, 0.15  # the token that hides a byte, and how many are hidden
# Short rows: on long ones so small a BERT needs thousands of steps to find its neighbours.
BATCH = ROWS, LENGTH = 32, 32
HEAD, LAYERS = 12, 3
RATE = 3e-3
SMALL_HEADS = 4
HEADS = {"twice": 8, "half more": 6}


def widths(shape: str, **options: Any) -> dict[str, Any]:
    """Return what `surgeon.grow` is asked for: MLPs are four times as wide as the state, heads have 12 dims."""
    hidden = HEAD * HEADS[shape]
    return {"hidden_size": hidden, "intermediate_size": 4 * hidden, "attention_heads": HEADS[shape], **options}


STARTS = {
    "fpi": Start("FPI + noise", widths("twice", width_method="uneven"), "twice"),
    "fpi-plain": Start("FPI", widths("twice", width_method="uneven", noise=0.0), "twice"),
    "aki": Start("AKI", widths("twice", width_method="advanced", noise=0.0), "twice"),
    "small-on": Start("small, trained on", {}, "twice"),
    "random-twice": Start("random, twice", None, "twice", RATE),
    "fpi-half": Start("FPI + noise, 1.5x", widths("half more", width_method="uneven"), "half more"),
    "aki-half": Start("AKI, 1.5x", widths("half more", width_method="advanced", noise=0.0), "half more"),
    "random-half more": Start("random, 1.5x", None, "half more", RATE),
}
LENGTHS = Lengths(small=800, grown=150, random=450, measure=15)
QUICK = Lengths(small=20, grown=6, random=12, measure=3)


def masked_loss(model: Any, windows: "Tensor", step: int) -> "Tensor":
    """Return the mean loss of the hidden bytes, in nats. Which are hidden depends on the step."""
    import torch

    text = windows[:, :LENGTH]
    hidden = torch.rand(text.shape, generator=torch.Generator().manual_seed(step)) < SHARE
    logits = model(input_ids=text.masked_fill(hidden, MASK)).logits
    return torch.nn.functional.cross_entropy(logits[hidden], text[hidden])


def fresh(heads: int, seed: int) -> Any:
    """Return a BERT with random weights. It has no dropout, so that a difference is one of the weights."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    hidden = HEAD * heads
    config = BertConfig(
        vocab_size=MASK + 1,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=heads,
        num_hidden_layers=LAYERS,
        max_position_embeddings=LENGTH,
        type_vocab_size=1,
        pad_token_id=None,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.15,  # about hidden ** -0.5, as 0.02 is for BERT's own sizes
    )
    return BertForMaskedLM(config)


def difference(small: Path, grown: Path, text: Path | None) -> tuple[float, float]:
    """Return the largest difference of a logit on held-out text, and the largest logit of the small model."""
    import torch
    from transformers import BertForMaskedLM

    windows = corpus(text, LENGTH)[1][:, :LENGTH]
    with torch.no_grad():
        expected, found = (
            BertForMaskedLM.from_pretrained(path, dtype=torch.float32).eval()(input_ids=windows).logits
            for path in (small, grown)
        )
    return (found - expected).abs().max().item(), expected.abs().max().item()


def run(name: str, seed: int, directory: Path, lengths: Lengths, text: Path | None) -> None:
    """Carry out one run and write its curve: the small model, a grown one, or one from random weights."""
    import torch
    from transformers import BertForMaskedLM
    from transformers.utils import logging

    import surgeon

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    began = time.perf_counter()
    small, steps, rate = directory / "small", lengths.small, RATE
    record: dict[str, Any] = {"run": name, "seed": seed}
    if name == "small":
        model = fresh(SMALL_HEADS, 0)
    else:
        start = STARTS[name]
        rate, steps = start.learning_rate, lengths.random if start.grow is None else lengths.grown
        grown = directory / f"{name}-{seed}" if start.grow else small
        if start.grow:
            surgeon.grow(small, seed=seed, **start.grow).save(grown, overwrite=True)
        if start.grow is None:
            model = fresh(HEADS[start.like], seed)
        else:
            model = BertForMaskedLM.from_pretrained(grown, dtype=torch.float32)
            record["difference"], record["largest"] = difference(small, grown, text)
    record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    record["curve"] = train(
        model,
        steps,
        learning_rate=rate,
        seed=1000 + seed,
        measure=lengths.measure,
        loss_fn=masked_loss,
        text=text,
        shape=BATCH,
    )
    if name == "small":
        model.save_pretrained(small)
    record["seconds"] = round(time.perf_counter() - began, 1)
    (directory / f"{name}-{seed}.json").write_text(json.dumps(record))


def exactness(directory: Path) -> str:
    """Return how far each grown model is from the small one before it is trained, as a table in Markdown."""
    lines = ["| start | largest difference of a logit | loss before |", "| --- | --- | --- |"]
    for name, start in STARTS.items():
        record = json.loads((directory / f"{name}-0.json").read_text())
        if start.grow:
            found = f"{record['difference']:.1e} of {record['largest']:.0f}"
            lines.append(f"| {start.label} | {found} | {record['curve'][0][1]:.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Carry out the chosen runs, and report."""
    parser = command_line(__doc__, directory="bert-growth", picture=PLOT)
    parser.add_argument("--data", type=Path, help="a text; default: the sources of the Python standard library")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    lengths = QUICK if options.quick else LENGTHS
    if options.run:
        run(options.run, options.seed, options.directory, lengths, options.data)
        return
    seeds = 1 if options.quick else options.seeds
    if not options.report:
        base = [sys.executable, __file__, "--directory", str(options.directory)]
        base += ["--quick"] if options.quick else []
        base += ["--data", str(options.data)] if options.data else []
        run_all(base, seeds, STARTS)
    results = gather(options.directory, seeds, STARTS)
    (options.directory / "results.json").write_text(json.dumps(results, indent=1))
    print(exactness(options.directory), table(results, STARTS), sep="\n\n")
    top = results["curves"]["random-twice"][0][1]
    plot(results, options.directory / "quick.png" if options.quick else options.plot, STARTS, top=min(top, 3.5))


if __name__ == "__main__":
    main()
