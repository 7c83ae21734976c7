"""Sound checkpoints in forms that differ from the usual are read as what they are, and refused for true reasons."""

import json
import math

import pytest
import toys
from handmade import edit_config
from later import LATER
from talkers import talker

import surgeon
from surgeon.anatomy.stacks import Stack, find_stacks
from surgeon.errors import CheckpointError, PlanError
from surgeon.surgery import open_model, open_source

if LATER:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    from surgeon.models.loading import config_of, load_tokenizer

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
SMALL = toys.DERIVED_HEAD_DIM | {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a random model of a class of transformers and returns its directory."""

    def save(kind: str, model_type: str, **config):
        config = transformers.AutoConfig.for_model(model_type, **config)
        torch.manual_seed(0)
        made = getattr(transformers, kind)
        model = made.from_config(config) if hasattr(made, "from_config") else made(config)
        toys._randomise(model)
        model.save_pretrained(tmp_path / model_type)
        return tmp_path / model_type

    return save


def test_infinity_in_the_config_of_transformers_5_is_a_number(saved):
    model = saved(
        "AutoModelForCausalLM", "granitemoehybrid", **SMALL, **toys.EXPERTS, **MAMBA, layer_types=["mamba"] * 4
    )
    assert json.loads((model / "config.json").read_text())["time_step_limit"][1] == {"__float__": "Infinity"}

    cut = surgeon.truncate(model, layers=2).save(model.with_name("cut")).output

    assert config_of(open_source(model), hint="").time_step_limit[1] == math.inf
    assert config_of(open_source(cut), hint="").time_step_limit[1] == math.inf


def test_layers_that_the_config_only_lists_are_counted(saved):
    sizes = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "head_dim": 16}
    model = saved("AutoModelForCausalLM", "nemotron_h", **SMALL | {"hybrid_override_pattern": "M*-M"}, **sizes)
    assert "num_hidden_layers" not in json.loads((model / "config.json").read_text())

    cut = surgeon.truncate(model, layers=2).save(model.with_name("cut")).output

    assert open_model(model).anatomy.depth == 4
    assert json.loads((cut / "config.json").read_text())["layers_block_type"] == ["linear_attention", "full_attention"]


def test_of_two_layers_of_a_kind_the_one_unlike_all_others_is_the_odd_one(saved):
    """ModernBERT's layer 0 has no attn_norm, and layer 3 is the only other one that attends to everything."""
    model = saved("AutoModelForMaskedLM", "modernbert", **SMALL | {"global_attn_every_n_layers": 3})

    cut = surgeon.truncate(model, layers=3).save(model.with_name("cut")).output

    assert open_model(cut).anatomy.depth == 3


def test_the_reason_is_that_of_the_family_and_not_of_one_layer(saved):
    kinds = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    sizes = {"head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 131}
    model = saved("AutoModelForCausalLM", "gemma4_text", **SMALL, **kinds, **sizes)

    with pytest.raises(PlanError, match="packs per-layer embeddings into one tensor") as refused:
        surgeon.truncate(model, layers=2)

    assert "Keep layer" not in str(refused.value.hint)


def test_a_config_that_transformers_refuses_is_no_fault_of_the_tokenizer(tmp_path):
    model = talker(tmp_path / "model")
    edit_config(model, rms_norm_eps="tiny")

    with pytest.raises(CheckpointError, match="transformers refuses config.json of .*'rms_norm_eps' expected float"):
        load_tokenizer(str(model))


def with_stored_head(directory, *, add=0.0):
    """Add to a tied model's file a head that is the embedding plus `add` in one number; return the directory."""
    tensors = load_file(directory / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[100, 7] += add
    save_file(tensors | {"lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("name", ["llama", "granite"])
def test_a_stored_copy_of_a_tied_head_is_the_embedding(name, tmp_path):
    """As granite-4.1 is published. transformers ties a stored head that equals the embedding."""
    model = with_stored_head(toys.build(name, tmp_path / "model", tie_word_embeddings=True))

    grown = surgeon.grow(model, hidden_size="2x").save(tmp_path / "grown")

    assert surgeon.inspect(model).tied
    assert "lm_head.weight is left out: it equals model.embed_tokens.weight" in grown.notes[0]
    assert surgeon.inspect(grown.output).tied
    assert "lm_head.weight" not in open_source(grown.output).tensors
    surgeon.verify(model, grown.output)


def test_a_head_that_differs_is_not_tied_whatever_the_config_says(tmp_path):
    """One number among many differs. transformers compares them all, warns, and uses the stored head."""
    model = with_stored_head(toys.build("llama", tmp_path / "model", tie_word_embeddings=True), add=1.0)
    loaded, _ = toys.load(model)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight

    grown = surgeon.grow(model, hidden_size="2x").save(tmp_path / "grown")

    assert surgeon.inspect(model).tied is False
    assert "stored head differs" in str(surgeon.inspect(model))
    assert "tie_word_embeddings became false: lm_head.weight differs" in grown.notes[0]
    assert open_source(grown.output).config["tie_word_embeddings"] is False
    assert surgeon.verify(model, grown.output).verdict == "exact"


CLASSIFIERS = {
    ("llama", "AutoModelForSequenceClassification"): "score.weight",
    ("qwen3", "AutoModelForTokenClassification"): "score.bias",
    ("gpt2", "AutoModelForTokenClassification"): "classifier.bias",
    ("mistral", "AutoModelForQuestionAnswering"): "qa_outputs.weight",
    ("llama", "AutoModelForQuestionAnswering"): "transformer.norm.weight",  # its base has another name
}


@pytest.mark.parametrize(("model_type", "kind"), CLASSIFIERS)
def test_the_head_of_a_classifier_is_known_by_the_class_in_the_config(model_type, kind, saved):
    model = saved(kind, model_type, **toys.TOYS[model_type], num_labels=5)
    assert CLASSIFIERS[model_type, kind] in open_source(model).tensors

    cut = surgeon.truncate(model, layers=4).save(model.with_name("cut")).output
    wide = surgeon.grow(model, hidden_size="2x", intermediate_size="2x").save(model.with_name("wide")).output

    sound, wider = (getattr(transformers, kind).from_pretrained(each).eval() for each in (model, wide))
    _, report = getattr(transformers, kind).from_pretrained(cut, output_loading_info=True)
    assert not any(report.values())
    outputs = [model(input_ids=torch.arange(3, 15)[None])[0] for model in (sound, wider)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-4)  # the criterion for growth in float32


def test_a_head_that_no_class_names_is_no_tensor_of_the_model(saved):
    model = saved("AutoModelForSequenceClassification", "llama", **toys.TOYS["llama"])
    edit_config(model, architectures=["LlamaForCausalLM"])

    with pytest.raises(CheckpointError, match=r"'score.weight' is not a tensor of a llama model"):
        open_model(model)


@pytest.mark.parametrize("model_type", ["bart", "marian"])
def test_a_decoder_that_was_saved_alone_has_the_decoders_layers(model_type, saved):
    depths = {"encoder_layers": 6, "decoder_layers": 4, "is_decoder": True, "is_encoder_decoder": False}
    kind = {"bart": "BartForCausalLM", "marian": "MarianForCausalLM"}[model_type]
    model = saved(kind, model_type, **toys.TOYS["bart"] | depths)

    cut = surgeon.truncate(model, layers=2).save(model.with_name("cut")).output

    assert open_model(model).anatomy.depth == 4
    _, report = getattr(transformers, kind).from_pretrained(cut, output_loading_info=True)
    assert not any(report.values())


@pytest.mark.parametrize("model_type", ["t5gemma", "t5gemma2"])
def test_an_encoder_and_a_decoder_with_configs_of_their_own_are_cut_alike(model_type, saved):
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    sizes = toys.TOYS["gemma2"] | {"vocab_size": 131}
    encoder = {"text_config": sizes, "vision_config": vision | {"intermediate_size": 48}}
    configs = {"encoder": encoder if model_type == "t5gemma2" else sizes, "decoder": sizes}
    model = saved("AutoModelForSeq2SeqLM", model_type, **configs, vocab_size=131)

    cut = surgeon.truncate(model, layers=2).save(model.with_name("cut")).output

    assert [stack.depth for stack in open_model(cut).anatomy.stacks] == [2, 2]
    _, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(cut, output_loading_info=True)
    assert not any(report.values())


def with_predictor(model, layers):
    """Add a layer that predicts further tokens to a model of so many layers, under the next number, as published."""
    tensors = load_file(model / "model.safetensors")
    last, new = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    tensors |= {new + name.removeprefix(last): tensors[name].clone() for name in tensors if name.startswith(last)}
    tensors[new + "eh_proj.weight"] = torch.randn(48, 96)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    edit_config(model, num_nextn_predict_layers=1)


def test_layers_that_predict_further_tokens_are_shown_and_left_out(saved):
    model = saved("AutoModelForCausalLM", "deepseek_v3", **toys.TOYS["deepseek_v3"])
    with_predictor(model, 6)

    shown = surgeon.inspect(model)
    summary = surgeon.truncate(model, layers=4).save(model.with_name("cut"))

    assert shown.anatomy.depth == 6
    assert "tensors of layers that predict further tokens" in str(shown)
    assert "(MTP) are left out: model.layers.6." in summary.notes[0]
    assert json.loads((summary.output / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not any(toys.load(summary.output)[1].values())


def test_a_layer_too_many_without_a_word_in_the_config_is_still_refused(saved):
    model = saved("AutoModelForCausalLM", "deepseek_v3", **toys.TOYS["deepseek_v3"])
    with_predictor(model, 6)
    edit_config(model, num_nextn_predict_layers=0)

    with pytest.raises(CheckpointError, match="config.json says 6 layers, but the files hold 7"):
        open_model(model)


@pytest.mark.parametrize(
    ("tower", "language"),
    [
        ("qformer.encoder.layer.", "language_model.model.decoder.layers."),
        ("encoder.layers.", "language_model.model.layers."),  # granite_speech names its audio encoder so
        ("vit.layers.", "model.layers."),
        ("multimodal_model.encoder.layer.", "text_model.encoder.layer."),
    ],
)
def test_a_tower_as_deep_as_the_language_model_is_not_taken_for_it(tower, language):
    config = {"model_type": "mine", "text_config": {"num_hidden_layers": 3}}
    names = [f"{prefix}{layer}.weight" for prefix in (tower, language) for layer in range(3)]

    assert find_stacks(config, names) == (Stack(language, 3),)


def test_what_is_not_known_is_not_called_damaged():
    with pytest.raises(CheckpointError, match="does not say how many layers") as refused:
        find_stacks({"model_type": "convnext"}, ["stages.0.weight"])

    assert "may well be sound" in str(refused.value.hint)
