"""Losses of hidden states before a head, chunk by chunk: the logits of all tokens never exist at once.

Gradients are computed in the forward pass, together with a chunk's logits, so no logits are stored or recomputed; the
backward pass only scales them. Every loss is a sum over tokens, which the caller divides.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgeon.models.device import logits_bytes, without_autocast

Direction = Literal["forward", "reverse"]

_16_BITS = (torch.bfloat16, torch.float16)
LEAST_REST = 1e-7  # by so much a sum of probabilities in float32 may round below 1: half a unit in the last place


def chunk_rows(vocab: int, device: torch.device, *, models: int = 1) -> int:
    """Return for how many tokens logits exist at once on a device: as `logits_bytes` allows, or a little less.

    With `models` = 2 a teacher's logits exist beside the student's.
    """
    rows = logits_bytes(str(device), models) // (4 * vocab)
    return rows // 64 * 64 if rows >= 64 else max(1, rows)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which to sum numbers of `dtype`: float32 for 16 bits, else itself."""
    return torch.float32 if dtype in _16_BITS else dtype


# --- a linear head --------------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """Return the sum of the tokens' losses in nats, a scalar in float32 (float64 for states in float64).

    `hidden` has shape (N, D), `weight` (V, D), `labels` (N,), all of them ids. Under autocast, matrices are multiplied
    in its dtype and summed over the chunks in float32. Allows one backward pass.
    """
    chunk = chunk or chunk_rows(len(weight), hidden.device)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, chunk, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int, differentiable: bool
    ) -> Tensor:
        dtype = _matrix_dtype(hidden)
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        needed = [differentiable and need for need in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if needed[0] else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype(dtype)) if needed[1] else None
        grad_bias = torch.zeros_like(bias, dtype=sum_dtype(dtype)) if needed[2] and bias is not None else None
        total = torch.zeros((), dtype=sum_dtype(dtype), device=hidden.device)
        for rows in _chunks(len(hidden), chunk):
            states, target = hidden[rows].to(dtype), labels[rows, None]
            logits = nn.functional.linear(states, matrix, offset).to(sum_dtype(dtype))  # those of 16 bits are free now
            scores = torch.log_softmax(logits, -1)
            del logits
            total -= scores.gather(1, target).sum()
            if not any(needed):
                continue
            wide_grad = scores.exp_()  # of the logits: the probabilities, less 1 at the label
            wide_grad.scatter_add_(1, target, wide_grad.new_full((1, 1), -1.0).expand_as(target))
            if grad_bias is not None:
                grad_bias += wide_grad.sum(0)
            grad = wide_grad.to(dtype)
            del scores, wide_grad  # of 16 bits no float32 copy is needed for the products
            if grad_hidden is not None:
                torch.mm(grad, matrix, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), states)
            del grad  # before the next chunk's logits
        ctx.grads = [grad_hidden, grad_weight, grad_bias]
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        return total

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, scales[0]), None, None, None)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of matrices to a sum that may be wider than they are."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif adds_wide(left.device, left.dtype):  # the product itself is never written
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


@cache
def adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a device adds products of 16 bits to a sum in float32, in one kernel, tried on small matrices.

    Only CUDA can, and not with every torch: some refuse the arguments. What the kernel gives is compared here, because
    it was not run on a card yet.
    """
    if device.type != "cuda":
        return device.type == "meta"  # which counts for a GPU
    left, total = torch.ones(16, 8, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, left, left.t(), out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 9).all())


def _matrix_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which matrices are multiplied: that of autocast where it is on, else that of the states."""
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):  # autocast leaves float64 alone
        return hidden.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


# --- any head -------------------------------------------------------------------------------------------------


def chunked(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    hidden: Tensor,
    parameters: Sequence[Tensor],
    *per_token: Tensor,
    chunk: int,
) -> tuple[Tensor, ...]:
    """Return the results of `function`, summed over chunks of tokens: a differentiable loss, and detached sums.

    `function` takes a chunk of `hidden`, shape (n, D), and of each of `per_token`, and returns one or more scalars that
    are sums over tokens. The first has gradients with respect to `hidden` and to the `parameters` that it uses. All are
    inputs and outputs of one node, so hooks on parameters fire as usual. Allows one backward pass.
    """
    differentiable = torch.is_grad_enabled()
    arguments = (function, chunk, differentiable, len(parameters), hidden, *parameters, *per_token)
    sums: tuple[Tensor, ...] = _Chunked.apply(*arguments)  # type: ignore[no-untyped-call]
    return sums


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Any],
        chunk: int,
        differentiable: bool,
        num_parameters: int,
        hidden: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        parameters, per_token = tensors[:num_parameters], tensors[num_parameters:]
        needed = [differentiable and need for need in ctx.needs_input_grad[4 : 5 + num_parameters]]
        trained = [parameter for parameter, need in zip(parameters, needed[1:], strict=True) if need]
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        grads: list[Tensor | None] = [None for _ in trained]
        sums: list[Tensor] = []
        for rows in _chunks(len(hidden), chunk):
            with torch.set_grad_enabled(any(needed)):
                states = hidden[rows].detach().requires_grad_(needed[0])
                results = function(states, *(tensor[rows] for tensor in per_token))
                loss, *parts = results if isinstance(results, tuple) else (results,)
            if any(needed):
                inputs = [states, *trained] if needed[0] else trained
                with without_autocast(hidden.device.type):  # as in a backward pass
                    new = list(torch.autograd.grad(loss, inputs, allow_unused=True))
                if grad_hidden is not None:
                    grad_hidden[rows] = new.pop(0)
                grads = [_added(before, grad) for before, grad in zip(grads, new, strict=True)]
            values = [part.detach() for part in (loss, *parts)]
            sums = [before + value for before, value in zip(sums, values, strict=True)] if sums else values
        remaining = iter(grads)
        ctx.grads = [grad_hidden, *(next(remaining) if need else None for need in needed[1:])]
        ctx.dtypes = [hidden.dtype, *(parameter.dtype for parameter in parameters)]
        ctx.num_per_token = len(per_token)
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, *_scaled(ctx, scales[0]), *(None for _ in range(ctx.num_per_token)))


def _added(before: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Return a sum of gradients, in float32 or wider."""
    if grad is None:
        return before
    return grad.to(sum_dtype(grad.dtype)) if before is None else before.add_(grad)


def _chunks(num_rows: int, chunk: int) -> Iterator[slice]:
    """Yield the rows of each chunk; without rows one empty chunk, so that an empty sum is a zero."""
    for start in range(0, max(num_rows, 1), chunk):
        yield slice(start, min(start + chunk, num_rows))


def _scaled(ctx: Any, scale: Tensor) -> list[Tensor | None]:
    """Return the gradients of the forward pass times the incoming gradient; in place, for they are used once."""
    assert ctx.grads is not None, "a second backward pass through a loss that stores no logits"
    grads, ctx.grads = ctx.grads, None
    return [None if grad is None else grad.mul_(scale).to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]


# --- between a student and its teacher ------------------------------------------------------------------------


def kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, direction: Direction) -> Tensor:
    """Return the divergence of the distributions at a temperature, summed over tokens, times its square; in float32.

    `forward` is KL(teacher || student), `reverse` KL(student || teacher). Both logits have shape (N, V).
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2: gradients of soft targets scale with 1/T².
    """
    student, teacher = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    target, other = (teacher, student) if direction == "forward" else (student, teacher)
    return (target.exp() * (target - other)).sum() * temperature**2


def top_k_kl(
    student_logits: Tensor, ids: Tensor, log_probs: Tensor, *, temperature: float, direction: Direction
) -> Tensor:
    """Return `kl` to a teacher of which only the k likeliest tokens are known: all other tokens are one bucket.

    `ids` and `log_probs`, shape (N, k), are its largest log-probabilities at that temperature. The teacher's
    probability of the bucket is 1 minus their sum, the student's the sum over all its other tokens. Only the divergence
    within the bucket is lost, so this is at most the whole divergence, zero only for a student that agrees on the k and
    on the rest as a whole, and exact for k = V.
    """
    all_student = _log_softmax(student_logits, temperature)
    student, teacher = all_student.gather(1, ids), log_probs.to(all_student.dtype)
    if ids.shape[1] < all_student.shape[1]:
        student_rest = all_student.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        teacher_rest = (1 - teacher.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST).log()
        student, teacher = torch.cat([student, student_rest], 1), torch.cat([teacher, teacher_rest], 1)
    target, other = (teacher, student) if direction == "forward" else (student, teacher)
    return (target.exp() * (target - other)).sum() * temperature**2


def hidden_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared error of states, shape (N, D), per token relative to the teacher's square, summed over N.

    It is relative, because a residual stream grows with depth and has tokens hundreds of times larger than others. It
    is per token, because a mean over the batch would make the gradient depend on how the batch was cut.
    """
    dtype = sum_dtype(student.dtype)
    student, teacher = student.to(dtype), teacher.to(dtype)
    least = torch.finfo(dtype).tiny  # for a state of zeros
    return ((student - teacher).square().mean(-1) / teacher.square().mean(-1).clamp(min=least)).sum()


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.to(sum_dtype(logits.dtype))
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)
