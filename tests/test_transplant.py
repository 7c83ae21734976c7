"""Another tokenizer for a model: which rows move, which are computed, and what follows."""

import json
import random
import shutil
from pathlib import Path

import pytest
import talkers
import toys
from later import LATER
from recipe_runs import run as run_recipe
from recipe_runs import write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import surgeon
from surgeon.checkpoint.matching import Vocabulary, match
from surgeon.checkpoint.token_bytes import token_bytes
from surgeon.errors import CheckpointError, PlanError
from surgeon.options import OptionError

if LATER:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

OTHER_TEXT = "A dog ran after that rat — über Straßen; 42 zebras watched.\n" * 8 + talkers.TEXT
TEXT = "The rat ran after the cat.\n"


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """Return a function from a toy's name, its tokenizer and sizes to a checkpoint with a row for each token."""
    directory = tmp_path_factory.mktemp("talkers")

    def build(name="llama", kind="bytes", **sizes):
        path = directory / "-".join(map(str, (name, kind, *sizes.items())))
        if not path.exists():
            tokenizer = TOKENIZERS[kind]()
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            toys.build(name, path, **({"vocab_size": len(tokenizer)} | ids | sizes))
            tokenizer.save_pretrained(path)
        return path

    return build


def shuffled() -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a talker with its ids in another order."""
    content = json.loads(talkers.tokenizer_of().backend_tokenizer.to_str())
    ids = list(content["model"]["vocab"].values())
    random.Random(1).shuffle(ids)
    new = dict(zip(sorted(ids), ids, strict=True))
    content["model"]["vocab"] = {token: new[i] for token, i in content["model"]["vocab"].items()}
    for item in content["added_tokens"]:
        item["id"] = new[item["id"]]
    for entry in content["post_processor"]["special_tokens"].values():
        entry["ids"] = [new[i] for i in entry["ids"]]
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **names)


def larger() -> "PreTrainedTokenizerFast":
    """Return a byte-level tokenizer of another text, with other special tokens in other places."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eot>", "<turn>", "<unused>", "<bot>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([OTHER_TEXT], trainer)
    names = {"pad_token": "<eot>", "bos_token": "<bot>", "eos_token": "<eot>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZERS = {
    "bytes": talkers.tokenizer_of,
    "shuffled": shuffled,
    "larger": larger,
    "sentencepiece": lambda: talkers.pieces_of("sentencepiece"),
    "unigram": lambda: talkers.pieces_of("unigram"),
}
FAMILIES = ("llama", "llama-tied", "gpt2", "gpt_neox", "gemma3_text", "phi", "gptj")


def config_of(path: Path, file: str = "config.json") -> dict:
    return json.loads((path / file).read_text())


def weights(path: Path):
    return load_file(path / "model.safetensors")


def ids(path: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(path)(text, add_special_tokens=False)["input_ids"]


# --- what moves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_onto_its_own_tokenizer_a_model_has_the_same_bytes(name, talker, tmp_path):
    surgery = surgeon.transplant(talker(name), tokenizer=talker(name))
    surgery.save(tmp_path / "same")

    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        before, after = (json.loads(p.read_text()) if file == "config.json" else p.read_bytes()
                         for p in (talker(name) / file, tmp_path / "same" / file))  # fmt: skip
        assert before == after, file
    assert surgery.plan.moves_only
    assert not (tmp_path / "same/rows.safetensors").exists()
    assert (surgery.rows["method"], surgery.rows["mean"]) == (0, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_onto_a_permuted_tokenizer_logits_are_permuted_exactly(name, talker, tmp_path):
    other = talker(name, "shuffled")
    surgeon.transplant(talker(name), tokenizer=other).save(tmp_path / "moved")

    (before, _), (after, report) = toys.load(talker(name)), toys.load(tmp_path / "moved")
    assert not any(report.values())
    old_ids = AutoTokenizer.from_pretrained(talker(name)).get_vocab()
    new_ids = AutoTokenizer.from_pretrained(tmp_path / "moved").get_vocab()
    order = [new_ids[token] for token in old_ids]
    places = [old_ids[token] for token in old_ids]
    old, new = torch.tensor([ids(talker(name), TEXT)]), torch.tensor([ids(tmp_path / "moved", TEXT)])
    assert old.tolist() != new.tolist()
    assert torch.equal(after(new).logits[..., order], before(old).logits[..., places])
    assert after.config.eos_token_id == after.generation_config.eos_token_id == new_ids["<end>"]


def test_tokens_are_the_same_where_their_bytes_are(talker):
    old, new = talker(), talker(kind="sentencepiece")
    found = surgeon.transplant(old, tokenizer=new, measure=False)

    spelled = [token_bytes(config_of(path, "tokenizer.json")) for path in (old, new)]
    same = {i for i, content in spelled[1].items() if content in set(spelled[0].values())}
    assert found.rows["bytes"] == len(same)
    assert {b" ", b"\n", b"\xc3"} <= {spelled[1][i] for i in same}
    assert len(same) >= 256  # all bytes, which one writes as letters and the other as <0x00>


def test_special_tokens_are_matched_by_name_then_by_role_and_as_the_user_says(talker):
    old = Vocabulary(
        {"model": {"vocab": {"a": 0}}, "added_tokens": [
            {"id": 1, "content": "<s>", "special": True}, {"id": 2, "content": "</s>", "special": True},
            {"id": 3, "content": "<tool>", "special": True}]}, {"bos": 1, "eos": 2})  # fmt: skip
    names = ["<tool>", "<end>", "<start>", "<fill>", "<img>"]
    added = [{"id": i + 1, "content": name, "special": True} for i, name in enumerate(names)]
    new = Vocabulary({"model": {"vocab": {"a": 0}}, "added_tokens": added}, {"eos": 2, "bos": 3, "pad": 4})

    found = match(old, new, {})
    assert found.by_role == {1: 3, 2: 2, 3: 1, 4: 2}  # padding that there is not is the end of a text
    assert found.unmatched == [5]
    assert match(old, new, {5: 3}).by_role[5] == 3
    assert found.new == {0: 0, 1: 3, 2: 2, 3: 1}


def test_a_token_of_the_text_is_preferred_to_the_one_that_stands_for_its_byte():
    model = {"type": "BPE", "vocab": {"<0x0A>": 0, "\n": 1, "▁a": 2}, "merges": [], "byte_fallback": True}
    vocabulary = Vocabulary({"model": model}, {})

    assert vocabulary.by_bytes == {b"\n": 1, b" a": 2}
    assert vocabulary.pieces(b" a\n?") == [2, 1]


# --- what is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi"])
@pytest.mark.parametrize("kind", ["larger", "unigram"])
def test_rows_of_pieces_are_their_mean_in_every_tensor(name, kind, talker, tmp_path):
    other = talker(name, kind)
    surgery = surgeon.transplant(talker(name), tokenizer=other, method="subword")
    surgery.save(tmp_path / "made")

    (_, report) = toys.load(tmp_path / "made")
    assert not any(report.values())
    spelled = [token_bytes(config_of(path, "tokenizer.json")) for path in (talker(name), other)]
    old, new = weights(talker(name)), weights(tmp_path / "made")
    missing = [i for i, content in spelled[1].items() if content not in set(spelled[0].values())]
    assert len(missing) == surgery.rows["method"] > 5
    texts = {content: i for i, content in spelled[0].items()}
    for key, rows in new.items():
        if rows.shape == old[key].shape:
            assert torch.equal(rows, old[key])
            continue
        for i, content in spelled[1].items():
            if content in texts:
                assert torch.equal(rows[i], old[key][texts[content]])
        for i in missing[:20]:
            try:
                pieces = ids(talker(name), spelled[1][i].decode())
            except UnicodeDecodeError:
                continue
            # the sum of rows in float32, in another order
            torch.testing.assert_close(rows[i], old[key][pieces].mean(0), rtol=1e-5, atol=1e-6)


def test_a_map_of_the_helper_gives_back_rows_that_it_explains(talker, tmp_path):
    """Where the model's rows are a linear map of the helper's, the new rows are that map of the helper's."""
    source, other = (shutil.copytree(talker("llama-tied", kind), tmp_path / kind) for kind in ("bytes", "larger"))
    spelled = [token_bytes(config_of(path, "tokenizer.json")) for path in (source, other)]
    key = "model.embed_tokens.weight"
    helper, rows = weights(other), weights(source)
    draw = torch.Generator().manual_seed(0)
    map_ = torch.randn(48, 48, generator=draw) / 7
    texts = {content: i for i, content in spelled[1].items()}
    for i, content in spelled[0].items():
        if content in texts:
            rows[key][i] = helper[key][texts[content]] @ map_ + 1
    from safetensors.torch import save_file

    save_file(rows, source / "model.safetensors", metadata={"format": "pt"})

    surgery = surgeon.transplant(source, tokenizer=other)
    surgery.save(tmp_path / "made")

    assert surgery.method == "ridge"
    made = weights(tmp_path / "made")[key]
    known = set(spelled[0].values())
    missing = [i for i, content in spelled[1].items() if content not in known]
    # The ridge pulls a thousandth towards the mean; with more anchors than channels it is all that differs.
    error = (made[missing] - (helper[key][missing] @ map_ + 1)).norm() / (helper[key][missing] @ map_).norm()
    assert error < 0.02


def test_a_pursuit_takes_the_anchors_that_make_up_a_token():
    from surgeon.measure.new_rows import Helper, pursue

    draw = torch.Generator().manual_seed(0)
    atoms = torch.randn(40, 32, generator=draw)
    token = 2 * atoms[3] - atoms[17]

    class Rows(Helper):
        def new(self):
            yield token[None]

    found = pursue(Rows(None, atoms, [0]), 2, device="cpu")

    assert sorted(found.chosen[0].tolist()) == [3, 17]
    made = next(found.rows(torch.eye(40))())[0]
    torch.testing.assert_close(made[[3, 17]], torch.tensor([2.0, -1.0]), rtol=1e-4, atol=1e-4)  # float32


def test_cosines_are_a_mean_of_all_anchors_with_weights_that_sum_to_one():
    from surgeon.measure.new_rows import Helper, by_cosines

    draw = torch.Generator().manual_seed(0)
    atoms, rows, token = (torch.randn(n, 8, generator=draw).abs() for n in (20, 20, 3))

    class Rows(Helper):
        def new(self):
            yield token

    made = next(by_cosines(rows, Rows(None, atoms, [0, 1, 2]))())

    cosines = torch.nn.functional.normalize(token, dim=1) @ torch.nn.functional.normalize(atoms, dim=1).T
    expected = (cosines / cosines.sum(1, keepdim=True)) @ rows
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)  # float32, summed in another order


@pytest.mark.parametrize("method", ["ridge", "omp", "clp", "subword", "mean"])
def test_every_method_gives_finite_rows_and_a_model_that_stops(method, talker, tmp_path):
    other = talker("llama-tied", "larger", head_dim=12)
    surgery = surgeon.transplant(talker(), tokenizer=other, method=method, map=["<s>=<turn>"], k=4)
    surgery.save(tmp_path / "made")

    model, report = toys.load(tmp_path / "made")
    assert not any(report.values())
    rows, old = weights(tmp_path / "made"), weights(talker())
    num_tokens = len(AutoTokenizer.from_pretrained(other))
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert rows[key].shape == (num_tokens, 48)
        assert bool(rows[key].isfinite().all())
        assert bool((rows[key].norm(dim=1) > 0).all())
        vocabulary = AutoTokenizer.from_pretrained(other).get_vocab()
        assert torch.equal(rows[key][vocabulary["<turn>"]], old[key][1])
        assert torch.equal(rows[key][vocabulary["<eot>"]], old[key][2])
        assert torch.equal(rows[key][vocabulary["<unused>"]], old[key].double().mean(0).float())
    assert sum(surgery.rows.values()) == num_tokens
    assert surgery.rows["role"] == 3
    # The row of the end of a text is made the largest: generate stops at it, by the id in the files.
    end = vocabulary["<eot>"]
    with torch.no_grad():
        states = model.model(torch.tensor([[5, 6]])).last_hidden_state[0, -1]
        model.lm_head.weight[end] = 100 * states / states.norm()
        made = model.generate(torch.tensor([[5, 6]]), max_new_tokens=9, do_sample=False)
    assert made[0].tolist()[-1] == end
    assert len(made[0]) == 3


def test_rows_beyond_the_tokens_are_the_mean(talker, tmp_path):
    other = talker("gpt2", "larger", vocab_size=411)
    like = surgeon.transplant(talker(), like=other, method="subword")
    padded = surgeon.transplant(talker(), tokenizer=other, method="mean", pad_to=64)
    like.save(tmp_path / "like")

    num_tokens = len(AutoTokenizer.from_pretrained(other))
    rows = weights(tmp_path / "like")["lm_head.weight"]
    assert like.vocabulary == (290, 411)
    assert config_of(tmp_path / "like")["vocab_size"] == len(rows) == 411 > num_tokens
    assert torch.equal(rows[-1], weights(talker())["lm_head.weight"].double().mean(0).float())
    assert padded.vocabulary[1] == -(-num_tokens // 64) * 64


def test_rows_are_stored_as_the_model_is(talker, tmp_path):
    half = toys.build("llama", tmp_path / "half", vocab_size=290, dtype="bfloat16")
    talkers.tokenizer_of().save_pretrained(half)

    surgeon.transplant(half, tokenizer=talker("llama", "larger"), method="subword").save(tmp_path / "made")

    assert {tensor.dtype for tensor in weights(tmp_path / "made").values()} == {torch.bfloat16}


# --- what follows -------------------------------------------------------------------------------------------------


def test_ids_are_those_of_the_new_tokenizer_and_its_own_configs(talker, tmp_path):
    source, other = (shutil.copytree(talker("llama", kind), tmp_path / kind) for kind in ("bytes", "larger"))
    chat = {"chat_template": talkers.TEMPLATE}
    (source / "tokenizer_config.json").write_text(json.dumps(config_of(source, "tokenizer_config.json") | chat))
    said = {"eos_token_id": 2, "pad_token_id": 0, "suppress_tokens": [289], "begin_suppress_tokens": [5]}
    (source / "generation_config.json").write_text(json.dumps(said))
    (source / "vocab.json").write_text("{}")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))

    surgery = surgeon.transplant(source, tokenizer=other, method="subword")
    surgery.save(tmp_path / "made")

    generation, config = config_of(tmp_path / "made", "generation_config.json"), config_of(tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert generation["eos_token_id"] == [0, 1]
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    assert tokenizer.chat_template is None
    assert not (tmp_path / "made/vocab.json").exists()
    assert any("chat template" in note for note in surgery.plan.notes)
    old, new = (token_bytes(config_of(path, "tokenizer.json")) for path in (source, other))
    assert [old[5]] == [new[i] for i in generation["begin_suppress_tokens"]]
    assert generation["suppress_tokens"] == [i for i, content in new.items() if content == old[289]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--tokenizer is missing"),
        ({"tokenizer": "x", "like": "y"}, "both name one"),
        ({"like": "x", "pad_to": 8}, "--like says how many"),
        ({"tokenizer": "x", "map": ["<s>"]}, "no pair"),
        ({"tokenizer": "x", "method": "rigde"}, "did you mean ridge"),
        ({"tokenizer": "x", "k": 0}, "--k is 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        surgeon.transplant("nothing", **options)


def test_what_cannot_be_is_refused_before_anything_is_computed(talker, tmp_path):
    bare = tmp_path / "bare"
    talkers.tokenizer_of().save_pretrained(bare)
    empty = tmp_path / "empty"
    empty.mkdir()

    with pytest.raises(OptionError, match="needs the rows of a model"):
        surgeon.transplant(talker(), tokenizer=bare, method="ridge")
    with pytest.raises(PlanError, match="other tokens than"):
        surgeon.transplant(talker(), tokenizer=bare, helper=talker(kind="larger"))
    with pytest.raises(PlanError, match="holds no model"):
        surgeon.transplant(talker(), like=bare)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        surgeon.transplant(talker(), tokenizer=empty)
    with pytest.raises(OptionError, match="no token '<bott>'; did you mean <bot>"):
        surgeon.transplant(talker(), tokenizer=talker(kind="larger"), map=["<s>=<bott>"])
    assert surgeon.transplant(talker(), tokenizer=bare).method == "subword"


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_says_how_many_rows_each_rule_gave(talker, tmp_path, run):
    text = talkers.written(tmp_path / "text.txt")
    words = ["transplant", talker(), "--tokenizer", talker(kind="larger"), "-o", tmp_path / "made"]

    planned = run(*words, "--dry-run", "--json", "-q")
    result = run(*words, "--json", "-q", "--eval-data", text, "--eval-tokens", "60")

    assert (planned.code, result.code) == (0, 0), planned.err + result.err
    told = json.loads(result.out)
    assert told["rows"] == json.loads(planned.out)["rows"]
    assert told["parameters"] == json.loads(planned.out)["parameters"]
    assert told["method"] == "ridge"
    assert set(told["rows"]) == {"bytes", "role", "method", "mean"}
    assert told["bits_per_byte"]["before"] > 0 < told["bits_per_byte"]["after"]
    assert "transplant" in (tmp_path / "made/README.md").read_text()


@pytest.mark.parametrize("kind", ["larger", "shuffled"])
def test_a_receipt_is_replayed_without_the_other_tokenizer(kind, talker, tmp_path, run):
    other = shutil.copytree(talker("llama-tied", kind), tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    surgeon.transplant(talker(), tokenizer=other, pad_to=8).save(tmp_path / "made")
    shutil.rmtree(other)

    result = run("run", tmp_path / "made/surgeon.json", "-o", tmp_path / "again")

    assert result.code == 0, result.err
    assert "the same bytes" in result.out
    for file in ("tokenizer.json", "config.json", "generation_config.json", "rows.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "made" / file).read_bytes(), file


def test_rows_that_changed_since_are_not_replayed(talker, tmp_path, run):
    surgeon.transplant(talker(), tokenizer=talker(kind="larger")).save(tmp_path / "made")
    file = tmp_path / "made/rows.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    result = run("run", tmp_path / "made/surgeon.json", "-o", tmp_path / "again")

    assert result.code == 1
    assert "rows.safetensors has changed since" in result.err
    assert not (tmp_path / "again").exists()


def test_it_is_a_step_of_a_recipe_and_of_a_chain(talker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = f"""
        steps:
          - {{name: short, truncate: {{model: {talker()}, layers: 2}}}}
          - {{name: other, transplant: {{model: short, tokenizer: {talker(kind="larger")}, method: subword}}}}
        """
    run_recipe(write(tmp_path / "recipe.yaml", steps), tmp_path / "made")
    short = surgeon.truncate(talker(), layers=2)
    surgeon.transplant(short, tokenizer=talker(kind="larger"), method="subword").save(tmp_path / "chain")

    assert weights(tmp_path / "chain").keys() == weights(tmp_path / "made/other").keys()
    for key, tensor in weights(tmp_path / "chain").items():
        assert torch.equal(tensor, weights(tmp_path / "made/other")[key])
    back = surgeon.trim(surgeon.transplant(tmp_path / "chain", tokenizer=talker()), kept="0-289")
    assert back.rows == (290, 290)
