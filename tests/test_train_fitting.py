"""The batches of a step: how they are chosen by the memory, that a number wins, and that any split trains the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import talkers
from later import LATER

import surgeon
from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.checkpoint.source import spec_of
from surgeon.cost.estimate import estimate
from surgeon.cost.fitting import SHARE, Split, split
from surgeon.cost.memory import Workload
from surgeon.errors import TrainingError
from surgeon.surgery import open_source
from surgeon.train.run_dir import read_metrics
from surgeon.train.settings import Settings

if LATER:
    from surgeon.train.inputs import Inputs
    from surgeon.train.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")

WORK = Workload(steps=1, row_tokens=48, batch_size=8)
SHORT: dict[str, Any] = {"max_steps": 4, "sequence_length": 32, "lr": "1e-3", "eval_rows": 2, "eval_fraction": 0}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkers.talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    return talkers.written(tmp_path / "text.txt", talkers.TEXT * 4)


def anatomy_of(path: Path) -> Anatomy:
    return read_anatomy(spec_of(open_source(path)))


def peak(anatomy: Anatomy, **facts: Any) -> int:
    return estimate(anatomy, replace(WORK, **facts)).memory.peak


def chosen(anatomy: Anatomy, free: float | None, **options: Any) -> tuple[int, int, bool]:
    how = {"splits": True, "checkpointing": None, "can_recompute": True} | options
    found = split(anatomy, WORK, free=None if free is None else int(free / SHARE) + 1, **how)
    return found.batch_size, found.gradient_accumulation, found.activation_checkpointing


def test_the_largest_batch_that_fits_is_taken_and_activations_are_computed_twice_only_where_none_does(toy):
    anatomy = anatomy_of(toy("llama"))
    needs = {size: peak(anatomy, batch_size=size, gradient_accumulation=8 // size) for size in (8, 4, 2, 1)}
    twice = peak(anatomy, batch_size=1, gradient_accumulation=8, activation_checkpointing=True)

    assert chosen(anatomy, needs[8]) == (8, 1, False)
    assert chosen(anatomy, needs[8] - 1000) == (4, 2, False)
    assert chosen(anatomy, needs[2]) == (2, 4, False)
    assert chosen(anatomy, needs[1]) == (1, 8, False)
    assert twice < needs[1]
    assert chosen(anatomy, twice) == (1, 8, True)
    assert chosen(anatomy, needs[1] - 1000, can_recompute=False) == (1, 8, False)
    assert chosen(anatomy, None) == (8, 1, False)  # nobody knows what there is


def test_a_number_wins_and_only_what_is_left_open_is_chosen(toy):
    anatomy = anatomy_of(toy("llama"))

    assert chosen(anatomy, 1000, splits=False) == (8, 1, True)
    assert chosen(anatomy, 1000, splits=False, checkpointing=False) == (8, 1, False)
    assert chosen(anatomy, 10**9, checkpointing=True) == (8, 1, True)
    assert not split(anatomy, WORK, free=1000, splits=True, checkpointing=None, can_recompute=True).fits


def inputs_of(talker: Path, **settings: Any) -> Inputs:
    task = Task(Settings(**settings))
    return Inputs(open_source(talker), (), task, "cpu", lambda note: None, lambda: None, num_processes=1)


def test_a_run_that_fits_in_no_way_is_refused_before_anything_is_loaded_with_what_would_fit(talker):
    """The inputs have no data here, and no weights are read: the headers say that it cannot be."""
    least = peak(anatomy_of(talker), row_tokens=2, batch_size=1, activation_checkpointing=True)
    with pytest.raises(TrainingError, match=r"takes about .* are free on cpu") as refused:
        inputs_of(talker).check_fits(int(0.8 * least / SHARE))

    assert "These fit: --precision pure-bf16 (about " in str(refused.value.hint)
    assert "--batch-size 1 tries it anyway" in str(refused.value.hint)
    inputs_of(talker).check_fits(int(1.5 * least / SHARE))
    inputs_of(talker, batch_size=1).check_fits(1)
    inputs_of(talker).check_fits(None)


def test_any_split_of_a_step_trains_the_same(talker: Path, tmp_path: Path) -> None:
    """8 = 4 x 2 = 2 x 4, though the rows have answers of other lengths; a resumed run keeps the split it began with."""
    records = [{"prompt": "cat " * (1 + i % 3), "completion": "sat " * (1 + 5 * (i % 4))} for i in range(32)]
    data = talkers.jsonl(tmp_path / "data.jsonl", *records)
    options = SHORT | {"packing": "off", "save_every": 2, "keep_checkpoints": 2}
    surgeon.finetune(talker, data=[data], output=tmp_path / "out", **options)
    asked = json.loads((tmp_path / "out.run/batch.json").read_text())
    expected = [record["loss"] for record in read_metrics(tmp_path / "out.run") if "loss" in record]
    assert Split(**asked).settings() == {
        "batch_size": 8, "gradient_accumulation": 1, "activation_checkpointing": False
    }  # fmt: skip

    for size, twice in ((4, False), (2, True)):
        again = tmp_path / f"again-{size}"
        shutil.copytree(tmp_path / "out.run", tmp_path / f"again-{size}.run")
        shutil.rmtree(tmp_path / f"again-{size}.run/checkpoint-4")
        other = asked | {"batch_size": size, "gradient_accumulation": 8 // size, "activation_checkpointing": twice}
        (tmp_path / f"again-{size}.run/batch.json").write_text(json.dumps(other))
        surgeon.finetune(talker, output=again, resume=True)

        losses = [record["loss"] for record in read_metrics(tmp_path / f"again-{size}.run") if "loss" in record]
        assert losses == pytest.approx(expected, rel=1e-6)  # float32 sums in another order
        step = json.loads((again / "surgeon.json").read_text())["steps"][-1]["finetune"]
        assert step["settings"]["batch_size"] == size
        assert step["settings"]["gradient_accumulation"] == 8 // size
        assert step["settings"]["activation_checkpointing"] is twice


def test_auto_means_eight_sequences_times_the_accumulation(talker: Path, text: str, tmp_path: Path) -> None:
    found = surgeon.estimate_finetune(talker, data=[text], **SHORT | {"gradient_accumulation": 3})

    assert found.split is not None
    assert found.split.batch_size * found.split.gradient_accumulation == 24
    assert found.to_dict()["batch_size"] == found.split.batch_size
    assert "24 sequences a step on each device" in found.to_text()


def test_a_batch_size_that_is_none_is_a_usage_error(run, talker: Path, text: str) -> None:
    outcome = run("finetune", talker, "--data", text, "--batch-size", "many")

    assert outcome.code == 2
    assert "'many' is neither a number nor auto" in outcome.err
