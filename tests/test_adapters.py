"""An adapter folder as MODEL: merged into its base to the last bit of PEFT's own merging, or refused by name."""

import gc
import json
import shutil
from pathlib import Path

import pytest
from later import LATER
from talkers import jsonl, talker, written
from test_hub import empty_hub

import surgeon
from surgeon.checkpoint.lora import MergedSource
from surgeon.checkpoint.source import fingerprint
from surgeon.errors import CheckpointError, OutputError, PlanError
from surgeon.surgery import open_source

if LATER:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

WAYS = {
    "plain": ("llama", {"r": 4, "lora_alpha": 12}),
    "rank-stabilised": ("llama", {"r": 4, "lora_alpha": 12, "use_rslora": True}),
    "all maps, some of other ranks": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 12,
            "target_modules": "all-linear",
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 5},
        },
    ),
    "a norm and its own head": ("llama", {"r": 4, "modules_to_save": ["lm_head", "norm"]}),
    "biases": ("qwen2", {"r": 4, "bias": "all"}),
    "stored as (in, out)": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "an embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
}


def adapted(place: Path, name: str = "llama", **how) -> tuple[Path, Path]:
    """Return a base and an adapter of it, all of whose numbers are drawn."""
    base, adapter = talker(place / "base", name), place / "adapter"
    torch.manual_seed(5)
    how = {"target_modules": ["q_proj", "v_proj"], **how}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**how))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) / 8
    model.save_pretrained(adapter)
    return base, adapter


def merged_by_peft(base: Path, adapter: Path) -> dict:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    return model.state_dict()


def edited(adapter: Path, **changes) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return adapter


@pytest.mark.parametrize("way", WAYS)
def test_a_merged_adapter_is_what_peft_merges_to_the_last_bit(tmp_path, way):
    name, how = WAYS[way]
    base, adapter = adapted(tmp_path, name, **how)

    surgeon.convert(adapter).save(tmp_path / "out")

    made, expected = load_file(tmp_path / "out/model.safetensors"), merged_by_peft(base, adapter)
    before = load_file(base / "model.safetensors")
    assert made.keys() == before.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in made.items())
    assert any(not torch.equal(tensor, before[key]) for key, tensor in made.items())


def test_a_merged_adapter_is_rounded_once_to_the_dtype_of_its_base(tmp_path):
    base, adapter = adapted(tmp_path)
    surgeon.truncate(str(base), layers=6).save(tmp_path / "half", dtype="bfloat16")
    wide = load_file(base / "model.safetensors")
    save_file({name: tensor.bfloat16().float() for name, tensor in wide.items()}, base / "model.safetensors")

    surgeon.convert(adapter, base=str(tmp_path / "half")).save(tmp_path / "out")

    made, expected = load_file(tmp_path / "out/model.safetensors"), merged_by_peft(base, adapter)
    assert all(torch.equal(tensor, expected[key].bfloat16()) for key, tensor in made.items())


def test_every_surgery_of_an_adapter_is_that_of_the_merged_checkpoint(tmp_path):
    _, adapter = adapted(tmp_path)
    surgeon.convert(adapter).save(tmp_path / "merged")
    text = written(tmp_path / "text.txt")

    def made(model: Path, out: str) -> list[bytes]:
        surgeon.truncate(str(model), layers=2).save(tmp_path / out / "truncated")
        shape = {"data": [text], "samples": 2, "sequence_length": 16, "device": "cpu"}
        surgeon.prune(str(model), layers=2, score="angular", **shape).save(tmp_path / out / "pruned")
        return [(tmp_path / out / name / "model.safetensors").read_bytes() for name in ("truncated", "pruned")]

    assert made(adapter, "of adapter") == made(tmp_path / "merged", "of merged")


def test_an_adapter_is_evaluated_streamed_and_loaded_as_the_merged_checkpoint_is(tmp_path):
    _, adapter = adapted(tmp_path)
    surgeon.convert(adapter).save(tmp_path / "merged")
    text = written(tmp_path / "text.txt")
    records = jsonl(tmp_path / "records.jsonl", {"prompt": "The cat", "completion": "sat"})

    def figures(model: Path):
        shape = {"samples": 2, "sequence_length": 16}
        perplexity = surgeon.evaluate(model, data=[text], device="cpu", **shape)
        answers = surgeon.evaluate(model, data=[records], metric="rouge-l", max_new_tokens=6, device="cpu")
        return perplexity.scored.figures, answers.predictions

    assert figures(adapter) == figures(tmp_path / "merged")


def test_nothing_is_merged_before_a_merged_tensor_is_read(tmp_path, monkeypatch):
    _, adapter = adapted(tmp_path)
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))

    summary = surgeon.truncate(str(adapter), layers=2).summary(tmp_path / "out")

    assert summary.layers == (6, 2)
    assert list(place.iterdir()) == []
    source = open_source(adapter)
    fingerprint(source)
    assert len(list(place.iterdir())) == 1
    del source
    gc.collect()
    assert list(place.iterdir()) == []


def test_the_receipt_names_the_adapter_and_its_base(tmp_path):
    base, adapter = adapted(tmp_path)

    surgeon.truncate(str(adapter), layers=2).save(tmp_path / "out")

    source = json.loads((tmp_path / "out/surgeon.json").read_text())["source"]
    assert source["path"] == str(adapter)
    assert source["base"]["path"] == str(base)
    assert source["fingerprint"] != source["base"]["fingerprint"]


def test_neither_the_adapter_nor_its_base_is_replaced(tmp_path):
    base, adapter = adapted(tmp_path)
    for place in (base, adapter):
        with pytest.raises(OutputError, match="is what"):
            surgeon.truncate(str(adapter), layers=2).save(place, overwrite=True)
    assert (adapter / "adapter_config.json").exists()


def test_the_tokenizer_of_an_adapter_goes_before_that_of_its_base(tmp_path):
    base, adapter = adapted(tmp_path)
    for file in base.glob("*token*"):
        shutil.copy(file, adapter)
    (adapter / "chat_template.jinja").write_text("its own")

    surgeon.convert(adapter).save(tmp_path / "out")

    assert (tmp_path / "out/chat_template.jinja").read_text() == "its own"


def test_a_base_on_the_hub_is_read_by_what_the_plan_reads_of_it(tmp_path, monkeypatch):
    base, adapter = adapted(tmp_path)
    surgeon.truncate(str(adapter), layers=2).save(tmp_path / "local")
    edited(adapter, base_model_name_or_path="org/base")

    with empty_hub(tmp_path, monkeypatch) as hub:
        hub.commit("org/base", {path.name: path.read_bytes() for path in base.iterdir()})
        surgeon.truncate(str(adapter), layers=2).save(tmp_path / "out")

    local, remote = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("local", "out"))
    assert local == remote
    assert json.loads((tmp_path / "out/surgeon.json").read_text())["source"]["base"]["id"] == "org/base"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "is an adapter of type 'IA3'; LoRA alone is merged here"),
        ({"use_dora": True}, "is an adapter with use_dora = True"),
        ({"layer_replication": [[0, 2]]}, "is an adapter with layer_replication"),
        ({"target_parameters": ["experts.up"]}, "is an adapter with target_parameters"),
        ({"something_new": 3}, "is an adapter with something_new = 3"),
        ({"init_lora_weights": "pissa"}, "began with 'pissa', which changes the base model too"),
        ({"base_model_name_or_path": None}, "is an adapter that does not name its base model"),
        ({"base_model_name_or_path": "/gone"}, "its base cannot be opened: no such directory: /gone"),
    ],
)
def test_an_adapter_that_is_not_merged_exactly_is_refused_by_name(tmp_path, changes, said):
    _, adapter = adapted(tmp_path)
    with pytest.raises((PlanError, CheckpointError)) as caught:
        open_source(edited(adapter, **changes))
    assert said in str(caught.value)
    assert caught.value.hint
    if "base_model_name_or_path" in changes:
        assert caught.value.hint == f"surgeon convert {adapter} --base MODEL -o merged"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 8}, "has rank 4, and adapter_config.json says 8"),
        ({"lora_alpha": float("inf")}, "says 4, alpha inf"),
        ({"alpha_pattern": {"(": 1}}, "has the pattern '('"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "has the pattern '(a+)+b'"),
    ],
)
def test_an_adapter_whose_files_disagree_is_refused(tmp_path, changes, said):
    _, adapter = adapted(tmp_path, r=4)
    with pytest.raises(CheckpointError, match="rank|pattern") as caught:
        _ = open_source(edited(adapter, **changes)).tensors
    assert said in str(caught.value)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    _, adapter = adapted(tmp_path, r=4)
    other = talker(tmp_path / "other", "gpt2")
    with pytest.raises(
        PlanError, match="changes 'model.layers.0.self_attn.q_proj.weight', and its base .* has no such"
    ):
        _ = open_source(edited(adapter, base_model_name_or_path=str(other))).tensors


def test_an_adapter_of_itself_is_refused(tmp_path):
    _, adapter = adapted(tmp_path, r=4)
    with pytest.raises(PlanError, match="is an adapter of an adapter"):
        open_source(edited(adapter, base_model_name_or_path=str(adapter)))


def test_tensors_that_are_no_plain_lora_are_refused_by_name(tmp_path):
    _, adapter = adapted(tmp_path, r=4)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors)).replace(".lora_A.weight", ".lora_magnitude_vector")
    save_file({**tensors, name: torch.ones(3)}, file)
    with pytest.raises(PlanError, match="lora_magnitude_vector', which is no plain LoRA"):
        _ = open_source(adapter).tensors


def test_an_adapted_embedding_that_is_the_head_too_is_refused(tmp_path):
    _, adapter = adapted(tmp_path, "llama-tied", r=4, target_modules=["embed_tokens"])
    with pytest.raises(PlanError, match="which is the head too: to merge it would change both"):
        _ = open_source(adapter).tensors


def test_an_embedding_that_peft_trained_apart_from_its_tied_head_is_refused(tmp_path):
    _, adapter = adapted(tmp_path, "llama-tied", modules_to_save=["embed_tokens"])

    with pytest.raises(PlanError, match=r"'model.embed_tokens', which is the head too"):
        surgeon.convert(adapter).save(tmp_path / "out")


def test_an_adapter_that_is_a_pickle_is_named(tmp_path):
    _, adapter = adapted(tmp_path, r=4)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="without adapter_model.safetensors but adapter_model.bin, a pickle"):
        open_source(adapter)


def test_a_checkpoint_with_an_adapter_beside_it_is_no_adapter(tmp_path):
    base, adapter = adapted(tmp_path, r=4)
    shutil.copy(adapter / "adapter_config.json", base)
    assert not isinstance(open_source(base), MergedSource)
