"""Growth of a trained model: SmolLM2-135M to 264M parameters, wider in every way and deeper, in one pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import toys
from later import LATER

if LATER:
    import torch
    from transformers import AutoTokenizer

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("smollm2")]

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
SIZES = {
    "--hidden-size": 768,
    "--attention-heads": 12,
    "--key-value-heads": 4,
    "--intermediate-size": 2048,
    "--layers": 36,
}
# The command line, then the peak of its process; what the system reports of a child begins with its parent's peak.
SCRIPT = """
import sys
from surgeon.cli.app import app
try:
    app()
finally:
    print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")], file=sys.stderr)
"""


@pytest.fixture(scope="module")
def grown(smollm2, tmp_path_factory):
    """Return the grown model and the peak memory of growing it, in bytes.

    In float32: 576 to 768 asks for a factor of 2 / sqrt(3), which bfloat16 would round.
    """
    out = tmp_path_factory.mktemp("grown") / "grown"
    sizes = [str(word) for option in SIZES.items() for word in option]
    command = ["grow", smollm2, *sizes, "--dtype", "float32", "-o", out, "--no-verify", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, command)], capture_output=True, text=True, check=True
    )
    return out, int(done.stderr.split()[-1]) * 1024


def predictions(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and the likeliest of each next token of TEXT, in rows of 256 tokens, computed in float32."""
    model, report = toys.load(directory, dtype=torch.float32)
    assert not any(report.values())
    tokens = AutoTokenizer.from_pretrained(directory)(TEXT, return_tensors="pt").input_ids[0]
    rows = tokens[:1024].view(4, 256)
    with torch.no_grad():
        logits = torch.cat([model(row[None]).logits[:, :-1] for row in rows])
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    return losses, logits.argmax(-1)


def test_the_grown_model_predicts_every_token_as_before(smollm2, grown):
    (before, likeliest), (after, likeliest_after) = predictions(smollm2), predictions(grown[0])

    assert before.numel() == 4 * 255
    assert f"{after.mean().exp():.4g}" == f"{before.mean().exp():.4g}"  # perplexity, to four digits
    assert torch.equal(likeliest_after, likeliest)
    assert (after - before).abs().max() < 1e-3  # float32 rounding over 36 layers of logits of order 30


def test_growing_takes_less_than_a_gigabyte_of_memory(grown):
    assert grown[1] < 1_000_000_000
