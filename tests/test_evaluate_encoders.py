"""Pseudo-perplexities of masked language models, and accuracies of classifiers, against plain loops."""

import json
import math
from pathlib import Path

import pytest
from later import LATER
from talkers import TEXT, jsonl, tokenizer_of, written
from test_encoder_scores import encoder

from surgeon.errors import DataError, MeasureError, PlanError

if LATER:
    import torch
    import transformers

    from surgeon import evaluate
    from surgeon.models.loading import load_tokenizer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

NAMES = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
TEXTS = ("the cat sat", "a dog ran and ran after it", "rain", "it was not good at all, they said")


def masking(directory, name="bert", **changes):
    """Return `directory`, now holding a masked language model whose tokenizer frames texts and has a mask."""
    encoder(directory, name, "AutoModelForMaskedLM", vocab_size=300, **changes)
    framed(directory)
    return directory


def framed(directory):
    """Give a checkpoint a tokenizer that puts special tokens around a text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of(TEXT)
    names = ("cls_token", "sep_token", "mask_token", "pad_token")
    words = [tokenizer.convert_ids_to_tokens(index) for index in range(100, 104)]
    for key, word in zip(names, words, strict=True):
        setattr(tokenizer, key, word)
    ids = dict(zip(words, range(100, 104), strict=True))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{words[0]} $A {words[1]}", special_tokens=[(words[0], ids[words[0]]), (words[1], ids[words[1]])]
    )
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return written(tmp_path_factory.mktemp("text") / "a.txt", TEXT * 3)


def losses_of(directory, text, *, rows, length):
    """Return the sums of the losses of each row, one masked token and one forward pass at a time."""
    tokenizer = load_tokenizer(str(directory))
    model = transformers.AutoModelForMaskedLM.from_pretrained(directory).eval()
    ids = tokenizer(Path(text).read_text(), add_special_tokens=False)["input_ids"]
    sums = []
    for row in range(rows):
        whole = [tokenizer.cls_token_id, *ids[row * length : (row + 1) * length], tokenizer.sep_token_id]
        total = 0.0
        for place in range(1, length + 1):
            masked = torch.tensor([whole])
            masked[0, place] = tokenizer.mask_token_id
            with torch.no_grad():
                logits = model(masked).logits[0, place]
            total -= float(logits.double().log_softmax(-1)[whole[place]])
        sums.append(total)
    return sums


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_the_pseudo_perplexity_is_that_of_one_masked_token_at_a_time(name, text, tmp_path):
    model = masking(tmp_path / "model", name)

    found = evaluate(model, data=[text], metric="pseudo-perplexity", samples=2, sequence_length=9)

    sums = losses_of(model, text, rows=2, length=9)
    # float32 logits of other batches
    assert found.scored.figures["loss"].value == pytest.approx(sum(sums) / 18, rel=1e-5)
    assert found.scored.figures["pseudo_perplexity"].value == pytest.approx(math.exp(sum(sums) / 18), rel=1e-4)
    assert found.scored.outcomes["loss"] == pytest.approx(sums, rel=1e-5)
    assert found.scored.counts == {"tokens": 18, "rows": 2}
    assert "18 rows of 11 tokens were read" in found.notes[0]


def test_states_that_do_not_fit_into_memory_together_give_the_same(text, tmp_path, monkeypatch):
    model, options = masking(tmp_path / "model"), {"metric": "pseudo-perplexity", "samples": 2, "sequence_length": 9}
    whole = evaluate(model, data=[text], **options)

    monkeypatch.setattr("surgeon.models.device.STATES_BYTES", 5 * 4096 * 11)
    parts = evaluate(model, data=[text], **options)

    assert parts.scored.outcomes["loss"] == pytest.approx(whole.scored.outcomes["loss"], rel=1e-5)  # float32


def test_a_baseline_is_compared_row_by_row(text, tmp_path):
    model, other = masking(tmp_path / "model"), masking(tmp_path / "other", hidden_act="relu")

    found = evaluate(
        model, data=[text], metric="pseudo-perplexity", samples=3, sequence_length=7, baseline=other
    ).to_dict()

    difference = found["loss"] - found["baseline"]["loss"]
    assert found["differences"]["loss"]["value"] == pytest.approx(difference, rel=1e-9)
    share = 100 * found["baseline"]["pseudo_perplexity"] / found["pseudo_perplexity"]
    assert found["recovery"] == pytest.approx(share, rel=1e-9)


def test_a_perplexity_of_a_masked_model_leads_to_the_metric_that_it_has(text, tmp_path):
    with pytest.raises(MeasureError, match="a token sees those after it") as caught:
        evaluate(masking(tmp_path / "model"), data=[text], sequence_length=16)
    assert "--metric pseudo-perplexity" in caught.value.hint


def test_a_model_that_fills_in_no_mask_has_no_pseudo_perplexity(text, tmp_path):
    with pytest.raises(MeasureError, match="no masked language model"):
        evaluate(encoder(tmp_path / "model"), data=[text], metric="pseudo-perplexity")


def test_a_tokenizer_without_a_mask_is_refused(text, tmp_path):
    model = encoder(tmp_path / "model", "bert", "AutoModelForMaskedLM", vocab_size=300)

    with pytest.raises(MeasureError, match="no mask token"):
        evaluate(model, data=[text], metric="pseudo-perplexity", samples=1, sequence_length=9)


def test_rows_with_their_special_tokens_fit_the_positions(text, tmp_path):
    with pytest.raises(MeasureError, match="have 66 tokens, more than the 64") as caught:
        evaluate(masking(tmp_path / "model"), data=[text], metric="pseudo-perplexity", samples=1, sequence_length=64)
    assert caught.value.hint == "Use --sequence-length 62."


# --- classes --------------------------------------------------------------------------------------------------


def classifier(directory, name="bert", **changes):
    encoder(directory, name, "AutoModelForSequenceClassification", vocab_size=300, **NAMES | changes)
    framed(directory)
    return directory


def picks_of(directory):
    tokenizer = load_tokenizer(str(directory))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        return [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in TEXTS]


@pytest.mark.parametrize("form", [lambda pick: ["bad", "fair", "good"][pick], int, str])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_accuracy_is_that_of_one_text_at_a_time(form, batch_size, tmp_path):
    model = classifier(tmp_path / "model")
    picks = picks_of(model)
    labels = [*picks[:3], (picks[3] + 1) % 3]
    data = jsonl(tmp_path / "a.jsonl", *({"text": t, "label": form(n)} for t, n in zip(TEXTS, labels, strict=True)))
    output = tmp_path / "predictions.jsonl"

    found = evaluate(model, data=[data], metric="classification", batch_size=batch_size, predictions=output).to_dict()

    assert found["accuracy"] == 0.75
    assert found["accuracy_error"] == pytest.approx(0.25)  # sqrt(0.75 · 0.25 / 3)
    assert found["records"] == 4
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["prediction"] for record in records] == [NAMES["id2label"][pick] for pick in picks]
    assert [record["score"] for record in records] == [1.0, 1.0, 1.0, 0.0]


def test_two_classifiers_are_compared_text_by_text(tmp_path):
    model, other = classifier(tmp_path / "model"), classifier(tmp_path / "other", hidden_act="relu")
    data = jsonl(tmp_path / "a.jsonl", *({"text": text, "label": "good"} for text in TEXTS))

    found = evaluate(model, data=[data], metric="classification", baseline=other).to_dict()

    share = [sum(pick == 2 for pick in picks_of(one)) / 4 for one in (model, other)]
    assert [found["accuracy"], found["baseline"]["accuracy"]] == share
    assert found["differences"]["accuracy"]["value"] == share[0] - share[1]


def test_a_text_beyond_the_positions_is_cut_and_said(tmp_path):
    data = jsonl(tmp_path / "a.jsonl", {"text": TEXT * 3, "label": 0}, {"text": "rain", "label": 0})

    found = evaluate(classifier(tmp_path / "model"), data=[data], metric="classification")

    assert "1 of 2 texts were cut to the 64 positions" in found.notes[0]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "rain", "label": "wet"}, "'label' is 'wet', which is no class"),
        ({"text": "rain", "label": 3}, "'label' is 3, which is no class"),
        ({"text": "rain", "label": True}, "'label' is a boolean"),
        ({"text": "rain"}, "has no 'label'"),
        ({"label": 1}, "has no 'text'"),
    ],
)
def test_a_record_without_a_class_is_refused(record, message, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        evaluate(classifier(tmp_path / "model"), data=[jsonl(tmp_path / "a.jsonl", record)], metric="classification")
    assert caught.value.hint


def test_a_model_that_is_no_classifier_of_one_label_is_refused(tmp_path):
    data = jsonl(tmp_path / "a.jsonl", {"text": "rain", "label": 0})

    with pytest.raises(MeasureError, match="no sequence classifier"):
        evaluate(masking(tmp_path / "masking"), data=[data], metric="classification")
    with pytest.raises(MeasureError, match="not one class"):
        evaluate(
            classifier(tmp_path / "many", problem_type="multi_label_classification"),
            data=[data],
            metric="classification",
        )
    with pytest.raises(PlanError, match="--sequence-length has no effect on classification"):
        evaluate(tmp_path / "many", data=[data], metric="classification", sequence_length=8)
