"""`surgeon generate` as users type it."""

import json
from types import SimpleNamespace

import pytest
import talkers
from later import LATER

import surgeon
from surgeon.gist.layout import prompt_tokens, text_tokens
from surgeon.gist.tokens import read_gist

if LATER:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT, TEXT = "The cat sat on the mat.", "\nthat was"


@pytest.fixture(scope="module")
def bots(tmp_path_factory):
    """Return toys with gist tokens, each with a compressed prompt, by name."""
    home, made = tmp_path_factory.mktemp("bots"), {}
    for name in ("llama", "gpt2", "t5"):
        talkers.talker(home / name, name)
        surgeon.add_gist(home / name, tokens=2).save(home / f"{name}-gist")
        model = home / f"{name}-gist"
        surgeon.compress(model, PROMPT, output=home / f"{name}-bot")
        made[name] = SimpleNamespace(model=model, bot=home / f"{name}-bot")
    surgeon.compress(made["llama"].model, "Be kind.", output=home / "chat", chat=True)
    made["chat"] = SimpleNamespace(model=made["llama"].model, bot=home / "chat")
    return made


def test_only_the_continuation_is_printed(bots, run):
    found = bots["llama"]
    done = run("generate", found.model, TEXT, "--max-new-tokens", 6)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(found.model), AutoTokenizer.from_pretrained(found.model)
    ids = torch.tensor([[1, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]])  # <s> is 1
    options = {"do_sample": False, "suppress_tokens": [300], "eos_token_id": 2, "pad_token_id": 0}
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **options)
    assert done.code == 0, done.err
    assert done.out == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    assert done.err == ""


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_gist_stands_for_its_prompt(name, bots, run):
    from gisted import WRITE

    from surgeon.gist.masks import gist_masks, gist_phases

    found = bots[name]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(found.model), AutoTokenizer.from_pretrained(found.model)
    gist = read_gist(json.loads((found.model / "config.json").read_text()))
    ids = prompt_tokens(PROMPT, gist, tokenizer, num_tokens=2, layout="text", encoder=False)
    ids += text_tokens(TEXT, gist, tokenizer, layout="text", encoder=False)
    written = []
    for _ in range(WRITE["max_new_tokens"]):
        row = torch.tensor([ids + written])
        masks = gist_masks(model.config, gist_phases(row, gist.ids))
        with torch.no_grad():
            logits = model(row, attention_mask=masks, position_ids=torch.arange(row.shape[1])[None]).logits[0, -1]
        logits[list(gist.ids)] = -torch.inf
        written.append(int(logits.argmax()))
        if written[-1] == 2:
            break

    done = run("generate", found.model, TEXT, "--gist", found.bot, "--max-new-tokens", WRITE["max_new_tokens"])

    assert done.code == 0, done.err
    assert done.out == tokenizer.decode(written, skip_special_tokens=True) + "\n"


def test_the_tokens_on_both_sides_of_a_gist_are_those_of_the_whole_text(bots):
    found = bots["llama"]
    tokenizer = AutoTokenizer.from_pretrained(found.model)
    gist = read_gist(json.loads((found.model / "config.json").read_text()))

    before = prompt_tokens(PROMPT, gist, tokenizer, num_tokens=2, layout="text", encoder=False)
    behind = text_tokens(TEXT, gist, tokenizer, layout="text", encoder=False)

    assert before + behind == [1, *tokenizer(PROMPT + "<GIST><GIST>" + TEXT, add_special_tokens=False)["input_ids"]]
    chat = prompt_tokens("Be kind.", gist, tokenizer, num_tokens=2, layout="chat", encoder=False)
    turn = text_tokens("Hi", gist, tokenizer, layout="chat", encoder=False)
    whole = tokenizer("<system>Be kind.<GIST><GIST><user>Hi<assistant>", add_special_tokens=False)["input_ids"]
    assert chat + turn == whole


def test_an_encoder_decoder_writes_with_a_gist_and_without(bots, run):
    found = bots["t5"]
    done = run("generate", found.model, TEXT, "--max-new-tokens", 5, "--json")
    with_gist = run("generate", found.model, TEXT, "--gist", found.bot, "--max-new-tokens", 5, "--json")

    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(found.model), AutoTokenizer.from_pretrained(found.model)
    ids = torch.tensor([[*tokenizer(TEXT, add_special_tokens=False)["input_ids"], 2]])
    written = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=2)
    assert json.loads(done.out)["text"] == tokenizer.decode(written[0], skip_special_tokens=True)
    assert with_gist.code == 0, with_gist.err
    assert json.loads(with_gist.out)["gist_tokens"] == 2


def test_a_gist_of_a_chat_takes_the_text_as_a_users_turn(bots, run):
    found = bots["chat"]
    plain = json.loads(run("generate", found.model, "Hi", "--gist", found.bot, "--max-new-tokens", 2, "--json").out)
    chat = run("generate", found.model, "Hi", "--gist", found.bot, "--chat", "--max-new-tokens", 2, "--json")

    assert plain["text_tokens"] == json.loads(chat.out)["text_tokens"] > 2  # <user>Hi<assistant>
    refused = run("generate", found.model, "Hi", "--gist", bots["llama"].bot, "--chat")
    assert refused.code == 1
    assert "holds a prompt in plain text" in refused.err


def test_the_same_seed_draws_the_same_and_another_one_otherwise(bots, run):
    def draw(seed):
        options = ["--temperature", 1.5, "--seed", seed, "--max-new-tokens", 8]
        return run("generate", bots["llama"].model, TEXT, "--gist", bots["llama"].bot, *options).out

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_drawing_leaves_the_random_state_of_others_alone(bots):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)

    surgeon.generate(bots["llama"].model, TEXT, temperature=1, max_new_tokens=2, device="cpu")

    assert torch.equal(torch.rand(1), expected)


def test_beams_and_a_file_are_taken(bots, tmp_path, run):
    file = talkers.written(tmp_path / "text.txt", TEXT)
    found = bots["gpt2"]

    beams = run("generate", found.model, "--input-file", file, "--gist", found.bot, "--beams", 3, "--max-new-tokens", 4)
    same = run("generate", found.model, TEXT, "--gist", found.bot, "--beams", 3, "--max-new-tokens", 4)

    assert beams.code == 0, beams.err
    assert beams.out == same.out


def test_no_more_is_written_than_the_model_has_positions(bots, run):
    found = bots["gpt2"]
    about = json.loads((found.bot / "gist.json").read_text())
    done = json.loads(run("generate", found.model, TEXT, "--gist", found.bot, "--json").out)

    read = about["position_offset"] + about["num_tokens"] + done["text_tokens"]
    assert read + done["new_tokens"] <= 64


@pytest.mark.parametrize(
    ("options", "said", "code"),
    [
        (["--gist", "no-such"], "there is no compressed prompt in no-such", 1),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0", 2),
        (["--temperature", "-1"], "--temperature is -1.0", 2),
        (["--temperature", "nan"], "--temperature is nan", 2),
        (["--top-p", "0.5"], "--top-p has no effect without --temperature", 2),
        (["--top-p", "2", "--temperature", "1"], "--top-p is 2.0", 2),
        (["--beams", "0"], "--beams is 0", 2),
    ],
)
def test_a_mistake_is_one_line_and_a_hint(options, said, code, bots, run):
    done = run("generate", bots["llama"].model, TEXT, *options)

    assert done.code == code
    assert said in done.err
    assert len(done.err.splitlines()) == 2


def test_a_gist_of_another_model_is_refused_before_the_model_is_loaded(bots, run):
    done = run("generate", bots["gpt2"].model, TEXT, "--gist", bots["llama"].bot)

    assert done.code == 1
    assert "was compressed by another model" in done.err
    assert len(done.err.splitlines()) == 2


def test_a_text_that_is_empty_or_too_long_or_has_a_gist_token_is_refused(bots, run):
    found = bots["gpt2"]

    assert "there is no text after the gist" in run("generate", found.model, "", "--gist", found.bot).err
    assert "the text ends at position" in run("generate", found.model, TEXT * 30).err
    assert "the text contains <GIST>" in run("generate", found.model, "a<GIST>", "--gist", found.bot).err
    assert run("generate", found.model).code == 2
