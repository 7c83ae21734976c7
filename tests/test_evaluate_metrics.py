"""Scores of answers, means with errors, and comparisons: held against formulas written out."""

import math
import re
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgeon.evals.compare import Estimate, estimate, exponential, paired, recovery
from surgeon.evals.metrics import exact_match, extracted, longest_common, rouge_l, rouge_words

NUMBER = re.compile(r"#### (-?[\d,]+)")


def naive_lcs(one, other):
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


# --- words and ROUGE-L ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The cat's a_b 3.14", "the cat s a b 3 14"),
        ("Привет, МИР!", "привет мир"),
        ("cafe\u0301 = café", "café café"),
        ("naïve\u00adté", "naïveté"),  # a soft hyphen inside
        ("हिन्दी भाषा", "हिन्दी भाषा"),  # vowel signs are marks
        ("کتاب\u200cها", "کتابها"),  # a joiner inside
        ("한국어 문장", "한국어 문장"),
        ("東京タワー is 高い", "東 京 タ ワ ー is 高 い"),
        ("ไม่เป็น", "ไ ม่ เ ป็ น"),  # with their marks
        ("日本2024年", "日 本 2024 年"),
        ("abc漢字def", "abc 漢 字 def"),
        ("Straße", "strasse"),
        ("\u0301 x", "\u0301 x"),  # a mark that follows nothing
        ("—!? 🌿", ""),
    ],
)
def test_words_of_any_script(text, found):
    assert rouge_words(text) == found.split()


@given(st.lists(st.sampled_from("abcd"), max_size=40), st.lists(st.sampled_from("abcd"), max_size=40))
def test_the_longest_common_subsequence_is_that_of_the_table(one, other):
    assert longest_common(one, other) == naive_lcs(one, other)


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),  # as rouge-score 0.1.2 gives them for rougeL
    [
        ("the cat sat on the mat", "the cat lay on a mat", 0.6666666666666666),
        ("police killed the gunman", "the gunman killed police", 0.5),
        ("A, b; c.", "c b a", 0.3333333333333333),
        ("don't_stop 3.14", "dont stop 3 14", 0.6666666666666665),
        ("", "something", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_rouge_l_is_that_of_the_package_on_ascii(prediction, reference, f1):
    assert rouge_l(prediction, reference) == pytest.approx(f1, abs=1e-15)


def test_rouge_l_of_scripts_without_spaces_is_by_character():
    assert rouge_l("東京は高い", "東京は安い") == pytest.approx(4 / 5)
    assert rouge_l("привет мир", "привет, Мир!") == 1


# --- exact match ------------------------------------------------------------------------------------------------


def test_exact_match_ignores_the_white_space_around():
    assert exact_match(" 42\n", "42") == 1
    assert exact_match("42.", "42") == 0
    assert exact_match(None, "") == 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("#### 3 and #### 1,000", "1000"),
        ("#### 1,234,567,", "1234567"),
        ("#### -0", "0"),
        ("#### 007", "7"),
        ("#### 12,34", "12,34"),  # no number
        ("#### 123456789012345678901234567890", "123456789012345678901234567890"),
        ("72", None),
    ],
)
def test_what_is_extracted_is_the_last_matchs_first_group_and_numbers_have_one_form(text, found):
    assert extracted(text, NUMBER) == found


def test_a_pattern_without_a_group_gives_its_match():
    assert extracted("1.50 or 2.500", re.compile(r"[\d.]+")) == "2.5"
    assert extracted("yes, No", re.compile(r"(?i)yes|no")) == "No"
    assert extracted("b", re.compile(r"(a)|b")) is None


# --- means with errors ------------------------------------------------------------------------------------------


def test_the_error_of_rows_of_one_length_is_the_deviation_over_the_root():
    sums = [30.0, 34.0, 29.0, 41.0]

    found = estimate(sums, [10] * 4)

    assert found.value == pytest.approx(mean(sums) / 10)
    assert found.error == pytest.approx(stdev(sums) / 10 / 2)


def test_the_error_of_rows_of_several_lengths_is_that_of_a_ratio():
    found = estimate([3.0, 8.0, 4.0], [1, 4, 3])

    residuals = [3 - 15 / 8, 8 - 15 / 2, 4 - 45 / 8]
    assert found == Estimate(15 / 8, pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 8))


def test_the_error_of_zeros_and_ones_is_the_binomial_one():
    found = estimate([1.0] * 3 + [0.0] * 7)

    assert found == Estimate(pytest.approx(0.3), pytest.approx(math.sqrt(0.3 * 0.7 / 9)))


def test_one_row_has_no_error():
    assert estimate([2.0], [4]) == Estimate(0.5, None)


def test_the_perplexitys_error_is_that_of_the_delta_method():
    assert exponential(Estimate(2.0, 0.1)) == Estimate(math.exp(2), pytest.approx(math.exp(2) * 0.1))
    assert exponential(Estimate(1e4, 1.0)).value == math.inf


def test_a_paired_difference_has_the_error_of_the_differences():
    ours, theirs = [3.0, 5.0, 9.0], [2.0, 4.5, 7.0]

    found = paired(ours, theirs)

    differences = [1.0, 0.5, 2.0]
    assert found.value == pytest.approx(mean(differences))
    assert found.error == pytest.approx(stdev(differences) / math.sqrt(3))
    assert found.z == pytest.approx(found.value / found.error)
    assert paired(ours, ours).z is None


def test_recovery_is_upside_down_where_less_is_better():
    assert recovery(20.0, 10.0, higher_is_better=False) == 50
    assert recovery(0.3, 0.4, higher_is_better=True) == pytest.approx(75)
    assert recovery(0.3, 0.0, higher_is_better=True) is None
    assert recovery(math.inf, 10.0, higher_is_better=False) == 0
