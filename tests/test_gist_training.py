"""Gist training: the data, the two forms of the forward pass, the paper's bounds, and what runs of it leave behind."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import talkers
import toys
from later import LATER

import surgeon
from surgeon.data.records import form_of
from surgeon.data.rows import begin_of_text
from surgeon.errors import DataError, PlanError
from surgeon.gist.layout import CHAT, TEXT, prompt_tokens, text_tokens
from surgeon.gist.settings import GistSettings
from surgeon.gist.tokens import GistTokens
from surgeon.train.run_dir import read_metrics
from surgeon.train.settings import Settings
from surgeon.verbs.evaluate import evaluate_gist
from surgeon.verbs.finetune import TrainingOptions, checked, estimate_finetune

if LATER:
    import torch
    from exact64 import Exact64
    from torch import Tensor
    from transformers import AutoModelForCausalLM

    from surgeon.gist import attention
    from surgeon.gist.attention import FIRST_SEEN, ByLengths, Masked, TwoPass
    from surgeon.gist.records import Gists, gist_examples
    from surgeon.gist.training import WithoutGist, implementation, without_gist
    from surgeon.models.split import SplitModel
    from surgeon.models.varlen import VARLEN
    from surgeon.train.losses import kl
    from surgeon.train.objective import Objective, attach_loss, detach_loss

pytestmark = pytest.mark.usefixtures("one_thread")

G = 130  # the id of the gist token of toys
SIZES = [(9, 2, 7), (14, 1, 5), (5, 4, 11)]  # of rows: tokens of prompt, gist, and what follows
SHORT: dict[str, Any] = {"max_steps": 4, "batch_size": 2, "sequence_length": 32, "lr": "1e-3", "eval_rows": 2}
RECORDS = [
    {"instruction": "cat " * (1 + i % 4), "input": "rat", "output": "sat on the mat " * (1 + i % 3)} for i in range(24)
]
# Of float64, but for parts of some families that compute in float32: the norms of Gemma. Measured up to 5e-8.
ALIKE = 1e-6


def rows(sizes: list[tuple[int, int, int]] = SIZES) -> dict[str, Tensor]:
    """Return a row for each size, padded at its right; the answer is trained, but for the first token after a gist."""
    random = torch.Generator().manual_seed(0)
    width = max(map(sum, sizes)) + 2
    ids = torch.randint(3, 100, (len(sizes), width), generator=random)
    positions, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, gist, after) in enumerate(sizes):
        length = prompt + gist + after
        ids[row, prompt : prompt + gist] = G
        positions[row] = torch.cat([torch.arange(length), torch.arange(width - length)])
        labels[row, prompt + gist : length - 1] = ids[row, prompt + gist + 1 : length]
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def packed(batch: dict[str, Tensor], sizes: list[tuple[int, int, int]] = SIZES) -> dict[str, Tensor]:
    """Return the rows of a batch in one row, without the padding between them."""
    return {
        name: torch.cat([row[: sum(size)] for row, size in zip(value, sizes, strict=True)])[None]
        for name, value in batch.items()
    }


def learned(model: Any, layout: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of a batch and its gradients."""
    attach_loss(model, Objective(), layout=layout)
    model.zero_grad()
    found = model(**batch)["loss"]
    found.backward()
    detach_loss(model)
    return found.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=ALIKE)
    largest = max(float(grad.abs().max()) for grad in one[1].values())
    assert largest > 0
    for name in one[1].keys() | other[1].keys():  # a form that leaves something out has no gradient of it
        mine, theirs = (found[1].get(name, torch.zeros(())) for found in (one, other))
        assert float((mine - theirs).abs().max()) <= ALIKE * largest, name


def load64(path: Path) -> Any:
    return toys.load(path, dtype=torch.float64)[0]


# --- one pass and two -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["positive", "gist", "negative"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3_text", "mixtral", "mpt", "deepseek_v3"])
def test_a_mask_and_two_passes_have_one_loss_and_its_gradients(toy, name, condition):
    model = load64(toy(name))
    with Exact64():
        masked, two_pass = (learned(model, kind((G,), condition), rows()) for kind in (Masked, TwoPass))
    assert_alike(masked, two_pass)


@pytest.mark.parametrize("condition", ["positive", "gist", "negative"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("arranged", ["rows", "packed"])
def test_a_mask_and_lengths_have_one_loss_and_its_gradients(toy, name, condition, arranged):
    batch, found = rows() if arranged == "rows" else packed(rows()), []
    for layout, attention in ((Masked, "sdpa"), (ByLengths, VARLEN)):
        model = load64(toy(name))
        model.config._attn_implementation = attention
        with Exact64():
            found.append(learned(model, layout((G,), condition), batch))
    assert_alike(*found)


@pytest.mark.parametrize("condition", ["positive", "gist", "negative"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3_text", "mixtral"])
def test_packed_records_have_the_loss_that_they_have_alone(toy, name, condition):
    model, batch = load64(toy(name)), rows()
    with Exact64():
        alone, together = (learned(model, Masked((G,), condition), each) for each in (batch, packed(batch)))
    assert_alike(alone, together)


def test_eager_attention_learns_what_sdpa_learns(toy):
    found = []
    for attention in ("sdpa", "eager"):
        model = toys.load(toy("gemma3_text"), dtype=torch.float64, attn_implementation=attention)[0]
        found.append(learned(model, Masked((G,)), rows()))
    assert_alike(*found)


def test_activation_checkpointing_changes_nothing_of_a_masked_pass(toy):
    found = []
    for is_checkpointed in (False, True):
        model = load64(toy("qwen3")).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found.append(learned(model, Masked((G,)), rows()))
    assert_alike(*found)


def test_two_passes_refuse_a_row_without_a_gist(toy):
    batch = rows()
    batch["input_ids"][1, 14] = 5
    with pytest.raises(DataError, match="row 1 has nothing after its gist"):
        learned(load64(toy("llama")), TwoPass((G,)), batch)


# --- what is seen -----------------------------------------------------------------------------------------------------


def other_prompts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = batch["input_ids"].clone()
    for row, (prompt, _, _) in enumerate(SIZES):
        ids[row, :prompt] = (ids[row, :prompt] + 17) % 100 + 3
    return batch | {"input_ids": ids}


@pytest.mark.parametrize("kind", ["Masked", "TwoPass"])
def test_nothing_of_the_prompt_passes_by_the_gist(tmp_path, kind):
    """In a model of one layer keys and values of a gist know nothing of its prompt yet: what leaks is all there is."""
    model = load64(toys.build("llama", tmp_path / "shallow", num_hidden_layers=1))
    losses = {}
    for condition in FIRST_SEEN:
        layout = getattr(attention, kind)((G,), condition)
        losses[condition] = [learned(model, layout, batch)[0] for batch in (rows(), other_prompts(rows()))]
    assert losses["gist"][0] == losses["gist"][1]
    assert losses["positive"][0] != losses["positive"][1]


@pytest.mark.parametrize("kind", ["Masked", "TwoPass"])
def test_the_negative_control_sees_neither_prompt_nor_gist(toy, kind):
    kind, model, batch = getattr(attention, kind), load64(toy("llama")), rows()
    changed = other_prompts(batch)
    with torch.no_grad():
        before = learned_loss(model, kind((G,), "negative"), batch)
        assert learned_loss(model, kind((G,), "negative"), changed) == before
        model.get_input_embeddings().weight[G] += 1.0
        assert learned_loss(model, kind((G,), "negative"), changed) == before
        assert learned_loss(model, kind((G,), "gist"), changed) != learned_loss(model, kind((G,), "gist"), batch)


def test_the_positive_control_is_the_model_itself(toy):
    model, batch = load64(toy("qwen3")), rows()
    with Exact64(), torch.no_grad():
        attach_loss(model, Objective())
        own = model(**batch)["loss"].item()
        assert learned_loss(model, Masked((G,), "positive"), batch) == pytest.approx(own, rel=1e-12)  # float64


def learned_loss(model: Any, layout: Any, batch: dict[str, Tensor]) -> float:
    attach_loss(model, Objective(), layout=layout)
    return float(model(**batch)["loss"])


# --- the teacher that sees the prompt ---------------------------------------------------------------------------------


def test_without_its_gist_a_record_is_as_if_it_had_none():
    batch = rows()
    ids, positions, order = without_gist(batch["input_ids"], batch["position_ids"], [G])
    joined = packed(batch)
    joined_ids, joined_positions, _ = without_gist(joined["input_ids"], joined["position_ids"], [G])
    for row, (prompt, gist, after) in enumerate(SIZES):
        given = batch["input_ids"][row]
        expected = torch.cat([given[:prompt], given[prompt + gist : prompt + gist + after]])
        assert torch.equal(ids[row, : prompt + after], expected)
        assert positions[row, : prompt + after].tolist() == list(range(prompt + after))
        assert torch.equal(given[order[row]], ids[row])
    lengths = [prompt + after for prompt, _, after in SIZES]
    assert joined_positions[0].tolist() == [place for length in lengths for place in range(length)]
    assert torch.equal(joined_ids[0], torch.cat([line[:length] for line, length in zip(ids, lengths, strict=True)]))


@pytest.mark.parametrize("arrange", [lambda batch: batch, packed], ids=["rows", "packed"])
def test_distilling_compares_with_the_model_that_sees_the_prompt_and_no_gist(toy, arrange):
    model, batch = load64(toy("llama")), arrange(rows())
    teacher = WithoutGist(load64(toy("llama")), (G,))
    attach_loss(model, Objective(kd_weight=1.0), teacher, layout=Masked((G,)))
    divergence = float(model(**batch)["kl"])
    detach_loss(model)

    expected = 0.0
    for row, (prompt, gist, after) in enumerate(SIZES):
        line = rows()["input_ids"][row, : prompt + gist + after][None]
        plain = torch.cat([line[:, :prompt], line[:, prompt + gist :]], 1)
        layout, positions = Masked((G,)), torch.arange(line.shape[1])[None]
        with torch.no_grad():
            split = SplitModel(model)
            student = split.logits(
                layout.states(split, line, positions, torch.where(line[0] != G)[0])[0, prompt + gist : -1]
            )
            full = model(plain).logits[0, prompt:-1]
        expected += float(kl(student, full, temperature=1.0, direction="forward"))
    assert divergence == pytest.approx(expected, rel=1e-9)  # sums of float64 in another order, some parts float32
    assert expected > 0


# --- the data ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gisted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy with two gist tokens."""
    place = tmp_path_factory.mktemp("gisted")
    talkers.talker(place / "plain")
    surgeon.add_gist(place / "plain", tokens=2).save(place / "gist")
    return place / "gist"


@pytest.fixture(scope="module")
def tokenizer(gisted: Path) -> Any:
    from surgeon.models.loading import load_tokenizer

    return load_tokenizer(str(gisted))


@pytest.fixture(scope="module")
def gist(gisted: Path) -> GistTokens:
    found = surgeon.gist.read_gist(json.loads((gisted / "config.json").read_text()))
    assert found is not None
    return found


def made(record: dict[str, Any], tokenizer: Any, gists: Gists, **options: Any) -> Any:
    return gist_examples([form_of(record, "here").document(record, "here")], tokenizer, gists, **options)[0]


FORMS = [
    ({"instruction": "The cat", "input": "a rat", "output": "sat"}, TEXT, "The cat", "\na rat\n"),
    ({"instruction": "The cat", "output": "sat"}, TEXT, "The cat", "\n"),
    ({"prompt": "The cat", "completion": "sat"}, TEXT, "The cat", "\n"),
    ({"question": "The cat?", "answer": "sat"}, TEXT, "The cat?", "\n"),
    (
        {
            "messages": [
                {"role": "system", "content": "The cat"},
                {"role": "user", "content": "a rat"},
                {"role": "assistant", "content": "sat"},
            ]
        },
        CHAT,
        "The cat",
        "a rat",
    ),
]


@pytest.mark.parametrize(("record", "layout", "prompt", "text"), FORMS, ids=lambda value: str(value)[:30])
def test_a_record_has_the_tokens_that_compressing_and_writing_have(record, layout, prompt, text, tokenizer, gist):
    example = made(record, tokenizer, Gists(gist, (2,)))
    before = prompt_tokens(prompt, gist, tokenizer, num_tokens=2, layout=layout, encoder=False)
    behind = text_tokens(text, gist, tokenizer, layout=layout, encoder=False)
    asked = before + behind
    assert list(example.ids[: len(asked)]) == asked
    assert tokenizer.decode(example.ids[len(asked) :]).startswith("sat")
    assert not any(example.trained[: len(asked)])
    assert all(example.trained[len(asked) :])


def test_a_conversation_is_trained_on_every_answer(tokenizer, gist):
    roles = ["system", "user", "assistant", "user", "assistant"]
    record = {"messages": [{"role": role, "content": f"cat {index}"} for index, role in enumerate(roles)]}
    example = made(record, tokenizer, Gists(gist, (1,)))
    trained = [token for token, is_trained in zip(example.ids, example.trained, strict=True) if is_trained]
    assert tokenizer.decode(trained) == "cat 2cat 4"
    assert list(example.ids).count(gist.ids[0]) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "The cat sat"}, "no prompt to compress"),
        ({"instruction": " ", "output": "sat"}, "has no prompt"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "no system turn"),
        ({"instruction": "The <GIST> cat", "output": "sat"}, "contains <GIST>"),
        ({"instruction": "The cat", "output": "sat <GIST>"}, "contains <GIST>"),
        ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}, "nothing to learn"),
    ],
)
def test_a_record_that_cannot_have_a_gist_is_named(record, message, tokenizer, gist):
    with pytest.raises(DataError, match=message):
        made(record, tokenizer, Gists(gist, (2,)))


def test_a_long_record_loses_its_prompt_from_the_left_and_never_its_gist(tokenizer, gist):
    record = {"instruction": "The rat sat on the mat, and the cat", "input": "é🌿", "output": "that was that"}
    gists = Gists(gist, (2,))
    whole = made(record, tokenizer, gists)
    place = list(whole.ids).index(gist.ids[0])
    begin = len(begin_of_text(tokenizer))
    assert begin == 1
    assert not whole.is_cut
    for length in range(8, len(whole.ids)):
        cut = made(record, tokenizer, gists, length=length)
        assert cut.is_cut
        assert len(cut.ids) == len(cut.trained) == length
        lost = min(len(whole.ids) - length, place - begin - 1)
        expected = (whole.ids[:begin] + whole.ids[begin + lost :])[:length]
        assert cut.ids == expected
        assert list(cut.ids).count(gist.ids[0]) == 2


def test_the_number_of_gist_tokens_is_drawn_by_the_seed_and_the_record(gist):
    drawn = [Gists(gist, (1, 2, 4), seed).count(number) for seed in (0, 1) for number in range(300)]
    assert drawn[:300] != drawn[300:]
    assert [Gists(gist, (1, 2, 4), 0).count(number) for number in range(300)] == drawn[:300]
    counts = Counter(drawn)
    # 600 draws of a third each: the standard deviation of a count is 11.5.
    assert all(abs(counts[number] - 200) < 60 for number in (1, 2, 4))


def test_distinct_tokens_cannot_be_more_than_there_are():
    with pytest.raises(PlanError, match="a gist cannot have 4 tokens"):
        Gists(GistTokens((5, 6), 2, distinct=True), (1, 4))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> str:
    return talkers.jsonl(tmp_path / "data.jsonl", *RECORDS)


def made_talker(place: Path, *, tied: bool) -> Path:
    """Return a toy with two gist tokens, whose head is its embedding or is not."""
    talkers.talker(place / "plain", "llama-tied" if tied else "llama")
    surgeon.add_gist(place / "plain", tokens=2).save(place / "gist")
    return place / "gist"


def test_the_estimate_counts_the_untrained_model_that_teaches(gisted: Path, data: str):
    options: dict[str, Any] = {"data": (data,), "max_steps": 1, "sequence_length": 32, "gist": True}
    alone, taught = (estimate_finetune(gisted, **options, gist_distill=weight).memory for weight in (0.0, 0.5))

    assert alone.teacher == 0
    assert taught.teacher == alone.weights > 0  # in float32, on a CPU
    assert taught.loss > alone.loss


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if "loss" in record]


@pytest.mark.parametrize("impl", ["mask", "two-pass"])
def test_accumulated_batches_train_as_one_large_batch_does(gisted: Path, data: str, tmp_path: Path, impl: str) -> None:
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        options = SHORT | {"batch_size": size, "gradient_accumulation": accumulation, "packing": "off"}
        output = tmp_path / f"out-{size}"
        surgeon.finetune(gisted, data=[data], output=output, gist=True, gist_impl=impl, gist_distill=0.5, **options)
        found.append(losses_of(tmp_path / f"out-{size}.run"))
    assert found[0] == pytest.approx(found[1], rel=1e-6)  # float32 sums in another order


def test_both_forms_train_alike_and_the_controls_otherwise(gisted: Path, data: str, tmp_path: Path) -> None:
    found = {}
    options = SHORT | {"packing": "off"}
    for name, more in {
        "mask": {"gist_impl": "mask"},
        "two-pass": {"gist_impl": "two-pass"},
        "lengths": {"attention": "varlen"},
        "positive": {"gist_control": "positive"},
        "negative": {"gist_control": "negative"},
    }.items():
        surgeon.finetune(gisted, data=[data], output=tmp_path / name, gist=True, **options, **more)
        found[name] = losses_of(tmp_path / f"{name}.run")
    assert found["mask"] == pytest.approx(found["two-pass"], rel=1e-5)  # float32, after four steps
    assert found["mask"] == pytest.approx(found.pop("lengths"), rel=1e-5)
    assert len({round(losses[0], 4) for losses in found.values()}) == 3


def test_a_run_with_gists_of_random_lengths_resumes_to_the_same_bytes(gisted: Path, data: str, tmp_path: Path) -> None:
    """The tokens are made anew for the resumed run: what they were cleared away at the end of the first."""
    options = SHORT | {"gist_random_tokens": "1,2,4", "save_every": 2, "keep_checkpoints": 3}
    run = tmp_path / "run"
    surgeon.finetune(gisted, data=[data], output=tmp_path / "whole", run_dir=run, gist=True, **options)
    assert not (run / "data").exists()
    shutil.rmtree(run / "checkpoint-4")
    surgeon.finetune(gisted, data=[data], output=tmp_path / "resumed", run_dir=run, resume=True, gist=True, **options)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert one == other


def test_the_result_is_a_checkpoint_that_still_has_its_gist_tokens(gisted: Path, data: str, tmp_path: Path) -> None:
    trained = surgeon.finetune(gisted, data=[data], output=tmp_path / "out", gist=True, **(SHORT | {"max_steps": 20}))
    _, report = toys.load(tmp_path / "out")
    assert not any(report.values())
    losses = losses_of(tmp_path / "out.run")
    assert losses[-1] < losses[0] - 1
    before, after = (json.loads((path / "config.json").read_text()) for path in (gisted, tmp_path / "out"))
    assert after["gist"] == before["gist"]
    assert trained.steps == 20


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_train_the_gist_row_and_are_merged_with_it(data: str, tmp_path: Path, tied: bool) -> None:
    pytest.importorskip("peft")
    source, options = made_talker(tmp_path, tied=tied), SHORT | {"lr": "1e-2", "sequence_length": 64, "eval_rows": 64}
    trained = surgeon.finetune(
        source, data=[data], eval_data=(data,), output=tmp_path / "out", gist=True, lora=2, **options
    )
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (source, tmp_path / "out"))
    changed = (before.get_input_embeddings().weight != after.get_input_embeddings().weight).any(1)
    assert changed.nonzero().flatten().tolist() == list(before.config.gist["token_ids"])
    written = evaluate_gist(tmp_path / "out", data=[data], max_new_tokens=1).figure("loss", "gist").value
    assert written == pytest.approx(trained.eval_loss, rel=1e-5)  # float32: (W + BA) x beside W x + BA x


@pytest.mark.parametrize("tied", [False, True])
def test_with_a_frozen_reader_the_reader_is_the_untouched_model(data: str, tmp_path: Path, tied: bool) -> None:
    """Reader and base agree to the last bit on logits behind a gist that adapters compressed."""
    peft = pytest.importorskip("peft")
    made_talker(tmp_path, tied=tied)
    options = SHORT | {"lora": 2, "keep_adapter": True, "gist_reader": "frozen", "lr": "1e-2", "max_steps": 8}
    surgeon.finetune(tmp_path / "gist", data=[data], output=tmp_path / "out", gist=True, **options)

    losses = losses_of(tmp_path / "out.run")
    assert losses[-1] < losses[0]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "gist")
    ids, batch = tuple(base.config.gist["token_ids"]), rows()
    batch["input_ids"][batch["input_ids"] == G] = ids[0]
    positions, chosen = batch["position_ids"], batch["labels"] != -100
    before = {name: value.clone() for name, value in base.state_dict().items()}

    def read(model: Any) -> Tensor:
        """Return the logits behind gists of which nothing is seen: what is left is the reader."""
        split, layout = SplitModel(model), TwoPass(ids, "negative", frozen=True)
        with torch.no_grad():
            states = layout.states(split, batch["input_ids"], positions, torch.where(chosen.flatten())[0])
            with layout.reading(model):
                return split.logits(states.flatten(0, 1))

    alone = read(base)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out", is_trainable=True)
    assert torch.equal(read(base), alone)
    positive = Masked(ids, "positive").states(
        SplitModel(base), batch["input_ids"], positions, torch.where(chosen.flatten())[0]
    )
    assert not torch.allclose(SplitModel(base).logits(positive.flatten(0, 1)), alone, atol=1e-3)

    attach_loss(base, Objective(), layout=TwoPass(ids, frozen=True))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    model(**batch)["loss"].backward()
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lora_A" in name for name in trained)
    assert any("trainable_tokens" in name for name in trained)
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for name, grad in grads.items() if "lora" in name)
    assert sum(float(grad.abs().sum()) for grad in grads.values() if grad is not None) > 0
    after = model.unload().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gist_control": "positive"}, "has no effect without --gist"),
        ({"gist_distill": 0.5}, "has no effect without --gist"),
        ({"gist": True, "gist_control": "both"}, "unknown --gist-control"),
        ({"gist": True, "gist_random_tokens": "1,0"}, "is no list of numbers"),
        ({"gist": True, "gist_distill": 1.5}, "lies between 0 and 1"),
        ({"gist": True, "train_on": "all"}, "must not learn to write gists"),
        ({"gist": True, "teacher": "gpt2"}, "--teacher does not go with --gist"),
        ({"gist": True, "gist_reader": "frozen"}, "without the adapters"),
        ({"gist": True, "gist_reader": "frozen", "lora": 2}, "without the adapters"),
        ({"gist": True, "gist_impl": "two-pass", "activation_checkpointing": True}, "empties the cache"),
        ({"gist": True, "gist_impl": "two-pass", "packing": "on"}, "each row holds one document"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        checked(TrainingOptions(**options))


def test_attention_that_takes_no_mask_is_trained_in_two_passes() -> None:
    gist, settings = GistSettings(gist=True), Settings()
    assert implementation(gist, settings, "sdpa") == "mask"
    assert implementation(gist, settings, "flash_attention_2") == "two-pass"
    assert implementation(GistSettings(gist=True, gist_impl="two-pass"), settings, "sdpa") == "two-pass"
    frozen = GistSettings(gist=True, gist_reader="frozen")
    assert implementation(frozen, Settings(lora=2, keep_adapter=True), "sdpa") == "two-pass"
    with pytest.raises(PlanError, match="takes no gist mask"):
        implementation(GistSettings(gist=True, gist_impl="mask"), settings, "flash_attention_2")
    with pytest.raises(PlanError, match="activation checkpointing empties the cache"):
        implementation(gist, Settings(activation_checkpointing=True), "flash_attention_2")


def test_a_model_without_gist_tokens_is_refused(data: str, tmp_path: Path) -> None:
    talkers.talker(tmp_path / "plain")
    with pytest.raises(PlanError, match="has no gist tokens to train"):
        surgeon.finetune(tmp_path / "plain", data=[data], output=tmp_path / "out", gist=True, **SHORT)


def test_a_model_whose_layers_carry_the_prompt_past_the_gist_is_refused(data: str, tmp_path: Path) -> None:
    """`surgeon gist` refuses to add tokens to it; one that was gisted otherwise is seen to leak when it is trained."""
    talkers.talker(tmp_path / "model", "lfm2")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["gist"] = GistTokens((290,), 1).to_config()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="leak through their convolution"):
        surgeon.finetune(tmp_path / "model", data=[data], output=tmp_path / "out", gist=True, **SHORT)
