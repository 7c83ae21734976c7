"""Adapters that compress for a frozen reader: `--adapter` of compress and evaluate, and generate behind it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import talkers
from later import LATER

import surgeon
from surgeon.errors import CheckpointError, PlanError
from surgeon.gist.compressor import Compressor
from surgeon.gist.tokens import read_gist
from surgeon.models.loading import load_tokenizer

if LATER:
    import torch
    from transformers import AutoModelForCausalLM

    from surgeon.evals.generation import load_whole
    from surgeon.evals.gist_answers import answer_losses, answers
    from surgeon.gist import saved
    from surgeon.gist.records import FULL, GIST, NONE, read_forms

    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "The cat sat on the mat"
RECORDS = [{"instruction": f"{PROMPT} {'and the rat ' * (i % 3)}", "input": "sat", "output": "mat"} for i in range(12)]
TRAINED: dict[str, Any] = {
    "gist": True, "lora": 2, "keep_adapter": True, "max_steps": 8, "batch_size": 2, "sequence_length": 48, "lr": "3e-2",
    "eval_rows": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a toy that has gist tokens, and adapters that compress for it and that do not."""
    place = tmp_path_factory.mktemp("compressor")
    talkers.talker(place / "plain")
    surgeon.add_gist(place / "plain", tokens=2).save(place / "model")
    data = [talkers.jsonl(place / "data.jsonl", *RECORDS)]
    surgeon.finetune(place / "model", data=data, output=place / "frozen", gist_reader="frozen", **TRAINED)
    surgeon.finetune(place / "model", data=data, output=place / "same", **TRAINED)
    return place


def compress(place: Path, output: Path, **options: Any) -> saved.Saved:
    surgeon.compress(place / "model", PROMPT, output=output, **options)
    return saved.read(output)


def test_the_adapters_compress_and_the_model_itself_reads(place, tmp_path):
    without = compress(place, tmp_path / "without")
    with_adapters = compress(place, tmp_path / "with", adapter=place / "frozen")
    gist = read_gist(json.loads((place / "model/config.json").read_text()))
    tokenizer = load_tokenizer(str(place / "model"))
    ids = torch.tensor([[*tokenizer("<s>" + PROMPT, add_special_tokens=False)["input_ids"], *gist.ids_of(2)]])
    positions = torch.arange(-ids.shape[1] + 2, 2)[None]
    for found, adapter in ((without, None), (with_adapters, place / "frozen")):
        model = AutoModelForCausalLM.from_pretrained(place / "model")
        model = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            cache = model(input_ids=ids, position_ids=positions, use_cache=True).past_key_values
        for layer, (keys, values) in zip(cache.layers, found.states.layers, strict=True):
            torch.testing.assert_close(keys, layer.keys[..., -2:, :], rtol=1e-5, atol=1e-6)  # float32, in other sums
            torch.testing.assert_close(values, layer.values[..., -2:, :], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(with_adapters.states.layers[0][1], without.states.layers[0][1], atol=1e-3)


def test_the_model_without_its_adapters_writes_behind_what_they_compressed(place, tmp_path, run):
    about = compress(place, tmp_path / "bot", adapter=place / "frozen").about
    assert about["compressor"]["path"] == str(place / "frozen")
    assert len(about["compressor"]["sha256"]) == 64
    done = run("generate", place / "model", "\nsat\n", "--gist", tmp_path / "bot", "--max-new-tokens", 4)
    assert done.code == 0, done.err


def test_what_compressing_costs_is_measured_without_the_adapters_for_the_rest(place, tmp_path):
    found = surgeon.compress(place / "model", PROMPT, output=tmp_path / "b", adapter=place / "frozen", bench=True)
    assert found.cost is not None
    assert len(found.cost.rows) == 3


def test_evaluated_are_the_adapters_gist_and_the_untouched_models_other_forms(place, tmp_path):
    data = talkers.jsonl(tmp_path / "data.jsonl", *RECORDS[:5])
    source, tokenizer = surgeon.open_model(place / "model").source, load_tokenizer(str(place / "model"))
    gist = read_gist(source.config)
    records = read_forms([data], tokenizer, gist, num_tokens=2, samples=None)
    model = load_whole(source, "cpu")
    how: dict[str, Any] = {"batch_size": 2}
    before = {form: answer_losses(model, records, form, **how) for form in (FULL, GIST, NONE)}
    said = {form: answers(model, tokenizer, records, form, max_new_tokens=4, **how) for form in (FULL, NONE)}
    Compressor(place / "frozen").attach(model)
    how |= {"frozen": True}
    for form in (FULL, NONE):
        assert answer_losses(model, records, form, **how) == before[form]
        assert answers(model, tokenizer, records, form, max_new_tokens=4, **how) == said[form]
    trained = answer_losses(model, records, GIST, **how)
    assert sum(trained) < sum(before[GIST])

    # What is written behind the gist is what the saved prompt makes the model itself write.
    written = answers(model, tokenizer, records[:1], GIST, max_new_tokens=6, **how)
    surgeon.compress(place / "model", RECORDS[0]["instruction"], output=tmp_path / "bot", adapter=place / "frozen")
    alone = surgeon.generate(place / "model", "\nsat\n", gist=tmp_path / "bot", max_new_tokens=6)
    assert alone.text == written[0]


def test_evaluate_takes_adapters(place, tmp_path, run):
    data = talkers.jsonl(tmp_path / "data.jsonl", *RECORDS[:3])
    asked = ("evaluate", place / "model", "--gist", "--data", data, "--max-new-tokens", 2, "--json", "-q")
    plain, adapted = (json.loads(run(*asked, *more).out) for more in ((), ("--adapter", place / "frozen")))
    assert plain["full"]["loss"] == adapted["full"]["loss"]
    assert plain["gist"]["loss"] != adapted["gist"]["loss"]
    assert run("evaluate", place / "model", "--data", data, "--adapter", place / "frozen").code == 2


def test_adapters_that_read_too_are_refused(place, tmp_path):
    with pytest.raises(PlanError, match="frozen reader"):
        compress(place, tmp_path / "bot", adapter=place / "same")
    assert not (tmp_path / "bot").exists()


def test_adapters_of_another_model_are_refused(place, tmp_path):
    talkers.talker(tmp_path / "plain", "llama", text="Another text, of a cat." * 9)
    surgeon.add_gist(tmp_path / "plain", tokens=1).save(tmp_path / "other")
    with pytest.raises(PlanError, match="was trained for another model"):
        surgeon.compress(tmp_path / "other", PROMPT, output=tmp_path / "bot", adapter=place / "frozen")


def test_adapters_that_were_trained_on_the_hubs_copy_serve_a_directory(place, tmp_path):
    shutil.copytree(place / "frozen", tmp_path / "adapters")
    receipt = json.loads((tmp_path / "adapters/surgeon.json").read_text())
    receipt["source"] = {"id": "someone/model", "commit": "0" * 40}
    (tmp_path / "adapters/surgeon.json").write_text(json.dumps(receipt))
    assert compress(place, tmp_path / "bot", adapter=tmp_path / "adapters").states.num_tokens == 2


def test_adapters_that_are_not_whole_are_refused(place, tmp_path):
    shutil.copytree(place / "frozen", tmp_path / "half")
    (tmp_path / "half/adapter_model.safetensors").write_bytes(b"\x10")
    with pytest.raises(PlanError, match="PEFT cannot load"):
        compress(place, tmp_path / "bot", adapter=tmp_path / "half")
    (tmp_path / "half/adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        compress(place, tmp_path / "bot", adapter=tmp_path / "half")
    with pytest.raises(CheckpointError, match="there is no adapter"):
        compress(place, tmp_path / "bot", adapter=tmp_path / "nowhere")
