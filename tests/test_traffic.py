"""The bytes that a GPU's kernels would read and write, counted on the meta device, on which nothing is computed.

A product of small matrices, a softmax, an addition: all take the time in which their bytes go to and from memory. A
view moves none.
"""

import pytest
from later import LATER

if LATER:
    import torch
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from transformers import LlamaConfig, LlamaModel

    from surgeon.train.losses import chunked, kl, linear_cross_entropy

    class Traffic(TorchDispatchMode):
        """Counts the kernels and the bytes of their inputs and outputs; `without` names kernels to leave out."""

        def __init__(self, without=()):
            super().__init__()
            self.left_out = ("empty", "detach", "_unsafe_view", *without)
            self.kernels = self.nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if not func.is_view and not func.__name__.startswith(self.left_out):
                read = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
                written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
                self.kernels += 1
                self.nbytes += sum(each.numel() * each.element_size() for each in (*read.values(), *written))
            return result


TOKENS = 1 << 15  # of a batch: 8 rows of 4,096
VOCAB, WIDTH = 128_256, 2048  # Llama-3.2-1B
CHUNK = 2048  # what 1 GiB of logits allows
BANDWIDTH = 4.0e12  # bytes a second: what an H200 reaches


def of_loss(step, *, chunk):
    """Return the kernels of a loss, and the microseconds that its bytes take for each token."""
    hidden = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(VOCAB, WIDTH, device="meta", requires_grad=True)
    labels = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    with Traffic() as traffic:
        step(hidden, weight.to(torch.bfloat16), labels, chunk).backward()
    return traffic.kernels, traffic.nbytes / TOKENS / BANDWIDTH * 1e6


def cross_entropy(hidden, weight, labels, chunk):
    return linear_cross_entropy(hidden, weight, labels, chunk=chunk)


def divergence(hidden, weight, labels, chunk):
    def of(states, target):
        logits = states @ weight.t()
        return kl(logits, logits.detach(), temperature=1.0, direction="forward")

    return chunked(of, hidden, [weight], labels, chunk=chunk)[0]


@pytest.mark.parametrize(("step", "kernels", "microseconds"), [(cross_entropy, 240, 2.4), (divergence, 430, 5.3)])
def test_the_chunks_of_a_gpu_keep_the_loss_below_the_time_of_the_layers(step, kernels, microseconds):
    """All products of the layers take 9.4 us a token. The bounds are what was counted, 2.19 and 4.80, and a tenth."""
    count, time = of_loss(step, chunk=CHUNK)
    assert count <= kernels
    assert time <= microseconds

    assert of_loss(step, chunk=128)[1] > 2 * microseconds  # as 64 MiB of logits would have it


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
    with Traffic(("mm", "bmm")) as traffic:
        model.layers[0](hidden, position_embeddings=model.rotary_emb(hidden, places)).sum().backward()
    assert traffic.nbytes / 64 < 1.35e6  # counted: 1.26e6
