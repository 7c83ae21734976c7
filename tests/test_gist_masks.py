"""Gist masks: the rule in truth tables, the traps as what goes wrong without, on models of every kind of mask."""

import shutil

import pytest
import toys
from later import LATER

from surgeon.errors import DataError, PlanError

if LATER:
    import torch
    from transformers import masking_utils
    from transformers.masking_utils import create_masks_for_generate

    from surgeon.gist.masks import (
        AFTER,
        GIST,
        PROMPT,
        cross_mask,
        encoder_mask,
        gist_masks,
        gist_phases,
    )
    from surgeon.gist.states import encoder_states
    from surgeon.models.split import document_numbers

G = 130  # the id of the gist token
ROW = [7, 8, 9, G, G, 4, 5]  # prompt 3, gist 2, input 2
# float32 rounding of logits of order 1, where matrices of another shape are multiplied: measured up to 3e-6.
ROUNDING = 1e-5

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(toy):
    """Return a function from a toy's name, and an attention implementation, to the loaded model."""
    loaded = {}

    def load(name, attention="sdpa"):
        if (name, attention) not in loaded:
            loaded[name, attention] = toys.load(toy(name), attn_implementation=attention)[0]
        return loaded[name, attention]

    return load


def ids_of(*rows):
    return torch.tensor(rows)


def drawn(length, seed=0):
    return torch.randint(3, 100, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits(model, ids, masks, positions=None):
    positions = torch.arange(ids.shape[1])[None] if positions is None else positions
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=masks, position_ids=positions, use_cache=False).logits


def table(mask):
    """Return a bool mask of one row as lines of 1 and 0."""
    return ["".join("1" if seen else "0" for seen in line) for line in mask[0, 0].tolist()]


# --- phases -----------------------------------------------------------------------------------------------------


def test_a_token_is_before_in_or_after_the_gist():
    assert gist_phases(ids_of(ROW), [G]).tolist() == [[PROMPT] * 3 + [GIST] * 2 + [AFTER] * 2]


def test_phases_begin_anew_in_each_document():
    ids = ids_of([7, G, 4, 7, 8, G, G, 4, 5, 6])
    positions = ids_of([0, 1, 2, 0, 1, 2, 3, 4, 0, 1])

    phases = gist_phases(ids, [G], documents=document_numbers(positions))

    # The last document has no gist: nothing is restricted in it.
    assert phases.tolist() == [[PROMPT, GIST, AFTER, PROMPT, PROMPT, GIST, GIST, AFTER, GIST, GIST]]


def test_a_row_without_a_gist_is_not_restricted():
    assert gist_phases(ids_of([7, 8, 9], [7, G, 9]), [G]).tolist() == [[GIST] * 3, [PROMPT, GIST, AFTER]]


def test_distinct_gist_tokens_are_one_gist():
    assert gist_phases(ids_of([7, 128, 129, 130, 4]), [128, 129, 130]).tolist() == [[PROMPT, GIST, GIST, GIST, AFTER]]


def test_gist_tokens_that_are_apart_are_refused_with_their_row():
    with pytest.raises(DataError, match="row 1 has gist tokens apart"):
        gist_phases(ids_of([7, G, G, 4], [7, G, 4, G]), [G])


def test_gists_of_two_documents_are_not_apart():
    documents = ids_of([1, 1, 1, 2, 2, 2])

    assert gist_phases(ids_of([7, G, 4, 7, G, 4]), [G], documents=documents).tolist() == [[0, 1, 2, 0, 1, 2]]


# --- the rule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("gist", ["1000000", "1100000", "1110000", "1111000", "1111100", "0001110", "0001111"]),
        ("negative", ["1000000", "1100000", "1110000", "1111000", "1111100", "0000010", "0000011"]),
        ("positive", ["1000000", "1100000", "1110000", "1111000", "1111100", "1111110", "1111111"]),
    ],
)
def test_a_decoder_sees_what_the_paper_says(condition, expected, model):
    assert table(gist_masks(model("llama").config, gist_phases(ids_of(ROW), [G]), condition=condition)) == expected


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("gist", ["1111100"] * 5 + ["0001111"] * 2),
        ("negative", ["1111100"] * 5 + ["0000011"] * 2),
        ("positive", ["1111111"] * 7),
    ],
)
def test_an_encoder_sees_what_the_paper_says(condition, expected, model):
    assert table(encoder_mask(model("t5").config, gist_phases(ids_of(ROW), [G]), condition=condition)) == expected


def test_a_row_without_a_gist_has_the_plain_masks(model):
    phases = gist_phases(ids_of([7, 8, 9]), [G])

    assert table(gist_masks(model("llama").config, phases)) == ["100", "110", "111"]
    assert table(encoder_mask(model("t5").config, phases)) == ["111"] * 3


def test_an_unknown_condition_is_refused(model):
    phases = gist_phases(ids_of(ROW), [G])

    for made in (
        lambda: gist_masks(model("llama").config, phases, condition="neg"),
        lambda: encoder_mask(model("t5").config, phases, condition="neg"),
        lambda: cross_mask(phases, condition="neg"),
    ):
        with pytest.raises(PlanError, match="unknown condition 'neg'"):
            made()


def test_attention_that_takes_no_masks_is_refused(model):
    config = type(model("llama").config)()
    config._attn_implementation = "flash_attention_2"

    with pytest.raises(PlanError, match="flash_attention_2 attention takes no gist mask"):
        gist_masks(config, gist_phases(ids_of(ROW), [G]))


# --- one mask in all implementations ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mistral", "qwen3"])
def test_sdpa_and_eager_compute_the_same(name, model):
    ids = ids_of([*drawn(12), G, G, *drawn(8, seed=1)])
    phases = gist_phases(ids, [G])

    one, other = (
        logits(model(name, attention), ids, gist_masks(model(name, attention).config, phases))
        for attention in ("sdpa", "eager")
    )

    torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING)


def test_flex_attention_gets_a_mask_of_its_own_that_says_the_same(model):
    config = model("llama", "flex_attention").config
    phases = gist_phases(ids_of([*drawn(150), G, *drawn(105, seed=1)]), [G])  # two blocks of 128

    block = gist_masks(config, phases)

    q, k = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    said = block.mask_mod(torch.tensor(0), torch.tensor(0), q, k)
    assert torch.equal(said, gist_masks(model("llama").config, phases)[0, 0])
    # The upper right block is above the diagonal, so that no kernel need look at it.
    assert block.to_dense()[0, 0].tolist() == [[1, 0], [1, 1]]


if LATER:
    FLEX_ROW = [*drawn(150), G, G, *drawn(60, seed=1)]  # two blocks of 128


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral", "qwen3"])
def test_flex_attention_computes_what_sdpa_does(name, model):
    """Without its kernel, which takes long to compile: flex attention then computes the same from the same mask."""
    ids = ids_of(FLEX_ROW)
    phases = gist_phases(ids, [G])

    flex, sdpa = model(name, "flex_attention"), model(name)
    with torch.compiler.set_stance("force_eager"):
        found = logits(flex, ids, gist_masks(flex.config, phases))

    torch.testing.assert_close(found, logits(sdpa, ids, gist_masks(sdpa.config, phases)), rtol=0, atol=ROUNDING)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles kernels for a CPU with g++")
@pytest.mark.timeout(600)  # 20 s of computing for the kernels of two layers; minutes on a machine that has other work
def test_the_kernel_of_flex_attention_computes_what_sdpa_does(tmp_path):
    kinds = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    directory = toys.build("gemma3_text", tmp_path / "gemma", **kinds)
    ids = ids_of(FLEX_ROW)
    found = []
    for attention in ("flex_attention", "sdpa"):
        loaded = toys.load(directory, attn_implementation=attention)[0]
        found.append(logits(loaded, ids, gist_masks(loaded.config, gist_phases(ids, [G]))))

    torch.testing.assert_close(*found, rtol=0, atol=ROUNDING)


def test_a_model_with_kinds_of_layers_gets_a_mask_for_each(model):
    masks = gist_masks(model("gemma3_text").config, gist_phases(ids_of([*drawn(8), G, *drawn(5)]), [G]))

    assert masks.keys() == {"full_attention", "sliding_attention"}
    assert not torch.equal(masks["full_attention"], masks["sliding_attention"])


# --- packing and padding ----------------------------------------------------------------------------------------

if LATER:
    TASKS = [[*drawn(9), G, G, *drawn(6, seed=1)], [*drawn(4, seed=2), G, *drawn(7, seed=3)], drawn(5, seed=4)]


def packed():
    ids = torch.tensor([[token for task in TASKS for token in task]])
    positions = torch.cat([torch.arange(len(task)) for task in TASKS])[None]
    return ids, positions, document_numbers(positions)


def alone(model, condition="gist"):
    return torch.cat(
        [logits(model, ids_of(t), gist_masks(model.config, gist_phases(ids_of(t), [G]), condition=condition))
         for t in TASKS],
        1,
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("condition", ["gist", "negative", "positive"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mistral", "qwen3"])
def test_packed_documents_compute_what_each_computes_alone(name, condition, attention, model):
    ids, positions, documents = packed()
    phases = gist_phases(ids, [G], documents=documents)

    masks = gist_masks(model(name, attention).config, phases, condition=condition, documents=documents)

    torch.testing.assert_close(
        logits(model(name, attention), ids, masks, positions),
        alone(model(name, attention), condition),
        rtol=0,
        atol=ROUNDING,
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mistral"])
def test_padding_changes_nothing_on_either_side(name, attention, side, model):
    pad = 7
    task = TASKS[0]
    row = [0] * pad + task if side == "left" else task + [0] * pad
    there = torch.zeros(1, len(row), dtype=torch.bool)
    there[:, slice(pad, None) if side == "left" else slice(len(task))] = True
    positions = (there.cumsum(-1) - 1).clamp(min=0)
    loaded = model(name, attention)

    phases = gist_phases(ids_of(row), [G])
    found = logits(loaded, ids_of(row), gist_masks(loaded.config, phases, padding=there), positions)

    expected = logits(loaded, ids_of(task), gist_masks(loaded.config, gist_phases(ids_of(task), [G])))
    torch.testing.assert_close(found[there][None], expected, rtol=0, atol=ROUNDING)


# --- the traps: each must go wrong, or the way around it is not needed any more ---------------------------------


def differs(one, other):
    return (one - other).abs().max() > 0.05  # logits are of order 1; rounding is 1e-6


def test_without_the_mask_the_prompt_is_seen(model):
    ids = ids_of(TASKS[0])
    phases = gist_phases(ids, [G])
    config = model("llama").config

    assert differs(logits(model("llama"), ids, gist_masks(config, phases)), logits(model("llama"), ids, None))


def test_trap_a_bool_mask_is_added_by_eager_attention_without_an_error(model):
    ids = ids_of(TASKS[0])
    phases = gist_phases(ids, [G])
    by_hand = gist_masks(model("llama", "sdpa").config, phases)
    eager = model("llama", "eager")

    assert by_hand.dtype == torch.bool
    assert differs(logits(eager, ids, by_hand), logits(eager, ids, gist_masks(eager.config, phases)))
    assert gist_masks(eager.config, phases).dtype == torch.float32


def test_trap_one_mask_for_all_layers_takes_the_window_from_sliding_ones(model):
    ids = ids_of(TASKS[0])
    masks = gist_masks(model("gemma3_text").config, gist_phases(ids, [G]))

    assert differs(logits(model("gemma3_text"), ids, masks["full_attention"]), logits(model("gemma3_text"), ids, masks))


def test_trap_a_model_with_one_kind_of_layers_takes_no_masks_by_kind(model):
    ids = ids_of(TASKS[0])
    mask = gist_masks(model("llama").config, gist_phases(ids, [G]))

    assert isinstance(mask, torch.Tensor)
    with pytest.raises(AttributeError):
        logits(model("llama"), ids, {"full_attention": mask})


def test_trap_a_kind_of_layers_that_is_missing_is_no_silent_default(model):
    ids = ids_of(TASKS[0])
    masks = gist_masks(model("gemma3_text").config, gist_phases(ids, [G]))

    with pytest.raises(KeyError):
        logits(model("gemma3_text"), ids, {"full_attention": masks["full_attention"]})


def test_trap_the_builder_renumbers_tokens_when_it_is_told_positions(model):
    ids, positions, documents = packed()
    phases = gist_phases(ids, [G], documents=documents)
    config = model("llama").config

    def rule(row, head, q, k):
        return ~((phases[row, q] == AFTER) & (phases[row, k] == PROMPT)) & (documents[row, q] == documents[row, k])

    embeddings = torch.empty(1, ids.shape[1], 0)
    told = create_masks_for_generate(config, embeddings, None, None, position_ids=positions, and_mask_function=rule)

    ours = gist_masks(config, phases, documents=documents)
    if not hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # in 5.16 there is no such thing yet
        assert torch.equal(told, ours)
        pytest.skip("this transformers does not number tokens anew, so that the trap is not there")
    assert not torch.equal(told, ours)


def test_trap_a_mask_of_four_dimensions_leaves_positions_to_the_caller(model):
    row = [0] * 7 + TASKS[0]
    there = torch.tensor([[False] * 7 + [True] * len(TASKS[0])])
    masks = gist_masks(model("gpt2").config, gist_phases(ids_of(row), [G]), padding=there)

    positions = (there.cumsum(-1) - 1).clamp(min=0)
    right = logits(model("gpt2"), ids_of(row), masks, positions)
    assert differs(right[:, 7:], logits(model("gpt2"), ids_of(row), masks)[:, 7:])


# --- encoder and decoder ----------------------------------------------------------------------------------------


def test_a_decoder_sees_of_the_encoder_what_the_paper_says():
    phases = gist_phases(ids_of([*ROW, 0]), [G])
    there = ids_of([1, 1, 1, 1, 1, 1, 1, 0])

    assert cross_mask(phases, padding=there).tolist() == [[0, 0, 0, 1, 1, 1, 1, 0]]
    assert cross_mask(phases, condition="negative", padding=there).tolist() == [[0, 0, 0, 0, 0, 1, 1, 0]]
    assert cross_mask(phases, condition="positive", padding=there).tolist() == [[1, 1, 1, 1, 1, 1, 1, 0]]


def test_where_nothing_follows_the_gist_the_negative_control_sees_one_padding_token_and_no_prompt():
    """The authors' mask is empty there, which is attention to everything, or shows all padding."""
    phases = gist_phases(ids_of([7, 8, G, 0, 0]), [G])

    assert cross_mask(phases, condition="negative", padding=ids_of([1, 1, 1, 0, 0])).tolist() == [[0, 0, 0, 1, 0]]
    with pytest.raises(DataError, match="row 0 has nothing after its gist"):
        cross_mask(gist_phases(ids_of([7, 8, G]), [G]), condition="negative")


def t5_logits(model, ids, there, condition):
    phases = gist_phases(ids, [G])
    mask = encoder_mask(model.config, phases, condition=condition, padding=there)
    with torch.no_grad():
        states = encoder_states(model, ids, mask=mask)
        seen = cross_mask(phases, condition=condition, padding=there)
        return model(encoder_outputs=(states,), attention_mask=seen, decoder_input_ids=ids_of([0, 5, 6])).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_negative_control_of_an_encoder_decoder_never_sees_the_prompt(attention, model):
    t5 = model("t5", attention)
    for row in ([7, 8, 9, G, 0, 0], [7, 8, 9, G, 4, 5, 0]):
        there = ids_of([int(i != 0) for i in row])
        other = [17, 18, 19, *row[3:]]

        one, two = (t5_logits(t5, ids_of(r), there, "negative") for r in (row, other))

        assert torch.equal(one, two)
        assert one.isfinite().all()
        assert differs(*(t5_logits(t5, ids_of(r), there, "gist") for r in (row, other)))  # the gist does see it


def test_trap_an_empty_cross_mask_is_attention_to_the_prompt(model):
    t5 = model("t5", "eager")

    def run(row):
        with torch.no_grad():
            states = encoder_states(t5, ids_of(row), mask=None)
            nothing = torch.zeros(1, len(row), dtype=torch.long)
            return t5(encoder_outputs=(states,), attention_mask=nothing, decoder_input_ids=ids_of([0, 5, 6])).logits

    assert differs(run([7, 8, 9, G]), run([17, 18, 19, G]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_behind_an_encoders_text_changes_nothing(attention, model):
    t5 = model("t5", attention)
    row, pad = [*drawn(6), G, G, *drawn(4, seed=1)], 5

    plain = t5_logits(t5, ids_of(row), torch.ones(1, len(row), dtype=torch.bool), "gist")
    there = ids_of([1] * len(row) + [0] * pad).bool()
    padded = t5_logits(t5, ids_of([*row, *[0] * pad]), there, "gist")

    torch.testing.assert_close(padded, plain, rtol=0, atol=ROUNDING)


def test_without_a_gist_an_encoder_computes_what_it_always_does(model):
    t5, ids = model("t5"), ids_of(drawn(9))
    there = torch.ones_like(ids, dtype=torch.bool)

    with torch.no_grad():
        plain = t5(input_ids=ids, decoder_input_ids=ids_of([0, 5, 6])).logits

    torch.testing.assert_close(t5_logits(t5, ids, there, "gist"), plain, rtol=0, atol=ROUNDING)
