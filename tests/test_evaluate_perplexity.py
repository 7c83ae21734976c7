"""The perplexity of a text: by the plainly loaded model, by a naive loop, by hand."""

import json
import math
from statistics import stdev

import pytest
from handmade import edit_config
from later import LATER
from talkers import TEXT, jsonl, talker, tokenizer_of, written
from tokenizers import normalizers

import surgeon
from surgeon.data.documents import documents
from surgeon.data.rows import text_of
from surgeon.errors import CheckpointError, DataError, MeasureError, PlanError
from surgeon.models.loading import load_tokenizer

if LATER:
    import torch
    from safetensors.torch import load_file, save_file
    from streamed import plain, stream
    from transformers import AutoModel

    from surgeon.evals.perplexity import row_losses, token_bytes, window_batches, windows

CLOSE = 1e-6  # relative: float32 through six layers, in batches of other shapes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return talker(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return written(tmp_path_factory.mktemp("text") / "a.txt")


def ids_of(directory, text=TEXT):
    return load_tokenizer(str(directory))(text, add_special_tokens=False, verbose=False)["input_ids"]


def token_losses(model, ids):
    """Return the losses of all tokens but the first, each given those before it, by a model of transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").double().tolist()


def evaluate(model, text, **options):
    return surgeon.evaluate(str(model), data=[str(text)], device="cpu", **options)


def test_the_loss_of_rows_is_that_of_the_plainly_loaded_model(model, text):
    ids, reference = ids_of(model), plain(model)
    rows = [token_losses(reference, ids[at : at + 20]) for at in range(0, 100, 20)]
    losses = [sum(row) / 19 for row in rows]

    found = evaluate(model, text, samples=5, sequence_length=20)

    loss, perplexity = found.scored.figures["loss"], found.scored.figures["perplexity"]
    assert loss.value == pytest.approx(sum(losses) / 5, rel=CLOSE)
    assert loss.error == pytest.approx(stdev(losses) / math.sqrt(5), rel=1e-4)  # of differences: fewer digits
    assert perplexity.value == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    assert perplexity.error == pytest.approx(perplexity.value * loss.error)
    assert found.scored.counts["tokens"] == 95


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "mixtral", "bloom"])
def test_other_families_too(name, text, tmp_path):
    directory = talker(tmp_path / name, name)
    ids, reference = ids_of(directory), plain(directory)
    losses = [loss for at in (0, 30) for loss in token_losses(reference, ids[at : at + 30])]

    found = evaluate(directory, text, samples=2, sequence_length=30)

    assert found.scored.figures["loss"].value == pytest.approx(sum(losses) / 58, rel=1e-5)


@pytest.mark.parametrize(
    ("length", "stride", "count"), [(20, 7, 103), (20, 19, 58), (16, 1, 20), (16, 8, 32), (20, 5, 12)]
)
def test_a_stride_is_the_naive_loop_over_the_stream(model, tmp_path, length, stride, count):
    """The loop of transformers' page "Perplexity of fixed-length models"."""
    ids = ids_of(model)[:count]
    file = written(tmp_path / "a.txt", load_tokenizer(str(model)).decode(ids))
    assert ids_of(model, (tmp_path / "a.txt").read_text()) == ids
    reference, total, predicted, previous_end = plain(model), 0.0, [], 0
    for begin in range(0, count, stride):
        end = min(begin + length, count)
        fresh = end - max(previous_end, begin + 1)  # the first token of a window has nothing before it
        losses = token_losses(reference, ids[begin:end])
        total += sum(losses[len(losses) - fresh :])
        predicted += range(end - fresh, end)
        previous_end = end
        if end == count:
            break

    found = evaluate(model, file, sequence_length=length, stride=stride)

    assert predicted == list(range(1, count))
    assert found.scored.counts["tokens"] == count - 1
    assert found.scored.figures["loss"].value == pytest.approx(total / (count - 1), rel=CLOSE)


def test_windows_predict_every_token_but_the_first_once_with_context():
    for num_tokens in range(2, 40):
        for length in range(2, 12):
            for stride in range(1, length):
                found = windows(num_tokens, length, stride)
                assert [token for _, first, end in found for token in range(first, end)] == list(range(1, num_tokens))
                assert all(end - start <= length for start, _, end in found)
                assert all(first - start >= length - stride for start, first, _ in found[1:])
                pieces = window_batches(torch.arange(num_tokens), found)
                assert [row for piece in pieces for row in piece.tokens.tolist()] == [
                    list(range(start, end)) for start, _, end in found
                ]


def test_the_first_samples_bound_the_stream_of_a_stride(model, text):
    found = evaluate(model, text, samples=3, sequence_length=10, stride=4)

    assert found.scored.counts["tokens"] == 29


def test_rows_that_do_not_fit_into_memory_together_give_the_same(model, monkeypatch):
    pieces = window_batches(torch.tensor(ids_of(model)[:200]), windows(200, 20, 7))
    whole = row_losses(stream(model), pieces)

    monkeypatch.setattr("surgeon.models.device.STATES_BYTES", 3 * 20 * 48 * 4 * 2)
    parts = row_losses(stream(model), pieces)

    assert torch.cat(parts).tolist() == pytest.approx(torch.cat(whole).tolist(), rel=CLOSE)


# --- bytes ------------------------------------------------------------------------------------------------------


def test_bits_per_byte_are_of_the_text_that_was_predicted(model, text):
    tokenizer = load_tokenizer(str(model))
    rows = [ids_of(model)[at : at + 20] for at in (0, 20, 40)]
    nbytes = sum(len(tokenizer.convert_ids_to_tokens(token)) for row in rows for token in row[1:])  # a char is a byte

    found = evaluate(model, text, samples=3, sequence_length=20)

    counts, loss = found.scored.counts, found.scored.figures["loss"]
    assert counts["bytes"] == pytest.approx(nbytes, abs=3)  # where a row ends inside the 4 bytes of one character
    bits = found.scored.figures["bits_per_byte"]
    assert bits.value == pytest.approx(loss.value * counts["tokens"] / math.log(2) / counts["bytes"])


@pytest.mark.parametrize("trained_on", [TEXT, "x"])  # the latter splits é and the emoji into their bytes
def test_every_byte_counts_once(trained_on, tmp_path):
    tokenizer = tokenizer_of(trained_on)
    files = [
        written(tmp_path / "a.txt", TEXT),
        jsonl(tmp_path / "b.jsonl", {"text": "é  "}, {"text": ""}, {"text": "z"}),
    ]

    texts = [text_of(document, tokenizer) for spec in files for document in documents(spec)]
    found = token_bytes(texts, tokenizer, 10**6)

    joined = [len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (TEXT, "é  ", "", "z")]
    assert len(found) == sum(joined) + 3
    assert sum(found) == len(TEXT.encode()) + 4 + 1
    assert found[joined[0]] == 0  # the token between documents


def test_bytes_are_those_of_the_text_and_not_of_what_the_tokenizer_makes_of_it(tmp_path):
    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])

    found = token_bytes(["ÉCOLE ﬁn"], tokenizer, 10**6)

    assert sum(found) == len("ÉCOLE ﬁn".encode())


# --- the baseline -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return talker(tmp_path_factory.mktemp("other") / "other", seed=1)


def test_a_baseline_is_compared_row_by_row(model, other, text):
    apart = [evaluate(which, text, samples=6, sequence_length=16) for which in (model, other)]
    ours, theirs = ([value / 15 for value in found.scored.outcomes["loss"]] for found in apart)

    found = evaluate(model, text, samples=6, sequence_length=16, baseline=str(other))

    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    difference = found.differences["loss"]
    assert difference.value == pytest.approx(sum(differences) / 6)
    assert difference.error == pytest.approx(stdev(differences) / math.sqrt(6))
    assert found.baseline.figures == apart[1].scored.figures
    perplexities = [each.scored.figures["perplexity"].value for each in apart]
    assert found.recovery == pytest.approx(100 * perplexities[1] / perplexities[0])


def test_a_model_beside_itself_recovers_all_and_has_no_z(model, text):
    found = evaluate(model, text, samples=2, sequence_length=16, baseline=str(model))

    assert found.recovery == 100
    assert found.differences["loss"].value == 0
    assert found.differences["loss"].z is None


def test_a_baseline_that_sees_other_tokens_is_refused(model, text, tmp_path):
    foreign = talker(tmp_path / "foreign", text="zebra zebra zebra " * 9)

    with pytest.raises(MeasureError, match="make different tokens of the text: token 0 is 'The'"):
        evaluate(model, text, baseline=str(foreign), samples=2, sequence_length=16)


# --- what is refused, and what is noted -------------------------------------------------------------------------


def test_text_shorter_than_a_row_is_a_shorter_row_and_noted(model, tmp_path):
    found = evaluate(model, written(tmp_path / "a.txt", "sat on the mat"), sequence_length=50)

    length = len(ids_of(model, "sat on the mat"))
    assert found.scored.counts["tokens"] == length - 1
    assert found.scored.figures["loss"].error is None
    assert f"one row of {length} tokens instead of 50" in found.notes[0]
    assert "standard error" in found.notes[1]


def damaged(source, directory, change):
    """Return a copy of a model whose weights were changed."""
    directory.mkdir()
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_a_model_without_a_head_is_refused(model, tmp_path):
    headless = tmp_path / "headless"
    AutoModel.from_pretrained(model).save_pretrained(headless)
    load_tokenizer(str(model)).save_pretrained(headless)

    for options in ({"sequence_length": 16}, {"metric": "rouge-l", "max_new_tokens": 4}):
        with pytest.raises(MeasureError, match="headless has no weights for 'lm_head.weight'"):
            evaluate(headless, jsonl(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}), **options)


def test_a_checkpoint_that_is_not_whole_is_refused(model, text, tmp_path):
    cut = damaged(model, tmp_path / "cut", lambda tensors: tensors.pop("lm_head.weight"))

    with pytest.raises(CheckpointError, match="no tensor 'lm_head.weight'"):
        evaluate(cut, text, sequence_length=16)


def test_weights_that_are_not_finite_are_refused(model, text, tmp_path):
    broken = damaged(model, tmp_path / "broken", lambda tensors: tensors["model.norm.weight"].fill_(math.nan))

    with pytest.raises(MeasureError, match="broken gives a loss that is not finite"):
        evaluate(broken, text, sequence_length=16)


def test_a_model_that_sees_ahead_is_refused_whatever_it_is_called(text, tmp_path):
    bert = talker(tmp_path / "bert", "bert")
    with pytest.raises(MeasureError, match="a token sees those after it"):
        evaluate(bert, text, sequence_length=16)

    edit_config(bert, architectures=["BertLMHeadModel"])
    with pytest.raises(MeasureError, match="a token sees those after it"):
        evaluate(bert, text, sequence_length=16)


def test_a_model_with_an_encoder_is_refused(text, tmp_path):
    with pytest.raises(MeasureError, match="has an encoder and a decoder"):
        evaluate(talker(tmp_path / "t5", "t5"), text)


def test_rows_longer_than_the_positions_are_refused(model, text):
    with pytest.raises(MeasureError, match="rows have 65 tokens, more than the 64 positions") as caught:
        evaluate(model, text, sequence_length=65)
    assert caught.value.hint == "Use --sequence-length 64."


def test_empty_and_missing_data_are_refused(model, tmp_path):
    with pytest.raises(DataError, match="0 tokens in"):
        evaluate(model, written(tmp_path / "a.txt", ""))
    with pytest.raises(DataError, match="0 documents in"):
        evaluate(model, written(tmp_path / "a.jsonl", ""))
    with pytest.raises(DataError, match="no such file"):
        evaluate(model, tmp_path / "b.txt")
    with pytest.raises(PlanError, match="no data"):
        surgeon.evaluate(str(model), data=[])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": "bleu"}, "unknown --metric 'bleu'"),
        ({"samples": 0}, "--samples is 0"),
        ({"sequence_length": 1}, "--sequence-length is 1"),
        ({"stride": 0}, "--stride is 0"),
        ({"sequence_length": 8, "stride": 8}, "leave the first of each without context"),
        ({"extract": "x"}, "--extract has no effect on perplexity"),
        ({"chat": True}, "--chat has no effect on perplexity"),
        ({"metric": "rouge-l", "stride": 4}, "--stride has no effect on rouge-l"),
        ({"metric": "exact-match", "extract": "("}, "--extract is no regular expression"),
    ],
)
def test_options_that_make_no_sense_are_refused(model, text, options, said):
    with pytest.raises(PlanError, match=said.replace("(", r"\(")):
        evaluate(model, text, **options)


def test_the_dict_has_only_numbers_that_json_has(model, text):
    found = evaluate(model, text, samples=2, sequence_length=16).to_dict()

    assert json.loads(json.dumps(found, allow_nan=False)) == found
