"""Several tasks in one table, and recovery with its error: against bootstraps and the definition."""

from __future__ import annotations

import json
import math
import random
from statistics import mean, stdev
from typing import Any

import pytest
from talkers import jsonl, talker, written
from test_rings import modules_after

import surgeon
from surgeon.evals.compare import Estimate, Scored, estimate, mean_of, recovered, unpaired
from surgeon.evals.evaluation import Evaluation
from surgeon.evals.options import EvaluationOptions
from surgeon.evals.suite import SuiteEvaluation, SuiteOptions
from surgeon.text import plus_minus

Pairs = list[tuple[list[float], list[float]]]


def drawn(seed: int, sizes: tuple[int, ...] = (200, 400)) -> Pairs:
    """Return scores of tasks of 0 and 1, where the model is mostly right where the baseline is."""
    chance = random.Random(seed)
    tasks = []
    for number, size in enumerate(sizes):
        theirs = [float(chance.random() < 0.3 + 0.3 * number) for _ in range(size)]
        ours = [float(chance.random() < (0.8 if other else 0.1)) for other in theirs]
        tasks.append((ours, theirs))
    return tasks


# --- recovery ---------------------------------------------------------------------------------------------------


def test_recovery_is_the_ratio_of_means_over_tasks_and_no_mean_of_ratios():
    tasks: Pairs = [([1.0, 0.0] * 50, [1.0, 1.0] * 50), ([0.3] * 10, [0.4] * 10)]

    assert recovered(tasks).value == pytest.approx(100 * (0.5 + 0.3) / (1.0 + 0.4))
    assert recovered(tasks[:1]).value == pytest.approx(50)


def test_the_error_of_a_recovery_is_that_of_a_paired_bootstrap():
    tasks = drawn(1)
    chance, ratios = random.Random(2), []
    for _ in range(2000):
        picks = [[chance.randrange(len(ours)) for _ in ours] for ours, _ in tasks]
        means = [
            mean(mean(task[which][index] for index in pick) for task, pick in zip(tasks, picks, strict=True))
            for which in (0, 1)
        ]
        ratios.append(100 * means[0] / means[1])
    centre = mean(ratios)
    spread = math.sqrt(sum((ratio - centre) ** 2 for ratio in ratios) / (len(ratios) - 1))

    # 2000 draws tell a standard deviation to 1 / sqrt(4000) = 1.6 %: three of these, and 2 % for terms of second order
    assert recovered(tasks).error == pytest.approx(spread, rel=0.07)


def test_pairs_make_the_error_smaller_than_that_of_two_models_alone():
    tasks = drawn(3)
    shuffled = [(random.Random(4).sample(ours, len(ours)), theirs) for ours, theirs in tasks]

    paired, alone = recovered(tasks), recovered(shuffled)

    assert paired.value == pytest.approx(alone.value)
    assert paired.error is not None
    assert alone.error is not None
    assert paired.error < 0.8 * alone.error


def test_a_model_against_itself_recovers_all_without_an_error():
    ((_, theirs), _) = drawn(5)

    assert recovered([(theirs, theirs)]).value == 100
    assert recovered([(theirs, theirs)]).error == 0


@pytest.mark.parametrize("hits", [0, 1, 2, 3, 4, 5, 6])
def test_a_baseline_within_two_errors_of_zero_gives_a_reason_and_no_number(hits):
    theirs = [1.0] * hits + [0.0] * (100 - hits)
    ours = [1.0] * 5 + [0.0] * 95
    figure = estimate(theirs)
    assert figure.error is not None

    found = recovered([(ours, theirs)])

    assert (found.value is None) == (figure.value <= 2 * figure.error)
    assert (found.value is None) == (hits < 4), "4 of 100 is the first that is two errors above 0: .04 and 2 * .0197"
    if found.value is None:
        assert "is not two errors above 0" in str(found)


def test_the_condition_is_of_the_mean_over_tasks():
    nothing = ([1.0, 0.0] * 50, [0.0] * 100)
    good = ([1.0, 0.0] * 50, [1.0, 0.0] * 50)

    assert recovered([nothing]).value is None
    assert recovered([nothing, good]).value == pytest.approx(200)


def test_one_record_has_no_recovery_for_its_error_is_not_known():
    found = recovered([([1.0], [0.5])])

    assert (found.value, found.error) == (None, None)
    assert str(found) == "none: one record has no error; give more of them"


def test_the_share_of_two_figures_alone_has_the_error_of_independent_ones():
    """By draws of both figures, which know nothing of the formula."""
    chance = random.Random(5)
    shares = [100 * chance.gauss(0.5, 0.02) / chance.gauss(0.8, 0.03) for _ in range(20_000)]
    better = unpaired(Estimate(0.5, 0.02), Estimate(0.8, 0.03), higher_is_better=True)
    lower = unpaired(Estimate(0.8, 0.03), Estimate(0.5, 0.02), higher_is_better=False)

    assert (better.value, lower.value) == (62.5, 62.5)
    assert better.error == lower.error == pytest.approx(stdev(shares), rel=0.05)
    nothing = unpaired(Estimate(0.0, 0.01), Estimate(0.8, 0.03), higher_is_better=True)
    assert (nothing.value, nothing.error) == (0, pytest.approx(1.25))


def test_the_share_of_a_figure_without_an_error_or_close_to_zero_is_refused():
    assert unpaired(Estimate(0.5, None), Estimate(0.8, 0.03), higher_is_better=True).refused
    assert unpaired(Estimate(0.5, 0.02), Estimate(0.8, None), higher_is_better=True).refused
    far = unpaired(Estimate(0.5, 0.02), Estimate(0.1, 0.06), higher_is_better=True)
    assert far.refused == "the baseline's score, 0.100 ± 0.060, is not two errors above 0"
    assert unpaired(Estimate(0.1, 0.06), Estimate(0.5, 0.02), higher_is_better=False).value is None


def test_the_recovery_of_a_text_of_one_row_is_refused():
    scored = [Scored(name, {"perplexity": Estimate(9.0, None)}, {}, {"loss": (20.0,)}, (9,)) for name in "ab"]

    assert Evaluation.of("perplexity", scored, {}).recovered.refused == "one row has no error; give more of them"


def test_the_mean_of_estimates_has_the_error_of_independent_ones():
    found = mean_of([Estimate(1.0, 0.3), Estimate(2.0, 0.4)])

    assert (found.value, found.error) == (1.5, pytest.approx(0.25))
    assert mean_of([Estimate(1.0, 0.3), Estimate(2.0, None)]).error is None


def test_the_recovery_of_a_perplexity_has_the_error_of_the_difference_of_the_losses():
    sums, others, sizes = (30.0, 44.0, 28.0), (20.0, 30.0, 22.0), (10, 12, 10)
    scored = [
        Scored(name, {"perplexity": Estimate(math.exp(sum(of) / 32), None)}, {}, {"loss": of}, sizes)
        for name, of in (("a", sums), ("b", others))
    ]
    found = Evaluation.of("perplexity", scored, {}).recovered

    assert found is not None
    difference = (sum(sums) - sum(others)) / 32
    assert found.value == pytest.approx(100 * math.exp(-difference))
    rests = [one - other - difference * size for one, other, size in zip(sums, others, sizes, strict=True)]
    error = math.sqrt(3 / 2 * sum(rest**2 for rest in rests)) / 32
    assert found.error == pytest.approx(found.value * error)


# --- tasks as they are named ------------------------------------------------------------------------------------


def tasks_of(data: list[str], metric: str, **options: Any) -> dict[str, EvaluationOptions]:
    return SuiteOptions(data=data, metric=metric, **options).tasks


def test_each_data_has_its_metric_and_the_options_that_have_an_effect_on_it():
    found = tasks_of(
        ["a/math.jsonl[:100]", "org/set:main:test", "wiki.txt"],
        "exact-match, rouge-l,perplexity",
        extract="number",
        max_new_tokens=9,
        sequence_length=32,
        baseline="b",
    )

    assert list(found) == ["math", "set", "wiki"]
    math_task, chat, text = found.values()
    assert (math_task.data, math_task.metric, math_task.extract) == (["a/math.jsonl[:100]"], "exact-match", "number")
    assert (chat.extract, chat.max_new_tokens, chat.sequence_length) == (None, 9, None)
    assert (text.max_new_tokens, text.sequence_length) == (None, 32)
    assert {task.baseline for task in found.values()} == {"b"}


def test_tasks_of_one_name_are_told_apart():
    assert list(tasks_of(["a/x.jsonl", "b/x.jsonl"], "choice,rouge-l")) == ["x choice", "x rouge-l"]
    assert list(tasks_of(["a/x.jsonl", "b/x.jsonl"], "choice,choice")) == ["x choice 1", "x choice 2"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--data", "x.jsonl", "--metric", "rouge-l,choice"), "has 2 metrics for 1 --data"),
        (("--data", "x", "--data", "y", "--data", "z", "--metric", "rouge-l,choice"), "has 2 metrics for 3 --data"),
        (
            ("--data", "x", "--data", "y", "--metric", "rouge-l,choise"),
            "unknown --metric 'choise'; did you mean choice?",
        ),
        (
            ("--data", "x", "--data", "y", "--metric", "rouge-l,choice", "--extract", "number"),
            "no effect on rouge-l and",
        ),
        (("--data", "x", "--data", "y", "--metric", "rouge-l,choice", "--judge", "j"), "goes with one metric"),
        (("--data", "x", "--data", "y", "--metric", "rouge-l,choice", "--gist"), "does not go with --gist"),
        (("--tasks", "arc_easy", "--metric", "rouge-l,choice"), "does not go with --tasks"),
    ],
)
def test_wrong_tasks_are_usage_errors_before_anything_heavy_is_imported(options, what, run):
    outcome = run("evaluate", "model", *options)

    assert outcome.code == 2
    assert what in " ".join(outcome.err.replace("│", " ").split())
    code = (
        "import sys\nfrom surgeon.cli.app import main\n"
        f"sys.argv = ['surgeon', 'evaluate', 'model', *{options!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as done:\n    assert done.code == 2"
    )
    assert modules_after(code) == set()


# --- suites that are run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return talker(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return talker(tmp_path_factory.mktemp("model") / "other", seed=1)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    choices = [
        {"question": f"The {word}", "choices": ["sat", "cat", "q"], "answer": index % 3}
        for index, word in enumerate(("cat", "rat", "mat", "hat", "bat", "that"))
    ]
    sums = [{"question": f"{index} + 1", "answer": f"#### {index + 1}"} for index in range(4)]
    data = [jsonl(place / "pick.jsonl", *choices), jsonl(place / "sum.jsonl", *sums), written(place / "text.txt")]
    options = {"extract": "number", "max_new_tokens": 3, "sequence_length": 16, "device": "cpu"}
    return {"data": data, "metric": "choice,exact-match,perplexity", **options}


def test_a_suite_is_each_task_by_itself_and_the_mean_over_those_with_scores(model, other, tasks):
    found = surgeon.evaluate_suite(str(model), **tasks, baseline=str(other), samples=5)

    assert {name: of.metric for name, of in found.evaluations.items()} == {
        "pick": "choice", "sum": "exact-match", "text": "perplexity"
    }  # fmt: skip
    counts = [of.scored.counts for of in found.evaluations.values()]
    assert [counts[0]["records"], counts[1]["records"], counts[2]["rows"]] == [5, 4, 5]
    alone = surgeon.evaluate(
        str(model), data=tasks["data"][:1], metric="choice", baseline=str(other), samples=5, device="cpu"
    )
    assert found.evaluations["pick"].scored == alone.scored
    scores = [found.evaluations[name].scored.figures for name in ("pick", "sum")]
    assert found.mean is not None
    assert found.mean.value == pytest.approx((scores[0]["accuracy"].value + scores[1]["exact_match"].value) / 2)
    assert found.notes[0] == "not in the mean: text"


def made(name: str, ours: list[float], theirs: list[float] | None) -> Evaluation:
    scored = [
        Scored(label, {name: estimate(scores)}, {"records": len(scores)}, {name: tuple(scores)})
        for label, scores in (("m", ours), ("b", theirs))
        if scores is not None
    ]
    return Evaluation.of(name.replace("_", "-"), scored, {"data": ["d"], "dtype": "float32"})


def test_the_table_and_the_object_hold_the_mean_its_difference_and_the_recovery():
    (first, second) = drawn(6, (50, 80))
    found = SuiteEvaluation({"one": made("exact_match", *first), "two": made("rouge_l", *second)})

    told = found.to_dict()

    means = [mean([mean(first[index]), mean(second[index])]) for index in (0, 1)]
    assert told["mean"] == pytest.approx(means[0])
    assert told["baseline"]["mean"] == pytest.approx(means[1])
    assert told["differences"]["mean"]["value"] == pytest.approx(means[0] - means[1])
    assert told["recovery"] == pytest.approx(100 * means[0] / means[1])
    assert told["recovery_error"] == recovered([first, second]).error
    assert told["tasks"]["one"]["recovery"] == pytest.approx(100 * mean(first[0]) / mean(first[1]))
    json.dumps(told)
    lines = found.to_text().splitlines()
    assert lines[0].split() == ["task", "metric", "records", "model", "baseline", "difference", "z", "recovery"]
    assert lines[3].split()[0] == "mean"
    assert f"{plus_minus(told['recovery'], told['recovery_error'])} %" in lines[3]
    assert "of the means over tasks" in found.to_text()
    assert f"| mean |  |  | {plus_minus(means[0], told['mean_error'])} | " in found.to_markdown()


def test_a_recovery_that_is_refused_says_so_in_the_table_and_the_object():
    found = SuiteEvaluation({"one": made("exact_match", [1.0, 0.0] * 5, [0.0] * 10)})

    assert found.to_dict()["recovery"] is None
    assert "is not two errors above 0" in found.to_dict()["recovery_refused"]
    assert "recovery  none: the baseline's mean, 0 ± 0, is not two errors above 0" in found.to_text()


def test_without_a_baseline_there_is_a_mean_alone():
    found = SuiteEvaluation({"one": made("exact_match", [1.0, 0.0], None)})

    assert "recovery" not in found.to_dict()
    assert found.to_dict()["mean"] == 0.5
    assert found.to_text().splitlines()[0].split() == ["task", "metric", "records", "model"]


def test_tasks_from_the_command_line(run, model, tasks, tmp_path):
    words: list[Any] = [word for data in tasks["data"] for word in ("--data", data)]
    words += ["--metric", tasks["metric"], "--extract", "number", "--max-new-tokens", 3, "--sequence-length", 16]
    said = tmp_path / "said.jsonl"

    plain = run("evaluate", model, *words, "--device", "cpu", "--baseline", model)
    told = json.loads(run("evaluate", model, *words, "--device", "cpu", "--predictions", said, "--json").out)

    assert plain.code == 0, plain.err
    assert [line.split()[0] for line in plain.out.splitlines()[:5]] == ["task", "pick", "sum", "text", "mean"]
    assert list(told["tasks"]) == ["pick", "sum", "text"]
    entries = [json.loads(line) for line in said.read_text().splitlines()]
    assert [entry["task"] for entry in entries] == ["pick"] * 6 + ["sum"] * 4


# --- numbers ----------------------------------------------------------------------------------------------------


def test_extract_number_compares_final_numbers_by_value(model, tmp_path):
    found = surgeon.evaluate(
        str(model),
        data=[jsonl(tmp_path / "a.jsonl", {"prompt": "x", "completion": "1,000 in all.\n#### 1,000.0"})],
        metric="exact-match",
        extract="number",
        max_new_tokens=4,
        device="cpu",
    )

    assert found.setup["extract"] == "number"
    assert found.predictions[0]["score"] == 0


@pytest.mark.parametrize("answer", ["It is $1,000.", "1000", "500 + 500 = 1000.0", "#### 1000, not 3"])
def test_answers_with_the_same_number_are_one(answer):
    extractor = EvaluationOptions(data=["a"], metric="exact-match", extract="number").extractor

    assert extractor is not None
    assert extractor(answer) == extractor("so\n#### 1,000.00") == "1000"
    assert extractor(f"{answer} or 7") == ("1000" if "####" in answer else "7")


def test_a_reference_without_a_number_is_an_error(model, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", {"prompt": "x", "completion": "none at all"})

    with pytest.raises(surgeon.DataError, match="nothing in its answer matches 'number'"):
        surgeon.evaluate(
            str(model), data=[data], metric="exact-match", extract="number", max_new_tokens=4, device="cpu"
        )
