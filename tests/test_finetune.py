"""The verb finetune on toys: what it learns, what it writes, what it refuses, and that nothing else is changed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import talkers
import toys
from later import LATER

import surgeon
from surgeon.train.run_dir import read_metrics

if LATER:
    import torch
    from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT: dict[str, Any] = {"max_steps": 4, "batch_size": 2, "sequence_length": 32, "lr": "1e-3", "eval_rows": 2}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkers.talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    return talkers.written(tmp_path / "text.txt", talkers.TEXT * 4)


def test_the_result_is_an_ordinary_checkpoint_whose_loss_fell(talker: Path, text: str, tmp_path: Path) -> None:
    options = SHORT | {"max_steps": 30}
    trained = surgeon.finetune(talker, data=[text], output=tmp_path / "out", **options)

    _, report = toys.load(tmp_path / "out")
    assert not any(report.values())
    records = read_metrics(tmp_path / "out.run")
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0] - 1
    assert trained.steps == 30
    assert trained.eval_loss == [record["eval_loss"] for record in records if "eval_loss" in record][-1]
    before, after = (surgeon.evaluate(model, data=[text], sequence_length=32) for model in (talker, tmp_path / "out"))
    assert after.scored.figures["loss"].value < before.scored.figures["loss"].value - 1


def test_the_result_keeps_the_config_the_dtypes_and_the_companions_of_its_source(text: str, tmp_path: Path) -> None:
    source = talkers.talker(tmp_path / "source", dtype="bfloat16")
    surgeon.finetune(source, data=[text], output=tmp_path / "out", **SHORT)

    before, after = (surgeon.open_model(path).spec for path in (source, tmp_path / "out"))
    assert after.config == before.config
    assert after.tensors == before.tensors
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    receipt = json.loads((tmp_path / "out" / "surgeon.json").read_text())
    step = receipt["steps"][-1]["finetune"]
    assert step["steps"] == 4
    assert step["data"][0]["data"] == text
    assert step["settings"]["lr"] == "1e-3"
    assert receipt["source"] == surgeon.open_model(source).source.provenance()


def test_weights_in_sixteen_bits_are_trained_in_float32(text: str, tmp_path: Path) -> None:
    """A step of 1e-5 of a weight of 1 is below bfloat16's resolution: added in 16 bits it would be lost each time."""
    source = talkers.talker(tmp_path / "source", dtype="bfloat16")
    options = SHORT | {"lr": "1e-5", "warmup": 0.0, "schedule": "constant", "max_steps": 3}
    surgeon.finetune(source, data=[text], output=tmp_path / "out", dtype="float32", **options)

    before = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    inner = [name for name in before if "layers" in name]
    unchanged = sum(int((before[name] == after[name]).sum()) for name in inner)
    assert unchanged < 0.01 * sum(before[name].numel() for name in inner)


def test_pure_sixteen_bits_are_used_on_request_and_lose_small_steps(text: str, tmp_path: Path) -> None:
    source = talkers.talker(tmp_path / "source", dtype="bfloat16")
    options = SHORT | {"lr": "1e-6", "warmup": 0.0, "schedule": "constant", "precision": "pure-bf16"}
    trained = surgeon.finetune(source, data=[text], output=tmp_path / "out", **options)

    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (source, tmp_path / "out"))
    same = sum(int((before[name] == after[name]).sum()) for name in before)
    assert same > 0.5 * sum(value.numel() for value in before.values())
    assert any("small steps" in note for note in trained.notes)


def test_a_run_of_whole_epochs_sees_every_row_once_an_epoch(talker: Path, text: str, tmp_path: Path) -> None:
    options = {key: value for key, value in SHORT.items() if key != "max_steps"} | {"epochs": 2, "eval_fraction": 0}
    trained = surgeon.finetune(talker, data=[text], output=tmp_path / "out", **options)

    tokens = json.loads((tmp_path / "out" / "surgeon.json").read_text())["steps"][-1]["finetune"]["data"][0]["tokens"]
    assert trained.tokens == 2 * tokens
    assert trained.eval_loss is None


def test_accumulated_batches_train_as_one_large_batch_does(talker: Path, tmp_path: Path) -> None:
    """8 x 1 = 4 x 2 = 1 x 8, though the rows have answers of very different lengths."""
    records = [{"prompt": "cat " * (1 + i % 3), "completion": "sat " * (1 + 5 * (i % 4))} for i in range(32)]
    data = talkers.jsonl(tmp_path / "data.jsonl", *records)
    weights = {}
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        options = SHORT | {
            "batch_size": size,
            "gradient_accumulation": accumulation,
            "packing": "off",
            "eval_fraction": 0,
        }
        output = tmp_path / f"out-{size}"
        surgeon.finetune(talker, data=[data], output=output, **options)
        losses = [record["loss"] for record in read_metrics(tmp_path / f"out-{size}.run") if "loss" in record]
        weights[size] = losses
    for size in (4, 1):
        assert weights[size] == pytest.approx(weights[8], rel=1e-6)  # float32 sums in another order


def test_layers_that_are_frozen_do_not_change_and_others_do(talker: Path, text: str, tmp_path: Path) -> None:
    surgeon.finetune(talker, data=[text], output=tmp_path / "out", freeze="embeddings,layers=0-3", **SHORT)

    changed = changed_tensors(talker, tmp_path / "out")
    assert not any("embed_tokens" in name or ".layers.0." in name or ".layers.3." in name for name in changed)
    assert any(".layers.4." in name for name in changed)


def test_only_the_new_layers_of_a_grown_model_are_trained_on_request(talker: Path, text: str, tmp_path: Path) -> None:
    surgeon.grow(talker, layers=8, depth_method="identity").save(tmp_path / "grown")
    receipt = json.loads((tmp_path / "grown" / "surgeon.json").read_text())
    new = [layer for layer, source in enumerate(receipt["layer_map"]) if source is None]
    assert len(new) == 2
    surgeon.finetune(tmp_path / "grown", data=[text], output=tmp_path / "out", train="new", **SHORT)

    changed = changed_tensors(tmp_path / "grown", tmp_path / "out")
    assert changed
    assert all(any(f".layers.{layer}." in name for layer in new) for name in changed)


def test_only_the_layers_beside_a_cut_are_trained_on_request(talker: Path, text: str, tmp_path: Path) -> None:
    surgeon.prune(talker, score="random", layers=4, seed=3).save(tmp_path / "cut")
    layer_map = json.loads((tmp_path / "cut" / "surgeon.json").read_text())["layer_map"]
    surgeon.finetune(tmp_path / "cut", data=[text], output=tmp_path / "out", train="cut", **SHORT)

    gaps = {i for a in range(3) if layer_map[a + 1] != layer_map[a] + 1 for i in (a, a + 1)}
    gaps |= {3} if layer_map[3] < 5 else set()
    changed = changed_tensors(tmp_path / "cut", tmp_path / "out")
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in changed if ".layers." in name}
    assert layers == gaps
    assert any("norm" in name and ".layers." not in name for name in changed)


def test_only_the_rows_of_new_tokens_are_trained_on_request(talker: Path, text: str, tmp_path: Path) -> None:
    surgeon.add_gist(talker, tokens=1).save(tmp_path / "gist")
    data = talkers.jsonl(tmp_path / "data.jsonl", *({"text": f"the cat <GIST> sat {i}"} for i in range(40)))
    surgeon.finetune(tmp_path / "gist", data=[data], output=tmp_path / "out", train="new", **SHORT)

    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "gist", tmp_path / "out")
    )
    for name in changed_tensors(tmp_path / "gist", tmp_path / "out"):
        rows = (before[name] != after[name]).any(1).nonzero()[:, 0].tolist()
        assert rows == surgeon.open_model(tmp_path / "out").spec.config["gist"]["token_ids"], name
    assert "model.embed_tokens.weight" in changed_tensors(tmp_path / "gist", tmp_path / "out")


def test_a_model_without_a_receipt_has_nothing_new(talker: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(surgeon.PlanError, match=r"surgeon\.json has none"):
        surgeon.finetune(talker, data=[text], output=tmp_path / "out", train="new", **SHORT)


def test_merged_adapters_compute_what_the_adapted_model_computed(talker: Path, text: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = SHORT | {"lora": 4, "max_steps": 8, "lr": "1e-2"}
    surgeon.finetune(talker, data=[text], output=tmp_path / "merged", **options)
    surgeon.finetune(talker, data=[text], output=tmp_path / "adapter", keep_adapter=True, **options)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(talker), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(talker)
    with torch.no_grad():
        ours, theirs, plain = (model(torch.arange(3, 40)[None]).logits for model in (merged, adapted, base))
    assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))  # float32: (W + BA) x beside W x + BA x
    assert not torch.allclose(ours, plain, atol=1e-3 * float(plain.abs().max()))


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_adapters_change_only_the_part_that_they_are_put_on(part: str, talker: Path, text: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    surgeon.finetune(talker, data=[text], output=tmp_path / "out", lora=2, lora_targets=part, **SHORT)

    changed = changed_tensors(talker, tmp_path / "out")
    assert changed
    assert all(("self_attn" if part == "attention" else "mlp") in name for name in changed)


def test_distilling_from_the_model_itself_changes_nothing_but_by_rounding(
    talker: Path, text: str, tmp_path: Path
) -> None:
    """KL to oneself is 0, and so is its gradient: what is left is the softmax's rounding, which Adam would blow up."""
    options = SHORT | {"teacher": str(talker), "kd_weight": 1.0, "optim": "sgd"}
    surgeon.finetune(talker, data=[text], output=tmp_path / "out", **options)

    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (talker, tmp_path / "out"))
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-6
    assert max(record["kl"] for record in read_metrics(tmp_path / "out.run") if "kl" in record) < 1e-5


def test_a_student_comes_closer_to_its_teacher(talker: Path, text: str, tmp_path: Path) -> None:
    surgeon.truncate(talker, layers=4).save(tmp_path / "cut")
    options = SHORT | {"teacher": str(talker), "kd_weight": 1.0, "max_steps": 20, "hidden_weight": 0.1}
    surgeon.finetune(tmp_path / "cut", data=[text], output=tmp_path / "out", **options)

    kl = [record["kl"] for record in read_metrics(tmp_path / "out.run") if "kl" in record]
    hidden = [record["hidden"] for record in read_metrics(tmp_path / "out.run") if "hidden" in record]
    assert kl[-1] < 0.7 * kl[0]
    assert len(hidden) == len(kl)


def test_the_losses_of_a_taught_run_are_those_of_one_without_a_teacher(talker: Path, text: str, tmp_path: Path) -> None:
    """A rate of (almost) 0 leaves the weights: then only what is called a loss can differ, and it must not."""
    surgeon.truncate(talker, layers=4).save(tmp_path / "cut")
    options = SHORT | {"lr": "1e-30", "max_steps": 3}
    plain = surgeon.finetune(tmp_path / "cut", data=[text], output=tmp_path / "plain", **options)
    taught = surgeon.finetune(
        tmp_path / "cut", data=[text], output=tmp_path / "taught", teacher=str(talker), kd_weight=0.3, **options
    )

    assert (taught.train_loss, taught.eval_loss) == (pytest.approx(plain.train_loss, rel=1e-6), plain.eval_loss)
    assert (plain.train_kl, plain.objective) == (None, None)
    steps = [record for record in read_metrics(tmp_path / "taught.run") if "loss" in record]
    others = [record for record in read_metrics(tmp_path / "plain.run") if "loss" in record]
    assert [record["loss"] for record in steps] == pytest.approx([record["loss"] for record in others], rel=1e-6)
    assert all("objective" not in record and "kl" not in record for record in others)
    for record in steps:
        assert record["objective"] == pytest.approx(0.7 * record["loss"] + 0.3 * record["kl"], rel=1e-6)
    told, card = taught.to_text(), (tmp_path / "taught" / "README.md").read_text()
    for name in ("train cross-entropy", "validation cross-entropy", "train KL to the teacher", "train objective"):
        assert name in told
        assert name in card
    assert " loss" not in told
    assert taught.to_dict()["objective"] == taught.objective == pytest.approx(steps[-1]["objective"])


def test_the_error_of_a_validation_loss_is_that_of_its_batches(talker: Path, text: str, tmp_path: Path) -> None:
    options = SHORT | {"max_steps": 1, "eval_fraction": 0.5, "eval_rows": 6, "packing": "off"}
    trained = surgeon.finetune(talker, data=[text], output=tmp_path / "out", **options)
    alone = surgeon.finetune(talker, data=[text], output=tmp_path / "alone", **(options | {"eval_rows": 1}))

    assert alone.eval_loss_error is None
    assert trained.eval_loss is not None
    assert trained.eval_loss_error is not None
    assert 0 < trained.eval_loss_error < 0.5 * trained.eval_loss
    record = [record for record in read_metrics(tmp_path / "out.run") if "eval_loss" in record][-1]
    assert record["eval_loss_error"] == trained.eval_loss_error


def test_the_first_step_is_not_wasted_at_a_rate_of_nothing(talker: Path, text: str, tmp_path: Path) -> None:
    options = SHORT | {"warmup": 4.0, "schedule": "linear", "max_steps": 8, "eval_fraction": 0}
    surgeon.finetune(talker, data=[text], output=tmp_path / "out", **options)

    rates = [record["learning_rate"] for record in read_metrics(tmp_path / "out.run") if "loss" in record]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    surgeon.finetune(talker, data=[text], output=tmp_path / "one", **(options | {"max_steps": 1, "warmup": 0.03}))
    assert changed_tensors(talker, tmp_path / "one")


def test_a_teacher_kept_whole_on_disk_teaches_what_the_teacher_does(talker: Path, text: str, tmp_path: Path) -> None:
    surgeon.truncate(talker, layers=4).save(tmp_path / "cut")
    losses = {}
    for kept in (None, talkers.VOCABULARY):
        options = SHORT | {"teacher": str(talker), "teacher_top_k": kept, "temperature": 2.0}
        output = tmp_path / f"out-{kept}"
        surgeon.finetune(tmp_path / "cut", data=[text], output=output, **options)
        losses[kept] = [record["loss"] for record in read_metrics(Path(f"{output}.run")) if "loss" in record]
    assert losses[None] == pytest.approx(losses[talkers.VOCABULARY], rel=1e-5)  # float32: a softmax kept and read


def test_other_texts_are_evaluated_without_the_teacher(talker: Path, text: str, tmp_path: Path) -> None:
    """Its stored answers are those of the trained texts alone, and nothing of it is in the loss of an evaluation."""
    records = [{"prompt": f"the cat {i}", "completion": "sat"} for i in range(9)]
    options = SHORT | {"teacher": str(talker), "teacher_top_k": 4, "eval_data": (text,)}
    surgeon.finetune(talker, data=[talkers.jsonl(tmp_path / "a.jsonl", *records)], output=tmp_path / "out", **options)
    surgeon.finetune(talker, data=[text], output=tmp_path / "plain", **SHORT | {"eval_data": (text,)})

    runs = (read_metrics(tmp_path / f"{name}.run") for name in ("out", "plain"))
    first, other = (next(record["eval_loss"] for record in run if "eval_loss" in record) for run in runs)
    assert first == other


def test_the_better_of_two_rates_is_found_and_used(talker: Path, text: str, tmp_path: Path) -> None:
    trained = surgeon.finetune(
        talker, data=[text], output=tmp_path / "out", **(SHORT | {"lr": "auto", "max_steps": 20})
    )

    tried = json.loads((tmp_path / "out.run" / "lr.json").read_text())
    losses = {float(rate): loss for rate, loss in tried["losses"].items()}
    assert len(losses) == 2
    assert trained.learning_rate == tried["chosen"] == min(losses, key=lambda rate: losses[rate])


def test_patience_ends_a_run_and_the_best_step_is_the_result(talker: Path, tmp_path: Path) -> None:
    """A rate that is far too high: the first evaluation is the best."""
    data = talkers.written(tmp_path / "a.txt", talkers.TEXT)
    other = talkers.written(tmp_path / "b.txt", "Z q x! " * 60)
    options = SHORT | {"lr": "0.5", "max_steps": 20, "eval_every": 2, "patience": 2, "keep_best": True, "warmup": 0.0}
    trained = surgeon.finetune(talker, data=[data], eval_data=(other,), output=tmp_path / "out", **options)

    evaluations = [record for record in read_metrics(tmp_path / "out.run") if "eval_loss" in record]
    assert trained.steps < 20
    best = min(evaluations[1:], key=lambda record: record["eval_loss"])
    assert trained.best_step == best["step"]
    receipt = json.loads((tmp_path / "out" / "surgeon.json").read_text())
    assert receipt["steps"][-1]["finetune"]["result_of_step"] == best["step"]


def test_a_run_that_diverges_stops_with_the_step_and_the_documents_and_leaves_no_output(
    talker: Path, tmp_path: Path
) -> None:
    data = talkers.jsonl(tmp_path / "data.jsonl", *({"text": talkers.TEXT[i : i + 60]} for i in range(40)))
    options = SHORT | {"lr": "99", "max_grad_norm": 0.0, "warmup": 0.0, "optim": "sgd", "max_steps": 30}
    with pytest.raises(surgeon.TrainingError, match=r"at step \d+, on document|after step \d+"):
        surgeon.finetune(talker, data=[data], output=tmp_path / "out", **options)

    assert not (tmp_path / "out").exists()
    status = json.loads((tmp_path / "out.run" / "status.json").read_text())
    assert status is not None
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert all(math.isfinite(record["loss"]) for record in read_metrics(tmp_path / "out.run") if "loss" in record)


def test_a_directory_with_a_run_is_not_begun_again_unless_it_is_resumed(
    talker: Path, text: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    surgeon.finetune(talker, data=[text], output=tmp_path / "one", run_dir=run, **SHORT)
    with pytest.raises(surgeon.OutputError, match="holds a run"):
        surgeon.finetune(talker, data=[text], output=tmp_path / "two", run_dir=run, **SHORT)
    again = surgeon.finetune(talker, data=[text], output=tmp_path / "two", run_dir=run, resume=True, **SHORT)

    assert again.steps == 4
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("change", "named"), [({"lr": "2e-3"}, "--lr"), ({"seed": 1}, "--seed"), ({"batch_size": 1}, "--batch-size")]
)
def test_a_run_is_resumed_only_as_it_began(
    change: dict[str, Any], named: str, talker: Path, text: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    surgeon.finetune(talker, data=[text], output=tmp_path / "one", run_dir=run, **SHORT)
    with pytest.raises(surgeon.PlanError, match=named):
        surgeon.finetune(talker, data=[text], output=tmp_path / "two", run_dir=run, resume=True, **(SHORT | change))


def test_rows_longer_than_the_model_sees_are_refused(talker: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(surgeon.PlanError, match="sees 64 tokens, not 65"):
        surgeon.finetune(talker, data=[text], output=tmp_path / "out", **(SHORT | {"sequence_length": 65}))


def test_nothing_is_left_of_a_run_whose_data_are_bad(talker: Path, tmp_path: Path) -> None:
    data = talkers.written(tmp_path / "data.jsonl", '{"text": "good"}\n{"text": 5}\n')
    with pytest.raises(surgeon.DataError, match=r"data\.jsonl:2"):
        surgeon.finetune(talker, data=[data], output=tmp_path / "out", **SHORT)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.run").glob("data/store.json"))

    data = talkers.written(tmp_path / "data.jsonl", '{"text": "good"}\n{"text": "better"}\n' * 9)
    assert surgeon.finetune(talker, data=[data], output=tmp_path / "out", **SHORT).steps == 4  # and it is no run


def changed_tensors(before: Path, after: Path) -> set[str]:
    """Return the names of the stored tensors that differ."""
    one, other = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (before, after))
    return {name for name in one if not torch.equal(one[name], other[name])}
