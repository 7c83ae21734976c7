"""Magnitudes are sums over the tensors in the files, each weight counted where it belongs."""

import json

import pytest
import toys
from later import LATER

from surgeon.errors import MeasureError, PlanError
from surgeon.surgery import open_source

if LATER:
    import torch
    from safetensors.torch import load_file, save_file

    from surgeon.measure import magnitude
    from surgeon.measure.magnitude import layer_magnitudes, width_magnitudes

KV, GROUP, DIM = 2, 4, 10  # of toys with grouped keys; the others have 8 heads, each a key-value head of its own
EXACT = {"rtol": 1e-12, "atol": 0}  # sums in float64 over float32 numbers, in another order


def stored(directory):
    """Return |w| of every stored tensor, in float64."""
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= {name: tensor.abs().double() for name, tensor in load_file(file).items()}
    return tensors


def layers(directory, prefix):
    """Return the tensors of each of the six layers, by their names inside it, and those outside the layers."""
    found, outside = [{} for _ in range(6)], {}
    for name, tensor in stored(directory).items():
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            found[int(number)][rest] = tensor
        else:
            outside[name] = tensor
    return found, outside


def widths(directory):
    return width_magnitudes(open_source(str(directory)))


def assert_same(found, axis, rows):
    torch.testing.assert_close(found[axis], torch.stack(rows), **EXACT)


def out(tensor):
    """Return the sums over what is written, of a matrix stored (out, in)."""
    return tensor.sum(1)


def into(tensor):
    """Return the sums over what is read, of a matrix stored (out, in)."""
    return tensor.sum(0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "gpt_oss", "bloom", "lfm2", "opt-post-norm"])
def test_a_layers_magnitude_is_the_sum_over_its_tensors(name, toy):
    prefix = {"gpt2": "transformer.h.", "bloom": "transformer.h.", "opt-post-norm": "model.decoder.layers."}
    parts, _ = layers(toy(name), prefix.get(name, "model.layers."))

    found = layer_magnitudes(open_source(str(toy(name))))

    expected = [sum(float(tensor.sum()) for tensor in part.values()) for part in parts]
    assert found == pytest.approx(expected, rel=1e-12)  # float64 sums in another order
    assert min(found) > 0


def test_a_sharded_checkpoint_has_the_same_magnitudes(toy, tmp_path):
    model, _ = toys.load(toy("llama"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    shards, whole = open_source(str(tmp_path / "shards")), open_source(str(toy("llama")))

    assert layer_magnitudes(shards) == pytest.approx(layer_magnitudes(whole), rel=1e-12)
    for axis, values in width_magnitudes(shards).items():
        torch.testing.assert_close(values, width_magnitudes(whole)[axis], **EXACT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_float64(dtype, tmp_path):
    directory = toys.build("llama", tmp_path / "toy", dtype=dtype)
    parts, _ = layers(directory, "model.layers.")

    found = layer_magnitudes(open_source(str(directory)))

    assert found == pytest.approx([sum(float(t.sum()) for t in part.values()) for part in parts], rel=1e-12)


def test_the_causal_masks_that_old_files_carry_are_no_weights(tmp_path):
    directory = toys.build("gpt2", tmp_path / "toy")
    expected = layer_magnitudes(open_source(str(directory)))
    expected_widths = widths(directory)
    tensors = load_file(directory / "model.safetensors")
    for layer in range(6):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    assert layer_magnitudes(open_source(str(directory))) == expected
    for axis, values in widths(directory).items():
        assert torch.equal(values, expected_widths[axis])


# --- widths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-biases"])
def test_separate_projections_are_counted_where_they_belong(name, toy):
    parts, outside = layers(toy(name), "model.layers.")
    found = widths(toy(name))
    zero = torch.zeros(1)

    def heads(part):
        queries = out(part["self_attn.q_proj.weight"]) + part.get("self_attn.q_proj.bias", zero)
        return (queries + into(part["self_attn.o_proj.weight"])).view(KV, GROUP, DIM).sum(-1)

    def kv_heads(part):
        own = sum(
            (out(part[f"self_attn.{x}_proj.weight"]) + part.get(f"self_attn.{x}_proj.bias", zero)).view(KV, DIM).sum(-1)
            for x in "kv"
        )
        return own + heads(part).sum(-1)

    def ffn(part):
        gate, up = (out(part[f"mlp.{x}_proj.weight"]) + part.get(f"mlp.{x}_proj.bias", zero) for x in ("gate", "up"))
        return gate + up + into(part["mlp.down_proj.weight"])

    def hidden(part):
        reads = [*(f"self_attn.{x}_proj.weight" for x in "qkv"), "mlp.gate_proj.weight", "mlp.up_proj.weight"]
        writes = ["self_attn.o_proj", "mlp.down_proj"]
        norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        total = sum(into(part[name]) for name in reads) + sum(part[name] for name in norms)
        return total + sum(out(part[f"{name}.weight"]) + part.get(f"{name}.bias", zero) for name in writes)

    assert_same(found, "heads", [heads(part) for part in parts])
    assert_same(found, "kv_heads", [kv_heads(part) for part in parts])
    assert_same(found, "ffn", [ffn(part) for part in parts])
    around = into(outside["model.embed_tokens.weight"]) + into(outside["lm_head.weight"]) + outside["model.norm.weight"]
    torch.testing.assert_close(found["hidden"], around + sum(hidden(part) for part in parts), **EXACT)
    assert set(found) == {"heads", "kv_heads", "ffn", "hidden"}


def test_stacked_projections_are_taken_apart(toy):
    parts, _ = layers(toy("phi3"), "model.layers.")
    found = widths(toy("phi3"))
    queries, keys = KV * GROUP * DIM, KV * DIM

    def heads(part):
        rows = out(part["self_attn.qkv_proj.weight"])[:queries] + into(part["self_attn.o_proj.weight"])
        return rows.view(KV, GROUP, DIM).sum(-1)

    def kv_heads(part):
        k, v = out(part["self_attn.qkv_proj.weight"])[queries:].split(keys)
        return (k + v).view(KV, DIM).sum(-1) + heads(part).sum(-1)

    def ffn(part):
        gate, up = out(part["mlp.gate_up_proj.weight"]).split(52)
        return gate + up + into(part["mlp.down_proj.weight"])

    assert_same(found, "heads", [heads(part) for part in parts])
    assert_same(found, "kv_heads", [kv_heads(part) for part in parts])
    assert_same(found, "ffn", [ffn(part) for part in parts])


def test_transposed_projections_are_read_the_other_way_round(toy):
    parts, outside = layers(toy("gpt2"), "transformer.h.")
    found = widths(toy("gpt2"))

    def three(part):
        return (part["attn.c_attn.weight"].sum(0) + part["attn.c_attn.bias"]).view(3, 8, DIM).sum(-1)

    def heads(part):
        return three(part)[0] + part["attn.c_proj.weight"].sum(1).view(8, DIM).sum(-1)

    def ffn(part):
        return part["mlp.c_fc.weight"].sum(0) + part["mlp.c_fc.bias"] + part["mlp.c_proj.weight"].sum(1)

    def hidden(part):
        vectors = ["ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.c_proj.bias", "mlp.c_proj.bias"]
        total = part["attn.c_attn.weight"].sum(1) + part["mlp.c_fc.weight"].sum(1)
        total = total + part["attn.c_proj.weight"].sum(0) + part["mlp.c_proj.weight"].sum(0)
        return total + sum(part[name] for name in vectors)

    assert_same(found, "heads", [heads(part)[:, None] for part in parts])
    assert_same(found, "kv_heads", [heads(part) + three(part)[1] + three(part)[2] for part in parts])
    assert_same(found, "ffn", [ffn(part) for part in parts])
    around = sum(outside[f"transformer.{name}.weight"].sum(0) for name in ("wte", "wpe"))
    around = around + outside["transformer.ln_f.weight"] + outside["transformer.ln_f.bias"]
    torch.testing.assert_close(found["hidden"], around + sum(hidden(part) for part in parts), **EXACT)


def test_interleaved_projections_are_taken_apart_head_by_head(toy):
    parts, _ = layers(toy("gpt_neox"), "gpt_neox.layers.")
    found = widths(toy("gpt_neox"))

    def three(part):
        rows = out(part["attention.query_key_value.weight"]) + part["attention.query_key_value.bias"]
        return rows.view(8, 3, DIM).sum(-1)

    def heads(part):
        return three(part)[:, 0] + into(part["attention.dense.weight"]).view(8, DIM).sum(-1)

    assert_same(found, "heads", [heads(part)[:, None] for part in parts])
    assert_same(found, "kv_heads", [heads(part) + three(part)[:, 1] + three(part)[:, 2] for part in parts])


def test_an_expert_of_mixtral_is_its_three_matrices_and_its_row_of_the_router(toy):
    parts, _ = layers(toy("mixtral"), "model.layers.")
    found = widths(toy("mixtral"))

    def matrices(part, expert):
        return [part[f"block_sparse_moe.experts.{expert}.w{number}.weight"] for number in (1, 2, 3)]

    def experts(part):
        own = torch.stack([sum(matrix.sum() for matrix in matrices(part, expert)) for expert in range(7)])
        return own + out(part["block_sparse_moe.gate.weight"])

    def ffn(part):
        return sum(out(w1) + into(w2) + out(w3) for w1, w2, w3 in (matrices(part, expert) for expert in range(7)))

    assert_same(found, "experts", [experts(part) for part in parts])
    assert_same(found, "ffn", [ffn(part) for part in parts])


def test_layers_without_experts_or_without_an_mlp_of_their_own_have_zeros(toy):
    parts, _ = layers(toy("qwen3_moe-sparse-step"), "model.layers.")
    found = widths(toy("qwen3_moe-sparse-step"))

    def experts(part):
        if "mlp.gate.weight" not in part:
            return torch.zeros(7, dtype=torch.float64)
        own = [
            sum(part[f"mlp.experts.{expert}.{x}_proj.weight"].sum() for x in ("gate", "up", "down"))
            for expert in range(7)
        ]
        return torch.stack(own) + out(part["mlp.gate.weight"])

    def ffn(part):
        if "mlp.gate.weight" in part:
            return torch.zeros(52, dtype=torch.float64)
        return sum(out(part[f"mlp.{x}_proj.weight"]) for x in ("gate", "up")) + into(part["mlp.down_proj.weight"])

    assert [("mlp.gate.weight" in part) for part in parts] == [False, True, False, False, False, True]
    assert_same(found, "experts", [experts(part) for part in parts])
    assert_same(found, "ffn", [ffn(part) for part in parts])


def test_a_model_of_experts_alone_has_no_neurons_in_common(toy):
    found = widths(toy("qwen3_moe"))

    assert set(found) == {"experts", "expert_ffn", "heads", "kv_heads", "hidden"}
    assert bool((found["experts"] > 0).all())


def test_experts_in_one_tensor_are_taken_apart(toy):
    parts, _ = layers(toy("gpt_oss"), "model.layers.")
    found = widths(toy("gpt_oss"))

    def experts(part):
        own = [part[f"mlp.experts.{name}"].flatten(1).sum(1) for name in ("gate_up_proj", "down_proj")]
        biases = [part[f"mlp.experts.{name}_bias"].sum(1) for name in ("gate_up_proj", "down_proj")]
        return sum(own) + sum(biases) + out(part["mlp.router.weight"]) + part["mlp.router.bias"]

    def ffn(part):  # a neuron's gate and up are neighbours
        pairs = part["mlp.experts.gate_up_proj"].sum((0, 1)) + part["mlp.experts.gate_up_proj_bias"].sum(0)
        return pairs.view(52, 2).sum(1) + part["mlp.experts.down_proj"].sum((0, 2))

    def heads(part):
        rows = out(part["self_attn.q_proj.weight"]) + into(part["self_attn.o_proj.weight"])
        rows = rows + part.get("self_attn.q_proj.bias", torch.zeros(1))
        return rows.view(KV, GROUP, DIM).sum(-1) + part["self_attn.sinks"].view(KV, GROUP)

    assert_same(found, "experts", [experts(part) for part in parts])
    assert_same(found, "ffn", [ffn(part) for part in parts])
    assert_same(found, "heads", [heads(part) for part in parts])


def test_a_family_without_a_table_has_no_widths(tmp_path):
    with pytest.raises(PlanError, match="'unheard_of' has no table"):
        widths(toys.unheard_of("llama", tmp_path / "toy"))


@pytest.mark.parametrize("measure", ["layer_magnitudes", "width_magnitudes"])
def test_a_quantized_checkpoint_is_refused(measure, tmp_path):
    directory = toys.build("llama", tmp_path / "toy")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))

    with pytest.raises((MeasureError, PlanError), match="quantized"):
        getattr(magnitude, measure)(open_source(str(directory)))
