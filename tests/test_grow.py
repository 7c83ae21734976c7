"""`surgeon grow`: the verb and the command, from the sizes asked for to the model on disk."""

import json

import pytest
import toys
from later import LATER

import surgeon
from surgeon.errors import PlanError
from surgeon.plan.execute import execute
from surgeon.surgery import open_model

if LATER:
    import torch
    from exact64 import CLOSE, EXACT, build64, difference, logits32, logits64, original32, original64
    from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_thread")

# Everything at once, in sizes that the families allow: MLPs of 52 to 71, 6 layers to 8.
EVERYTHING = {
    "llama": ["--hidden-size", 72, "--attention-heads", 12, "--head-dim", "2x", "--intermediate-size", 71],
    "qwen3": ["--hidden-size", 60, "--attention-heads", "2x", "--head-dim", "3x", "--intermediate-size", "2x"],
    "gemma3_text": ["--hidden-size", "2x", "--attention-heads", 12, "--head-dim", "2x", "--intermediate-size", 71],
    "gpt2": ["--hidden-size", "3x", "--head-dim", "2x", "--attention-heads", 12, "--intermediate-size", 71],
    "gpt_oss": ["--hidden-size", 60, "--attention-heads", 12, "--intermediate-size", "2x"],
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_one_command_grows_everything_and_keeps_the_function(name, toy, tmp_path, run):
    out = tmp_path / "grown"

    outcome = run("grow", toy(name), "--layers", 8, *EVERYTHING[name], "-o", out, "--json", "--no-verify")

    summary = json.loads(outcome.out)
    expected = original32(toy(name))
    assert outcome.code == 0
    assert summary["layers"] == {"before": 6, "after": 8}
    assert summary["layer_map"] == [0, 1, 2, None, 3, 4, 5, None]
    assert [note for note in summary["notes"] if not note.startswith(("llama.cpp", "vLLM"))] == []
    assert summary["parameters"]["after"] == open_model(out).spec.num_parameters
    assert difference(logits32(out), expected) <= CLOSE * expected.abs().max()


def test_the_command_and_the_function_write_the_same_bytes(toy, tmp_path, run):
    run("grow", toy("llama"), "--hidden-size", "2x", "--layers", "150%", "-o", tmp_path / "a", "--no-verify", "-q")
    surgeon.grow(toy("llama"), hidden_size="2x", layers=9).save(tmp_path / "b")

    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_dry_run_says_what_the_run_does_and_writes_nothing(toy, tmp_path, run):
    command = ["grow", toy("llama"), "--hidden-size", 72, "--layers", 8, "-o", tmp_path / "out", "--json"]

    planned = json.loads(run(*command, "--dry-run").out)
    assert not (tmp_path / "out").exists()
    done = json.loads(run(*command, "--no-verify").out)

    assert done.pop("timings").keys() == {"writing", "other"}
    assert {**planned, "seconds": None} == {**done, "seconds": None}
    assert done["bytes_written"] == sum(
        value.nbytes for value in load_file(tmp_path / "out/model.safetensors").values()
    )


def test_an_error_names_a_size_that_fits_and_leaves_nothing_behind(toy, tmp_path, run):
    outcome = run("grow", toy("llama"), "--hidden-size", 50, "-o", tmp_path / "out")

    assert outcome.code == 1
    assert "error: llama wants a hidden size that its heads divide: 50 is no multiple of 8" in outcome.err
    assert "hint: Near: --hidden-size 56." in outcome.err
    assert outcome.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_plus_adds_layers_to_those_that_there_are(toy, tmp_path, run):
    surgeon.truncate(toy("llama"), layers=2).save(tmp_path / "two")

    outcome = run(
        "grow", tmp_path / "two", "--layers", "+2", "--donor", toy("llama"), "-o", tmp_path / "four", "--json"
    )

    assert json.loads(outcome.out)["layers"] == {"before": 2, "after": 4}
    grown, donor = (load_file(path / "model.safetensors") for path in (tmp_path / "four", toy("llama")))
    assert all(value.equal(donor[name]) for name, value in grown.items())
    assert surgeon.grow(toy("llama"), layers="+3").plan.layer_map.count(None) == 3


@pytest.mark.parametrize("layers", ["+", "+0", "+x", "+-2", "+50%"])
def test_a_plus_without_a_number_is_refused(layers, toy):
    with pytest.raises(PlanError, match="as a number of layers"):
        surgeon.grow(toy("llama"), layers=layers)


# --- what follows what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "options", "expected"),
    [
        ("llama", {}, {"hidden_size": "2x"}, {"hidden": 96, "heads": 8, "kv_heads": 2, "head_dim": 10}),
        ("llama", {}, {"attention_heads": "2x"}, {"heads": 16, "kv_heads": 4, "group": 4}),
        ("llama", {}, {"key_value_heads": "2x"}, {"heads": 8, "kv_heads": 4, "group": 2}),
        ("llama", {"num_key_value_heads": 8}, {"key_value_heads": "2x"}, {"heads": 16, "kv_heads": 16, "group": 1}),
        ("llama", {"num_key_value_heads": 8}, {"attention_heads": 12}, {"heads": 12, "kv_heads": 12, "group": 1}),
        ("llama", {"num_key_value_heads": 1}, {"attention_heads": "2x"}, {"heads": 16, "kv_heads": 1, "group": 16}),
        ("llama", {"num_key_value_heads": 1}, {"key_value_heads": 4}, {"heads": 8, "kv_heads": 4, "group": 2}),
        ("mistral", {}, {"attention_heads": 10}, {"heads": 10, "kv_heads": 2, "group": 5}),
        ("gpt2", {}, {"hidden_size": "2x"}, {"hidden": 160, "heads": 16, "kv_heads": 16, "ffn": 52}),
        ("gpt2", {}, {"hidden_size": "2x", "head_dim": "2x"}, {"hidden": 160, "heads": 8, "head_dim": 20}),
        ("gpt_neox", {}, {"hidden_size": 100}, {"hidden": 100, "heads": 10, "kv_heads": 10, "head_dim": 10}),
        ("opt", {}, {"hidden_size": 120}, {"hidden": 120, "embed": 120, "heads": 12}),
        ("opt-post-norm", {}, {"hidden_size": "2x"}, {"hidden": 160, "embed": 44, "heads": 16}),
    ],
)
def test_what_is_not_asked_for_follows_or_stays(name, overrides, options, expected, tmp_path):
    source = build64(name, tmp_path / "source", **{"hidden_size": 48} | overrides if name == "llama" else overrides)

    surgery = surgeon.grow(source, **options)
    surgery.save(tmp_path / "out")

    sizes = surgery.anatomy.sizes
    assert {axis: sizes[axis] for axis in expected} == expected
    assert difference(logits64(tmp_path / "out"), logits64(source)) <= EXACT


def test_nothing_is_grown_by_sizes_that_are_there_already(toy, tmp_path):
    surgeon.grow(toy("llama"), layers=6, hidden_size="1x", attention_heads=8).save(tmp_path / "same")

    before, after = (load_file(path / "model.safetensors") for path in (toy("llama"), tmp_path / "same"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- chains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_chain_writes_the_bytes_of_its_steps_in_one_pass(dtype, tmp_path):
    source = toys.build("llama", tmp_path / "source", dtype=dtype)
    cut, wide = {"layers": 4}, {"hidden_size": 72, "intermediate_size": "2x", "layers": 5}

    surgeon.truncate(source, **cut).save(tmp_path / "one")
    surgeon.grow(tmp_path / "one", **wide).save(tmp_path / "two")
    surgeon.grow(tmp_path / "two", hidden_size="2x").save(tmp_path / "three")
    chain = surgeon.grow(surgeon.grow(surgeon.truncate(source, **cut), **wide), hidden_size="2x")
    chain.save(tmp_path / "chain")

    steps, fused = tmp_path / "three", tmp_path / "chain"
    assert (steps / "model.safetensors").read_bytes() == (fused / "model.safetensors").read_bytes()
    assert (steps / "config.json").read_bytes() == (fused / "config.json").read_bytes()
    assert [next(iter(step)) for step in chain.plan.steps] == ["truncate", "grow", "grow"]
    receipt = json.loads((fused / "surgeon.json").read_text())
    assert receipt["layer_map"] == [0, 1, 2, 3, None]
    assert receipt["axis_maps"] == {
        "hidden": [[0, 48], [-1, 24], [0, 48], [-1, 24]],
        "ffn": [[0, 52], [0, 52]],
    }


def test_growing_twice_keeps_the_function_too(toy64, tmp_path):
    once = surgeon.grow(toy64("llama"), hidden_size=144, layers=7, head_dim="2x")
    surgeon.grow(once, hidden_size="2x", layers=8, attention_heads="2x", key_value_heads=2).save(tmp_path / "out")

    assert difference(logits64(tmp_path / "out"), original64(toy64("llama"))) <= EXACT


def test_what_was_grown_can_be_cut_back(toy, tmp_path):
    surgeon.truncate(surgeon.grow(toy("llama"), layers=8, at=[5, 5]), layers=6).save(tmp_path / "back")

    before, after = (load_file(path / "model.safetensors") for path in (toy("llama"), tmp_path / "back"))
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- storage --------------------------------------------------------------------------------------------------------

DOUBLED = {"hidden_size": "2x", "intermediate_size": "2x", "layers": 8}


def in_bfloat16(name, tmp_path):
    return toys.build(name, tmp_path / "source", dtype="bfloat16")


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-tied", "gpt2", "gpt_neox", "opt", "phi3"])
def test_doubling_without_noise_is_exact_in_bfloat16(name, tmp_path):
    """Halves have the same bits with another exponent."""
    source = in_bfloat16(name, tmp_path)

    surgery = surgeon.grow(source, noise=0, **DOUBLED)
    summary = surgery.save(tmp_path / "out")

    assert [note for note in summary.notes if not note.startswith("llama.cpp")] == []
    assert {value.dtype for value in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert difference(logits64(tmp_path / "out"), logits64(source)) <= EXACT


@pytest.mark.parametrize(("name", "options"), [("gemma", DOUBLED), ("llama", {"hidden_size": "3x"})])
def test_other_factors_round_in_bfloat16_and_say_so(name, options, tmp_path):
    """Gemma multiplies its embedding by the square root of the hidden size: doubling it brings in the root of 2."""
    source = in_bfloat16(name, tmp_path)

    summary = surgeon.grow(source, noise=0, **options).save(tmp_path / "out")
    wide = surgeon.grow(source, noise=0, **options).save(tmp_path / "wide", dtype="float32")

    expected = logits64(source)
    assert len(summary.notes) == 1
    assert "float32" in summary.notes[0]
    assert wide.notes == ()
    # 2^-8 a number in bfloat16, 2^-24 in float32, through 6 layers
    assert EXACT < difference(logits64(tmp_path / "out"), expected) < 0.1 * expected.abs().max()
    assert difference(logits64(tmp_path / "wide"), expected) < 1e-5 * expected.abs().max()


def test_new_layers_are_exact_in_any_dtype(tmp_path):
    source = in_bfloat16("gemma2", tmp_path)

    surgeon.grow(source, layers=9).save(tmp_path / "out")

    models = (toys.load(path, dtype=torch.bfloat16)[0] for path in (tmp_path / "out", source))
    assert torch.equal(*map(toys.logits, models))


def test_an_integer_in_the_weights_is_not_computed_with(tmp_path):
    from safetensors.torch import save_file

    source = toys.build("llama", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(PlanError, match="stored as I8"):
        surgeon.grow(source, hidden_size="2x").summary()


def test_the_bytes_are_the_same_for_any_number_of_threads(toy, tmp_path, monkeypatch):
    """Parts of 500 numbers: each tensor has many, and threads take them in any order."""
    monkeypatch.setattr("surgeon.plan.arithmetic.PART", 500)
    surgery = surgeon.grow(toy("llama"), hidden_size="2x", intermediate_size="2x", layers=8)
    draft = surgery.prepare(tmp_path / "out")

    for threads in (1, 2, 8):
        (tmp_path / str(threads)).mkdir()
        execute(draft.plan, surgery.source, tmp_path / str(threads), shards=draft.shards, threads=threads)

    one, two, eight = ((tmp_path / str(threads) / "model.safetensors").read_bytes() for threads in (1, 2, 8))
    assert one == two == eight
