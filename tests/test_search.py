"""A search for the best cut: its cuts and moves, its surrogate, its order of work and its costs. Without weights."""

import json
import math
import random
from itertools import combinations, pairwise

import pytest
from handmade import checkpoint, llama

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.halves import Pairing
from surgeon.checkpoint.source import spec_of
from surgeon.errors import OutputError, PlanError
from surgeon.search.budget import OVER, Budget, Cost, Pricing, width_options
from surgeon.search.cuts import Candidate, Space, kept_halves, pieces_of
from surgeon.search.figures import Figures
from surgeon.search.journal import Journal, opened
from surgeon.search.loop import SCREEN, SEARCH, WATCH, Search, Settings
from surgeon.search.openings import Openings
from surgeon.search.surrogate import Surrogate, best_cuts, solve, telling_pairs
from surgeon.surgery import open_source
from surgeon.text import parse_count

# --- cuts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_set_of_pieces_leaves_halves_that_come_in_turns_and_is_the_only_one_that_leaves_them(count):
    depth = 5
    sets = [each for each in combinations(range(2 * depth - 1), count) if all(b - a > 1 for a, b in pairwise(each))]

    left = {pieces: kept_halves(pieces, depth) for pieces in sets}

    assert len(set(left.values())) == len(sets) == math.comb(2 * depth - count, count)
    for pieces, (attention, mlp) in left.items():
        Pairing(attention, mlp).check(depth)
        assert pieces_of(attention, mlp, depth) == pieces


def test_a_half_that_stays_slides_through_the_gap_beside_it():
    space = Space.of(8, halves=True)
    block = (6, 8, 10)  # layers 3, 4 and 5

    moved = set(space.moves(block))

    slid = pieces_of(*kept_halves((6, 9, 11), 8), 8)
    assert kept_halves(slid, 8) == ((0, 1, 2, 4, 7), (0, 1, 2, 6, 7))  # attention 4 with the MLP of 6
    assert slid in moved
    assert (6, 8, 14) in moved  # layer 7 in place of 5


@pytest.mark.parametrize("halves", [True, False])
def test_every_move_is_a_cut_of_as_many_pieces_that_may_go_and_comes_once(halves):
    space = Space.of(7, halves=halves, protect=(1, 1))

    for start in ((2, 4, 8), (2, 6, 10)):
        moved = list(space.moves(start))

        assert len(moved) == len(set(moved))
        assert start not in moved
        for pieces in moved:
            assert len(pieces) == 3
            assert set(pieces) <= set(space.free)
            Pairing(*kept_halves(pieces, 7)).check(7)


def test_protected_layers_are_in_no_piece_that_may_go():
    space = Space.of(6, halves=True, protect=(1, 2))

    assert space.free == (2, 3, 4, 5, 6)
    assert space.most == 3


# --- the surrogate ----------------------------------------------------------------------------------------------


def planted(depth, seed, *, halves=False):
    """Return a space and a quadratic of random costs over it."""
    draw = random.Random(seed)
    space = Space.of(depth, halves=halves)
    alone = {piece: draw.uniform(0.1, 1.0) for piece in space.free}
    together = {(a, b): alone[a] + alone[b] + draw.uniform(-0.3, 0.6) for a, b in combinations(space.layers, 2)}
    return space, Surrogate(alone, together)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_cuts_begin_with_the_one_that_trying_all_finds(seed, halves):
    space, quadratic = planted(8, seed, halves=halves)
    sets = [each for each in combinations(space.free, 3) if all(b - a > 1 for a, b in pairwise(each))]

    found = best_cuts(quadratic, space, 3, most=5, seed=seed)

    ranked = sorted(sets, key=lambda pieces: (quadratic(Candidate(pieces)), pieces))
    assert found[0] == ranked[0]
    assert len(set(found)) == 5
    costs = [quadratic(Candidate(pieces)) for pieces in found]
    assert costs == sorted(costs)


def test_a_pair_is_predicted_as_it_was_measured_and_a_piece_between_two_layers_as_their_mean():
    quadratic = Surrogate({0: 1.0, 2: 2.0, 3: 1.5, 4: 3.0, 8: 0.5}, {(2, 8): 4.0, (4, 8): 3.0})

    assert quadratic(Candidate((2, 8))) == pytest.approx(4.0)
    assert quadratic(Candidate((0, 8))) == pytest.approx(1.5)  # not measured: nothing beyond the parts
    assert quadratic(Candidate((3, 8))) == pytest.approx(1.5 + 0.5 + (1.5 - 0.5) / 2)


def test_the_factors_and_corrections_follow_what_was_measured():
    space, quadratic = planted(9, 4)
    draw = random.Random(0)
    off = {piece: draw.uniform(-0.2, 0.2) for piece in space.free}
    cuts = {Candidate(tuple(sorted(draw.sample(space.layers, 3)))) for _ in range(60)}

    def truth(cut):
        singles, pairs, _ = quadratic.parts(cut)
        return 0.6 * singles + 0.3 * pairs + sum(off[piece] for piece in cut.pieces)

    seen, unseen = sorted(cuts)[:30], sorted(cuts)[30:]
    fitted = quadratic.fitted({cut: truth(cut) for cut in seen})

    def error(prediction):
        return math.fsum(abs(prediction(cut) - truth(cut)) for cut in unseen) / len(unseen)

    assert error(fitted) < 0.25 * error(quadratic)
    assert fitted.eta < 0.6


def test_each_axis_has_a_factor_of_its_own():
    """A repair makes up for most of what neurons cost and for little of what channels do: pieces are not to blame."""
    _, quadratic = planted(9, 4)
    widths = {("ffn", 64): 1.0, ("ffn", 96): 0.4, ("hidden", 32): 1.0}
    bare = Surrogate({**quadratic.alone, **widths}, quadratic.together)
    worth = {"ffn": 0.3, "hidden": 0.9}
    cuts = [Candidate((0, 4), (width,)) for width in widths] + [Candidate((), (width,)) for width in widths]
    cuts += [Candidate((0, 4, 8)), Candidate((2, 6, 10))]

    def truth(cut):
        return bare(Candidate(cut.pieces)) + sum(worth[width[0]] * widths[width] for width in cut.widths)

    fitted = bare.fitted({cut: truth(cut) for cut in cuts})

    assert fitted.widths["ffn"] == pytest.approx(0.3, abs=0.05)
    assert fitted.widths["hidden"] == pytest.approx(0.9, abs=0.05)
    assert fitted.scale == pytest.approx(1.0, abs=0.05)


def test_three_cuts_do_not_decide_what_pairs_are_worth():
    """Of eight pieces 28 pairs are added up: a large factor for them promises cuts for less than nothing."""
    blocks = {  # the first piece: what eight pieces cost alone, what their pairs cost beyond that, and the whole cut
        0: (3.8, -0.65, 0.72),
        20: (1.9, -0.18, 0.61),
        40: (1.95, -0.28, 0.65),
    }
    alone, together, measured = {}, {}, {}
    for first, (singles, beyond, cost) in blocks.items():
        pieces = tuple(range(first, first + 16, 2))
        alone |= dict.fromkeys(pieces, singles / 8)
        together |= dict.fromkeys(combinations(pieces, 2), singles / 4 + beyond / 28)
        measured[Candidate(pieces)] = cost

    fitted = Surrogate(alone, together).fitted(measured)

    assert 0.5 * fitted.scale < fitted.eta < 1.5 * fitted.scale


def test_two_measurements_fit_nothing():
    _, quadratic = planted(6, 0)

    fitted = quadratic.fitted({Candidate((0, 2)): 1.0, Candidate((4, 6)): 9.0})

    assert (fitted.scale, fitted.eta, fitted.corrections) == (1.0, 1.0, {})


def test_equations_are_solved():
    draw = random.Random(1)
    half = [[draw.gauss(0, 1) for _ in range(6)] for _ in range(6)]
    matrix = [[math.fsum(a * b for a, b in zip(one, other, strict=True)) for other in half] for one in half]
    answer = [draw.gauss(0, 1) for _ in range(6)]
    right = [math.fsum(a * b for a, b in zip(row, answer, strict=True)) for row in matrix]

    assert solve(matrix, right) == pytest.approx(answer, abs=1e-8)


def test_telling_pairs_have_a_costly_layer_or_are_neighbours_and_none_that_no_good_cut_has():
    alone = {2 * layer: cost for layer, cost in enumerate([50.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])}

    pairs = telling_pairs(alone, 3)

    assert all(0 not in pair for pair in pairs)
    assert (2, 4) in pairs  # neighbours
    assert (2, 12) in pairs  # layer 6 is of the costliest third
    assert (2, 6) not in pairs
    assert telling_pairs(alone, 3, limit=2) == [(2, 4), (4, 6)]


# --- figures ----------------------------------------------------------------------------------------------------


def figures(cost, *, rows=4):
    """Return figures of rows of ten tokens whose mean KL is `cost`, and loss that and 2."""
    each = tuple(10.0 * (cost + 0.01 * (row - (rows - 1) / 2)) for row in range(rows))
    return Figures(tuple(value + 20 for value in each), each, (5.0,) * rows, (4.0,) * rows, (10.0,) * rows)


def test_the_error_of_a_difference_is_that_of_paired_rows():
    one = Figures((11.0, 24.0), (1.0, 4.0), (0.0, 0.0), (0.0, 0.0), (10.0, 10.0))
    two = Figures((9.0, 18.0), (0.0, 1.0), (0.0, 0.0), (0.0, 0.0), (10.0, 10.0))

    mean, error = one.over(two, "loss")

    assert mean == pytest.approx(0.4)  # 2 and 6 of 10 tokens each
    assert error == pytest.approx(0.2)  # their standard deviation 0.283, over the root of 2


# --- the order of work ------------------------------------------------------------------------------------------


def ten_layers(place, ffn):
    """Return the anatomy of a Llama of ten layers, of headers alone."""
    tensors, sizes = llama(layers=10, hidden=64, ffn=ffn), {"hidden_size": 64, "intermediate_size": ffn}
    return read_anatomy(spec_of(open_source(checkpoint(place, tensors=tensors, num_hidden_layers=10, **sizes))))


@pytest.fixture(scope="module")
def anatomy(tmp_path_factory):
    return ten_layers(tmp_path_factory.mktemp("ten") / "llama", 256)


@pytest.fixture(scope="module")
def broad(tmp_path_factory):
    """Return an anatomy of so many neurons that a search looks at every 128th size alone."""
    return ten_layers(tmp_path_factory.mktemp("broad") / "llama", 1536)


class World:
    """Measures cuts by a planted quadratic with a few more interactions, and counts what it is asked for."""

    def __init__(self, space, quadratic, *, truth=None, fail_at=None):
        self.space, self.quadratic, self.truth = space, quadratic, truth or quadratic
        self.fail_at, self.against = fail_at, None
        self.asked = []

    def cost(self, stage, candidate):
        if stage == WATCH and self.against is not None:
            return self.against(candidate)
        three = sum(math.sin(a * b + c) for a, b, c in combinations(candidate.pieces, 3))
        return 0.5 + (self.quadratic if stage == SCREEN else self.truth)(candidate) + 0.05 * three

    def __call__(self, stage, candidates):
        if self.fail_at is not None and len(self.asked) >= self.fail_at:
            raise KeyboardInterrupt
        self.asked.append((stage, tuple(candidates)))
        return [figures(self.cost(stage, each)) for each in candidates]


def searched(anatomy, world, journal, *, layers=6, openings=None, **settings):
    """Return a search that was run."""
    openings = openings or Openings()
    asked = Settings(**{"evaluations": 60} | settings)
    found = Search(journal, Pricing(anatomy, Budget(layers=layers)), world.space, ((),), asked, openings)
    found.ranked = found.run()
    return found


def test_the_search_finds_the_best_of_all_cuts_with_few_evaluations(anatomy):
    space, quadratic = planted(10, 7, halves=True)
    world = World(space, quadratic)

    found = searched(anatomy, world, Journal({}, world))

    sets = (each for each in combinations(space.free, 4) if all(b - a > 1 for a, b in pairwise(each)))
    costs = sorted(world.cost(SEARCH, Candidate(pieces)) for pieces in sets)
    assert world.cost(SEARCH, found.ranked[0]) <= costs[3]  # of 1,820
    assert len(found.measured(all_sizes=True)) <= 60
    assert found.stopped


def test_what_scores_would_cut_is_measured_first_and_is_taken_where_repairs_make_it_the_best(anatomy):
    """A block that is bad bare and good repaired is in no proposal of the surrogate, which is of bare pieces."""
    space, quadratic = planted(10, 7, halves=True)
    block = Candidate((8, 10, 12, 14))
    bad = {piece: cost + 3.0 * (piece in block.pieces) for piece, cost in quadratic.alone.items()}
    pairs = {(a, b): bad[a] + bad[b] + beyond for (a, b), beyond in quadratic.beyond.items()}
    bare = Surrogate(bad, pairs)
    world = World(space, bare, truth=lambda cut: 0.01 if cut == block else 5.0 + bare(cut))
    distances = [[None if e <= s else 0.1 + 0.01 * (s != 4) for e in range(11)] for s in range(10)]

    blind = searched(anatomy, world, Journal({}, world))
    found = searched(anatomy, world, Journal({}, world), openings=Openings(distances, [[1.0] * 10]))

    assert block not in blind.measured()
    assert next(iter(found.measured())) == block
    assert found.ranked[0] == block


def test_openings_are_of_every_kind_in_turns():
    distances = [[None if e <= s else abs(s - 3) + 0.5 for e in range(6)] for s in range(5)]
    space = Space.of(5, halves=True, protect=(0, 1))
    ffn = {(("ffn", size),): count for size, count in ((96, 2), (64, 1), (48, 0), (32, 0))}
    counts = {(): 2, **ffn, (("heads", 2),): 0, (("ffn", 64), ("heads", 2)): 0}

    cuts = Openings(distances, [[1, 0, 5, 0.5, 9], [0, 0, 1, 1, 1]]).cuts(space, counts)

    assert cuts[:5] == [
        Candidate((4, 6)),  # the closest block that spares the last layer
        Candidate((2, 6)),  # the lowest of each of the two scores
        Candidate((0, 2)),
        Candidate((), (("ffn", 48),)),  # the widest that is small enough alone
        Candidate((6,), (("ffn", 64),)),  # and one with half of the depth
    ]
    assert set(cuts[5:]) == {Candidate((), (("heads", 2),)), Candidate((2, 4))}
    assert Openings().cuts(space, {}) == []


def test_a_search_of_widths_alone_opens_without_scores(anatomy):
    counts = {(("ffn", 128),): 0, (("ffn", 192),): 0}

    assert Openings().cuts(Space(10, ()), counts) == [Candidate((), (("ffn", 192),))]


def test_it_measures_what_it_may_and_a_few_cuts_on_the_way(anatomy):
    space, quadratic = planted(10, 3)
    world = World(space, quadratic)

    found = searched(anatomy, world, Journal({}, world), evaluations=30)

    sizes = sorted({len(each.pieces) for each in found.measured(all_sizes=True)})
    assert sizes == [1, 2, 3, 4]
    assert len(found.measured(all_sizes=True)) == 30
    assert all(len(each.pieces) == 4 for each in found.measured())
    assert found.stopped == "30 evaluations were made"


def test_a_killed_search_goes_on_to_the_same_answer_and_measures_nothing_twice(anatomy, tmp_path):
    space, quadratic = planted(10, 5, halves=True)
    whole = World(space, quadratic)
    wanted = searched(anatomy, whole, Journal({}, whole))
    killed = World(space, quadratic, fail_at=len(whole.asked) // 2)
    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "search.json", {"model": "a"}, killed) as journal:
        searched(anatomy, killed, journal)

    resumed = World(space, quadratic)
    with opened(tmp_path / "search.json", {"model": "a"}, resumed) as journal:
        found = searched(anatomy, resumed, journal)

    assert found.ranked == wanted.ranked
    assert found.measured() == wanted.measured()
    assert killed.asked + resumed.asked == whole.asked


def test_another_target_takes_from_what_was_measured(anatomy, tmp_path):
    space, quadratic = planted(10, 5)
    first, second = World(space, quadratic), World(space, quadratic)
    with opened(tmp_path / "search.json", {}, first) as journal:
        searched(anatomy, first, journal, layers=6)
    with opened(tmp_path / "search.json", {}, second) as journal:
        searched(anatomy, second, journal, layers=7)

    asked = {(stage, each) for stage, cuts in first.asked for each in cuts}
    again = [(stage, each) for stage, cuts in second.asked for each in cuts if (stage, each) in asked]
    assert again == []
    assert all(len(cuts) < 10 for stage, cuts in second.asked if stage == "screen")


def test_a_state_of_another_model_is_refused_by_name(tmp_path):
    with opened(tmp_path / "search.json", {"model": "a"}, lambda stage, cuts: []) as journal:
        journal.write()

    with (
        pytest.raises(OutputError, match="begun with another MODEL"),
        opened(tmp_path / "search.json", {"model": "b"}, lambda stage, cuts: []),
    ):
        pass


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1, "request": {}, "measured": [{"stage": "search"}]}'])
def test_a_damaged_state_is_refused(content, tmp_path):
    (tmp_path / "search.json").write_text(content)

    with pytest.raises(OutputError, match="damaged"), opened(tmp_path / "search.json", {}, lambda stage, cuts: []):
        pass


def test_moves_that_are_worse_on_the_second_text_are_refused_and_end_the_search(anatomy):
    space, misleading = planted(10, 2, halves=True)
    world = World(space, misleading, truth=planted(10, 9, halves=True)[1])  # what is alone says little of what is best
    world.against = lambda candidate: -world.cost(SEARCH, candidate)  # whatever is better here is worse there

    found = searched(anatomy, world, Journal({}, world), watches=True)

    assert len(found.refused) >= 3
    assert found.stopped == "the second text got worse with what was better on the first"
    assert not set(found.refused) & set(found.ranked)


def test_the_seed_and_nothing_else_draws(anatomy):
    space, quadratic = planted(10, 8, halves=True)
    runs = []
    for _ in range(2):
        world = World(space, quadratic)
        searched(anatomy, world, Journal({}, world), seed=5)
        runs.append(world.asked)

    assert runs[0] == runs[1]


def test_time_that_is_over_ends_the_search(anatomy):
    space, quadratic = planted(10, 8)
    world = World(space, quadratic)
    journal = Journal({}, world, seconds=100.0)

    found = searched(anatomy, world, journal, seconds=1.0)

    assert found.stopped == "its time was over"
    assert found.ranked


# --- budgets ----------------------------------------------------------------------------------------------------


def test_the_cost_of_a_cut_is_that_of_its_plan(anatomy):
    pricing = Pricing(anatomy, Budget(parameters=1))
    widths = [each for each in width_options(anatomy, tuple(OVER)) if each]
    space = Space.of(10, halves=False)

    assert widths
    for each in widths[:: max(1, len(widths) // 12)]:
        spec = pricing.anatomy.spec
        exact = pricing.cost(Candidate((2, 6), each))
        assert exact.parameters < spec.num_parameters
        assert pricing._least(each, space, 2) == exact  # in bulk the same, to the byte


def test_the_fewest_layers_go_that_meet_a_budget(anatomy):
    whole = anatomy.spec.num_parameters
    one = whole - Pricing(anatomy, Budget()).cost(Candidate((0,))).parameters
    space = Space.of(10, halves=True)

    assert Pricing(anatomy, Budget(parameters=whole)).fewest((), space) == 0
    assert Pricing(anatomy, Budget(parameters=whole - 1)).fewest((), space) == 1
    assert Pricing(anatomy, Budget(parameters=whole - 3 * one)).fewest((), space) == 3
    assert Pricing(anatomy, Budget(parameters=1)).fewest((), space) is None


def test_a_budget_beyond_reach_is_refused_with_the_smallest_there_can_be(anatomy):
    space, options = Space.of(10, halves=True), width_options(anatomy, tuple(OVER))
    pricing = Pricing(anatomy, Budget(parameters=10))

    with pytest.raises(PlanError, match="the smallest result that can be searched has") as caught:
        pricing.check(space, options)

    smallest = int(str(caught.value).split(" has ")[1].split(" ")[0].replace(",", ""))
    Pricing(anatomy, Budget(parameters=smallest)).check(space, options)
    with pytest.raises(PlanError):
        Pricing(anatomy, Budget(parameters=smallest - 1)).check(space, options)


def test_widths_are_legal_sizes_down_to_half(anatomy):
    options = width_options(anatomy, ("intermediate-size", "hidden-size", "heads"))

    assert options[0] == ()
    for widths in options:
        for axis, size in widths:
            assert anatomy.sizes[axis] / 2 <= size < anatomy.sizes[axis]
    assert width_options(anatomy, ("layers", "halves")) == ((),)


def one_step_wider(widths, step=32):
    return tuple((axis, size + step if axis == "ffn" else size) for axis, size in widths)


def test_neurons_fill_what_a_budget_leaves(broad):
    """Between the eight sizes of an axis lies the one that a budget leaves room for."""
    space = Space.of(10, halves=True)
    pricing = Pricing(broad, Budget(parameters=round(0.79 * broad.spec.num_parameters)))
    options = [each for each in width_options(broad, ("intermediate-size", "heads")) if "ffn" in dict(each)]
    counts = {each: count for each in options if (count := pricing.fewest(each, space)) is not None}

    filled = {each: pricing.filled(each, space, count) for each, count in counts.items()}

    assert any(filled[each] != each for each in counts)
    for each, wide in filled.items():
        own, new, gone = dict(each), dict(wide), tuple(range(0, 2 * counts[each], 2))
        assert {**new, "ffn": own["ffn"]} == own  # heads stay
        assert own["ffn"] <= new["ffn"] < broad.sizes["ffn"]
        assert pricing.can_be(Candidate(gone, wide))
        wider = one_step_wider(wide)
        assert dict(wider)["ffn"] >= broad.sizes["ffn"] or not pricing.meets(Candidate(gone, wider))


def test_neurons_fill_no_more_than_fits_whichever_layers_go(toy):
    """Some layers of this model are smaller than others: what fits without the largest may not fit without those."""
    anatomy = read_anatomy(spec_of(open_source(toy("qwen3_moe-sparse-step"))))
    space = Space.of(anatomy.depth, halves=False)
    pricing = Pricing(anatomy, Budget(parameters=round(0.7 * anatomy.spec.num_parameters)))

    filled = {}
    for each in width_options(anatomy, ("intermediate-size",)):
        if each and (count := pricing.fewest(each, space)) is not None:
            filled[each] = pricing.filled(each, space, count)
            if filled[each] != each:
                cuts = [Candidate(pieces, filled[each]) for pieces in combinations(space.layers, count)]
                assert all(map(pricing.meets, cuts))

    assert filled


@pytest.mark.parametrize("budget", [Budget(parameters=150_000, milliseconds=3.0), Budget(layers=8)])
def test_neurons_fill_nothing_where_no_header_tells_what_they_cost(broad, budget):
    assert Pricing(broad, budget).filled((("ffn", 768),), Space.of(10, halves=True), 2) == (("ffn", 768),)


def test_a_search_takes_the_width_that_fills_its_budget(broad):
    """The truth here is the share of the neurons that are gone: the widest that fits is the best."""
    space = Space(10, ())
    budget = Budget(parameters=round(0.83 * broad.spec.num_parameters))
    world = World(space, Surrogate({}), truth=lambda cut: 1536 / dict(cut.widths).get("ffn", 1536))
    options = width_options(broad, ("intermediate-size",))
    journal = Journal({}, world)

    found = Search(journal, Pricing(broad, budget), space, options, Settings(evaluations=12))
    (best, *_) = found.run()

    coarse = [each for each in options if each and budget.allows(found.pricing.cost(Candidate((), each)))]
    assert dict(best.widths)["ffn"] > max(dict(each)["ffn"] for each in coarse)
    assert not budget.allows(found.pricing.cost(Candidate((), one_step_wider(best.widths))))


def test_sizes_that_were_given_are_not_filled(broad):
    space, quadratic = planted(10, 7)
    world = World(space, quadratic)
    given = (("ffn", 1024),)
    budget = Budget(parameters=round(0.6 * broad.spec.num_parameters))

    found = Search(Journal({}, world), Pricing(broad, budget), space, (given,), Settings(evaluations=8))
    found.run()

    assert {each.widths for each in found.measured()} == {given}


def test_a_width_between_two_that_were_measured_costs_what_their_line_says():
    costs = Surrogate({("ffn", 256): 0.0, ("ffn", 192): 0.5, ("ffn", 128): 2.0, ("heads", 2): 9.0})

    assert costs.narrowed("ffn", 192) == 0.5
    assert costs.narrowed("ffn", 224) == 0.25
    assert costs.narrowed("ffn", 144) == pytest.approx(2.0 - 1.5 * 16 / 64)
    assert costs.narrowed("ffn", 96) == 2.0  # beyond all that were
    assert costs.narrowed("hidden", 96) == 0.0
    assert costs(Candidate((), (("ffn", 224), ("heads", 2)))) == pytest.approx(9.25)


def test_a_budget_on_the_way_asks_for_a_share_of_what_has_to_go():
    budget = Budget(parameters=600, memory=5000, milliseconds=4.0)

    eased = budget.eased(Cost(1000, 4000, 0, 8.0), 10, 0.25)

    assert eased == Budget(parameters=900, memory=5000, milliseconds=7.0)
    assert Budget(layers=6).eased(Cost(1, 1), 10, 0.5) == Budget(layers=8)


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ("100M", 100000000),
        ("6.7B", 6700000000),
        (6700000000.0, 6700000000),
        ("80k", 80000),
        ("1,000", 1000),
        ("1e9", 10**9),
        ("M", None),
        ("-5", None),
        ("100MB", None),
        (math.nan, None),
        (math.inf, None),
        (-1.0, None),
    ],
)
def test_numbers_of_parameters_are_read_as_they_are_written(written, count):
    assert parse_count(written) == count


def test_figures_come_back_from_a_file_as_they_were():
    one = figures(1 / 3)

    assert Figures.read(json.loads(json.dumps(one.to_dict()))) == one
