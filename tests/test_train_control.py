"""What ends a run: patience, which a resume remembers, and SIGTERM, which asks first."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import fields
from types import SimpleNamespace

import pytest
from later import LATER

from surgeon.train.settings import LearningSettings

if LATER:
    from transformers.training_args import OptimizerNames

    from surgeon.train import trainer as control
    from surgeon.train.trainer import Control, Stop, stops_at_sigterm


def test_the_optimisers_that_are_known_without_torch_are_those_of_transformers():
    """`--optim` is completed and checked by them."""
    (item,) = (item for item in fields(LearningSettings) if item.name == "optim")

    assert list(item.metadata["flag"].choices.listed) == [name.value for name in OptimizerNames]


def evaluated(judge: Control, *losses: float) -> list[bool]:
    """Return after each validation loss whether the run stops."""
    found = []
    for loss in losses:
        state = SimpleNamespace(should_training_stop=False, should_save=False)
        judge.on_evaluate(None, None, state, metrics={"eval_validation_loss": loss})
        assert state.should_save == state.should_training_stop
        found.append(state.should_training_stop)
    return found


def test_patience_counts_evaluations_since_the_best_one() -> None:
    judge = Control(Stop(), patience=2)

    assert evaluated(judge, 3.0, 3.1, 2.9, 2.9, 2.95) == [False, False, False, False, True]


def test_without_patience_no_loss_stops_a_run() -> None:
    assert evaluated(Control(Stop(), patience=None), 1.0, 2.0, 3.0, 4.0) == [False] * 4


def test_a_resumed_run_has_as_much_patience_left_as_it_had() -> None:
    losses = [3.0, 2.0, 2.5, 2.4]
    whole = Control(Stop(), patience=3)
    evaluated(whole, *losses)
    resumed = Control(Stop(), patience=3, history=losses)

    assert (resumed.worse, resumed.best) == (whole.worse, whole.best) == (2, 2.0)
    assert not resumed.is_over
    assert evaluated(resumed, 2.1) == [True]
    assert Control(Stop(), patience=2, history=losses).is_over


def test_the_last_step_is_evaluated_and_a_stop_is_saved() -> None:
    stop = Stop()
    judge, args = Control(stop, patience=None), SimpleNamespace(world_size=1)
    fresh = {"should_evaluate": False, "should_save": False, "should_training_stop": False}

    middle, last, stopped = (SimpleNamespace(**fresh) for _ in range(3))
    judge.on_step_end(args, SimpleNamespace(global_step=1, max_steps=3), middle)
    judge.on_step_end(args, SimpleNamespace(global_step=3, max_steps=3), last)
    stop.is_requested = True
    judge.on_step_end(args, SimpleNamespace(global_step=1, max_steps=3), stopped)

    assert vars(middle) == fresh
    assert vars(last) == fresh | {"should_evaluate": True}
    assert vars(stopped) == fresh | {"should_save": True, "should_training_stop": True}


@pytest.fixture
def ended() -> list[int]:
    """Return a list that SIGTERM adds to, in place of what would end the process."""
    return []


def test_the_first_sigterm_asks_its_echo_is_ignored_and_a_later_one_ends(
    ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers pass on a signal that the group of processes got already: that must not cost the checkpoint."""
    monkeypatch.setattr(control, "ECHO", 0.2)
    before = signal.signal(signal.SIGTERM, lambda signum, frame: ended.append(signum))
    stop = Stop()
    try:
        with stops_at_sigterm(stop):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_requested
            assert ended == []
            time.sleep(0.25)
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(ended) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_a_signal_nothing_is_asked_and_the_handler_comes_back() -> None:
    before, stop = signal.getsignal(signal.SIGTERM), Stop()

    with stops_at_sigterm(stop):
        assert signal.getsignal(signal.SIGTERM) is not before

    assert signal.getsignal(signal.SIGTERM) is before
    assert not stop.is_requested
