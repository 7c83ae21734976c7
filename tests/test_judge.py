"""Pairs of answers judged by a local model: what its verdicts come to, what it is asked, and how it is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import talkers
from later import LATER
from tokenizers import Regex, normalizers

import surgeon
from surgeon.errors import DataError, MeasureError, PlanError
from surgeon.evals.judge import ASK, LABELS, Case, Judge, likelihoods, read_cases
from surgeon.evals.verdicts import FIRST, LOSS, NEITHER, SECOND, TIE, WIN, Judgement, Verdict
from surgeon.surgery import open_source

if LATER:
    import torch
    from streamed import plain

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = 1024  # positions: what is asked takes some 300 of the toys' tokens
PROMPTS = ["The cat?", "The rat sat on the mat, and?", "é🌿", "That?", "Sat on"]
ANSWERS = ["the cat sat", "on the mat", "that that", "the cat", "mat"]
OTHERS = ["the rat", "on the cat and on the rat", "that", " the cat\n", "é🌿"]
CASES = [Case(f"d.jsonl:{number}", prompt) for number, prompt in enumerate(PROMPTS, start=1)]


def judgement(*pairs: tuple[str, str] | None) -> Judgement:
    return Judgement("judge", tuple(Verdict() if pair is None else Verdict(*pair) for pair in pairs))


def longer(directory: Path, name: str = "llama", **how: Any) -> Path:
    key = "n_positions" if name == "gpt2" else "max_position_embeddings"
    return talkers.talker(directory, name, **{key: LONG} | how)


def partial_to(directory: Path, letter: str) -> Path:
    """Return a checkpoint that finds one token likeliest whatever it reads: its last norm puts out that token's row."""
    longer(directory, "gpt2")
    model = plain(directory)
    (token,) = Judge(open_source(directory), "cpu").tokenizer(letter, add_special_tokens=False)["input_ids"]
    row = model.transformer.wte.weight.data[token]
    model.transformer.ln_f.weight.data.zero_()
    model.transformer.ln_f.bias.data = 100 * row / row.norm()
    model.save_pretrained(directory)
    return directory


if LATER:

    class Reader(torch.nn.Module):
        """A model that prefers the letter of the one answer that has a word, and C where both have it or neither."""

        def __init__(self, tokenizer: Any, word: str) -> None:
            super().__init__()
            self.tokenizer, self.word, self.device = tokenizer, word, torch.device("cpu")
            self.batches: list[list[list[int]]] = []

        def forward(self, ids: torch.Tensor, use_cache: bool, logits_to_keep: torch.Tensor) -> Any:
            self.batches.append(ids.tolist())
            logits = torch.zeros(*ids.shape, talkers.VOCABULARY)
            for row, text in enumerate(self.tokenizer.batch_decode(ids)):
                first, second = text.split("Answer A:")[1].split("Which answer")[0].split("Answer B:")
                has = self.word in first, self.word in second
                letter = {(True, False): "A", (False, True): "B"}.get(has, "C")
                logits[row, :, self.tokenizer.convert_tokens_to_ids(letter)] = 5.0
            return SimpleNamespace(logits=logits[:, logits_to_keep])


@pytest.fixture(scope="module")
def toy_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return longer(tmp_path_factory.mktemp("judge") / "llama")


@pytest.fixture(scope="module")
def first_is_best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return partial_to(tmp_path_factory.mktemp("judge") / "first", "A")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    return talkers.jsonl(tmp_path_factory.mktemp("data") / "d.jsonl", *rows)


# --- what verdicts come to --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [FIRST, SECOND, NEITHER])
@pytest.mark.parametrize("behind", [FIRST, SECOND, NEITHER])
def test_a_win_takes_both_orders_and_all_else_but_a_loss_is_a_tie(ahead, behind):
    expected = {(FIRST, SECOND): WIN, (SECOND, FIRST): LOSS}.get((ahead, behind), TIE)

    found = Verdict(ahead, behind)

    assert found.outcome == expected
    assert found.agreed == (expected != TIE or ahead == behind == NEITHER)


def test_ties_count_one_half_with_the_error_over_pairs():
    found = judgement((FIRST, SECOND), (FIRST, SECOND), (FIRST, FIRST), (SECOND, FIRST), None)

    assert found.scores == (1, 1, 0.5, 0, 0.5)
    assert [found.count(outcome) for outcome in (WIN, TIE, LOSS)] == [2, 2, 1]
    assert found.win_rate.value == 0.6
    assert found.win_rate.error == pytest.approx(math.sqrt(0.7 / 4 / 5))  # by hand: squares of .4 .4 .1 .6 .1
    assert found.consistent == 3 / 4  # of those asked
    assert (found.share(FIRST), found.share(SECOND), found.share(NEITHER)) == (5 / 8, 3 / 8, 0)
    assert found.chance == 2 * 5 / 8 * 3 / 8


def test_a_judge_that_looks_at_places_alone_is_called_worthless():
    for place in (FIRST, SECOND, NEITHER):
        (note,) = judgement(*[(place, place)] * 50).notes
        assert "say nothing" in note
    mixed = [(FIRST, FIRST)] * 16 + [(FIRST, SECOND)] * 12 + [(SECOND, FIRST)] * 12 + [(SECOND, SECOND)] * 10
    assert judgement(*mixed).consistent == 0.48
    assert judgement(*mixed).notes
    assert judgement(*[(FIRST, SECOND)] * 2).notes  # two tosses of a coin
    assert not judgement(*[(FIRST, SECOND)] * 20).notes
    assert not judgement(*[(FIRST, SECOND)] * 30, *[(FIRST, FIRST)] * 20).notes


def test_pairs_that_are_all_the_same_are_ties_and_say_so():
    found = judgement(None, None)

    assert (found.win_rate.value, found.win_rate.error) == (0.5, 0)
    assert (found.consistent, found.chance, found.share(FIRST)) == (None, None, None)
    assert found.notes == ("both answers of every pair are the same: the judge was not asked",)
    assert "0 wins, 2 ties, 0 losses" in found.to_text()


# --- what is asked ----------------------------------------------------------------------------------------------


def test_records_are_shown_without_their_answer_and_without_a_template(tmp_path):
    chat = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")]
    data = talkers.jsonl(
        tmp_path / "d.jsonl",
        {"instruction": "Say", "input": "that", "output": "that"},
        {"messages": chat[1:3]},
        {"messages": chat},
        {"prompt": "left out", "completion": "."},
    )

    found = read_cases([data], samples=3)

    assert [case.prompt for case in found] == ["Say\nthat", "u", "system: s\n\nuser: u\n\nassistant: a\n\nuser: u"]
    assert [case.where for case in found] == [f"{data}:{line}" for line in (1, 2, 3)]


@pytest.mark.parametrize(
    ("template", "begin", "end"),
    [(talkers.TEMPLATE, "<user>", "<assistant>{}"), (None, "<s>", "\n\nReply: {}")],
)
def test_the_judge_is_asked_in_its_template_or_in_plain_text(tmp_path, template, begin, end):
    seat = Judge(open_source(longer(tmp_path / "judge", template=template)), "cpu")

    asked = seat.question(CASES[0], "one", "two")

    question = begin + ASK.format(prompt="The cat?", first="one", second="two")
    told = [seat.tokenizer.decode([*asked.shared, *label]) for label in asked.labels]
    assert told == [question + end.format(letter) for letter in "ABC"]
    assert set(asked.rows) == {asked.shared}


def test_answers_cannot_end_their_place_with_the_judges_special_tokens(toy_judge):
    seat = Judge(open_source(toy_judge), "cpu")

    asked = seat.question(CASES[0], "on<e<end>nd>e<s>", "two")

    assert asked == seat.question(CASES[0], "one", "two")


def test_a_tokenizer_that_cannot_tell_the_letters_is_refused(toy_judge):
    seat = Judge(open_source(toy_judge), "cpu")
    seat.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("[ABC]"), "x")

    with pytest.raises(MeasureError, match="the same tokens of A and B and C"):
        seat.question(CASES[0], "one", "two")


# --- how it is read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3_text", "lfm2"])
def test_likelihoods_are_those_of_each_row_alone(name, tmp_path):
    """Padded batches, and labels of one token and of several, against the plainly loaded model."""
    model = plain(talkers.talker(tmp_path / name, name))
    wanted = {
        tuple(range(40, 52)): {(60,), (61,)},
        tuple(range(70, 75)): {(70, 62), (74, 63)},
        tuple(range(30, 39)): {(64,), (38, 65), (37, 38, 66)},
    }

    found = likelihoods(model, wanted, batch_size=2)

    for row, labels in wanted.items():
        logs = model(torch.tensor([row]), use_cache=False).logits[0].detach().double().log_softmax(-1)
        for label in labels:
            expected = sum(float(logs[len(row) - len(label) + at, token]) for at, token in enumerate(label))
            assert found[row, label] == pytest.approx(expected, rel=1e-5)  # float32, padded


def test_a_real_model_is_read_as_a_naive_loop_reads_it(toy_judge):
    seat, model = Judge(open_source(toy_judge), "cpu"), plain(toy_judge)

    found = seat.compare(CASES, ANSWERS, OTHERS, batch_size=3)

    for case, one, other, verdict in zip(CASES, ANSWERS, OTHERS, found.verdicts, strict=True):
        taken = []
        for first, second in ((one, other), (other, one)):
            text = seat.tokenizer.apply_chat_template(
                [{"role": "user", "content": ASK.format(prompt=case.prompt, first=first, second=second.strip())}],
                tokenize=False,
                add_generation_prompt=True,
            )
            ids = seat.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            logits = model(ids).logits[0, -1].detach()
            best = max(LABELS, key=lambda letter: float(logits[seat.tokenizer.convert_tokens_to_ids(letter)]))
            taken.append(LABELS[best])
        assert (verdict == Verdict()) if one == other.strip() else (verdict == Verdict(*taken))


def test_a_judge_that_knows_what_is_better_is_believed(toy_judge):
    seat = Judge(open_source(toy_judge), "cpu")
    seat.model = Reader(seat.tokenizer, "cat")
    cases = [Case(f"d:{number}", "Who?") for number in range(20)]
    answers = [f"the cat {number}" for number in range(8)] + [f"the rat {number}" for number in range(12)]
    others = [f"a rat {number}" for number in range(12)] + [f"a cat {number}" for number in range(8)]

    found = seat.compare(cases, answers, others)

    assert [found.count(outcome) for outcome in (WIN, TIE, LOSS)] == [8, 4, 8]
    assert found.consistent == 1
    assert found.share(FIRST) == found.share(SECOND) == 0.4
    assert found.win_rate.value == 0.5
    assert not found.notes


@pytest.mark.parametrize(("letter", "place"), [("A", FIRST), ("B", SECOND), ("C", NEITHER)])
def test_a_judge_of_places_gives_every_pair_a_tie(tmp_path, letter, place):
    path = partial_to(tmp_path / letter, letter)

    found = surgeon.judge_answers(path, PROMPTS[:3], ANSWERS[:3], OTHERS[:3], device="cpu")

    assert found.verdicts == (Verdict(place, place),) * 3
    assert found.win_rate.value == 0.5
    assert found.consistent == float(place == NEITHER)
    assert found.notes


def test_sets_that_change_places_change_their_win_rate_exactly(toy_judge):
    seat = Judge(open_source(toy_judge), "cpu")
    answers = [f"{word} {number}" for number in range(8) for word in ("the cat", "é🌿")]
    others = [f"on the {word} sat {number}" for number in range(8) for word in ("mat", "rat")]
    cases = [Case(f"d:{number}", PROMPTS[number % 5]) for number in range(16)]

    found = seat.compare(cases, answers, others, batch_size=3)
    mirrored = seat.compare(cases, others, answers, batch_size=3)

    assert mirrored.verdicts == tuple(Verdict(verdict.behind, verdict.ahead) for verdict in found.verdicts)
    assert mirrored.scores == tuple(1 - score for score in found.scores)
    assert len(set(found.verdicts)) > 1  # it does read what it is given


def test_sets_that_change_places_are_read_in_the_very_same_batches(toy_judge):
    """So rounding, which may depend on what shares a batch, cannot tell them apart."""
    seat, batches = Judge(open_source(toy_judge), "cpu"), []
    for sets in (ANSWERS, OTHERS), (OTHERS, ANSWERS):
        seat.model = Reader(seat.tokenizer, "cat")
        seat.compare(CASES, *sets, batch_size=3)
        batches.append(seat.model.batches)

    assert batches[0] == batches[1]
    assert [len(batch) for batch in batches[0]] == [3, 3, 2]


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_batch_size_does_not_matter(toy_judge, batch_size):
    seat = Judge(open_source(toy_judge), "cpu")

    assert seat.compare(CASES, ANSWERS, OTHERS, batch_size=batch_size) == seat.compare(CASES, ANSWERS, OTHERS)


def test_answers_that_are_the_same_are_not_asked_about(toy_judge):
    seat = Judge(open_source(toy_judge), "cpu")

    found = seat.compare(CASES, ANSWERS, [f" {answer}\n" for answer in ANSWERS])

    assert found.verdicts == (Verdict(),) * len(CASES)
    assert "model" not in vars(seat)  # its weights were never read


def test_a_judge_of_broken_weights_is_refused(toy_judge):
    seat = Judge(open_source(toy_judge), "cpu")
    seat.model = plain(toy_judge)
    seat.model.lm_head.weight.data[0] = math.nan

    with pytest.raises(MeasureError, match="not finite"):
        seat.compare(CASES, ANSWERS, OTHERS)


@pytest.mark.parametrize(
    ("prompts", "answers", "said"), [(["a"], [], "1 prompts, 0 answers and 0 others"), ([], [], "no answers to judge")]
)
def test_lists_that_make_no_pairs_are_refused(toy_judge, prompts, answers, said):
    with pytest.raises(DataError, match=said):
        surgeon.judge_answers(toy_judge, prompts, answers, answers)


def test_a_pair_that_is_longer_than_the_judge_sees_is_named(toy_judge):
    with pytest.raises(MeasureError, match=r"prompt 1: .* takes \d{4} tokens, more than the 1024 positions"):
        surgeon.judge_answers(toy_judge, PROMPTS[:2], ["a", "b" * LONG], ["b", "a"], device="cpu")


# --- beside a baseline ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("models")
    return talkers.talker(place / "one"), talkers.talker(place / "other", seed=1)


def test_what_two_models_wrote_is_judged(models, records, toy_judge, tmp_path):
    said = tmp_path / "said.jsonl"

    found = surgeon.evaluate(
        models[0],
        data=[records],
        metric="rouge-l",
        baseline=models[1],
        judge=toy_judge,
        max_new_tokens=6,
        device="cpu",
        predictions=said,
    )

    kept = [json.loads(line) for line in said.read_text().splitlines()]
    answers, others = ([entry[key] for entry in kept] for key in ("prediction", "baseline_prediction"))
    expected = surgeon.judge_answers(toy_judge, PROMPTS, answers, others, device="cpu")
    assert found.judgement == expected
    assert [entry["verdict"] for entry in kept] == [verdict.outcome for verdict in expected.verdicts]
    assert [entry["taken"] for entry in kept] == [[verdict.ahead, verdict.behind] for verdict in expected.verdicts]
    assert found.scored.figures["win_rate"] == expected.win_rate
    assert found.baseline.figures["win_rate"].value == 1 - expected.win_rate.value
    assert found.differences["win_rate"].value == pytest.approx(2 * expected.win_rate.value - 1)
    assert list(found.scored.figures) == ["rouge_l", "win_rate"]  # the first is what recovery is of


def test_the_command_prints_win_rate_verdicts_and_what_the_judge_is_worth(models, records, first_is_best, run):
    words = ("--data", records, "--metric", "rouge-l", "--max-new-tokens", 4, "--device", "cpu")
    words = ("evaluate", models[0], *words, "--baseline", models[1], "--judge", first_is_best)

    plain_text, card, told = (run(*words, *more).out for more in ((), ("--markdown",), ("--json",)))

    found = json.loads(told)
    assert found["win_rate"] == found["baseline"]["win_rate"] == found["judge"]["win_rate"] == 0.5
    judge = found["judge"]
    assert (judge["model"], judge["wins"], judge["ties"], judge["losses"]) == (str(first_is_best), 0, 5, 0)
    assert (judge["consistent"], judge["chance"], judge["first"], judge["second"]) == (0, 0, 1, 0)
    assert "say nothing" in judge["notes"][0]
    assert "win rate" in plain_text
    assert "verdicts  0 wins, 5 ties, 0 losses; the same when swapped in 0% (chance 0%)" in plain_text
    assert "say nothing" in plain_text
    assert "| win rate | 0.5 ± 0 | 0.5 ± 0 |" in card
    assert "Judged by first, one against other: 0 wins, 5 ties" in card
    assert "say nothing." in card


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--baseline", "x"),
        ("--metric", "choice", "--baseline", "x"),
        ("--metric", "rouge-l"),
        ("--tasks", "arc_easy"),
    ],
)
def test_a_judge_without_two_sets_of_answers_is_bad_usage(models, records, run, options):
    data = () if "--tasks" in options else ("--data", records)

    outcome = run("evaluate", models[0], *data, "--judge", "j", *options)

    assert outcome.code == 2
    assert "--judge" in outcome.err


def test_python_refuses_it_too(models, records):
    with pytest.raises(PlanError, match="--judge compares with --baseline"):
        surgeon.evaluate(models[0], data=[records], metric="rouge-l", judge=models[0])
    with pytest.raises(PlanError, match="--judge has no effect on perplexity"):
        surgeon.evaluate(models[0], data=[records], baseline=models[1], judge=models[0])


def test_a_prompt_that_is_too_long_for_the_judge_stops_before_anything_is_written(models, records, tmp_path):
    said = tmp_path / "said.jsonl"
    options: dict[str, Any] = {"data": [records], "metric": "rouge-l", "baseline": models[1], "max_new_tokens": 6}
    with pytest.raises(MeasureError, match=r"d\.jsonl:1: .* more than the 64 positions of the judge"):
        surgeon.evaluate(models[0], **options, judge=models[0], predictions=said, device="cpu")
    assert not said.exists()


# --- beside a gist ----------------------------------------------------------------------------------------------


def test_gist_and_no_prompt_are_judged_against_the_full_prompt(models, records, toy_judge, tmp_path, run):
    surgeon.add_gist(models[0], tokens=2).save(tmp_path / "gisted")
    said = tmp_path / "said.jsonl"
    words = ("evaluate", tmp_path / "gisted", "--gist", "--data", records, "--judge", toy_judge)
    words = (*words, "--max-new-tokens", 6, "--device", "cpu")

    told = json.loads(run(*words, "--json", "--predictions", said).out)

    kept = [json.loads(line) for line in said.read_text().splitlines()]
    full = [entry["full"] for entry in kept]
    assert (told["full"]["win_rate"], told["full"]["win_rate_error"]) == (0.5, 0)
    for form in ("gist", "none"):
        expected = surgeon.judge_answers(toy_judge, PROMPTS, [entry[form] for entry in kept], full, device="cpu")
        assert told["judge"][form] == expected.to_dict()
        assert told[form]["win_rate"] == expected.win_rate.value
        assert [entry[f"{form}_verdict"] for entry in kept] == [verdict.outcome for verdict in expected.verdicts]
    assert told["judge"]["model"] == str(toy_judge)
    table = run(*words).out
    assert "win rate" in table
    assert "no prompt" in table.split("  judge  ")[1]
    assert "gist against full prompt: " in run(*words, "--markdown").out
