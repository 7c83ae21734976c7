"""Half layers, re-paired: the attention of one layer and the MLP of a later one make an ordinary layer, exactly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import every_type
import pytest
import tabled
import toys
from later import LATER
from toys import OWN_HEAD_DIM, QWEN_EXPERTS

import surgeon
from surgeon.anatomy.following import follow_layers
from surgeon.anatomy.half_keys import HALF_OF_KEY
from surgeon.anatomy.halves import ATTENTION, MLP, Pairing
from surgeon.anatomy.layer_rules import INDEX_LISTS, LAYER_LISTS, LAYER_REFERENCES, RULES
from surgeon.anatomy.split_layers import split_layers
from surgeon.errors import CheckpointError, PlanError
from surgeon.surgery import Surgery, open_model
from surgeon.transforms.layers import keep_halves, keep_layers
from surgeon.verbs.inspect import layers_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

if LATER:
    import torch

    from surgeon.train.model import trained_layers

pytestmark = pytest.mark.usefixtures("one_thread")

# Of six layers two attentions and two MLPs go. By layer_types and kin each layer of the result then differs from what
# the MLP's list would say, and by mlp_only_layers from what the attention's would.
PAIRING = Pairing((0, 1, 3, 5), (0, 2, 4, 5))
SILENT = {ATTENTION: (2, 4), MLP: (1, 3)}

ATTENTIONS = ("self_attn", "attn", "attention", "self_attention", "linear_attn")
MLPS = ("mlp", "block_sparse_moe", "shared_mlp", "feed_forward", "ffn", "fc2")
ADDING = ("bloom", "falcon", "mpt")  # some of their parts add to the state themselves: the last map is silenced
LAST = ("dense", "dense_4h_to_h", "down_proj")

SERIAL = (
    *("llama", "llama-biases", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe-sparse-step", "mixtral", "gemma"),
    *("gemma2", "gemma3_text", "olmo2", "olmo", "exaone4", "granite", "granitemoe", "smollm3", "gpt_oss", "phi3"),
    *("glm4", "deepseek_v3", "phimoe", "qwen2_moe", "gpt2", "gpt_neo", "gpt_neox-serial", "opt", "bloom", "mpt"),
    *("falcon-alibi", "stablelm", "nemotron", "starcoder2"),
)


@contextmanager
def silenced(model: Any, gone: dict[str, Sequence[int]], layers: Any = None) -> Iterator[None]:
    """Return a context in which these attentions and MLPs add nothing: what they put out is replaced with zeros."""

    def zeros(_: Any, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    layers = layers or max(toys.stacks(model), key=len)
    hooks = []
    for half, names in ((ATTENTION, ATTENTIONS), (MLP, MLPS)):
        for layer in gone[half]:
            parts = [part for name, part in layers[layer].named_children() if name in names]
            assert parts, f"no {half} in {layers[layer]}"
            if model.config.model_type in ADDING:
                last = [getattr(part, name) for part in parts for name in LAST if hasattr(part, name)]
                parts = last[-1:] or parts
            hooks += [part.register_forward_hook(zeros) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def paired(directory: Path, pairing: Pairing = PAIRING) -> Surgery:
    model = open_model(directory)
    return Surgery(model.source, keep_halves(model.anatomy, pairing))


# --- the function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERIAL)
def test_a_re_paired_model_is_the_original_without_the_halves_that_went(name, toy, tmp_path):
    paired(toy(name)).save(tmp_path / "cut")

    model, report = toys.load(tmp_path / "cut")
    reference, _ = toys.load(toy(name))
    assert not any(report.values()), report
    with silenced(reference, SILENT):
        assert (toys.logits(model) - toys.logits(reference)).abs().max().item() == 0.0
    arguments = {**toys.inputs(model), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, uncached = (model.generate(**arguments, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize(
    "name", ["qwen3_next", "qwen3_5_text", "llama4_text", "exaone_moe", "granite_swa", "vaultgemma"]
)
def test_what_a_layer_has_in_place_of_attention_goes_with_the_attention(name, tmp_path):
    source = toys.save(name, tabled.TYPES[name], tmp_path / "model")
    paired(source, Pairing((0, 1), (0, 2))).save(tmp_path / "cut")

    model, report = toys.load(tmp_path / "cut")
    reference, _ = toys.load(source)
    assert not any(report.values()), report
    with silenced(reference, {ATTENTION: (2,), MLP: (1,)}):
        assert torch.equal(toys.logits(model), toys.logits(reference))


def test_the_language_model_inside_a_multimodal_one_is_re_paired(tmp_path):
    source = every_type.build("gemma3", tmp_path / "model")
    paired(source).save(tmp_path / "cut")

    model, reference = (every_type.load(tmp_path / name)[0] for name in ("cut", "model"))
    layers = reference.get_decoder().layers
    with silenced(reference, SILENT, layers):
        assert torch.equal(every_type.logits(model), every_type.logits(reference))


def test_queries_follow_their_place_where_gpt2_divides_by_it(toy, tmp_path):
    """Queries are multiplied by (new + 1) / (old + 1) of their own layer, whichever the MLP's is; that rounds."""
    name = "gpt2-inverse-layer-idx"
    paired(toy(name)).save(tmp_path / "cut")

    model, reference = toys.load(tmp_path / "cut")[0], toys.load(toy(name))[0]
    with silenced(reference, SILENT):
        torch.testing.assert_close(toys.logits(model), toys.logits(reference), rtol=0, atol=2e-5)


def test_every_tensor_of_a_table_belongs_to_one_half_of_its_layer(toy):
    anatomy = open_model(toy("gemma2")).anatomy

    inside = {
        name.removeprefix("model.layers.0."): half for name, half in split_layers(anatomy).items() if ".0." in name
    }

    of_attention = {name for name, half in inside.items() if half == ATTENTION}
    assert of_attention == {
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    }
    assert inside.keys() - of_attention == {
        *("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }
    assert split_layers(open_model(toy("llama")).anatomy)["model.layers.3.post_attention_layernorm.weight"] == MLP


# --- the config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("smollm3", {}, {"no_rope_layers": [1, 1, 1, 0], "layer_types": ["full_attention"] * 4}),
        ("qwen3_moe-sparse-step", {}, {"mlp_only_layers": [0, 1, 2], "decoder_sparse_step": 1}),
        ("qwen3_moe", {"mlp_only_layers": [2, 3, 5]}, {"mlp_only_layers": [1, 3], "decoder_sparse_step": 1}),
        ("gemma3_text", {}, {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}),
        ("gpt_oss", {}, {"layer_types": ["sliding_attention"] + ["full_attention"] * 3}),
        ("deepseek_v3", {}, {"first_k_dense_replace": 1}),
        ("gpt_neo", {}, {"attention_types": [[["global", "local", "local", "local"], 1]]}),
    ],
)
def test_each_list_follows_the_half_that_it_speaks_of(name, overrides, expected, toy, tmp_path):
    source = toys.build(name, tmp_path / "model", **overrides) if overrides else toy(name)
    paired(source).save(tmp_path / "cut")

    written = json.loads((tmp_path / "cut/config.json").read_text())
    assert {key: written[key] for key in expected} == expected
    assert not any(toys.load(tmp_path / "cut")[1].values())


@pytest.mark.parametrize(
    ("name", "pairing", "expected"),
    [
        ("llama4_text", Pairing((0, 2), (1, 2)), {"moe_layers": [0], "no_rope_layers": [1, 0]}),
        ("exaone_moe", Pairing((0, 2), (1, 2)), {"mlp_layer_types": ["sparse", "sparse"]}),
        ("exaone_moe", Pairing((0, 1), (0, 2)), {"mlp_layer_types": ["dense", "sparse"]}),
    ],
)
def test_so_does_each_list_of_three_layers(name, pairing, expected, tmp_path):
    written = paired(toys.save(name, tabled.TYPES[name], tmp_path / "model"), pairing).plan.config

    assert {key: written[key] for key in expected} == expected


def follow(config: dict[str, Any], pairing: Pairing) -> dict[str, Any]:
    return follow_layers({"model_type": "mistral", "num_hidden_layers": 6} | config, pairing, 6, tabled=True).config


def test_an_entry_of_one_layer_is_split_by_what_it_speaks_of():
    own = {"1": {"head_dim": 8, "intermediate_size": 40}, "2": {"num_key_value_heads": 1, "intermediate_size": 44}}

    after = follow({"per_layer_config": own}, PAIRING)

    # layer 1 of the result has the attention of layer 1 and the MLP of layer 2
    assert after["per_layer_config"] == {"1": {"head_dim": 8, "intermediate_size": 44}}


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"layers_block_type": ["a", "b", "c", "d", "e", "f"]}, "layers_block_type"),
        ({"cross_attention_layers": [1]}, "cross_attention_layers"),
        ({"hybrid_override_pattern": "ME*-ME"}, "hybrid_override_pattern"),
        ({"per_layer_config": {"1": {"something": 3}}}, r"per_layer_config\.\*\.something"),
    ],
)
def test_what_may_speak_of_both_halves_is_refused_by_name_where_they_part(config, key):
    with pytest.raises(PlanError, match=f"the attention of layer 1 and the MLP of layer 2 differ in {key}"):
        follow(config, PAIRING)
    assert follow(config, Pairing.of_layers((0, 2, 3, 5)))  # whole layers move


def test_what_speaks_of_both_halves_alike_is_no_reason_to_refuse():
    assert follow({"cross_attention_layers": [1, 2]}, PAIRING)["cross_attention_layers"] == [1]


def test_every_key_that_a_rule_or_a_list_knows_says_its_half_or_is_known_to_say_both():
    both = {
        *("layers_block_type", "block_types", "cross_attention_layers", "ple_layer_ids", "residual_block_indices"),
        "per_layer_config",
    }
    keys = LAYER_LISTS | INDEX_LISTS | LAYER_REFERENCES
    keys |= {key for rules in RULES.values() for rule in rules for key in rule.speaks_by}

    assert {key for key in keys if key not in HALF_OF_KEY} == both & keys
    assert {HALF_OF_KEY[key] for key in ("intermediate_size", "activation_sparsity_pattern")} == {MLP}  # gemma3n's


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt_neox", r"run side by side on one state \(use_parallel_residual\)"),
        ("falcon", r"run side by side on one state \(parallel_attn\)"),
        ("stablelm-parallel", r"run side by side on one state \(use_parallel_residual\)"),
        ("cohere", r"read one norm \(input_layernorm\)"),
        ("phi", r"read one norm \(input_layernorm\)"),
        ("gptj", r"read one norm \(ln_1\)"),
        ("codegen", r"read one norm \(ln_1\)"),
        ("opt-post-norm", "the norms of opt follow the sum"),
        ("bert", "the norms of bert follow the sum"),
        ("t5", "attentions to two texts"),
        ("lfm2", "'lfm2' has no table of its tensors"),
    ],
)
def test_where_a_layer_has_no_two_halves_the_reason_is_said_and_whole_layers_still_go(name, reason, toy):
    anatomy = open_model(toy(name)).anatomy

    with pytest.raises(PlanError, match=reason):
        keep_halves(anatomy, PAIRING)
    assert keep_halves(anatomy, Pairing.of_layers((0, 2))).tensors == keep_layers(anatomy, [0, 2]).tensors


def test_a_norm_that_no_table_places_is_refused(toy):
    anatomy = open_model(toy("gemma2")).anatomy

    with pytest.raises(PlanError, match="does not say which of input_layernorm, .* are the attention's"):
        keep_halves(replace(anatomy, family=replace(anatomy.family, branch_norms=())), PAIRING)


@pytest.mark.parametrize(
    ("pairing", "message"),
    [
        (Pairing((0, 3), (3, 2)), "in their order"),
        (Pairing((0, 9), (1, 9)), r"layers \[9\] do not exist"),
        (Pairing((0, 1), (1, 2)), "attentions of layers 0 and 1 would follow each other"),
        (Pairing((1,), (0,)), "MLP of layer 0 would come before"),
        (Pairing((0, 1), (0,)), "2 attentions and 1 MLPs"),
    ],
)
def test_halves_that_do_not_come_in_turns_are_refused(pairing, message, toy):
    with pytest.raises(PlanError, match=message):
        keep_halves(open_model(toy("llama")).anatomy, pairing)


def test_a_quantized_checkpoint_keeps_whole_layers(toy, tmp_path):
    config = json.loads((toy("llama") / "config.json").read_text())
    anatomy = open_model(toy("llama")).anatomy
    quantized = replace(anatomy, family=None, spec=replace(anatomy.spec, config=config | {"quantization_config": {}}))

    with pytest.raises(PlanError, match="a quantized checkpoint has no table"):
        keep_halves(quantized, PAIRING)


SKIPS = {"per_layer_config": {"1": {"skip": ["attention"]}}}


def test_a_layer_that_the_installed_transformers_would_fill_with_random_numbers_is_refused(toy, tmp_path):
    toys.build("llama", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | SKIPS))

    with pytest.raises(CheckpointError, match=r"layer 1 skips \['attention'\]") as caught:
        surgeon.inspect(tmp_path / "model")
    assert "get_heterogeneous_modeling_spec" in str(caught.value.hint)


@pytest.mark.parametrize("has_specs", [True, False])
def test_whether_transformers_can_leave_halves_out_is_found_without_importing_it(has_specs, tmp_path):
    package = tmp_path / "transformers/integrations/heterogeneity"
    package.mkdir(parents=True)
    (tmp_path / "transformers/__init__.py").write_text("raise ImportError('it was imported')")
    (package / "__init__.py").write_text("def get_heterogeneous_modeling_spec(): ..." if has_specs else "")
    code = f"from surgeon.anatomy.config import check_layer_keys; check_layer_keys({SKIPS!r}, 6)"
    paths = os.pathsep.join([str(tmp_path), str(Path(surgeon.__file__).parent.parent)])

    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True)

    assert (done.returncode == 0) == has_specs
    assert b"it was imported" not in done.stderr


# --- plans, receipts and what reads them ------------------------------------------------------------------------------


def test_plans_compose_with_a_map_for_each_half(toy):
    anatomy = open_model(toy("llama")).anatomy
    first = keep_halves(anatomy, PAIRING)
    shorter = replace(anatomy, spec=first.result(anatomy.spec), stacks=(replace(anatomy.stacks[0], depth=4),))

    both = first.then(keep_halves(shorter, Pairing((0, 3), (1, 3))))

    assert (both.layer_map, both.mlp_map) == ((0, 5), (2, 5))
    whole = first.then(keep_layers(shorter, [0, 3]))
    assert (whole.layer_map, whole.mlp_map) == ((0, 5), None)
    assert both.to_dict()["mlp_map"] == [2, 5]
    assert "mlp_map" not in whole.to_dict()
    assert both.tensors["model.layers.0.mlp.up_proj.weight"].name == "model.layers.2.mlp.up_proj.weight"
    assert both.tensors["model.layers.0.self_attn.q_proj.weight"].name == "model.layers.0.self_attn.q_proj.weight"


DROPS = ("--drop-attention", "2,4", "--drop-mlp", "1,3")


@pytest.fixture
def cut(toy, tmp_path, run) -> dict[str, Any]:
    """Return what `prune --json` says of the re-paired llama in tmp_path / "cut"."""
    return json.loads(run("prune", toy("llama"), *DROPS, "-o", tmp_path / "cut", "--json").out)


def test_halves_that_are_named_go_and_everything_says_which(cut, toy, tmp_path):
    assert (cut["layers"], cut["layer_map"], cut["mlp_map"]) == ({"before": 6, "after": 4}, [0, 1, 3, 5], [0, 2, 4, 5])
    assert (cut["dropped"], cut["dropped_attention"], cut["dropped_mlp"]) == ([], [2, 4], [1, 3])
    receipt = json.loads((tmp_path / "cut/surgeon.json").read_text())
    assert (receipt["layer_map"], receipt["mlp_map"]) == ([0, 1, 3, 5], [0, 2, 4, 5])
    assert receipt["steps"][0]["prune"]["pairing"] == {"attention": [0, 1, 3, 5], "mlp": [0, 2, 4, 5]}
    card = (tmp_path / "cut/README.md").read_text()
    assert "| source layer of each attention | 0 1 3 5 |\n| source layer of each MLP | 0 2 4 5 |" in card
    with silenced(reference := toys.load(toy("llama"))[0], SILENT):
        assert torch.equal(toys.logits(toys.load(tmp_path / "cut")[0]), toys.logits(reference))


def test_whole_layers_and_halves_add_up_and_a_pairing_asks_for_the_same(cut, toy, tmp_path):
    named = surgeon.prune(toy("llama"), drop=[0], drop_attention=[2, 4], drop_mlp=[1, 3])
    asked = surgeon.prune(toy("llama"), pairing=Pairing((1, 3, 5), (2, 4, 5)))

    assert named.plan == asked.plan
    assert named.choice == asked.choice
    assert (named.choice.dropped, named.choice.words) == ((0,), "layers 0, attention of 2, 4, MLP of 1, 3")
    assert "without layers 0, attention of 2, 4, MLP of 1, 3" in repr(named)
    text = named.summary(tmp_path / "none").to_text()
    assert "attentions of source layers 1, 3, 5; MLPs of 2, 4-5" in text


def test_both_halves_of_one_layer_are_that_layer(toy):
    assert (
        surgeon.prune(toy("llama"), drop_attention=[3], drop_mlp=[3]).plan == surgeon.prune(toy("llama"), drop=[3]).plan
    )


def test_a_re_paired_model_is_made_again_from_its_receipt(cut, tmp_path, run):
    done = run("run", tmp_path / "cut/surgeon.json", "--json")

    assert json.loads(done.out)["steps"][0]["result"]["same"] is True


def test_a_re_paired_model_that_is_narrower_too_is_made_again(toy, tmp_path, run):
    narrow = ("--attention-heads", 4, "--intermediate-size", 20, "--score", "magnitude")
    run("prune", toy("llama"), *DROPS, *narrow, "-o", tmp_path / "cut")

    done = json.loads(run("run", tmp_path / "cut/surgeon.json", "--json").out)
    assert done["steps"][0]["result"]["same"] is True
    assert not any(toys.load(tmp_path / "cut")[1].values())


def test_each_tensor_is_held_against_the_layer_that_its_half_came_from(cut, toy, tmp_path):
    difference = surgeon.inspect(tmp_path / "cut", against=toy("llama")).difference

    assert (difference.layer_map, difference.mlp_map) == ((0, 1, 3, 5), (0, 2, 4, 5))
    assert not difference.changed
    assert not difference.added
    gone = {int(name.split(".")[2]) for name in difference.removed}
    assert gone == {1, 2, 3, 4}
    assert "attentions of source layers 0-1, 3, 5; MLPs of 0, 2, 4-5" in difference.to_text()


def test_a_layer_made_of_two_is_no_layer_of_the_other_model(cut, toy, tmp_path):
    made, source = (open_model(path) for path in (tmp_path / "cut", toy("llama")))

    assert layers_in(made.source, made.anatomy, source.source, source.anatomy) == (0, None, None, 5)
    assert layers_in(source.source, source.anatomy, made.source, made.anatomy) == (0, None, None, None, None, 3)


@pytest.mark.parametrize(
    ("maps", "found"),
    [
        ({"layer_map": [0, 1, 3, 5], "mlp_map": [0, 2, 4, 5]}, {1, 2}),  # the seams lie inside these
        ({"layer_map": [0, 2, 3, 4], "mlp_map": [1, 2, 3, 4]}, {0}),
        ({"layer_map": [0, 1, 2, 4], "mlp_map": [0, 1, 3, 4]}, {2}),
        ({"layer_map": [0, 1, 3, 5], "mlp_map": [0, 2, 3, 5]}, {1, 2, 3}),
    ],
)
def test_the_layers_beside_a_cut_are_those_whose_halves_were_re_paired(maps, found):
    assert trained_layers("cut", {**maps, "steps": []}, 4) == found


def test_the_map_shows_which_halves_go(toy):
    removed = surgeon.prune(
        toy("llama"),
        drop=[0],
        drop_attention=[2, 4],
        drop_mlp=[1, 3],
        attention_heads=4,
        intermediate_size=20,
        score="uniform",
    ).removed

    assert (removed.layers, removed.halves) == ((0,), {ATTENTION: (2, 4), MLP: (1, 3)})
    heads, neurons = removed.axes["heads"].kept, removed.axes["ffn"].kept
    assert [layer for layer, left in sorted(heads.items()) if not left] == [0, 2, 4]
    assert [layer for layer, left in sorted(neurons.items()) if not left] == [0, 1, 3]
    assert {len(left) for left in heads.values()} == {0, 4}


def test_heads_and_neurons_are_chosen_by_the_scores_of_the_layers_that_they_are_of(toy, tmp_path):
    surgery = surgeon.prune(toy("llama"), pairing=PAIRING, intermediate_size=20, attention_heads=4, score="magnitude")

    scores = surgery.scores.widths["magnitude"]
    for place, layer in enumerate(PAIRING.mlp):
        kept = surgery.plan.tensors[f"model.layers.{place}.mlp.down_proj.weight"].index
        best = sorted(sorted(range(52), key=lambda i: -scores["ffn"][layer][i])[:20])
        assert list(kept) == best, f"neurons of layer {layer}"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("--drop-mlp", "3"), "6 attentions and 5 MLPs would stay", "Nemotron-H"),
        (("--drop-attention", "2", "--drop-mlp", "4"), "the MLPs of layers 1 and 2 would follow each other", "deci"),
        (("--drop-attention", "9", "--drop-mlp", "4"), r"layers \[9\] do not exist", "0 to 5"),
        (("--drop-attention", "0-5", "--drop-mlp", "0-5"), "every layer would go", "--drop-mlp"),
        (("--drop-attention", "3", "--keep", "1-4"), "the depth is asked for more than once", "--drop"),
        (("--drop-attention", "3", "--greedy", "--score", "perplexity"), "--drop-attention names them", "one of them"),
    ],
)
def test_a_cut_into_halves_that_makes_no_layers_is_refused(words, message, hint, toy, tmp_path, run):
    done = run("prune", toy("llama"), *words, "-o", tmp_path / "cut")

    assert done.code in (1, 2)
    assert re.search(message, done.err), done.err
    assert hint in done.err
    assert not (tmp_path / "cut").exists()


def test_a_hybrid_of_an_unknown_type_refuses_halves_and_takes_whole_layers(tmp_path):
    directory = every_type.build("nemotron_h", tmp_path / "hybrid")
    anatomy = open_model(directory).anatomy

    with pytest.raises(PlanError, match="has no table"):
        keep_halves(anatomy, PAIRING)
    kept = keep_layers(anatomy, [0, 2, 3]).config
    assert len(kept["layers_block_type"]) == 3


def test_a_mixture_with_dense_layers_loses_experts_with_its_mlp(tmp_path):
    """mlp_only_layers counts the layers of the result: the dense MLP of layer 1 has gone, and no layer is dense."""
    sizes = OWN_HEAD_DIM | QWEN_EXPERTS | {"mlp_only_layers": [1]}
    source = toys.save("qwen3_moe", sizes, tmp_path / "model")
    paired(source).save(tmp_path / "cut")

    assert json.loads((tmp_path / "cut/config.json").read_text())["mlp_only_layers"] == []
    assert not any(toys.load(tmp_path / "cut")[1].values())
