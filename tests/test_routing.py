"""The importance of experts is REAP's, expert by expert from the stored matrices; watching changes no output."""

import pytest
import toys
from later import LATER

if LATER:
    import torch
    from safetensors.torch import load_file
    from streamed import padded, plain, stream, tokens
    from torch.nn.functional import silu, softmax

    from surgeon.measure.routing import Routing
    from surgeon.measure.scoring import observe, score_states

pytestmark = pytest.mark.usefixtures("one_thread")

# float32: the norm of gate · f here, gate · norm of f there, over the same inputs; then means over a few tokens.
CLOSE = {"rtol": 1e-5, "atol": 0}
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "qwen2_moe", "phimoe", "granitemoe", "deepseek_v3")


def importance(directory, ids, real=None):
    return torch.tensor(
        score_states(stream(directory), ids, real=real, widths=["contribution"])[1]["contribution"]["experts"]
    )


def stored_experts(directory, layer):
    """Return a layer's router and its experts' gate, up and down matrices as the file holds them."""
    weights = load_file(directory / "model.safetensors")
    prefix = f"model.layers.{layer}."
    if f"{prefix}block_sparse_moe.gate.weight" in weights:
        inside, names = f"{prefix}block_sparse_moe.", ("w1", "w3", "w2")
    else:
        inside, names = f"{prefix}mlp.", ("gate_proj", "up_proj", "down_proj")
    return weights[f"{inside}gate.weight"], [
        [weights[f"{inside}experts.{expert}.{name}.weight"] for name in names] for expert in range(7)
    ]


def by_formula(directory, ids, real=None):
    """Return REAP's score of each expert, shape (6, 7), from the stored matrices and what reaches the experts."""
    model, inputs = plain(directory), []
    for layer in toys.stacks(model)[0]:
        for name, part in layer.named_modules():
            if name.endswith(".experts"):
                part.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(ids, use_cache=False, **({} if real is None else {"attention_mask": real.long()}))
    rows = []
    for layer, hidden in enumerate(inputs):
        states = hidden.view(-1, 48) if real is None else hidden.view(-1, 48)[real.flatten()]
        router, experts = stored_experts(directory, layer)
        gates, chosen = softmax(states @ router.T, -1).topk(3)
        gates = gates / gates.sum(-1, keepdim=True)
        row = []
        for expert, (gate, up, down) in enumerate(experts):
            terms = [
                float(weight[place] * torch.linalg.vector_norm((silu(x @ gate.T) * (x @ up.T)) @ down.T))
                for x, weight, picks in zip(states, gates, chosen, strict=True)
                for place in (picks == expert).nonzero()[:, 0]
            ]
            row.append(sum(terms) / len(terms) if terms else 0.0)
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_each_expert_has_the_importance_of_the_formula(name, toy):
    ids = tokens(3)

    found = importance(toy(name), ids)

    assert found.shape == (6, 7)
    torch.testing.assert_close(found, by_formula(toy(name), ids), **CLOSE)


def test_gates_are_renormalised_where_the_model_does_not(tmp_path):
    directory, ids = toys.build("qwen3_moe", tmp_path / "toy", norm_topk_prob=False), tokens()

    found = importance(directory, ids)

    torch.testing.assert_close(found, by_formula(directory, ids), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side, toy):
    ids, lengths = tokens(3, 14), [14, 9, 5]
    rows, real = padded(ids, lengths, left=side == "left")
    right, real_right = padded(ids, lengths, left=False)

    found = importance(toy("mixtral"), rows, real)

    expected = by_formula(toy("mixtral"), right, real_right)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)  # the states differ by float32 rounding as well
    assert (importance(toy("mixtral"), rows) - expected).abs().max() > 1e-2


def test_an_expert_that_no_token_reached_has_no_importance(toy):
    found = importance(toy("mixtral"), tokens(1, 1))

    assert [int((row > 0).sum()) for row in found] == [3] * 6
    torch.testing.assert_close(found, by_formula(toy("mixtral"), tokens(1, 1)), **CLOSE)


def test_every_token_is_counted_at_each_of_its_experts(toy):
    routing, streamed = Routing(6, 7), stream(toy("mixtral"))

    observe(streamed, tokens(3), watchers=[routing])

    assert routing._count.sum(-1).tolist() == [3 * 12 * 3] * 6


@pytest.mark.parametrize("name", MIXTURES)
def test_a_layer_puts_out_the_same_under_watch(name, toy):
    streamed = stream(toy(name))
    routing = Routing(6, 9)
    with torch.no_grad():
        (batch,) = streamed.embed(tokens(3))
        state = batch.hidden
        for index in range(6):
            with streamed.layer(index) as apply:
                expected = apply(batch, state)
                with routing.watch(index, streamed.module(index)):
                    found = apply(batch, state)
                assert torch.equal(apply(batch, state), expected)  # and nothing stays behind
            # experts are added up slot by slot: float32 in another order
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
            state = expected
    dense = 2 if name == "deepseek_v3" else 0
    assert (routing.result()["experts"] > 0).any(-1).tolist() == [index >= dense for index in range(6)]
