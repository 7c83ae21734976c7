"""The maps of single axes: reading undoes writing, norms see what they saw, old rotary frequencies stay."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from later import LATER

from surgeon.anatomy.rotary import wider_head
from surgeon.errors import PlanError
from surgeon.transforms.axis_maps import append, isometric_pad, tile, uneven, zero_pad
from surgeon.transforms.grow import grown_size

if LATER:
    import torch
    from transformers import AutoConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

SIZES = st.integers(1, 40)
MORE = st.integers(0, 60)


def matrices(found):
    """Return S, which writes the new axis from the old, and C, which reads it back."""
    size = max(found.index) + 1
    write, read = torch.zeros(len(found.index), size).double(), torch.zeros(size, len(found.index)).double()
    for j, i in enumerate(found.index):
        if i >= 0:
            write[j, i], read[i, j] = found.write[j], found.read[j]
    return write, read


@pytest.mark.parametrize("method", [append, isometric_pad, zero_pad, uneven])
@settings(deadline=None)
@given(size=SIZES, more=MORE)
def test_reading_undoes_writing(method, size, more):
    found = method(size, size + more)

    write, read = matrices(found)

    assert write.shape == (size + more, size)
    # a sum of at most 60 products, each of which rounds: 60 * 2^-53
    torch.testing.assert_close(read @ write, torch.eye(size).double(), rtol=0, atol=1e-14)


@settings(deadline=None)
@given(size=SIZES, times=st.integers(1, 7))
def test_reading_undoes_copying(size, times):
    write, read = matrices(tile(size, times))

    assert write.shape == (size * times, size)
    torch.testing.assert_close(read @ write, torch.eye(size).double(), rtol=0, atol=1e-14)  # 7 roundings


@settings(deadline=None)
@given(size=SIZES, more=MORE)
def test_an_exact_map_is_one_that_keeps_the_mean_square(size, more):
    """S'S = (new / old) I, which is what a norm over the axis asks for. Padding with zeros is not, unless with none."""
    maps = [isometric_pad(size, size + more), zero_pad(size, size + more), uneven(size, size + more)]
    maps += [append(size, size + more), tile(size, 1 + more % 5)]

    for found in maps:
        write, _ = matrices(found)
        expected = len(found.index) / size * torch.eye(size).double()
        assert found.is_exact == torch.allclose(write.T @ write, expected, rtol=1e-12, atol=1e-12)
    assert maps[0].is_exact
    assert maps[1].is_exact == maps[3].is_exact == (more == 0)
    assert maps[2].is_exact == (more % size == 0)
    assert maps[4].is_exact


def test_the_maps_are_what_they_are_called():
    assert tile(2, 3).index == (0, 1, 0, 1, 0, 1)
    assert uneven(3, 5).index == (0, 1, 2, 0, 1)
    assert uneven(3, 5).read == (0.5, 0.5, 1.0, 0.5, 0.5)
    assert append(2, 4).index == isometric_pad(2, 4).index == zero_pad(2, 4).index == (0, 1, -1, -1)
    assert isometric_pad(2, 8).write == (2.0, 2.0, *[0.0] * 6)


def test_only_appended_positions_are_written_before_anyone_reads_them():
    assert not append(2, 4).zeroed
    assert all(found.zeroed for found in (tile(2, 2), isometric_pad(2, 4), zero_pad(2, 4), uneven(2, 3)))


# --- rotary heads ---------------------------------------------------------------------------------------------------

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS = {"default": {}, "linear": {"factor": 3.0}, "llama3": LLAMA3}


def inverse_frequencies(head_dim, scaling="default", share=1.0):
    """Return the inverse frequency of each pair of a head, as transformers computes it."""
    rope = {"rope_type": scaling, "rope_theta": 10000.0, "partial_rotary_factor": share} | SCALINGS[scaling]
    config = AutoConfig.for_model(
        "gpt_neox", hidden_size=8 * head_dim, num_attention_heads=8, max_position_embeddings=256, rope_parameters=rope
    )
    return GPTNeoXRotaryEmbedding(config).inv_freq


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("times", [2, 3, 4])
@pytest.mark.parametrize(("head_dim", "share"), [(10, 1.0), (64, 1.0), (10, 0.4), (64, 0.25), (96, 0.75)])
def test_old_frequencies_are_among_the_new_bit_for_bit(head_dim, share, times, scaling):
    old = inverse_frequencies(head_dim, scaling, share)
    new = inverse_frequencies(head_dim * times, scaling, share)
    half = len(old)

    halves = wider_head(head_dim, 2 * half, times, "halves")
    pairs = wider_head(head_dim, 2 * half, times, "pairs")

    assert len(new) == times * half
    for j, i in enumerate(halves):
        if 0 <= i < 2 * half:
            assert j < 2 * times * half
            assert new[j % (times * half)] == old[i % half]  # dim i rotates with dim i + half
            assert (i < half) == (j < times * half)
    for j, i in enumerate(pairs):
        if 0 <= i < 2 * half:
            assert new[j // 2] == old[i // 2]  # dim 2i rotates with dim 2i + 1
            assert i % 2 == j % 2
    assert sorted(i for i in halves if i >= 0) == sorted(i for i in pairs if i >= 0) == list(range(head_dim))


def test_other_places_have_other_frequencies():
    """What the test above would see: a head whose dims are appended rotates each with a new frequency."""
    old, new = inverse_frequencies(64), inverse_frequencies(128)

    assert not torch.equal(new[:32], old)
    assert torch.equal(new[::2], old)


def test_dims_that_do_not_rotate_follow_those_that_do():
    assert wider_head(6, 4, 2, "halves") == (0, -1, 1, -1, 2, -1, 3, -1, 4, 5, -1, -1)
    assert wider_head(6, 4, 2, "pairs") == (0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1)
    assert wider_head(3, 0, 2, "halves") == (0, 1, 2, -1, -1, -1)


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "expected"),
    [(48, 48), ("48", 48), (100, 100), ("2x", 96), ("3X", 144), (" 2x ", 96), ("1x", 48), ("999999999", 999999999)],
)
def test_a_size_is_a_number_or_a_multiple(request_, expected):
    assert grown_size(request_, 48, "hidden") == expected


@pytest.mark.parametrize(
    "request_",
    ["", "x", "xx", "2xx", "x2", "2.5x", "-2x", "+2x", "1e3", "150%", "٣", "٣x", "2 x", "1" * 10, 2.5, math.nan, True],
)
def test_what_is_no_size_is_refused(request_):
    with pytest.raises(PlanError, match="cannot read .* as a size of hidden") as caught:
        grown_size(request_, 48, "hidden")
    assert caught.value.hint == "Write 768, or 2x."


@pytest.mark.parametrize("request_", [0, 1, 47, "0x"])
def test_a_smaller_size_is_refused(request_):
    with pytest.raises(PlanError, match=r"cannot grow hidden from 48 to \d+"):
        grown_size(request_, 48, "hidden")
