"""`surgeon init`: a new model has the config that was asked for, and weights as transformers draws them."""

import json
import re

import encoders
import pytest
import tabled
import toys
from later import LATER

import surgeon
from surgeon.anatomy.families import FAMILIES
from surgeon.errors import PlanError
from surgeon.options import OptionError

if LATER:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SMALL = ["n_layer=3", "n_embd=48", "n_head=4", "n_positions=64"]
OTHER = "bart"  # its toy has an encoder and a decoder of different sizes, for which there is one table
STD = 0.37  # of fresh weights: far from anything that could be left by accident
SOME = ("gpt2", "llama", "llama-tied", "gemma", "qwen3_moe", "mixtral", "phi3", "bloom", "opt", "t5", "bert", "mpt")


def weights(directory):
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("name", SOME)
def test_weights_are_drawn_as_transformers_draws_them_for_the_same_config(name, tmp_path):
    """Constants must be equal; of drawn tensors mean and deviation agree to six standard errors of either draw."""
    build = toys.build if name in toys.TOYS else tabled.build64
    key = FAMILIES[re.split("-", name)[0]].init_std
    source = build(name, tmp_path / "toy", **{key: STD})
    config = AutoConfig.from_pretrained(source)
    config.pad_token_id = None  # transformers zeroes the row of the padding token; surgeon draws it as any other
    toys.auto_class(config).from_config(config).save_pretrained(tmp_path / "theirs")

    surgeon.init(source / "config.json").save(tmp_path / "ours")

    expected, drawn = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert expected.keys() == drawn.keys()
    for tensor, value in expected.items():
        assert drawn[tensor].shape == value.shape, tensor
        if (value == value.flatten()[0]).all():
            assert drawn[tensor].float().equal(value.float()), tensor
        else:
            error = 6 * value.std() / (2 * value.numel()) ** 0.5
            assert abs(drawn[tensor].std() - value.std()) < 2 * error, tensor
            assert abs(drawn[tensor].mean()) < 6 * value.std() / value.numel() ** 0.5, tensor


def test_gpt2s_residual_projections_are_smaller_by_the_depth(tmp_path):
    surgeon.init("gpt2", set=["n_layer=9", "n_embd=64", "n_head=4"], tokenizer="bytes").save(tmp_path / "new")

    drawn = weights(tmp_path / "new")
    inner, outer = (drawn[f"transformer.h.4.mlp.{name}.weight"] for name in ("c_fc", "c_proj"))
    # of 16384 numbers the standard deviation has a standard error of 0.55 %
    assert inner.std() == pytest.approx(0.02, rel=0.03)
    assert outer.std() == pytest.approx(0.02 / 18**0.5, rel=0.03)


@pytest.mark.parametrize("name", [name for name in toys.TOYS if name.partition("-")[0] in FAMILIES and name != OTHER])
def test_a_new_model_of_every_family_loads_whole(name, toy, tmp_path):
    surgeon.init(toy(name)).save(tmp_path / "new")

    model, report = toys.load(tmp_path / "new")
    assert not any(report.values()), report
    assert torch.isfinite(toys.logits(model)).all()
    assert weights(tmp_path / "new").keys() == weights(toy(name)).keys()


def test_a_type_has_transformers_own_sizes_but_those_that_are_set(tmp_path):
    surgeon.init("llama", set=["num_hidden_layers=2", "hidden_size=64", "intermediate_size=80", "vocab_size=99"]).save(
        tmp_path / "new"
    )

    config = AutoConfig.from_pretrained(tmp_path / "new")
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (2, 64, 99)
    assert config.num_attention_heads == AutoConfig.for_model("llama").num_attention_heads
    assert config.architectures == ["LlamaForCausalLM"]
    assert not any(toys.load(tmp_path / "new")[1].values())


def test_the_same_seed_gives_the_same_bytes_and_another_others(tmp_path):
    for out, seed in (("one", 3), ("two", 3), ("three", 4)):
        surgeon.init("gpt2", set=SMALL, tokenizer="bytes", seed=seed).save(tmp_path / out)

    one, two, three = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_the_tokenizer_of_bytes_gives_back_every_text_byte_for_byte(tmp_path):
    surgeon.init("gpt2", set=SMALL, tokenizer="bytes").save(tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    text = "Grüße,\n\tđ 🙂  two spaces \x00\x7f\xa0\xad\u2028 don't <|end|>\r\n"

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer("")["input_ids"] == []
    assert tokenizer("<|endoftext|>")["input_ids"] == [256]
    config = AutoConfig.from_pretrained(tmp_path / "new")
    assert len(tokenizer) == config.vocab_size == 257
    assert config.eos_token_id == config.bos_token_id == config.pad_token_id == tokenizer.eos_token_id == 256


def test_a_directorys_tokenizer_decides_the_vocabulary(tmp_path):
    surgeon.init("gpt2", set=SMALL, tokenizer="bytes").save(tmp_path / "first")
    (tmp_path / "first/other.txt").write_text("no file of a tokenizer")

    surgeon.init("llama", set=["hidden_size=64"], tokenizer=tmp_path / "first").save(tmp_path / "new")
    wide = surgeon.init("llama", set=["hidden_size=64", "vocab_size=320"], tokenizer=tmp_path / "first")

    config = json.loads((tmp_path / "new/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (257, 256)
    assert wide.anatomy.sizes["vocab"] == 320
    assert not (tmp_path / "new/other.txt").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    with pytest.raises(OptionError, match="a vocabulary of 99 is too small: the tokenizer has 257 tokens"):
        surgeon.init("llama", set=["vocab_size=99"], tokenizer=tmp_path / "first")


def test_a_checkpoints_own_files_go_with_its_config(toy, tmp_path):
    source = toys.build("llama", tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("# what the trained weights can do")

    surgeon.init(source).save(tmp_path / "new", command="surgeon init source")

    assert (tmp_path / "new/chat_template.jinja").read_text() == "{{ messages }}"
    card = (tmp_path / "new/README.md").read_text()
    assert "base_model" not in card  # there is none: nothing of its weights is in the result
    assert "nothing is trained" in card
    assert "trained weights can do" not in card


def test_the_weights_of_the_source_are_neither_read_nor_needed(tmp_path):
    source = toys.build("llama", tmp_path / "source")
    (source / "model.safetensors").unlink()

    assert surgeon.init(source).save(tmp_path / "new").bytes_read == 0


def test_special_tokens_beyond_the_vocabulary_are_null_and_said_so():
    surgery = surgeon.init("gpt2", set=["vocab_size=300"])

    assert surgery.plan.config["eos_token_id"] is None
    assert any("eos_token_id is null: 50256 is beyond the 300 tokens" in note for note in surgery.plan.notes)


def test_a_result_is_stored_in_the_dtype_that_is_asked_for(tmp_path):
    surgeon.init("gpt2", set=SMALL, tokenizer="bytes").save(tmp_path / "new", dtype="bfloat16")

    assert {value.dtype for value in weights(tmp_path / "new").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").dtype == torch.bfloat16


def test_the_command_prints_what_every_writing_command_prints_and_the_receipt_says_how(tmp_path, run):
    sets = [word for value in SMALL for word in ("--set", value)]
    arguments = ["init", "gpt2", *sets, "--tokenizer", "bytes", "-o", tmp_path / "new", "--json"]

    planned, done = run(*arguments, "--dry-run"), run(*arguments)

    summary = json.loads(done.out)
    assert summary.pop("timings").keys() == {"writing", "other"}
    assert {**json.loads(planned.out), "seconds": 0} == {**summary, "seconds": 0}
    assert summary["layer_map"] == [None] * 3
    assert summary["bytes_read"] == 0
    assert summary["parameters"]["after"] == sum(value.numel() for value in weights(tmp_path / "new").values())
    receipt = json.loads((tmp_path / "new/surgeon.json").read_text())
    step = {"config": "gpt2", "set": SMALL, "seed": 0, "tokenizer": "bytes"}
    assert receipt["steps"] == [{"init": step}]


def test_a_new_model_can_be_trained_and_a_chain_can_begin_with_one(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be, that is the question\n" * 40)
    surgeon.init("gpt2", set=SMALL, tokenizer="bytes").save(tmp_path / "new")
    surgeon.truncate(surgeon.init("gpt2", set=SMALL, tokenizer="bytes"), layers=2).save(tmp_path / "cut")

    trained = surgeon.finetune(
        tmp_path / "new", data=[str(text)], output=tmp_path / "out", max_steps=12, batch_size=4, sequence_length=32,
        lr="3e-3", device="cpu", eval_fraction=0.0,
    )  # fmt: skip

    assert trained.train_loss < 5.0  # of 257 equal tokens it is 5.55
    whole, cut = weights(tmp_path / "new"), weights(tmp_path / "cut")
    assert all(cut[name].equal(whole[name]) for name in cut)


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ("gpt2", {"set": ["n_layers=2"]}, "the config has no 'n_layers' that can be set; did you mean n_layer?"),
        ("gpt2", {"set": ["model_type=llama"]}, "the config has no 'model_type' that can be set"),
        ("gpt2", {"set": ["n_layer=two words"]}, "neither JSON nor one word"),
        ("gpt2", {"set": ["tie_word_embeddings=False"]}, "tie_word_embeddings=False is no JSON"),
        ("gpt2", {"set": ["n_layer"]}, "is no key and value"),
        ("gpt2", {"set": ["n_layer=1", "n_layer=2"]}, "n_layer is set twice"),
        ("gpt2", {"set": ["n_layer=two"]}, "expected int, got str"),
        ("gpt2", {"set": ["n_layer=0"]}, "n_layer = 0; a model has at least one layer"),
        ("gpt2", {"set": ["n_embd=97"]}, "must be divisible by num_heads"),
        ("gpt2", {"set": ["eos_token_id=400", "vocab_size=300"]}, "beyond a vocabulary of 300"),
        ("gpt2", {"tokenizer": "nowhere"}, "no such directory: nowhere"),
        ("gpt2", {"revision": "main"}, "is a model type, and has no revision"),
        ("gpt2", {"seed": -1}, "--seed is -1"),
        ("gpt3", {}, "no model type with a table"),
        ("bamba", {}, "how a new bamba draws its weights is not known"),
        ("modernbert", {}, "how a new modernbert draws its weights is not known"),
    ],
)
def test_what_cannot_be_is_refused(config, options, said):
    with pytest.raises(surgeon.SurgeonError, match=re.escape(said)):
        surgeon.init(config, **options)


def test_a_family_that_draws_in_a_way_of_its_own_is_refused_from_its_config_too(tmp_path):
    encoders.build64("modernbert", tmp_path / "source")

    with pytest.raises(PlanError, match="how a new modernbert draws its weights is not known"):
        surgeon.init(tmp_path / "source")


def test_what_the_table_of_a_type_does_not_fit_is_refused(toy):
    with pytest.raises(PlanError, match="'bart' has no table of its tensors"):
        surgeon.init(toy(OTHER))


def test_an_output_that_the_config_lies_in_is_refused(tmp_path, run):
    source = toys.build("llama", tmp_path / "source")

    for named in (source, source / "config.json"):
        outcome = run("init", named, "-o", source, "--overwrite")
        assert outcome.code == 1
        assert "model.safetensors" in {path.name for path in source.iterdir()}
