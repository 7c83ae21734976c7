"""Maps and mixtures in plans: products of matrices whose bytes depend on no order of their sums."""

import pytest
from later import LATER

from surgeon.errors import PlanError
from surgeon.plan.expressions import Mapped, Read, Weighted, describe
from surgeon.plan.plan import infer, reads, substitute
from surgeon.plan.solved import RepairsFile

if LATER:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from surgeon.plan.arithmetic import Arithmetic
    from surgeon.plan.products import mapped, product

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_product_is_the_same_in_any_order_and_close_to_the_true_one():
    draw = np.random.default_rng(0)
    left, right = draw.normal(size=(20, 577)), draw.normal(size=(577, 30)) * 1e-30
    order = draw.permutation(577)

    made = product(left, right)

    assert np.array_equal(made, product(left[:, order], right[order]))
    assert np.array_equal(made[:, 3:9], product(left, right[:, 3:9]))
    assert np.abs(made - left @ right).max() <= 577 * 2.0**-40 * np.abs(left).max() * np.abs(right).max()
    assert not product(np.zeros((2, 3)), right[:3]).any()


@pytest.mark.parametrize("dim", [0, 1])
def test_a_map_and_a_mixture_are_what_their_words_say(dim, tmp_path):
    draw = torch.Generator().manual_seed(0)
    shape = [5, 5]
    shape[dim] = 2 * 3 * 4
    tensors = {"a": torch.randn(shape, generator=draw), "b": torch.randn(shape, generator=draw)}
    tensors |= {"m": torch.randn(6, 3, generator=draw), "w": torch.randn(2, 2, generator=draw)}
    save_file(tensors, tmp_path / "model.safetensors")
    file = RepairsFile(tmp_path, "a test", "model.safetensors")
    mixed = Weighted((Read("a"), Read("b")), Read("w"), 1)
    expr = Mapped(mixed, Read("m"), dim, 4)
    specs = {name: item.spec for name, item in file.tensors.items()}
    everything = {"model.safetensors": [(0, (tmp_path / "model.safetensors").stat().st_size)]}

    made = Arithmetic(file.tensors, file.parts(everything)).tensor(expr)

    summed = tensors["w"][1, 0] * tensors["a"] + tensors["w"][1, 1] * tensors["b"]
    blocks = summed.movedim(dim, 0).reshape(2, 3, 4, 5)
    wanted = torch.einsum("ji,sikx->sjkx", tensors["m"], blocks).reshape(48, 5).movedim(0, dim)
    assert torch.allclose(made, wanted, atol=1e-5)
    assert torch.equal(mapped(summed, tensors["m"], dim, 4), made)
    assert infer(expr, specs).shape == made.shape
    assert reads(expr) == ("a", "b", "w", "m")
    assert substitute(expr, lambda name: Read(name.upper())).matrix == Read("M")
    assert describe(expr) == f"map(mix(a, b: row 1 of w), dim {dim} in blocks of 4: m)"
    with pytest.raises(PlanError, match="cannot mix 1 tensors by row 1"):
        infer(Weighted((Read("a"),), Read("w"), 1), specs)
    with pytest.raises(PlanError, match="cannot map blocks of 3 x 5"):
        infer(Mapped(mixed, Read("m"), dim, 5), specs)
