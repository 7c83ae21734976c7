"""Bytes: what a loss reads, writes and holds is what its arithmetic needs, counted kernel by kernel without a GPU."""

from __future__ import annotations

import pytest
from later import LATER

from surgeon.cost.memory import DISTILLED_LOGIT_BYTES, LOGIT_BYTES
from surgeon.models.device import LOGITS_BYTES, LOGITS_BYTES_GPU

if LATER:
    import torch
    from torch import Tensor, nn
    from traffic import Traffic
    from transformers import LlamaConfig, LlamaModel

    from surgeon.train.losses import chunked, kl, linear_cross_entropy

TOKENS = 32_768  # a batch of 8 sequences of 4096


def rows_of(vocab: int, nbytes: int) -> int:
    """Return for how many tokens so many bytes of logits are."""
    return nbytes // (4 * vocab) // 64 * 64


def counted(vocab: int, width: int, tokens: int, chunk: int, dtype: torch.dtype) -> Traffic:
    """Return the traffic of a loss with its gradients, of states of `dtype` and a head in float32."""
    hidden = torch.empty(tokens, width, device="meta", dtype=dtype, requires_grad=True)
    head = torch.empty(vocab, width, device="meta", requires_grad=True)
    labels = torch.empty(tokens, device="meta", dtype=torch.long)
    with Traffic() as traffic:
        linear_cross_entropy(hidden, head, labels, chunk=chunk).backward()
    return traffic


def distilled(vocab: int, width: int, tokens: int, chunk: int, dtype: torch.dtype) -> Traffic:
    """Return the traffic of a distillation from a teacher of the same width, with its gradients."""
    own, other = (torch.empty(tokens, width, device="meta", dtype=dtype, requires_grad=each) for each in (True, False))
    heads = [torch.empty(vocab, width, device="meta", dtype=dtype, requires_grad=each) for each in (True, False)]
    labels = torch.empty(tokens, device="meta", dtype=torch.long)

    def loss(states: Tensor, targets: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        logits = nn.functional.linear(states, heads[0]).float()
        taught = kl(logits, nn.functional.linear(seen, heads[1]), temperature=2.0, direction="forward")
        entropy = nn.functional.cross_entropy(logits, targets, reduction="sum")
        return 0.5 * entropy + 0.5 * taught, entropy, taught

    with Traffic() as traffic:
        chunked(loss, own, heads[:1], labels, other, chunk=chunk)[0].backward()
    return traffic


# Megabytes for each token; at 4 TB/s four of them take a microsecond, and all products of a 1B model twelve. They were
# 3.3, 6.8, 37, 64 and 85 in chunks of 64 MiB, and with the head's gradient written in bfloat16 first.
LLAMA, QWEN, GEMMA = (128_256, 2048), (151_936, 1536), (262_144, 1152)
MEGABYTES = {(32_768, 2048): 1.3, (49_152, 2048): 2.1, LLAMA: 6.1, QWEN: 7.0, GEMMA: 12.7}


@pytest.mark.parametrize(("vocab", "width"), MEGABYTES)
def test_on_a_gpu_the_loss_moves_what_its_logits_are(vocab, width):
    rows = rows_of(vocab, LOGITS_BYTES_GPU)
    moved = counted(vocab, width, TOKENS, rows, torch.bfloat16).total / TOKENS

    # Logits are written in bfloat16, widened, and made to log-probabilities, to probabilities and to a gradient, which
    # two products read. Each chunk reads the head twice, and adds to its gradient; a batch makes and scales that.
    logits, head, batch = 2 + (2 + 4) + (4 + 4) + (4 + 4) + (4 + 2) + 2 * 2, 2 * 2 + (4 + 4), (4 + 2) + 4 + (4 + 4)
    needed = vocab * (logits + width * (head * -(-TOKENS // rows) + batch) / TOKENS)
    assert needed < moved < 1.02 * needed  # the rest are states and sums
    assert moved < MEGABYTES[vocab, width] * 1e6


def test_on_a_gpu_a_distillation_does_not_write_the_head_for_few_tokens():
    vocab, width = LLAMA
    before = distilled(vocab, width, 4096, rows_of(vocab, LOGITS_BYTES), torch.bfloat16)
    after = distilled(vocab, width, 4096, rows_of(vocab, LOGITS_BYTES_GPU // 2), torch.bfloat16)

    assert after.total < 29e6 * 4096 < 59e6 * 4096 < before.total
    assert after.kernels < 160 < 950 < before.kernels


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_chunk_holds_as_much_as_the_estimate_counts(dtype):
    for way, expected in ((counted, LOGIT_BYTES), (distilled, DISTILLED_LOGIT_BYTES)):
        small, large = (way(50_000, 8, 4096, chunk, getattr(torch, dtype)).peak for chunk in (1024, 2048))

        # Between two chunks all else is equal. A distillation's logits in bfloat16 are freed two bytes earlier.
        assert expected - 2.1 < (large - small) / (1024 * 50_000) <= expected


def test_a_layer_moves_no_more_bytes_than_was_counted():
    """One layer of Llama-3.2-1B in bfloat16: norms, rotation, activation, residuals; no products.

    The attention of 64 tokens weighs next to nothing.
    """
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=64, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaModel(config).to(torch.bfloat16)
        hidden = torch.empty(1, 64, 2048, dtype=torch.bfloat16, requires_grad=True)
        places = torch.zeros(1, 64, dtype=torch.int64)
    with Traffic() as traffic:
        model.layers[0](hidden, position_embeddings=model.rotary_emb(hidden, places)).sum().backward()
    moved = sum(nbytes for name, nbytes in traffic.moved.items() if name not in ("mm", "bmm"))
    assert moved / 64 < 1.35e6  # counted: 1.26e6
