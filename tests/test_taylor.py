"""The Taylor score streamed backward is that of the whole model's autograd."""

import pytest
import toys
from later import LATER

if LATER:
    from streamed import mean_loss, plain, real_parameters, stream, tokens

    from surgeon.measure.taylor import taylor
    from surgeon.models import streaming

pytestmark = pytest.mark.usefixtures("one_thread")

# Gradients in float32, summed over weights in float64; rounding of single gradients (1e-6 of the largest) averages out.
CLOSE = 1e-5


def by_autograd(model, ids):
    """Return Σ |w · ∂loss/∂w| of each layer of the plainly loaded model."""
    mean_loss(model(ids, use_cache=False).logits, ids).backward()
    return [
        sum(float((p.detach() * p.grad).abs().double().sum()) for p in layer.parameters() if p.grad is not None)
        for layer in toys.stacks(model)[0]
    ]


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "gpt2", "phi3", "gemma2", "opt-post-norm", "bloom", "mixtral", "gpt_oss", "lfm2"]
)
def test_the_score_is_that_of_the_whole_models_autograd(name, toy):
    ids = tokens(3)

    scores = taylor(stream(toy(name)), ids)

    assert scores == pytest.approx(by_autograd(plain(toy(name)), ids), rel=CLOSE)
    assert min(scores) > 0.1


def test_gradients_of_batches_are_summed_before_their_absolute_value_is_taken(toy, monkeypatch):
    ids = tokens(5)
    monkeypatch.setattr(streaming, "BATCH_TOKENS", 2 * ids.shape[1])

    scores = taylor(stream(toy("llama")), ids)

    assert scores == pytest.approx(by_autograd(plain(toy("llama")), ids), rel=CLOSE)
    alone = [taylor(stream(toy("llama")), ids[row : row + 1]) for row in range(5)]
    assert (
        sum(one[0] for one in alone) / 5 > 1.1 * scores[0]
    )  # the other order of sum and absolute value is another score


def test_rows_as_long_as_the_model_has_positions_fit_its_head(toy):
    ids = tokens(3, 64)

    scores = taylor(stream(toy("gpt2")), ids)

    assert scores == pytest.approx(by_autograd(plain(toy("gpt2")), ids), rel=CLOSE)


@pytest.mark.parametrize("resident", [False, True])
def test_no_gradient_and_no_weight_is_left_behind(resident, toy):
    streamed, ids = stream(toy("llama"), resident=resident), tokens()

    first = taylor(streamed, ids)

    for index in range(6):
        parameters = list(streamed.module(index).parameters())
        assert not any(parameter.requires_grad for parameter in parameters)
        assert all(parameter.grad is None for parameter in parameters)
        assert len(real_parameters(streamed.module(index))) == (9 if resident else 0)
    assert taylor(streamed, ids) == first


def test_progress_is_told_of_one_pass_forward_and_two_backward(toy):
    told = []

    taylor(stream(toy("llama")), tokens(2, 12), meter=lambda *_: told.append)

    assert told == [24] * 6 + [48] * 6
