"""Greedy answers and choices between answers: by a naive loop over the plainly loaded model, and what is refused."""

import json
import math
from statistics import mean, stdev

import pytest
from later import LATER
from talkers import jsonl, talker, written

import surgeon
from surgeon.data.documents import Reading
from surgeon.errors import DataError, MeasureError, OutputError
from surgeon.evals.metrics import rouge_l
from surgeon.models.loading import load_tokenizer
from surgeon.surgery import open_source

if LATER:
    import torch
    from streamed import plain, stream
    from transformers import GenerationConfig

    from surgeon.evals.answers import prompts_of, read_records
    from surgeon.evals.choices import log_likelihoods, options_of, read_questions
    from surgeon.evals.generation import answer, continued, load_whole, stop_tokens

RECORDS = [
    {"prompt": "The cat sat", "completion": "on the mat"},
    {"instruction": "Say that", "input": "twice", "output": "that that"},
    {"question": "The rat sat on the mat, and?", "answer": "the cat"},
    {"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "the rat"}]},
    {"instruction": "é🌿", "input": "", "output": "that"},
]
PROMPTS = ["The cat sat\n", "Say that\ntwice\n", "The rat sat on the mat, and?\n", "<user>cat<assistant>", "é🌿\n"]
NEW = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return talker(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("data") / "a.jsonl", *RECORDS)


def evaluate(model, data, metric="exact-match", **options):
    limits = {} if metric == "choice" else {"max_new_tokens": NEW}
    return surgeon.evaluate(str(model), data=[str(data)], metric=metric, device="cpu", **limits | options)


def greedy(model, tokenizer, ids):
    """Return what a model says, token by token, each computed from all before it."""
    said = list(ids)
    for _ in range(NEW):
        with torch.no_grad():
            token = int(model(torch.tensor([said]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
    return tokenizer.decode(said[len(ids) :], skip_special_tokens=True)


# --- prompts ----------------------------------------------------------------------------------------------------


def test_the_prompt_is_what_stands_before_the_answer(model, records):
    tokenizer = load_tokenizer(str(model))

    found = prompts_of(read_records([records], Reading(), samples=None), tokenizer, chat=False)

    assert [prompt.text for prompt in found] == PROMPTS
    assert [prompt.reference for prompt in found] == ["on the mat", "that that", "the cat", "the rat", "that"]
    for prompt in found:
        ids = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        begin = [] if prompt.text.startswith("<user>") else [tokenizer.bos_token_id]  # a template writes its own
        assert list(prompt.ids) == begin + ids


def test_chat_puts_fields_into_the_template(model, records):
    found = prompts_of(read_records([records], Reading(), samples=2), load_tokenizer(str(model)), chat=True)

    assert [prompt.text for prompt in found] == ["<user>The cat sat<assistant>", "<user>Say that\ntwice<assistant>"]


# --- generation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3_text", "lfm2"])
def test_answers_of_a_batch_are_those_of_a_naive_loop(name, records, tmp_path):
    directory = talker(tmp_path / name, name)
    tokenizer, reference = load_tokenizer(str(directory)), plain(directory)
    prompts = [
        prompt.ids for prompt in prompts_of(read_records([records], Reading(), samples=None), tokenizer, chat=False)
    ]

    found, mixed = answer(
        load_whole(open_source(directory), "cpu"), tokenizer, prompts, max_new_tokens=NEW, batch_size=3
    )

    assert mixed
    assert found == [greedy(reference, tokenizer, ids) for ids in prompts]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3_text", "lfm2"])
def test_rows_that_have_ended_leave_their_batch_and_change_nothing_for_the_others(name, records, tmp_path):
    directory = talker(tmp_path / name, name)
    tokenizer, writer = load_tokenizer(str(directory)), load_whole(open_source(directory), "cpu")
    prompts = [
        prompt.ids for prompt in prompts_of(read_records([records], Reading(), samples=None), tokenizer, chat=False)
    ]
    endless = continued(writer, tokenizer, prompts, max_new_tokens=30, segment=30)
    writer.generation_config.eos_token_id = endless[3][6]  # what one of them says
    stops, _ = stop_tokens(writer, tokenizer)

    found = {
        segment: continued(writer, tokenizer, prompts, max_new_tokens=30, segment=segment) for segment in (1, 4, 30)
    }

    ended = {segment: [until(row, stops) for row in rows] for segment, rows in found.items()}
    assert ended[1] == ended[4] == ended[30]
    if name in ("llama", "gpt2", "bloom"):  # the caches of the others cannot be cut
        assert all(len(row) == len(until(row, stops)) for row in found[1]), "none is computed beyond its end"
    assert len(set(map(len, ended[1]))) > 1, "they end at different places"


def until(row, stops):
    """Return tokens up to the first stop token, and with it."""
    end = next((place for place, token in enumerate(row) if token in stops), len(row))
    return row[: end + 1]


def test_a_model_that_padding_confuses_gets_prompts_of_one_length(model, records):
    tokenizer, reference = load_tokenizer(str(model)), plain(model)
    deaf = load_whole(open_source(model), "cpu")
    deaf.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": None, "position_ids": None}), with_kwargs=True
    )
    prompts = [(1, 70, 71), (1, 80, 81, 82, 83, 84), (1, 72, 73)]

    found, mixed = answer(deaf, tokenizer, prompts, max_new_tokens=1, batch_size=3)

    assert not mixed
    firsts = [int(reference(torch.tensor([ids])).logits[0, -1].argmax()) for ids in prompts]
    assert found == [tokenizer.decode([token], skip_special_tokens=True) for token in firsts]


def test_what_a_checkpoint_says_of_sampling_and_penalties_is_left_aside(records, tmp_path):
    directory = talker(tmp_path / "model")
    before = evaluate(directory, records, "rouge-l").predictions
    GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=50.0, no_repeat_ngram_size=1, num_beams=1, eos_token_id=2
    ).save_pretrained(directory)

    assert evaluate(directory, records, "rouge-l").predictions == before


# --- scores -----------------------------------------------------------------------------------------------------


def test_scores_have_their_mean_and_error(model, records):
    found = evaluate(model, records, "rouge-l")

    scores = [rouge_l(entry["prediction"], entry["reference"]) for entry in found.predictions]
    assert [entry["score"] for entry in found.predictions] == scores
    assert found.scored.figures["rouge_l"].value == pytest.approx(mean(scores))
    assert found.scored.figures["rouge_l"].error == pytest.approx(stdev(scores) / math.sqrt(5))
    assert found.scored.counts == {"records": 5}


def test_exact_match_finds_what_the_model_says(model, records, tmp_path):
    said = [entry["prediction"] for entry in evaluate(model, records).predictions]
    right = [{"prompt": record["prompt"], "completion": said[0]} for record in RECORDS[:1]]
    file = jsonl(tmp_path / "b.jsonl", *right, *RECORDS[1:3])

    found = evaluate(model, file)

    assert [entry["score"] for entry in found.predictions] == [1.0, 0.0, 0.0]
    assert found.scored.figures["exact_match"].value == pytest.approx(1 / 3)
    assert found.scored.figures["exact_match"].error == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))


def test_what_is_extracted_is_compared(model, records, tmp_path):
    said = evaluate(model, records, samples=1).predictions[0]["prediction"]
    letter = next(char for char in reversed(said) if char.isalpha())
    file = jsonl(tmp_path / "b.jsonl", RECORDS[0] | {"completion": f"the answer is {letter}"})

    found = evaluate(model, file, extract=r"([^\W\d_])[\W\d_]*$")

    assert found.predictions[0]["score"] == 1
    assert found.setup["extract"] == r"([^\W\d_])[\W\d_]*$"


def test_a_reference_that_nothing_is_extracted_from_is_refused(model, records):
    with pytest.raises(DataError, match=r"a.jsonl:1: nothing in its answer matches '####"):
        evaluate(model, records, extract=r"#### (\d+)")


def test_a_baseline_answers_the_same_prompts(model, records, tmp_path):
    other = talker(tmp_path / "other", seed=1)

    found = evaluate(model, records, "rouge-l", baseline=str(other), predictions=tmp_path / "said.jsonl")

    entries = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert entries == [dict(entry) for entry in found.predictions]
    assert list(entries[0]) == ["prompt", "reference", "prediction", "score", "baseline_prediction", "baseline_score"]
    differences = [entry["score"] - entry["baseline_score"] for entry in entries]
    assert found.differences["rouge_l"].value == pytest.approx(mean(differences))
    assert found.differences["rouge_l"].error == pytest.approx(stdev(differences) / math.sqrt(5))
    scores = [mean(entry[key] for entry in entries) for key in ("score", "baseline_score")]
    assert found.recovery == (pytest.approx(100 * scores[0] / scores[1]) if scores[1] else None)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "only a text"}, "a.jsonl:1 has a text, but no answer"),
        ({"prompt": "x"}, "a.jsonl:1 has no text, only 'prompt'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the last message is of 'user'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message is the only one"),
        ({"prompt": 5, "completion": "x"}, "'prompt' is a number"),
        ({"prompt": "x " * 64, "completion": "y"}, "its prompt and 8 new tokens take"),
    ],
)
def test_records_without_an_answer_are_refused_by_line(model, tmp_path, record, said):
    with pytest.raises((DataError, MeasureError), match=said):
        evaluate(model, jsonl(tmp_path / "a.jsonl", record))


def test_a_chat_without_a_template_and_a_template_that_refuses_are_refused(tmp_path):
    chat = jsonl(tmp_path / "a.jsonl", RECORDS[3])
    with pytest.raises(DataError, match=r"a.jsonl:1 is to be a chat, and the tokenizer has no chat template"):
        evaluate(talker(tmp_path / "none", template=None), chat)
    with pytest.raises(DataError, match=r"the chat template refuses .*a.jsonl:1: no!"):
        evaluate(talker(tmp_path / "no", template="{{ raise_exception('no!') }}"), chat)


def test_a_predictions_file_that_cannot_be_written_is_refused_first(model, records, tmp_path):
    (tmp_path / "there.jsonl").write_text("mine")

    with pytest.raises(OutputError, match="there.jsonl exists"):
        evaluate(model, records, predictions=tmp_path / "there.jsonl")
    with pytest.raises(OutputError, match="no such directory"):
        evaluate(model, records, predictions=tmp_path / "no" / "a.jsonl")
    assert (tmp_path / "there.jsonl").read_text() == "mine"


def test_a_refused_evaluation_writes_nothing(model, tmp_path):
    with pytest.raises(DataError):
        evaluate(model, jsonl(tmp_path / "a.jsonl", {"text": "x"}), predictions=tmp_path / "said.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


# --- choices ----------------------------------------------------------------------------------------------------

QUESTIONS = [
    {"question": "The cat sat on the", "choices": ["mat", "rat, and that was that", "q"], "answer": 0},
    {"question": "that was ", "choices": ["the rat", "that"], "answer": "that"},
    {"question": "é", "choices": ["🌿", "cat", "— that", "sat on the mat, and the rat"], "answer": 3},
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("questions") / "q.jsonl", *QUESTIONS)


def naive_likelihood(model, tokenizer, question, choice):
    """Return ln p(choice | question), one unpadded row at a time."""
    begin = [tokenizer.bos_token_id]
    context = begin + tokenizer(question.rstrip(), add_special_tokens=False)["input_ids"]
    whole = begin + tokenizer(f"{question.rstrip()} {choice}", add_special_tokens=False)["input_ids"]
    assert whole[: len(context)] == context
    with torch.no_grad():
        logs = model(torch.tensor([whole]), use_cache=False).logits[0, :-1].log_softmax(-1)
    return sum(float(logs[place - 1, whole[place]]) for place in range(len(context), len(whole)))


def test_choices_are_picked_by_the_likelihoods_of_a_naive_loop(model, questions):
    tokenizer, reference = load_tokenizer(str(model)), plain(model)
    expected = [
        [naive_likelihood(reference, tokenizer, record["question"], choice) for choice in record["choices"]]
        for record in QUESTIONS
    ]
    read = read_questions([questions], samples=None)

    found = log_likelihoods(stream(model), [option for each in read for option in options_of(each, tokenizer)])
    result = evaluate(model, questions, "choice")

    assert found == pytest.approx([value for row in expected for value in row], rel=1e-5)
    right = [0, 1, 3]
    picks = [row.index(max(row)) for row in expected]
    shares = [
        [value / len(choice) for value, choice in zip(row, record["choices"], strict=True)]
        for row, record in zip(expected, QUESTIONS, strict=True)
    ]
    normalised = [row.index(max(row)) for row in shares]
    figures = result.scored.figures
    assert figures["accuracy"].value == pytest.approx(mean(a == b for a, b in zip(picks, right, strict=True)))
    assert figures["accuracy_normalised"].value == pytest.approx(
        mean(a == b for a, b in zip(normalised, right, strict=True))
    )
    assert [entry["prediction"] for entry in result.predictions] == [
        record["choices"][pick] for record, pick in zip(QUESTIONS, picks, strict=True)
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 3}, "'answer' is 3, which is none of its 3 choices"),
        ({"answer": -1}, "'answer' is -1"),
        ({"answer": True}, "'answer' is true"),
        ({"answer": "cat"}, "'answer' is \"cat\""),
        ({"choices": ["one"]}, "'choices' is no list of two"),
        ({"choices": ["one", 2]}, r"'choices'\[1\] is a number"),
        ({"choices": ["one", " "]}, r"'choices'\[1\] is empty"),
        ({"question": None}, "'question' is null"),
    ],
)
def test_questions_that_are_none_are_refused_by_line(model, tmp_path, change, said):
    with pytest.raises(DataError, match=f"q.jsonl:2: {said}"):
        evaluate(model, jsonl(tmp_path / "q.jsonl", QUESTIONS[0], QUESTIONS[0] | change), "choice")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "0 questions in"),
        ('{"question": "x"}', "q.jsonl:1 has no 'choices', only 'question'"),
        ("[1]", "q.jsonl:1 is no object"),
        ("{", r"q.jsonl:1:2: Expecting"),
    ],
)
def test_files_without_questions_are_refused(model, tmp_path, content, said):
    with pytest.raises(DataError, match=said):
        evaluate(model, written(tmp_path / "q.jsonl", content), "choice")


def test_a_text_has_no_questions(model, tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')

    with pytest.raises(DataError, match="a.txt is a text; questions with choices are read from records"):
        evaluate(model, written(tmp_path / "a.txt"), "choice")
    with pytest.raises(DataError, match="no such file or directory: .*missing.jsonl"):
        evaluate(model, tmp_path / "missing.jsonl", "choice")
    with pytest.raises(DataError, match="latin.jsonl is not UTF-8"):
        evaluate(model, tmp_path / "latin.jsonl", "choice")
