"""Maps held as runs say the same as the tuples of numbers that they stand for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgeon.anatomy.axes import Index, Places, Scale, parse, places, runs_of

POSITIONS = st.lists(st.integers(-1, 5), max_size=30)  # few, so that neighbours often continue a run
FACTORS = st.sampled_from([1.0, 0.5, 0.0])


@given(POSITIONS)
def test_an_index_is_the_positions_that_it_was_made_of(positions):
    index = Index.of(positions)

    assert index == tuple(positions) == tuple(index)
    assert len(index) == len(positions)
    assert [index[j] for j in range(len(index))] == positions
    assert index.highest == max(positions, default=-1)
    assert index.has_new == (-1 in positions)
    assert index.is_whole == (positions == list(range(len(positions))))
    assert Index.of(positions) == index
    assert hash(Index.of(positions)) == hash(index)


@given(POSITIONS)
def test_neighbouring_runs_never_continue_each_other(positions):
    runs = list(Index.of(positions).runs)

    ends = [first if first < 0 else first + length for first, length in runs]
    assert all(end != first for end, (first, _) in zip(ends, runs[1:], strict=False))


@given(POSITIONS, st.integers(0, 30), st.integers(0, 30))
def test_a_stretch_of_runs_is_the_stretch_of_positions(positions, one, other):
    start, stop = sorted((min(one, len(positions)), min(other, len(positions))))

    assert Index(Index.of(positions).between(start, stop)) == tuple(positions[start:stop])


@given(st.lists(st.integers(0, 40), max_size=30), POSITIONS)
def test_positions_of_positions_are_those_of_the_first(before, later):
    inside = [i if i < len(before) else -1 for i in later]

    found = Index.of(inside).of_old(Index.of(before))

    assert found == tuple(-1 if i < 0 else before[i] for i in inside)


@given(st.lists(st.tuples(st.integers(-1, 3), FACTORS), max_size=30))
def test_runs_of_places_have_one_factor_each_and_leave_nothing_out(pairs):
    index, scale = Index.of([i for i, _ in pairs]), Scale.of([factor for _, factor in pairs])

    found = [
        (run.first if run.first < 0 else run.first + offset, run.scale)
        for run in runs_of(index, scale)
        for offset in range(run.length)
    ]

    assert found == pairs
    assert scale == tuple(factor for _, factor in pairs)


MAPS = st.fixed_dictionaries(
    {},
    optional={
        axis: st.lists(st.tuples(st.integers(-1, size - 1), FACTORS), min_size=1, max_size=5)
        for axis, size in (("a", 3), ("b", 2), ("c", 4))
    },
)


@pytest.mark.parametrize("text", ["a", "(a b)", "(a b c)", "(a (b + c))", "(a + b c + c)", "(2 a)", "(b (a c + c) 2)"])
@given(chosen=MAPS)
def test_the_places_of_a_dimension_are_those_of_each_of_its_coordinates(text, chosen):
    """Against all points of the new axes, one at a time: a point is new where one of its coordinates is."""
    sizes = {"a": 3, "b": 2, "c": 4}
    pairs = {axis: chosen.get(axis, [(i, 1.0) for i in range(size)]) for axis, size in sizes.items()}
    (dim,) = parse(text)

    found = places(dim, sizes, lambda axis, block: Places(*zip(*pairs[axis], strict=True)) if axis in chosen else None)

    assert list(zip(found.index, found.scale, strict=True)) == list(one_by_one(dim, sizes, pairs))


def one_by_one(dim, sizes, pairs):
    kind = type(dim).__name__
    if kind == "Axis":
        return pairs[dim.name] if dim.name in pairs else [(i, 1.0) for i in range(int(dim.name))]
    if kind == "Sum":
        result, start = [], 0
        for block in dim.blocks:
            result += [(i if i < 0 else i + start, factor) for i, factor in one_by_one(block, sizes, pairs)]
            start += block.size(sizes)
        return result
    result = [(0, 1.0)]
    for factor in dim.factors:
        inner, length = one_by_one(factor, sizes, pairs), factor.size(sizes)
        result = [(-1 if i < 0 or j < 0 else i * length + j, s * t) for i, s in result for j, t in inner]
    return result
