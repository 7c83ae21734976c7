"""Rows for new tokens by plan, and what the files beside the weights say of them."""

import json
import shutil
from dataclasses import replace

import handmade
import pytest
import talkers
import toys
from later import LATER
from tokenizers import Tokenizer, models

import surgeon
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import LocalSource, spec_of
from surgeon.checkpoint.tokenizer_files import add_to_tokenizer, suppress
from surgeon.errors import CheckpointError, PlanError
from surgeon.gist.tokens import GistTokens, read_gist
from surgeon.transforms.vocabulary import add_tokens, vocabulary_dims

if LATER:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Tokenizer

KNOWN = 290  # tokens of the tokenizer of a talker


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """Return a function from a toy's name to its checkpoint with a tokenizer, with as many rows as that has tokens."""
    directory = tmp_path_factory.mktemp("talkers")

    def build(name, vocabulary=KNOWN, dtype="float32"):
        path = directory / f"{name}-{vocabulary}-{dtype}"
        if not path.exists():
            toys.build(name, path, vocab_size=vocabulary, dtype=dtype)
            talkers.tokenizer_of(chat_template=talkers.TEMPLATE).save_pretrained(path)
        return path

    return build


def weights(path):
    return load_file(path / "model.safetensors")


def tensor_bytes(path):
    """Return the bytes of each tensor: how far a header is padded depends on where the source's tensors lie."""
    source = LocalSource(path, str(path))
    content = (path / "model.safetensors").read_bytes()
    return {name: (item.spec, content[item.start : item.end]) for name, item in source.tensors.items()}


def config_of(path):
    return json.loads((path / "config.json").read_text())


# Tied, untied, with a bias of the head (phi, phimoe, gptj), with another layout of the head (gpt_neox), with an
# embedding of another width (opt-post-norm), without a table (phi, gptj, t5), of an encoder-decoder (t5).
@pytest.mark.parametrize(
    "name",
    ["llama", "llama-tied", "gpt2", "gpt_neox", "opt-post-norm", "gemma3_text", "phi", "phimoe", "gptj", "mixtral",
     "t5", "t5-gated"],
)  # fmt: skip
def test_a_model_with_a_gist_token_loads_whole_and_knows_what_it_knew(name, talker, tmp_path):
    surgeon.add_gist(talker(name), tokens=2).save(tmp_path / "gist")

    before, _ = toys.load(talker(name))
    after, report = toys.load(tmp_path / "gist")
    assert not any(report.values())
    assert after.get_input_embeddings().weight.shape[0] == after.config.vocab_size == KNOWN + 1
    old, new = toys.logits(before), toys.logits(after)
    assert new.shape[-1] == KNOWN + 1
    # A matrix with one row more may be multiplied in other blocks: float32 rounding of logits of order 1.
    torch.testing.assert_close(new[..., :-1], old, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi", "gptj"])
def test_a_new_row_is_the_mean_of_all_rows_and_old_rows_are_the_same_bytes(name, talker, tmp_path):
    surgeon.add_gist(talker(name)).save(tmp_path / "gist")

    before, after = weights(talker(name)), weights(tmp_path / "gist")
    longer = {key for key in after if after[key].shape != before[key].shape}
    assert len(longer) == (2 if name == "llama" else 3)  # embedding, head, and where there is one the head's bias
    for key in after:
        if key in longer:
            assert torch.equal(after[key][:-1], before[key])
            assert torch.equal(after[key][-1], before[key].double().mean(0).float()), key
        else:
            assert torch.equal(after[key], before[key])


def test_the_mean_is_taken_in_float32_and_stored_as_the_rows_are(talker, tmp_path):
    surgeon.add_gist(talker("llama", dtype="bfloat16")).save(tmp_path / "gist")

    before, after = weights(talker("llama", dtype="bfloat16")), weights(tmp_path / "gist")
    rows = before["model.embed_tokens.weight"]
    assert torch.equal(after["model.embed_tokens.weight"][-1], rows.double().mean(0).to(torch.bfloat16))
    assert not torch.equal(after["model.embed_tokens.weight"][-1], rows.sum(0) / len(rows))  # what bfloat16 would make


def test_the_logit_of_a_new_token_is_the_mean_of_all_logits(talker, tmp_path):
    surgeon.add_gist(talker("phi")).save(tmp_path / "gist")

    logits = toys.logits(toys.load(tmp_path / "gist")[0])

    torch.testing.assert_close(logits[..., -1], logits[..., :-1].mean(-1), rtol=0, atol=1e-5)  # float32 rounding


def test_distinct_tokens_have_a_row_each(talker, tmp_path):
    surgeon.add_gist(talker("llama"), tokens=3, distinct=True).save(tmp_path / "gist")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gist")
    gist = read_gist(config_of(tmp_path / "gist"))
    assert gist == GistTokens((290, 291, 292), 3, distinct=True)
    assert gist.text() == "<GIST_0><GIST_1><GIST_2>"
    assert tokenizer(gist.text(2), add_special_tokens=False)["input_ids"] == gist.ids_of(2) == [290, 291]
    assert len(weights(tmp_path / "gist")["model.embed_tokens.weight"]) == 293
    with pytest.raises(PlanError, match="a gist cannot have 4 tokens"):
        gist.ids_of(4)


def test_a_padded_vocabulary_gives_the_token_a_row_that_no_token_had(talker, tmp_path):
    surgery = surgeon.add_gist(talker("llama", 300))
    surgery.save(tmp_path / "gist")

    before, after = weights(talker("llama", 300)), weights(tmp_path / "gist")
    config = config_of(tmp_path / "gist")
    assert config["vocab_size"] == 300
    assert config["gist"]["token_ids"] == [KNOWN]
    assert "1 of the new tokens took rows that no token had" in surgery.plan.notes[0]
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        others = [i for i in range(300) if i != KNOWN]
        assert torch.equal(after[key][others], before[key][others])
        assert torch.equal(after[key][KNOWN], before[key].double().mean(0).float())


def test_tokens_beyond_the_padding_are_appended(talker, tmp_path):
    surgery = surgeon.add_gist(talker("llama", 292), tokens=3, distinct=True)

    assert surgery.spec.config["vocab_size"] == 293
    assert surgery.plan.axes["vocab"] == (*range(290), -1, -1, -1)


# --- with other surgeries in one pass ---------------------------------------------------------------------------


def cut(model):
    return surgeon.truncate(model, layers=2)


def widen(model):
    return surgeon.grow(model, hidden_size=96)


def deepen(model):
    return surgeon.grow(model, layers=8)


def narrow(model):
    return surgeon.prune(model, score="last", layers=4, evaluate=False)


def gist(model):
    return surgeon.add_gist(model, tokens=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "chain",
    [(gist, cut), (cut, gist), (gist, widen), (widen, gist), (narrow, gist), (gist, narrow), (cut, gist, deepen)],
    ids=lambda chain: "-".join(step.__name__ for step in chain),
)
def test_fused_with_other_surgeries_the_bytes_are_those_of_the_steps(chain, dtype, talker, tmp_path):
    fused = stepped = talker("llama", dtype=dtype)
    for number, step in enumerate(chain):
        fused = step(fused)
        step(stepped).save(tmp_path / f"step{number}")
        stepped = tmp_path / f"step{number}"
    fused.save(tmp_path / "fused")

    assert tensor_bytes(tmp_path / "fused") == tensor_bytes(stepped)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "fused" / file).read_bytes() == (stepped / file).read_bytes(), file
    assert config_of(tmp_path / "fused") == config_of(stepped)
    assert config_of(stepped)["gist"]["token_ids"] == [KNOWN]


def test_a_donor_does_not_lose_the_edited_tokenizer(talker, tmp_path):
    surgeon.add_gist(talker("llama")).save(tmp_path / "donor")
    shorter = surgeon.truncate(talker("llama"), layers=3)

    surgeon.grow(surgeon.add_gist(shorter), layers=5, donor=tmp_path / "donor").save(tmp_path / "grown")

    assert AutoTokenizer.from_pretrained(tmp_path / "grown").convert_tokens_to_ids("<GIST>") == KNOWN


def test_the_receipt_says_what_was_asked_and_which_row_is_new(talker, tmp_path):
    surgeon.add_gist(talker("llama"), tokens=4).save(tmp_path / "gist")

    receipt = json.loads((tmp_path / "gist/surgeon.json").read_text())
    assert receipt["steps"] == [{"gist": {"tokens": 4, "distinct": False, "token_ids": [KNOWN]}}]
    assert receipt["axis_maps"] == {"vocab": [[0, KNOWN], [-1, 1]]}
    assert config_of(tmp_path / "gist")["gist"] == {
        "version": 1, "token": "<GIST>", "token_ids": [KNOWN], "num_tokens": 4
    }  # fmt: skip


# --- tokenizers -------------------------------------------------------------------------------------------------


def test_the_token_is_one_id_wherever_it_stands_and_decoding_skips_it(talker, tmp_path):
    surgeon.add_gist(talker("llama"), tokens=3).save(tmp_path / "gist")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gist")
    plain = AutoTokenizer.from_pretrained(talker("llama"))

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert len(tokenizer) == KNOWN + 1
    assert ids("<GIST><GIST><GIST>") == [KNOWN] * 3
    before, behind = (plain(text, add_special_tokens=False)["input_ids"] for text in ("The cat\n", " sat"))
    assert ids("The cat\n<GIST><GIST> sat") == [*before, KNOWN, KNOWN, *behind]
    assert len(ids("<GIST> <GIST>")) == 3  # with a space they are apart: gists are joined without
    assert tokenizer.decode(ids("The cat<GIST><GIST> sat"), skip_special_tokens=True) == "The cat sat"
    assert tokenizer.chat_template == plain.chat_template


def test_what_transformers_saves_of_the_tokenizer_has_the_token_still(talker, tmp_path):
    surgeon.add_gist(talker("llama")).save(tmp_path / "gist")

    AutoTokenizer.from_pretrained(tmp_path / "gist").save_pretrained(tmp_path / "again")

    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.convert_tokens_to_ids("<GIST>") == KNOWN
    assert again.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "gist").get_vocab()
    assert "<GIST>" in again.all_special_tokens


def test_the_tokenizer_of_t5_takes_the_token_after_its_sentinels(tmp_path):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("b", -3.0)]
    toys.build("t5", tmp_path / "t5", vocab_size=24)
    T5Tokenizer(vocab=pieces, extra_ids=10).save_pretrained(tmp_path / "t5")

    surgeon.add_gist(tmp_path / "t5", tokens=2).save(tmp_path / "gist")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gist")
    assert read_gist(config_of(tmp_path / "gist")).ids == (16,)
    assert tokenizer("a<GIST><GIST>b", add_special_tokens=False)["input_ids"].count(16) == 2
    sentinels = [f"<extra_id_{i}>" for i in range(10)]
    plain = AutoTokenizer.from_pretrained(tmp_path / "t5")
    assert tokenizer.convert_tokens_to_ids(sentinels) == plain.convert_tokens_to_ids(sentinels)
    assert len(set(plain.convert_tokens_to_ids(sentinels)) - set(range(6))) == 10
    assert not any(toys.load(tmp_path / "gist")[1].values())


def files_of(directory):
    return lambda name: (directory / name).read_bytes() if (directory / name).exists() else None


def unigram():
    return Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))


def wordlevel():
    return Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))


def wordpiece():
    return Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))


@pytest.mark.parametrize("make", [unigram, wordlevel, wordpiece])
@pytest.mark.parametrize("added", [[], ["<x>"], ["<x>", "<y>"]])
def test_the_id_is_the_one_that_the_tokenizers_library_gives(make, added, tmp_path):
    tokenizer = make()
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    ids, edited = add_to_tokenizer(files_of(tmp_path), ["<GIST_0>", "<GIST_1>"])

    tokenizer.add_special_tokens(["<GIST_0>", "<GIST_1>"])
    assert ids == [tokenizer.token_to_id("<GIST_0>"), tokenizer.token_to_id("<GIST_1>")]
    assert json.loads(edited["tokenizer.json"]) == json.loads(tokenizer.to_str())


def old_files(directory, tokenizer):
    """Write a tokenizer as transformers 4 does, with the files that 5 writes no more."""
    tokenizer.save_pretrained(directory)
    special = {"eos_token": "<end>", "additional_special_tokens": ["<s>"]}
    old = {"content": "<pad>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
           "special": True}  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"0": old}, **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    (directory / "added_tokens.json").write_text(json.dumps({"<pad>": 0}))


def test_files_of_older_transformers_are_edited_too(tmp_path):
    old_files(tmp_path, talkers.tokenizer_of())

    _, edited = add_to_tokenizer(files_of(tmp_path), ["<GIST>"])

    config = json.loads(edited["tokenizer_config.json"])
    assert config["added_tokens_decoder"]["290"]["content"] == "<GIST>"
    assert config["additional_special_tokens"] == ["<s>", "<GIST>"]
    assert json.loads(edited["special_tokens_map.json"])["additional_special_tokens"] == ["<s>", "<GIST>"]
    assert json.loads(edited["added_tokens.json"]) == {"<pad>": 0, "<GIST>": 290}
    for name, content in edited.items():
        (tmp_path / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("<GIST>", add_special_tokens=False)["input_ids"] == [290]
    assert {"<s>", "<GIST>"} <= set(tokenizer.all_special_tokens)


@pytest.mark.parametrize("extra", [["<s>"], {"image_token": "<s>"}])
def test_special_tokens_are_listed_in_the_words_of_the_file(extra, tmp_path):
    talkers.tokenizer_of().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra_special_tokens": extra}))

    for name, content in add_to_tokenizer(files_of(tmp_path), ["<GIST>"])[1].items():
        (tmp_path / name).write_bytes(content)

    assert {"<s>", "<GIST>"} <= set(AutoTokenizer.from_pretrained(tmp_path).all_special_tokens)


def test_the_model_generates_no_gist_token(talker, tmp_path):
    source = shutil.copytree(talker("llama"), tmp_path / "source")
    surgeon.add_gist(source).save(tmp_path / "gist")
    model, _ = toys.load(tmp_path / "gist")
    with torch.no_grad():  # a head that says nothing else
        model.lm_head.weight[KNOWN] = 100 * model.lm_head.weight.mean(0) + 100
        model.lm_head.weight[:KNOWN] *= 1e-3
    start = torch.full((1, 3), 7)

    def wants_gist(suppressed):
        found = model.generate(start, max_new_tokens=12, do_sample=True, suppress_tokens=suppressed, pad_token_id=0)
        return KNOWN in found[0]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert wants_gist([])
        assert not wants_gist(model.generation_config.suppress_tokens)
    assert model.generation_config.suppress_tokens == [KNOWN]


def test_a_generation_config_keeps_what_it_says_and_a_new_one_says_what_the_config_did(tmp_path):
    (tmp_path / "generation_config.json").write_text(
        '{"_from_model_config": true, "eos_token_id": [2, 7], "suppress_tokens": [5]}'
    )

    kept = json.loads(suppress(files_of(tmp_path), [9], {"eos_token_id": 2})["generation_config.json"])
    new = json.loads(suppress(lambda name: None, [9], {"eos_token_id": 2, "hidden_size": 4})["generation_config.json"])

    assert kept == {"eos_token_id": [2, 7], "suppress_tokens": [5, 9]}
    assert new == {"eos_token_id": 2, "suppress_tokens": [9]}


# --- refusals ---------------------------------------------------------------------------------------------------


def test_a_model_with_gist_tokens_gets_no_others(talker, tmp_path):
    once = surgeon.add_gist(talker("llama"))
    once.save(tmp_path / "gist")

    for model in (once, tmp_path / "gist"):
        with pytest.raises(PlanError, match="has gist tokens already: <GIST>"):
            surgeon.add_gist(model, tokens=2)


def test_a_tokenizer_that_has_the_token_is_refused(talker, tmp_path):
    source = shutil.copytree(talker("llama", 300), tmp_path / "source")
    for name, content in add_to_tokenizer(files_of(source), ["<GIST>"])[1].items():
        (source / name).write_bytes(content)

    with pytest.raises(PlanError, match="the tokenizer has a token <GIST> already"):
        surgeon.add_gist(source)


def test_a_model_without_tokenizer_json_is_refused_with_what_to_type(toy):
    with pytest.raises(PlanError, match=r"the model has no tokenizer\.json") as caught:
        surgeon.add_gist(toy("llama"))

    assert "save_pretrained" in caught.value.hint


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(talker):
    with pytest.raises(PlanError, match="the tokenizer has 290 tokens, the model rows for 131"):
        surgeon.add_gist(talker("llama", 131))


def test_a_number_of_tokens_that_is_none_is_refused(talker):
    with pytest.raises(PlanError, match="a gist cannot have 0 tokens"):
        surgeon.add_gist(talker("llama"), tokens=0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff", "is not JSON"),
        (b"[]", "holds a list"),
        (b"{}", "has no vocabulary"),
        (b'{"model": {"vocab": {"a": "b"}}}', "without a text or a number"),
        (b'{"model": {"vocab": {"a": 0}}, "added_tokens": [3]}', "no list of tokens"),
        (b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b"}]}', "without a text or a number"),
        (b'{"model": {"vocab": {"a\\ud800": 0}}}', "half of a character"),
    ],
)
def test_a_damaged_tokenizer_is_one_clear_error(content, said):
    with pytest.raises(CheckpointError, match=said):
        add_to_tokenizer({"tokenizer.json": content}.get, ["<GIST>"])


def test_ids_with_gaps_are_refused():
    content = b'{"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": []}'

    with pytest.raises(PlanError, match="would number a new token 2, but has ids up to 7"):
        add_to_tokenizer({"tokenizer.json": content}.get, ["<GIST>"])


@pytest.mark.parametrize(
    "names",
    [
        {"pad_token": "<new>"},
        {"pad_token": {"__type": "AddedToken", "content": "<new>"}},
        {"additional_special_tokens": ["<s>", "<new>"]},
        {"extra_special_tokens": ["<new>"]},
        {"extra_special_tokens": {"image_token": "<new>"}},
        {"added_tokens_decoder": {"290": {"content": "<new>"}}},
    ],
)
def test_a_token_that_only_loading_adds_would_lose_its_id_and_is_refused(names, tmp_path):
    talkers.tokenizer_of().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **names}))
    if "added_tokens_decoder" not in names:  # transformers 5 reads that one only where there is no tokenizer.json
        assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("<new>") == KNOWN

    with pytest.raises(PlanError, match=r"names a token '<new>' that tokenizer\.json does not have"):
        add_to_tokenizer(files_of(tmp_path), ["<GIST>"])


@pytest.mark.parametrize(
    ("name", "vocabulary", "tensor"),
    [("gpt_neo", 64, "transformer.wpe.weight"), ("phi", 80, "lm_head.weight")],  # as many as positions, as channels
)
def test_shapes_that_do_not_tell_the_vocabulary_are_refused(name, vocabulary, tensor, tmp_path):
    toys.build(name, tmp_path / name, vocab_size=vocabulary)
    anatomy = replace(read_anatomy(spec_of(LocalSource(tmp_path / name, name))), family=None, rows={})

    with pytest.raises(PlanError, match=f"{tensor}.* it is not known which dimension counts tokens"):
        add_tokens(anatomy, [vocabulary])


def test_a_table_tells_the_vocabulary_where_shapes_do_not(tmp_path):
    handmade.checkpoint(tmp_path / "llama", tensors=handmade.llama(vocab=8), vocab_size=8)  # as many as hidden
    anatomy = read_anatomy(spec_of(LocalSource(tmp_path / "llama", "llama")))

    assert vocabulary_dims(anatomy) == {"model.embed_tokens.weight": 0, "lm_head.weight": 0}


@pytest.mark.parametrize(
    "block",
    [{"version": 2}, 5, {"version": 1}, {"version": 1, "token_ids": [1, 2], "num_tokens": 2},
     {"version": 1, "tokens": ["a"], "token_ids": [1, 2], "num_tokens": 1},
     {"version": 1, "token_ids": [-1], "num_tokens": 1}, {"version": 1, "token_ids": [1], "num_tokens": 0}],
)  # fmt: skip
def test_a_gist_block_that_makes_no_sense_is_refused(block):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_gist({"gist": block})


def test_a_config_without_a_gist_block_has_no_gist_tokens():
    assert read_gist({"model_type": "llama"}) is None


def test_a_fast_tokenizer_of_one_file_is_enough(tmp_path):
    toys.build("llama", tmp_path / "llama", vocab_size=KNOWN)
    tokenizer: PreTrainedTokenizerFast = talkers.tokenizer_of()
    tokenizer.backend_tokenizer.save(str(tmp_path / "llama/tokenizer.json"))

    surgeon.add_gist(tmp_path / "llama").save(tmp_path / "gist")

    assert AutoTokenizer.from_pretrained(tmp_path / "gist").convert_tokens_to_ids("<GIST>") == KNOWN
    assert not (tmp_path / "gist/tokenizer_config.json").exists()
