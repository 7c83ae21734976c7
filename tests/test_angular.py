"""Angular distances are those of the formula, over every block, from states that are what they should be."""

import math

import pytest
import toys
from later import LATER

if LATER:
    import torch
    from streamed import padded, plain, plain_states, stream, tokens

    from surgeon.measure import scoring as score
    from surgeon.measure.residual import Angular, distances, last_tokens
    from surgeon.measure.scoring import observe, score_states
    from surgeon.models.device import row_bytes
    from surgeon.models.passage import Batch

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [14, 9, 5]
# float32 states, the distance in float64: the angle of nearly parallel states is the root of what rounding leaves
# of 1 - cos, about 1e-7; toys' angles are 0.1 and more, where an error of 1e-7 in the cosine is one of 1e-7 / sin.
CLOSE = 1e-6


def angular(directory, ids, real=None, *, all_tokens=False):
    return score_states(stream(directory), ids, real=real, all_tokens=all_tokens)[0]["angular"]


def by_formula(states, places):
    """Return {(s, e): mean distance}, the textbook formula in float64; places[r] are the tokens of row r that count."""
    found = {}
    for s in range(len(states) - 1):
        for e in range(s + 1, len(states)):
            angles = []
            for row, counted in enumerate(places):
                for at in counted:
                    x, y = states[s][row, at].double(), states[e][row, at].double()
                    cosine = float(x @ y) / (math.sqrt(float(x @ x)) * math.sqrt(float(y @ y)))
                    angles.append(math.acos(max(-1.0, min(1.0, cosine))) / math.pi)
            found[s, e] = math.fsum(angles) / len(angles)
    return found


def assert_same(matrix, expected):
    for (s, e), value in expected.items():
        assert matrix[s][e] == pytest.approx(value, abs=CLOSE), (s, e)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_every_block_has_the_distance_of_the_formula(name, toy):
    ids = tokens(3)
    states = plain_states(plain(toy(name)), ids)

    matrix = angular(toy(name), ids)

    expected = by_formula(states, [[11]] * 3)
    assert len(expected) == 6 * 7 // 2
    assert_same(matrix, expected)


def test_blocks_of_every_size_and_start_are_there_and_nothing_else(toy):
    matrix = angular(toy("llama"), tokens())

    assert len(matrix) == 6
    for s, row in enumerate(matrix):
        assert len(row) == 7
        assert [value is None for value in row] == [e <= s for e in range(7)]
        assert all(0 < value <= 1 for value in row[s + 1 :])


def test_a_block_may_start_at_layer_0(toy):
    ids = tokens()
    embedded = plain(toy("llama")).model.embed_tokens(ids)[:, -1].detach().double()
    states = plain_states(plain(toy("llama")), ids)

    matrix = angular(toy("llama"), ids)

    cosine = torch.nn.functional.cosine_similarity(embedded, states[2][:, -1].double(), dim=-1)
    assert matrix[0][2] == pytest.approx(float(cosine.arccos().mean() / math.pi), abs=CLOSE)


def test_the_last_state_is_taken_before_the_final_norm(toy):
    # transformers' hidden_states[-1] is behind it: what other tools score, through the norm's trained gain.
    ids, model = tokens(), plain(toy("llama"))
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    before, behind = plain_states(model, ids), list(hidden)
    assert not torch.allclose(before[6], behind[6], atol=0.1)
    assert torch.equal(before[5], behind[5])

    matrix = angular(toy("llama"), ids)

    right, wrong = by_formula(before, [[11]] * 2), by_formula(behind, [[11]] * 2)
    for s in range(6):
        assert matrix[s][6] == pytest.approx(right[s, 6], abs=CLOSE)
        assert abs(right[s, 6] - wrong[s, 6]) > 100 * CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_the_last_token_is_the_last_that_is_no_padding(name, side, toy):
    ids = tokens(3, 14)
    alone = [angular(toy(name), ids[row : row + 1, :length]) for row, length in enumerate(LENGTHS)]
    rows, real = padded(ids, LENGTHS, left=side == "left")

    matrix = angular(toy(name), rows, real)

    expected = {(s, e): sum(one[s][e] for one in alone) / 3 for s in range(6) for e in range(s + 1, 7)}
    assert_same(matrix, expected)


def test_padding_that_counted_would_be_seen(toy):
    # The states of pads are others, so that the test above can fail.
    rows, real = padded(tokens(3, 14), LENGTHS, left=False)

    right, wrong = angular(toy("llama"), rows, real), angular(toy("llama"), rows)

    assert abs(right[2][5] - wrong[2][5]) > 100 * CLOSE


def test_the_last_real_token_of_a_row_is_found_wherever_the_padding_lies():
    real = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]]).bool()
    states = torch.arange(20.0).view(5, 4, 1)
    batch = Batch(torch.zeros(5, 4), real, states, [])

    assert last_tokens(batch, states)[:, 0].tolist() == [3, 7, 9, 14, 16]


def test_with_all_tokens_the_mean_runs_over_every_token_that_is_no_padding(toy):
    rows, real = padded(tokens(3, 14), LENGTHS, left=False)
    states = plain_states(plain(toy("llama")), rows, real)

    matrix = angular(toy("llama"), rows, real, all_tokens=True)

    assert_same(matrix, by_formula(states, [range(length) for length in LENGTHS]))
    assert abs(matrix[2][5] - angular(toy("llama"), rows, real)[2][5]) > 100 * CLOSE


@pytest.mark.parametrize("all_tokens", [False, True])
def test_rows_in_groups_score_as_rows_at_once(all_tokens, toy, monkeypatch):
    ids, streamed, calls = tokens(5), stream(toy("llama")), []
    whole, *_ = score_states(streamed, ids, all_tokens=all_tokens)
    row = row_bytes(ids.shape[1], streamed.hidden_size * (9 if all_tokens else 2))
    split = score.groups

    def small(rows, bytes_per_row, budget):
        calls.append(split(rows, bytes_per_row, 2 * row))
        return calls[-1]

    monkeypatch.setattr(score, "groups", small)

    grouped, *_ = score_states(streamed, ids, all_tokens=all_tokens)

    assert calls == [[(0, 1), (1, 3), (3, 5)]]
    for key, expected in whole.items():
        for values, others in zip(grouped[key], expected, strict=True):
            assert values == pytest.approx(others, abs=CLOSE)


def test_states_that_are_alike_have_distance_0_and_opposite_ones_1():
    # In float32 the cosine of a state with itself may be 1 - 6e-8, whose arc cosine is 3e-4: hence float64.
    random = torch.randn(50, 1, 576, generator=torch.Generator().manual_seed(0))
    states = torch.cat([random, 3 * random, -random], 1)

    found = distances(states)

    assert found.shape == (50, 3, 3)
    assert found.dtype == torch.float64
    assert float(found[:, 0, 1].max()) < 1e-8  # the root of 1e-16
    torch.testing.assert_close(found[:, 0, 2], torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-8)


def test_wide_states_are_folded_a_few_rows_at_a_time_with_the_same_result():
    # 3 states of 2**20 numbers: two rows at a time.
    states = [torch.randn(3, 1, 1 << 20, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    scorer = Angular(2, all_tokens=False)
    scorer.begin(Batch(torch.zeros(3, 1), None, states[0], []))
    for layer in range(2):
        scorer.see(layer, Batch(torch.zeros(3, 1), None, states[0], []), states[layer], states[layer + 1])
    scorer.end_group()

    matrix = scorer.result()

    expected = distances(torch.cat(states, 1)).mean(0)
    assert matrix[0][1:] == pytest.approx(expected[0, 1:].tolist(), abs=1e-12)  # float64 sums in another order
    assert matrix[1][2] == pytest.approx(float(expected[1, 2]), abs=1e-12)


def test_observers_may_look_on_together(toy):
    one, other, streamed = Angular(6, all_tokens=False), Angular(6, all_tokens=True), stream(toy("llama"))

    observe(streamed, tokens(), [one, other])

    assert one.result() == angular(toy("llama"), tokens())
    assert other.result() == angular(toy("llama"), tokens(), all_tokens=True)


def test_a_bypassed_layer_has_distance_0(tmp_path):
    # A layer whose branches put out nothing: o_proj and down_proj are zero.
    from safetensors.torch import load_file, save_file

    directory = toys.build("llama", tmp_path / "toy")
    weights = load_file(directory / "model.safetensors")
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        weights[f"model.layers.3.{name}"].zero_()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})

    matrix = angular(directory, tokens())

    assert matrix[3][4] < 1e-8  # arc cosine in float64 of a cosine that is 1 but for 1e-16
    assert min(matrix[s][s + 1] for s in (0, 1, 2, 4, 5)) > 0.01
