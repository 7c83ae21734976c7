"""Which model a checkpoint comes from, and how: children of every kind that were made of one toy, and what is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import talkers
import toys
from hub_server import HubServer
from later import LATER
from test_hub import empty_hub
from test_rings import command, modules_after

import surgeon
from surgeon.errors import CheckpointError

if LATER:
    import children
    import numpy as np

    from surgeon.lineage.grids import grid_of
    from surgeon.lineage.layers import compare_gains
    from surgeon.lineage.maps import AxisMap, matched
    from surgeon.lineage.numbers import rounded, step
    from surgeon.lineage.parts import ranks

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"permutations": 99, "progress": False}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 6,
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """Return the toy that all children are made of, in bfloat16. Read-only."""
    return toys.build("llama", tmp_path_factory.mktemp("family") / "parent", dtype="bfloat16", **SIZES)


@pytest.fixture(scope="module")
def two(parent):
    """Return two models that were trained from the parent."""
    return [children.trained(parent, parent.parent / name, seed=seed) for seed, name in enumerate("ab", start=5)]


def traced(child, *candidates, **options):
    return surgeon.trace(child, candidates=list(map(str, candidates)), **QUICK | options)


def named(path: str | None) -> str | None:
    return None if path is None else Path(path).name


def pruned(model, out, **options):
    surgeon.prune(model, score="random", **options).save(out)


def grown(model, out, **options):
    surgeon.grow(model, **options).save(out)


WIDTHS = {"hidden_size": 128, "intermediate_size": 192, "attention_heads": 2}
SUBSETS = {"hidden": "subset", "ffn": "subset", "heads": "subset"}
TWICE = dict.fromkeys(("hidden_size", "intermediate_size", "attention_heads", "key_value_heads"), "2x")
ALL = [0, 1, 2, 3, 4, 5]
# What is done to the parent, the layers, what it looks like, and some axes.
DONE = {
    "truncated": (lambda p, o: surgeon.truncate(p, layers=4).save(o), [0, 1, 2, 3], ["depth cut"], {}),
    "cut": (lambda p, o: pruned(p, o, keep=[0, 2, 3, 5]), [0, 2, 3, 5], ["depth cut"], {}),
    "deeper": (lambda p, o: grown(p, o, layers=8), [0, 1, 2, 2, 3, 4, 5, 5], ["layers repeated"], {}),
    "stacked": (lambda p, o: grown(p, o, layers=9, depth_method="stack"), [*ALL, 0, 1, 2], ["stacked"], {}),
    "narrow": (lambda p, o: pruned(p, o, **WIDTHS), ALL, ["width cut"], SUBSETS),
    "heads": (lambda p, o: pruned(p, o, attention_heads=2), ALL, ["width cut"], {"heads": "subset", "ffn": "identity"}),
    "cloned": (lambda p, o: grown(p, o, **TWICE), ALL, ["width grown"], {"hidden": "clone", "ffn": "clone"}),
    "permuted": (
        lambda p, o: children.permuted(p, o),
        ALL,
        ["permuted"],
        {"hidden": "permutation", "ffn": "permutation", "heads": "identity"},
    ),
    "replaced": (lambda p, o: children.refreshed(p, o, (2, 4)), [0, 1, None, 3, None, 5], ["layers replaced"], {}),
    "lora 2": (lambda p, o: children.merged_lora(p, o, 2), ALL, ["lora rank 2"], {}),
    "lora 8": (lambda p, o: children.merged_lora(p, o, 8), ALL, ["lora rank 8"], {}),
    "lora of all": (lambda p, o: children.merged_lora(p, o, 16, roles=children.ROLES), ALL, ["lora rank 16"], {}),
    "int8 32": (lambda p, o: children.dequantized(p, o, 8, 32), ALL, ["int8 group 32"], {}),
    "int8 64": (lambda p, o: children.dequantized(p, o, 8, 64), ALL, ["int8 group 64"], {}),
    "int8 row": (lambda p, o: children.dequantized(p, o, 8, None), ALL, ["int8 per row"], {}),
    "int4 32": (lambda p, o: children.dequantized(p, o, 4, 32), ALL, ["int4 group 32"], {}),
    "int4 row": (lambda p, o: children.dequantized(p, o, 4, None), ALL, ["int4 per row"], {}),
    "torchao": (lambda p, o: children.in_codes(p, o, "torchao"), ALL, ["int8 per row"], {}),
    "packed": (lambda p, o: children.in_codes(p, o, "compressed-tensors", 32), ALL, ["int4 group 32"], {}),
    "float16": (lambda p, o: surgeon.open_model(p).save(o, dtype="float16"), ALL, ["cast to float16"], {}),
    "float32": (lambda p, o: surgeon.open_model(p).save(o, dtype="float32"), ALL, ["cast to float32"], {}),
    "sharded": (lambda p, o: surgeon.open_model(p).save(o, max_shard_size="300kB"), ALL, ["identical"], {}),
    "trained": (lambda p, o: children.trained(p, o), ALL, ["finetune"], {}),
    "reordered": (
        lambda p, o: surgeon.merge(p, method="passthrough", slices="A:0-1,A:4-4,A:2-3,A:5-5").save(o),
        [0, 1, 4, 2, 3, 5],
        ["layers reordered"],
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DONE)
def test_what_was_done_is_found(name, parent, tmp_path):
    make, layers, looks_like, axes = DONE[name]
    make(parent, tmp_path / "child")

    found = traced(tmp_path / "child", parent)

    assert named(found.nearest) == "parent"
    assert list(found.layers) == layers
    assert list(found.looks_like) == looks_like
    assert {axis: found.axes[axis] for axis in axes} == axes
    assert found.p == 1 / 100
    assert not found.disagreements


@pytest.mark.parametrize(
    ("name", "kind"), [("cut", "depth cut"), ("narrow", "width cut"), ("deeper", "layers repeated")]
)
def test_what_was_trained_after_a_surgery_is_found_with_its_layers(name, kind, parent, tmp_path):
    make, layers, _, axes = DONE[name]
    make(parent, tmp_path / "made")
    children.trained(tmp_path / "made", tmp_path / "child")

    found = traced(tmp_path / "child", parent)

    assert (list(found.layers), list(found.looks_like)) == (layers, [kind, "finetune"])
    assert {axis: found.axes[axis] for axis in axes} == axes


# gpt2: stored (in, out); olmo: no gains; gemma2: 1 + w; gpt_oss: experts in one tensor; t5: two stacks.
FAMILIES = ("gpt2", "gemma2", "olmo", "phi3", "mixtral", "gpt_oss", "opt-post-norm", "falcon", "t5", "bert")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_traced_by_its_table(name, toy, tmp_path):
    surgeon.truncate(toy(name), layers=4).save(tmp_path / "cut")
    child = children.trained(tmp_path / "cut", tmp_path / "child")
    other = toys.build(name, tmp_path / "other", seed=1)

    found = traced(child, other, toy(name))

    depth = len(found.layers) // (2 if name == "t5" else 1)
    assert found.nearest == str(toy(name))
    assert list(found.layers) == [*range(4), *range(6, 10)][: 4 * len(found.layers) // depth]
    assert list(found.looks_like) == ["depth cut", "finetune"]
    assert set(found.axes.values()) == {"identity"}
    assert found.p == 1 / 100
    assert not any(found.candidates[str(other)]["layers"])


def test_models_of_other_seeds_sizes_and_families_are_unrelated(parent, toy, tmp_path):
    twin = toys.build("llama", tmp_path / "twin", seed=7, dtype="bfloat16", **SIZES)

    found = traced(parent, twin, toy("llama"), toy("gpt2"), toy("bert"))

    assert found.nearest is None
    assert found.p > 0.01
    assert found.layers == (None,) * 6
    assert found.looks_like == ()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])  # experts stored apart, and in one tensor
def test_experts_that_were_dropped_are_found_by_the_router(name, toy, tmp_path):
    pruned(toy(name), tmp_path / "child", experts=4)

    found = traced(tmp_path / "child", toy(name))

    assert (list(found.layers), list(found.looks_like)) == (ALL, ["experts cut"])
    assert found.axes["experts"] == "subset"


def test_tokens_that_were_dropped_are_found_by_what_they_spell(tmp_path):
    base = talkers.talker(tmp_path / "base", "llama")
    text = talkers.written(tmp_path / "text.txt", "the cat sat on that mat")
    surgeon.trim(base, data=[text]).save(tmp_path / "trimmed")
    kept, before = (tokens_of(place) for place in (tmp_path / "trimmed", base))

    found = traced(tmp_path / "trimmed", base)

    runs = found.candidates[str(base)]["axis_maps"]["vocab"]
    assert (list(found.layers), list(found.looks_like)) == (ALL, ["vocabulary cut"])
    assert [first + i for first, count in runs for i in range(count)] == [before[token] for token in kept]


def tokens_of(directory: Path) -> dict[str, int]:
    """Return the tokens of a checkpoint by their ids, in their order."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokens = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    return dict(sorted(tokens.items(), key=lambda item: item[1]))


def test_an_adapter_is_merged_and_held_against_the_model_that_it_names(parent, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(parent)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, adapter)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")

    found = surgeon.trace(tmp_path / "adapter", **QUICK)

    assert (found.nearest, list(found.looks_like)) == (str(parent), ["lora rank 4"])
    assert any(claim.says == f"an adapter of rank 4 for {parent}" for claim in found.claims)


# Several candidates


def test_a_mean_of_two_has_their_weights(parent, two, tmp_path):
    surgeon.merge(two[0], models=[str(two[1])], weights=["0.6,0.4"]).save(tmp_path / "mean")

    found = traced(tmp_path / "mean", parent, *two)

    assert list(found.looks_like) == ["mixture"]
    assert {named(name): weight for name, weight in found.mixture.weights.items()} == {
        "a": pytest.approx(0.6, abs=0.005),  # the reference's bound; rounding to bfloat16 leaves some 1e-3
        "b": pytest.approx(0.4, abs=0.005),
    }


def test_a_mean_that_changes_from_layer_to_layer_is_one_and_says_so(two, tmp_path):
    surgeon.merge(two[0], models=[str(two[1])], method="slerp", t="0:1").save(tmp_path / "slerp")

    found = traced(tmp_path / "slerp", *two)

    assert list(found.looks_like) == [
        "mixture"
    ]  # though the first layer is the first model's, and the last the other's
    assert list(found.layers) == ALL
    assert not found.mixture.is_even


def test_a_finetune_beside_its_sibling_is_no_mixture(parent, two):
    found = traced(two[0], two[1], parent)

    assert (named(found.nearest), found.mixture, list(found.looks_like)) == ("parent", None, ["finetune"])


def test_layers_of_two_models_are_each_given_to_their_own(two, tmp_path):
    merged = surgeon.merge(two[0], models=[str(two[1])], method="passthrough", slices="A:0-3,B:2-5")
    merged.save(tmp_path / "both")

    found = traced(tmp_path / "both", *two)

    assert "layers of several models" in found.looks_like
    assert [named(name) for name in found.layer_sources] == ["a"] * 4 + ["b"] * 4
    assert list(found.layers) == [0, 1, 2, 3] + [None] * 4
    assert found.candidates[str(two[1])]["layers"][4:] == [2, 3, 4, 5]


def test_a_finetune_of_a_cut_is_traced_through_both(parent, tmp_path):
    pruned(parent, tmp_path / "cut", keep=[0, 2, 3, 5])
    child = children.trained(tmp_path / "cut", tmp_path / "child")

    found = traced(child, parent, tmp_path / "cut")

    assert (named(found.nearest), list(found.layers)) == ("cut", [0, 1, 2, 3])
    assert [(named(link.child), named(link.nearest), link.child_layers) for link in found.chain] == [
        ("cut", "parent", (0, 2, 3, 5))
    ]


# Claims


def test_claims_name_the_candidates_where_nobody_does(parent, tmp_path, run):
    pruned(parent, tmp_path / "cut", keep=[0, 2, 3, 5])

    found = json.loads(run("trace", tmp_path / "cut", "--permutations", 19, "--json", "--check").out)

    assert found["nearest"] == str(parent)
    assert any("layers are those" in words for words in found["agreements"])
    assert {claim["file"] for claim in found["claims"]} == {"surgeon.json", "README.md"}


def test_a_receipt_that_was_edited_is_contradicted(parent, tmp_path, run):
    pruned(parent, tmp_path / "cut", keep=[0, 2, 3, 5])
    receipt = json.loads((tmp_path / "cut/surgeon.json").read_text())
    (tmp_path / "cut/surgeon.json").write_text(json.dumps(receipt | {"layer_map": [0, 1, 3, 5]}))

    shown = run("trace", tmp_path / "cut", "--candidates", parent)
    outcome = run("trace", tmp_path / "cut", "--candidates", parent, "--check")

    assert shown.code == 0
    assert "at layer 1: it says layer 1 of 6, and the weights are those of layer 2" in shown.out
    assert outcome.code == 1
    assert outcome.err.startswith("error: the weights contradict what")


def test_a_card_that_names_an_unrelated_model_is_contradicted(parent, toy, tmp_path):
    other = toys.build("llama", tmp_path / "other", seed=3, dtype="bfloat16", **SIZES)
    (other / "README.md").write_text("---\nbase_model: org/parent\nbase_model_relation: finetune\n---\n")

    found = traced(other, parent)

    assert found.nearest is None
    assert "nothing to do with it" in found.disagreements[0]


@pytest.mark.parametrize("text", ["---\nbase_model: [", "no card", "---\nbase_model: {a: b}\n---\n", "\x00"])
def test_files_that_cannot_be_read_claim_nothing(text, parent, tmp_path):
    for name in ("README.md", "surgeon.json", "mergekit_config.yml", "adapter_config.json"):
        (tmp_path / name).write_text(text)
    for path in parent.iterdir():
        if path.name not in ("README.md", "surgeon.json"):
            (tmp_path / path.name).symlink_to(path)

    with pytest.raises(CheckpointError):  # links that lead out
        traced(tmp_path, parent)
    for path in parent.iterdir():
        if (tmp_path / path.name).is_symlink():
            (tmp_path / path.name).unlink()
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert traced(tmp_path, parent).claims == ()


def test_a_card_outside_of_the_checkpoint_claims_nothing(parent, tmp_path):
    (tmp_path / "child").mkdir()
    for path in parent.iterdir():
        (tmp_path / "child" / path.name).write_bytes(path.read_bytes())
    for name in ("README.md", "surgeon.json"):
        (tmp_path / "child" / name).unlink(missing_ok=True)
    (tmp_path / "secret").write_text("---\nbase_model: org/parent\n---\n")
    (tmp_path / "child" / "README.md").symlink_to(tmp_path / "secret")

    assert traced(tmp_path / "child", parent).claims == ()


# What is refused


def test_a_child_that_names_no_model_needs_candidates(parent):
    with pytest.raises(CheckpointError, match="does not say what it was made from") as caught:
        surgeon.trace(parent, progress=False)
    assert "--candidates" in str(caught.value.hint)


def test_a_type_without_a_table_and_codes_that_are_not_read_are_refused(parent, tmp_path):
    odd = toys.unheard_of("llama", tmp_path / "odd")
    with pytest.raises(CheckpointError, match="has no table of all its tensors"):
        traced(odd, parent)
    children.changed(parent, tmp_path / "gptq", lambda _, tensor: tensor)
    config = json.loads((tmp_path / "gptq/config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "gptq/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantized by gptq, whose codes are not read"):
        traced(tmp_path / "gptq", parent)


# What is read, shown and drawn


def test_a_trace_imports_no_torch(parent, two):
    loaded = modules_after(command("trace", two[0], "--candidates", parent, "--json"))

    assert "numpy" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "huggingface_hub", "rich", "matplotlib"})


def test_on_the_hub_few_bytes_are_read_and_the_answer_is_that_of_the_disk(tmp_path, monkeypatch):
    sizes = SIZES | {"vocab_size": 8000, "hidden_size": 256, "intermediate_size": 1600, "num_hidden_layers": 12}
    base = toys.build("llama", tmp_path / "base", dtype="bfloat16", **sizes)
    surgeon.truncate(base, layers=9).save(tmp_path / "cut")
    local = traced(tmp_path / "cut", base)
    with empty_hub(tmp_path, monkeypatch) as server:
        put(server, "org/base", base)
        put(server, "org/cut", tmp_path / "cut")

        quick = traced("org/cut", "org/base", quick=True)
        sent = server.sent_of_weights()
        found = traced("org/cut", "org/base")
        whole = sum(path.stat().st_size for path in tmp_path.glob("*/model.safetensors"))

        assert list(quick.layers) == list(found.layers) == list(local.layers) == list(range(9))
        assert (found.looks_like, found.axes, found.p) == (local.looks_like, local.axes, local.p)
        # Ranges, with the first 64 kB that come with each header; gaps that are read along add at most 2 %.
        assert sent <= 1.02 * quick.bytes_read + 2 * 65_536
        assert sent < 0.04 * whole
        assert found.bytes_downloaded <= 1.02 * found.bytes_read
        assert server.sent_of_weights() < 0.25 * whole


def put(server: HubServer, name: str, directory: Path) -> None:
    """Put a checkpoint on the Hub."""
    server.commit(name, {path.name: path.read_bytes() for path in directory.iterdir()})


def test_json_has_what_scripts_rely_on_and_the_picture_is_drawn(parent, two, tmp_path, run):
    picture = tmp_path / "map.png"

    outcome = run("trace", two[0], "--candidates", two[1], parent, "--permutations", 99, "--plot", picture, "--json")

    found = json.loads(outcome.out)
    assert found.keys() >= {"nearest", "layers", "axes", "looks_like", "p", "bytes_read", "candidates"}
    assert found["nearest"] == str(parent)
    assert found["axes"].keys() == {"hidden", "vocab", "ffn", "heads", "kv_heads"}
    assert found["candidates"].keys() == {str(parent), str(two[1])}
    assert found["pictures"] == [str(picture)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run("trace", two[0], "--candidates", parent, "--plot", picture).code == 1  # it exists


def test_people_read_nearest_of_the_candidates_and_never_the_parent(parent, two, run):
    shown = run("trace", two[0], "--candidates", two[1], parent).out

    assert "(nearest of 2 candidates; p ≤ 0.001" in shown
    assert "nothing in the weights says which of the two was first" in shown
    assert "unchanged" in shown


# The parts


def test_p_values_of_independent_models_are_uniform():
    """200 pairs of models whose gains share a profile with nothing: a p below 0.05 comes once in 20."""
    random = np.random.default_rng(0)

    def gains():
        shared = random.normal(size=40)
        return [{"norm": shared + 0.3 * random.normal(size=40)} for _ in range(4)]

    found = np.array([
        compare_gains(gains(), gains(), AxisMap.same(40), permutations=39, seed=seed).p for seed in range(200)
    ])  # fmt: skip

    assert 0.05 - 3 * 0.0154 <= np.mean(found <= 0.05) <= 0.05 + 3 * 0.0154  # three standard errors of 200 draws
    assert abs(found.mean() - 0.5) < 3 * 0.0204
    assert found.min() >= 1 / 40


def test_what_training_did_to_all_layers_alike_does_not_hide_which_they_are():
    random = np.random.default_rng(0)
    shared = random.normal(size=200)
    layers = [shared + 0.3 * random.normal(size=200) for _ in range(8)]
    drift = 0.5 * (layers[2] - layers[4]) + 0.3 * random.normal(size=200)
    kept = [0, 1, 4, 5, 7]
    parent = [{"norm": each} for each in layers]
    child = [{"norm": layers[i] + drift + 0.05 * random.normal(size=200)} for i in kept]

    found = compare_gains(child, parent, AxisMap.same(200), permutations=19, seed=0)

    assert found.alike.argmax(1).tolist() == kept
    alone = compare_gains(child[2:3], parent, AxisMap.same(200), permutations=19, seed=0)
    assert alone.alike.argmax() == 2  # of one layer nothing tells the drift, and it looks like another


def test_a_map_is_found_by_columns_whatever_was_done_to_them():
    random = np.random.default_rng(0)
    rows = random.normal(size=(64, 50)).astype(np.float32)
    order = random.permutation(50)
    kept = np.sort(order[:30])
    fresh = random.normal(size=(64, 10)).astype(np.float32)
    made = {
        "identity": rows + 0.1 * random.normal(size=rows.shape).astype(np.float32),
        "permutation": -3 * rows[:, order],
        "subset": rows[:, kept],
        "clone": np.concatenate([rows, rows], 1),
        "pad": np.concatenate([rows, fresh], 1),
    }

    found = {kind: matched(each, rows, centred=True) for kind, each in made.items()}

    assert {kind: each.kind for kind, each in found.items()} == {kind: kind for kind in made}
    assert found["permutation"].index.tolist() == order.tolist()
    assert set(found["permutation"].signs) == {-1}
    assert found["subset"].index.tolist() == kept.tolist()
    assert found["pad"].index.tolist() == [*range(50), *[-1] * 10]
    assert matched(random.normal(size=(64, 50)), rows, centred=True) is None


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_a_rank_is_counted_above_the_rounding_of_its_dtype(dtype, rank):
    random = np.random.default_rng(rank)
    weight = rounded(random.normal(size=(64, 160)).astype(np.float32) * np.exp(random.normal(size=160)), dtype)
    low = random.normal(size=(64, rank)) @ random.normal(size=(rank, 160))
    child = rounded((weight + 0.1 * low).astype(np.float32), dtype)
    noisy = rounded((weight + 0.1 * random.normal(size=weight.shape)).astype(np.float32), dtype)

    assert ranks(child - weight, child, dtype)[0] == rank
    assert ranks(noisy - weight, noisy, dtype)[0] > 32


def test_steps_and_rounding_are_those_of_the_dtypes():
    import torch

    values = np.array([1.0, 1.5, -3.0, 1e-3, 0.2, 65000.0, 3e-6], np.float32)
    for dtype, kind in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        stored = torch.tensor(values).to(kind)
        above = torch.nextafter(stored, torch.tensor(float("inf"), dtype=kind))
        below = torch.nextafter(stored, torch.tensor(float("-inf"), dtype=kind))
        apart = torch.where(stored > 0, above - stored, stored - below).float().numpy()
        assert rounded(values, dtype).tolist() == stored.float().tolist()
        assert step(stored.float().numpy(), dtype).tolist() == apart.tolist()


def test_numbers_that_lie_on_no_grid_have_none():
    random = np.random.default_rng(0)
    weight = random.normal(size=(64, 256)).astype(np.float32)

    assert grid_of(weight) is None
    assert grid_of(rounded(weight, "BF16")) is None
    assert grid_of(np.zeros((8, 64), np.float32)) is None
    low = weight.reshape(-1, 32).min(1, keepdims=True)
    scale = np.ptp(weight.reshape(-1, 32), axis=1, keepdims=True) / 15
    affine = (np.round((weight.reshape(-1, 32) - low) / scale) * scale + low).reshape(weight.shape)
    assert str(grid_of(affine)) == "int4 group 32"
