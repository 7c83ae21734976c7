"""Which pieces go into which row: every piece once, no row too long, as full as best fit makes them."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from later import LATER

from surgeon.errors import DataError

if LATER:
    import numpy as np

    from surgeon.train.packing import one_per_row, pack, repeat, split

LENGTHS = st.lists(st.integers(1, 40), max_size=80)


def fill(packing, lengths, row_length):
    """Return the fraction of the rows' places that hold a token."""
    return float(np.asarray(lengths)[packing.pieces].sum() / (len(packing) * row_length))


def rows_of(packing):
    return [packing.row(index).tolist() for index in range(len(packing))]


def best_fit(lengths, row_length):
    """Return what is left in each row by best fit, decreasing, piece by piece."""
    left = []
    for length in sorted(lengths, reverse=True):
        fits = [room for room in left if room >= length]
        room = min(fits) if fits else row_length
        if fits:
            left.remove(room)
        left.append(room - length)
    return sorted(left)


@given(LENGTHS, st.integers(40, 100), st.integers(0, 3))
def test_every_piece_is_in_one_row_and_no_row_is_too_long(lengths, row_length, seed):
    packing = pack(lengths, row_length, seed=seed)
    rows = rows_of(packing)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[number] for number in row) <= row_length for row in rows)


@given(LENGTHS, st.integers(40, 100))
def test_rows_are_as_full_as_best_fit_makes_them_piece_by_piece(lengths, row_length):
    rows = rows_of(pack(lengths, row_length, seed=0))
    left = sorted(row_length - sum(lengths[number] for number in row) for row in rows)
    assert left == best_fit(lengths, row_length)


@given(LENGTHS)
def test_the_same_seed_gives_the_same_rows(lengths):
    assert rows_of(pack(lengths, 40, seed=7)) == rows_of(pack(lengths, 40, seed=7))


def test_another_seed_lets_others_meet():
    lengths = [10] * 40
    assert rows_of(pack(lengths, 40, seed=0)) != rows_of(pack(lengths, 40, seed=1))


def test_rows_come_in_random_order():
    lengths = np.repeat([40, 20, 10, 5], 30)
    first = [lengths[row[0]] for row in rows_of(pack(lengths, 40, seed=0))]
    assert first != sorted(first, reverse=True)


def test_nothing_makes_no_row():
    assert rows_of(pack([], 10, seed=0)) == rows_of(one_per_row([])) == []


def test_a_million_pieces_take_seconds_and_leave_next_to_nothing_over():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.5, 1.2, 1_000_000).astype(int) + 2, 4096)
    began = time.process_time()
    packing = pack(lengths, 4096, seed=0)
    # 0.3 s here, 3 s for ten million; a loop over pieces takes longer than this limit
    assert time.process_time() - began < 3
    assert fill(packing, lengths, 4096) > 0.999


def test_one_piece_a_row_keeps_their_order():
    assert rows_of(one_per_row([3, 1, 2])) == [[0], [1], [2]]


def test_fill_is_the_part_of_the_places_that_hold_a_token():
    assert fill(one_per_row([3, 1]), [3, 1], 4) == 0.5


def test_rows_of_some_pieces_name_them_by_their_numbers():
    assert rows_of(one_per_row([5, 5]).of([7, 3])) == [[7], [3]]


def test_rows_can_be_chosen():
    packing = pack([3, 1, 2, 4, 4], 4, seed=0)
    rows = rows_of(packing)
    assert rows_of(packing.chosen([2, 0])) == [rows[2], rows[0]]
    assert rows_of(packing.chosen([])) == []


# --- weights ----------------------------------------------------------------------------------------------------------


def test_each_source_is_seen_as_often_as_it_is_asked_for():
    sources = [0, 0, 0, 0, 1, 1, 1, 2, 2]
    counts = np.bincount(repeat(sources, [1, 2, 0], seed=0), minlength=9)
    assert counts.tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 0]


@given(st.lists(st.integers(0, 2), max_size=60), st.tuples(*[st.sampled_from([0, 0.25, 0.5, 1, 1.5, 2.75])] * 3))
def test_a_part_of_a_pass_is_a_part_of_the_pieces(sources, passes):
    counts = np.bincount(repeat(sources, passes, seed=0), minlength=len(sources))
    for source, count in enumerate(passes):
        times = counts[np.array(sources, dtype=int) == source]
        assert times.sum() == int(count) * len(times) + int((count - int(count)) * len(times) + 0.5)
        assert not len(times) or times.max() - times.min() <= 1


def test_the_part_that_is_seen_derives_from_the_seed():
    sources = [0] * 100
    assert repeat(sources, [0.5], seed=1).tolist() == repeat(sources, [0.5], seed=1).tolist()
    assert repeat(sources, [0.5], seed=1).tolist() != repeat(sources, [0.5], seed=2).tolist()


@pytest.mark.parametrize("count", [-1, float("nan"), float("inf")])
def test_a_number_of_passes_that_is_none_is_refused(count):
    with pytest.raises(DataError, match="passes over data are asked for"):
        repeat([0], [count], seed=0)


# --- held out ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=2, max_size=40), st.floats(0.01, 0.9), st.integers(0, 3))
def test_whole_documents_are_held_out(sizes, fraction, seed):
    documents = np.repeat(np.arange(len(sizes)) * 3, sizes)  # numbers that were dropped are missing
    trained, held = split(documents, fraction, seed=seed)
    assert sorted([*trained.tolist(), *held.tolist()]) == list(range(len(documents)))
    assert len(trained)
    assert len(held)
    assert set(documents[trained]).isdisjoint(documents[held])
    assert len(held) <= max(round(fraction * len(documents)), min(sizes), 1)


def test_a_tenth_of_many_documents_is_held_out_and_another_tenth_with_another_seed():
    documents = np.arange(1000)
    held = [split(documents, 0.1, seed=seed)[1] for seed in (0, 0, 1)]
    assert [len(each) for each in held] == [100, 100, 100]
    assert held[0].tolist() == held[1].tolist() != held[2].tolist()


def test_of_one_document_its_end_is_held_out():
    trained, held = split([5] * 10, 0.2, seed=0)
    assert (trained.tolist(), held.tolist()) == ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9])


@pytest.mark.parametrize(("documents", "fraction"), [([5], 0.5), ([1, 2, 3], 0)])
def test_nothing_is_held_out_of_one_piece_or_on_request(documents, fraction):
    trained, held = split(documents, fraction, seed=0)
    assert (len(trained), len(held)) == (len(documents), 0)
