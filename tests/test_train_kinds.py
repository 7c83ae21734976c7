"""Training of encoder-decoders and of sequence classifiers: transformers' own loss, its gradients, and a whole run."""

import json

import pytest
from handmade import edit_config
from later import LATER
from talkers import TEXT, jsonl, talker, tokenizer_of
from test_encoder_scores import encoder
from test_evaluate_encoders import NAMES, framed

from surgeon.errors import DataError, PlanError

if LATER:
    import torch
    import toys
    import transformers

    from surgeon import finetune
    from surgeon.data.records import Document
    from surgeon.models.loading import load_tokenizer
    from surgeon.train.answering import AnswerTask
    from surgeon.train.classifying import ClassTask
    from surgeon.train.embedding import EmbeddingTask
    from surgeon.train.objective import Objective
    from surgeon.train.settings import Settings

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

PAIRS = (("what is rain?", "water"), ("who ran after the cat that sat there?", "a dog"), ("when?", "now, or never"))
LEARNS = {"max_steps": 20, "lr": "1e-3", "batch_size": 3, "eval_fraction": 0.0}
LABELLED = (("rain", "bad"), ("the cat sat and the dog ran", "good"), ("a sun", 1))


def rows_of(task, documents, tokenizer, width):
    """Return the batch that training makes of documents: one in a row, padded, its labels shifted."""
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    labels, positions = torch.full_like(ids, -100), torch.arange(width).repeat(len(documents), 1)
    for row, example in enumerate(task.examples(documents, tokenizer, first=0, length=width)):
        size = len(example.ids)
        ids[row, :size] = torch.tensor(list(example.ids))
        trained = torch.tensor(list(example.trained), dtype=torch.bool)
        labels[row, : size - 1] = torch.where(trained[1:], ids[row, 1:size], -100)
        positions[row, size:] = torch.arange(width - size)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["t5", "t5-gated", "bart"])
def test_the_loss_of_an_encoder_decoder_is_the_one_that_transformers_gives_its_labels(name, tmp_path):
    directory = talker(tmp_path / "model", name, decoder_start_token_id=0)
    framed(directory)
    tokenizer = load_tokenizer(str(directory))
    model, other = (toys.load(directory, dtype=torch.float64)[0] for _ in range(2))
    documents = [Document("here", pair) for pair in PAIRS]

    task = AnswerTask(Settings())
    task.attach(model, Objective(), None)
    found = model(**rows_of(task, documents, tokenizer, 48))
    found["loss"].backward()

    read = tokenizer([pair[0] for pair in PAIRS], padding=True, return_tensors="pt")
    labels = tokenizer([pair[1] for pair in PAIRS], padding=True, return_tensors="pt")
    expected = other(
        input_ids=read["input_ids"],
        attention_mask=read["attention_mask"],
        labels=labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100),
    ).loss
    expected.backward()
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-6)  # T5 has parts in float32
    for key, gradient in gradients(other).items():
        torch.testing.assert_close(gradients(model)[key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_the_loss_of_a_classifier_is_the_one_that_transformers_gives_its_labels(name, tmp_path):
    encoder(tmp_path / "model", name, "AutoModelForSequenceClassification", vocab_size=300, **NAMES)
    framed(tmp_path / "model")
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    kind = transformers.AutoModelForSequenceClassification
    model, other = (kind.from_pretrained(tmp_path / "model", dtype=torch.float64).eval() for _ in range(2))
    documents = [Document("here", (text,), label=label) for text, label in LABELLED]

    task = ClassTask(Settings(), classes=NAMES["id2label"])
    task.attach(model, Objective(), None)
    found = model(**rows_of(task, documents, tokenizer, 40))
    found["loss"].backward()

    read = tokenizer([text for text, _ in LABELLED], padding=True, return_tensors="pt")
    if name == "roberta":  # its positions are counted by its own padding token
        read["input_ids"] = read["input_ids"].masked_fill(read["attention_mask"] == 0, 1)
    expected = other(**read, labels=torch.tensor([0, 2, 1])).loss
    expected.backward()
    assert found["num_tokens"] == 3
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-9)
    for key, gradient in gradients(other).items():
        torch.testing.assert_close(gradients(model)[key], gradient, rtol=1e-6, atol=1e-9)


def test_a_run_of_an_encoder_decoder_learns_its_answers(tmp_path):
    directory = talker(tmp_path / "model", "t5", decoder_start_token_id=0)
    framed(directory)
    data = jsonl(tmp_path / "a.jsonl", *({"prompt": prompt, "completion": answer} for prompt, answer in PAIRS))

    finetune(directory, data=[data], output=tmp_path / "out", **LEARNS | {"lr": "1e-2"})

    lines = [json.loads(line) for line in (tmp_path / "out.run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    model, report = toys.load(tmp_path / "out")
    assert not any(report.values())
    assert type(model).__name__ == "T5ForConditionalGeneration"


def test_a_run_of_a_classifier_learns_its_classes(tmp_path):
    encoder(tmp_path / "model", "bert", "AutoModelForSequenceClassification", vocab_size=300, **NAMES)
    framed(tmp_path / "model")
    data = jsonl(tmp_path / "a.jsonl", *({"text": text, "label": label} for text, label in LABELLED))

    finetune(tmp_path / "model", data=[data], output=tmp_path / "out", **LEARNS)

    lines = [json.loads(line) for line in (tmp_path / "out.run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    _, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_loss_of_an_encoder_is_how_far_its_embeddings_are_from_the_teachers(pooling, tmp_path):
    for name in ("student", "teacher"):
        encoder(tmp_path / name, "bert", vocab_size=300, hidden_act="gelu" if name == "student" else "relu")
        framed(tmp_path / name)
    tokenizer = load_tokenizer(str(tmp_path / "student"))
    model, teacher = (
        transformers.AutoModel.from_pretrained(tmp_path / name, dtype=torch.float64).eval()
        for name in ("student", "teacher")
    )
    embeddings = []
    for each in (model, teacher):
        states = [each(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text, _ in LABELLED]
        embeddings.append(torch.stack([state[0] if pooling == "cls" else state.mean(0) for state in states]))
    expected = (embeddings[0] - embeddings[1]).square().mean(1).mean()

    task = EmbeddingTask(Settings(), pooling=pooling)
    task.attach(model, Objective(), task.teacher(teacher))
    batch = rows_of(task, [Document("here", (text,)) for text, _ in LABELLED], tokenizer, 40)
    found = model(**batch)

    assert found["num_tokens"] == 3
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_cut_sentence_embedding_model_learns_the_embeddings_that_it_had(tmp_path, run):
    model = encoder(tmp_path / "model", "bert", vocab_size=300)
    framed(model)
    (model / "modules.json").write_text('[{"idx": 1, "name": "1", "path": "1_Pooling"}]')
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true, "word_embedding_dimension": 80}')
    data = jsonl(tmp_path / "a.jsonl", *({"text": text} for text, _ in LABELLED))

    assert run("truncate", model, "--layers", 4, "-o", tmp_path / "cut").code == 0
    result = finetune(tmp_path / "cut", data=[data], output=tmp_path / "out", teacher=str(model), **LEARNS)

    lines = [json.loads(line) for line in (tmp_path / "out.run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert result.output == tmp_path / "out"
    assert "squared distance of embeddings" in result.to_text()
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert {"modules.json", "1_Pooling/config.json"} <= names
    _, report = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())


def test_a_pooling_that_is_not_known_is_refused(tmp_path):
    model = encoder(tmp_path / "model", "bert", vocab_size=300)
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    data = jsonl(tmp_path / "a.jsonl", {"text": "rain"})

    with pytest.raises(PlanError, match="pools by pooling_mode_max_tokens"):
        finetune(model, data=[data], output=tmp_path / "out", teacher=str(model), max_steps=1)


def test_records_that_do_not_fit_the_model_are_refused(tmp_path):
    tokenizer = tokenizer_of(TEXT)
    with pytest.raises(DataError, match="no prompt with an answer"):
        AnswerTask(Settings()).examples([Document("a:1", ("text",))], tokenizer, first=0, length=20)
    classes = ClassTask(Settings(), classes=NAMES["id2label"])
    with pytest.raises(DataError, match="no text with a label"):
        classes.examples([Document("a:1", ("text",))], tokenizer, first=0, length=20)
    with pytest.raises(DataError, match="'wet', which is no class"):
        classes.examples([Document("a:1", ("text",), label="wet")], tokenizer, first=0, length=20)


def test_what_is_longer_than_a_row_keeps_its_answer_and_its_last_token(tmp_path):
    encoder(tmp_path / "model", "bert", vocab_size=300)
    framed(tmp_path / "model")
    tokenizer = load_tokenizer(str(tmp_path / "model"))

    (pair,) = AnswerTask(Settings()).examples([Document("a", (TEXT, "now"))], tokenizer, first=0, length=30)
    task = ClassTask(Settings(), classes={0: "a"})
    (text,) = task.examples([Document("a", (TEXT,), label="a")], tokenizer, first=0, length=30)

    answer = tokenizer("now")["input_ids"]
    assert pair.is_cut
    assert text.is_cut
    assert list(pair.ids[-len(answer) :]) == answer
    assert pair.ids[30 - len(answer) - 1] == tokenizer.sep_token_id
    assert len(pair.ids) == len(text.ids) == 30
    assert list(text.ids[-2:]) == [tokenizer.sep_token_id, 0]
    assert list(text.trained) == [0] * 29 + [1]


@pytest.mark.parametrize(("name", "value"), [("teacher", "gpt2"), ("lora", 4)])
def test_options_without_a_meaning_for_a_classifier_are_refused(name, value, tmp_path):
    encoder(tmp_path / "model", "bert", "AutoModelForSequenceClassification", vocab_size=300, **NAMES)
    data = jsonl(tmp_path / "a.jsonl", {"text": "rain", "label": 0})

    with pytest.raises(PlanError, match=f"--{name} has no meaning for a classifier"):
        finetune(tmp_path / "model", data=[data], output=tmp_path / "out", max_steps=1, **{name: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("head", ["MaskedLM", "TokenClassification", "QuestionAnswering"])
def test_a_model_whose_loss_no_run_has_is_refused(head, tmp_path):
    directory = talker(tmp_path / "model", "bert")
    edit_config(directory, architectures=[f"BertFor{head}"])

    with pytest.raises(PlanError, match=f"is a BertFor{head}, whose loss is none that a run has"):
        finetune(directory, data=[jsonl(tmp_path / "data.jsonl", {"text": TEXT})], output=tmp_path / "out", **LEARNS)
