"""What a trained model scores: the loss of the plainly loaded model, and answers that it can give."""

import json
import math
from pathlib import Path

import pytest
from later import LATER

import surgeon

if LATER:
    import torch
    from streamed import plain
    from transformers import AutoTokenizer

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("smollm2"), pytest.mark.timeout(600)]

SUMS = [("2 plus 3", "5"), ("1 plus 1", "2"), ("10 plus 10", "20"), ("4 plus 5", "9")]


def test_the_perplexity_is_that_of_the_plainly_loaded_model(smollm2, tmp_path):
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    (tmp_path / "licence.txt").write_text(text)
    ids = AutoTokenizer.from_pretrained(smollm2)(text, add_special_tokens=False).input_ids
    rows = torch.tensor(ids[: 4 * 128]).view(4, 128)
    with torch.no_grad():
        logits = plain(smollm2)(rows, use_cache=False).logits[:, :-1]
    loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))

    found = surgeon.evaluate(
        smollm2, data=[str(tmp_path / "licence.txt")], samples=4, sequence_length=128, device="cpu"
    )

    assert found.scored.figures["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-5)


def test_sums_are_answered_and_what_follows_the_hashes_is_compared(smollm2, tmp_path):
    data = tmp_path / "sums.jsonl"
    shown = "Question: What is 3 plus 4?\nAnswer: 3 + 4 = 7\n#### 7\n\n"
    records = [
        {"question": f"{shown}Question: What is {sum_}?", "answer": f"The sum is\n#### {total}"} for sum_, total in SUMS
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))

    found = surgeon.evaluate(
        smollm2,
        data=[str(data)],
        metric="exact-match",
        extract=r"#### (-?[\d,]+)",
        max_new_tokens=16,
        predictions=tmp_path / "said.jsonl",
        device="cpu",
    )

    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert found.scored.counts == {"records": 4}
    assert found.scored.figures["exact_match"].value == sum(entry["score"] for entry in said) / 4 > 0
