"""Truncation end to end, on every family: load, compute, generate, save again."""

import json
import re

import pytest
import toys
from later import LATER

import surgeon
from surgeon.errors import PlanError

if LATER:
    import torch
    from safetensors.torch import load_file

ENCODERS = ("bert", "roberta")


@pytest.mark.parametrize("name", toys.TOYS)
def test_a_truncated_model_is_the_original_with_its_last_layers_bypassed(name, toy, tmp_path):
    summary = surgeon.truncate(toy(name), layers=4).save(tmp_path / "cut")

    model, report = toys.load(tmp_path / "cut")
    reference, _ = toys.load(toy(name))
    assert summary.layers == (6, 4)
    assert not any(report.values()), report
    assert (
        sum(tensor.numel() for tensor in load_file(tmp_path / "cut/model.safetensors").values())
        == summary.parameters[1]
    )
    with toys.bypass(reference, [4, 5]):
        assert torch.equal(toys.logits(model), toys.logits(reference))


SCALED = "gpt2-inverse-layer-idx"  # its queries are multiplied; tests/test_prune.py measures that


@pytest.mark.parametrize("name", [name for name in toys.TOYS if name != SCALED])
def test_every_second_layer_is_kept_from_the_first_on_or_the_type_says_why_not(name, toy, tmp_path):
    try:
        summary = surgeon.truncate(toy(name), every=2).save(tmp_path / "cut")
    except PlanError as refused:
        pytest.skip(str(refused))

    model, report = toys.load(tmp_path / "cut")
    reference, _ = toys.load(toy(name))
    assert summary.layer_map == (0, 2, 4)
    assert not any(report.values()), report
    with toys.bypass(reference, [1, 3, 5]):
        assert torch.equal(toys.logits(model), toys.logits(reference))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--layers.* is missing: give it, or --every 2"),
        (("--layers", "3", "--every", "2"), "both say which layers stay"),
        (("--every", "1"), "--every is 1; the least is 2"),
        (("--every", "6"), "cannot keep every 6-th layer of 6"),
    ],
)
def test_which_layers_stay_is_said_once_and_makes_sense(words, message, toy, run):
    result = run("truncate", toy("gpt2"), *words)

    assert result.code != 0
    assert re.search(message, result.err), result.err


@pytest.mark.parametrize("name", [name for name in toys.TOYS if name not in ENCODERS])
def test_a_truncated_model_generates_the_same_with_and_without_cache(name, toy, tmp_path):
    surgeon.truncate(toy(name), layers=3).save(tmp_path / "cut")

    model, _ = toys.load(tmp_path / "cut")
    arguments = toys.inputs(model) | {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, uncached = (model.generate(**arguments, use_cache=use_cache) for use_cache in (True, False))
    assert cached.shape[1] >= 8
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("name", toys.TOYS)
def test_transformers_saves_a_truncated_model_again_without_change(name, toy, tmp_path):
    surgeon.truncate(toy(name), layers=3).save(tmp_path / "cut")

    toys.load(tmp_path / "cut")[0].save_pretrained(tmp_path / "again")

    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "qwen3_moe-sparse-step", "opt-post-norm", "gpt_oss", "phi3"]
)
@pytest.mark.parametrize("part", ["attention", "mlp", "norm", "embedding"])
def test_inherit_keeps_one_part_and_draws_the_others(name, part, toy, tmp_path):
    surgeon.truncate(toy(name), layers=4, inherit=[part]).save(tmp_path / "cut")

    inspection = surgeon.inspect(tmp_path / "cut")
    before, after = load_file(toy(name) / "model.safetensors"), load_file(tmp_path / "cut/model.safetensors")
    assert not any(toys.load(tmp_path / "cut")[1].values())
    for tensor, value in after.items():
        assert torch.equal(value, before[tensor]) == (inspection.anatomy.row(tensor)[1] == part), tensor


def test_none_inherits_nothing_and_each_ablation_of_inheritune_its_parts_alone(toy, tmp_path, run):
    before = load_file(toy("gpt2") / "model.safetensors")
    ablations = {
        "none": (),
        "attention,norm,embedding": ("attention", "norm", "embedding"),
        "mlp,norm,embedding": ("mlp", "norm", "embedding"),
        "attention,mlp,embedding": ("attention", "mlp", "embedding"),
    }  # fmt: skip
    for words, parts in ablations.items():
        out = tmp_path / words
        outcome = run("truncate", toy("gpt2"), "--layers", 3, "--inherit", words, "-o", out, "--json")

        assert outcome.code == 0, outcome.err
        anatomy, after = surgeon.inspect(out).anatomy, load_file(out / "model.safetensors")
        kept = {name for name, value in after.items() if value.equal(before[name])}
        assert kept == {name for name in after if anatomy.row(name)[1] in parts}, words
    receipt = json.loads((tmp_path / "none/surgeon.json").read_text())
    assert receipt["steps"][0]["truncate"]["inherit"] == []
    surgeon.truncate(toy("gpt2"), layers=3, inherit=[]).save(tmp_path / "python")
    files = [tmp_path / name / "model.safetensors" for name in ("none", "python")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_none_is_no_part_beside_others(toy, run):
    outcome = run("truncate", toy("gpt2"), "--layers", 3, "--inherit", "none,mlp", "--dry-run")

    assert outcome.code == 2
    assert "unknown part 'none'" in outcome.err


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(toy, tmp_path):
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        surgeon.truncate(toy("llama"), layers=2, inherit=["norm"], seed=seed).save(tmp_path / out)

    one, two, three = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_a_drawn_tensor_does_not_depend_on_what_else_is_drawn(toy, tmp_path):
    surgeon.truncate(toy("llama"), layers=2, inherit=["norm"]).save(tmp_path / "much")
    surgeon.truncate(toy("llama"), layers=2, inherit=["norm", "attention", "embedding"]).save(tmp_path / "little")

    much, little = (load_file(tmp_path / out / "model.safetensors") for out in ("much", "little"))
    assert torch.equal(much["model.layers.1.mlp.up_proj.weight"], little["model.layers.1.mlp.up_proj.weight"])


def test_more_layers_than_there_are_none_and_unknown_parts_are_refused(toy, tmp_path):
    with pytest.raises(PlanError, match="cannot truncate to 7 layers: the model has 6"):
        surgeon.truncate(toy("llama"), layers=7)
    with pytest.raises(PlanError, match="at least one layer"):
        surgeon.truncate(toy("llama"), layers=0)
    with pytest.raises(PlanError, match="unknown part 'head'"):
        surgeon.truncate(toy("llama"), layers=3, inherit=["head"])
    with pytest.raises(PlanError, match="only whole layers can be moved"):
        surgeon.truncate(toys.unheard_of("llama", tmp_path / "toy"), layers=3, inherit=["mlp"])


def test_a_chain_of_surgeries_is_one_pass_with_the_same_bytes_as_its_steps(toy, tmp_path):
    once = surgeon.truncate(surgeon.truncate(toy("gemma3_text"), layers=5), layers=3)
    once.save(tmp_path / "fused", dtype="bfloat16")

    surgeon.truncate(toy("gemma3_text"), layers=5).save(tmp_path / "five")
    surgeon.truncate(tmp_path / "five", layers=3).save(tmp_path / "three")
    surgeon.truncate(tmp_path / "three", layers=3).save(tmp_path / "steps", dtype="bfloat16")

    fused, steps = (tmp_path / out / "model.safetensors" for out in ("fused", "steps"))
    assert fused.read_bytes() == steps.read_bytes()
    assert json.loads((tmp_path / "fused/config.json").read_text()) == json.loads(
        (tmp_path / "steps/config.json").read_text()
    )
    assert [next(iter(step)) for step in once.plan.steps] == ["truncate", "truncate"]


def test_every_companion_file_travels_and_no_other_weights_do(toy, tmp_path):
    source = tmp_path / "source"
    toys.build("llama", source)
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "additional_chat_templates/tool.jinja"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f"content of {name}")
    for name in ("pytorch_model.bin", "model.gguf", "flax_model.msgpack", "training_args.bin", ".gitattributes"):
        (source / name).write_bytes(b"weights of the whole model")
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Source\n")

    surgeon.truncate(source, layers=2).save(tmp_path / "cut", command="surgeon truncate source --layers 2")

    files = {path.relative_to(tmp_path / "cut").as_posix() for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    assert files == {
        "config.json", "model.safetensors", "surgeon.json", "README.md", "generation_config.json", "tokenizer.json",
        "chat_template.jinja", "LICENSE", "additional_chat_templates/tool.jinja",
    }  # fmt: skip
    assert (tmp_path / "cut/chat_template.jinja").read_text() == "content of chat_template.jinja"
    card = (tmp_path / "cut/README.md").read_text()
    for expected in ("base_model: source", "library_name:", "license: apache-2.0", "6 → 2", "surgeon truncate source"):
        assert expected in card


def test_the_receipt_says_what_was_done_to_what(toy, tmp_path):
    surgeon.truncate(toy("llama"), layers=3, inherit=["attention"], seed=7).save(
        tmp_path / "cut", dtype="float16", command="surgeon truncate x"
    )

    receipt = json.loads((tmp_path / "cut/surgeon.json").read_text())
    assert receipt["steps"] == [{"truncate": {"layers": 3, "inherit": ["attention"], "seed": 7}}]
    assert receipt["layer_map"] == [0, 1, 2]
    assert receipt["options"] == {"dtype": "float16", "max_shard_size": "5GB", "block": 0}
    assert receipt["command"] == "surgeon truncate x"
    assert receipt["source"]["path"] == str(toy("llama").resolve())
    assert receipt["source"]["fingerprint"].startswith("sha256-sampled:")
    assert receipt["versions"]["surgeon"]


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_a_dtype_is_stored_as_torch_would_round_to_it(dtype, expected, toy, tmp_path):
    summary = surgeon.truncate(toy("gpt2"), layers=2).save(tmp_path / "cut", dtype=dtype)

    before, after = load_file(toy("gpt2") / "model.safetensors"), load_file(tmp_path / "cut/model.safetensors")
    assert surgeon.inspect(tmp_path / "cut").dtypes == {expected: summary.bytes_written}
    assert all(torch.equal(value, before[name].to(getattr(torch, dtype))) for name, value in after.items())
    assert json.loads((tmp_path / "cut/config.json").read_text())["dtype"] == dtype


def test_shards_are_written_and_read_back(toy, tmp_path):
    summary = surgeon.truncate(toy("mixtral"), layers=3).save(tmp_path / "cut", max_shard_size="100KB")

    assert len(summary.files) > 3
    assert all((tmp_path / "cut" / file).stat().st_size < 110_000 for file in summary.files)
    model, report = toys.load(tmp_path / "cut")
    reference, _ = toys.load(toy("mixtral"))
    assert not any(report.values())
    with toys.bypass(reference, [3, 4, 5]):
        assert torch.equal(toys.logits(model), toys.logits(reference))
    surgeon.truncate(tmp_path / "cut", layers=3).save(tmp_path / "whole")
    surgeon.truncate(toy("mixtral"), layers=3).save(tmp_path / "direct")
    whole, direct = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "direct"))
    assert all(torch.equal(whole[key], direct[key]) for key in direct)


def test_a_dry_run_knows_what_the_run_will_write(toy, tmp_path):
    surgery = surgeon.truncate(toy("qwen3_moe"), layers=3, inherit=["attention", "norm"])

    preview = surgery.summary(tmp_path / "cut", dtype="bfloat16", max_shard_size="50KB")
    done = surgery.save(tmp_path / "cut", dtype="bfloat16", max_shard_size="50KB")

    assert preview.to_dict() | {"seconds": 0} == done.to_dict() | {"seconds": 0}
    assert (
        sum(tensor.spec.nbytes for tensor in surgeon.inspect(tmp_path / "cut").tensors.values()) == done.bytes_written
    )
