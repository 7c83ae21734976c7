"""Which layers go is a pure function of scores; the index traps of other tools are tried one by one."""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgeon.errors import PlanError
from surgeon.transforms.choose import Choice, choose_in_order, choose_layers
from surgeon.transforms.scores import METHODS


def matrix(depth, distance):
    """Return an angular matrix whose entry [s][e] is distance(s, e)."""
    return [[float(distance(s, e)) if e > s else None for e in range(depth + 1)] for s in range(depth)]


def cheapest(depth, *blocks):
    """Return an angular matrix in which blocks (start, end, distance) are cheaper than all others, which cost 1."""
    found = {(s, e): distance for s, e, distance in blocks}
    return matrix(depth, lambda s, e: found.get((s, e), 1.0))


def values_of(name, depth):
    """Return scores that make layer 0 the cheapest, and so on."""
    return matrix(depth, lambda s, e: s + 1) if name == "angular" else [float(layer) for layer in range(depth)]


# --- one block, by angle --------------------------------------------------------------------------------------


def test_the_block_of_the_smallest_angle_goes():
    # d(s, s + n) removes layers s to s + n - 1: the state before s is joined to layer s + n.
    scores = cheapest(8, (3, 6, 0.2), (5, 8, 0.3), (1, 3, 0.01), (0, 4, 0.01))

    assert choose_layers("angular", 3, 8, values=scores) == Choice((3, 4, 5), 0.2, (5, 6, 7), 0.3)


@pytest.mark.parametrize("count", range(1, 8))
def test_a_block_is_read_off_the_row_of_its_own_size(count):
    # short-transformers writes blocks of m layers into row m - 1 and reads row n: the start of another size's best.
    scores = matrix(8, lambda s, e: 0.1 if s == (e - s) % 3 and s + (e - s) <= 8 else 0.5 + 0.01 * s)

    choice = choose_layers("angular", count, 8, values=scores)

    by_hand = min(range(8 - count + 1), key=lambda s: scores[s][s + count])
    assert choice.dropped == tuple(range(by_hand, by_hand + count))
    assert choice.score == scores[by_hand][by_hand + count]


def test_one_layer_is_a_block_too():
    # ShortGPT's [: -n + 1] is empty for n = 1.
    assert choose_layers("angular", 1, 4, values=cheapest(4, (2, 3, 0.1))).dropped == (2,)


def test_a_block_may_start_at_layer_0():
    # PruneMe leaves out the embedding's state, and so every block that starts at layer 0.
    assert choose_layers("angular", 2, 4, values=cheapest(4, (0, 2, 0.1))).dropped == (0, 1)


def test_a_block_may_end_with_the_last_layer():
    assert choose_layers("angular", 2, 4, values=cheapest(4, (2, 4, 0.1))).dropped == (2, 3)


def test_all_layers_but_one_may_go():
    choice = choose_layers("angular", 3, 4, values=cheapest(4, (1, 4, 0.1)))

    assert choice == Choice((1, 2, 3), 0.1, (0, 1, 2), 1.0)


def test_of_equal_blocks_the_first_goes_and_the_second_is_next():
    assert choose_layers("angular", 2, 5, values=cheapest(5)) == Choice((0, 1), 1.0, (1, 2), 1.0)


def test_protected_layers_bound_the_block():
    scores = cheapest(6, (0, 2, 0.1), (4, 6, 0.2), (3, 5, 0.3), (1, 3, 0.4))

    assert choose_layers("angular", 2, 6, values=scores, protect=(1, 1)) == Choice((3, 4), 0.3, (1, 2), 0.4)


def test_a_block_that_fills_what_is_free_has_no_next_best():
    assert choose_layers("angular", 4, 6, values=cheapest(6), protect=(1, 1)) == Choice((1, 2, 3, 4), 1.0)


def test_free_layers_are_chosen_by_the_angle_of_each_alone():
    scores = cheapest(6, (4, 5, 0.1), (0, 1, 0.2), (2, 3, 0.3), (0, 2, 0.0))

    choice = choose_layers("angular", 2, 6, values=scores, contiguous=False)

    assert (choice.dropped, choice.next_best) == ((0, 4), (2, 4))
    assert (choice.score, choice.next_score) == (pytest.approx(0.3), pytest.approx(0.4))


# --- any layers, by a number each -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["block-influence", "relative-magnitude", "perplexity"])
def test_the_layers_of_the_smallest_scores_go(name):
    choice = choose_layers(name, 2, 5, values=[0.5, 0.125, 0.75, 0.25, 0.375])

    assert choice == Choice((1, 3), 0.375, (1, 4), 0.5)


def test_of_equal_layers_the_first_go():
    assert choose_layers("block-influence", 2, 5, values=[1.0] * 5) == Choice((0, 1), 2.0, (0, 2), 2.0)


def test_the_chosen_layers_are_ascending_whatever_their_scores():
    assert choose_layers("block-influence", 3, 5, values=[0.3, 9.0, 0.2, 9.0, 0.1]).dropped == (0, 2, 4)


@pytest.mark.parametrize("name", ["taylor", "magnitude"])
def test_first_and_last_layers_stay_where_the_authors_keep_them(name):
    # Shortened LLaMA: the first four and the last two, for by Taylor layer 0 would go first.
    values = [0.0] * 4 + [3.0, 2.0, 1.0, 4.0] + [0.0] * 2

    assert choose_layers(name, 2, 10, values=values).dropped == (5, 6)
    assert choose_layers(name, 2, 10, values=values, protect=(0, 0)).dropped == (0, 1)


def test_a_block_of_layers_with_numbers_costs_their_sum():
    choice = choose_layers("block-influence", 2, 5, values=[0.5, 0.125, 0.75, 0.25, 0.25], contiguous=True)

    assert choice == Choice((3, 4), 0.5, (0, 1), 0.625)


def test_an_infinite_score_is_one_of_a_layer_that_stays():
    choice = choose_layers("perplexity", 2, 4, values=[math.inf, 20.0, math.inf, 30.0])

    assert (choice.dropped, choice.score, choice.next_score) == ((1, 3), 50.0, math.inf)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("name", ["angular", "block-influence"])
def test_scores_that_are_no_numbers_are_refused(name, contiguous):
    values = cheapest(4, (1, 2, math.nan)) if name == "angular" else [0.1, math.nan, 0.2, 0.3]

    with pytest.raises(PlanError, match="not all numbers") as caught:
        choose_layers(name, 1, 4, values=values, contiguous=contiguous)
    assert caught.value.hint


# --- without scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protect", "dropped"), [(None, (6, 7, 8)), ((0, 0), (7, 8, 9)), ((2, 3), (4, 5, 6))])
def test_the_last_layers_go_but_the_very_last(protect, dropped):
    # Gromov et al. keep the layer in front of the head.
    assert choose_layers("last", 3, 10, protect=protect) == Choice(dropped)


def test_a_random_choice_is_the_seeds():
    drawn = [choose_layers("random", 5, 30, seed=seed).dropped for seed in range(50)]

    assert drawn == [choose_layers("random", 5, 30, seed=seed).dropped for seed in range(50)]
    assert len(set(drawn)) == 50
    assert set().union(*drawn) == set(range(30))
    assert choose_layers("random", 5, 30).dropped == (1, 8, 13, 24, 28)  # as it was, in every version


def test_a_random_block_lies_anywhere():
    drawn = {choose_layers("random", 5, 9, seed=seed, contiguous=True).dropped for seed in range(100)}

    assert drawn == {tuple(range(start, start + 5)) for start in range(5)}


# --- greedily -------------------------------------------------------------------------------------------------


def test_a_greedy_order_gives_its_first_layers():
    assert choose_in_order([5, 2, 6, 1], 3, 8, protect=(0, 0)).dropped == (2, 5, 6)


def test_a_greedy_order_that_is_too_short_is_refused():
    with pytest.raises(PlanError, match="goes 2 layers deep, not 3"):
        choose_in_order([5, 2], 3, 8, protect=(0, 0))


# --- what holds for all ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_nothing_goes_when_nothing_is_asked_for(name):
    assert choose_layers(name, 0, 8, values=values_of(name, 8)) == Choice(())


@pytest.mark.parametrize(
    ("name", "count", "protect"),
    [
        ("block-influence", 8, None),
        ("block-influence", 9, None),
        ("block-influence", -1, None),
        ("angular", 8, None),
        ("taylor", 3, None),
        ("last", 8, None),
        ("angular", 5, (2, 2)),
        ("random", 1, (4, 4)),
        ("random", 1, (9, 9)),
        ("perplexity", 7, (1, 1)),
    ],
)
def test_more_layers_than_may_go_are_refused(name, count, protect):
    with pytest.raises(PlanError, match=f"cannot remove {count} of 8 layers") as caught:
        choose_layers(name, count, 8, values=values_of(name, 8), protect=protect)
    assert "--protect 0,0" in caught.value.hint


def test_an_unknown_score_is_refused_with_those_that_there_are():
    with pytest.raises(PlanError, match="unknown score 'angle'") as caught:
        choose_layers("angle", 1, 8)
    assert all(name in caught.value.hint for name in METHODS)


@given(data=st.data(), depth=st.integers(1, 12), name=st.sampled_from(sorted(METHODS)))
def test_every_choice_is_of_the_asked_size_and_spares_what_is_protected(data, depth, name):
    first, last = data.draw(st.tuples(st.integers(0, depth), st.integers(0, depth)))
    most = max(0, min(depth - first - last, depth - 1))
    count = data.draw(st.integers(0, most))
    numbers = st.floats(0, 10)
    drawn = data.draw(st.lists(numbers, min_size=depth * (depth + 1), max_size=depth * (depth + 1)))
    values = matrix(depth, lambda s, e: drawn[s * (depth + 1) + e]) if name == "angular" else drawn[:depth]
    contiguous = data.draw(st.sampled_from([None, True, False]))

    choice = choose_layers(
        name, count, depth, values=values, protect=(first, last), contiguous=contiguous, seed=data.draw(st.integers())
    )

    assert list(choice.dropped) == sorted(set(choice.dropped))
    assert len(choice.dropped) == count
    assert all(first <= layer < depth - last for layer in choice.dropped)
    if contiguous and count:
        assert choice.dropped[-1] - choice.dropped[0] == count - 1
    if choice.next_best is not None:
        assert len(choice.next_best) == count
        assert choice.next_best != choice.dropped
        assert choice.next_score >= choice.score


# --- in whole periods -----------------------------------------------------------------------------------------


def in_place(dropped, depth, period):
    """Return whether every layer that stays has its old place in the period."""
    kept = [layer for layer in range(depth) if layer not in dropped]
    return all(new % period == old % period for new, old in enumerate(kept))


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=9), st.integers(2, 4), st.integers(1, 6),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
)  # fmt: skip
def test_the_cheapest_choice_of_whole_periods_is_taken(values, period, count, protect):
    depth = len(values)
    free = range(protect[0], depth - protect[1])
    possible = [set(layers) for layers in combinations(free, count) if in_place(layers, depth, period)]
    if count >= depth or not possible:
        with pytest.raises(PlanError):
            choose_layers("block-influence", count, depth, values=values, protect=protect, period=period)
        return

    choice = choose_layers("block-influence", count, depth, values=values, protect=protect, period=period)

    assert set(choice.dropped) in possible
    assert choice.score == pytest.approx(min(math.fsum(values[i] for i in layers) for layers in possible), abs=1e-9)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.chosen != "random"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_every_score_chooses_whole_periods(name, contiguous):
    values = values_of(name, 12)

    choice = choose_layers(name, 6, 12, values=values, contiguous=contiguous, protect=(0, 0), period=3)

    assert len(choice.dropped) == 6
    assert in_place(choice.dropped, 12, 3)


def test_a_random_choice_of_whole_periods_is_the_seeds():
    drawn = {choose_layers("random", 4, 12, seed=seed, period=2).dropped for seed in range(20)}

    assert len(drawn) > 5
    assert all(in_place(dropped, 12, 2) for dropped in drawn)
    assert choose_layers("random", 4, 12, seed=3, period=2) == choose_layers("random", 4, 12, seed=3, period=2)


def test_a_block_of_no_whole_period_may_only_be_the_last():
    scores = cheapest(8, (0, 3, 0.1), (4, 6, 0.1))

    assert choose_layers("angular", 3, 8, values=scores, period=2).dropped == (5, 6, 7)
    assert choose_layers("angular", 2, 8, values=scores, period=2).dropped == (4, 5)
    for name, values in (("angular", scores), ("last", None)):
        with pytest.raises(PlanError, match="3 layers cannot go here.*repeat after 2") as caught:
            choose_layers(name, 3, 8, values=values, protect=(0, 1), period=2)
        assert caught.value.hint == "Remove 2 or 4 layers, or leave out --keep-pattern."
