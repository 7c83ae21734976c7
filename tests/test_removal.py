"""The loss without layers is the bypassed model's, for many choices in one pass that shares what they share."""

import math
import weakref
from itertools import combinations

import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st
from later import LATER

from surgeon.errors import MeasureError
from surgeon.surgery import open_source

if LATER:
    import torch
    from streamed import mean_loss, padded, plain, stream, tokens

    from surgeon.measure import scoring as score
    from surgeon.measure.record import perplexities
    from surgeon.measure.removal import greedy, one_by_one
    from surgeon.measure.scoring import losses_without, perplexity, removal_curve, score_states
    from surgeon.models.device import groups

pytestmark = pytest.mark.usefixtures("one_thread")

# Losses are of order 5 and their logits float32, made of as many rows at once here as there: 1e-6 was seen.
CLOSE = 1e-5
SETS = [(), (0,), (2,), (2, 3), (2, 3, 5), (2, 5), (1, 2, 3, 4), (0, 1, 2, 3, 4, 5), (5,), (2, 3)]


def loss_without(model, ids, removed):
    """Return the loss of the plainly loaded model with layers bypassed."""
    with toys.bypass(model, removed), torch.no_grad():
        return float(mean_loss(model(ids, use_cache=False).logits, ids))


def naive_greedy(model, ids, count, protect):
    """Return what SLEB's loop gives: order and losses, every candidate a full forward pass."""
    order, losses = [], []
    for _ in range(count):
        alive = [layer for layer in range(6) if layer not in order]
        tried = {
            layer: loss_without(model, ids, [*order, layer]) for layer in alive[protect[0] : len(alive) - protect[1]]
        }
        order.append(min(tried, key=tried.get))
        losses.append(tried[order[-1]])
    return order, losses


def watch(model, notice):
    """Call notice(module, output) each time that a layer computes; it also stands still, without weights."""

    def hook(module, _, output):
        if not next(module.parameters()).is_meta:
            notice(module, output)

    for index in range(model.depth):
        model.module(index).register_forward_hook(hook)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-post-norm", "gemma3_text", "bloom", "qwen3_moe-sparse-step"])
def test_each_loss_is_that_of_the_plain_model_with_those_layers_bypassed(name, toy):
    ids, model = tokens(3), plain(toy(name))

    losses = losses_without(stream(toy(name)), ids, [frozenset(removed) for removed in SETS])

    expected = [loss_without(model, ids, removed) for removed in SETS]
    assert losses == pytest.approx(expected, abs=CLOSE)
    assert len({round(loss, 4) for loss in losses}) == len(set(SETS))  # no two choices have the same loss by accident


def test_every_set_of_two_layers_has_its_own_loss(toy):
    ids, model = tokens(), plain(toy("llama"))
    pairs = list(combinations(range(6), 2))

    losses = losses_without(stream(toy("llama")), ids, [frozenset(pair) for pair in pairs])

    assert losses == pytest.approx([loss_without(model, ids, pair) for pair in pairs], abs=CLOSE)


def test_rows_in_groups_and_batches_give_the_same_losses(toy, monkeypatch):
    ids, streamed, sets = tokens(5), stream(toy("llama")), [frozenset(), frozenset({1}), frozenset({1, 4})]
    whole = losses_without(streamed, ids, sets)
    split, calls = score.groups, []

    def small(rows, bytes_per_row, budget):
        calls.append(split(rows, bytes_per_row, 2 * bytes_per_row))
        return calls[-1]

    monkeypatch.setattr(score, "groups", small)

    assert losses_without(streamed, ids, sets) == pytest.approx(whole, abs=CLOSE)
    assert calls == [[(0, 1), (1, 3), (3, 5)]]


def test_the_budget_of_a_group_is_of_the_states_of_all_choices(toy, monkeypatch):
    seen = []
    monkeypatch.setattr(score, "groups", lambda rows, size, budget: seen.append((rows, size)) or [(0, rows)])

    losses_without(stream(toy("llama")), tokens(5), [frozenset({layer % 3}) for layer in range(6)])

    assert seen == [(5, 12 * 48 * 4 * (3 + 1))]  # tokens, hidden size, float32, three different choices and the input


def test_rows_as_long_as_the_model_has_positions_fit_its_head(toy):
    ids = tokens(5, 64)  # 320 tokens wait for the head, which is GPT-2's own forward pass with 64 positions

    (loss,) = losses_without(stream(toy("gpt2")), ids, [frozenset()])

    assert loss == pytest.approx(loss_without(plain(toy("gpt2")), ids, []), abs=CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_read_nor_predicted(side, toy):
    ids, lengths, streamed = tokens(3, 14), [14, 9, 5], stream(toy("gpt2"))
    sets = [frozenset(), frozenset({2})]
    rows, real = padded(ids, lengths, left=side == "left")

    losses = losses_without(streamed, rows, sets, real=real)

    alone = [losses_without(streamed, ids[row : row + 1, :length], sets) for row, length in enumerate(lengths)]
    for number, loss in enumerate(losses):
        total = sum((length - 1) * one[number] for length, one in zip(lengths, alone, strict=True))
        assert loss == pytest.approx(total / sum(length - 1 for length in lengths), abs=CLOSE)


@pytest.mark.parametrize(("rows", "length"), [(3, 1), (0, 5)])
def test_a_text_that_predicts_nothing_is_refused(rows, length, toy):
    with pytest.raises(MeasureError, match="predicts nothing"):
        losses_without(stream(toy("llama")), tokens(rows, length), [frozenset()])


# --- one layer at a time --------------------------------------------------------------------------------------


def test_one_by_one_gives_the_perplexity_without_each_layer(toy):
    ids, model = tokens(3), plain(toy("llama"))

    found = one_by_one(stream(toy("llama")), ids)

    assert found == pytest.approx([math.exp(loss_without(model, ids, [layer])) for layer in range(6)], rel=CLOSE)


def test_one_by_one_runs_each_layer_only_for_states_that_differ(toy):
    # Layer k runs once for those choices that still agree (which remove a later layer: none at the last one), and once
    # for each of the k that have removed an earlier one. The sum over k is L(L - 1) / 2 + (L - 1); naive: L(L - 1).
    ids, streamed, told, calls = tokens(3), stream(toy("llama")), [], []
    watch(streamed, lambda module, output: calls.append(module) if len(output) == len(ids) else None)  # no probe

    one_by_one(streamed, ids, meter=lambda *_: told.append)

    depth = streamed.depth
    assert [calls.count(streamed.module(layer)) for layer in range(depth)] == [1, 2, 3, 4, 5, 5]
    assert len(calls) == depth * (depth + 1) // 2 - 1 == 20
    assert told == [ids.numel()] * len(calls)


def test_choices_that_remove_the_same_run_once(toy):
    streamed, told = stream(toy("llama")), []

    losses = losses_without(streamed, tokens(), [frozenset({0, 1}), frozenset({1, 0})] * 3, progress=told.append)

    assert len(told) == 4
    assert len(set(losses)) == 1


def test_states_that_are_through_a_layer_leave_memory(toy):
    # One state for each of the six choices, and the one that the layer makes.
    streamed, made, alive = stream(toy("llama")), [], []

    def notice(_, output):
        if output.shape[1] != tokens().shape[1]:  # a probe
            return
        made.append(weakref.ref(output))
        alive.append(sum(state() is not None for state in made))

    watch(streamed, notice)

    one_by_one(streamed, tokens())

    assert max(alive) == 7


# --- greedily -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "protect"),
    [("llama", 4, (1, 1)), ("llama", 5, (0, 0)), ("llama", 2, (2, 2)), ("gpt2", 3, (1, 1)), ("mistral", 3, (0, 2))],
)
def test_greedy_removes_what_the_naive_loop_removes(name, count, protect, toy):
    ids = tokens(3)

    order, after = greedy(stream(toy(name)), ids, count, protect=protect)

    expected, losses = naive_greedy(plain(toy(name)), ids, count, protect)
    assert order == expected
    assert after == pytest.approx([math.exp(loss) for loss in losses], rel=CLOSE)


def test_greedy_protects_the_first_and_last_by_default(toy):
    order, _ = greedy(stream(toy("llama")), tokens(), 4)

    assert sorted(order) == [1, 2, 3, 4]


@pytest.mark.parametrize(("count", "protect", "most"), [(5, (1, 1), 4), (6, (0, 0), 5), (1, (0, 9), 0), (1, (3, 3), 0)])
def test_greedy_refuses_to_remove_more_than_may_go(count, protect, most, toy):
    with pytest.raises(MeasureError, match=f"cannot remove {count} of 6 layers") as caught:
        greedy(stream(toy("llama")), tokens(), count, protect=protect)
    assert f"At most {most} can go" in caught.value.hint


# --- the whole model ------------------------------------------------------------------------------------------


def test_the_loss_that_comes_with_the_scores_is_the_whole_models(toy, monkeypatch):
    ids, split = tokens(5), score.groups
    monkeypatch.setattr(score, "groups", lambda rows, size, budget: split(rows, size, 2 * size))

    *_, loss = score_states(stream(toy("gpt2")), ids, evaluate=True)

    assert loss == pytest.approx(loss_without(plain(toy("gpt2")), ids, []), abs=CLOSE)


def test_no_loss_is_taken_unless_it_is_asked_for(toy, tmp_path):
    plain(toy("llama")).base_model.save_pretrained(tmp_path / "headless")

    *_, loss = score_states(stream(tmp_path / "headless"), tokens())

    assert loss is None


def test_a_loss_of_rows_of_one_token_is_refused(toy):
    with pytest.raises(MeasureError, match="predicts nothing"):
        score_states(stream(toy("llama")), tokens(3, 1), evaluate=True)


def test_a_removal_curve_is_the_perplexity_at_each_point(toy):
    ids, model, source = tokens(3), plain(toy("llama")), open_source(str(toy("llama")))

    found = removal_curve(source, ids, [(), (3,), (3, 4)])

    assert found == pytest.approx([math.exp(loss_without(model, ids, x)) for x in ((), (3,), (3, 4))], rel=CLOSE)
    assert perplexity(source, ids) == pytest.approx(found[0], rel=1e-12)  # the same sum


# --- arithmetic -----------------------------------------------------------------------------------------------


@given(rows=st.integers(0, 200), row=st.integers(1, 1000), budget=st.integers(1, 20_000))
def test_groups_tile_the_rows_and_fit_the_budget_unless_one_row_does_not(rows, row, budget):
    found = groups(rows, row, budget)

    assert [index for start, stop in found for index in range(start, stop)] == list(range(rows))
    sizes = [stop - start for start, stop in found]
    assert all(size * row <= budget or size == 1 for size in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert len(found) == math.ceil(rows / max(1, budget // row))  # no more groups than needed: each reads all weights


def test_perplexity_is_infinite_where_no_float_holds_it():
    assert perplexities([0.0, 1.0, 1e4, math.inf, math.nan]) == [1.0, math.e, math.inf, math.inf, math.inf]
