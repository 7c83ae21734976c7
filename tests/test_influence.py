"""Block influence and relative magnitude are their papers' formulas, of the tokens that are no padding."""

import math
from itertools import pairwise

import pytest
from later import LATER

if LATER:
    import torch
    from streamed import padded, plain, plain_states, stream, tokens

    from surgeon.measure.residual import Influence
    from surgeon.measure.scoring import score_states
    from surgeon.models.passage import Batch

pytestmark = pytest.mark.usefixtures("one_thread")

# A token's terms are taken in float32, each off by 1e-7 relative to numbers of order 1, and are then summed in float64.
CLOSE = 1e-6
LENGTHS = [14, 9, 5]


def influence(directory, ids, real=None):
    found, *_ = score_states(stream(directory), ids, real=real)
    return found["block-influence"], found["relative-magnitude"]


def by_formula(states, real):
    """Return 1 - E[cos(x, y)] and E[|y - x| / |y|] of each layer, token by token in float64."""
    blocks, magnitudes = [], []
    for before, behind in pairwise(states):
        cosines, shares = [], []
        for x, y in zip(before[real].double(), behind[real].double(), strict=True):
            cosines.append(float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)))
            shares.append(math.sqrt(float((y - x) @ (y - x))) / math.sqrt(float(y @ y)))
        blocks.append(1 - math.fsum(cosines) / len(cosines))
        magnitudes.append(math.fsum(shares) / len(shares))
    return blocks, magnitudes


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2", "mixtral"])
def test_both_scores_are_their_formulas(name, toy):
    ids = tokens(3)
    states = plain_states(plain(toy(name)), ids)

    blocks, magnitudes = influence(toy(name), ids)

    expected_blocks, expected_magnitudes = by_formula(states, torch.ones_like(ids, dtype=torch.bool))
    assert blocks == pytest.approx(expected_blocks, abs=CLOSE)
    assert magnitudes == pytest.approx(expected_magnitudes, abs=CLOSE)
    assert len(blocks) == len(magnitudes) == 6


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side, toy):
    ids = tokens(3, 14)
    rows, real = padded(ids, LENGTHS, left=side == "left")
    alone = [influence(toy("llama"), ids[row : row + 1, :length]) for row, length in enumerate(LENGTHS)]

    scores = influence(toy("llama"), rows, real)

    for number, values in enumerate(scores):
        weighted = [
            sum(length * one[number][layer] for length, one in zip(LENGTHS, alone, strict=True)) / sum(LENGTHS)
            for layer in range(6)
        ]
        # 1e-5: beside the rounding of the scores, that of the states, whose masked sums run in another order
        assert values == pytest.approx(weighted, abs=1e-5)
        assert influence(toy("llama"), rows)[number] != pytest.approx(weighted, abs=1e-3)


def test_relative_magnitude_is_that_of_the_residual_branch(toy):
    # Others divide |layer output| by |output + input|; their output holds the input already.
    ids = tokens(3)
    states = plain_states(plain(toy("llama")), ids)

    _, magnitudes = influence(toy("llama"), ids)

    for layer, (x, y) in enumerate(pairwise(states)):
        branch = y - x
        right = float((branch.norm(dim=-1) / (x + branch).norm(dim=-1)).mean())
        wrong = float((y.norm(dim=-1) / (y + x).norm(dim=-1)).mean())
        assert magnitudes[layer] == pytest.approx(right, abs=CLOSE)
        assert abs(right - wrong) > 0.01


def test_a_layer_that_only_scales_has_no_block_influence_but_a_magnitude():
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.zeros(2, 5), None, states, [])
    scorer = Influence(2)

    scorer.begin(batch)
    scorer.see(0, batch, states, 4 * states)
    scorer.see(1, batch, states, -states)

    assert scorer.block_influence() == pytest.approx([0, 2], abs=CLOSE)
    assert scorer.relative_magnitude() == pytest.approx([3 / 4, 2], abs=CLOSE)


def test_batches_count_by_their_tokens():
    one, other = (torch.randn(size, 3, 8, generator=torch.Generator().manual_seed(size)) for size in (1, 4))
    apart, together = Influence(1), Influence(1)

    for states in (one, other):
        batch = Batch(torch.zeros(states.shape[:2]), None, states, [])
        apart.begin(batch)
        apart.see(0, batch, states, states.flip(-1))
    both = torch.cat([one, other])
    batch = Batch(torch.zeros(5, 3), None, both, [])
    together.begin(batch)
    together.see(0, batch, both, both.flip(-1))

    assert apart.block_influence() == pytest.approx(together.block_influence(), abs=1e-12)  # the order of a float64 sum
    assert apart.relative_magnitude() == pytest.approx(together.relative_magnitude(), abs=1e-12)
