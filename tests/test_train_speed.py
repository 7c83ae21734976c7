"""Speed: operations agree with what torch counts, peaks with data sheets, and the meter with a clock made by hand."""

from dataclasses import replace

import pytest
from later import LATER

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.checkpoint.source import spec_of
from surgeon.cost.flops import attention_flops, flops_per_token, multiplied_parameters, peak_flops
from surgeon.surgery import open_source
from surgeon.train.pace import PaceMeter, most_memory_used

if LATER:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

ROWS, TOKENS = 2, 12
TABLED = ("gpt2", "gpt_neox", "opt", "opt-post-norm", "llama", "llama-tied", "llama-biases", "gemma", "olmo2")
TABLED += ("granite", "phi3-partial-rotary", "mixtral", "qwen3_moe", "qwen3_moe-sparse-step")  # experts too


def anatomy_of(path) -> Anatomy:
    return read_anatomy(spec_of(open_source(path)))


def counted(path) -> float:
    """Return the operations of a token that torch counts, forward and backward; attention without its mask."""
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    ids = torch.randint(3, 100, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as flops:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return flops.get_total_flops() / (ROWS * TOKENS)


def vectors(anatomy: Anatomy) -> int:
    """Return the parameters that are added or scaled by, which N counts and a counter of products does not."""
    kinds = ("gain", "shift", "bias", "logit")
    return sum(spec.num_parameters for name, spec in anatomy.spec.tensors.items() if anatomy.row(name)[0].kind in kinds)


@pytest.mark.parametrize("name", TABLED)
def test_operations_are_what_torch_counts(name, toy, one_thread):
    anatomy = anatomy_of(toy(name))

    # torch multiplies hidden keys too: there the attention is twice ours
    ours = flops_per_token(anatomy, TOKENS) - 6 * vectors(anatomy) + 3 * attention_flops(anatomy, TOKENS)

    assert ours == pytest.approx(counted(toy(name)), rel=1e-12)  # whole numbers; a share of experts rounds


@pytest.mark.parametrize("name", ["falcon", "stablelm", "phi", "glm4", "cohere", "qwen2_moe", "granitemoe", "mpt"])
def test_operations_of_a_family_without_a_table_are_close(name, toy, one_thread):
    anatomy = replace(anatomy_of(toy(name)), family=None, rows={})

    ours = flops_per_token(anatomy, TOKENS) + 3 * attention_flops(anatomy, TOKENS)

    # its norms and biases cannot be told from its products; of these small toys they are at most 2 %
    assert ours == pytest.approx(counted(toy(name)), rel=0.03)


def test_the_formula_is_the_one_of_the_literature(toy):
    """Hold 6 N + 6 L H Q T of the toy, by hand: 6 layers of 8 heads of 10."""
    anatomy = anatomy_of(toy("llama"))
    embedding = anatomy.sizes["vocab"] * anatomy.sizes["hidden"]

    assert multiplied_parameters(anatomy) == anatomy.spec.num_parameters - embedding
    assert flops_per_token(anatomy, 100) == 6 * multiplied_parameters(anatomy) + 6 * 6 * 8 * 10 * 100
    assert flops_per_token(anatomy, 100, trained=0.0) == 4 * multiplied_parameters(anatomy) + 6 * 6 * 8 * 10 * 100


@pytest.mark.parametrize("tokens", [3, 5, 40])
def test_a_window_hides_keys(tokens, toy):
    window, layers, width = 5, 6, 8 * 10
    keys = sum(min(query + 1, window) for query in range(tokens)) / tokens  # the token itself included

    found = attention_flops(anatomy_of(toy("mistral")), tokens) / (4 * layers * width)

    # the formula leaves out half of each key on the diagonal, as T / 2 does: (T + 1) / 2 were exact without a window
    assert keys - found == pytest.approx(0.5 * min(window, tokens) / tokens, rel=1e-12)  # rounding


def test_layers_without_attention_have_none(toy):
    full, lfm2 = attention_flops(anatomy_of(toy("phi")), 64), attention_flops(anatomy_of(toy("lfm2")), 64)

    assert lfm2 == full / 3  # one layer of three attends; both toys have 6 layers of 80


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM2e", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H800", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 5090", 209),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA B200", 2250),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_known_devices_have_their_peak(name, tera):
    assert peak_flops(name) == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Tesla V100-SXM2-16GB",
        "NVIDIA A10G",
        "NVIDIA GB200",
        "NVIDIA RTX 6000",
        "NVIDIA L400",
        "cpu",
        "",
    ],
)
def test_other_devices_have_no_peak(name):
    assert peak_flops(name) is None


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_pace_leaves_out_the_first_step_and_pauses():
    clock = Clock()
    meter = PaceMeter(10, flops_per_token=5.0, peak=1000.0, memory=lambda: 7, clock=clock)
    clock.now += 60  # compiles
    first = meter.step(1, 50)
    clock.now += 2
    meter.step(2, 100)
    with meter.paused():
        clock.now += 8
    clock.now += 2
    pace = meter.step(3, 150)

    assert first.tokens_per_second == 50 / 60
    assert pace.tokens_per_second == 25.0
    assert pace.mfu == 25 * 5 / 1000
    assert pace.memory == 7
    assert pace.seconds_left == pytest.approx(7 * (2 + 8 / 3))  # 7 steps, and one pause of 8 s for three
    assert meter.average == 25.0


def test_the_pace_is_of_the_last_steps_and_the_average_of_all():
    clock = Clock()
    meter = PaceMeter(200, clock=clock)
    for step in range(1, 101):
        clock.now += 4.0 if step <= 50 else 1.0
        pace = meter.step(step, step * 8)

    assert pace.tokens_per_second == 8.0
    assert pace.seconds_left == 100.0
    assert pace.mfu is None
    assert meter.average == pytest.approx(99 * 8 / (49 * 4 + 50))


def test_a_resumed_run_counts_its_own_steps():
    clock = Clock()
    meter = PaceMeter(100, done=90, tokens=9000, clock=clock)
    clock.now += 5
    pace = meter.step(91, 9100)

    assert pace.tokens_per_second == 20.0
    assert pace.seconds_left == 45.0
    assert meter.average == 20.0


def test_before_the_first_step_nothing_is_known():
    pace = PaceMeter(10).pace()

    assert pace.tokens_per_second is None
    assert pace.seconds_left is None


def test_a_process_knows_its_peak():
    before = most_memory_used("cpu")
    held = bytearray(200_000_000)
    after = most_memory_used("cpu")

    assert before is not None
    assert after is not None
    assert after >= max(before, len(held))
