"""Hostile input of every kind, through the command line: a sample of what benchmarks/hostile_inputs.py runs whole.

Each run is a process of its own with `y` on its standard input. It ends with exit code 1, one error line and nothing
written, or with 0 where the input is none of its business; and no code of the input runs.
"""

import sys

import pytest
from hostile import CASES
from hostile_inputs import Workshop

RIGHT = {"refused", "harmless", "accepted"}
QUICK = ("header", "index", "no file", "pickle", "torch file", "convert")  # need no torch
# One run of so many is in the suite: of the others each takes most of a second.
SAMPLED = {
    "config of llama": 29,
    "config of gpt2": 31,
    "config of mixtral": 23,
    "config of qwen3": 23,
    "config of gemma2": 23,
    "config": 23,
    "loaded file": 11,
    "tokenizer": 23,
    "tokenizer config": 23,
    "template": 11,
    "data": 11,
}

RECORDS = [("receipt", 17), ("scores", 3), ("gist", 7), ("gist block", 5), ("run", 13)]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def kind_of(case):
    return case.name.partition(":")[0]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("hostile"))


def wrong(findings):
    return [
        f"{found.verdict}: {found.command} {found.case}: {found.error}"
        for found in findings
        if found.verdict not in RIGHT
    ]


def test_the_corpus_has_hundreds_of_distinct_inputs():
    assert len(CASES) >= 300
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("kind", QUICK)
def test_hostile_files_are_refused_in_one_line(kind, workshop):
    cases = [case for case in CASES if kind_of(case) == kind]
    runs = [(case, case.commands[number % len(case.commands)]) for number, case in enumerate(cases)]

    findings = [workshop.found(case, command) for case, command in runs]

    assert wrong(findings) == []
    assert sum(found.verdict == "refused" for found in findings) > 0.8 * len(findings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLED)
def test_hostile_models_are_refused_in_one_line(kind, workshop):
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401  # once, not in each run

    runs = [(case, command) for case in CASES if kind_of(case) == kind for command in case.commands]

    findings = [workshop.found(case, command) for case, command in runs[:: SAMPLED[kind]]]

    assert wrong(findings) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "every"), [("receipt", 7), ("scores", 2), ("gist", 6), ("gist block", 5), ("run", 12)]
)
def test_hostile_records_of_our_own_are_refused_in_one_line(kind, every, workshop):
    runs = [(case, command) for case in CASES if kind_of(case) == kind for command in case.commands]

    findings = [workshop.found(case, command) for case, command in runs[::every]]

    assert wrong(findings) == []
