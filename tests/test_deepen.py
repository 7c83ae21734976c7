"""Deeper models: identity blocks keep the function, the copies of the literature are the layers they say."""

import json

import pytest
import toys
from later import LATER

import surgeon
from surgeon.errors import PlanError

if LATER:
    import torch
    from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_thread")

SPECIAL = ("opt-post-norm", "t5", "t5-gated", "bart", "bert", "roberta")
TABLED = [name for name in toys.TABLED if name not in SPECIAL]
# A norm stands on the branch, whose gain of zero silences it: what is added is 0 times something, in another order.
BRANCH_NORMS = ("gemma2", "gemma3_text", "olmo2")


@pytest.mark.parametrize("name", TABLED)
@pytest.mark.parametrize("at", [None, (0, 0, 5)])
def test_identity_blocks_keep_the_function(name, at, toy, tmp_path):
    surgeon.grow(toy(name), layers=9, at=at).save(tmp_path / "deep")

    model, report = toys.load(tmp_path / "deep")
    expected = toys.logits(toys.load(toy(name))[0])
    assert not any(report.values()), report
    if name == "gpt2-inverse-layer-idx":  # the queries of layers that move are rescaled, which rounds
        torch.testing.assert_close(toys.logits(model), expected, rtol=0, atol=2e-5)
    else:
        assert torch.equal(toys.logits(model), expected)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_a_new_block_that_keeps_its_biases_would_be_seen(name, toy, tmp_path):
    """LLaMA-Pro zeroes o_proj and down_proj by name: elsewhere they have other names, and biases that add."""
    surgeon.grow(toy(name), layers=7, at=[2]).save(tmp_path / "deep")
    model, _ = toys.load(tmp_path / "deep")
    old, new = (dict(toys.stacks(model)[0][layer].named_parameters()) for layer in (2, 3))
    silenced = [rest for rest in new if not new[rest].any()]

    with torch.no_grad():
        for rest in silenced:
            if rest.endswith("bias"):
                new[rest].copy_(old[rest])

    assert len(silenced) == 4  # weight and bias, of attention and MLP
    assert (toys.logits(model) - toys.logits(toys.load(toy(name))[0])).abs().max() > 0.1


@pytest.mark.parametrize("name", BRANCH_NORMS)
def test_zeroed_projections_behind_a_norm_would_learn_at_a_hundred_times_the_pace(name, toy, tmp_path):
    """What the zeroed gain avoids: a norm of zeros multiplies the gradient by 1 / sqrt(epsilon)."""
    surgeon.grow(toy(name), layers=7, at=[2]).save(tmp_path / "deep")
    model, _ = toys.load(tmp_path / "deep")
    old, new = (dict(toys.stacks(model)[0][layer].named_parameters()) for layer in (2, 3))

    with torch.no_grad():
        for rest in new:
            new[rest].zero_() if rest.endswith(("o_proj.weight", "down_proj.weight")) else new[rest].copy_(old[rest])
    tokens = toys.inputs(model)
    model(**tokens, labels=tokens["input_ids"]).loss.backward()

    rest = "mlp.down_proj.weight"
    assert new[rest].grad.norm() > 100 * old[rest].grad.norm()


@pytest.mark.parametrize("name", ["gemma3_text", "qwen2", "smollm3", "qwen3_moe-sparse-step", "gpt_oss"])
def test_every_layer_keeps_its_kind(name, toy, tmp_path):
    surgeon.grow(toy(name), layers=8, at=[1, 4]).save(tmp_path / "deep")

    before, after = (toys.load(path)[0].config for path in (toy(name), tmp_path / "deep"))
    for key in ("layer_types", "no_rope_layers"):
        if getattr(before, key, None) is not None:
            kinds = getattr(before, key)
            assert getattr(after, key) == [kinds[i] for i in (0, 1, 1, 2, 3, 4, 4, 5)]


def test_new_layers_are_spread_evenly_and_said_to_be_new(toy):
    def layer_map(layers: int) -> tuple[int | None, ...]:
        return surgeon.grow(toy("llama"), layers=layers).plan.layer_map

    assert layer_map(8) == (0, 1, 2, None, 3, 4, 5, None)
    assert layer_map(9) == (0, 1, None, 2, 3, None, 4, 5, None)
    assert layer_map(12) == (0, None, 1, None, 2, None, 3, None, 4, None, 5, None)
    assert layer_map(7) == (0, 1, 2, 3, 4, 5, None)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", *BRANCH_NORMS])
def test_a_new_block_learns_at_the_pace_of_its_neighbours(name, toy, tmp_path):
    """Zeroed projections behind a norm would get 600 to 1600 times the gradient; a zeroed gain does not."""
    surgeon.grow(toy(name), layers=7, at=[2]).save(tmp_path / "deep")
    model, _ = toys.load(tmp_path / "deep")

    tokens = toys.inputs(model)
    model(**tokens, labels=tokens["input_ids"]).loss.backward()

    layers = toys.stacks(model)[0]
    norms = [sum(p.grad.square().sum() for p in layer.parameters()).sqrt().item() for layer in layers]
    assert 0 < norms[3] < 10 * max(norms[2], norms[4])


@pytest.mark.parametrize(
    ("method", "layers", "order"),
    [
        ("stack", 9, [0, 1, 2, 3, 4, 5, 0, 1, 2]),
        ("interleave", 9, [0, 0, 1, 2, 2, 3, 4, 4, 5]),
        ("interleave", 12, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        ("solar", 8, [0, 1, 2, 3, 2, 3, 4, 5]),
    ],
)
def test_copies_are_the_layers_that_the_method_says(method, layers, order, toy, tmp_path):
    summary = surgeon.grow(toy("qwen3"), layers=layers, depth_method=method).save(tmp_path / "deep")

    before, after = load_file(toy("qwen3") / "model.safetensors"), load_file(tmp_path / "deep/model.safetensors")
    for new, old in enumerate(order):
        for rest in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
            assert torch.equal(after[f"model.layers.{new}.{rest}"], before[f"model.layers.{old}.{rest}"])
    assert summary.layer_map == tuple(order)
    assert "approximate" in summary.notes[-1]
    assert not any(toys.load(tmp_path / "deep")[1].values())


def test_interpolated_layers_are_the_mean_of_their_neighbours(toy, tmp_path):
    surgeon.grow(toy("llama"), layers=8, depth_method="interpolate").save(tmp_path / "deep")

    before, after = load_file(toy("llama") / "model.safetensors"), load_file(tmp_path / "deep/model.safetensors")
    rest = "mlp.up_proj.weight"
    mean = before[f"model.layers.2.{rest}"] / 2 + before[f"model.layers.3.{rest}"] / 2
    assert torch.equal(after[f"model.layers.3.{rest}"], mean)
    assert torch.equal(after[f"model.layers.7.{rest}"], before[f"model.layers.5.{rest}"])


def test_a_donor_gives_its_next_layers_byte_for_byte(toy, tmp_path):
    surgeon.truncate(toy("llama"), layers=3).save(tmp_path / "small")
    toys.build("llama", tmp_path / "donor", seed=5)

    surgeon.grow(tmp_path / "small", layers=5, donor=tmp_path / "donor").save(tmp_path / "grown")

    small, donor, grown = (load_file(tmp_path / out / "model.safetensors") for out in ("small", "donor", "grown"))
    for name, value in grown.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        assert torch.equal(value, (small if layer < 3 else donor)[name]), name
    assert not any(toys.load(tmp_path / "grown")[1].values())
    receipt = json.loads((tmp_path / "grown/surgeon.json").read_text())
    assert receipt["source"]["path"] == str((tmp_path / "small").resolve())
    assert receipt["source"]["donor"]["path"] == str((tmp_path / "donor").resolve())
    assert receipt["layer_map"] == [0, 1, 2, None, None]


def test_a_donors_layers_keep_their_kind_and_the_models_own_theirs(toy, tmp_path):
    surgeon.truncate(toy("gemma3_text"), layers=2).save(tmp_path / "small")

    summary = surgeon.grow(tmp_path / "small", layers="2x", donor=toy("gemma3_text")).save(tmp_path / "grown")

    sliding, full = "sliding_attention", "full_attention"
    assert toys.load(tmp_path / "grown")[0].config.layer_types == [sliding, sliding, full, sliding]
    assert summary.config_changes.keys() == {"num_hidden_layers", "layer_types"}


def test_a_donor_that_gives_nothing_changes_nothing(toy):
    surgery = surgeon.grow(toy("llama"), layers=6, donor=toy("llama"))

    assert surgery.plan.all_notes == ()
    assert surgery.plan.layer_map == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama-tied", {}, "differs from the model in 'lm_head.weight'"),
        ("llama", {"dtype": "bfloat16"}, "differs from the model in"),
        ("llama", {"rms_norm_eps": 0.5}, "rms_norm_eps = 0.5, the model's 1e-06"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta = 500000.0, the"),
        ("mistral", {}, "model_type = 'mistral', the model's 'llama'"),
    ],
)
def test_a_donor_of_another_make_is_refused(name, changes, message, toy, tmp_path):
    toys.build(name, tmp_path / "donor", **changes)
    surgeon.truncate(toy("llama"), layers=3).save(tmp_path / "small")

    with pytest.raises(PlanError, match=message):
        surgeon.grow(tmp_path / "small", layers=5, donor=tmp_path / "donor")


def test_a_donor_with_another_vocabulary_of_special_tokens_is_taken(toy, tmp_path):
    toys.build("llama", tmp_path / "donor", eos_token_id=5, attention_dropout=0.1)
    surgeon.truncate(toy("llama"), layers=3).save(tmp_path / "small")

    config = surgeon.grow(tmp_path / "small", layers=5, donor=tmp_path / "donor").spec.config

    assert (config["eos_token_id"], config["attention_dropout"]) == (2, 0.0)


def test_a_donor_for_what_only_one_can_give_is_refused(toy, tmp_path):
    surgeon.truncate(toy("llama"), layers=3).save(tmp_path / "small")
    once = surgeon.grow(tmp_path / "small", layers=4, donor=toy("llama"))

    with pytest.raises(PlanError, match="has a donor already"):
        surgeon.grow(once, layers=5, donor=toy("llama"))
    for others in ({"depth_method": "stack"}, {"at": [1, 2]}, {"intermediate_size": "2x"}):
        with pytest.raises(PlanError, match="a donor gives layers, nothing else"):
            surgeon.grow(tmp_path / "small", layers=5, donor=toy("llama"), **others)


def test_a_donor_of_another_shape_or_too_shallow_is_refused(toy, tmp_path):
    toys.build("llama", tmp_path / "wide", intermediate_size=64)
    surgeon.truncate(toy("llama"), layers=3).save(tmp_path / "small")

    with pytest.raises(PlanError, match="the donor differs from the model in"):
        surgeon.grow(tmp_path / "small", layers=5, donor=tmp_path / "wide")
    with pytest.raises(PlanError, match="the donor has 6 layers, not 9"):
        surgeon.grow(tmp_path / "small", layers=9, donor=toy("llama"))
    with pytest.raises(PlanError, match="cannot grow 3 layers to 2"):
        surgeon.grow(tmp_path / "small", layers=2, donor=toy("llama"))
    with pytest.raises(PlanError, match="a donor gives layers, nothing else"):
        surgeon.grow(tmp_path / "small", layers=5, donor=toy("llama"), hidden_size="2x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 4}, "cannot grow 6 layers to 4"),
        ({"layers": 8, "depth_method": "copy"}, "unknown --depth-method 'copy'"),
        ({"layers": 9, "depth_method": "solar"}, "solar makes two stacks of equal size out of 6 layers: not 9"),
        ({"layers": 8, "depth_method": "stack", "at": [1, 2]}, "stack places its layers itself"),
        ({"layers": 8, "at": [1]}, "2 layers are to be added, but 1 places are given"),
        ({"layers": 8, "at": [1, 6]}, "there is no layer 6 to put one after"),
        ({"layers": 13, "depth_method": "solar"}, "solar makes two stacks"),
        ({"hidden_size": "2x", "at": [1]}, "--at gives places for new layers, and --layers no number of them"),
        ({}, "nothing to grow"),
    ],
)
def test_what_cannot_be_is_refused(options, message, toy):
    with pytest.raises(PlanError, match=message):
        surgeon.grow(toy("llama"), **options)


@pytest.mark.parametrize("name", ["opt-post-norm", "bart", "bert"])
def test_a_model_without_identity_blocks_is_refused(name, toy):
    with pytest.raises(PlanError, match="normalises after the sum|no table|whole layers"):
        surgeon.grow(toy(name), layers=8)
