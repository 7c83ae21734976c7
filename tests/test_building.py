"""A result is written only where transformers builds from its config exactly the tensors that are in it."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import toys
from later import LATER

import surgeon
from surgeon.checkpoint.header import CheckpointSpec, TensorSpec
from surgeon.checkpoint.source import open_directory, spec_of
from surgeon.errors import PlanError
from surgeon.plan.expressions import Read
from surgeon.surgery import open_model

if LATER:
    import transformers

    from surgeon.models.building import building, examine

# What a rule that nobody has verified can get wrong: keys of the config, a tensor that is lost, and what is then said.
WRONG = {
    "a dense layer for one with experts": ("deepseek_v3", {"first_k_dense_replace": 3}, "", "at random"),
    "a layer with experts for a dense one": ("deepseek_v3", {"first_k_dense_replace": 1}, "", "at random"),
    "attention for a convolution": ("lfm2", {"layer_types": ["full_attention"] * 6}, "", "at random"),
    "a layer too many": ("bloom", {"n_layer": 7}, "", "draw 'transformer.h.6."),
    "a layer too few": ("bloom", {"n_layer": 5}, "", "leave out 'transformer.h.5."),
    "a wrong size": ("bart", {"encoder_ffn_dim": 53}, "", "another shape"),
    "a lost weight": ("falcon", {}, "transformer.h.2.mlp.dense_h_to_4h.weight", "draw 'transformer.h.2.mlp"),
    "a lost expert": ("qwen2_moe", {}, "model.layers.1.mlp.experts.6.down_proj.weight", "another shape"),
    "a lost stack": ("t5", {}, "encoder.", "at random"),
    "a list for another depth": ("lfm2", {"num_hidden_layers": 5}, "", "transformers refuses"),
}


def spec(directory) -> CheckpointSpec:
    return spec_of(open_directory(directory))


def without(sound: CheckpointSpec, lost: str) -> CheckpointSpec:
    """Return a checkpoint that lacks the tensors whose names begin so."""
    kept = {name: tensor for name, tensor in sound.tensors.items() if not name.startswith(lost)}
    assert len(kept) < len(sound.tensors)
    return replace(sound, tensors=kept)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_transformers_would_not_build_whole_is_refused(wrong, toy):
    name, changes, lost, said = WRONG[wrong]
    sound = spec(toy(name))
    result = replace(without(sound, lost) if lost else sound, config={**sound.config, **changes})

    fault, notes = examine(sound, result, config_only=False)

    assert fault is not None
    assert said in fault
    assert notes == ()


@pytest.mark.parametrize("name", [name for name in toys.TOYS if name.partition("-")[0] in ("t5", "mixtral", "gpt_oss")])
def test_what_transformers_wrote_is_built_whole(name, toy):
    written = spec(toy(name))

    assert examine(CheckpointSpec(written.config, {}), written, config_only=False) == (None, ())


def test_what_the_source_has_beyond_its_model_may_stay_and_not_become_more(toy):
    sound = spec(toy("bloom"))
    first = "transformer.h.0.mtp.weight"
    extra = {f"transformer.h.{i}.mtp.weight": TensorSpec("F32", (3,)) for i in range(3)}
    source = CheckpointSpec(sound.config, {**sound.tensors, "transformer.h.4.mtp.weight": TensorSpec("F32", (3,))})

    as_many = CheckpointSpec(sound.config, {**sound.tensors, first: extra[first]})
    more = CheckpointSpec(sound.config, sound.tensors | extra)

    assert examine(source, as_many, config_only=False) == (None, ())
    assert "leave out 'transformer.h.0.mtp.weight' and 2 more" in str(examine(source, more, config_only=False)[0])


def test_what_is_random_in_the_source_is_said(toy):
    damaged = without(spec(toy("bloom")), "transformer.h.1.mlp.dense_h_to_4h.bias")

    fault, notes = examine(damaged, damaged, config_only=False)

    assert fault is None
    assert "'transformer.h.1.mlp.dense_h_to_4h.bias' at random, as it does in the source" in notes[0]


@pytest.mark.parametrize("grown", [{"attention_heads": "2x"}, {"hidden_size": "2x"}], ids=["heads", "hidden size"])
def test_a_config_that_transformers_refuses_is_not_written(grown, toy, tmp_path):
    """Phi-3's code wants as many factors of longrope as hidden / heads has pairs, whatever the size of a head."""
    factors = [1.0 + i / 5 for i in range(5)]
    rope = {"type": "longrope", "short_factor": factors, "long_factor": factors}
    model = toys.build("phi3", tmp_path / "phi3", rope_scaling=rope, original_max_position_embeddings=32)

    with pytest.raises(PlanError, match="transformers refuses the config of this result"):
        surgeon.grow(model, **grown).save(tmp_path / "grown")

    assert not (tmp_path / "grown").exists()
    assert surgeon.grow(model, intermediate_size="2x").save(tmp_path / "grown").notes == ()


def test_a_type_that_transformers_does_not_have_is_noted(toy, tmp_path):
    sound = spec(toy("bloom"))
    unknown = CheckpointSpec({**sound.config, "model_type": "mine"}, sound.tensors)

    fault, notes = examine(unknown, replace(unknown, tensors={}), config_only=False)

    assert fault is None
    assert "not checked whether transformers builds this result: transformers has no model type 'mine'" in notes[0]


def test_a_quantized_layer_is_taken_for_the_weight_that_it_codes(toy):
    sound = spec(toy("bloom"))
    weight = "transformer.h.{}.mlp.dense_h_to_4h.weight"
    codes = {f"transformer.h.{i}.mlp.dense_h_to_4h.qweight": TensorSpec("I32", (3, 4)) for i in range(6)}
    kept = {name: tensor for name, tensor in sound.tensors.items() if not name.endswith("mlp.dense_h_to_4h.weight")}
    quantized = CheckpointSpec({**sound.config, "quantization_config": {"quant_method": "gptq"}}, kept | codes)
    whole = examine(quantized, quantized, config_only=False)
    lacking = examine(quantized, without(quantized, "transformer.h.3.mlp.dense_h_to_4h.qweight"), config_only=False)

    assert whole == (None, ())
    assert f"draw '{weight.format(3)}' at random" in str(lacking[0])


FRESH = """
import sys
{before}
import surgeon
from surgeon.errors import SurgeonError
from surgeon.plan.expressions import Read
from surgeon.surgery import open_model
from dataclasses import replace

surgery = surgeon.truncate({model!r}, layers=3)
surgery = replace(surgery, plan=replace(surgery.plan, config={{**surgery.plan.config, **{changes!r}}}))
try:
    print(surgery.save({out!r}).notes)
except SurgeonError as error:
    print("refused:", error)
assert "transformers" not in sys.modules or sys.modules["transformers"] is None
"""


@pytest.mark.parametrize(
    ("before", "changes", "said"),
    [
        ("", {"vocab_size": 130}, "refused: from the config of this result transformers would not build"),
        ("sys.modules['transformers'] = None", {}, "not checked whether transformers builds this result: transf"),
    ],
    ids=["with transformers", "without it"],
)
def test_the_check_is_made_in_a_process_of_its_own(before, changes, said, tmp_path):
    out, model = tmp_path / "cut", tmp_path / "xlnet"  # a type without a table
    sizes = {"vocab_size": 131, "d_model": 64, "n_layer": 4, "n_head": 4, "d_inner": 52}
    transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes)).save_pretrained(model)
    code = FRESH.format(before=before, model=str(model), changes=changes, out=str(out))

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)

    assert said in done.stdout
    assert out.exists() == (not changes)


def test_a_check_that_dies_is_no_check(toy, monkeypatch):
    sound = spec(toy("bloom"))
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(sys, "executable", "/bin/false")

    with building(sound, sound) as built:
        notes = built()

    assert notes == (
        "not checked whether transformers builds this result: the process that asks it ended with status 1",
    )


def test_layers_of_other_shapes_that_change_places_are_looked_at(tmp_path):
    """The config does not change, nor does any name: SAM's layers that see everything have more relative positions."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64, "patch_size": 8}
    config = transformers.SamVisionConfig(**sizes, window_size=2, global_attn_indexes=[1], mlp_dim=48)
    transformers.SamVisionModel(config).save_pretrained(tmp_path / "sam")
    model = open_model(tmp_path / "sam")

    other = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    swapped = {
        name: Read(re.sub(r"layers\.[01]\.", lambda found: other[found[0]], name)) for name in model.plan.tensors
    }

    with pytest.raises(PlanError, match=r"draw '.*rel_pos_h' and \d+ more at random, for it has another shape"):
        replace(model, plan=replace(model.plan, tensors=swapped)).save(tmp_path / "swapped")
