"""Trimming a vocabulary: logits of kept tokens, the tokenizer of fewer tokens, and the files that name ids."""

import json
import shutil
from pathlib import Path

import pytest
import talkers
import toys
from later import LATER
from recipe_runs import run as run_recipe
from recipe_runs import write

import surgeon
from surgeon.anatomy.token_ids import followed, token_ids
from surgeon.checkpoint.token_bytes import token_bytes
from surgeon.checkpoint.trimmed_tokenizer import parts_of, trimmed
from surgeon.errors import DataError, PlanError
from surgeon.options import OptionError
from surgeon.surgery import open_model

if LATER:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

USED = "the cat sat on the mat.\n" * 4
OTHER = "The rat — é🌿 — and 17 zebras.\n"


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """Return a function from a toy's name, and the kind of its tokenizer, to a checkpoint with a row for each token."""
    directory = tmp_path_factory.mktemp("talkers")

    def build(name="llama", kind="bytes", **sizes):
        path = directory / "-".join(map(str, (name, kind, *sizes.values())))
        if not path.exists():
            tokenizer = talkers.tokenizer_of() if kind == "bytes" else talkers.pieces_of(kind)
            toys.build(name, path, **({"vocab_size": len(tokenizer)} | sizes))
            tokenizer.save_pretrained(path)
        return path

    return build


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    return talkers.written(tmp_path_factory.mktemp("text") / "used.txt", USED)


def kept_of(path: Path) -> list[int]:
    runs = json.loads((path / "surgeon.json").read_text())["axis_maps"]["vocab"]
    return [i for first, count in runs for i in range(first, first + count)]


def ids(path, text):
    return AutoTokenizer.from_pretrained(path)(text, add_special_tokens=False)["input_ids"]


# --- weights ------------------------------------------------------------------------------------------------------


# Tied, untied, with a bias of the head (phi, gptj), another layout (gpt2, gpt_neox), scaled embeddings (gemma3_text),
# whose tokenizer's class adds a token of its own (qwen2).
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gpt_neox", "gemma3_text", "phi", "gptj", "qwen2"])
def test_logits_of_kept_tokens_are_what_they_were(name, talker, used, tmp_path):
    surgeon.trim(talker(name), data=[used]).save(tmp_path / "trimmed")

    (before, _), (after, report) = toys.load(talker(name)), toys.load(tmp_path / "trimmed")
    assert not any(report.values())
    kept = kept_of(tmp_path / "trimmed")
    assert after.config.vocab_size == len(kept) < before.config.vocab_size
    old, new = torch.tensor([ids(talker(name), USED)]), torch.tensor([ids(tmp_path / "trimmed", USED)])
    assert [kept[i] for i in new[0].tolist()] == old[0].tolist()
    # The same rows; a shorter matrix may be multiplied in other blocks: float32 rounding of logits of order 1.
    torch.testing.assert_close(after(new).logits, before(old).logits[..., kept], rtol=0, atol=1e-5)
    rows, stored = load_file(talker(name) / "model.safetensors"), load_file(tmp_path / "trimmed/model.safetensors")
    for key, tensor in stored.items():
        assert torch.equal(tensor, rows[key] if tensor.shape == rows[key].shape else rows[key][kept]), key


def test_rows_to_a_multiple_are_the_mean_and_never_zero(talker, used, tmp_path):
    trimming = surgeon.trim(talker(), data=[used], pad_to=64)
    trimming.save(tmp_path / "trimmed")

    rows = load_file(tmp_path / "trimmed/model.safetensors")["lm_head.weight"]
    before = load_file(talker() / "model.safetensors")["lm_head.weight"]
    num_tokens = len(AutoTokenizer.from_pretrained(tmp_path / "trimmed"))
    assert len(rows) == trimming.rows[1] == -(-num_tokens // 64) * 64 > num_tokens
    assert torch.equal(rows[num_tokens], before.double().mean(0).float())
    assert all(torch.equal(row, rows[num_tokens]) for row in rows[num_tokens:])


def test_rows_that_no_token_had_go(talker, used):
    assert surgeon.trim(talker(vocab_size=320), data=[used]).rows == (320, surgeon.trim(talker(), data=[used]).rows[1])


def test_everything_kept_gives_the_same_bytes(talker, tmp_path):
    trimming = surgeon.trim(talker(), data=[talkers.written(tmp_path / "text.txt")], kept="0-289")
    trimming.save(tmp_path / "same")

    assert (tmp_path / "same/model.safetensors").read_bytes() == (talker() / "model.safetensors").read_bytes()
    assert trimming.plan.moves_only


# --- the tokenizer ------------------------------------------------------------------------------------------------

KINDS = ("bytes", "sentencepiece", "unigram", "wordpiece", "words")


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_kept_tokens_has_the_same_tokens_and_any_other_is_still_spelled(kind, talker, used, tmp_path):
    source = talker(kind=kind)
    trimming = surgeon.trim(source, data=[used])
    trimming.save(tmp_path / "trimmed")

    kept = kept_of(tmp_path / "trimmed")
    old, new = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "trimmed")
    assert len(new) == len(kept) < len(old)
    assert new.get_vocab() == {token: kept.index(i) for token, i in old.get_vocab().items() if i in kept}
    assert [kept[i] for i in ids(tmp_path / "trimmed", USED)] == ids(source, USED)
    assert trimming.trip.missing == trimming.trip.changed == 0
    if kind != "words":
        spelled = ids(tmp_path / "trimmed", OTHER)
        assert len(spelled) > len(ids(source, OTHER))
        assert new.decode(spelled) == old.decode(ids(source, OTHER))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_around_a_text_have_their_new_ids(kind, talker, used, tmp_path):
    surgeon.trim(talker(kind=kind), data=[used]).save(tmp_path / "trimmed")

    old, new = AutoTokenizer.from_pretrained(talker(kind=kind)), AutoTokenizer.from_pretrained(tmp_path / "trimmed")
    kept = kept_of(tmp_path / "trimmed")
    assert [kept[i] for i in new(USED)["input_ids"]] == old(USED)["input_ids"]
    assert (new.bos_token, new.eos_token, new.pad_token) == (old.bos_token, old.eos_token, old.pad_token)


def test_what_falls_back_is_counted(talker, used, tmp_path):
    other = talkers.written(tmp_path / "other.txt", "a that\n" + USED)

    trip = surgeon.trim(talker(), data=[used], eval_data=[other]).trip

    spelled = token_bytes(json.loads((talker() / "tokenizer.json").read_text()))
    gone = [spelled[i] for i in ids(talker(), "a that\n") if i not in set(ids(talker(), USED))]
    assert trip.missing > 0
    assert set(gone) >= {b" that"}
    assert trip.nbytes == sum(map(len, gone)) - sum(len(each) for each in gone if len(each) == 1)
    assert trip.tokens == (len(ids(talker(), "a that\n" + USED)), trip.tokens[1])
    assert trip.changed == 0
    assert trip.of_bytes == len("a that\n" + USED)


def test_parts_are_all_that_comes_up_while_a_token_is_merged():
    model = {
        "vocab": {t: i for i, t in enumerate(("a", "b", "c", "ab", "bc", "abc", "cab"))},
        "merges": [["a", "b"], ["ab", "c"]],
    }
    tokenizer = {"model": {"type": "BPE", **model}}

    assert parts_of(tokenizer, {5}) == {0, 1, 2, 3}
    assert parts_of(tokenizer, {6}) == {0, 1, 2, 3}  # no merge makes "cab": what its text is, is kept
    assert parts_of({"model": {"type": "WordPiece", "vocab": {"ab": 0, "a": 1}}}, {0}) == set()


def test_files_of_older_versions_are_written_too_and_what_cannot_be_is_left_out(talker, used, tmp_path):
    source = shutil.copytree(talker(), tmp_path / "source")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    (source / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (source / "added_tokens.json").write_text(json.dumps({"<end>": 2}))
    (source / "spiece.model").write_bytes(b"\0")

    surgery = surgeon.trim(source, data=[used])
    surgery.save(tmp_path / "trimmed")

    edited = json.loads((tmp_path / "trimmed/tokenizer.json").read_text())["model"]
    assert json.loads((tmp_path / "trimmed/vocab.json").read_text()) == edited["vocab"]
    assert (tmp_path / "trimmed/merges.txt").read_text().splitlines()[1:] == [" ".join(m) for m in edited["merges"]]
    assert json.loads((tmp_path / "trimmed/added_tokens.json").read_text()) == {"<end>": edited["vocab"]["<end>"]}
    assert not (tmp_path / "trimmed/spiece.model").exists()
    assert any("spiece.model" in note for note in surgery.plan.notes)


def test_merges_of_older_files_and_words_of_bert_are_read(talker):
    def files(name):
        return {"vocab.txt": b"", "vocab.json": b"{}"}.get(name)

    words = {"model": {"type": "WordPiece", "vocab": {"a": 0, "##b": 1, "c": 2}}}
    old = {"model": {"vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": ["a b", "ab c"]}}

    assert trimmed(files, words, [0, 2])["vocab.txt"] == b"a\nc\n"
    assert trimmed(files, words, [0, 2])["vocab.json"] is None
    assert json.loads(trimmed(files, old, [0, 1, 2])["tokenizer.json"])["model"]["merges"] == ["a b"]


def test_what_the_chat_template_writes_stays(talker, used, tmp_path):
    source = shutil.copytree(talker(), tmp_path / "source")
    (source / "chat_template.jinja").write_text(talkers.TEMPLATE.replace("<assistant>", "that"))

    surgeon.trim(source, data=[used]).save(tmp_path / "trimmed")

    assert set(ids(source, "that")) <= set(kept_of(tmp_path / "trimmed"))


# --- ids ----------------------------------------------------------------------------------------------------------


def test_every_id_of_the_configs_follows(talker, used, tmp_path):
    source = shutil.copytree(talker(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 288]}))
    said = {"eos_token_id": [2, 288], "suppress_tokens": [288, 285], "bad_words_ids": [[288], [2, 285]]}
    (source / "generation_config.json").write_text(json.dumps(said))

    surgery = surgeon.trim(source, data=[used])
    surgery.save(tmp_path / "trimmed")

    kept = kept_of(tmp_path / "trimmed")
    assert 288 in kept
    assert 285 not in kept
    generation = json.loads((tmp_path / "trimmed/generation_config.json").read_text())
    new = kept.index(288)
    assert json.loads((tmp_path / "trimmed/config.json").read_text())["eos_token_id"] == [2, new]
    assert generation == {"eos_token_id": [2, new], "suppress_tokens": [new], "bad_words_ids": [[new]]}
    assert any("suppress_tokens" in note for note in surgery.plan.notes)
    assert toys.load(tmp_path / "trimmed")[0].generation_config.eos_token_id == [2, new]


def test_ids_are_found_by_their_keys_wherever_they_stand():
    config = {
        "vocab_size": 9,
        "pad_token_id": -1,
        "image_token_index": 8,
        "text_config": {"vocab_size": 9, "bos_token_id": 1, "hidden_size": 4},
        "audio": {"vocab_size": 99, "bos_token_id": 77},
        "gist": {"token_ids": [5, 6]},
        "forced_decoder_ids": [[1, 3], [2, 8]],
        "num_tokens": 3,
    }
    lost: list[str] = []

    new = followed(config, {1: 0, 5: 1, 8: 2, -1: -1}.get, lost)

    assert dict(token_ids(config)) == {"pad_token_id": -1, "image_token_index": 8, "bos_token_id": 1, "token_ids": 6}
    assert new["text_config"] == {"vocab_size": 9, "bos_token_id": 0, "hidden_size": 4}
    assert (new["image_token_index"], new["pad_token_id"], new["num_tokens"]) == (2, -1, 3)
    assert new["audio"] == config["audio"]
    assert new["gist"] == {"token_ids": [1]}
    assert new["forced_decoder_ids"] == [[2, 2]]
    assert lost == ["token_ids", "forced_decoder_ids"]


# --- how many -----------------------------------------------------------------------------------------------------


def test_fewer_tokens_are_those_that_the_text_uses_most(talker, used):
    counts = sorted(((USED.count(word), word) for word in ("the", "cat")), reverse=True)
    top = surgeon.trim(talker(), data=[used], keep_top=2)
    most = surgeon.trim(talker(), data=[used], coverage="50%")
    same = surgeon.trim(talker(), data=[used], coverage=0.5)

    assert counts[0][1] == "the"
    assert top.tokens["text"] <= 2 < surgeon.trim(talker(), data=[used]).tokens["text"]
    assert most.rows == same.rows
    assert most.trip.missing <= most.trip.tokens[0] / 2
    assert (
        surgeon.trim(talker(), data=[used], keep_token=["Ġthat"]).rows[1] > surgeon.trim(talker(), data=[used]).rows[1]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--data is missing"),
        ({"data": ["x"], "keep_top": 0}, "--keep-top is 0"),
        ({"data": ["x"], "keep_top": 5, "coverage": "9%"}, "both say"),
        ({"data": ["x"], "coverage": "101%"}, "no share"),
        ({"data": ["x"], "coverage": "most"}, "no share"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        surgeon.trim("nothing", **options)


def test_a_token_that_there_is_not_is_refused_with_what_may_have_been_meant(talker, used):
    with pytest.raises(OptionError, match="no token '<ends>'; did you mean <end>"):
        surgeon.trim(talker(), data=[used], keep_token=["<ends>"])


def test_what_cannot_be_trimmed_is_refused(talker, used, tmp_path):
    bare = shutil.copytree(talker(), tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    odd = shutil.copytree(talker(), tmp_path / "odd")
    tokenizer = json.loads((odd / "tokenizer.json").read_text())
    tokenizer["model"]["end_of_word_suffix"] = "</w>"
    (odd / "tokenizer.json").write_text(json.dumps(tokenizer))

    with pytest.raises(PlanError, match=r"no tokenizer\.json"):
        surgeon.trim(bare, data=[used])
    with pytest.raises(PlanError, match="end_of_word_suffix = '</w>'"):
        surgeon.trim(odd, data=[used])
    with pytest.raises(PlanError, match="a token 289, the model rows for 200"):
        surgeon.trim(talker(vocab_size=200), data=[used])
    with pytest.raises(DataError, match="no such file"):
        surgeon.trim(talker(), data=[str(tmp_path / "missing.txt")])


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_says_what_stays_and_measures_bits_per_byte(talker, used, tmp_path, run):
    result = run("trim", talker(), "--data", used, "--eval-data", used, "--sequence-length", "16",
                 "--json", "-q", "-o", tmp_path / "out")  # fmt: skip

    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert told["vocabulary"] == {"before": 290, "after": sum(told["tokens"].values())}
    assert told["bytes_saved"] == 2 * 48 * 4 * (290 - told["vocabulary"]["after"])
    assert told["round_trip"]["missing_tokens"] == 0
    # The same logits, and fewer of them beside: what is predicted only gets likelier.
    assert told["bits_per_byte"]["after"] < told["bits_per_byte"]["before"]
    assert "trim" in (tmp_path / "out/README.md").read_text()


def test_a_dry_run_writes_nothing(talker, used, tmp_path, run):
    result = run("trim", talker(), "--data", used, "--dry-run", "-o", tmp_path / "out")

    assert result.code == 0, result.err
    assert "vocabulary" in result.out
    assert "(not written)" in result.out
    assert not (tmp_path / "out").exists()


def test_a_receipt_is_replayed_without_the_text(talker, tmp_path, run):
    text = Path(talkers.written(tmp_path / "text.txt", USED))
    surgeon.trim(talker(), data=[str(text)], pad_to=8).save(tmp_path / "out")
    text.unlink()

    result = run("run", tmp_path / "out/surgeon.json", "-o", tmp_path / "again")

    assert result.code == 0, result.err
    assert "the same bytes" in result.out
    for file in ("tokenizer.json", "config.json", "generation_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_it_is_a_step_of_a_recipe_and_of_a_chain(talker, used, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = f"""
        steps:
          - {{name: small, trim: {{model: {talker()}, data: [{used}]}}}}
          - {{name: short, truncate: {{model: small, layers: 2}}}}
        """
    run_recipe(write(tmp_path / "recipe.yaml", steps), tmp_path / "made")
    surgeon.truncate(surgeon.trim(talker(), data=[used]), layers=2).save(tmp_path / "chain")

    chained = (tmp_path / "chain/model.safetensors").read_bytes()
    made = next(tmp_path.rglob("short/model.safetensors"))
    assert made.read_bytes() == chained
    assert (made.parent / "tokenizer.json").read_bytes() == (tmp_path / "chain/tokenizer.json").read_bytes()
    again = surgeon.trim(open_model(tmp_path / "chain"), data=[used])
    assert again.rows[0] == again.rows[1]
