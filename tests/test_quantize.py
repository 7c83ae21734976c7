"""Quantizing: what is stored as codes, that it reloads to the same logits, what is refused, and what it costs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import pytest
import talkers
from later import LATER

import surgeon
from surgeon.checkpoint.header import TensorSpec, read_header, read_metadata
from surgeon.errors import PlanError, VerificationError
from surgeon.options import OptionError
from surgeon.plan import schemes
from surgeon.plan.schemes import COMPRESSED, GROUPS, TORCHAO, Scheme, check_installed, scheme_of
from surgeon.surgery import open_model
from surgeon.transforms.quantize import fitting_groups, linear_maps
from surgeon.transforms.quantize import quantize as plan_quantize

if LATER:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

INT8, INT4 = Scheme(TORCHAO, 8), Scheme(COMPRESSED, 4, 32)
# Inputs are multiples of 32: hidden 96, MLP 160, 4 heads of 24.
EVEN = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 24, "num_hidden_layers": 2}


def installed(name):
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


needs_libraries = pytest.mark.skipif(
    not (installed(TORCHAO) and installed(COMPRESSED)), reason="pip install 'surgeon[quantize]'"
)


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """Return a checkpoint in bfloat16 that speaks, with a tied head, whose inputs are multiples of 32. Read-only."""
    sizes = EVEN | {"tie_word_embeddings": True, "dtype": "bfloat16"}
    return talkers.talker(tmp_path_factory.mktemp("even") / "even", **sizes)


@pytest.fixture(scope="module")
def made(even, tmp_path_factory):
    """Return a function from the bits to what `quantize` wrote of `even`, and its surgery. Read-only."""
    place, done = tmp_path_factory.mktemp("made"), {}

    def make(bits):
        if bits not in done:
            quantizing = surgeon.quantize(even, bits=bits)
            quantizing.save(place / str(bits))
            done[bits] = place / str(bits), quantizing
        return done[bits]

    return make


def logits(path, **options):
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True, **options)
    assert not any(report.values()), report
    with torch.no_grad():
        return model(torch.arange(3, 43)[None]).logits


# --- what is written ----------------------------------------------------------------------------------------------


@needs_libraries
@pytest.mark.parametrize("bits", [8, 4])
def test_only_linear_maps_in_the_layers_change_and_all_else_keeps_its_bytes(bits, even, made):
    before, after = load_file(even / "model.safetensors"), load_file(made(bits)[0] / "model.safetensors")

    kept = before.keys() & after.keys()
    assert {name for name in before if "proj" not in name} == kept
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in kept)
    assert after["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert "lm_head.weight" not in after  # a tied head stays tied
    codes = {8: "_weight_qdata", 4: "weight_packed"}[bits]
    assert sum(name.endswith(codes) for name in after) == len(made(bits)[1].modules) == 14


@needs_libraries
def test_int8_reloads_to_what_transformers_quantizes_itself_bit_for_bit(even, made):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    by_transformers = logits(even, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map="cpu")

    assert torch.equal(logits(made(8)[0]), by_transformers)
    assert not torch.equal(by_transformers, logits(even))


@needs_libraries
def test_four_bits_reload_to_the_weights_that_the_grid_says(even, made):
    """By hand: the nearest of 16 levels, the scale the largest magnitude of 32 inputs over 7.5, in bfloat16."""
    weights = load_file(even / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(even, dtype="auto")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                groups = weights[name].float().unflatten(1, (-1, 32))
                scale = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
                codes = (groups / scale).bfloat16().round().clamp(-8, 7)
                parameter.copy_((codes.float() * scale).flatten(1).bfloat16())
        expected = model(torch.arange(3, 43)[None]).logits

    assert torch.equal(logits(made(4)[0]), expected)


@needs_libraries
@pytest.mark.parametrize("bits", [8, 4])
def test_the_config_and_the_header_are_what_the_library_itself_writes(bits, even, made):
    config = json.loads((made(bits)[0] / "config.json").read_text())["quantization_config"]
    metadata = read_metadata(made(bits)[0] / "model.safetensors")
    if bits == 8:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        model = AutoModelForCausalLM.from_pretrained(made(8)[0], dtype="auto")
        state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        _, told = flatten_tensor_state_dict(state)
        assert {name: json.loads(text) for name, text in told.items() if name != "tensor_names"} == {
            name: json.loads(text) for name, text in metadata.items() if name not in ("tensor_names", "format")
        }
        assert set(json.loads(told["tensor_names"])) == set(json.loads(metadata["tensor_names"]))
        assert config == TorchAoConfig(Int8WeightOnlyConfig()).to_dict()
    else:
        from compressed_tensors.quantization import QuantizationConfig

        read = QuantizationConfig.model_validate(config).model_dump(mode="json")
        assert {key: value for key, value in read.items() if value is not None} == {
            key: value for key, value in config.items() if value is not None
        }
        assert metadata == {"format": "pt"}


@needs_libraries
def test_the_result_is_really_smaller_and_a_dry_run_knows_by_how_much(even, made):
    for bits, most in ((8, 0.63), (4, 0.45)):  # of 127 k parameters 23 % are embeddings, and norms; 4 bits need scales
        path, quantizing = made(bits)
        before, after = quantizing.file_bytes(path)
        assert after == (path / "model.safetensors").stat().st_size
        tensors = quantizing.file_bytes()
        assert tensors[1] / tensors[0] < most
        assert tensors[1] == sum(entry.spec.nbytes for entry in read_header(path / "model.safetensors").values())
        assert quantizing.summary().bytes_written == tensors[1]
        assert quantizing.summary().parameters == (quantizing.begun.spec.num_parameters,) * 2
        assert before == (even / "model.safetensors").stat().st_size


@needs_libraries
def test_the_receipt_replays_and_the_card_says_what_it_is_made_from(made, run, tmp_path):
    path, _ = made(4)

    done = run("run", path / "surgeon.json", "-o", tmp_path / "again", "--json")

    assert done.code == 0, done.err
    assert (tmp_path / "again/model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    card = (path / "README.md").read_text()
    assert "base_model: even\nbase_model_relation: quantized\n" in card
    step = json.loads((path / "surgeon.json").read_text())["steps"][-1]["quantize"]
    assert step == {"bits": 4, "method": COMPRESSED, "group_size": 32, "library": f"{COMPRESSED} {version(COMPRESSED)}"}


@needs_libraries
def test_a_chain_is_quantized_in_one_pass_as_step_by_step(even, tmp_path):
    chained = surgeon.quantize(surgeon.truncate(even, layers=1), bits=8)
    chained.save(tmp_path / "chained")
    surgeon.truncate(even, layers=1).save(tmp_path / "cut")
    surgeon.quantize(tmp_path / "cut", bits=8).save(tmp_path / "after")

    one, two = (tmp_path / name / "model.safetensors" for name in ("chained", "after"))
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(PlanError, match="quantize is the last step of a chain"):
        surgeon.truncate(chained, layers=1)


@needs_libraries
def test_files_of_few_bytes_hold_all_that_torchao_asks_for_in_each_of_them(even, tmp_path):
    surgeon.quantize(even, bits=8).save(tmp_path / "shards", max_shard_size="60kB")

    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(tmp_path / "shards"), logits_of_int8(even))


def logits_of_int8(path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return logits(path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map="cpu")


@needs_libraries
@pytest.mark.parametrize("name", ["opt", "gpt_neox", "phi3", "gemma2", "bert"])
def test_other_families_reload_to_the_same_logits(name, toy, tmp_path):
    quantizing = surgeon.quantize(toy(name), bits=8)

    quantizing.save(tmp_path / "made")  # it raises VerificationError where they are not the same

    (proof,) = quantizing.proofs
    assert 0 < proof.difference < 0.5 * proof.deviation


# --- what is refused ----------------------------------------------------------------------------------------------


@needs_libraries
@pytest.mark.parametrize("bits", [8, 4])
def test_conv1d_is_refused_before_a_byte_is_written(bits, toy, tmp_path):
    with pytest.raises(PlanError, match="Conv1D .*passes over silently"):
        surgeon.quantize(toy("gpt2"), bits=bits).save(tmp_path / "made")

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "gpt_oss"])
def test_experts_are_refused_for_transformers_holds_them_in_one_tensor(name, toy):
    with pytest.raises(PlanError, match="is of experts"):
        plan_quantize(open_model(toy(name)).anatomy, INT8)


def test_a_group_that_does_not_divide_is_refused_by_name_with_one_that_does(even):
    anatomy = open_model(even).anatomy

    with pytest.raises(
        PlanError, match=r"'model.layers.0.\S+' has (96|160) inputs, no whole number of groups of 64"
    ) as told:
        plan_quantize(anatomy, replace(INT4, group_size=64))

    assert told.value.hint == "--group-size 32 divides all of them."
    assert fitting_groups(linear_maps(anatomy, COMPRESSED)) == [32]


@needs_libraries
def test_a_model_that_no_group_fits_is_refused_in_4_bits(toy):
    with pytest.raises(PlanError, match="no whole number of groups of 32") as told:
        surgeon.quantize(toy("llama"), bits=4)

    assert "--bits 8 has a scale for each row" in str(told.value.hint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "--bits is 3; a code has 8 or 4"),
        ({"bits": 4, "method": TORCHAO}, "--bits 4 does not go with --method torchao"),
        ({"bits": 8, "method": TORCHAO, "group_size": 32}, "--group-size has no effect with torchao"),
        ({"bits": 4, "group_size": 48}, "--group-size is 48, and kernels take 32, 64, 128"),
        ({"method": "gptq"}, "--method gptq: its library needs a GPU"),
        ({"method": "torcha"}, "unknown --method 'torcha'.*torchao"),
        ({"samples": 0}, "--samples is 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        surgeon.quantize("nowhere", **options)


def test_a_library_that_is_not_there_is_named_with_what_to_type():
    with pytest.raises(PlanError, match="no-such-library is not installed") as told:
        check_installed("no-such-library")

    assert told.value.hint == "pip install 'surgeon[quantize]'"


@needs_libraries
def test_a_half_installed_library_is_named_by_its_cause(even, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("compressed_tensors", "loguru")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "loguru", None)  # as if pip had not installed it

    with pytest.raises(PlanError, match="compressed-tensors cannot be imported: .*loguru") as told:
        surgeon.quantize(even, bits=4).save(tmp_path / "made")

    assert told.value.hint == "Install it again: pip install 'surgeon[quantize]'"
    assert not list(tmp_path.iterdir())


@needs_libraries
def test_a_result_that_does_not_reload_to_the_same_is_not_written(even, tmp_path, monkeypatch):
    from surgeon.plan import quantizing as codes

    make = codes._by_torchao()
    monkeypatch.setattr(codes, "_by_torchao", lambda: lambda rows: _scaled(make(rows)))

    with pytest.raises(VerificationError, match="does not reload to what was quantized"):
        surgeon.quantize(even, bits=8).save(tmp_path / "made")

    assert not list(tmp_path.iterdir())


def _scaled(made):
    return {**made, "scale": made["scale"] * 1.05}


@needs_libraries
@pytest.mark.parametrize(
    "words",
    [
        ["truncate", "--layers", "1"],
        ["grow", "--layers", "3"],
        ["prune", "--score", "last", "--layers", "1"],
        ["prune", "--score", "magnitude", "--intermediate-size", "96"],
        ["gist", "--tokens", "2"],
        ["trim", "--data", "{text}"],
        ["merge", "{model}"],
        ["quantize", "--bits", "8"],
        ["finetune", "--data", "{text}", "--max-steps", "1"],
        ["diagnose", "--data", "{text}", "--sequence-length", "32"],
    ],
    ids=lambda words: " ".join(words[:1]),
)
def test_what_is_quantized_is_refused_by_the_other_verbs_with_one_sentence(words, made, run, tmp_path):
    text = talkers.written(tmp_path / "text.txt", talkers.TEXT * 4)
    command, *rest = (word.format(text=text, model=made(8)[0]) for word in words)

    place = [] if command == "diagnose" else ["-o", tmp_path / "out"]
    done = run(command, made(8)[0], *rest, *place)

    assert done.code == 1, done.out
    sentence, hint = done.err.strip().splitlines()[-2:]
    assert sentence.startswith("error: ")
    assert "quantized" in sentence
    assert hint.startswith("hint: ")
    assert not (tmp_path / "out").exists()


# --- what it costs ------------------------------------------------------------------------------------------------


@needs_libraries
def test_json_holds_the_perplexity_before_and_after_and_nothing_else_is_on_standard_output(even, run, tmp_path):
    text = talkers.written(tmp_path / "text.txt", talkers.TEXT * 8)

    words = ["--data", text, "--samples", 4, "--sequence-length", 32]
    done = run("quantize", even, "--bits", 4, *words, "-o", tmp_path / "made", "--json")

    assert done.code == 0, done.err
    found = json.loads(done.out)
    worth, files = found["perplexity"], found["file_bytes"]
    plain = surgeon.evaluate(even, data=[text], samples=4, sequence_length=32).scored.figures["perplexity"]
    assert worth["before"] == pytest.approx(plain.value, rel=1e-5)  # batches of another size round otherwise
    assert worth["errors"]["before"] == pytest.approx(plain.error, rel=1e-3)
    assert worth["after"] != worth["before"]
    assert found["kl"]["value"] > 0
    assert files["after"] == (tmp_path / "made/model.safetensors").stat().st_size < 0.5 * files["before"]
    assert (found["bits"], found["method"], found["group_size"]) == (4, COMPRESSED, 32)
    assert found["verification"]["verdict"] == "exact"
    judged = surgeon.evaluate(tmp_path / "made", data=[text], baseline=even, samples=4, sequence_length=32)
    assert judged.scored.figures["perplexity"].value == pytest.approx(worth["after"], rel=1e-5)


@needs_libraries
@pytest.mark.parametrize("bits", [8, 4])
def test_the_weights_that_are_measured_are_those_that_are_run(bits, made, even, tmp_path):
    """The loss of the streamed weights is that of the model as transformers loads it, in float32."""
    text = talkers.written(tmp_path / "text.txt", talkers.TEXT * 8)
    path = made(bits)[0]

    streamed = surgeon.evaluate(path, data=[text], samples=2, sequence_length=32).scored.figures["loss"].value

    from surgeon.data.rows import read_rows
    from surgeon.models.loading import load_tokenizer

    rows = read_rows([text], load_tokenizer(str(path)), samples=2, sequence_length=32).tokens
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        whole = float(model(rows, labels=rows).loss)
    # compressed-tensors makes weights in the dtype of its scales, bfloat16, and those of a model loaded in float32 in
    # float32: they differ by that rounding, 2^-9 of each weight.
    assert streamed == pytest.approx(whole, rel=1e-5 if bits == 8 else 2e-3)


@needs_libraries
def test_a_text_that_cannot_be_measured_is_refused_before_anything_is_written(even, run, tmp_path):
    text = talkers.written(tmp_path / "text.txt", talkers.TEXT * 8)

    done = run("quantize", even, "--data", text, "--sequence-length", 100, "-o", tmp_path / "made")

    assert done.code == 1
    assert "rows have 100 tokens, more than the 64 positions of" in done.err
    assert not (tmp_path / "made").exists()


def test_a_dry_run_reads_headers_only_and_needs_no_library(even, run, monkeypatch):
    monkeypatch.setattr(schemes, "version_of", lambda method: None)

    done = run("quantize", even, "--bits", 8, "--dry-run")

    assert done.code == 0, done.err
    assert "8 bits, a scale for each row" in done.out
    assert "(not written)" in done.out


def test_without_the_library_nothing_is_written(even, run, monkeypatch, tmp_path):
    monkeypatch.setattr(schemes, "version_of", lambda method: None)

    done = run("quantize", even, "--bits", 4, "-o", tmp_path / "made")

    assert done.code == 1
    assert "compressed-tensors is not installed" in done.err
    assert "hint: pip install 'surgeon[quantize]'" in done.err
    assert not list(tmp_path.iterdir())


# --- the forms, without a library ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [INT8, *(Scheme(COMPRESSED, bits, size) for bits in (8, 4) for size in GROUPS)])
def test_a_config_says_which_scheme_it_is_of(scheme):
    config = {"quantization_config": scheme.config(["lm_head"]) | {"version": "0.20.1"}}

    assert scheme_of(config, "it") == scheme


def test_a_config_of_another_form_is_refused():
    with pytest.raises(PlanError, match="it is quantized .gptq. in a form that surgeon does not read"):
        scheme_of({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "it")


def test_the_parts_of_a_weight_hold_its_bits():
    weight = TensorSpec("BF16", (96, 160))

    sizes = {part: INT4.spec(part, weight).nbytes for part in INT4.parts.values()}

    assert sizes == {"codes": 96 * 160 // 2, "scale": 96 * 5 * 2, "shape": 16}
    assert sum(INT8.spec(part, weight).nbytes for part in INT8.parts.values()) == 96 * 160 + 96 * 5


def test_linear_modules_outside_of_the_layers_stay_and_the_config_names_them(toy):
    plan = plan_quantize(open_model(toy("bert")).anatomy, Scheme(COMPRESSED, 8, 4))

    assert {"lm_head", "cls.predictions.decoder"} <= set(plan.config["quantization_config"]["ignore"])
    assert not any(name.startswith("cls.") and name.endswith("packed") for name in plan.tensors)
