"""The checks of a rewritten answer, each with one that passes and one that fails, and the prompts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from surgeon.data import records
from surgeon.errors import DataError
from surgeon.evals.metrics import final_number
from surgeon.rewriting.checks import Checks, copied
from surgeon.rewriting.prompts import FORMS, Row, form_of, row_of

SOLVED = {"question": "12 and 60?", "answer": "12 + 60 = <<12+60=72>>72\n#### 72"}
TOLD = {"instruction": "Name a sea.", "input": "", "output": "The Baltic Sea is a sea in the north of Europe."}


def row(record: dict[str, Any]) -> Row:
    return row_of(records.form_of(record, "a.jsonl:1").document(record, "a.jsonl:1"))


def fault(answer: str, record: dict[str, Any] = TOLD, *, is_finished: bool = True, **checks: Any) -> str | None:
    return Checks(**checks).fault(answer, row(record), is_finished=is_finished)


# --- checks -----------------------------------------------------------------------------------------------------


def test_an_answer_about_as_long_passes_and_nothing_does_not():
    assert fault("One sea is the Baltic Sea, north in Europe.") is None
    assert fault("") == "empty"


def test_an_answer_that_was_cut_off_fails():
    assert fault("One sea is the Baltic Sea, north in", is_finished=False) == "truncated"


@pytest.mark.parametrize(
    "leak",
    [
        "As the Reference Answer says, the Baltic Sea.",
        "Here is your response: the Baltic Sea.",
        "My response is the Baltic Sea.",
        "Now it's your turn: the Baltic Sea.",
        "Your turn! The Baltic Sea.",
        "The Baltic Sea.\n### Response:",
        "### Instruction: name a sea. The Baltic Sea.",
    ],
)
def test_an_answer_that_speaks_of_its_task_fails(leak):
    assert fault(leak) == "leak"


def test_words_of_the_reject_list_count_only_as_they_stand_in_it():
    assert fault("It is your turn to name the Baltic Sea.") is None
    assert fault("For reference, answer: the Baltic Sea.") is None


@pytest.mark.parametrize("answer", ["So 12 + 60 = 72.", "The answer is 72.0", "#### 72", "$72", "It is 72 in all"])
def test_a_solution_with_the_same_number_passes_at_any_length(answer):
    assert fault(answer, SOLVED) is None
    assert fault(answer + " well" * 200, SOLVED) is None


@pytest.mark.parametrize("answer", ["So 12 + 60 = 73.", "72 is not it, but 71", "It is more.", "-72", "#### 71\n72"])
def test_a_solution_with_another_number_fails(answer):
    assert fault(answer, SOLVED) == "answer"


def test_a_number_is_looked_for_in_any_answer_where_it_is_asked_for():
    record = {"prompt": "How many?", "completion": "There are 1,000 of them."}

    assert fault("There are 1000.", record, check="number") is None
    assert fault("There are 100.", record, check="number") == "answer"
    assert fault("There are 100 of these.", record) is None  # auto: no number is marked


def test_a_regular_expression_is_searched_in_both():
    record = {"prompt": "Which?", "completion": "It is well known. Answer: (B)"}

    assert fault("Answer: (A), no, Answer: (B)", record, check=r"Answer: \((\w)\)") is None
    assert fault("Answer: (B), no, Answer: (A)", record, check=r"Answer: \((\w)\)") == "answer"
    assert fault("B", record, check=r"Answer: \((\w)\)") == "answer"


def test_without_a_check_a_solution_is_a_free_text():
    assert fault("It is much more than that, 12.", SOLVED, check="none") is None


@pytest.mark.parametrize(("share", "found"), [(0.29, "length"), (0.31, None), (2.99, None), (3.01, "length")])
def test_a_free_text_much_shorter_or_longer_than_the_reference_fails(share, found):
    record = {"prompt": "Write.", "completion": "x" * 1000}

    assert fault("y" * round(1000 * share), record) == found


def test_a_copy_fails_only_where_that_is_asked_for():
    words = "The Baltic Sea is a sea in the north of Europe"  # 10 words: 3 runs of 8

    assert fault(words) is None
    assert fault(words, most_copied=0.8) == "copied"
    assert fault("The Baltic Sea is a cold sea in the north of Europe", most_copied=0.8) is None


def test_the_share_that_is_copied_counts_runs_of_eight_words():
    words = "one two three four five six seven eight nine ten"

    assert copied(words, words) == 1
    assert copied(words + " more", words) == 3 / 4
    assert copied("one two", words) == 1
    assert copied("two one", words) == 0
    assert copied("", words) == 0


def test_a_reference_without_what_is_compared_is_an_error_that_names_the_record():
    Checks("number").check_row(row(SOLVED))
    with pytest.raises(DataError, match="a.jsonl:1 has no number in its answer"):
        Checks("number").check_row(row(TOLD))
    with pytest.raises(DataError, match="nothing in its answer that matches"):
        Checks("Answer: (.)").check_row(row(TOLD))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("a <<48/2=24>>24\n#### 1,000", "1000"),
        ("#### $1,234.50 in all 9", "1234.5"),
        ("#### 5\n#### 6", "6"),
        ("#### none: 5", "5"),
        ("1000.0", "1000"),
        ("5-3 = 2.", "2"),
        ("8-5", "5"),
        ("10 - 7", "7"),
        ("x is -3.", "-3"),
        ("\u22124", "-4"),
        ("costs -$5", "-5"),
        (".5", "0.5"),
        ("1,2345", "2345"),
        ("007", "7"),
        ("-0", "0"),
        ("none", None),
        ("", None),
    ],
)
def test_the_final_number_is_the_marked_one_or_the_last_in_one_form(text, number):
    assert final_number(text) == number


# --- rows and prompts -------------------------------------------------------------------------------------------


def test_a_row_gets_another_answer_and_keeps_all_else():
    for record, answered in (
        (TOLD | {"source": "x"}, TOLD | {"source": "x", "output": "new"}),
        (SOLVED, SOLVED | {"answer": "new"}),
        ({"prompt": "a", "completion": "b", "id": 3}, {"prompt": "a", "completion": "new", "id": 3}),
    ):
        assert row(record).answered("new") == answered


def test_the_last_turn_of_a_chat_is_rewritten_and_the_earlier_ones_stay():
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "name": "bot"},
    ]
    found = row({"messages": turns, "id": 1})

    assert (found.instruction, found.reference, list(found.before)) == ("c", "d", turns[:3])
    assert found.answered("new") == {"messages": [*turns[:4], {**turns[4], "content": "new"}], "id": 1}


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"text": "a"}, "no answer to rewrite"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no question of a user"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no question of a user"),
        (SOLVED | {"distill": {}}, "distilled already"),
    ],
)
def test_a_record_without_an_answer_to_rewrite_is_refused(record, what):
    with pytest.raises(DataError, match=what):
        row(record)


def test_the_prompt_of_a_solution_is_that_of_gsm8k_and_any_other_the_general_one():
    assert form_of(row(SOLVED), "auto") == "gsm8k"
    assert form_of(row(TOLD), "auto") == "sdft"
    assert form_of(row(SOLVED), "sdft") == "sdft"


def test_the_prompts_are_those_of_the_paper():
    assert FORMS["sdft"].user == (
        "Below are an instruction that describes a task along with a reference answer. "
        "Using the reference answer as a guide, write your own response.\n"
        "### Instruction:\n{instruction}\n### Reference Answer:\n{reference}\n### Response:\n"
    )
    assert json.dumps(FORMS["gsm8k"].begun) == '"Great! Let\'s think step by step."'
