"""A command ends with the command to run next, which can be typed as it stands; and it says how long all of it took."""

import json
import shlex
import time

import pytest
import talkers

from surgeon.cli import clock

SHORT = ("--max-steps", 1, "--sequence-length", 8, "--batch-size", 1, "--device", "cpu", "--save-every", 0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return a working directory with a model that has a tokenizer, and a text."""
    monkeypatch.chdir(tmp_path)
    talkers.talker(tmp_path / "whole")
    (tmp_path / "my text.txt").write_text("the cat sat on the mat. " * 200)
    return tmp_path


def next_of(outcome):
    """Return the words after "next: surgeon", [] where there is no such line."""
    assert outcome.code == 0, outcome.err
    _, _, line = outcome.out.partition("\nnext: surgeon ")
    return shlex.split(line)


def test_a_cut_is_healed_on_the_text_that_decided_it_and_then_compared_with_its_source(here, run):
    data = ("--data", "my text.txt")
    heal = next_of(run("prune", "whole", "--layers", 4, *data, "--sequence-length", 8, "-o", "cut"))
    judge = next_of(run(*heal, *SHORT, "-o", "healed"))
    compared = run(*judge[:2], *data, *judge[4:], "--sequence-length", 8)

    assert heal == ["finetune", "cut", *data, "--teacher", "whole"]
    assert judge == ["evaluate", "healed", "--data", "held-out.txt", "--baseline", "whole"]
    assert next_of(compared) == []


def test_what_was_trained_without_a_teacher_is_compared_with_what_it_was_cut_from(here, run):
    run("truncate", "whole", "--every", 2, "-o", "cut")

    outcome = run("finetune", "cut", "--data", "my text.txt", "--eval-data", "my text.txt", *SHORT, "-o", "trained")

    assert next_of(outcome) == ["evaluate", "trained", "--data", "my text.txt", "--baseline", "whole"]


@pytest.mark.parametrize(
    ("words", "following"),
    [
        (("truncate", "whole", "--layers", 3), "finetune out --data text.txt --teacher whole"),
        (("prune", "whole", "--drop", 3), "finetune out --data text.txt --teacher whole"),
        (("grow", "whole", "--layers", 8, "--no-verify"), "finetune out --data text.txt"),
        (("gist", "whole", "--tokens", 2), "finetune out --gist --data instructions.jsonl"),
        (
            ("init", "gpt2", "--set", "n_layer=2", "--set", "n_embd=8", "--set", "n_head=2"),
            "finetune out --data text.txt",
        ),
    ],
)
def test_a_surgery_says_what_its_result_is_made_for(words, following, here, run):
    assert next_of(run(*words, "-o", "out")) == following.split()


def test_an_evaluation_alone_of_a_cut_model_offers_the_comparison(here, run):
    run("truncate", "whole", "--layers", 3, "-o", "cut")

    words = ("evaluate", "cut", "--data", "my text.txt")

    asked = (*words, "--sequence-length", "8")
    assert next_of(run(*asked)) == [*asked, "--baseline", "whole"]  # measured in the same way
    assert next_of(run("evaluate", "whole", "--data", "my text.txt", "--sequence-length", 8)) == []


def test_a_diagnosis_ends_with_the_cut_that_it_prepares(here, run):
    outcome = run("diagnose", "whole", "--data", "my text.txt", "--sequence-length", 8, "--samples", 4)

    wanted = ["prune", "whole", "--score", "block-influence", "--layers", "80%", "--data", "my text.txt"]
    assert next_of(outcome) == wanted


COLUMNS = ("--columns", "prompt=q,completion=a")


@pytest.fixture
def odd(here):
    """Return the words that name records whose columns must be chosen."""
    talkers.jsonl(here / "odd.jsonl", *[{"q": f"{word}?", "a": f"{word} is the cat"} for word in "abcdefgh"])
    return ("--data", "odd.jsonl", *COLUMNS)


def test_the_columns_of_data_go_along_into_the_next_command(odd, run):
    heal = next_of(run("prune", "whole", "--layers", 4, *odd, "--sequence-length", 8, "-o", "cut"))
    judge = next_of(run(*heal, "--eval-data", "odd.jsonl", *SHORT, "-o", "healed"))
    cut = next_of(run("diagnose", "whole", *odd, "--sequence-length", 8, "--samples", 4))

    assert heal == ["finetune", "cut", *odd, "--teacher", "whole"]
    assert judge == ["evaluate", "healed", *odd, "--baseline", "whole"]
    assert cut[-4:] == [*odd]


@pytest.mark.parametrize(
    ("classes", "following"),
    [
        ("BertForMaskedLM", "inspect out"),
        ("BertForSequenceClassification", "finetune out --data text.txt"),
        ("BertModel", "finetune out --data text.txt --teacher enc"),
    ],
)
def test_the_next_command_is_none_that_refuses_the_model(classes, following, here, run):
    import transformers

    config = transformers.BertConfig(
        vocab_size=300, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8
    )
    getattr(transformers, classes)(config).save_pretrained("enc")

    assert next_of(run("truncate", "enc", "--layers", 2, "-o", "out")) == following.split()


def test_a_trained_classifier_is_judged_as_one(here, run):
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=300, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained("enc")
    talkers.tokenizer_of().save_pretrained("enc")
    data = talkers.jsonl(here / "a.jsonl", *[{"text": word, "label": each} for each, word in enumerate(("cat", "rat"))])
    words = ("--data", data, "--eval-data", data, "--max-steps", 1, "--batch-size", 1, "--device", "cpu")

    judge = next_of(run("finetune", "enc", *words, "-o", "out"))

    assert judge == ["evaluate", "out", "--metric", "classification", "--data", data]
    assert run(*judge).code == 0


def test_a_kept_adapter_is_compared_with_its_base_and_may_be_replaced(here, run):
    words = ("finetune", "whole", "--data", "my text.txt", *SHORT, "--lora", 2, "--keep-adapter", "-o", "adapter")
    judge = next_of(run(*words))
    again = run(*words, "--overwrite", "--run-dir", "another")

    assert judge == ["evaluate", "adapter", "--data", "held-out.txt", "--baseline", "whole"]
    assert again.code == 0


def test_an_adapter_of_an_adapter_is_refused_before_it_is_trained(here, run):
    words = ("--data", "my text.txt", *SHORT, "--lora", 2, "--keep-adapter")
    run("finetune", "whole", *words, "-o", "first")

    outcome = run("finetune", "first", *words, "-o", "second")

    assert outcome.code != 0
    assert "first is an adapter, so one that is trained on it would have no base that is stored" in outcome.err
    assert "surgeon convert first -o merged" in outcome.err


def test_seconds_are_those_of_the_whole_command_and_its_parts_add_up(here, run):
    words = ("--layers", 4, "--data", "my text.txt", "--sequence-length", 8)
    outcome = run("prune", "whole", *words, "-o", "cut", "--json")

    told = json.loads(outcome.out)
    assert told["timings"].keys() == {"scoring", "measuring", "writing", "other"}
    assert sum(told["timings"].values()) == pytest.approx(told["seconds"], abs=0.003)  # each is rounded to 0.001
    assert 0 < told["timings"]["scoring"] < told["seconds"]


def test_seconds_of_a_training_that_is_only_planned_are_those_that_it_would_take(here, run):
    words = ("finetune", "whole", "--data", "my text.txt", "--sequence-length", 64, "--dry-run", "--json")
    few, many = (json.loads(run(*words, "--max-steps", steps).out) for steps in (1, 10**9))

    assert many["seconds"] > 10**6 * few["seconds"] > 0  # no command takes so long
    assert "timings" not in many


def test_a_part_inside_another_counts_once():
    clock.restart()
    with clock.part("outer"):
        busy()
        with clock.part("inner"):
            busy()
        busy()
    told = clock.timings()
    clock.restart()

    assert told["timings"]["inner"] > 0
    assert told["timings"]["outer"] > 0
    assert sum(told["timings"].values()) == pytest.approx(told["seconds"], abs=0.003)


def busy():
    """Take a little time, as the clock sees it."""
    began = time.perf_counter()
    while time.perf_counter() - began < 0.002:
        pass
