"""Attention by the lengths of documents: as behind a mask, without one, and only where every layer keeps to it.

The kernel of a GPU is not run here. What stands for it on a CPU takes the same arguments.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import talkers
import toys
from later import LATER

import surgeon
from surgeon.errors import PlanError
from surgeon.surgery import open_source
from surgeon.train.run_dir import read_metrics

if LATER:
    import torch
    from torch import Tensor
    from torch.nn import functional
    from transformers import AttentionInterface
    from transformers.integrations.flash_attention import get_target_dtype

    from surgeon.models.documents import breaks_graph, keeps_documents_apart, without_lengths
    from surgeon.models.split import SplitModel
    from surgeon.models.varlen import VARLEN, _by_document, _masked, varlen_attention
    from surgeon.train.inputs import Inputs
    from surgeon.train.objective import Objective, attach_loss
    from surgeon.train.settings import Settings
    from surgeon.train.task import Task
    from surgeon.train.teacher import OnlineTeacher

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (5, 17, 1, 10)
REFUSED = {
    "gemma2": "softcap",
    "gpt_oss": "s_aux",
    "gpt2": "dropout",
    "qwen2_moe": "do not hand on the windows",
    "falcon": "cannot do without a mask",
    "bloom": "not every layer",
    "lfm2": "layers of the kind conv",
    "nemotron": "would see each other",
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ends(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def batch(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    """Return one row of documents as the collator makes it, the lengths apart from the rest."""
    total = sum(lengths)
    ids = torch.randint(3, 100, (1, total), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[0, (ends(lengths)[1:] - 1).long()] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def by_lengths(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    longest = max(lengths)
    begins = ends(lengths)
    return {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": longest, "max_length_k": longest}


@pytest.mark.parametrize("window", [-1, 3])
@pytest.mark.parametrize("groups", [1, 3])
def test_documents_attend_as_behind_a_mask_of_them(window: int, groups: int) -> None:
    query, key, value = drawn(33, 6, 8), drawn(33, 6 // groups, 8, seed=1), drawn(33, 6 // groups, 4, seed=2)
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    distance = torch.arange(33)[:, None] - torch.arange(33)
    mask = (document[:, None] == document) & (distance >= 0) & ((distance <= window) | (window < 0))
    keys, values = (states.repeat_interleave(groups, 1).transpose(0, 1) for states in (key, value))
    expected = functional.scaled_dot_product_attention(query.transpose(0, 1), keys, values, mask, scale=0.3)

    for attend in (_by_document, _masked):
        found = attend(query, key, value, ends(), ends(), 0.3, window)
        torch.testing.assert_close(found, expected.transpose(0, 1), rtol=0, atol=1e-14)  # sums of float64 in any order


def test_queries_with_fewer_keys_or_more_are_aligned_at_the_ends() -> None:
    of_queries, of_keys = ends((3, 4)), ends((5, 4))
    query, key, value = drawn(7, 2, 8), drawn(9, 2, 8, seed=1), drawn(9, 2, 8, seed=2)

    loop, one = (attend(query, key, value, of_queries, of_keys, None, 2) for attend in (_by_document, _masked))
    torch.testing.assert_close(loop, one, rtol=0, atol=1e-14)
    alone = _by_document(query[:3], key[2:5], value[2:5], ends((3,)), ends((3,)), None, 2)
    torch.testing.assert_close(loop[2], alone[2], rtol=0, atol=1e-14)  # the last one sees itself and two before


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "mistral", "phi3", "smollm3"])
def test_loss_and_gradients_are_those_behind_a_mask(name: str, toy: Any) -> None:
    results = []
    for attention in ("sdpa", VARLEN):
        model = toys.load(toy(name), dtype=torch.float64)[0]
        model.config._attn_implementation = attention
        attach_loss(model, Objective())
        loss = model(**batch(), **(by_lengths() if attention == VARLEN else {}))["loss"]
        loss.backward()
        results.append((loss.item(), [each.grad for each in model.parameters()]))

    (loss, gradients), (other, others) = results
    assert other == pytest.approx(loss, rel=1e-6)  # norms and softmax round in float32
    largest = max(float(each.abs().max()) for each in gradients)
    assert max(float((one - two).abs().max()) for one, two in zip(gradients, others, strict=True)) < 1e-5 * largest


def test_layers_get_lengths_and_no_mask(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, Any]] = []

    def seen(*args: Any, **kwargs: Any) -> Any:
        calls.append((args[4], kwargs["cu_seq_lens_q"]))
        return varlen_attention(*args, **kwargs)

    model = toys.load(toy("llama"))[0]
    monkeypatch.setitem(AttentionInterface._global_mapping, VARLEN, seen)
    model.config._attn_implementation = VARLEN
    attach_loss(model, Objective())
    model(**batch(), **by_lengths())

    assert len(calls) == model.config.num_hidden_layers
    assert all(mask is None and lengths.tolist() == [0, 5, 22, 23, 33] for mask, lengths in calls)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_needs_more_than_lengths_is_known(name: str, toy: Any) -> None:
    assert REFUSED[name] in str(without_lengths(toys.load(toy(name))[0], "cpu", torch.float32))


def test_a_kernel_is_not_asked_for_heads_that_it_does_not_know(toy: Any) -> None:
    model = toys.load(toy("llama"))[0]  # heads of 10 dims

    assert without_lengths(model, "cpu", torch.bfloat16) is None
    assert "heads of 10 dims" in str(without_lengths(model, "cuda", torch.bfloat16))
    assert "products of float32" in str(without_lengths(model, "cuda", torch.float32))


def test_trying_a_model_changes_neither_its_attention_nor_its_mode_nor_the_random_numbers(toy: Any) -> None:
    model = toys.load(toy("gpt2"))[0]
    model.transformer.h[0].train()
    before = torch.get_rng_state()
    without_lengths(model, "cpu", torch.float32)

    assert model.config._attn_implementation == "sdpa"
    assert [module.training for module in model.transformer.h] == [True, *[False] * (len(model.transformer.h) - 1)]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_compiled_decoder_is_one_graph_without_a_mask(toy: Any) -> None:
    model = toys.load(toy("llama"))[0]
    model.config._attn_implementation = VARLEN
    decoder, rows = model.get_decoder(), batch()
    given = {"input_ids": rows["input_ids"], "position_ids": rows["position_ids"], "use_cache": False} | by_lengths()
    with torch.no_grad():
        expected = decoder(**given)[0]
        found = torch.compile(decoder, fullgraph=True, backend="eager")(**given)[0]

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # float32, states of order 1


# A kernel as FlashAttention is one: it takes lengths, and 16 bits, and nothing else.


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> str:
    def attention(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = get_target_dtype(query, module)  # as transformers decides it, from autocast or the weights
        if (dtype or query.dtype) not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only supports fp16 and bf16 data type")
        return varlen_attention(module, query, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", attention)
    return "flash_attention_2"


def test_a_kernel_for_16_bits_is_tried_without_it_and_trains_by_it(kernel: str, toy: Any) -> None:
    results = []
    for attention in ("sdpa", kernel):
        model = toys.load(toy("llama"))[0]
        model.config._attn_implementation = attention
        assert SplitModel(model).linear_head is not None
        assert keeps_documents_apart(model)
        attach_loss(model, Objective())
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(), **({} if attention == "sdpa" else by_lengths()))["loss"]
        loss.backward()
        results.append(loss.item())

    assert results[1] == pytest.approx(results[0], abs=0.02)  # products round to 2^-8
    with pytest.raises(RuntimeError, match="FlashAttention only"):
        model(**batch(), **by_lengths())


# The run


def off_its_device(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attend as a kernel that is on its device only within the autocast of a training."""
    if not torch.is_autocast_enabled("cpu"):
        raise RuntimeError("expected a CUDA tensor")
    return varlen_attention(module, query, *args, **kwargs)


@pytest.mark.parametrize("name", ["flash_attention_2", "a-kernel"])
def test_a_kernel_that_runs_only_where_the_run_takes_it_trains(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = talkers.talker(tmp_path / "talker")
    text = talkers.written(tmp_path / "text.txt", talkers.TEXT * 4)
    monkeypatch.setitem(AttentionInterface._global_mapping, name, off_its_device)
    allowed = "transformers.PreTrainedModel._check_and_adjust_attn_implementation"  # asks for the kernel's package
    monkeypatch.setattr(allowed, lambda model, attention, *args, **kwargs: attention)
    options = {**SHORT, "max_steps": 2, "precision": "bf16", "attention": name}
    surgeon.finetune(model, data=[text], output=tmp_path / "out", **options)

    assert len([each for each in read_metrics(tmp_path / "out.run") if "loss" in each]) == 2


def test_a_kernel_that_cannot_be_tried_is_not_taken_to_keep_documents_apart(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toys.load(toy("llama"))[0]
    monkeypatch.setitem(AttentionInterface._global_mapping, "a-kernel", off_its_device)
    model.config._attn_implementation = "a-kernel"

    assert SplitModel(model).linear_head is not None
    assert not keeps_documents_apart(model)


SHORT: dict[str, Any] = {"max_steps": 3, "batch_size": 2, "sequence_length": 32, "lr": "1e-3", "eval_rows": 2}


@pytest.mark.parametrize("more", [{}, {"packing": "off"}, {"teacher": True, "kd_weight": 0.5}])
def test_a_run_by_lengths_is_the_run_behind_masks(more: dict[str, Any], tmp_path: Path) -> None:
    model = talkers.talker(tmp_path / "talker")
    text = talkers.written(tmp_path / "text.txt", talkers.TEXT * 4)
    more = more | ({"teacher": str(model)} if "teacher" in more else {})
    losses = []
    for attention in ("sdpa", VARLEN):
        surgeon.finetune(model, data=[text], output=tmp_path / attention, attention=attention, **SHORT, **more)
        records = read_metrics(tmp_path / f"{attention}.run")
        losses.append([record["loss"] for record in records if "loss" in record])

    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # float32


def test_a_teacher_reads_by_lengths_as_its_student_does(toy: Any) -> None:
    student, teacher = (toys.load(toy("llama"), dtype=torch.float64)[0] for _ in range(2))
    losses = []
    for attention in ("sdpa", VARLEN):
        student.config._attn_implementation = teacher.config._attn_implementation = attention
        attach_loss(student, Objective(kd_weight=1.0), OnlineTeacher(teacher))
        given = by_lengths() if attention == VARLEN else {}
        losses.append(student(**batch(), **given)["kl"].item())

    assert losses == pytest.approx([0.0, 0.0], abs=1e-9)


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_a_run_that_was_to_read_lengths_is_refused_with_the_reason(name: str, toy: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    inputs = inputs_of(toy(name), notes, attention=VARLEN)

    with pytest.raises(PlanError, match=REFUSED[name]):
        inputs.attend(toys.load(toy(name))[0], None)


def inputs_of(path: Path, notes: list[str], *, device: str = "cpu", **settings: Any) -> Inputs:
    return Inputs(open_source(str(path)), ("data",), Task(Settings(**settings)), device, notes.append, lambda: None)


@pytest.mark.parametrize(("major", "dims", "attention"), [(9, 16, "varlen"), (9, 10, "sdpa"), (7, 16, "sdpa")])
def test_lengths_are_the_default_on_a_gpu_whose_kernel_knows_the_heads(
    major: int, dims: int, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    path = toys.build("llama", tmp_path / "toy", head_dim=dims)
    notes: list[str] = []
    model, teacher = (toys.load(path)[0] for _ in range(2))
    inputs_of(path, notes, device="cuda").attend(model, teacher)

    assert {each.config._attn_implementation for each in (model, teacher)} == {attention}
    assert [f"heads of {dims} dims" in note for note in notes] == [True] * (dims == 10)


def test_layers_are_compiled_where_asked_and_on_a_gpu_in_long_runs(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.train.inputs.find_spec", lambda name: name)  # triton is there
    model = toys.load(toy("llama"))[0]
    notes: list[str] = []
    by_default, asked = inputs_of(toy("llama"), notes, device="cuda"), inputs_of(toy("llama"), notes, compile=True)

    assert asked.compiles(model, 1)
    assert not by_default.compiles(model, 1000)
    model.config._attn_implementation = VARLEN
    assert by_default.compiles(model, 1000)
    assert not by_default.compiles(model, 100)
    assert not inputs_of(toy("llama"), notes, device="cuda", compile=False).compiles(model, 1000)


def test_a_decoder_that_breaks_the_graph_is_known(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.load(toy("llama"))[0]
    model.config._attn_implementation = VARLEN
    assert not breaks_graph(model)

    own = type(model.model.norm).forward
    monkeypatch.setattr(
        type(model.model.norm), "forward", lambda norm, states: own(norm, states) if states.sum() else states
    )
    assert breaks_graph(model)


def test_a_run_that_must_repeat_itself_does_not_choose_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9))
    path = toys.build("llama", tmp_path / "toy", head_dim=16)
    model = toys.load(path)[0]
    inputs_of(path, [], device="cuda", deterministic=True).attend(model, None)

    assert model.config._attn_implementation == "sdpa"
