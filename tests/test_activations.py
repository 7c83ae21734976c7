"""The importance of neurons, heads and channels is that of the formulas, of what hooks on the plain model see."""

import pytest
import toys
from later import LATER

if LATER:
    import torch
    from streamed import padded, plain, stream, tokens

    from surgeon.measure import scoring as score
    from surgeon.measure.activations import Activations
    from surgeon.measure.scoring import score_states
    from surgeon.models import streaming

pytestmark = pytest.mark.usefixtures("one_thread")

# The streamed pass computes what the plain one does to the last bit; means of |x| are then taken in float32 here and
# in float64 there, over 12 tokens, and squares summed over up to 12 norms: 1e-6 relative.
CLOSE = {"rtol": 1e-5, "atol": 0}
LENGTHS = [14, 9, 5]

# What reads the neurons, what reads the heads, and the norms that the residual stream is read through.
PARTS = {
    "llama": ("mlp.down_proj", "self_attn.o_proj", ("input_layernorm", "post_attention_layernorm")),
    "qwen3": ("mlp.down_proj", "self_attn.o_proj", ("input_layernorm", "post_attention_layernorm")),
    "phi3": ("mlp.down_proj", "self_attn.o_proj", ("input_layernorm", "post_attention_layernorm")),
    "gemma2": ("mlp.down_proj", "self_attn.o_proj", ("input_layernorm", "pre_feedforward_layernorm")),
    "olmo2": ("mlp.down_proj", "self_attn.o_proj", ("post_attention_layernorm", "post_feedforward_layernorm")),
    "gpt2": ("mlp.c_proj", "attn.c_proj", ("ln_1", "ln_2")),
    "opt": ("fc2", "self_attn.out_proj", ("self_attn_layer_norm", "final_layer_norm")),
    "gpt_neox": ("mlp.dense_4h_to_h", "attention.dense", ("input_layernorm", "post_attention_layernorm")),
}
GROUPED = ("llama", "qwen3", "phi3", "gemma2", "olmo2")  # 2 key-value heads of 4 heads; the others have 8 of 1


def importance(directory, ids, real=None, *, by="activation"):
    found = score_states(stream(directory), ids, real=real, widths=[by])[1][by]
    return {axis: torch.tensor(values, dtype=torch.float64) for axis, values in found.items()}


def by_hooks(directory, name, ids, real=None):
    """Return the importance of each axis by Minitron's formulas, from hooks on the plainly loaded model."""
    model, seen, handles = plain(directory), {}, []
    counted = torch.ones_like(ids, dtype=torch.bool) if real is None else real

    def note(key, states):
        mean = torch.stack(  # a sample's mean of |x| over its own tokens, shape (B, F)
            [row[mask].abs().double().mean(0) for row, mask in zip(states.view(*ids.shape, -1), counted, strict=True)]
        )
        seen[key] = mean.square().sum(0)

    neurons, heads, norms = PARTS[name]
    for index, layer in enumerate(toys.stacks(model)[0]):
        for key in (neurons, heads):
            hook = layer.get_submodule(key).register_forward_pre_hook(
                lambda _, args, key=(index, key): note(key, args[0])
            )
            handles.append(hook)
        for key in norms:
            hook = layer.get_submodule(key).register_forward_hook(lambda _, __, out, key=(index, key): note(key, out))
            handles.append(hook)
    with torch.no_grad():
        model(ids, use_cache=False, **({} if real is None else {"attention_mask": real.long()}))
    kv_heads, group = (2, 4) if name in GROUPED else (8, 1)
    squares = torch.stack([seen[index, heads] for index in range(6)]).view(6, kv_heads, group, -1)
    return {
        "ffn": torch.stack([seen[index, neurons].sqrt() for index in range(6)]),
        "heads": squares.sum(-1).sqrt(),
        "kv_heads": squares.sum((-1, -2)).sqrt(),
        "hidden": sum(seen[index, norm].sqrt() for index in range(6) for norm in norms),
    }


def contributions(directory, name, ids, real):
    """Return how far each layer's MLP and attention output moves when one neuron or head is silent.

    The states are those of the streamed pass, the distances in float64. A root of the mean over each sample's own
    tokens of the squared distance, and over samples of the sum.
    """
    model = plain(directory)
    moved, handles = {}, []

    def note(key, part, inputs):
        kv_heads, group = (2, 4) if name in GROUPED else (8, 1)
        size = inputs.shape[-1] // (kv_heads * group) if key[1] == "heads" else 1
        whole = part(inputs)
        for number in range(inputs.shape[-1] // size):
            silent = inputs.clone()
            silent[..., number * size : (number + 1) * size] = 0
            distance = (whole - part(silent)).view(*ids.shape, -1).square().sum(-1)
            means = [row[mask].mean() for row, mask in zip(distance, real, strict=True)]
            moved.setdefault(key, []).append(torch.stack(means).sum())

    neurons, heads, _ = PARTS[name]
    for index, layer in enumerate(toys.stacks(model)[0]):
        for axis, rest in (("ffn", neurons), ("heads", heads)):
            part = layer.get_submodule(rest)
            handles.append((part, (index, axis)))
    inputs = {}
    hooks = [
        part.register_forward_pre_hook(lambda _, args, key=key: inputs.update({key: args[0]})) for part, key in handles
    ]
    with torch.no_grad():
        model(ids, use_cache=False, attention_mask=real.long())
        for hook in hooks:
            hook.remove()
        model.double()
        for part, key in handles:
            note(key, part, inputs[key].double())
    found = {axis: torch.stack([torch.stack(moved[index, axis]) for index in range(6)]) for axis in ("ffn", "heads")}
    return {axis: squares.sqrt() for axis, squares in found.items()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for axis, values in expected.items():
        torch.testing.assert_close(found[axis], values, **CLOSE, msg=lambda text, axis=axis: f"{axis}: {text}")


@pytest.mark.parametrize("name", PARTS)
def test_every_axis_has_the_importance_of_the_formula(name, toy):
    ids = tokens(3)

    found = importance(toy(name), ids)

    assert_same(found, by_hooks(toy(name), name, ids))
    assert len(found["hidden"]) == (48 if name in ("llama", "qwen3", "gemma2") else 80)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_padding_is_not_counted(name, toy):
    rows, real = padded(tokens(3, 14), LENGTHS, left=False)

    found = importance(toy(name), rows, real)

    assert_same(found, by_hooks(toy(name), name, rows, real))
    wrong = by_hooks(toy(name), name, rows)
    assert all((found[axis] - wrong[axis]).abs().max() > 1e-2 * wrong[axis].max() for axis in found)


@pytest.mark.parametrize("name", PARTS)
def test_a_contribution_is_how_far_the_output_moves_when_a_neuron_or_a_head_is_silent(name, toy):
    """Of post-norm families the distance is taken in front of the norm, which scales it alike for all of a layer."""
    rows, real = padded(tokens(3, 14), LENGTHS, left=False)
    if name not in ("llama", "gpt2", "opt"):  # a plain model's padding may overflow
        rows, real = rows[:, : LENGTHS[-1]], real[:, : LENGTHS[-1]]

    found = importance(toy(name), rows, real, by="contribution")

    expected = contributions(toy(name), name, rows, real)
    torch.testing.assert_close(found["ffn"], expected["ffn"], **CLOSE)
    torch.testing.assert_close(found["heads"].flatten(1), expected["heads"], **CLOSE)
    torch.testing.assert_close(found["kv_heads"], found["heads"].square().sum(-1).sqrt(), **CLOSE)
    torch.testing.assert_close(found["hidden"], importance(toy(name), rows, real)["hidden"], **CLOSE)


def test_padding_on_the_left_is_not_counted(toy):
    ids = tokens(3, 14)
    (left, real_left), (right, real_right) = (padded(ids, LENGTHS, left=side) for side in (True, False))

    found, expected = importance(toy("llama"), left, real_left), importance(toy("llama"), right, real_right)

    for axis, values in expected.items():
        # 1e-4: the states themselves differ by float32 rounding, 1e-6 of the largest; the smallest means are 1e-2 of it
        torch.testing.assert_close(found[axis], values, rtol=1e-4, atol=0)


def test_samples_count_alike_whatever_their_length(toy):
    # The mean is over a sample's tokens, so that a long sample does not outweigh a short one.
    ids = tokens(2, 14)
    rows, real = padded(ids, [14, 3], left=False)
    one, other = importance(toy("llama"), ids[:1]), importance(toy("llama"), ids[1:, :3])

    found = importance(toy("llama"), rows, real)

    torch.testing.assert_close(found["ffn"], (one["ffn"] ** 2 + other["ffn"] ** 2).sqrt(), rtol=1e-4, atol=0)


def test_rows_in_several_batches_and_groups_give_the_same(toy, monkeypatch):
    ids, split = tokens(5), score.groups
    monkeypatch.setattr(streaming, "BATCH_TOKENS", 2 * ids.shape[1])
    monkeypatch.setattr(score, "groups", lambda rows, size, budget: split(rows, size, 3 * size))

    assert_same(importance(toy("llama"), ids), by_hooks(toy("llama"), "llama", ids))


def test_where_all_mlps_are_experts_no_neuron_is_scored(toy):
    found = importance(toy("mixtral"), tokens())

    assert set(found) == {"heads", "kv_heads", "hidden", "experts"}


def test_neurons_are_scored_in_the_layers_that_have_an_mlp_of_their_own(toy):
    found = importance(toy("qwen3_moe-sparse-step"), tokens())

    assert [bool(row.any()) for row in found["ffn"]] == [True, False, True, True, True, False]
    assert [bool(row.any()) for row in found["experts"]] == [False, True, False, False, False, True]


def test_no_hook_is_left_on_a_layer(toy):
    streamed = stream(toy("llama"))
    scorer = Activations(streamed.anatomy)

    with scorer.watch(0, streamed.module(0)):
        assert sum(bool(m._forward_pre_hooks or m._forward_hooks) for m in streamed.module(0).modules()) == 4

    assert not any(m._forward_pre_hooks or m._forward_hooks for m in streamed.module(0).modules())
