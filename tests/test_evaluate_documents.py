"""The loss of documents, each by itself: by the plainly loaded model, and as the run that trained it counts."""

import json

import pytest
from later import LATER
from talkers import jsonl, talker

import surgeon
from surgeon.errors import DataError
from surgeon.models.loading import load_tokenizer
from surgeon.options import OptionError

if LATER:
    import torch
    from streamed import plain

CLOSE = 1e-6  # relative: float32 through six layers, in batches of other shapes
TEXTS = ["To be, or not to be, that is the question", "a", "Whether 'tis nobler in the mind to suffer", "Words, words"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return talker(tmp_path_factory.mktemp("model") / "llama")


def evaluate(model, data, **options):
    return surgeon.evaluate(str(model), data=[str(data)], documents=True, device="cpu", **options)


def sums_of(reference, rows):
    """Return the sum of the losses from token `first` on, of each (tokens, first), by a model of transformers."""
    sums = []
    for ids, first in rows:
        with torch.no_grad():
            logits = reference(torch.tensor([ids]), use_cache=False).logits[0, first - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[first:]), reduction="none")
        sums.append(losses.double().sum().item())
    return sums


def test_every_document_is_a_text_with_its_own_begin_and_end(model, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", *({"text": text} for text in TEXTS))
    tokenizer = load_tokenizer(str(model))
    begin = tokenizer("")["input_ids"][:1]
    rows = [
        (begin + tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id], 1) for text in TEXTS
    ]

    found = evaluate(model, data)

    expected = sums_of(plain(model), rows)
    assert found.scored.outcomes["loss"] == pytest.approx(expected, rel=CLOSE)
    assert found.scored.sizes == tuple(len(ids) - 1 for ids, _ in rows)
    assert found.scored.figures["loss"].value == pytest.approx(sum(expected) / sum(len(ids) - 1 for ids, _ in rows))
    assert found.scored.counts == {"tokens": sum(len(ids) - 1 for ids, _ in rows), "rows": 4}
    assert "4 documents" in found.to_text()


def test_of_a_record_with_an_answer_the_answer_and_its_end_are_predicted(model, tmp_path):
    records = [
        {"prompt": "What is the question?", "completion": "To be, or not to be"},
        {"prompt": "b", "completion": "a"},
    ]
    data = jsonl(tmp_path / "a.jsonl", *records)
    tokenizer = load_tokenizer(str(model))
    rows = []
    for record in records:
        asked = (
            tokenizer("")["input_ids"][:1] + tokenizer(record["prompt"] + "\n", add_special_tokens=False)["input_ids"]
        )
        answer = tokenizer(record["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((asked + answer, len(asked)))

    found = evaluate(model, data)

    assert found.scored.outcomes["loss"] == pytest.approx(sums_of(plain(model), rows), rel=CLOSE)


def test_it_is_the_validation_loss_of_a_run(model, tmp_path):
    held_out = jsonl(
        tmp_path / "held-out.jsonl", *({"text": f"{text} {number}"} for number, text in enumerate(TEXTS * 5))
    )

    run = surgeon.finetune(
        model, data=[str(held_out)], eval_data=(str(held_out),), output=tmp_path / "out", max_steps=2, batch_size=2,
        sequence_length=64, lr="1e-3", device="cpu",
    )  # fmt: skip

    assert evaluate(tmp_path / "out", held_out).scored.figures["loss"].value == pytest.approx(run.eval_loss, rel=1e-5)


def test_documents_in_several_batches_keep_their_order_beside_a_baseline(model, tmp_path, monkeypatch):
    data = jsonl(tmp_path / "a.jsonl", *({"text": text} for text in TEXTS))
    whole = evaluate(model, data).scored.outcomes["loss"]
    monkeypatch.setattr("surgeon.evals.whole.ROWS", 1)

    found = evaluate(model, data, baseline=str(model))

    assert found.scored.outcomes["loss"] == pytest.approx(whole, rel=CLOSE)
    assert found.differences["loss"].value == 0
    assert found.recovery == 100


def test_long_documents_are_cut_and_counted_and_the_first_samples_are_used(model, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", *({"text": text} for text in TEXTS))

    cut, two = evaluate(model, data, sequence_length=6), evaluate(model, data, samples=2)

    assert max(cut.scored.sizes) == 5
    assert cut.notes == (f"{cut.scored.sizes.count(5)} of 4 documents were cut at 6 tokens",)
    assert two.scored.outcomes["loss"] == pytest.approx(evaluate(model, data).scored.outcomes["loss"][:2], rel=CLOSE)


def test_the_command_prints_it_with_its_error(model, tmp_path, run):
    data = jsonl(tmp_path / "a.jsonl", *({"text": text} for text in TEXTS))

    printed = json.loads(run("evaluate", model, "--data", data, "--documents", "--json", "--device", "cpu").out)

    assert (printed["documents"], printed["stride"], printed["rows"]) == (True, None, 4)
    assert printed["loss_error"] > 0


def test_what_makes_no_sense_with_documents_is_refused(model, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", {"prompt": "a long question of many words", "completion": "yes"})

    with pytest.raises(OptionError, match="--documents does not go with --stride"):
        evaluate(model, data, stride=4)
    with pytest.raises(surgeon.PlanError, match="--documents has no effect on exact-match"):
        evaluate(model, data, metric="exact-match")
    with pytest.raises(DataError, match="has a token to predict within 4"):
        evaluate(model, data, sequence_length=4)
