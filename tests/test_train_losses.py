"""Losses in chunks: the same sums and gradients as with whole logits."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
from later import LATER

from surgeon.models.device import LOGITS_BYTES

if LATER:
    import torch
    from torch import Tensor
    from torch.nn import functional

    from surgeon.train.losses import chunk_rows, chunked, hidden_loss, kl, linear_cross_entropy, top_k_kl

pytestmark = pytest.mark.usefixtures("one_thread")

N, D, V = 17, 12, 31
CHUNKS = (1, 5, 16, 17, 100)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype or torch.float64)


def labels() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))


def leaves(dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return states, a weight and a bias to be trained."""
    return [drawn(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate([(N, D), (V, D), (V,)])]


def whole(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight, bias), labels(), reduction="sum")


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_head_gives_the_loss_and_gradients_of_whole_logits(chunk, biased):
    hidden, weight, bias = leaves()
    inputs = [hidden, weight, bias] if biased else [hidden, weight]
    bias = bias if biased else None
    expected = whole(hidden, weight, bias)
    found = linear_cross_entropy(hidden, weight, labels(), bias=bias, chunk=chunk)
    assert found.item() == pytest.approx(expected.item(), rel=1e-14)  # a sum of float64 in another order
    for one, other in zip(
        torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)  # the same


@pytest.mark.parametrize("chunk", CHUNKS)
def test_any_head_gives_the_loss_and_gradients_of_whole_logits(chunk):
    hidden, weight, bias = leaves()

    def capped(states: Tensor, targets: Tensor) -> Tensor:
        logits = 3 * torch.tanh(functional.linear(states, weight, bias) / 3)
        return functional.cross_entropy(logits, targets, reduction="sum")

    expected = capped(hidden, labels())
    (found,) = chunked(capped, hidden, [weight, bias], labels(), chunk=chunk)
    assert found.item() == pytest.approx(expected.item(), rel=1e-14)
    inputs = [hidden, weight, bias]
    for one, other in zip(
        torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)  # sums of float64 in another order


def test_parts_of_a_loss_are_summed_and_have_no_gradients():
    hidden, weight, _ = leaves()

    def parts(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = states @ weight.T
        return scores.square().sum(), scores.sum(), scores.abs().sum()

    loss, total, size = chunked(parts, hidden, [weight], chunk=5)
    expected = parts(hidden)
    for found, wanted in zip((loss, total, size), expected, strict=True):
        assert found.item() == pytest.approx(wanted.item(), rel=1e-13)
    assert (loss.requires_grad, total.requires_grad, size.requires_grad) == (True, False, False)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_what_is_trained_gets_a_gradient(frozen):
    inputs = leaves()
    inputs[frozen].requires_grad_(False)
    hidden, weight, bias = inputs
    linear_cross_entropy(hidden, weight, labels(), bias=bias, chunk=5).backward()
    grads = [tensor.grad for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None

    def loss(states: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(states, weight, bias), targets, reduction="sum")

    chunked(loss, hidden, [weight, bias], labels(), chunk=5)[0].backward()
    for index, (one, other) in enumerate(zip(grads, (tensor.grad for tensor in inputs), strict=True)):
        assert (one is None) == (other is None) == (index == frozen)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)  # sums of float64 in another order


def test_without_gradients_there_is_a_loss_and_nothing_to_go_back_through():
    hidden, weight, bias = leaves()
    with torch.no_grad():
        one = linear_cross_entropy(hidden, weight, labels(), bias=bias, chunk=5)
        (other,) = chunked(lambda x, y: whole_of(x, weight, bias, y), hidden, [weight, bias], labels(), chunk=5)
    assert not one.requires_grad
    assert not other.requires_grad
    assert one.item() == pytest.approx(whole(hidden, weight, bias).item(), rel=1e-14)
    assert other.item() == pytest.approx(one.item(), rel=1e-14)


def whole_of(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight, bias), targets, reduction="sum")


def test_no_tokens_are_a_loss_of_zero_with_gradients_of_zero():
    _, weight, bias = leaves()
    hidden, none = torch.zeros(0, D, dtype=torch.float64, requires_grad=True), labels()[:0]
    one = linear_cross_entropy(hidden, weight, none, bias=bias)
    (other,) = chunked(lambda x, y: whole_of(x, weight, bias, y), hidden, [weight, bias], none, chunk=5)
    for loss in (one, other):
        assert loss.item() == 0
        grads = torch.autograd.grad(loss, [hidden, weight, bias])
        assert [bool((grad == 0).all()) for grad in grads] == [True] * 3


def test_a_second_backward_pass_is_refused():
    hidden, weight, _ = leaves()
    loss = linear_cross_entropy(hidden, weight, labels())
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize("form", ["linear", "chunked"])
def test_under_autocast_products_are_in_bfloat16_and_sums_in_float32(form):
    hidden, weight, _ = leaves(torch.float32)

    def loss(states: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(states, weight).float(), targets, reduction="sum")

    with torch.autocast("cpu", torch.bfloat16):
        expected = loss(hidden, labels())
        if form == "linear":
            found = linear_cross_entropy(hidden, weight, labels(), chunk=5)
        else:
            (found,) = chunked(loss, hidden, [weight], labels(), chunk=5)
    assert found.dtype == torch.float32
    # The logits are the same in bfloat16, up to the order of their sums: a unit of 2^-8 of logits of 10, 17 times.
    assert found.item() == pytest.approx(expected.item(), rel=2e-3)
    grads = torch.autograd.grad(found, [hidden, weight])
    for one, other in zip(grads, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        assert one.dtype == torch.float32
        # Both round what they multiply to 2^-8, at different places.
        assert float((one - other).norm()) < 2**-7 * float(other.norm())


def test_weights_in_bfloat16_get_gradients_in_bfloat16_that_were_summed_in_float32():
    hidden, weight, _ = leaves(torch.bfloat16)
    expected = torch.autograd.grad(whole(hidden.double(), weight.double(), None), [hidden, weight])
    found = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels(), chunk=1), [hidden, weight])
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.double() - other).norm()) < 2**-6 * float(other.norm())  # logits of 10 round by 2^-6


def test_a_chunk_of_logits_takes_no_more_than_its_share():
    for vocab in (7, 32_000, 49_152, 151_936, 256_000, 50_000_000):
        rows = chunk_rows(vocab, torch.device("cpu"))
        assert rows >= 1
        assert rows == 1 or rows * vocab * 4 <= LOGITS_BYTES < (rows + 64) * vocab * 4


@pytest.mark.parametrize(("gigabytes", "most", "least"), [(141, 1 << 30, 1024), (8, 1 << 28, 256), (1, 64 << 20, 64)])
def test_a_gpu_takes_larger_chunks_where_it_has_the_memory(gigabytes, most, least, monkeypatch):
    properties = SimpleNamespace(total_memory=gigabytes << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    rows = chunk_rows(256_000, torch.device("cuda:0"))
    assert rows >= least
    assert rows * 256_000 * 4 <= most
    halved = chunk_rows(256_000, torch.device("cuda:0"), models=2)
    assert halved * 256_000 * 4 <= max(most / 2, LOGITS_BYTES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_chunk_gives_the_same_loss_and_gradients(dtype):
    dtype = getattr(torch, dtype)
    hidden, weight = drawn(700, 16, dtype=dtype).requires_grad_(), drawn(90, 16, seed=1, dtype=dtype).requires_grad_()
    targets = torch.randint(0, 90, (700,), generator=torch.Generator().manual_seed(1))
    results = []
    for chunk in (64, 512, 4096):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
        results.append([loss.detach(), *torch.autograd.grad(loss, [hidden, weight])])

    # In bfloat16 a chunk's gradient of the head is rounded before it is added to the others, and their sum once more.
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-21
    for result in results[1:]:
        assert float(result[0]) == pytest.approx(float(results[0][0]), rel=1e-6)  # a sum of float32 in another order
        assert torch.equal(result[1], results[0][1])  # each token's own
        assert float((result[2] - results[0][2]).norm()) <= 2 * unit * float(result[2].norm())


# Divergences


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_divergence_is_that_of_the_definition(temperature):
    student, teacher = drawn(N, V, seed=1), drawn(N, V, seed=2)
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    forward = kl(student, teacher, temperature=temperature, direction="forward")
    reverse = kl(student, teacher, temperature=temperature, direction="reverse")
    assert forward.item() == pytest.approx(float((p * (p / q).log()).sum()) * temperature**2, rel=1e-12)
    assert reverse.item() == pytest.approx(float((q * (q / p).log()).sum()) * temperature**2, rel=1e-12)
    assert forward.item() > 0
    assert forward.item() != pytest.approx(reverse.item(), rel=1e-3)


def test_a_hot_divergence_pulls_as_the_difference_of_logits():
    # Hinton et al. 2015, section 2.1: for large T the gradient is (student - teacher) / V, of logits of mean zero.
    student, teacher = drawn(N, V, seed=1).requires_grad_(), drawn(N, V, seed=2)
    kl(student, teacher, temperature=1e4, direction="forward").backward()
    expected = (student - teacher).detach() / V
    expected -= expected.mean(-1, keepdim=True)
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-4)  # what is left out is of order logits / T


def likeliest(teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    values, ids = (teacher / temperature).log_softmax(-1).topk(k)
    return ids, values


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_likeliest_tokens_of_all_are_the_whole_divergence(direction):
    student, teacher = drawn(N, V, seed=1).requires_grad_(), drawn(N, V, seed=2)
    ids, log_probs = likeliest(teacher, V, 2.0)
    found = top_k_kl(student, ids, log_probs, temperature=2.0, direction=direction)
    expected = kl(student, teacher, temperature=2.0, direction=direction)
    assert found.item() == pytest.approx(expected.item(), rel=1e-13)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (found, expected)))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_more_of_the_likeliest_tokens_never_make_the_divergence_less(direction):
    student, teacher = drawn(N, V, seed=1), drawn(N, V, seed=2)
    found = [
        top_k_kl(student, *likeliest(teacher, k, 1.0), temperature=1.0, direction=direction).item()
        for k in range(1, V + 1)
    ]
    steps = [after - before for before, after in pairwise(found)]
    assert min(steps) > -1e-12  # rounding of float64: a bucket with one token in it is no bucket
    assert 0 < found[0] < found[-1]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_student_that_agrees_with_its_teacher_diverges_by_nothing(direction):
    teacher = drawn(N, V).requires_grad_()
    for k in (1, 5, V):
        ids, log_probs = likeliest(teacher.detach(), k, 1.0)
        found = top_k_kl(teacher, ids, log_probs, temperature=1.0, direction=direction)
        (grad,) = torch.autograd.grad(found, teacher)
        assert abs(found.item()) < 1e-12  # rounding of float64, 17 tokens
        assert float(grad.abs().max()) < 1e-12  # the same


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_teacher_that_is_certain_has_a_finite_divergence_and_gradient(direction):
    student, teacher = drawn(N, V, dtype=torch.float32).requires_grad_(), torch.zeros(N, V)
    teacher[:, 3] = 200.0
    found = top_k_kl(student, *likeliest(teacher, 4, 1.0), temperature=1.0, direction=direction)
    found.backward()
    assert bool(found.isfinite())
    assert bool(student.grad.isfinite().all())


# Hidden states


def test_the_error_of_states_is_relative_to_each_teachers_state():
    student, teacher = drawn(N, D, seed=1), drawn(N, D, seed=2)
    expected = sum(float((s - t).square().sum() / t.square().sum()) for s, t in zip(student, teacher, strict=True))
    assert hidden_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    scale = 1 + 100 * torch.rand(N, 1, dtype=torch.float64)
    assert hidden_loss(student * scale, teacher * scale).item() == pytest.approx(expected, rel=1e-12)
    assert hidden_loss(torch.zeros(N, D), teacher.float()).item() == pytest.approx(N, rel=1e-6)
    assert hidden_loss(teacher, teacher).item() == 0
