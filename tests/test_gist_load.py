"""A compressed prompt in generation: the same text as by the mask; and read again from its directory."""

import json
import shutil

import pytest
import toys
from later import LATER

import surgeon.gist
from surgeon.checkpoint.source import fingerprint
from surgeon.errors import CheckpointError, DataError
from surgeon.surgery import open_source

if LATER:
    import torch
    from gisted import GIST, NUM_TOKENS, PROMPT, TEXTS, WRITE, compressed, prompt_of, written_by_mask
    from transformers.modeling_outputs import BaseModelOutput

    from surgeon.gist import saved
    from surgeon.gist.masks import cross_mask, encoder_mask, gist_phases
    from surgeon.gist.states import encoder_states

    SAMPLING = WRITE | {"do_sample": True, "temperature": 0.7, "top_k": 0}

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSED = ("bloom", "falcon-alibi", "lfm2", "bart", "bert", "roberta")  # test_gist_support.py says why
EVERY = [name for name in toys.TOYS if name not in REFUSED and not name.startswith("t5")]
DECODERS = ("llama", "gpt2", "qwen3", "gemma3_text", "mixtral", "mistral")


@pytest.fixture(scope="module")
def model_of(toy):
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = toys.load(toy(name))[0]
        return loaded[name]

    return get


def save(model, directory, source):
    """Write the compressed prompt of a toy as `surgeon compress` does."""
    states, _ = compressed(model)
    made_by = {"path": str(source), "fingerprint": fingerprint(open_source(source))}
    about = {"model": made_by, "token_ids": [GIST] * NUM_TOKENS, "layout": "text"}
    directory.mkdir()
    for name, content in saved.files_of(states, about, base=str(source)).items():
        (directory / name).write_bytes(content)
    return directory


# --- the same text as by the mask ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_greedy_generation_equals_that_by_the_mask(name, model_of):
    model = model_of(name)

    assert torch.equal(prompt_of(model).generate(TEXTS, **WRITE), written_by_mask(model, TEXTS, **WRITE))


@pytest.mark.parametrize("name", EVERY)
def test_beam_search_equals_that_by_the_mask(name, model_of):
    model, options = model_of(name), WRITE | {"num_beams": 3, "num_return_sequences": 2}

    found = prompt_of(model).generate(TEXTS, **options)

    assert found.shape == (4, 8)
    assert torch.equal(found, written_by_mask(model, TEXTS, **options))


@pytest.mark.parametrize("name", EVERY)
def test_sampling_from_a_seed_equals_that_by_the_mask(name, model_of):
    model, options = model_of(name), SAMPLING | {"num_return_sequences": 3}

    torch.manual_seed(1)
    found = prompt_of(model).generate(TEXTS, **options)
    torch.manual_seed(1)
    assert torch.equal(found, written_by_mask(model, TEXTS, **options))
    assert len({tuple(row) for row in found.tolist()}) > 2


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_unequal_length_are_written_as_alone(name, side, model_of):
    model, mask = model_of(name), torch.ones_like(TEXTS)
    mask[0, :4] = 0  # as much as most of a sliding window of 5
    prompt, short = prompt_of(model), TEXTS[:1, 4:]
    ids = TEXTS if side == "left" else torch.stack([TEXTS[0].roll(-4), TEXTS[1]])
    seen = mask if side == "left" else torch.stack([mask[0].roll(-4), mask[1]])

    for options in (WRITE, WRITE | {"num_beams": 3}):
        found = prompt.generate(ids, seen, **options)
        assert torch.equal(found[:1], written_by_mask(model, short, **options))
        assert torch.equal(found[1:], written_by_mask(model, TEXTS[1:], **options))


def test_an_encoder_writes_what_it_writes_by_the_mask(model_of):
    model = model_of("t5")
    before = torch.tensor(PROMPT + [GIST] * NUM_TOKENS).expand(2, -1)
    ids = torch.cat([before, TEXTS], 1)
    phases = gist_phases(ids, [GIST])
    with torch.no_grad():
        states = encoder_states(model, ids, mask=encoder_mask(model.config, phases))
    for options in (WRITE, WRITE | {"num_beams": 3}, SAMPLING):
        torch.manual_seed(1)
        by_mask = model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=cross_mask(phases),
            suppress_tokens=[GIST],
            **options,
        )
        torch.manual_seed(1)
        assert torch.equal(prompt_of(model).generate(TEXTS, **options), by_mask[:, 1:])


def test_an_encoder_writes_texts_of_unequal_length_as_alone(model_of):
    prompt, mask = prompt_of(model_of("t5")), torch.ones_like(TEXTS)
    mask[0, :4] = 0

    found = prompt.generate(TEXTS, mask, **WRITE)

    assert torch.equal(found[:1], prompt.generate(TEXTS[:1, 4:], **WRITE))
    assert torch.equal(found[1:], prompt.generate(TEXTS[1:], **WRITE))


def test_the_arguments_serve_a_call_of_transformers_itself(model_of):
    model = model_of("gpt2")
    prompt = prompt_of(model)

    given = prompt.generate_kwargs(TEXTS)

    assert given["attention_mask"].shape == (2, NUM_TOKENS + 6)
    assert given["position_ids"][0].tolist() == list(range(len(PROMPT), len(PROMPT) + NUM_TOKENS + 6))
    assert GIST in given["suppress_tokens"]
    written = model.generate(**given, **WRITE)
    assert torch.equal(written[:, NUM_TOKENS + 6 :], written_by_mask(model, TEXTS, **WRITE))


def test_each_call_gets_its_own_cache(model_of):
    prompt = prompt_of(model_of("llama"))

    first = prompt.generate(TEXTS, **WRITE)

    assert torch.equal(prompt.generate(TEXTS, **WRITE), first)
    assert prompt.states.num_tokens == NUM_TOKENS


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_config_that_caches_nothing_changes_nothing(name, toy, model_of):
    model = toys.load(toy(name))[0]
    model.config.use_cache = model.generation_config.use_cache = False

    assert torch.equal(prompt_of(model).generate(TEXTS, **WRITE), written_by_mask(model_of(name), TEXTS, **WRITE))


def test_a_model_that_counts_positions_by_its_cache_writes_texts_as_alone(model_of):
    prompt, mask = prompt_of(model_of("mpt")), torch.ones_like(TEXTS)
    mask[0, :4] = 0

    found = prompt.generate(TEXTS, mask, **WRITE)

    assert torch.equal(found[:1], prompt.generate(TEXTS[:1, 4:], **WRITE))
    assert torch.equal(found[1:], prompt.generate(TEXTS[1:], **WRITE))


def test_without_its_gist_a_text_is_continued_otherwise(model_of):
    model = model_of("llama")

    plain = model.generate(TEXTS, attention_mask=torch.ones_like(TEXTS), **WRITE)[:, 6:]

    assert not torch.equal(prompt_of(model).generate(TEXTS, **WRITE), plain)


def test_a_text_without_a_token_and_one_with_a_gist_token_are_refused(model_of):
    prompt = prompt_of(model_of("llama"))

    with pytest.raises(DataError, match="text 1 has no token"):
        prompt.generate(TEXTS, torch.tensor([[1] * 6, [0] * 6]), **WRITE)
    with pytest.raises(DataError, match="text 0 has a gist token"):
        prompt.generate(torch.full((1, 3), GIST), **WRITE)


def test_a_text_that_would_leave_the_table_of_positions_is_refused(model_of):
    prompt = prompt_of(model_of("gpt2"))

    with pytest.raises(DataError, match="would end at position 126, and the model has 64"):
        prompt.generate(TEXTS, max_new_tokens=100)


# --- saved and read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("llama", "ADAPTER"),
        ("qwen3", "ADAPTER"),
        ("gpt2", "TENSORS"),
        ("deepseek_v3", "TENSORS"),
        ("t5", "TENSORS"),
    ],
)
def test_what_was_saved_is_read_bit_for_bit(name, file, toy, model_of, tmp_path):
    model = model_of(name)
    directory = save(model, tmp_path / "bot", toy(name))

    found, made = surgeon.gist.load(directory, model).states, compressed(model)[0]

    assert (directory / getattr(saved, file)).is_file()
    assert found.offset == made.offset
    pairs = zip(found.layers, made.layers, strict=True)
    assert all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))
    assert (found.encoded is None) == (name != "t5")
    assert found.encoded is None or torch.equal(found.encoded, made.encoded)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "mixtral", "gpt_neox"])
def test_peft_loads_it_without_surgeon_and_writes_the_same(name, toy, model_of, tmp_path):
    peft = pytest.importorskip("peft")
    directory = save(model_of(name), tmp_path / "bot", toy(name))
    plain = toys.load(toy(name))[0]
    loaded = peft.PeftModel.from_pretrained(plain, directory).eval()
    options = WRITE | {"suppress_tokens": [GIST]}

    for more in ({}, {"num_beams": 3}):
        found = loaded.generate(input_ids=TEXTS, attention_mask=torch.ones_like(TEXTS), **options, **more)
        ours = surgeon.gist.load(directory, model_of(name)).generate(TEXTS, **options, **more)
        assert torch.equal(found[:, TEXTS.shape[1] :], ours)


def test_the_adapter_is_what_peft_itself_would_write(toy, model_of, tmp_path):
    peft = pytest.importorskip("peft")
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
    from safetensors.torch import load_file

    model = toys.load(toy("llama"))[0]
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_TOKENS, num_frozen_tokens=0)
    adapted = peft.get_peft_model(model, config)
    states = compressed(model_of("llama"))[0]
    initialize_kv_prefix_from_past_key_values(
        adapted, past_key_values=list(states.layers), num_virtual_tokens=NUM_TOKENS
    )
    adapted.save_pretrained(tmp_path / "peft")
    ours = save(model_of("llama"), tmp_path / "bot", toy("llama"))

    theirs = load_file(tmp_path / "peft" / saved.ADAPTER_WEIGHTS)
    assert theirs.keys() == load_file(ours / saved.ADAPTER_WEIGHTS).keys()
    assert torch.equal(theirs[saved.EMBEDDINGS], load_file(ours / saved.ADAPTER_WEIGHTS)[saved.EMBEDDINGS])
    said, known = (json.loads((place / saved.ADAPTER).read_text()) for place in (ours, tmp_path / "peft"))
    same = said.keys() - {"base_model_name_or_path"}
    assert {key: said[key] for key in same} == {key: known[key] for key in same}


def test_another_model_is_refused(toy, model_of, tmp_path):
    directory = save(model_of("llama"), tmp_path / "bot", toy("llama"))
    other = toys.build("llama", tmp_path / "other", seed=1)

    with pytest.raises(CheckpointError, match=r"was compressed by another model \(.*llama\), not by .*other"):
        surgeon.gist.load(directory, toys.load(other)[0])
    with pytest.raises(CheckpointError, match="was compressed by another model"):
        surgeon.gist.load(directory, model_of("llama"), checkpoint=other)


def test_the_same_model_elsewhere_is_welcome(toy, model_of, tmp_path):
    directory = save(model_of("llama"), tmp_path / "bot", toy("llama"))
    copy = shutil.copytree(toy("llama"), tmp_path / "copy")

    prompt = surgeon.gist.load(directory, toys.load(copy)[0])

    assert torch.equal(prompt.generate(TEXTS, **WRITE), prompt_of(model_of("llama")).generate(TEXTS, **WRITE))


def test_a_model_that_came_from_nowhere_is_refused(toy, model_of, tmp_path):
    directory = save(model_of("llama"), tmp_path / "bot", toy("llama"))
    nowhere = type(model_of("llama"))(model_of("llama").config)
    nowhere.config._name_or_path = nowhere.name_or_path = ""

    with pytest.raises(CheckpointError, match="does not say which checkpoint"):
        surgeon.gist.load(directory, nowhere)


def edited(directory, **changes):
    about = json.loads((directory / saved.ABOUT).read_text())
    (directory / saved.ABOUT).write_text(json.dumps(about | changes))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda place: (place / saved.ABOUT).unlink(), "there is no compressed prompt in"),
        (lambda place: (place / saved.ABOUT).write_text("{"), "is not JSON"),
        (lambda place: (place / saved.ABOUT).write_text("[]"), "has the format"),
        (lambda place: edited(place, format=2), "has the format 2, not 1"),
        (lambda place: edited(place, num_tokens=4), "has a gist of 3 tokens, gist.json says 4"),
        (lambda place: edited(place, token_ids=[GIST]), "has a gist of 3 tokens"),
        (lambda place: edited(place, tensors={}), "lacks 'file'"),
        (lambda place: edited(place, position_offset=-1), "makes no sense"),
        (lambda place: edited(place, model={}), "does not say which model"),
        (lambda place: (place / saved.ADAPTER_WEIGHTS).unlink(), "cannot read .*adapter_model"),
        (lambda place: (place / saved.ADAPTER_WEIGHTS).write_bytes(b"x" * 99), "is damaged: its SHA-256"),
    ],
)
def test_a_damaged_prompt_is_one_clear_error(damage, said, toy, model_of, tmp_path):
    directory = save(model_of("llama"), tmp_path / "bot", toy("llama"))
    damage(directory)

    with pytest.raises(CheckpointError, match=said):
        surgeon.gist.load(directory, model_of("llama"))
