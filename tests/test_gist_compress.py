"""A prompt to the states of a gist, and the proof that they replace it."""

import pytest
import toys
from later import LATER

from surgeon.errors import DataError, VerificationError

if LATER:
    import torch
    from gisted import GIST, PROMPT, compressed

    from surgeon.gist.compress import compress_ids

pytestmark = pytest.mark.usefixtures("one_thread")

MOVED = ("llama", "qwen3", "gemma3_text", "mixtral", "mistral", "gpt_neox", "deepseek_v3", "mpt", "t5")
KEPT = ("gpt2", "opt", "gptj", "hunyuan_v1_dense")  # a table of positions, or a norm behind the rotation


@pytest.mark.parametrize("name", MOVED)
def test_a_gist_lies_at_position_0_and_replaces_its_prompt(name, toy):
    states, check = compressed(toys.load(toy(name))[0])

    assert states.offset == 0
    # Matrices of other shapes are multiplied, in float32: docs/gist.md has what models show, 4e-7 to 2.5e-6.
    assert check.difference <= 1e-5


@pytest.mark.parametrize("name", KEPT)
def test_where_positions_cannot_move_the_gist_stays_where_it_was(name, toy):
    states, check = compressed(toys.load(toy(name))[0])

    assert states.offset == len(PROMPT)
    assert check.difference <= 1e-5  # as above
    assert check.rebased is None or check.rebased > check.allowed


def test_a_rotation_that_changes_with_the_length_is_measured_and_not_moved(tmp_path):
    longrope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, "factor": 4.0,
        "short_factor": [1.0] * 5, "long_factor": [2.0 + i for i in range(5)],
    }  # fmt: skip
    directory = toys.build("phi3", tmp_path / "phi3", rope_parameters=longrope, original_max_position_embeddings=16)
    states, check = compressed(toys.load(directory)[0])

    assert states.offset == len(PROMPT)
    assert check.rebased > 0.01
    assert check.difference <= 1e-5  # as above


@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma3_text"])
def test_a_gist_longer_than_a_sliding_window_is_kept_whole(name, toy):
    model = toys.load(toy(name))[0]
    states, check = compressed(model, num_tokens=model.config.sliding_window + 2)

    assert states.num_tokens == 7
    assert check.difference <= 1e-5  # as above


def test_in_sixteen_bits_the_measure_is_what_any_cache_changes(tmp_path):
    directory = toys.build("llama", tmp_path / "llama", dtype="bfloat16")
    states, check = compressed(toys.load(directory, dtype=torch.bfloat16)[0])

    assert 1e-5 < check.difference <= check.allowed < 0.2
    assert states.layers[0][0].dtype == torch.bfloat16


def test_a_gist_that_does_not_replace_its_prompt_is_refused(toy):
    """The proof can fail: a layer that hands on the sum of what it saw carries the prompt past any mask."""
    model = toys.load(toy("llama"))[0]
    model.model.layers[1].register_forward_hook(lambda _, __, hidden: hidden + hidden.cumsum(1))

    with pytest.raises(VerificationError, match="the cached gist changes what follows by"):
        compressed(model)


def test_a_prompt_that_leaves_no_place_for_a_text_is_refused(toy):
    model = toys.load(toy("gpt2"))[0]

    with pytest.raises(DataError, match="prompt and gist have 64 tokens, and the model sees 64 with what follows"):
        compress_ids(model, [5] * 63 + [GIST], 1)
    assert compress_ids(model, [5] * 62 + [GIST], 1)[0].offset == 62


def test_what_is_compressed_depends_on_the_prompt_alone(toy):
    model = toys.load(toy("llama"))[0]

    one, other = (compressed(model)[0] for _ in range(2))

    assert all(
        torch.equal(a, b) for pair in zip(one.layers, other.layers, strict=True) for a, b in zip(*pair, strict=True)
    )
    different = compress_ids(model, [PROMPT[0] + 1, *PROMPT[1:], GIST], 1)[0]
    assert not torch.equal(different.layers[1][0], compress_ids(model, [*PROMPT, GIST], 1)[0].layers[1][0])
