"""Which models can be gisted: by their config, and measured."""

import json
import shutil
from pathlib import Path

import pytest
import toys
from later import LATER

from surgeon.errors import MeasureError
from surgeon.gist.architecture import refusal

if LATER:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from surgeon.gist import architecture, support
    from surgeon.gist.probes import Differences
    from surgeon.gist.support import check_checkpoint, check_support

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSED = {
    "bloom": "bloom cannot be gisted: it builds ALiBi",
    "falcon-alibi": "falcon cannot be gisted: with ALiBi",
    "lfm2": "layers 0-1, 3-4 of lfm2 are conv: the prompt would leak",
    "bart": "bart is an encoder-decoder",
    "bert": "bert reads in both directions",
    "roberta": "roberta reads in both directions",
}
EXPERTS = (
    "mixtral",
    "qwen3_moe",
    "qwen3_moe-sparse-step",
    "gpt_oss",
    "qwen2_moe",
    "deepseek_v3",
    "phimoe",
    "granitemoe",
)
POSITION_TABLES = ("gpt2", "gpt2-inverse-layer-idx", "opt", "opt-post-norm", "gpt_neo", "gptj", "codegen")
# Normalises queries and keys after it has turned them: what two tokens see of each other depends on where they are.
NOT_RELATIVE = ("hunyuan_v1_dense",)


@pytest.mark.parametrize("name", [name for name in toys.TOYS if name not in REFUSED])
def test_nothing_leaks_past_the_mask_and_a_cached_gist_replaces_the_prompt(name, toy):
    found = check_support(toys.load(toy(name))[0])

    assert found.supported, found.reason
    if name in EXPERTS:
        # An expert gets other tokens beside ours, and multiplies in another order: 16 float32 epsilons; 5e-7 measured.
        assert found.leak <= 16 * 2**-23
    else:
        assert found.leak == 0.0
    assert found.control > 0.1  # without the mask the prompt is seen: the measure can tell
    # Matrices of other shapes are multiplied, in float32: measured up to 2.2e-6 of the largest logit.
    assert found.cache_difference <= 1e-5
    if name in POSITION_TABLES:
        assert found.rebased_difference is None
    elif name in NOT_RELATIVE:
        assert found.rebased_difference > 0.01
    else:
        assert found.rebased_difference <= 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_gisted_is_refused_with_the_reason(name, toy):
    model, _ = toys.load(toy(name))

    for found in (check_support(model), check_support(model.config), check_checkpoint(str(toy(name)))):
        assert not found.supported
        assert REFUSED[name] in found.reason
        assert found.leak is None


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "qwen3_next",
            {"num_hidden_layers": 8},
            "layers 0-2, 4-6 of qwen3_next are linear_attention: the prompt would",
        ),
        ("llama4_text", {"num_hidden_layers": 4}, "layers 0-2 of llama4_text are chunked_attention: its chunks"),
        ("mamba", {}, "mamba"),
        ("mamba2", {}, "mamba2"),
        ("falcon_mamba", {}, "falcon_mamba"),
        ("jamba", {"num_hidden_layers": 8}, "jamba"),
        ("rwkv", {}, "rwkv"),
        ("recurrent_gemma", {}, "recurrent_gemma"),
        ("falcon_h1", {}, "falcon_h1"),
        ("bamba", {}, "bamba"),
        ("zamba2", {}, "zamba2"),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2}, "granitemoehybrid"),
        ("minimax", {"num_hidden_layers": 4}, "minimax"),
    ],
)
def test_layers_that_carry_the_prompt_past_a_mask_are_refused_by_the_config(name, options, said):
    found = check_support(AutoConfig.for_model(name, **options))

    assert not found.supported
    assert said in found.reason


def test_kinds_that_a_config_does_not_spell_out_are_derived():
    assert "are linear_attention" in refusal({"model_type": "qwen3_next", "full_attention_interval": 4}, 8)
    assert "are chunked_attention" in refusal({"model_type": "llama4_text"}, 8)
    assert refusal({"model_type": "gemma3_text"}, 8) is None


def test_a_config_alone_is_judged_without_a_measure(toy):
    found = check_support(AutoConfig.from_pretrained(toy("llama")))

    assert found.supported
    assert found.leak is None


def tiny(name, **options):
    sizes = toys.OWN_HEAD_DIM | {"num_hidden_layers": 4}
    config = AutoConfig.for_model(name, **sizes | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        toys._randomise(model)
    return model.eval()


def allow(monkeypatch):
    """Take the config's word away: what is left is the measure."""
    monkeypatch.setattr(support, "refusal", lambda config, depth: None)


def test_the_measure_alone_finds_the_leak_of_linear_layers(monkeypatch):
    allow(monkeypatch)
    model = tiny(
        "qwen3_next", linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip

    found = check_support(model)

    assert not found.supported
    assert "the prompt leaks past the mask" in found.reason
    assert found.leak > 0.01


def test_the_measure_alone_finds_that_chunks_move(monkeypatch):
    allow(monkeypatch)
    model = tiny(
        "llama4_text",
        attention_chunk_size=8,
        num_local_experts=4,
        intermediate_size_mlp=52,
        no_rope_layers=[1, 1, 1, 0],
    )

    found = check_support(model)

    assert not found.supported
    if "block_sequence_ids" in found.reason:
        pytest.skip("this transformers cannot make a mask with a rule for chunked layers, so that nothing is measured")
    assert "a cached gist changes what follows" in found.reason
    assert found.leak == pytest.approx(0, abs=1e-5)  # experts round; the layers themselves let nothing past


def test_code_that_takes_no_such_mask_is_said_not_to(monkeypatch, toy):
    allow(monkeypatch)

    found = check_support(toys.load(toy("bloom"))[0])

    assert not found.supported
    assert found.reason.startswith("bloom fails with a gist mask: ")


def test_a_model_comes_back_as_it_was(toy):
    model, _ = toys.load(toy("llama"))
    model.train()
    before = toys.logits(model)

    check_support(model)

    assert model.training
    assert torch.equal(toys.logits(model), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_in_sixteen_bits_the_measure_is_what_any_cache_changes(tmp_path):
    model, _ = toys.load(toys.build("llama", tmp_path / "llama", dtype="bfloat16"), dtype=torch.bfloat16)

    found = check_support(model)

    assert found.supported, found.reason
    assert found.leak == 0.0
    assert 1e-5 < found.cache_difference < 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "t5"])
def test_the_implementation_of_attention_makes_no_difference(name, attention, toy):
    found = check_support(toys.load(toy(name), attn_implementation=attention)[0])

    assert found.supported, found.reason
    assert found.leak == 0.0


def test_nan_is_no_small_difference():
    nan = float("nan")

    assert not support._judged(Differences(nan, 1.0, 0.0, 0.0, 0.0), torch.float32).supported
    assert not support._judged(Differences(0.0, 1.0, nan, 0.0, 0.0), torch.float32).supported
    assert support._judged(Differences(0.0, 1.0, 0.0, nan, 0.0), torch.float32).supported  # kept where it is, then


def test_a_checkpoint_that_cannot_be_loaded_is_one_clear_error(tmp_path, toy):
    broken = shutil.copytree(toy("llama"), tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_act": "no such thing"}))

    with pytest.raises(MeasureError, match="transformers cannot load"):
        check_checkpoint(str(broken))


def test_the_docs_count_the_models_that_can_be_gisted():
    page = (Path(__file__).parent.parent / "docs/gist.md").read_text()

    assert f"{len(toys.TOYS) - len(REFUSED)} of the {len(toys.TOYS)} toys" in page


def test_numbers_of_layers_are_said_in_runs():
    assert architecture._ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"


def test_what_the_config_lets_pass_is_a_model_that_the_check_can_load():
    """Of every class of every type of transformers: `gist` reads configs, `gist --check` loads a causal LM or T5."""
    from transformers.models.auto import modeling_auto

    tables = [table for name, table in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    writers = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encoder_decoders = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    kinds = {(model_type, kind) for table in tables for model_type, kinds in table.items() for kind in _texts(kinds)}
    passed, unloadable = set(), set()
    for model_type, kind in kinds:
        nested = {"text_config": {"model_type": "llama"} | KINDS} if model_type in NESTED else {}
        is_encoder_decoder = model_type in encoder_decoders
        config = {"model_type": model_type, "architectures": [kind], "is_encoder_decoder": is_encoder_decoder}
        if refusal(config | KINDS | nested, 6) is None:
            passed.add(model_type)
            if model_type not in (encoder_decoders if is_encoder_decoder else writers):
                unloadable.add(kind)

    assert len(passed) > 150
    assert {"llama", "gpt2", "gemma3", "t5"} <= passed
    assert unloadable == {"FlaubertWithLMHeadModel", "Mistral4ForCausalLM"}  # no Auto class of transformers has them


KINDS = {"layer_types": ["full_attention"] * 6}
NESTED = {"aya_vision", "gemma3", "idefics3", "internvl", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl", "smolvlm"}


def _texts(kinds):
    return [kinds] if isinstance(kinds, str) else [kind for kind in kinds if isinstance(kind, str)]


@pytest.mark.parametrize(
    ("model_type", "kind", "reason"),
    [
        ("clip", "CLIPModel", "CLIPModel has no language model head"),
        ("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2ForCTC has no language model head"),
        ("llama", "LlamaForSequenceClassification", "LlamaForSequenceClassification has no language model head"),
        ("llava", "LlavaForConditionalGeneration", "llava has more than a language model"),
    ],
)
def test_a_model_that_does_not_write_alone_is_refused_by_its_config(model_type, kind, reason):
    assert str(refusal({"model_type": model_type, "architectures": [kind]}, 6)).startswith(reason)
