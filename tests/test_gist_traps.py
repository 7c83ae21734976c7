"""Every way of doing gists that is known to go wrong: it does go wrong here, and ours does not, or refuses.

Here are the traps that have no test beside what they are about. The others:

- a bool mask with eager attention, one mask for all kinds of layers, masks by kind where there is one kind or where a
  kind is missing, a builder that is told positions, positions that are left to a mask of four dimensions, an empty
  cross mask of T5: `test_gist_masks.py`, with the rules as truth tables, padding on either side, and packing;
- layers that are chunked, linear or recurrent: `test_gist_support.py`, with the leak of each architecture;
- a gist that cannot be moved to position 0, longrope across its switch, a gist longer than a window, 16 bits, which
  have the rounding of any cache: `test_gist_compress.py`;
- beams, sampling and batches, which the authors' code has no caches for: `test_gist_load.py`, with the cache of another
  model, and a config that caches nothing;
- a model that writes gist tokens, and how tokenizers take them: `test_gist_tokens.py`;
- a long record that is cut, text that is tokenised in two parts: `test_gist_training.py`, with one pass and two;
- operations against the paper's profile: `test_gist_cost.py`; a gist between its bounds: `test_gist_learning.py`.

A first token that stays visible behind the gist (the attention sink), which a sliding window loses, is not offered.
"""

from contextlib import contextmanager

import pytest
import talkers
import toys
from later import LATER

import surgeon
from surgeon.data.records import form_of
from surgeon.errors import DataError, PlanError
from surgeon.gist.settings import GistSettings
from surgeon.gist.tokens import GistTokens
from surgeon.train.settings import Settings

if LATER:
    import torch
    from gisted import GIST, NUM_TOKENS, PROMPT, TEXTS, WRITE, compressed, prompt_of, written_by_mask
    from transformers import AutoTokenizer, DynamicCache

    from surgeon.gist import compress
    from surgeon.gist.compress import compress_ids, continued
    from surgeon.gist.masks import cross_mask, encoder_mask, gist_masks, gist_phases
    from surgeon.gist.probes import relative_difference
    from surgeon.gist.records import Gists, gist_examples
    from surgeon.gist.states import GistStates, encoder_states
    from surgeon.gist.support import check_support

    ROW = torch.tensor([[*PROMPT, GIST, GIST, *TEXTS[0].tolist()]])
    BEHIND = slice(len(PROMPT) + 2, None)
    ANSWER = torch.tensor([[0, 5, 6]])
    BY_HAND = WRITE | {"suppress_tokens": [GIST]}

pytestmark = pytest.mark.usefixtures("one_thread")

# float32 rounding of logits of order 1, where matrices of another shape are multiplied: measured up to 3e-6.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def model_of(toy):
    """Return a function from a toy's name, and perhaps an attention implementation, to the loaded model."""
    loaded = {}

    def get(name, attention=None):
        if (name, attention) not in loaded:
            chosen = {} if attention is None else {"attn_implementation": attention}
            loaded[name, attention] = toys.load(toy(name), **chosen)[0]
        return loaded[name, attention]

    return get


def logits(model, ids, masks):
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=masks, position_ids=positions, use_cache=False).logits


def differs(one, other):
    return (one - other).abs().max() > 0.05  # logits are of order 1; rounding is 1e-6


def other_prompt(ids):
    """Return a row with another prompt before the same gist."""
    changed = ids.clone()
    changed[:, : len(PROMPT)] = (ids[:, : len(PROMPT)] + 17) % 97 + 3
    return changed


# --- masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_mask_of_whole_numbers_is_added_by_eager_attention_without_an_error(name, model_of):
    eager, phases = model_of(name, "eager"), gist_phases(ROW, [GIST])
    by_hand = gist_masks(model_of(name, "sdpa").config, phases).long()

    ours = gist_masks(eager.config, phases)

    assert differs(logits(eager, ROW, by_hand), logits(eager, ROW, ours))
    # Causality is lost with it: the first token sees the last one.
    changed = ROW.clone()
    changed[:, -1] += 1
    assert differs(logits(eager, ROW, by_hand)[:, :1], logits(eager, changed, by_hand)[:, :1])
    assert torch.equal(logits(eager, ROW, ours)[:, :1], logits(eager, changed, ours)[:, :1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_mask_of_whole_numbers_is_an_error_of_sdpa(name, model_of):
    model = model_of(name)
    ours = gist_masks(model.config, gist_phases(ROW, [GIST]))

    with pytest.raises(RuntimeError, match="dtype"):
        logits(model, ROW, ours.long())
    assert ours.dtype == torch.bool


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_mask_of_three_dimensions_is_an_error(name, attention, model_of):
    model = model_of(name, attention)
    ours = gist_masks(model.config, gist_phases(ROW, [GIST]))

    assert ours.shape == (1, 1, ROW.shape[1], ROW.shape[1])
    with pytest.raises(RuntimeError, match="expand|must match|not implemented"):
        logits(model, ROW, ours[:, 0])


def test_what_the_last_gist_token_says_still_comes_from_the_prompt_and_is_not_trained(model_of, tmp_path):
    """Under the mask it sees the prompt, in a cache it says nothing: a target there would tell the two apart."""
    model = model_of("llama")
    masks = gist_masks(model.config, gist_phases(ROW, [GIST]))
    last = BEHIND.start - 1
    assert differs(logits(model, ROW, masks)[:, last], logits(model, other_prompt(ROW), masks)[:, last])

    tokenizer, gist = gisted_tokenizer(tmp_path)
    for record in ({"instruction": "The cat", "output": "sat"}, {"prompt": "The cat", "completion": "sat"}):
        example = gist_examples([form_of(record, "here").document(record, "here")], tokenizer, Gists(gist, (2,)))[0]
        first_behind = list(example.ids).index(gist.ids[0]) + 2
        assert not any(example.trained[: first_behind + 1])
        assert any(example.trained)


# --- positions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj"])
def test_where_positions_are_looked_up_a_prompt_cannot_lie_at_negative_ones(name, model_of):
    with pytest.raises((IndexError, RuntimeError), match="out of range|out of bounds"), torch.no_grad():
        model_of(name)(input_ids=ROW, position_ids=torch.arange(ROW.shape[1])[None] - len(PROMPT))


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj", "hunyuan_v1_dense"])
def test_going_on_from_position_0_behind_a_gist_that_lies_elsewhere_is_wrong_in_silence(name, model_of):
    model = model_of(name)
    states, _ = compressed(model)
    whole = torch.tensor([[*PROMPT, *[GIST] * NUM_TOKENS, *TEXTS[0].tolist()]])
    masked = logits(model, whole, gist_masks(model.config, gist_phases(whole, [GIST])))[:, -TEXTS.shape[1] :]

    with torch.no_grad():
        moved = continued(model, GistStates(states.layers, 0), TEXTS[:1])
        ours = continued(model, states, TEXTS[:1])

    assert differs(moved, masked)
    torch.testing.assert_close(ours, masked, rtol=0, atol=ROUNDING)


def test_a_rotation_that_stretches_with_the_text_is_not_moved_across_its_length(tmp_path, monkeypatch):
    """A prompt that long is refused; were it not, the measure would find that a gist at position 0 is another one."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    directory = toys.build("llama", tmp_path / "llama", rope_parameters=rope, max_position_embeddings=16)
    ids = [*PROMPT, GIST]

    with pytest.raises(DataError, match="prompt and gist have 18 tokens, and the model sees 16"):
        compress_ids(toys.load(directory)[0], ids, 1)
    monkeypatch.setattr(compress, "position_limit", lambda model: None)
    states, check = compress_ids(toys.load(directory)[0], ids, 1)

    assert check.rebased > 0.01
    assert states.offset == len(PROMPT)
    assert check.difference <= ROUNDING


@contextmanager
def hidden_from(model, queries, keys):
    """Let places of a row not see others, in a model whose code takes no such mask, but whose layers do."""

    def hide(_, arguments, named):
        mask = named["attention_mask"].clone()
        mask[..., queries, keys] = torch.finfo(mask.dtype).min
        return arguments, named | {"attention_mask": mask}

    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in model.transformer.h]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("name", "options", "dtype", "is_exact"),
    [
        ("bloom", {}, "float32", True),
        ("bloom", {}, "bfloat16", False),
        # Slopes that are no powers of 2, as all but a few numbers of heads have them.
        ("falcon-alibi", {"num_attention_heads": 10}, "float32", False),
    ],
    ids=["bloom in float32", "bloom in bfloat16", "falcon"],
)
def test_a_bias_that_is_rounded_where_a_token_stands_is_another_without_the_prompt(
    name, options, dtype, is_exact, tmp_path
):
    """Falcon has its ALiBi in bfloat16 always, Bloom in the model's dtype; both count places from what is cached."""
    model = toys.load(toys.build(name, tmp_path / "toy", **options), dtype=getattr(torch, dtype))[0]
    before = torch.tensor([[*PROMPT * 36, GIST, GIST]])
    row, end = torch.cat([before, TEXTS[:1]], 1), before.shape[1]

    def whole():
        with torch.no_grad():
            return model(row, attention_mask=torch.ones_like(row), use_cache=False).logits[:, end:]

    def behind(num_kept):
        cache, kept = DynamicCache(config=model.config), DynamicCache(config=model.config)
        with torch.no_grad():
            model(before, past_key_values=cache, use_cache=True)
            for i, layer in enumerate(cache.layers):
                kept.update(layer.keys[..., -num_kept:, :], layer.values[..., -num_kept:, :], i)
            return model(row[:, end:], past_key_values=kept, use_cache=True).logits

    with hidden_from(model, slice(end, None), slice(end - 2)):
        found = relative_difference(whole(), behind(2))
        assert relative_difference(whole(), behind(end)) > 0.1  # the prompt is hidden: the measure can tell
    rounding = relative_difference(whole(), behind(end))  # of any cache

    if is_exact:
        assert found <= ROUNDING
    else:
        assert found > max(0.01, 4 * rounding)
    assert "cannot be gisted" in check_support(model).reason


# --- tokens -------------------------------------------------------------------------------------------------------


def gisted_tokenizer(directory):
    """Return the tokenizer of a toy with gist tokens, and those."""
    talkers.talker(directory / "plain")
    surgeon.add_gist(directory / "plain", tokens=2).save(directory / "gist")
    tokenizer = AutoTokenizer.from_pretrained(directory / "gist")
    return tokenizer, GistTokens((tokenizer.convert_tokens_to_ids("<GIST>"),), 2)


def test_gist_tokens_that_are_joined_with_spaces_are_apart_and_refused(tmp_path):
    """The authors train on `<GIST> <GIST>` and compress `<GIST><GIST>`, which their tokenizer took for the same."""
    tokenizer, gist = gisted_tokenizer(tmp_path)

    def ids(text):
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])

    spaced, joined = ids("The cat<GIST> <GIST> sat"), ids(f"The cat{gist.text()} sat")

    assert spaced.shape[1] == joined.shape[1] + 1
    with pytest.raises(DataError, match="row 0 has gist tokens apart"):
        gist_phases(spaced, gist.ids)
    assert (gist_phases(joined, gist.ids) == 1).sum() == 2


def test_a_record_that_is_cut_from_the_right_loses_its_gist_and_sees_everything(model_of, tmp_path):
    tokenizer, gist = gisted_tokenizer(tmp_path)
    fields = {"instruction": "The rat sat on the mat, and the cat sat", "output": "that"}
    record = form_of(fields, "here").document(fields, "here")
    whole = gist_examples([record], tokenizer, Gists(gist, (2,)))[0].ids
    length = list(whole).index(gist.ids[0])
    config = model_of("llama").config

    # A row without a gist is one that nothing is hidden in: no error says that it lost one.
    cut = torch.tensor([list(whole[:length])])
    plain = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(gist_masks(config, gist_phases(cut, gist.ids))[0, 0], plain)

    ours = torch.tensor([list(gist_examples([record], tokenizer, Gists(gist, (2,)), length=length)[0].ids)])
    assert ours.shape == cut.shape
    assert (ours == gist.ids[0]).sum() == 2
    assert not torch.equal(gist_masks(config, gist_phases(ours, gist.ids))[0, 0], plain)


# --- caches -------------------------------------------------------------------------------------------------------


def behind_placeholders(texts):
    """Return texts behind placeholders for a gist, as `generate` wants them for what is cached, and their mask."""
    ids = torch.cat([torch.full((len(texts), NUM_TOKENS), GIST), texts], 1)
    return ids, torch.ones_like(ids)


def by_hand(model, ids, mask, cache, **options):
    """Return what a model writes when `generate` is given a cache and nobody cares."""
    written = model.generate(ids, attention_mask=mask, past_key_values=cache, **BY_HAND | options)
    return written[:, ids.shape[1] :]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_text_alone_in_front_of_a_cache_is_written_on_wrongly_in_silence(name, model_of):
    """`generate` takes the first of its tokens for what the cache holds, unless the mask counts those as well."""
    model = model_of(name)
    states, expected = compressed(model)[0], written_by_mask(model, TEXTS, **WRITE)
    ids, mask = behind_placeholders(TEXTS)

    alone = by_hand(model, TEXTS, torch.ones_like(TEXTS), states.cache(model.config, rows=2))

    assert alone.shape == expected.shape
    assert not torch.equal(alone, expected)
    assert torch.equal(by_hand(model, TEXTS, mask, states.cache(model.config, rows=2)), expected)
    assert torch.equal(by_hand(model, ids, mask, states.cache(model.config, rows=2)), expected)
    given = prompt_of(model).generate_kwargs(TEXTS)
    assert torch.equal(given["input_ids"], ids)
    assert torch.equal(given["attention_mask"], mask)


def test_a_cache_that_is_used_twice_goes_on_from_the_first_text_in_silence(model_of):
    model, prompt, others = model_of("llama"), prompt_of(model_of("llama")), TEXTS.flip(1)
    cache = prompt.states.cache(model.config, rows=2)

    first, second = (by_hand(model, *behind_placeholders(texts), cache) for texts in (TEXTS, others))

    assert cache.get_seq_length() > NUM_TOKENS
    assert torch.equal(first, written_by_mask(model, TEXTS, **WRITE))
    assert not torch.equal(second, written_by_mask(model, others, **WRITE))
    assert torch.equal(prompt.generate(TEXTS, **WRITE), first)
    assert torch.equal(prompt.generate(others, **WRITE), written_by_mask(model, others, **WRITE))


@pytest.mark.parametrize(
    "more", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}], ids=["beams", "sequences"]
)
def test_beams_and_sequences_need_a_row_each_in_the_cache(more, model_of):
    model, prompt = model_of("llama"), prompt_of(model_of("llama"))
    ids, mask = behind_placeholders(TEXTS[:1])
    cache = prompt.states.cache(model.config)

    with pytest.raises(RuntimeError, match="Expected size 1 but got size 3"):
        by_hand(model, ids, mask, cache, **more)

    given = prompt.generate_kwargs(TEXTS[:1], **{name: 3 for name, value in more.items() if value == 3})
    assert given["past_key_values"].layers[0].keys.shape[0] == 3
    torch.manual_seed(1)
    found = prompt.generate(TEXTS[:1], **WRITE | more)
    torch.manual_seed(1)
    assert torch.equal(found, written_by_mask(model, TEXTS[:1], **WRITE | more))


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "qwen3"])
def test_padding_between_gist_and_text_pushes_the_gist_out_of_a_window(name, model_of):
    model, prompt, short = model_of(name), prompt_of(model_of(name)), TEXTS[:1, 4:]
    between = torch.cat([torch.full((1, NUM_TOKENS), GIST), torch.zeros(1, 4, dtype=torch.long), short], 1)
    mask = torch.tensor([[1] * NUM_TOKENS + [0] * 4 + [1] * short.shape[1]])
    expected = written_by_mask(model, short, **WRITE)

    padded = by_hand(model, between, mask, prompt.states.cache(model.config))

    assert not torch.equal(padded, expected)
    whole = torch.ones_like(TEXTS)
    whole[0, :4] = 0
    assert torch.equal(prompt.generate(TEXTS, whole, **WRITE)[:1], expected)


def test_padding_that_is_marked_with_a_token_id_is_seen(model_of):
    """The authors fill the mask on the left with the id of the padding token, which happens to be no number but 0."""
    model, prompt, short = model_of("llama"), prompt_of(model_of("llama")), TEXTS[:1, 4:]
    pad = model.config.eos_token_id  # as theirs is
    ids = torch.cat([torch.full((1, 4), pad), short], 1)
    expected = model.generate(short, attention_mask=torch.ones_like(short), **WRITE)[:, 2:]

    def written(in_front):
        mask = torch.tensor([[in_front] * 4 + [1] * short.shape[1]])
        return model.generate(ids, attention_mask=mask, **WRITE)[:, 6:]

    assert torch.equal(written(0), expected)
    assert not torch.equal(written(pad), expected)
    whole = torch.ones_like(TEXTS)
    whole[0, :4] = 0
    assert set(prompt.generate_kwargs(TEXTS, whole)["attention_mask"].unique().tolist()) == {0, 1}


# --- training -----------------------------------------------------------------------------------------------------


def test_activation_checkpointing_empties_the_cache_between_two_passes_in_silence(toy):
    model = toys.load(toy("llama"))[0].train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    cache = DynamicCache(config=model.config)

    model(input_ids=ROW[:, : BEHIND.start], past_key_values=cache, use_cache=True)

    assert cache.get_seq_length() == 0
    with pytest.raises(PlanError, match="empties the cache"):
        GistSettings(gist=True, gist_impl="two-pass").check(Settings(activation_checkpointing=True))


# --- an encoder and a decoder -------------------------------------------------------------------------------------


def decoded(t5, states, seen):
    with torch.no_grad():
        return t5(encoder_outputs=(states,), attention_mask=seen, decoder_input_ids=ANSWER).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_call_of_t5_gives_the_encoders_mask_to_the_decoder_too(attention, model_of):
    t5, phases = model_of("t5", attention), gist_phases(ROW, [GIST])

    with pytest.raises(RuntimeError, match="must match"):
        t5(input_ids=ROW, attention_mask=encoder_mask(t5.config, phases), decoder_input_ids=ANSWER)

    def ours(condition):
        with torch.no_grad():
            states = encoder_states(t5, ROW, mask=encoder_mask(t5.config, phases, condition=condition))
        return decoded(t5, states, cross_mask(phases, condition=condition))

    with torch.no_grad():
        plain = t5(input_ids=ROW, decoder_input_ids=ANSWER).logits
    torch.testing.assert_close(ours("positive"), plain, rtol=0, atol=ROUNDING)
    assert differs(ours("gist"), plain)


def test_the_encoder_of_t5_throws_a_cache_away_and_its_blocks_do_not(model_of):
    t5, thrown_away, kept = model_of("t5"), DynamicCache(), DynamicCache()

    with torch.no_grad():
        t5.encoder(input_ids=ROW, past_key_values=thrown_away)
        encoder_states(t5, ROW, cache=kept)

    assert thrown_away.get_seq_length() == 0
    assert kept.get_seq_length() == ROW.shape[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_negative_control_of_the_authors_sees_the_padding_and_ours_does_not(attention, model_of):
    """Theirs is 1 up to the last gist token, subtracted from 1: what is no token at all becomes visible."""
    t5, padded = model_of("t5", attention), torch.nn.functional.pad(ROW, (0, 5))
    there = padded != 0
    phases, short = gist_phases(padded, [GIST]), gist_phases(ROW, [GIST])

    def states(ids, phases, padding=None):
        with torch.no_grad():
            mask = encoder_mask(t5.config, phases, condition="negative", padding=padding)
            return encoder_states(t5, ids, mask=mask)

    theirs = 1 - (torch.arange(padded.shape[1]) < BEHIND.start).long()[None]
    alone = decoded(t5, states(ROW, short), cross_mask(short, condition="negative"))
    assert torch.equal(theirs[:, : ROW.shape[1]], cross_mask(short, condition="negative"))

    assert differs(decoded(t5, states(padded, phases, there), theirs), alone)
    ours = decoded(t5, states(padded, phases, there), cross_mask(phases, condition="negative", padding=there))
    torch.testing.assert_close(ours, alone, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_negative_control_of_the_authors_sees_the_prompt_where_there_is_nothing_else(attention, model_of):
    t5, row = model_of("t5", attention), ROW[:, : BEHIND.start]
    theirs = 1 - torch.ones_like(row)

    def run(ids, seen):
        with torch.no_grad():
            return decoded(t5, encoder_states(t5, ids), seen)

    assert differs(run(row, theirs), run(other_prompt(row), theirs))
    with pytest.raises(DataError, match="row 0 has nothing after its gist"):
        cross_mask(gist_phases(row, [GIST]), condition="negative")
