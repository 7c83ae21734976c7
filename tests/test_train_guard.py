"""The memorisation guard: silent where a model learns, and in words, once, where it learns by heart."""

import pytest
from later import LATER

if LATER:
    from surgeon.train.reporter import Guard


# What a small model did in 600 steps on 300 lines of question formation: it learned them by heart.
MEMORISED = [(0, 4.6, 4.6), (100, 1.4, 1.5), (200, 1.0, 1.47), (400, 0.5, 1.89), (600, 0.3, 1.98)]


def run(losses: list[tuple[int, float | None, float | None]]) -> dict[int, list[str]]:
    """Return the warnings of each step that has some; `losses` are (step, probe, validation)."""
    guard = Guard()
    told = {step: guard.observe(step, probe, validation) for step, probe, validation in losses}
    return {step: warnings for step, warnings in told.items() if warnings}


def test_a_run_that_learns_is_left_alone():
    assert run([(0, 4.6, 4.6), (100, 2.0, 2.1), (200, 1.2, 1.25), (300, 1.0, 1.1), (400, 0.997, 0.993)]) == {}


def test_a_run_that_memorises_is_warned_in_words_with_numbers():
    warned = run(MEMORISED)
    gap = "at step 200 held-out text costs 1.470 nats, trained text 1.000: 0.47 more than at the start"
    collapse = "the loss on trained text has fallen to 0.500 at step 400, that on held-out text is 1.890"

    assert warned == {
        200: [f"{gap}; the model begins to memorise"],
        400: [f"{collapse}: stop, the best step was 200 (1.470)"],
    }


@pytest.mark.parametrize(("gap", "warns"), [(0.19, False), (0.21, True)])
def test_the_gap_counts_from_where_it_was_at_the_start(gap, warns):
    easier = 0.5  # the trained text, before anything was trained

    assert bool(run([(0, 3.0 - easier, 3.0), (1, 2.0 - easier - gap, 2.0)])) == warns


def test_losses_that_fall_in_proportion_are_no_memorising():
    """Half of a gap that was negative is larger, and means nothing."""
    guard = Guard()
    guard.observe(0, 3.73, 2.48)
    assert guard.observe(29, 1.98, 1.32) == []
    assert len(guard.observe(58, 1.0, 1.32)) == 1


def test_three_rises_in_a_row_warn_and_two_do_not():
    up = [(1, None, 2.0), (2, None, 2.1), (3, None, 2.2)]

    assert run([*up, (4, None, 2.15), (5, None, 2.2), (6, None, 2.3)]) == {}
    assert run([*up, (4, None, 2.3), (5, None, 2.4)]) == {
        4: ["validation loss has risen 3 times in a row, to 2.300 at step 4; the best was 2.000 at step 1"]
    }


def test_a_loss_that_stays_does_not_rise():
    assert run([(step, None, 2.0) for step in range(6)]) == {}


def test_small_losses_that_differ_by_little_are_no_collapse():
    assert run([(0, 1.0, 1.0), (1, 0.02, 0.05)]) == {}


def test_trained_text_that_was_easier_all_along_is_no_collapse():
    """A third at the start and three tenths later is no collapse, though the gap grew."""
    warned = run([(0, 1.0, 3.0), (1, 1.2, 4.0)])

    assert [text for texts in warned.values() for text in texts if "stop" in text] == []
    assert "memorise" in warned[1][0]


def test_without_one_of_the_losses_it_says_what_it_can():
    assert run([(0, 3.0, None), (1, 1.0, None)]) == {}
    assert run([(0, None, 3.0), (1, None, 1.0)]) == {}


def test_a_resumed_run_is_not_warned_again():
    records = [{"step": step, "probe_loss": probe, "eval_loss": loss} for step, probe, loss in MEMORISED[:3]]
    guard = Guard.resumed([{"step": 50, "loss": 3.0}, *records])

    assert guard.best_step == 200
    warnings = guard.observe(400, 0.5, 1.89)
    assert len(warnings) == 1
    assert "the best step was 200" in warnings[0]
