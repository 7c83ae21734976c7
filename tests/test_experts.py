"""Dense to experts: equal experts whose weights sum to 1 compute what the one MLP computed, and load as their type."""

import json
import shutil
from pathlib import Path

import pytest
import toys
from later import LATER

import surgeon
from surgeon.anatomy.expert_forms import EXPERT_FORMS
from surgeon.errors import PlanError
from surgeon.surgery import open_model

if LATER:
    import exact64
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM


# Qwen3-MoE has one kind of attention for all layers; the toy of Qwen3 has two.
VARIANTS = {
    "llama": {},
    "llama-tied": {},
    "mistral": {},
    "qwen3": {"max_window_layers": 0},
    "qwen3-full": {"max_window_layers": 28},  # a window that no layer has
    "qwen3-biases": {"use_sliding_window": False, "attention_bias": True},
}
GROWN = {"hidden_size": "2x", "intermediate_size": 72, "layers": 8}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Return a function from a variant and a dtype to its checkpoint."""
    directory = tmp_path_factory.mktemp("dense")

    def build(name: str, dtype: str = "float32") -> Path:
        path = directory / f"{name}-{dtype}"
        toy = name if name in toys.TOYS else name.partition("-")[0]
        return path if path.exists() else toys.build(toy, path, dtype=dtype, **VARIANTS[name])

    return build


def edit_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    kept = {key: value for key, value in (config | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("name", "grown"),
    [*((name, {}) for name in VARIANTS), ("llama-tied", GROWN), ("mistral", GROWN), ("qwen3-biases", GROWN)],
)
def test_the_function_is_kept(name, grown, dense, tmp_path):
    surgeon.grow(dense(name, "float64"), experts=5, **grown).save(tmp_path / "experts")

    before, after = exact64.logits64(dense(name, "float64")), exact64.logits64(tmp_path / "experts")
    assert (before - after).abs().max() < 1e-12  # float64 throughout; measured: 6e-15 alone, 1.4e-14 all at once
    # As transformers runs float64: norms and the router's softmax in float32, its weights off by some 2^-24 each.
    stock = exact64.logits(exact64.load64(tmp_path / "experts"))
    assert (before - stock).abs().max() < 1e-5
    assert AutoConfig.from_pretrained(tmp_path / "experts").model_type in ("mixtral", "qwen3_moe")


@pytest.mark.parametrize("name", VARIANTS)
def test_it_loads_plainly_and_computes_the_same_in_float32(name, dense, tmp_path):
    surgeon.grow(dense(name), experts=5, experts_per_token=3).save(tmp_path / "experts", max_shard_size="100KB")

    assert len(list((tmp_path / "experts").glob("model-*.safetensors"))) > 3
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "experts", output_loading_info=True)
    assert not any(report.values()), report
    expected = exact64.logits32(dense(name))
    with torch.no_grad():  # the kernel for experts that transformers takes unasked
        found = model.eval()(**toys.inputs(model, length=40), use_cache=False).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert model.config.architectures == [type(model).__name__]


def test_the_weights_have_to_be_renormalised(dense, tmp_path):
    surgeon.grow(dense("qwen3"), experts=5).save(tmp_path / "experts")
    edit_config(tmp_path / "experts", norm_topk_prob=False)

    assert (exact64.logits32(tmp_path / "experts") - exact64.logits32(dense("qwen3"))).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_every_expert_is_the_mlp_byte_for_byte(name, dense, tmp_path):
    surgeon.grow(dense(name), experts=3).save(tmp_path / "experts")

    before = load_file(dense(name) / "model.safetensors")
    after = load_file(tmp_path / "experts/model.safetensors")
    for layer in range(6):
        for rest, expert in EXPERT_FORMS[name].tensors.items():
            mlp = before.pop(f"model.layers.{layer}.{rest}")
            assert all(
                torch.equal(after.pop(f"model.layers.{layer}.{expert.format(number)}"), mlp) for number in range(3)
            )
    routers = [after.pop(tensor) for tensor in sorted(after.keys() - before.keys())]
    assert [tuple(router.shape) for router in routers] == [(3, 48)] * 6
    assert before.keys() == after.keys()
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)


def test_routers_are_drawn_for_each_layer_from_the_seed(dense, tmp_path):
    def routers(seed: int, place: str) -> torch.Tensor:
        surgeon.grow(dense("mistral"), experts=40, seed=seed).save(tmp_path / place)
        weights = load_file(tmp_path / place / "model.safetensors")
        return torch.stack([weights[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(6)])

    first, again, other = routers(3, "first"), routers(3, "again"), routers(4, "other")

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(router.flatten().tolist()) for router in first}) == 6
    assert first.std().item() == pytest.approx(0.02, rel=0.05)  # initializer_range; 11,520 numbers


def test_experts_part_by_what_is_routed_to_them(dense, tmp_path):
    """They start equal, but each sees tokens and weights of its own: their gradients differ, and none is zero."""
    surgeon.grow(dense("llama"), experts=4).save(tmp_path / "experts")
    model, _ = toys.load(tmp_path / "experts")

    tokens = toys.inputs(model, batch=4, length=40)["input_ids"]
    model(tokens, labels=tokens).loss.backward()

    gradients = model.model.layers[0].mlp.experts.down_proj.grad
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert all(not torch.allclose(gradients[i], gradients[j], rtol=0.1) for i in range(4) for j in range(i))


def test_depth_width_and_experts_in_one_command_are_the_steps_one_by_one(dense, tmp_path, run):
    sizes = ["--hidden-size", "2x", "--intermediate-size", 72, "--layers", 8]
    result = run(
        "grow", dense("llama-tied"), *sizes, "--experts", 4, "--experts-per-token", 3, "-o", tmp_path / "one", "--json"
    )
    assert result.code == 0, result.err
    surgeon.grow(dense("llama-tied"), **GROWN).save(tmp_path / "grown")
    surgeon.grow(tmp_path / "grown", experts=4, experts_per_token=3).save(tmp_path / "two")

    one, two = (load_file(tmp_path / place / "model.safetensors") for place in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    configs = [json.loads((tmp_path / place / "config.json").read_text()) for place in ("one", "two")]
    assert configs[0] == configs[1]
    assert configs[0]["tie_word_embeddings"] is True
    assert "lm_head.weight" not in one
    summary = json.loads(result.out)
    assert summary["layers"] == {"before": 6, "after": 8}
    assert any("experts start equal" in note for note in summary["notes"])
    (step,) = json.loads((tmp_path / "one/surgeon.json").read_text())["steps"]
    assert step["grow"]["experts"] == 4
    assert step["grow"]["experts_per_token"] == 3


def test_a_model_with_experts_can_be_grown_on(dense, tmp_path):
    surgeon.grow(surgeon.grow(dense("llama", "float64"), experts=4), hidden_size="2x", layers=8).save(tmp_path / "on")

    assert (exact64.logits64(tmp_path / "on") - exact64.logits64(dense("llama", "float64"))).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_generation_with_a_cache_is_generation_without(name, dense, tmp_path):
    surgeon.grow(dense(name), experts=4).save(tmp_path / "experts")

    def generated(directory: Path, *, use_cache: bool) -> torch.Tensor:
        model, _ = toys.load(directory)
        return model.generate(**toys.inputs(model), max_new_tokens=12, do_sample=False, use_cache=use_cache)

    cached = generated(tmp_path / "experts", use_cache=True)
    assert torch.equal(cached, generated(tmp_path / "experts", use_cache=False))
    assert torch.equal(cached, generated(dense(name), use_cache=True))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_what_a_short_config_leaves_to_its_type_is_written_out(name, dense, tmp_path):
    """Llama turns at 10,000 and Mixtral at 1,000,000 where neither says so: what is unsaid must stay what it was."""
    silent = shutil.copytree(dense(name), tmp_path / "silent")
    needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "head_dim", "tie_word_embeddings")
    needed += ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    edit_config(silent, **{key: ... for key in json.loads((silent / "config.json").read_text()) if key not in needed})
    surgeon.grow(silent, experts=4).save(tmp_path / "experts")

    before, after = (AutoConfig.from_pretrained(tmp_path / place).to_dict() for place in ("silent", "experts"))
    differing = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    assert differing <= {"model_type", "architectures", "_name_or_path"}
    expected = exact64.logits32(silent)
    assert (exact64.logits32(tmp_path / "experts") - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_keys_that_only_the_other_type_would_listen_to_are_left_out(dense, tmp_path):
    """A Llama ignores a sliding window in its config; a Mixtral would obey it."""
    stray = shutil.copytree(dense("llama"), tmp_path / "stray")
    edit_config(stray, sliding_window=3, num_experts=17)
    surgeon.grow(stray, experts=4).save(tmp_path / "experts")

    model, _ = toys.load(tmp_path / "experts")
    assert model.config.sliding_window is None
    assert model.config.num_local_experts == 4
    assert (exact64.logits32(tmp_path / "experts") - exact64.logits32(dense("llama"))).abs().max() < 1e-4


def test_a_headless_checkpoint_stays_headless(dense, tmp_path):
    toys.load(dense("llama"))[0].model.save_pretrained(tmp_path / "headless")
    surgeon.grow(tmp_path / "headless", experts=4).save(tmp_path / "experts")

    model, report = AutoModel.from_pretrained(tmp_path / "experts", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.architectures == [type(model).__name__] == ["MixtralModel"]


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("llama", {"attention_bias": True}, r"mixtral has no place for '.*self_attn.*bias'"),
        ("llama", {"mlp_bias": True}, r"mixtral has no place for '.*mlp.*bias'"),
        ("qwen3", {}, "qwen3_moe has one kind of attention for all layers, and this model has full_attention and sli"),
        ("gpt2", {}, "no model type is known that is gpt2 with experts"),
        ("gemma", {}, "no model type is known that is gemma with experts"),
        ("bert", {}, "no model type is known that is bert with experts"),
        ("mixtral", {}, "the layers of this mixtral have experts already"),
    ],
)
def test_what_has_no_form_with_experts_is_refused(name, overrides, reason, tmp_path):
    toys.build(name, tmp_path / "dense", **overrides)

    with pytest.raises(PlanError, match=reason) as caught:
        surgeon.grow(tmp_path / "dense", experts=4)
    assert caught.value.hint


def test_code_of_a_checkpoints_own_is_not_guessed_at(dense, tmp_path):
    own = shutil.copytree(dense("llama"), tmp_path / "own")
    edit_config(own, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})

    with pytest.raises(PlanError, match="auto_map"):
        surgeon.grow(own, experts=4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"experts": 1}, "--experts is 1; the least is 2"),
        ({"experts": 0}, "--experts is 0; the least is 2"),
        ({"experts": -4}, "--experts is -4; the least is 2"),
        ({"experts": True}, "--experts is True; the least is 2"),
        ({"experts": 10**9}, "1000000000 is no number of experts"),
        ({"experts": "2x"}, "--experts is '2x', no whole number"),
        ({"experts": 4, "experts_per_token": 5}, "a token cannot take 5 of 4 experts"),
        ({"experts": 4, "experts_per_token": 0}, "--experts-per-token is 0; the least is 1"),
        ({"experts_per_token": 3, "layers": 8}, "--experts-per-token has no effect without --experts"),
        ({"experts": 4, "layers": 8, "donor": "self"}, "a donor gives layers, nothing else"),
    ],
)
def test_senseless_numbers_are_refused(options, reason, dense):
    if "donor" in options:
        options = options | {"donor": dense("llama")}
    with pytest.raises(PlanError, match=reason) as caught:
        surgeon.grow(dense("llama"), **options)
    assert caught.value.hint


def test_a_router_that_nothing_will_ever_reach_and_sizes_that_kernels_refuse_are_said(dense):
    notes = surgeon.grow(dense("llama"), experts=4, experts_per_token=1).plan.notes

    assert any("its weight is always 1" in note for note in notes)
    assert any("52 is none" in note for note in notes)  # 104 bytes in bfloat16, no multiple of 16
    assert not any("multiples of 8" in note for note in surgeon.grow(dense("llama"), experts=4, **GROWN).plan.notes)


def test_planning_reads_no_weights_and_experts_are_moved_bytes(dense):
    surgery = open_model(dense("llama"))
    summary = surgeon.grow(surgery, experts=4).summary("out")

    mlp, router = 3 * 48 * 52, 4 * 48
    assert summary.parameters[1] - summary.parameters[0] == 6 * (3 * mlp + router)
    assert summary.bytes_read == surgery.summary("out").bytes_read
